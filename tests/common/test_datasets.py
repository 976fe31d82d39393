"""Data sets: the embedded digits, a user's own .npz, torchvision's copies; what is missing, wrong or damaged."""

import io
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common import datasets
from common.datasets.__main__ import main
from common.datasets.in_memory import MNIST_MD5
from common.runs.cli import UserError
from tests import lines
from tests.common.small_file_data import write_lines

ROOT = Path(__file__).resolve().parents[2]
UNPACK = ROOT.parent / "shared" / "data" / "unpack.py"
CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]


def message(name: str, root: Path) -> str:
    """The one line that loading this data set ends in."""
    return lines.message(datasets.load, name, root)


def test_digits_are_1437_and_360_grey_images_of_10_classes():
    data = datasets.load("digits")
    assert (data.num_classes, data.noisy_labels) == (10, None)
    for (images, labels), count in ((data.train, 1437), (data.test, 360)):
        assert (images.shape, images.dtype) == ((count, 8, 8, 1), np.uint8)
        assert (images.min(), images.max()) == (0, 255)
        assert (labels.shape, labels.dtype) == ((count,), np.int64)
        assert np.unique(labels).tolist() == list(range(10))
    pixels = data.train.images / 255
    assert data.mean == pytest.approx((pixels.mean(),))
    assert data.std == pytest.approx((pixels.std(),))


RNG = np.random.RandomState(0)
GOOD = {
    "train_images": RNG.randint(0, 256, size=(20, 6, 5, 3), dtype=np.uint8),
    "train_labels": np.arange(20) % 4,
    "test_images": RNG.randint(0, 256, size=(8, 6, 5, 3), dtype=np.uint8),
    "test_labels": np.arange(8) % 4,
}


def write(folder: Path, name: str = "own", **changes) -> Path:
    """The good arrays with some changed; None leaves one out."""
    path = folder / f"{name}.npz"
    np.savez(path, **{key: array for key, array in {**GOOD, **changes}.items() if array is not None})
    return path


def test_an_npz_brings_its_arrays_class_count_and_pixel_statistics(tmp_path):
    write(tmp_path)
    data = datasets.load("own", tmp_path)
    assert (data.name, data.num_classes, data.noisy_labels) == ("own", 4, None)
    for part in ("train", "test"):
        images, labels = getattr(data, part)
        assert np.array_equal(images, GOOD[f"{part}_images"])
        assert np.array_equal(labels, GOOD[f"{part}_labels"])
        assert labels.dtype == np.int64
    pixels = GOOD["train_images"] / 255
    assert data.mean == pytest.approx(tuple(pixels.mean(axis=(0, 1, 2))))
    assert data.std == pytest.approx(tuple(pixels.std(axis=(0, 1, 2))))


def test_an_npz_may_be_grey_with_small_label_types_and_noisy_labels(tmp_path):
    grey = {key: GOOD[key][..., 0] for key in ("train_images", "test_images")}
    noisy = (np.arange(20) % 3).astype(np.uint8)
    write(tmp_path, **grey, train_labels=GOOD["train_labels"].astype(np.uint8), noisy_labels=noisy)
    data = datasets.load("own", tmp_path)
    assert data.train.images.shape == (20, 6, 5, 1)
    assert data.test.images.shape == (8, 6, 5, 1)
    assert data.train.labels.dtype == data.noisy_labels.dtype == np.int64
    assert np.array_equal(data.noisy_labels, noisy)
    assert len(data.mean) == len(data.std) == 1


