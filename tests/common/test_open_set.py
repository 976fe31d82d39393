"""Training sets with OOD images: the draws against a plain loop, corrupted data sets, the cache of what pools gave."""

import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.random import RandomState
from PIL import Image

from common import noise
from common.datasets import open_set, pools
from common.datasets.in_memory import Data, Split
from common.datasets.open_set import Corruption, OpenSetData, corrupt
from common.gpu import processes
from common.runs.cli import UserError
from common.runs.locks import Lock
from tests import lines
from tests.common.small_file_data import make_imagenet32

N = 600
LABELS = {classes: RandomState(1).permutation(np.arange(N) % classes) for classes in (10, 15, 100)}
legacy_multinomial = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.5.0",
    reason="NumPy 2.5 draws otherwise where a probability is 0",
)


def draw(noise_type, labels, rate, ood_ratio, classes, seed=0, label_rng="python", pool_size=10**5):
    """The OOD images and the noisy labels, by the generators of the benchmark."""
    rng = RandomState(noise.OPEN_SET_SEED)
    chosen = noise.open_set(len(labels), ood_ratio, pool_size, rng)
    python = random.Random(seed) if label_rng == "python" else None
    noisy = noise.in_distribution_noise(
        noise_type, labels, chosen.positions, rate, ood_ratio, classes, rng, python, RandomState(seed)
    )
    return chosen, noisy


@pytest.mark.parametrize("kind", noise.POSTERIOR_TYPES)
def test_noise_from_a_posterior_is_for_in_distribution_images_alone(kind):
    labels, ood = LABELS[10], np.arange(0, N, 4)
    posterior = RandomState(2).dirichlet(np.full(10, 0.3), size=N)
    rest = np.setdiff1d(np.arange(N), ood)

    def noisy(rate: float, ood_ratio: float, ood=ood) -> np.ndarray:
        return noise.in_distribution_from_posterior(kind, labels, ood, rate, ood_ratio, 10, 3, posterior)

    found = noisy(0.3, 0.25)
    assert np.array_equal(found[ood], labels[ood])
    expected = noise.from_posterior(kind, labels[rest], 0.4, 10, 3, posterior[rest])
    assert np.array_equal(found[rest], expected)
    assert (noisy(0.75, 0.25)[rest] != labels[rest]).all() and np.array_equal(noisy(0, 0.25), labels)
    assert np.array_equal(noisy(0, 1, np.arange(N)), labels)
    with pytest.raises(ValueError, match="fractions of all images"):
        noisy(0.3, 0.8)


