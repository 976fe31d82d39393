"""What a run trains and tests on: digits and arrays with drawn or given labels, Food-101N and Clothing1M from files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from afm import data as afm_data
from afm.data import images_at, load, sampled_positions
from afm.flags import parse_args
from common import datasets
from common.datasets.images import read_image
from common.gpu.device import Device
from common.runs.cli import UserError
from tests.common.small_file_data import image_files, make_clothing1m, make_food101n, plant
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")
DIGITS = ("--dataset", "digits", "--train-batch", 64)


def load_with(*flags, seed: int = 0) -> afm_data.Data:
    """The data that the flags ask for."""
    args = parse_args([*map(str, flags), "--seed", str(seed)])
    return load(args, CPU, torch.Generator().manual_seed(seed))


def images_of(batches) -> torch.Tensor:
    return torch.cat([images for (images,), _ in batches])


def index_of(batches) -> torch.Tensor:
    return torch.cat([index for _, index in batches])


def test_known_images_are_sampled_first(monkeypatch):
    monkeypatch.setattr(afm_data, "SAMPLED", 5)
    known = np.full(100, -1, dtype=np.int8)
    known[[3, 50, 97]] = [1, 0, 1]
    found = [sampled_positions(known, seed) for seed in (0, 0, 1)]
    assert {3, 50, 97} <= set(found[0].tolist())
    assert len(found[0]) == 5 and (np.diff(found[0]) > 0).all()
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])

    known[:50] = 0  # more than there is room for: some of them, and not the first ones
    few = sampled_positions(known, 0)
    assert (known[few] >= 0).all() and few.tolist() != list(range(5))
    assert sampled_positions(known[:4], 0).tolist() == [0, 1, 2, 3]


def test_digits_with_symmetric_noise_and_a_subset_that_has_the_same_labels():
    data, few = (load_with(*DIGITS, "--noise-rate", 0.4, *more) for more in ([], ["--limit_train", 100]))
    labels = datasets.load("digits").train.labels
    assert (data.name, data.num_classes, data.image_size, data.channels) == ("digits", 10, 8, 1)
    assert np.array_equal(data.clean, labels)
    assert (data.observed != labels).mean() == pytest.approx(0.4 * 0.9, abs=0.04)
    assert np.array_equal(data.known, (data.observed == labels).astype(np.int8))
    assert np.array_equal(data.train.labels.numpy(), data.observed)
    assert np.array_equal(data.test.labels.numpy(), datasets.load("digits").test.labels)
    assert data.validation is data.clean_train is None

    assert len(few.index) == len(few.train.labels) == 100 and few.sampled.tolist() == list(range(100))
    assert np.array_equal(few.observed, data.observed[few.index])
    assert np.array_equal(few.clean, data.clean[few.index])
    assert torch.equal(images_of(few.sampled_batches), images_of(data.sampled_batches)[few.index])


def test_training_batches_are_shuffled_whole_and_augmented_others_are_not():
    data = load_with(*DIGITS, "--noise-type", "none", "--test-batch", 100)
    assert np.array_equal(data.observed, data.clean) and (data.known == 1).all()
    train, again = (index_of(data.train.batches) for _ in range(2))
    assert len(train) == 22 * 64 == len(train.unique())  # of 1437 images
    assert not torch.equal(train, again)
    assert [len(index) for _, index in data.test.batches] == [100, 100, 100, 60]
    assert torch.equal(index_of(data.test.batches), torch.arange(360))
    assert torch.equal(index_of(data.sampled_batches), torch.arange(1437))
    plain = images_of(data.sampled_batches)
    (augmented,), index = next(iter(data.train.batches))
    assert augmented.shape == (64, 1, 8, 8)
    assert 30 < (augmented != plain[index]).flatten(1).any(dim=1).sum() < 64


def test_given_labels_are_those_of_the_arrays_or_of_a_file(tmp_path):
    arrays = {}
    for part, n in (("train", 20), ("test", 6)):
        arrays |= {f"{part}_images": np.zeros((n, 16, 16, 3), np.uint8), f"{part}_labels": np.arange(n) % 4}
    np.savez(tmp_path / "own.npz", **arrays, noisy_labels=np.arange(1, 21) % 4)
    own = ("--dataset", "own", "--data-root", tmp_path, "--train-batch", 4)
    data = load_with(*own, "--noise-type", "given")
    assert data.observed.tolist() == [i % 4 for i in range(1, 21)] and (data.known == 0).all()
    assert (data.image_size, data.channels, data.num_classes) == (16, 3, 4)
    labels = np.arange(20) % 4
    labels[3] = 0
    np.save(tmp_path / "labels.npy", labels)
    data = load_with(*own, "--noise_file", tmp_path / "labels.npy", "--limit_train", 18)
    assert np.array_equal(data.observed, labels[data.index])
    assert data.index[data.known == 0].tolist() == [3]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--dataset digits --noise-type given", "--noise-type given: digits brings no noisy_labels"),
        ("--dataset digits --train-batch 1438", "--train-batch 1438: there are only 1437"),
        ("--dataset digits --limit_train 10 --train-batch 11", "--train-batch 11: there are only 10"),
        ("--dataset food101n", "food101n"),
        ("--dataset clothing1m --data-root /nosuch", "clothing1m not found in /nosuch; looked in /nosuch"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, line):
    assert line in message(load_with, *words.split())


def test_a_batch_must_be_shared_out_and_may_be_all_images(monkeypatch):
    assert len(load_with("--dataset", "digits", "--train-batch", 1437).train.batches) == 1
    monkeypatch.setattr(afm_data.processes, "world", lambda: 3)
    with pytest.raises(UserError, match=r"--train-batch 64: .* 3 processes"):
        load_with(*DIGITS)


def test_images_at_of_digits_are_those_of_the_training_set():
    shown = images_at(parse_args(["--dataset", "digits"]), np.array([7, 0]))
    assert np.array_equal(np.stack(shown), datasets.load("digits").train.images[[7, 0]])


@pytest.fixture(scope="module")
def food_root(tmp_path_factory):
    """3 classes with 4 training and 2 test images; of the training images one is verified right and one wrong."""
    root = tmp_path_factory.mktemp("data")
    make_food101n(root / "food")
    return root


def food(root, *flags) -> afm_data.Data:
    return load_with("--data-root", root, "--workers", 0, "--train-batch", 4, *flags)


def test_food101n_with_what_is_verified_and_a_subset(food_root):
    data, few = food(food_root / "food"), food(food_root, "--limit_train", 6)  # or the folder above
    assert (data.name, data.num_classes, data.image_size, data.channels) == ("food101n", 3, 224, 3)
    assert data.index.tolist() == data.sampled.tolist() == list(range(12))
    assert data.observed.tolist() == data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.known.tolist() == [1, 0, -1, -1] * 3
    assert data.clean is data.validation is data.clean_train is None
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.skipped == ()
    assert len(few.index) == 6
    assert few.observed.tolist() == few.train.labels.tolist() == data.observed[few.index].tolist()
    assert few.known.tolist() == data.known[few.index].tolist()


def test_food101n_batches(food_root):
    data = food(food_root, "--train-batch", 5, "--test-batch", 4)
    batches = list(data.train.batches)
    assert [images.shape for (images,), _ in batches] == [(5, 3, 224, 224)] * 2
    assert len(index_of(batches).unique()) == 10
    assert [index.tolist() for _, index in data.test.batches] == [[0, 1, 2, 3], [4, 5]]
    plain = images_of(data.sampled_batches)
    assert torch.equal(plain, images_of(data.sampled_batches))
    (images,), index = batches[0]
    assert not torch.allclose(images, plain[index])


def test_the_verified_images_are_sampled_where_there_is_no_room_for_all(food_root, monkeypatch):
    plain = images_of(food(food_root).sampled_batches)
    monkeypatch.setattr(afm_data, "SAMPLED", 7)
    data = food(food_root, "--test-batch", 3)
    assert set(np.flatnonzero(data.known >= 0)) < set(data.sampled.tolist())
    # the batches count the sampled images, whatever places these have
    assert index_of(data.sampled_batches).tolist() == list(range(7))
    assert torch.equal(images_of(data.sampled_batches), plain[data.sampled])


def test_what_is_verified_of_a_label_is_not_known_of_another(food_root, tmp_path):
    labels = np.arange(12) // 4
    labels[[0, 5]] = 2  # one verified right and one verified wrong before
    np.save(tmp_path / "labels.npy", labels)
    data = food(food_root, "--noise_file", tmp_path / "labels.npy")
    assert data.known.tolist() == [-1, 0, -1, -1, 1, -1, -1, -1, 1, 0, -1, -1]
    assert np.array_equal(data.train.labels.numpy(), labels)


def test_images_left_out_are_told_and_the_positions_are_those_of_the_list(tmp_path):
    make_food101n(tmp_path)
    keys = (tmp_path / "Food-101N_release/meta/imagelist.tsv").read_text().split()[1:]
    files = [tmp_path / "Food-101N_release/images" / key for key in keys]
    plant(files[2], "missing")
    plant(files[5], "truncated")
    with pytest.raises(UserError, match=keys[2]):
        food(tmp_path)
    data = food(tmp_path, "--on_bad_image", "skip")
    assert data.index.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    skipped = [(Path(path).name, position) for path, position, _ in data.skipped]
    assert skipped == [(files[i].name, i) for i in (2, 5)]
    args = parse_args(["--data-root", str(tmp_path), "--workers", "0", "--on_bad_image", "skip"])
    plain = afm_data.resize_and_center_crop()
    for image, position in zip(images_at(args, np.array([6, 3])), (6, 3), strict=True):
        assert image.shape == (224, 224, 3)
        assert np.array_equal(image, plain(read_image(files[position])).permute(1, 2, 0).numpy())


def test_a_cache_gives_the_same_test_images_without_the_files(tmp_path):
    make_food101n(tmp_path / "food")
    datasets.image_cache.build_caches(tmp_path / "cache", datasets.load_food101n(tmp_path / "food"))
    plain, cached = (food(tmp_path / "food", *flags) for flags in ([], ["--image-cache", tmp_path / "cache"]))
    sampled, tested = images_of(plain.sampled_batches), images_of(plain.test.batches)
    for file in image_files(tmp_path / "food"):
        file.write_bytes(b"")
    assert torch.equal(images_of(cached.test.batches), tested)
    assert torch.equal(images_of(cached.sampled_batches), sampled)
    assert len(list(cached.train.batches)) == 3
    few = food(tmp_path / "food", "--image-cache", tmp_path / "cache", "--limit_train", 8)
    assert torch.equal(images_of(few.sampled_batches), sampled[few.index])


@pytest.fixture(scope="module")
def clothing_root(tmp_path_factory):
    """12 noisy images of 3 classes, and 6 in each of the clean lists."""
    root = tmp_path_factory.mktemp("clothing")
    make_clothing1m(root)
    return root


def clothing(root, *flags) -> afm_data.Data:
    return food(root, "--dataset", "clothing1m", *flags)


def test_clothing1m_is_validated_and_tested_on_clean_images(clothing_root):
    data = clothing(clothing_root)
    assert (data.name, data.num_classes, data.clean_train) == ("clothing1m", 14, None)
    assert data.observed.tolist() == [1, 0, 0, 0, 2, 1, 1, 1, 0, 2, 2, 2]
    assert (data.known == -1).all()
    for split in (data.test, data.validation):
        assert index_of(split.batches).tolist() == list(range(6))
        assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.allclose(images_of(data.test.batches), images_of(data.validation.batches))


def test_verified_images_join_the_noisy_ones_and_are_known(clothing_root):
    data = clothing(clothing_root, "--train-on", "noisy+verified")
    assert data.observed[12:].tolist() == [0, 1, 2]
    assert data.known.tolist() == [-1] * 12 + [1] * 3
    assert data.index.tolist() == [*range(12), 13, 15, 17]


def test_clean_images_are_batches_of_their_own(clothing_root):
    data = clothing(clothing_root, "--train-on", "noisy+clean")
    assert len(data.observed) == 12 and data.clean_train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    shapes = [images.shape for (images,), _ in data.clean_train.batches]
    assert shapes == [(4, 3, 224, 224)]  # the rest is dropped
    few = clothing(clothing_root, "--train-on", "noisy+clean", "--limit_train", 5)
    assert len(few.clean_train.labels) == len(few.observed) == 5
    with pytest.raises(UserError, match="batch of 8"):
        clothing(clothing_root, "--train-on", "noisy+clean", "--train-batch", 8)
