"""What a run trains and tests on: digits and arrays with drawn or given labels, Food-101N and Clothing1M from files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from afm import data as afm_data
from afm.data import images_at, load, sampled_positions
from afm.flags import parse_args
from common import datasets
from common.gpu.device import Device
from common.runs.cli import UserError
from tests.common.small_file_data import image_files, make_clothing1m, make_food101n, plant

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")


def load_with(*flags, seed: int = 0) -> afm_data.Data:
    """The data that the flags ask for."""
    args = parse_args([*map(str, flags), "--seed", str(seed)])
    return load(args, CPU, torch.Generator().manual_seed(seed))


# subsets ----------------------------------------------------------------------------------------------------------------


def limited_as(positions: np.ndarray, *flags: str) -> np.ndarray:
    args = parse_args(list(flags))
    return datasets.limited(positions, args.limit_train, args.seed)


def test_a_subset_is_seeded_in_order_and_all_there_is_where_more_is_asked_for():
    positions = np.arange(10, 60)
    few = [limited_as(positions, "--limit_train", "7", "--seed", str(seed)) for seed in (0, 0, 1)]
    assert len(few[0]) == 7
    assert (np.diff(few[0]) > 0).all()
    assert np.isin(few[0], positions).all()
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])
    for flags in ([], ["--limit_train", "50"], ["--limit_train", "51"]):
        assert limited_as(positions, *flags) is positions


def test_known_images_are_sampled_first(monkeypatch):
    monkeypatch.setattr(afm_data, "SAMPLED", 5)
    known = np.full(100, -1, dtype=np.int8)
    known[[3, 50, 97]] = [1, 0, 1]
    found = [sampled_positions(known, seed) for seed in (0, 0, 1)]
    assert {3, 50, 97} <= set(found[0].tolist())
    assert (np.diff(found[0]) > 0).all()
    assert len(found[0]) == 5
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])

    known[:50] = 0  # more than there is room for: some of them, and not the first ones
    few = sampled_positions(known, 0)
    assert (known[few] >= 0).all()
    assert few.tolist() != list(range(5))
    assert sampled_positions(known[:4], 0).tolist() == [0, 1, 2, 3]


# from memory ------------------------------------------------------------------------------------------------------------

DIGITS = ("--dataset", "digits", "--train-batch", 64)


def test_digits_with_symmetric_noise():
    data = load_with(*DIGITS, "--noise-rate", 0.4)
    labels = datasets.load("digits").train.labels
    assert (data.name, data.num_classes, data.image_size, data.channels) == ("digits", 10, 8, 1)
    assert np.array_equal(data.clean, labels)
    assert (data.observed != labels).mean() == pytest.approx(0.4 * 0.9, abs=0.04)
    assert np.array_equal(data.known, (data.observed == labels).astype(np.int8))
    assert np.array_equal(data.train.labels.numpy(), data.observed)
    assert np.array_equal(data.test.labels.numpy(), datasets.load("digits").test.labels)
    assert data.validation is data.clean_train is None


def test_training_batches_are_shuffled_whole_and_augmented_others_are_not():
    data = load_with(*DIGITS, "--noise-type", "none", "--test-batch", 100)
    train, again = (torch.cat([index for _, index in data.train.batches]) for _ in range(2))
    assert len(train) == 22 * 64 == len(train.unique())  # of 1437 images
    assert not torch.equal(train, again)
    tested = [index for _, index in data.test.batches]
    assert torch.equal(torch.cat(tested), torch.arange(360))
    assert list(map(len, tested)) == [100, 100, 100, 60]
    sampled = [(views[0], index) for views, index in data.sampled_batches]
    assert torch.equal(torch.cat([index for _, index in sampled]), torch.arange(1437))
    assert data.sampled.tolist() == list(range(1437))
    plain = torch.cat([images for images, _ in sampled])
    (augmented,), index = next(iter(data.train.batches))
    assert augmented.shape == (64, 1, 8, 8)
    shifted = (augmented != plain[index]).flatten(1).any(dim=1)
    assert 30 < shifted.sum() < 64


def test_no_noise_is_the_true_label():
    data = load_with(*DIGITS, "--noise-type", "none")
    assert np.array_equal(data.observed, data.clean)
    assert (data.known == 1).all()


def test_the_labels_of_a_subset_are_those_it_has_among_all():
    everything, few = load_with(*DIGITS), load_with(*DIGITS, "--limit_train", 100)
    assert len(few.index) == len(few.observed) == len(few.train.labels) == 100
    assert np.array_equal(few.observed, everything.observed[few.index])
    assert np.array_equal(few.clean, everything.clean[few.index])
    assert few.sampled.tolist() == list(range(100))
    (images,), _ = next(iter(few.sampled_batches))
    all_images = torch.cat([views[0] for views, _ in everything.sampled_batches])
    assert torch.equal(images, all_images[few.index])


@pytest.fixture
def own_arrays(tmp_path):
    """A folder with own.npz: 20 training images of 16 pixels, noisy labels, 6 test images."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_images": rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
        for part, n in (("train", 20), ("test", 6))
    }
    arrays |= {"train_labels": np.arange(20) % 4, "test_labels": np.arange(6) % 4}
    np.savez(tmp_path / "own.npz", **arrays, noisy_labels=np.arange(1, 21) % 4)
    return tmp_path


