"""Pools of out-of-distribution (OOD) images, which replace training images: ImageNet 32x32, image folders, other data sets."""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.datasets.arrays import read_npz
from common.datasets.images import is_image_name
from common.datasets.in_memory import NAMES, load
from common.runs.cli import UserError

IMAGENET32_FILES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
IMAGENET32_SIZE = 1_281_167
FOLDERS = {"imagenet32": "imagenet32", "place365": "places365"}
PATCH = 16  # pixels of a side of the photographs' patches


class Pool(NamedTuple):
    """Images to choose from."""

    size: int
    take: Callable[[np.ndarray], list[np.ndarray]]  # rows, int [M] -> M images, uint8 [h, w, 3] or [h, w, 1]


def open_pool(name: str, root: Path, folder: Path | None = None) -> Pool:
    """The pool `name`: imagenet32, place365, photographs, or a data set of `common.datasets.load`, its training images.

    root: where data sets are; folder: where the pool's files are, by default <root>/imagenet32 and <root>/places365.
    UserError: files that are missing or damaged.
    """
    if name in FOLDERS:
        place = folder_of(name, root, folder)
        return imagenet32(place) if name == "imagenet32" else image_folder(place)
    if name == "photographs":
        return photographs()
    try:
        images = load(name, folder or root).train.images
    except UserError as error:
        if name in NAMES:
            raise
        raise UserError(
            f"--corruption {name}: {error}; or choose imagenet32, place365 or photographs"
        ) from None
    return Pool(len(images), lambda rows: list(images[rows]))


def folder_of(name: str, root: Path, folder: Path | None = None) -> Path:
    """Where the files of a pool of files are."""
    return folder or root / FOLDERS[name]


def listing(name: str, root: Path, folder: Path | None = None) -> str | None:
    """sha256 of the names and sizes of the files of a pool of files; None where its folder is not there."""
    place = folder_of(name, root, folder)
    names = imagenet32_files(place) if name == "imagenet32" else _image_names(place)
    files = [file for file in names if (place / file).is_file()]
    text = "".join(f"{file} {(place / file).stat().st_size}\n" for file in files)
    return hashlib.sha256(os.fsencode(text)).hexdigest() if files else None


