"""Data sets that fit in memory: digits (embedded), MNIST, Fashion-MNIST, CIFAR-10/100, and any `<root>/<name>.npz`."""

import hashlib
import shlex
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.datasets.arrays import is_integer, read_npz
from common.runs.cli import UserError

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
NUM_CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
CLASS_NAMES = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
        "Ankle boot",
    ),
    "cifar10": (*("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),),
}

# the constants of the releases of SFA, Me-Momentum and SANM; CIFAR-10's std is not the data's own (0.247, 0.243, 0.262)
NORMALISATION = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}

# torchvision checks the archives of MNIST when it fetches them, but not the files it unpacks from them
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST_FILES = tuple((f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))


class Split(NamedTuple):
    """Images and their labels, in memory."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int64 [N]

    def only(self, keep: np.ndarray | slice) -> "Split":
        """The images at `keep`, positions."""
        return Split(self.images[keep], self.labels[keep])


class Data(NamedTuple):
    """A data set in memory. A folder of your own images may have no true labels: `train.labels` are its observed ones then."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    noisy_labels: np.ndarray | None = None  # int64 [N]: observed training labels of an .npz or a folder
    truth_known: bool = True  # whether train.labels are the true labels
    classes: tuple[str, ...] = ()  # names, by class id
    paths: tuple[str, ...] = ()  # of the training images, if they come from files
    # a folder's images left out: path, position in its list, reason
    skipped: tuple[tuple[str, int, str], ...] = ()

    def true_labels(self, index: np.ndarray, noise_type: str) -> np.ndarray | None:
        """The true labels of the training images at `index` [n]: int64 [n]; None if they are unknown.

        noise_type: "given", or noise that is drawn on train.labels, which are the true ones then.
        """
        return None if noise_type == "given" and not self.truth_known else self.train.labels[index]

    def files(self, index: np.ndarray) -> list[str]:
        """The paths of the training images at `index` [n]; empty unless they come from files."""
        return [self.paths[i] for i in index.tolist()] if self.paths else []


def load(name: str, root: str | Path = "./data", download: bool = False) -> Data:
    """The data set `name`: <root>/<name>.npz if that exists, else digits or torchvision's copy under root.

    root may also be the folder of the CIFAR batches itself, as in the releases. download fetches torchvision's copy
    first. UserError: unknown name, missing or damaged files, an .npz of wrong shapes, types or ranges.
    """
    root = Path(root)
    if (root / f"{name}.npz").is_file():
        return _load_npz(name, root / f"{name}.npz")
    if name == "digits":
        return _load_digits()
    if name not in TORCHVISION:
        raise UserError(
            f"unknown data set {name}: choose from {', '.join(NAMES)}, folder, or put your own at {root / name}.npz"
        )
    if download:
        _download(name, root)
    train, test = _load_torchvision(name, root)
    return _data(name, train, test)


def download(name: str, root: str | Path = "./data") -> None:
    """Fetch torchvision's copy of a data set into root, unless it is complete already."""
    if name == "digits":
        return
    if name not in TORCHVISION:
        raise UserError(f"no source to download {name} from: choose from {', '.join(TORCHVISION)}")
    _download(name, Path(root))


def _data(
    name: str,
    train: Split,
    test: Split,
    noisy_labels: np.ndarray | None = None,
    num_classes: int | None = None,
) -> Data:
    num_classes = num_classes or NUM_CLASSES.get(name, int(train.labels.max()) + 1)
    mean, std = NORMALISATION.get(name, ((), ()))
    if (
        len(mean) != train.images.shape[-1]
    ):  # no constants for this name, or an .npz of that name with other channels
        mean, std = pixel_statistics(train.images)
    classes = CLASS_NAMES.get(name, ())
    return Data(name, train, test, num_classes, mean, std, noisy_labels, classes=classes)


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, H, W, C], scaled to [0, 1]."""
    flat = images.reshape(-1, images.shape[-1])
    histograms = [np.bincount(flat[:, c], minlength=256) / len(flat) for c in range(flat.shape[1])]
    values = np.arange(256) / 255
    means = [float(h @ values) for h in histograms]
    deviations = [float(np.sqrt(h @ (values - m) ** 2)) for h, m in zip(histograms, means, strict=True)]
    return tuple(means), tuple(max(d, 1e-3) for d in deviations)


def _load_digits() -> Data:
    """1797 handwritten digits, 8x8, split 1437 / 360 by a fixed permutation."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (a second of import that only this data set needs)

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # 16 grey levels
    labels = bunch.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = (Split(images[part], labels[part]) for part in (order[:1437], order[1437:]))
    return _data("digits", train, test)


