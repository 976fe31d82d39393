"""mini-ImageNet with controlled noisy web labels (CNWL, Jiang et al. 2020), with the lists of Manifold DivideMix's release.

`decoded` makes one array of all images of a split, which then trains like a data set in memory.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.datasets.arrays import read_npz
from common.datasets.file_lists import (
    FileData,
    FileSplit,
    make_split,
    numbered,
    read_list,
    remember,
    report,
    require,
    without_bad_images,
)
from common.datasets.images import in_workers
from common.gpu import processes
from common.gpu.augment import resize_to_square
from common.runs.cli import UserError
from common.runs.data_flags import MINI_IMAGENET as NAME
from common.runs.files import write_whole
from common.runs.locks import InUse, Lock

COLORS = ("red", "blue")  # web noise, synthetic noise
NUM_CLASSES = 100
LISTS, TEST = "split", "split/clean_validation"
ANY_TRAIN = "<color>_noise_nl_<rate>"
TRAIN_IMAGE, TEST_IMAGE = "all_images/{name}", "validation/{label}/{name}"
OFFICIAL = {"train": 50_000, "test": 5_000}
# numbers of images in the official training lists, as far as published; the other lists have about as many
OFFICIAL_LISTS = {"red_noise_nl_0.0": 50_000, "red_noise_nl_0.3": 49_985, "red_noise_nl_0.4": 50_010}
OFFICIAL_LISTS |= {"red_noise_nl_0.5": 49_962, "red_noise_nl_0.8": 50_008}
ABOUT = 100
SOURCE = "the project page of CNWL, https://google.github.io/controlled-noisy-web-labels"
# of the release's script for this data set
MEAN, STD = (0.4728, 0.4487, 0.4031), (0.2744, 0.2663, 0.2806)


def load_mini_imagenet(
    root: str | Path, color: str, rate: float, on_bad_image: str = "error", workers: int = 0
) -> FileData:
    """The training images of split/<color>_noise_nl_<rate> with their given labels, and the clean test images.

    color: "red" for web noise, "blue" for synthetic noise. rate: noise rate, 0 to 0.8, in the list's name as Python prints
    the float. There are 100 classes, whatever the lists name. on_bad_image, workers: as for Food-101N. UserError: missing
    files, with their source or the existing lists; a list with a bad line, which is named.
    """
    data = read_mini_imagenet(Path(root), train_list(color, rate))
    count = len(data.train.paths)
    report(
        data,
        OFFICIAL | {"train": count if is_official(train_list(color, rate), count) else OFFICIAL["train"]},
    )
    return without_bad_images(data, Path(root), on_bad_image, workers)


def train_list(color: str, rate: float) -> str:
    """The name of a training list, as red_noise_nl_0.2. ValueError: another color."""
    if color not in COLORS:
        raise ValueError(f"color must be one of {', '.join(COLORS)}, got {color}")
    return f"{color}_noise_nl_{float(rate)}"


def train_lists(root: Path) -> list[str]:
    """The names of the training lists below root, in order."""
    names = (path.name for path in (root / LISTS).glob("*_noise_nl_*"))
    return sorted(name for name in names if re.fullmatch(rf"({'|'.join(COLORS)})_noise_nl_[0-9.]+", name))


def read_mini_imagenet(root: Path, train: str) -> FileData:
    """The images of the test list and of a training list, whether they exist or not."""
    lists = train_lists(root)
    if lists and train not in lists:
        raise UserError(f"{NAME} has no {root.resolve() / LISTS / train}: there are {', '.join(lists)}")
    require(NAME, root, root, (f"{LISTS}/{train}", TEST), SOURCE)
    return _data(root, read_list(root / LISTS / train, list_lines, TRAIN_IMAGE))


def list_files(root: Path) -> list[str]:
    """The list files, relative to root: the existing training lists (at least one name) and the test list."""
    return [*(f"{LISTS}/{name}" for name in train_lists(root) or [ANY_TRAIN]), TEST]


def read_every_list(root: Path) -> FileData:
    """The images of all training lists below root, each image once. Prints the size of each list."""
    images: dict[str, int] = {}
    for name in train_lists(root):
        listed = read_list(root / LISTS / name, list_lines, TRAIN_IMAGE)
        _report_list(
            name, len(listed), is_official(name, len(listed)), OFFICIAL_LISTS.get(name, OFFICIAL["train"])
        )
        images |= listed
    data = _data(root, images)
    count = len(data.test.paths)
    _report_list("test", count, count == OFFICIAL["test"], OFFICIAL["test"])
    return data


def is_official(name: str, count: int) -> bool:
    """Whether the number of images fits the official training list of that name."""
    if name in OFFICIAL_LISTS:
        return count == OFFICIAL_LISTS[name]
    return abs(count - OFFICIAL["train"]) <= ABOUT


def _report_list(name: str, count: int, is_official: bool, official: int) -> None:
    print(f"{NAME} {name}: {count} images of {NUM_CLASSES} classes")
    if not is_official:
        print(f"note: the {name} list names {count} images, the official one {official}")


def _data(root: Path, train: dict[str, int]) -> FileData:
    test = read_list(root / TEST, list_lines, TEST_IMAGE)
    return FileData(
        NAME,
        make_split(root, train, list(train.values())),
        make_split(root, test, list(test.values()), "test"),
        NUM_CLASSES,
        tuple(str(label) for label in range(NUM_CLASSES)),
        positions=np.arange(len(train)),
        listed=len(train),
        verified=np.full(len(train), -1, dtype=np.int8),
        mean=MEAN,
        std=STD,
    )


def list_lines(lines: Iterable[str], image: str) -> dict[str, int]:
    """Class ids by path below the root, from lines of an image name, a blank and an id; `image` makes a path from both.

    ValueError: any other line, an image that occurs twice, or no image.
    """
    seen: dict[str, int] = {}
    labels = []
    for number, line in numbered(lines):
        name, *rest = line.split()
        if len(rest) != 1 or not rest[0].isdecimal() or int(rest[0]) >= NUM_CLASSES:
            raise ValueError(
                f"line {number}: {line!r} is not an image name, a blank and a class id 0..{NUM_CLASSES - 1}"
            )
        labels.append(int(rest[0]))
        remember(seen, image.format(name=name, label=labels[-1]), number)
    if not seen:
        raise ValueError("no image in it")
    return dict(zip(seen, labels, strict=True))


# one array of all images ----------------------------------------------------------------------------------------------


def decoded(
    split: FileSplit, size: int, workers: int, folder: Path | None, state: str | None = None
) -> np.ndarray:
    """Every image of a split as RGB, resized to a square (the aspect not kept): uint8 [N, size, size, 3].

    Decoded by `workers` processes (by this process for 0). If `folder` is given, a file in it keeps the array for the next call
    with the same paths, size and `state` of the files, if that is given; else delete it after images changed. The first of
    several processes then decodes for all. A folder that cannot be written and a damaged file get a note. UserError: a damaged
    image.
    """
    if folder is None:
        return _decode(split, size, workers)
    return processes.first_alone(lambda: _kept(split, size, workers, folder, state))


def _kept(split: FileSplit, size: int, workers: int, folder: Path, state: str | None) -> np.ndarray:
    """The array in the folder, or a new one, which is then kept there."""
    about = {
        "paths_sha256": split.sha256(),
        "images": len(split.paths),
        "size": size,
        "torchvision": version("torchvision"),
    }
    if state is not None:
        about["state"] = state
    parameters = json.dumps(about)
    short = hashlib.sha256(parameters.encode()).hexdigest()[:8]
    path = folder / f"decoded.{split.part}_{size}x{size}_{short}.npz"
    images = _read_kept(path, parameters, (len(split.paths), size, size, 3))
    if images is None:
        images = _decode(split, size, workers)
        _keep(path, parameters, images)
    return images


def _read_kept(path: Path, parameters: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in the file; None if there is no file or, with a note, if it is damaged or has other parameters."""
    if not os.path.exists(path):
        return None
    try:
        content = read_npz(path)
        images, made_with = content["images"], str(content["parameters"])
        if made_with == parameters and images.shape == shape and images.dtype == np.uint8:
            return images
        problem = "holds something else"
    except (OSError, ValueError, KeyError) as error:
        problem = f"cannot be read: {error}"
    processes.say(f"note: {path} {problem}; every image is decoded again")
    return None