def own(folder, *flags) -> afm_data.Data:
    return load_with("--dataset", "own", "--data-root", folder, "--train-batch", 4, *flags)


def test_given_labels_are_those_of_the_file_of_arrays(own_arrays):
    data = own(own_arrays, "--noise-type", "given")
    assert np.array_equal(data.observed, np.arange(1, 21) % 4)
    assert np.array_equal(data.clean, np.arange(20) % 4)
    assert (data.known == 0).all()
    assert (data.image_size, data.channels, data.num_classes) == (16, 3, 4)


def test_a_noise_file_takes_the_place_of_noise(own_arrays):
    labels = np.arange(20) % 4
    labels[3] = 0
    np.save(own_arrays / "labels.npy", labels)
    flags = ["--noise_file", own_arrays / "labels.npy"]
    data = own(own_arrays, *flags, "--noise-type", "symmetric")
    assert np.array_equal(data.observed, labels)
    assert np.flatnonzero(data.known == 0).tolist() == [3]
    few = own(own_arrays, *flags, "--limit_train", 8)
    assert np.array_equal(few.observed, labels[few.index])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--dataset", "digits", "--noise-type", "given"],
            "--noise-type given: digits brings no noisy_labels",
        ),
        (["--dataset", "digits", "--train-batch", 1438], "--train-batch 1438: there are only 1437"),
        (
            ["--dataset", "digits", "--limit_train", 10, "--train-batch", 11],
            "--train-batch 11: there are only 10",
        ),
        (["--dataset", "digits", "--noise_file", "nosuch.npy"], "--noise_file nosuch.npy"),
        (["--dataset", "nosuch"], "nosuch"),
        (["--dataset", "food101n"], "food101n"),
        (["--dataset", "food", "--data-root", "/nosuch"], "food101n not found in /nosuch; looked in /nosuch"),
        (
            ["--dataset", "clothing1m", "--data-root", "/nosuch"],
            "clothing1m not found in /nosuch; looked in /nosuch",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(flags, line):
    with pytest.raises(UserError, match=line) as refused:
        load_with(*flags)
    assert "\n" not in str(refused.value)


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(afm_data.processes, "world", lambda: 3)
    with pytest.raises(UserError, match=r"--train-batch 64: .* 3 processes"):
        load_with(*DIGITS)


def test_a_batch_of_all_images_is_enough():
    assert len(load_with("--dataset", "digits", "--train-batch", 1437).train.batches) == 1


# Food-101N --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def food_root(tmp_path_factory):
    """3 classes with 4 training and 2 test images; of the training images one is verified right and one wrong."""
    root = tmp_path_factory.mktemp("food")
    make_food101n(root)
    return root


def food(root, *flags) -> afm_data.Data:
    return load_with("--data-root", root, "--workers", 0, "--train-batch", 4, *flags)


def test_food101n_with_what_is_verified(food_root):
    data = food(food_root)
    assert (data.name, data.num_classes, data.image_size, data.channels) == ("food101n", 3, 224, 3)
    assert data.index.tolist() == list(range(12))
    assert data.observed.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.known.tolist() == [1, 0, -1, -1] * 3
    assert data.clean is data.validation is data.clean_train is None
    assert data.train.labels.tolist() == data.observed.tolist()
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.sampled.tolist() == list(range(12))
    assert data.skipped == ()


def test_food101n_batches(food_root):
    data = food(food_root, "--train-batch", 5, "--test-batch", 4)
    batches = list(data.train.batches)
    assert [images.shape for (images,), _ in batches] == [(5, 3, 224, 224)] * 2
    assert len(torch.cat([index for _, index in batches]).unique()) == 10
    assert [index.tolist() for _, index in data.test.batches] == [[0, 1, 2, 3], [4, 5]]
    plain = [torch.cat([views[0] for views, _ in data.sampled_batches]) for _ in range(2)]
    assert torch.equal(*plain)
    (images,), index = batches[0]
    assert not torch.allclose(images, plain[0][index])


def test_the_verified_images_are_sampled_where_there_is_no_room_for_all(food_root, monkeypatch):
    monkeypatch.setattr(afm_data, "SAMPLED", 7)
    data = food(food_root, "--test-batch", 3)
    assert set(np.flatnonzero(data.known >= 0)) < set(data.sampled.tolist())
    assert torch.cat([index for _, index in data.sampled_batches]).tolist() == list(range(7))
    # the batches count the sampled images, whatever places these have
    images = torch.cat([views[0] for views, _ in data.sampled_batches])
    monkeypatch.setattr(afm_data, "SAMPLED", 12)
    everything = torch.cat([views[0] for views, _ in food(food_root).sampled_batches])
    assert torch.equal(images, everything[data.sampled])

    monkeypatch.setattr(afm_data, "SAMPLED", 2)
    few = food(food_root, "--limit_train", 6)
    assert (few.known >= 0).sum() >= 2
    assert (few.known[few.sampled] >= 0).all()


def test_a_subset_of_food101n_keeps_its_labels_and_what_is_known(food_root):
    everything, few = food(food_root), food(food_root, "--limit_train", 6)
    assert len(few.index) == 6
    assert np.array_equal(few.observed, everything.observed[few.index])
    assert np.array_equal(few.known, everything.known[few.index])
    assert np.array_equal(few.train.labels.numpy(), few.observed)


def test_a_noise_file_replaces_the_labels_of_food101n(food_root, tmp_path):
    labels = np.arange(12) % 3
    np.save(tmp_path / "labels.npy", labels)
    data = food(food_root, "--noise_file", tmp_path / "labels.npy", "--limit_train", 6)
    assert np.array_equal(data.observed, labels[data.index])
    assert np.array_equal(data.train.labels.numpy(), data.observed)


def test_what_is_verified_of_a_label_is_not_known_of_another(food_root, tmp_path):
    labels = np.arange(12) // 4
    labels[[0, 5]] = 2  # one verified right and one verified wrong before
    np.save(tmp_path / "labels.npy", labels)
    data = food(food_root, "--noise_file", tmp_path / "labels.npy")
    assert data.known.tolist() == [-1, 0, -1, -1, 1, -1, -1, -1, 1, 0, -1, -1]


def test_the_folder_above_serves_as_well(tmp_path):
    make_food101n(tmp_path / "food")
    assert len(food(tmp_path).observed) == 12


def test_images_left_out_are_told_and_the_positions_are_those_of_the_list(tmp_path):
    make_food101n(tmp_path)
    keys = (tmp_path / "Food-101N_release/meta/imagelist.tsv").read_text().split()[1:]
    plant(tmp_path / "Food-101N_release/images" / keys[2], "missing")
    plant(tmp_path / "Food-101N_release/images" / keys[5], "truncated")
    with pytest.raises(UserError, match=keys[2]):
        food(tmp_path)
    data = food(tmp_path, "--on_bad_image", "skip")
    assert data.index.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [(Path(path).name, position) for path, position, _ in data.skipped] == [
        (Path(keys[2]).name, 2),
        (Path(keys[5]).name, 5),
    ]
    args = parse_args(["--data-root", str(tmp_path), "--workers", "0", "--on_bad_image", "skip"])
    shown = images_at(args, np.array([6, 3]))
    whole = afm_data.resize_and_center_crop()
    for image, position in zip(shown, (6, 3), strict=True):
        file = afm_data.datasets.images.read_image(tmp_path / "Food-101N_release/images" / keys[position])
        assert image.shape == (224, 224, 3)
        assert np.array_equal(image, whole(file).permute(1, 2, 0).numpy())


def test_images_at_of_digits_are_those_of_the_training_set():
    shown = images_at(parse_args(["--dataset", "digits"]), np.array([7, 0]))
    images = datasets.load("digits").train.images
    assert np.array_equal(np.stack(shown), images[[7, 0]])


def test_a_batch_of_more_than_all_files_is_refused(food_root):
    with pytest.raises(UserError, match="13"):
        food(food_root, "--train-batch", 13)


# Clothing1M -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clothing_root(tmp_path_factory):
    """12 noisy images of 3 classes, and 6 in each of the clean lists."""
    root = tmp_path_factory.mktemp("clothing")
    make_clothing1m(root)
    return root


def clothing(root, *flags) -> afm_data.Data:
    return load_with(
        "--dataset", "clothing1m", "--data-root", root, "--workers", 0, "--train-batch", 4, *flags
    )


def test_clothing1m_is_validated_and_tested_on_clean_images(clothing_root):
    data = clothing(clothing_root)
    assert (data.name, data.num_classes) == ("clothing1m", 14)
    assert data.observed.tolist() == [1, 0, 0, 0, 2, 1, 1, 1, 0, 2, 2, 2]
    assert (data.known == -1).all()
    assert data.clean_train is None
    files = [sorted(index.tolist()) for split in (data.test, data.validation) for _, index in split.batches]
    assert files == [[0, 1, 2, 3, 4, 5]] * 2
    assert data.test.labels.tolist() == data.validation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tested,), _ = next(iter(data.test.batches))
    (validated,), _ = next(iter(data.validation.batches))
    assert not torch.allclose(tested, validated)


