"""Images decoded and resized once: one file of pixels instead of a file per image.

<folder>/images.u8 holds the images one after the other, uint8 [h, w, 3] each; <folder>/index.npz their sizes and the sha256 of
the list of images. index.npz is written last: a folder without it holds no cache.
"""

import io
import shutil
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.datasets.arrays import read_npz
from common.datasets.file_lists import FileData, FileSplit
from common.datasets.images import in_workers
from common.runs.cli import UserError
from common.runs.files import cannot_write, write_atomic, write_whole
from common.runs.locks import Lock

PIXELS, INDEX = "images.u8", "index.npz"
SIZE = 256  # pixels of the shorter side, by default
SAMPLE = 32  # images decoded to estimate the space for all


class ImageCache:
    """The images of a cache by position."""

    def __init__(self, path: Path, sizes: np.ndarray, ends: np.ndarray | None = None):
        """path: the file of pixels. sizes: heights and widths, int [N, 2]. ends: where each image ends in the file, in
        bytes, int [N]; by default they follow one another."""
        self.path, self.sizes = path, sizes
        self.ends = np.cumsum(3 * sizes.prod(axis=1, dtype=np.int64)) if ends is None else ends
        self._pixels: np.ndarray | None = None  # each process opens it at its first read

    def __len__(self) -> int:
        return len(self.sizes)

    def only(self, keep: np.ndarray | slice) -> "ImageCache":
        """The images at `keep`, a mask [N] or positions, as `FileSplit.only`."""
        return ImageCache(self.path, self.sizes[keep], self.ends[keep])

    def __getitem__(self, i: int) -> Tensor:
        """Image i: uint8 [3, h, w], channels-last in memory."""
        if self._pixels is None:
            self._pixels = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r"))
        height, width = self.sizes[i]
        end = self.ends[i]
        image = self._pixels[end - 3 * height * width : end].copy()  # torch needs writable memory
        return torch.from_numpy(image).view(height, width, 3).permute(2, 0, 1)

    def __getstate__(self) -> dict:
        """Without the memory map, which would be pickled with all pixels."""
        return {**self.__dict__, "_pixels": None}


def build(split: FileSplit, folder: str | Path, size: int = SIZE, workers: int = 0) -> None:
    """Write the images of a split into folder, the shorter side `size` pixels and the aspect kept, as the test transform does.

    Keeps a complete cache of the same images. UserError: a damaged image, too little space, a cache of other images in the
    folder, or another process that writes it. With the same seed, training from the cache sees other crops than training from
    the files: crops are drawn in pixels of the image. They are the same if the transform first resizes to `size`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder / ".lock", "choose another folder"):
            if (folder / INDEX).exists():
                open_cache(folder, split, (size,))
                return
            _check_space(split, folder, size)
            _write(split, folder, size, workers)
    except OSError as error:
        raise UserError(cannot_write(folder, error, "choose another folder")) from None


def _write(split: FileSplit, folder: Path, size: int, workers: int) -> None:
    sizes: list[tuple[int, int]] = []

    def write(file: BinaryIO) -> None:
        chunks = np.array_split(np.arange(len(split.paths)), max(len(split.paths) // 16, 1))
        quiet = not sys.stderr.isatty()
        with tqdm(total=len(split.paths), desc=f"caching {split.part}", unit="image", disable=quiet) as bar:
            for images in in_workers(partial(_small_images, split, size), chunks, workers):
                for image in images:
                    sizes.append(tuple(image.shape[:2]))
                    file.write(image.numpy().data)
                bar.update(len(images))

    write_whole(folder / PIXELS, write)
    index = io.BytesIO()
    np.savez(
        index, sizes=np.array(sizes, dtype=np.int64), size=np.int64(size), sha256=np.array(split.sha256())
    )
    write_atomic(folder / INDEX, index.getvalue())


def _small_images(split: FileSplit, size: int, positions: np.ndarray) -> list[Tensor] | UserError:
    """The images at `positions`, uint8 [h, w, 3] each."""
    from torchvision.transforms.v2.functional import resize  # noqa: PLC0415 (seconds to import)

    try:
        images = [resize(split.read(i), [size], antialias=True) for i in positions.tolist()]
    except UserError as error:
        return error
    return [image.permute(1, 2, 0).contiguous() for image in images]


def _check_space(split: FileSplit, folder: Path, size: int) -> None:
    count = len(split.paths)
    sample = _small_images(split, size, np.unique(np.linspace(0, count - 1, SAMPLE, dtype=np.int64)))
    if isinstance(sample, UserError):
        raise sample
    needed = count * sum(image.numel() for image in sample) / len(sample) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        raise UserError(
            f"the cache of {count} images needs about {needed:.3g} GB, {free:.3g} GB are free in {folder}: choose another folder"
        )


def open_cache(folder: str | Path, split: FileSplit, wanted: Collection[int] = (SIZE,)) -> ImageCache:
    """The cache of a split with one of the given sizes. UserError: no cache, a damaged one, other images or another size."""
    folder = Path(folder)
    rebuild = "delete the folder and build it with python -m common.datasets cache"
    if not (folder / INDEX).is_file():
        raise UserError(f"no image cache in {folder}: build it with python -m common.datasets cache")
    try:
        index = read_npz(folder / INDEX)
        sizes, made_size, sha = index["sizes"], int(index["size"]), str(index["sha256"])
        cache = ImageCache(folder / PIXELS, sizes)
        complete = int(cache.ends[-1]) == cache.path.stat().st_size
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise UserError(f"the image cache in {folder} cannot be read ({error}): {rebuild}") from None
    if not complete:
        raise UserError(
            f"the image cache in {folder} is damaged ({PIXELS} is not as long as {INDEX} says): {rebuild}"
        )
    if sha != split.sha256() or made_size not in wanted:
        raise UserError(
            f"the image cache in {folder} holds {len(sizes)} images of another list or size ({made_size} pixels) than the "
            f"{len(split.paths)} of the {split.part} list at {' or '.join(map(str, wanted))}: {rebuild}, or choose another folder"
        )
    return cache


def build_caches(folder: str | Path, data: FileData, workers: int = 0, size: int = SIZE) -> None:
    """A cache of each split of a data set, in subfolders train, test, validation, clean_train and imagenet."""
    for split in data.splits():
        build(split, Path(folder) / split.part, size, workers)
        print(f"{data.name} {split.part}: {len(split.paths)} images in {Path(folder) / split.part}")


def open_caches(
    folder: str | Path, data: FileData, sizes: Collection[int] = (SIZE,)
) -> dict[str, ImageCache]:
    """The caches that build_caches made, by the name of the split. UserError as open_cache."""
    return {split.part: open_cache(Path(folder) / split.part, split, sizes) for split in data.splits()}