def test_an_npz_of_a_known_name_has_its_classes_and_constants_and_goes_before_the_embedded(tmp_path):
    for name in ("cifar100", "digits"):
        write(tmp_path, name)
    data = datasets.load("cifar100", tmp_path)
    assert (data.num_classes, data.mean, data.std) == (100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
    data = datasets.load("digits", tmp_path)
    assert data.num_classes == 10 and np.array_equal(data.train.images, GOOD["train_images"])
    assert len(datasets.load("digits", tmp_path / "elsewhere").train.labels) == 1437
    write(tmp_path, train_images=np.full((20, 6, 5, 3), 7, np.uint8))
    assert min(datasets.load("own", tmp_path).std) > 0, "of constant pixels: it is divided by"
    for name, channels in (("cifar10", 1), ("mnist", 3)):  # other channels than the constants have
        write(tmp_path, name, **{key: GOOD[key][..., :channels] for key in ("train_images", "test_images")})
        data = datasets.load(name, tmp_path)
        assert len(data.mean) == len(data.std) == channels


def test_num_classes_settles_classes_that_only_the_test_set_has_and_a_column_of_labels_is_a_vector(tmp_path):
    write(tmp_path, test_labels=GOOD["test_labels"][:, None] + 1, num_classes=np.array(6))
    data = datasets.load("own", tmp_path)
    assert data.num_classes == 6
    assert np.array_equal(data.test.labels, GOOD["test_labels"] + 1)


OBJECTS = np.array([0, None] * 10, dtype=object)


@pytest.mark.parametrize(
    ("changes", "offending"),
    [
        ({"test_labels": None}, "no array test_labels"),
        ({"train_images": None, "test_images": None}, "no array train_images, test_images"),
        ({"train_images": GOOD["train_images"] / 255}, "train_images is float64"),
        ({"test_images": GOOD["test_images"].astype(np.int64)}, "test_images is int64"),
        ({"train_images": GOOD["train_images"].reshape(20, -1)}, r"train_images is uint8 \[20, 90\]"),
        ({"train_images": GOOD["train_images"].transpose(0, 3, 1, 2)}, r"transpose\(0, 2, 3, 1\): .*\[20, 3, 6, 5\]"),
        ({"test_images": GOOD["test_images"][:, :4]}, r"differ in shape: .*test_images is uint8 \[8, 4, 5, 3\]"),
        ({"train_labels": GOOD["train_labels"][1:]}, r"train_labels is int64 \[19\]"),
        ({"train_labels": GOOD["train_labels"].repeat(2).reshape(20, 2)}, r"train_labels is int64 \[20, 2\]"),
        ({"test_labels": GOOD["test_labels"] / 1}, "test_labels is float64"),
        ({"test_labels": np.array([0, 1, 2, 3, 0, 4, 1, 9])}, r"test_labels\[5\] is 4, outside 0\.\.3"),
        ({"train_labels": GOOD["train_labels"] - 1}, r"train_labels\[0\] is -1"),
        ({"train_images": np.zeros((0, 6, 5, 3), np.uint8), "train_labels": np.zeros(0, int)}, "train_labels .* one"),
        ({"test_images": np.zeros((0, 6, 5, 3), np.uint8), "test_labels": np.zeros(0, int)}, "test_labels .* one"),
        ({"train_labels": OBJECTS}, "Object arrays cannot be loaded"),
        ({"noisy_labels": OBJECTS}, "Object arrays cannot be loaded"),
        ({"noisy_labels": np.zeros(19, int)}, r"noisy_labels must be 20 integers: .*noisy_labels is int64 \[19\]"),
        ({"noisy_labels": np.zeros(20)}, "noisy_labels must be 20 integers: .*noisy_labels is float64"),
        ({"noisy_labels": np.full(20, 4)}, r"noisy_labels\[0\] is 4, outside 0\.\.3"),
        ({"num_classes": np.array([4, 4])}, r"num_classes must be one whole number"),
        ({"num_classes": np.array(3)}, r"train_labels\[\d+\] is 3, outside 0\.\.2"),
    ],
)  # fmt: skip
def test_a_wrong_npz_is_refused_with_its_path_and_what_is_wrong(tmp_path, changes, offending):
    path = write(tmp_path, **changes)
    text = message("own", tmp_path)
    assert str(path) in text
    assert re.search(offending, text), text


def test_an_unknown_name_lists_the_known_ones_and_where_to_put_ones_own(tmp_path):
    text = message("imagenet", tmp_path)
    assert all(name in text for name in ("imagenet", *datasets.NAMES))
    assert str(tmp_path / "imagenet.npz") in text


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("cifar10", "cifar-10-batches-py", CIFAR10_FILES),
        ("cifar100", "cifar-100-python", ["train", "test", "meta"]),
        ("mnist", "MNIST/raw", list(MNIST_MD5)),
        ("fashion_mnist", "FashionMNIST/raw", list(MNIST_MD5)),
    ],
)
def test_missing_data_names_the_folder_the_files_and_the_command(tmp_path, name, folder, files):
    text = message(name, tmp_path)
    assert f"{tmp_path / folder} " in text
    assert ", ".join(files) in text
    assert f"{name}.npz" in text
    assert f"python -m common.datasets download {name} --data_path {tmp_path}" in text


@pytest.mark.parametrize(
    "root", [".", "cifar-10-batches-py"], ids=["torchvision's root", "the release's root"]
)
def test_wrong_cifar_files_are_damaged(tmp_path, root):
    folder = tmp_path / "cifar-10-batches-py"
    for file in CIFAR10_FILES:
        write_lines(folder / file, ["not what it should be"])
    text = message("cifar10", tmp_path / root)
    assert f"{folder / 'data_batch_1'} is damaged (its md5" in text
    assert "python -m common.datasets download cifar10" in text


def idx(*shape: int, value: int = 0) -> bytes:
    """An idx file of one value throughout, laid out as MNIST's."""
    head = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
    return head + bytes([value]) * int(np.prod(shape))