def _keep(path: Path, parameters: str, images: np.ndarray) -> None:
    def write(file: BinaryIO) -> None:
        np.savez(file, images=images, parameters=np.array(parameters))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_suffix(".lock"), "go on"):
            write_whole(path, write)
    except InUse:
        processes.say(f"note: {path} is being written by another process")
    except OSError as error:
        processes.say(
            f"note: {path} cannot be written ({error.strerror}): the next run will decode every image again"
        )


def _decode(split: FileSplit, size: int, workers: int) -> np.ndarray:
    count = len(split.paths)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    chunks = np.array_split(np.arange(count), max(count // 32, 1))
    quiet = processes.rank() > 0 or not sys.stderr.isatty()
    function = partial(_resized, split, resize_to_square(size), size)
    with tqdm(total=count, desc=f"decoding {split.part}", unit="image", disable=quiet) as bar:
        for positions, part in zip(chunks, in_workers(function, chunks, workers), strict=True):
            images[positions] = part.numpy()
            bar.update(len(positions))
    return images


def _resized(
    split: FileSplit, resize: Callable[[Tensor], Tensor], size: int, positions: np.ndarray
) -> Tensor | UserError:
    """The images at `positions`: uint8 [n, size, size, 3]."""
    images = torch.empty(len(positions), size, size, 3, dtype=torch.uint8)
    try:
        for place, i in enumerate(positions.tolist()):
            images[place] = resize(split.read(i)).permute(1, 2, 0)
    except UserError as error:
        return error
    return images