def resized(images: list[np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
    """Images [h, w, 1 or 3] as uint8 [M, H, W, C], shape = (H, W, C): resized by PIL, bilinear; then grey or RGB."""
    result = np.empty((len(images), *shape), dtype=np.uint8)
    for place, pixels in zip(result, images, strict=True):
        place[:] = _as_pixels(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), shape)
    return result


def _as_pixels(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(shape)


# ImageNet 32x32 -------------------------------------------------------------------------------------------------------


def imagenet32(folder: Path) -> Pool:
    """The training images of ImageNet downsampled to 32x32 (Chrabaszcz et al. 2017), their official batches 1 to 10.

    The batches are the pickles of the first release or the .npz files of the second. Two batches are never in memory at once:
    400 MB each.
    """
    files = imagenet32_files(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"ImageNet 32x32 not found in {folder}; looked in {folder.resolve()} for {', '.join(missing)} (or .npz); get the "
            "official batches (Imagenet32_train.zip, image-net.org, registration needed), or name their folder with --ood-dir"
        )
    sizes = [len(_imagenet32_batch(folder / name)) for name in files]
    starts = np.cumsum([0, *sizes])

    def take(rows: np.ndarray) -> list[np.ndarray]:
        chosen: dict[int, np.ndarray] = {}
        for name, start, end in zip(files, starts[:-1], starts[1:], strict=True):
            own = np.flatnonzero((rows >= start) & (rows < end))
            if len(own):
                batch = _imagenet32_batch(folder / name)
                for place in own.tolist():
                    chosen[place] = batch[rows[place] - start].copy()
                del batch  # before the next one is read
        return [chosen[place] for place in range(len(rows))]

    return Pool(int(starts[-1]), take)


def imagenet32_files(folder: Path) -> tuple[str, ...]:
    """The names of the batches in a folder: pickles without a suffix, or .npz files where there is no pickle."""
    as_npz = tuple(f"{name}.npz" for name in IMAGENET32_FILES)
    pickled = any((folder / name).is_file() for name in IMAGENET32_FILES)
    return IMAGENET32_FILES if pickled or not any((folder / name).is_file() for name in as_npz) else as_npz


def imagenet32_note(size: int) -> str:
    """What to print of a pool of so many images: nothing of the official one."""
    if size == IMAGENET32_SIZE:
        return ""
    return f"imagenet32 holds {size} images, ImageNet 32x32 has {IMAGENET32_SIZE}: not the benchmark's images"


def _imagenet32_batch(path: Path) -> np.ndarray:
    """The images of a batch file, uint8 [n, 32, 32, 3]. UserError: damaged, or not such a file."""
    try:
        if path.suffix == ".npz":
            content = read_npz(path)
        else:
            with path.open("rb") as file:
                content = _PlainUnpickler(file).load()
        pixels = content["data"]
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise ValueError(f"its data are {pixels.dtype} {list(pixels.shape)}, expected uint8 [n, 3072]")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path} is damaged, or no batch of ImageNet 32x32 ({reason}): get it again"
        ) from None
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers and NumPy arrays; a pickle that names anything else is refused, not run."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(file, encoding="latin1")  # as files that Python 2 wrote ask for

    def find_class(self, module: str, name: str):
        """NumPy's own builders of arrays alone."""
        if (module.replace("numpy.core", "numpy._core"), name) in (
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch does")


# folders and photographs ----------------------------------------------------------------------------------------------


def image_folder(folder: Path) -> Pool:
    """The images of a folder, their names in order, as the benchmark reads Places365's small test images.

    Where the folder itself has none, those below it: Places365's other archives have a folder per class.
    """
    names = _image_names(folder)
    if not names:
        raise UserError(
            f"no images found in {folder.resolve()}: put the images of Places365 there, or name their folder with --ood-dir"
        )

    def take(rows: np.ndarray) -> list[np.ndarray]:
        return [_read(folder / names[row]) for row in rows.tolist()]

    return Pool(len(names), take)


def _image_names(folder: Path) -> list[str]:
    """The images in a folder, or else in the folders below it, as paths relative to it, in order."""
    if not folder.is_dir():
        return []
    names = [name for name in os.listdir(folder) if is_image_name(name)]
    if not names:
        names = [
            os.path.relpath(os.path.join(place, name), folder)
            for place, _, files in os.walk(folder)
            for name in files
            if is_image_name(name)
        ]
    return sorted(names)


def _read(path: Path) -> np.ndarray:
    """An image resized to 32x32 by PIL, bilinear, and only then made RGB, as in the release. UserError: damaged."""
    try:
        with Image.open(path) as image:
            return _as_pixels(image, (32, 32, 3))
    except UnidentifiedImageError:
        raise UserError(f"{path} is no image of a known format: mend or remove it") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or cannot be read ({reason}): mend or remove it") from None


def photographs() -> Pool:
    """Patches of the two photographs that come with scikit-learn, for digits: 16 pixels wide, uint8 [8, 8, 1] after halving.

    The grey values of each are stretched to 0 to 255, a range that digits have too: patches of plain sky would all be alike.
    """
    from sklearn.datasets import load_sample_images  # noqa: PLC0415 (a second of import, of use only here)

    patches = []
    for photograph in load_sample_images().images:
        rows, columns = photograph.shape[0] // PATCH, photograph.shape[1] // PATCH
        grid = photograph[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
        patches += list(grid.swapaxes(1, 2).reshape(-1, PATCH, PATCH, 3))
    grey = resized(patches, (PATCH // 2, PATCH // 2, 1)).astype(np.int64)
    darkest, brightest = (of(grey, axis=(1, 2, 3), keepdims=True) for of in (np.min, np.max))
    images = ((grey - darkest) * 255 // np.maximum(brightest - darkest, 1)).astype(np.uint8)
    return Pool(len(images), lambda rows: list(images[rows]))