@pytest.fixture
def fashion(tmp_path) -> Path:
    """The raw folder of a Fashion-MNIST of 12 training and 12 test images."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for file in MNIST_MD5:
        (folder / file).write_bytes(idx(12, 28, 28) if "images" in file else idx(12))
    return folder


IMAGES = idx(12, 28, 28)
NO_HEAD = "its head is not that of an idx file of bytes in 3 dimension(s)"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("t10k-images-idx3-ubyte", IMAGES[:-1], "(it has 9423 bytes, its head says 9424)"),
        ("t10k-images-idx3-ubyte", IMAGES + b"\0", "(it has 9425 bytes, its head says 9424)"),
        ("t10k-images-idx3-ubyte", IMAGES[:9], f"({NO_HEAD})"),
        ("t10k-images-idx3-ubyte", b"", f"({NO_HEAD})"),
        *(("t10k-labels-idx1-ubyte", labels, "") for labels in (idx(7), idx(12, value=200), IMAGES)),
    ],
    ids=["a byte short", "a byte long", "head cut", "empty", "few labels", "large labels", "no labels"],
)
def test_a_wrong_idx_file_is_damaged(fashion, tmp_path, file, content, reason):
    (fashion / file).write_bytes(content)
    assert f"{fashion / file} is damaged {reason}" in message("fashion_mnist", tmp_path)


def test_old_pickles_of_torchvision_are_not_read(fashion, tmp_path):
    """torchvision's class prefers FashionMNIST/processed/*.pt to the idx files, and would run what is in them."""
    for file in ("training.pt", "test.pt"):
        write_lines(fashion.parent / "processed" / file, ["not what we want"])
    assert len(datasets.load("fashion_mnist", tmp_path).train.labels) == 12


def flipped(content: bytes, start: int, count: int = 1, by: int = 1) -> bytes:
    """A file with some bytes changed."""
    return content[:start] + bytes(b ^ by for b in content[start : start + count]) + content[start + count :]


def wrong_npz() -> dict[str, bytes]:
    """Contents of files that are no .npz of arrays."""
    good, compressed, text = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(good, **GOOD)
    np.savez_compressed(compressed, train_images=RNG.randint(0, 256, 5000, dtype=np.uint8))
    with zipfile.ZipFile(text, "w") as archive:
        archive.writestr("train_images", "hello")
    content = good.getvalue()
    directory = content.index(b"PK\x01\x02")
    return {
        "head only": content[:300],
        "end cut off": content[:-30],
        "no byte": b"",
        "another kind of file": b"no zip at all",
        "as if encrypted": flipped(content, directory + 8),
        "as if packed otherwise": flipped(content, directory + 10),
        "compressed and damaged": flipped(compressed.getvalue(), 2000, 20, by=255),
        "no arrays in it": text.getvalue(),
    }


WRONG_NPZ = wrong_npz()


@pytest.mark.parametrize("way", WRONG_NPZ)
def test_an_npz_that_is_none_is_refused_in_one_line(tmp_path, way):
    path = tmp_path / "own.npz"
    path.write_bytes(WRONG_NPZ[way])
    text = message("own", tmp_path)
    assert text.startswith(f"{path} cannot be read: ") and "unsafe" not in text


def test_digits_need_no_download_and_other_names_have_no_source(tmp_path):
    datasets.download("digits", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no source to download own from: choose from mnist"):
        datasets.download("own", tmp_path)


@pytest.mark.skipif(not UNPACK.is_file(), reason="the real data is not there: no ../shared/data/unpack.py")
def test_the_real_mnist_is_read_from_torchvisions_files_and_a_flipped_byte_is_found(tmp_path):
    unpack = [sys.executable, str(UNPACK), "mnist", str(tmp_path), "--official"]
    subprocess.run(unpack, check=True, capture_output=True)
    data = datasets.load("mnist", tmp_path)
    assert (data.train.images.shape, data.test.images.shape) == ((60000, 28, 28, 1), (10000, 28, 28, 1))
    assert (data.num_classes, data.train.images.dtype, data.train.labels.dtype) == (10, np.uint8, np.int64)
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(flipped(path.read_bytes(), 5000))
    assert f"{path} is damaged" in message("mnist", tmp_path)


def test_check_prints_what_a_data_set_holds(capsys):
    main(["check", "digits"])
    printed = capsys.readouterr().out
    for part, count in (("train", 1437), ("test", 360)):
        assert f"digits {part}: images [{count}, 8, 8, 1], {count} labels of 10 classes" in printed


@pytest.mark.slow
def test_check_of_missing_data_ends_in_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "common.datasets", "check", "mnist", "--data_path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "mnist" in line and str(tmp_path) in line