# torchvision's copies -------------------------------------------------------------------------------------------------


def _class(name: str) -> Any:
    """torchvision's class of a data set. Imported here: the import takes seconds, and digits and .npz do not need it."""
    import torchvision.datasets  # noqa: PLC0415

    return getattr(torchvision.datasets, TORCHVISION[name])


def _download(name: str, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for train in (True, False):
            _class(name)(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot download {name} into {root.resolve()}: {reason}") from None


def _load_torchvision(name: str, root: Path) -> tuple[Split, Split]:
    if name.startswith("cifar"):
        kind, place = _cifar_folder(name, root)
        parts = (kind(place, train=train) for train in (True, False))
        train, test = (Split(part.data, np.array(part.targets, dtype=np.int64)) for part in parts)
        return train, test
    folder = _checked_mnist_folder(name, root)
    # read file by file: torchvision's class would prefer old pickles in a folder `processed`, and run their code
    from torchvision.datasets.mnist import read_image_file, read_label_file  # noqa: PLC0415

    splits = []
    for images, labels in MNIST_FILES:
        split = Split(
            read_image_file(folder / images).numpy()[..., None], read_label_file(folder / labels).numpy()
        )
        if len(split.images) != len(split.labels) or not len(split.labels) or split.labels.max() > 9:
            raise _damaged(name, root, folder / labels, "its labels are not one of 0..9 per image")
        splits.append(split)
    return splits[0], splits[1]


def _cifar_folder(name: str, root: Path) -> tuple[Any, Path]:
    """The torchvision class and its root, once all files exist and match their md5."""
    kind = _class(name)
    files = {**dict(kind.train_list), **dict(kind.test_list), kind.meta["filename"]: kind.meta["md5"]}
    folder = root / kind.base_folder
    if not folder.is_dir() and (root / kind.train_list[0][0]).is_file():
        folder = root.resolve()  # the release's layout: root is the extracted folder itself
        kind = type(kind.__name__, (kind,), {"base_folder": folder.name})
    _check_present(name, root, folder, list(files))
    for file, md5 in files.items():
        if _md5(folder / file) != md5:
            raise _damaged(name, root, folder / file, "its md5 is not the published one")
    return kind, folder.parent


def _checked_mnist_folder(name: str, root: Path) -> Path:
    """The folder of the idx files, once all are checked: MNIST by md5, both data sets by their archives if these exist."""
    folder = root / TORCHVISION[name] / "raw"
    _check_present(name, root, folder, list(MNIST_MD5))
    archives = dict(_class(name).resources)
    for file, md5 in MNIST_MD5.items():
        archive = folder / f"{file}.gz"
        if name == "mnist" and _md5(folder / file) != md5:
            raise _damaged(name, root, folder / file, "its md5 is not the published one")
        if archive.is_file() and _md5(archive) != archives[archive.name]:
            raise _damaged(name, root, archive, "its md5 is not the published one")
        _check_idx(name, root, folder / file)
    return folder


def _check_idx(name: str, root: Path, path: Path) -> None:
    """Check an idx file: its head gives type (8: bytes) and dimensions, which must agree with its length."""
    dimensions = 3 if "images" in path.name else 1
    with path.open("rb") as file:
        magic, head = file.read(4), file.read(4 * dimensions)
    if magic != bytes([0, 0, 8, dimensions]) or len(head) < 4 * dimensions:
        raise _damaged(
            name, root, path, f"its head is not that of an idx file of bytes in {dimensions} dimension(s)"
        )
    expected = 4 + len(head) + int(np.prod(struct.unpack(f">{dimensions}I", head), dtype=np.int64))
    if path.stat().st_size != expected:
        raise _damaged(name, root, path, f"it has {path.stat().st_size} bytes, its head says {expected}")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _check_present(name: str, root: Path, folder: Path, files: list[str]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{name} not found in {root}; looked in {folder.resolve()} for {', '.join(missing)} and in {root.resolve()} for "
            f"{name}.npz; fetch it with: {_fetch(name, root)}"
        )


def _damaged(name: str, root: Path, path: Path, reason: str) -> UserError:
    return UserError(f"{path.resolve()} is damaged ({reason}): delete it and run {_fetch(name, root)}")


def _fetch(name: str, root: Path) -> str:
    return f"python -m common.datasets download {name} --data_path {shlex.quote(str(root))}"


# .npz -----------------------------------------------------------------------------------------------------------------


def _load_npz(name: str, path: Path) -> Data:
    arrays = _read_arrays(path)
    splits = [_checked_split(path, part, arrays) for part in ("train", "test")]
    # your own data set has as many classes as its labels say, but not more than training images
    num_classes = NUM_CLASSES.get(name, min(max(int(splits[0].labels.max()) + 1, 1), len(splits[0].labels)))
    if "num_classes" in arrays:
        num_classes = _given_classes(path, name, arrays["num_classes"])
    for part, split in zip(("train", "test"), splits, strict=True):
        _check_range(path, f"{part}_labels", split.labels, num_classes)
    if splits[0].images.shape[1:] != splits[1].images.shape[1:]:
        raise UserError(f"{path}: train and test images differ in shape: {_shapes(arrays)}")
    noisy = arrays.get("noisy_labels")
    if noisy is not None:
        if noisy.shape != splits[0].labels.shape or not is_integer(noisy):
            raise UserError(
                f"{path}: noisy_labels must be {len(splits[0].labels)} integers: {_shapes(arrays)}"
            )
        _check_range(path, "noisy_labels", noisy, num_classes)
        noisy = noisy.astype(np.int64)
    return _data(name, splits[0], splits[1], noisy, num_classes)


def _given_classes(path: Path, name: str, given: np.ndarray) -> int:
    """The num_classes of an .npz: for classes without training images."""
    if given.size != 1 or not is_integer(given) or not 1 <= given.item() <= 100_000:
        raise UserError(
            f"{path}: num_classes must be one whole number above 0, got {given.dtype} {given.tolist()}"
        )
    if given.item() != NUM_CLASSES.get(name, given.item()):
        raise UserError(f"{path}: num_classes is {given.item()}, {name} has {NUM_CLASSES[name]}")
    return int(given.item())


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    wanted = [f"{part}_{what}" for part in ("train", "test") for what in ("images", "labels")]
    try:
        arrays = read_npz(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise UserError(f"{path}: has no array {', '.join(missing)}; it needs {', '.join(wanted)}")
    return {key: arrays[key] for key in [*wanted, "noisy_labels", "num_classes"] if key in arrays}


def _checked_split(path: Path, part: str, arrays: dict[str, np.ndarray]) -> Split:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if images.ndim == 3:
        images = images[..., None]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        raise UserError(
            f"{path}: {part}_images are [N, C, H, W], here they are [N, H, W, C]: save "
            f"images.transpose(0, 2, 3, 1): {_shapes(arrays)}"
        )
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[-1] not in (1, 3)
        or 0 in images.shape[1:]
    ):
        raise UserError(
            f"{path}: {part}_images must be uint8 [N, H, W] or [N, H, W, 1 or 3]: {_shapes(arrays)}"
        )
    if not is_integer(labels) or labels.shape != images.shape[:1] or not len(labels):
        raise UserError(
            f"{path}: {part}_labels must be one integer per image, at least one: {_shapes(arrays)}"
        )
    return Split(images, labels.astype(np.int64))


def _check_range(path: Path, name: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        first = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        remedy = (
            "; an array num_classes in the file settles classes without a training image"
            if name == "test_labels"
            else ""
        )
        raise UserError(f"{path}: {name}[{first}] is {labels[first]}, outside 0..{num_classes - 1}{remedy}")


def _shapes(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} is {array.dtype} {list(array.shape)}" for name, array in arrays.items())