def test_verified_images_join_the_noisy_ones_and_are_known(clothing_root):
    data = clothing(clothing_root, "--train-on", "noisy+verified")
    assert len(data.observed) == 15
    assert data.observed[12:].tolist() == [0, 1, 2]
    assert data.known.tolist() == [-1] * 12 + [1] * 3
    assert data.index.tolist() == [*range(12), 13, 15, 17]


def test_clean_images_are_batches_of_their_own(clothing_root):
    data = clothing(clothing_root, "--train-on", "noisy+clean")
    assert len(data.observed) == 12
    assert data.clean_train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    batches = list(data.clean_train.batches)
    assert [images.shape for (images,), _ in batches] == [(4, 3, 224, 224)]  # the rest is dropped
    few = clothing(clothing_root, "--train-on", "noisy+clean", "--limit_train", 5)
    assert len(few.clean_train.labels) == len(few.observed) == 5


def test_too_few_clean_images_for_a_batch_are_told_before_training(clothing_root):
    with pytest.raises(UserError, match="batch of 8"):
        clothing(clothing_root, "--train-on", "noisy+clean", "--train-batch", 8)


# caches -----------------------------------------------------------------------------------------------------------------


def test_a_cache_gives_the_same_test_images_without_the_files(tmp_path):
    make_food101n(tmp_path / "food")
    datasets.image_cache.build_caches(tmp_path / "cache", datasets.load_food101n(tmp_path / "food"))
    plain, cached = (food(tmp_path / "food", *flags) for flags in ([], ["--image-cache", tmp_path / "cache"]))
    for a, b in ((plain.test.batches, cached.test.batches), (plain.sampled_batches, cached.sampled_batches)):
        assert all(torch.equal(x[0], y[0]) for (x, _), (y, _) in zip(a, b, strict=True))
    for file in image_files(tmp_path / "food"):
        file.write_bytes(b"")
    assert len(list(cached.train.batches)) == 3
    limited_run = food(tmp_path / "food", "--image-cache", tmp_path / "cache", "--limit_train", 8)
    plain_images = torch.cat([views[0] for views, _ in cached.sampled_batches])
    (images,), _ = next(iter(limited_run.sampled_batches))
    assert torch.equal(images, plain_images[limited_run.index])