def plain_loop(noise_type, labels: list[int], rate, ood_ratio, classes, seed, label_rng):
    """The corruption as the specification tells it (Sec. 2.1), one draw after another: positions, rows, noisy labels."""
    numpy, python = RandomState(2718), random.Random(seed)
    ood = [i for i in range(len(labels)) if numpy.rand() < ood_ratio]
    rows = numpy.permutation(np.arange(1000))[: len(ood)].tolist()
    python.shuffle(list(range(len(labels))))
    drawn = [i for i in range(len(labels)) if i not in ood and numpy.rand() < rate / (1 - ood_ratio)]
    noisy = list(labels)
    for i in drawn:
        if noise_type == "sym" and label_rng == "python":
            noisy[i] = python.randint(0, classes - 1)
        elif noise_type == "sym":
            noisy[i] = int(classes * numpy.rand())
        elif classes == 10:
            noisy[i] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}.get(labels[i], labels[i])
    if noise_type == "sym" or classes == 10:
        return ood, rows, noisy
    matrix_rng = RandomState(seed)
    groups = noise.CIFAR100_SUPERCLASSES if noise_type == "superclass" else [c // 5 for c in range(classes)]
    for i, label in enumerate(labels):
        members = [c for c in range(classes) if groups[c] == groups[label]]
        row = [0.0] * classes
        row[label], row[members[(members.index(label) + 1) % 5]] = 1 - rate, rate
        noisy[i] = int(matrix_rng.multinomial(1, row).argmax())
    return ood, rows, noisy


@pytest.mark.parametrize(
    ("noise_type", "classes", "label_rng"),
    [
        *(("sym", classes, label_rng) for classes in (10, 100) for label_rng in ("python", "numpy")),
        ("asym", 10, "python"),
        pytest.param("asym", 15, "python", marks=legacy_multinomial),
        pytest.param("asym", 100, "python", marks=legacy_multinomial),
        pytest.param("superclass", 100, "python", marks=legacy_multinomial),
    ],
)
@pytest.mark.parametrize(("rate", "ood_ratio"), [(0.2, 0.2), (0.2, 0.6), (0.4, 0.6), (0.05, 0.9)])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_draws_are_those_of_a_plain_loop(noise_type, classes, label_rng, rate, ood_ratio, seed):
    labels = LABELS[classes].astype(np.uint8)
    before = random.getstate(), np.random.get_state()[1].tolist()
    chosen, noisy = draw(noise_type, labels, rate, ood_ratio, classes, seed, label_rng, pool_size=1000)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert np.array_equal(labels, LABELS[classes]), "the input is left alone"
    expected = plain_loop(noise_type, labels.tolist(), rate, ood_ratio, classes, seed, label_rng)
    assert (chosen.positions.tolist(), chosen.source.tolist(), noisy.tolist()) == expected
    assert chosen.positions.dtype == chosen.source.dtype == noisy.dtype == np.int64


def test_ratio_0_draws_nothing_and_ratio_1_replaces_every_image_and_leaves_the_labels():
    rng = RandomState(4)
    chosen = noise.open_set(N, 0, 10, rng)
    assert chosen.positions.tolist() == chosen.source.tolist() == []
    assert chosen.positions.dtype == chosen.source.dtype == np.int64
    assert rng.random_sample() == RandomState(4).random_sample()
    # the labels then take the first uniforms; the release has no such case
    _, noisy = draw("asym", np.full(N, 2), 0.3, 0, 10)
    assert np.array_equal(noisy == 0, RandomState(2718).random_sample(N) < 0.3)
    for rate in (0, 1e-12):  # no image is left to be noisy
        chosen, noisy = draw("sym", LABELS[10], rate, 1, 10)
        assert np.array_equal(chosen.positions, np.arange(N)) and np.array_equal(noisy, LABELS[10])


@pytest.mark.parametrize("noise_type", ["sym", "asym", "superclass"])
def test_rate_0_is_a_copy_and_draws_nothing(noise_type):
    states = RandomState(1), random.Random(1), RandomState(1)
    noisy = noise.in_distribution_noise(noise_type, LABELS[100], np.arange(5), 0, 0.2, 100, *states)
    assert np.array_equal(noisy, LABELS[100]) and not np.shares_memory(noisy, LABELS[100])
    fresh = RandomState(1).random_sample()
    assert (states[0].random_sample(), states[2].random_sample()) == (fresh, fresh)
    assert states[1].random() == random.Random(1).random()


@pytest.mark.parametrize(
    ("rate", "ood_ratio"), [(0.4, 0.6), (0.3, 0.7), (0.1, 0.9), (np.nextafter(0.3, 1), np.nextafter(0.7, 1))]
)
def test_shares_that_make_up_the_whole_leave_no_image_as_it_was(rate, ood_ratio):
    chosen, noisy = draw("asym", np.full(N, 9), rate, ood_ratio, 10)
    assert np.array_equal(np.flatnonzero(noisy == 9), chosen.positions)
    assert 0 < len(chosen.positions) < N


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_0_to_1_is_refused_by_name(wrong):
    labels, ood = LABELS[10], np.arange(2)
    for name, function, *arguments in (
        ("noise rate", draw, "sym", labels, wrong, 0.2, 10),
        ("noise rate", noise.next_in_group, [0, 0], wrong),
        ("ood ratio", noise.open_set, N, wrong, 10, RandomState(0)),
        ("ood ratio", noise.in_distribution_noise, "sym", labels, ood, 0.2, wrong, 10, RandomState(0)),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\], got {wrong}$"):
            function(*arguments)


@pytest.mark.parametrize(
    ("noise_type", "labels", "rate", "ood_ratio", "classes", "offending"),
    [
        ("no", 10, 0.2, 0.2, 10, "unknown noise type 'no': choose from sym, asym, superclass"),
        ("superclass", 10, 0.2, 0.2, 10, "superclass noise has no rule for 10 classes"),
        ("asym", 10, 0.2, 0.2, 101, "asym noise has no rule for 101 classes"),
        ("sym", 10, 0.2, 0.2, 9, r"labels must be in 0\.\.8, got 0\.\.9"),
        *(("sym", 10, rate, ratio, 10, f"noise rate {rate} and ood ratio {ratio} are .* more than 1")
          for rate, ratio in ((0.7, 0.4), (0.1, 1), (0.5, 0.5001))),
    ],
)  # fmt: skip
def test_noise_that_cannot_be_is_refused(noise_type, labels, rate, ood_ratio, classes, offending):
    with pytest.raises(ValueError, match=offending):
        draw(noise_type, LABELS[labels], rate, ood_ratio, classes)
    with pytest.raises(ValueError, match="asym noise of 100 classes needs matrix_rng"):
        noise.in_distribution_noise("asym", LABELS[100], np.arange(2), 0.2, 0.2, 100, RandomState(0))


def test_a_pool_with_fewer_images_than_places_is_refused_and_one_with_as_many_is_used_up():
    places = len(draw("sym", LABELS[10], 0, 0.4, 10)[0].positions)
    words = f"{places} images are to be replaced, and the pool has only {places - 1}"
    with pytest.raises(ValueError, match=words):
        noise.open_set(N, 0.4, places - 1, RandomState(noise.OPEN_SET_SEED))
    chosen = noise.open_set(N, 0.4, places, RandomState(noise.OPEN_SET_SEED))
    assert sorted(chosen.source) == list(range(places))


def test_the_next_class_of_a_group_is_the_first_after_its_last():
    matrix = noise.next_in_group([7, 1, 7, 3, 7, 1], 0.3)
    expected = np.eye(6) * 0.7
    for own, following in ((0, 2), (2, 4), (4, 0), (1, 5), (5, 1), (3, 3)):
        expected[own, following] += 0.3  # a class that is alone in its group stays
    assert np.allclose(matrix, expected) and np.allclose(matrix.sum(axis=1), 1)
    assert np.array_equal(noise.next_in_group([0, 0], 0), np.eye(2))
    assert np.array_equal(noise.next_in_group([0, 0], 1), np.eye(2)[::-1])


SIZE, SHAPE = 90, (32, 32, 3)
POOL_SIZE = 40
IMAGENET = Corruption("imagenet32", 0.3, "sym", 0.2)


def small(classes: int = 10, shape=SHAPE, name: str = "own", size: int = SIZE, seed: int = 0) -> Data:
    """A data set of noise."""
    rng = RandomState(seed)

    def split(count: int) -> Split:
        images = rng.randint(0, 256, (count, *shape), dtype=np.uint8)
        return Split(images, rng.permutation(np.arange(count) % classes))

    return Data(name, split(size), split(10), classes, (0.5,) * shape[2], (0.25,) * shape[2])


def save(data: Data, path: Path) -> None:
    arrays = {"train_images": data.train.images, "train_labels": data.train.labels}
    np.savez(path, **arrays, test_images=data.test.images, test_labels=data.test.labels)


message = partial(lines.message, corrupt)


def assert_same(found: tuple, expected: tuple) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with 40 images of ImageNet 32x32, 40 photographs and the data set `other`."""
    make_imagenet32(tmp_path / "imagenet32", sizes=(4,) * 10)
    (tmp_path / "places365").mkdir()
    for number in range(POOL_SIZE):
        photograph = Image.new("RGB", (40, 36), (6 * number, number, 255))
        photograph.save(tmp_path / "places365" / f"{number:02}.png")
    save(small(size=POOL_SIZE, seed=7), tmp_path / "other.npz")
    return tmp_path


@pytest.mark.parametrize("pool", ["imagenet32", "place365", "other"])
def test_some_images_are_the_pools_and_some_labels_noise(root, pool):
    data, unchanged = small(), small()
    found = corrupt(data, Corruption(pool, 0.3, "sym", 0.2, noise_seed=3), root)
    (positions, source), noisy = draw("sym", data.train.labels, 0.2, 0.3, 10, seed=3, pool_size=POOL_SIZE)
    assert found.ood.dtype == bool and np.array_equal(np.flatnonzero(found.ood), positions)
    assert np.array_equal(found.images[positions], np.stack(pools.open_pool(pool, root).take(source)))
    assert np.array_equal(found.images[~found.ood], data.train.images[~found.ood])
    assert found.images.shape == data.train.images.shape and found.images.dtype == np.uint8
    assert np.array_equal(found.observed, noisy) and found.observed.dtype == np.int64
    assert_same(data.train, unchanged.train)
    assert not np.shares_memory(found.images, data.train.images)
    assert_same(corrupt(data, Corruption(pool, 0.3, "sym", 0.2, noise_seed=3), root), found)


def test_noise_from_a_posterior_is_drawn_for_the_images_that_stay(root):
    data, eta = small(), RandomState(2).dirichlet(np.full(10, 0.3), size=SIZE)
    corruption = IMAGENET._replace(noise_type="hard", noise_seed=3)
    found = corrupt(data, corruption, root, posterior=eta)
    rest, labels = np.flatnonzero(~found.ood), data.train.labels
    expected = noise.from_posterior("hard", labels[rest], 0.2 / 0.7, 10, 3, eta[rest])
    assert np.array_equal(found.observed[rest], expected)
    assert np.array_equal(found.observed[found.ood], labels[found.ood])
    assert np.array_equal(found.images, corrupt(data, IMAGENET, root).images)
    assert "hard noise needs a posterior" in message(data, corruption, root)


def test_labels_decide_neither_places_nor_images_and_seeds_only_labels(root):
    first, others = corrupt(small(), IMAGENET, root), small()
    others = others._replace(train=Split(others.train.images, (others.train.labels + 1) % 10))
    changes = ({"noise_seed": 1}, {"label_rng": "numpy"}, {"noise_type": "asym"})
    different = [corrupt(small(), IMAGENET._replace(**change), root) for change in changes]
    for found in (corrupt(others, IMAGENET, root), *different):
        assert np.array_equal(found.images, first.images) and np.array_equal(found.ood, first.ood)
        assert found.sha256 == first.sha256
        assert not np.array_equal(found.observed, first.observed)
    # SNCF's labels come from the stream of the images: they have no seed of their own
    assert_same(corrupt(small(), IMAGENET._replace(label_rng="numpy", noise_seed=1), root), different[1])
    expected = draw("sym", small().train.labels, 0.2, 0.3, 10, label_rng="numpy", pool_size=POOL_SIZE)[1]
    assert np.array_equal(different[1].observed, expected)
    assert corrupt(small(seed=1), IMAGENET, root).sha256 == first.sha256, "the other images do not matter"
    for change in ({"ood_ratio": 0.2}, {"pool": "place365"}):
        assert corrupt(small(), IMAGENET._replace(**change), root).sha256 != first.sha256
    ood = np.flatnonzero(first.ood)
    assert open_set._sha256(ood + 1, first.images[ood]) != first.sha256


def test_labels_that_are_not_drawn_are_those_of_the_data_set_or_of_a_file(root):
    data, given, file = small(), RandomState(5).randint(0, 10, SIZE), str(root / "labels.npy")
    np.save(file, given)
    images = corrupt(data, IMAGENET, root).images
    for own, change, noise_file, expected in (
        *(
            (data, {"noise_type": "no", "noise_rate": rate}, None, data.train.labels)
            for rate in (0, 0.2, 0.9)
        ),
        (data._replace(noisy_labels=given), {"noise_type": "given"}, None, given),
        (data, {}, file, given),
        (data, {"noise_type": "no"}, file, given),
        (data, {"noise_type": "superclass", "noise_rate": 1}, file, given),
    ):
        found = corrupt(own, IMAGENET._replace(**change), root, noise_file=noise_file)
        assert np.array_equal(found.observed, expected) and not np.shares_memory(found.observed, expected)
        assert np.array_equal(found.images, images)
    assert "own brings no noisy_labels" in message(data, IMAGENET._replace(noise_type="given"), root)
    np.save(file, given[1:])
    assert f"--noise_file {file}: holds 89 labels, " in message(data, IMAGENET, root, noise_file=file)


def test_without_images_from_elsewhere_no_pool_is_needed(tmp_path):
    data = small()
    for pool in ("imagenet32", "place365", "nothing", "own"):
        found = corrupt(data, Corruption(pool, 0, "sym", 0.5), tmp_path, cache=tmp_path / "cache")
        assert np.array_equal(found.images, data.train.images) and not found.ood.any()
        assert not np.shares_memory(found.images, data.train.images)
        assert np.array_equal(found.observed, draw("sym", data.train.labels, 0.5, 0, 10)[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "pool"),
    [((8, 8, 1), "imagenet32"), ((84, 84, 3), "imagenet32"), ((20, 12, 3), "place365"), (SHAPE, "mnist")],
    ids=str,
)
def test_images_take_the_shape_of_those_whose_place_they_take(root, shape, pool):
    save(small(shape=(28, 28, 1), size=POOL_SIZE), root / "mnist.npz")
    data = small(shape=shape)
    found = corrupt(data, Corruption(pool, 0.3, "sym", 0.2), root)
    source = draw("sym", data.train.labels, 0.2, 0.3, 10, pool_size=POOL_SIZE)[0].source
    expected = pools.resized(pools.open_pool(pool, root).take(source), shape)
    assert np.array_equal(found.images[found.ood], expected)
    assert found.images.shape == data.train.images.shape


def test_a_data_set_is_no_pool_for_itself_nor_a_pool_too_small(root):
    save(small(), root / "own.npz")
    text = message(small(), Corruption("own", 0.2, "sym", 0.2), root)
    assert text.startswith("--corruption own: these are the training images themselves")
    text = message(small(), Corruption("imagenet32", 0.6, "sym", 0.2), root, cache=root / "cache")
    places = (RandomState(2718).random_sample(SIZE) < 0.6).sum()
    words = f"{places} images are to be replaced, and the pool has only 40; use a smaller --ood-ratio"
    assert text == f"--corruption imagenet32: {words}"
    assert not (root / "cache").exists()


@pytest.mark.parametrize(
    ("corruption", "offending"),
    [
        (Corruption("other", 0.3, "sym", 0.8), "--noise-type sym --noise-ratio 0.8: noise rate 0.8 and ood ratio 0.3 are"),
        (Corruption("other", 0.3, "superclass", 0.2), "--noise-type superclass .*: superclass noise has no rule for 10 classes"),
        (Corruption("other", 0.3, "uniform", 0.2), "--noise-type uniform .*: unknown noise type 'uniform'"),
        (Corruption("nowhere", 0.3, "sym", 0.2), "--corruption nowhere: unknown data set nowhere"),
    ],
)  # fmt: skip
def test_a_corruption_that_cannot_be_is_refused_in_one_line(root, corruption, offending):
    with pytest.raises(UserError, match=f"^{offending}"):
        corrupt(small(), corruption, root)


def test_one_process_of_several_speaks_and_writes(root, capsys, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    second = cached(root)
    assert capsys.readouterr().out == "" and not (root / "cache").exists()
    monkeypatch.setattr(processes, "rank", lambda: 0)
    first = cached(root)
    line = f"{first.ood.sum()} of 90 training images replaced by images of imagenet32"
    assert line in capsys.readouterr().out
    assert_same(first, second)


def cached(root: Path, corruption: Corruption = IMAGENET, data: Data | None = None) -> OpenSetData:
    return corrupt(data or small(), corruption, root, cache=root / "cache")


def cache_file(root: Path, pool: str = "imagenet32") -> Path:
    return root / "cache" / f"own-{pool}-0.3.npz"


def refusal(root: Path, corruption: Corruption = IMAGENET, data: Data | None = None) -> str:
    """The one line that reading the cache ends in: it names the file and says what to do."""
    text = message(data or small(), corruption, root, cache=root / "cache")
    assert text.startswith(str(cache_file(root, corruption.pool))) and "remove it" in text
    return text


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache").rglob("*") if path.suffix != ".lock")


@pytest.mark.parametrize("pool", ["imagenet32", "place365"])
def test_a_pool_of_files_is_read_once(root, capsys, pool):
    corruption, file = IMAGENET._replace(pool=pool), cache_file(root, pool)
    expected = corrupt(small(), corruption, root)
    assert_same(cached(root, corruption), expected)
    assert files(root) == [file.name]
    content = file.read_bytes()
    capsys.readouterr()
    for folder in ("imagenet32", "places365"):
        shutil.rmtree(root / folder)
    assert_same(cached(root, corruption), expected)
    assert f"{expected.ood.sum()} images of {pool} from {file}" in capsys.readouterr().out
    # the images serve other labels too, and the draws that follow them are the same
    for change in ({"label_rng": "numpy"}, {"noise_type": "asym", "noise_rate": 0.5}):
        other = corruption._replace(**change)
        drawn = other.noise_type, small().train.labels, other.noise_rate, 0.3, 10, 0, other.label_rng
        assert np.array_equal(cached(root, other).observed, draw(*drawn, POOL_SIZE)[1])
    assert file.read_bytes() == content


def test_a_pool_given_by_its_folder_is_kept_under_the_same_name(root):
    expected = cached(root)
    shutil.move(root / "imagenet32", root / "elsewhere")
    for _ in range(2):
        assert_same(corrupt(small(), IMAGENET, root, root / "elsewhere", root / "cache"), expected)
        assert files(root) == ["own-imagenet32-0.3.npz"]
        shutil.rmtree(root / "cache")
    make_imagenet32(root / "larger", sizes=(5,) * 10)
    corrupt(small(), IMAGENET, root, root / "larger", root / "cache")
    assert "(other files)" in message(small(), IMAGENET, root, root / "elsewhere", root / "cache")


def test_each_ratio_pool_of_files_and_data_set_has_a_file_of_its_own(root):
    before = sorted(root.rglob("*"))
    corrupt(small(), IMAGENET, root)  # without a folder for caches
    cached(root, IMAGENET._replace(pool="other"))  # a data set
    assert sorted(root.rglob("*")) == before
    for corruption in (IMAGENET, IMAGENET._replace(ood_ratio=0.2), IMAGENET._replace(pool="place365")):
        cached(root, corruption)
    cached(root, data=small(name="second"))
    expected = [f"own-{kind}.npz" for kind in ("imagenet32-0.2", "imagenet32-0.3", "place365-0.3")]
    assert files(root) == [*expected, "second-imagenet32-0.3.npz"]


def test_images_of_another_pool_are_refused(root):
    for pool, file in (("imagenet32", "train_data_batch_2"), ("place365", "07.png")):
        cached(root, IMAGENET._replace(pool=pool))
        path = root / pools.FOLDERS[pool] / file
        content = path.read_bytes()
        path.write_bytes(content + b".")
        text = refusal(root, IMAGENET._replace(pool=pool))
        assert "was not made for this run (other files): " in text and "--open-set-cache" in text
        path.write_bytes(content)
        cached(root, IMAGENET._replace(pool=pool))
        path.unlink()
        assert "(other files)" in refusal(root, IMAGENET._replace(pool=pool))


def test_images_for_other_training_images_are_refused(root):
    cached(root)
    for other in (small(size=SIZE + 1), small(shape=(28, 28, 1))):
        assert "(other images)" in refusal(root, data=other)
    cache_file(root).rename(root / "cache" / "second-imagenet32-0.3.npz")
    text = message(small(name="second"), IMAGENET, root, cache=root / "cache")
    assert "(other data_set)" in text


def rewritten(path: Path, **changes) -> None:
    """The cache file with other arrays, its parameters as they were."""
    arrays = {**np.load(path), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_rows_that_the_draws_do_not_ask_for_and_a_content_that_was_changed_are_refused(root):
    cached(root)
    path = cache_file(root)
    content, kept = path.read_bytes(), open_set.read_cache(path, {})
    wanted = {"data_set": "own", "images": [SIZE, *SHAPE], "pool": "imagenet32", "ood_ratio": 0.3}
    wanted |= {"seed": 2718, "files": pools.listing("imagenet32", root)}
    open_set.write_cache(path, kept._replace(source=kept.source[::-1]), wanted)
    assert "holds other images than the draws ask for" in refusal(root)
    open_set.write_cache(path, kept, {**wanted, "seed": 1})
    assert "(other seed)" in refusal(root)
    open_set.write_cache(path, kept, wanted)
    cached(root)

    no_json = ("no json", "[]", "3", "{}", '{"pool_size": 40}', '{"pool_size": null, "sha256": ""}')
    for words, *changes in (
        ("its content does not match its sha256", {"images": kept.images ^ 1}, {"source": kept.source[::-1]}),
        ("is damaged (", {"images": None}, {"source": None}, {"parameters": None}),
        ("is damaged (", *({"parameters": text} for text in no_json)),
    ):
        for change in changes:
            path.write_bytes(content)
            rewritten(path, **change)
            assert words in refusal(root)


def test_a_damaged_cache_is_refused_in_one_line_or_as_good_as_whole(tmp_path):
    path = tmp_path / "cache.npz"
    kept = open_set.Kept(50, np.arange(6), RandomState(0).randint(0, 256, (6, 4, 4, 3), dtype=np.uint8))
    open_set.write_cache(path, kept, {"pool": "some"})
    content, refused = path.read_bytes(), 0
    damages = [b"", b"no zip at all", *(content[:keep] for keep in (10, 300, len(content) // 2, -1))]
    # a changed byte of its zip directory may make it seem encrypted or packed
    for position in (*range(0, 40), *range(len(content) - 200, len(content))):
        damages.append(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            found = open_set.read_cache(path, {"pool": "some"})
        except UserError as error:
            assert str(error).startswith(f"{path} is damaged (") and "\n" not in str(error)
            refused += 1
        else:  # a byte that nobody reads, as the time of day
            assert_same(found, kept)
    assert refused > 100


def test_a_cache_that_cannot_be_written_is_told_and_gone_round(root, capsys, monkeypatch):
    expected, path = corrupt(small(), IMAGENET, root), cache_file(root)

    def full(_) -> None:
        raise OSError(28, "No space left on device")

    (root / "cache").write_text("a file where the folder should be")
    assert_same(cached(root), expected)
    printed = capsys.readouterr().out
    assert f"note: {path} cannot be written (" in printed
    assert "the next run will read the pool again" in printed
    (root / "cache").unlink()
    monkeypatch.setattr("common.runs.files.os.fsync", full)
    assert_same(cached(root), expected)
    assert f"note: {path} cannot be written (No space left on device)" in capsys.readouterr().out
    assert files(root) == [], "nothing half-written"


def test_a_cache_that_another_process_writes_is_left_to_it(root, capsys):
    path = cache_file(root)
    path.parent.mkdir()
    with Lock(path.with_suffix(".lock"), "wait"):
        cached(root)
    assert f"note: {path} is being written by another process" in capsys.readouterr().out
    assert files(root) == []
    cached(root)
    assert files(root) == [path.name]


def test_a_pool_that_fails_leaves_no_cache(root):
    for photograph in (root / "places365").iterdir():
        photograph.write_bytes(b"")
    corruption = IMAGENET._replace(pool="place365")
    assert "is no image of a known format" in message(small(), corruption, root, cache=root / "cache")
    shutil.rmtree(root / "places365")
    assert "no images found" in message(small(), corruption, root, cache=root / "cache")
    assert not (root / "cache").exists()


def test_another_number_of_imagenet_images_is_noted_with_and_without_the_cache(root, capsys, monkeypatch):
    note = "note: imagenet32 holds 40 images, ImageNet 32x32 has 1281167: not the benchmark's images\n"
    for _ in range(2):
        cached(root)
        assert note in capsys.readouterr().out
    cached(root, IMAGENET._replace(pool="place365"))
    monkeypatch.setattr(pools, "IMAGENET32_SIZE", POOL_SIZE)
    cached(root)
    assert "note" not in capsys.readouterr().out
