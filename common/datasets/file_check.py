"""Checks of a data set of image files: which images exist, are missing or damaged."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from common.datasets import clothing1m, food101n, mini_imagenet, webvision
from common.datasets.file_lists import (
    FileData,
    FileSplit,
    are_there,
    find_damaged,
    missing_files,
    report,
)
from common.runs.cli import UserError

MODULES = {module.NAME: module for module in (food101n, clothing1m, mini_imagenet, webvision)}
FILE_NAMES = tuple(MODULES)
ALIASES = {"food": food101n.NAME}  # the value of AFM's released flag


def source(name: str) -> str:
    """Where a data set of image files comes from."""
    return MODULES[name].SOURCE


def load_files(
    name: str,
    root: str | Path,
    train_on: str = "noisy",
    on_bad_image: str = "error",
    workers: int = 0,
    imagenet: str | None = None,
    num_class: int = webvision.CLASSES,
) -> FileData:
    """Load Food-101N, Clothing1M or mini-WebVision by name.

    train_on is for Clothing1M, imagenet and num_class for mini-WebVision.
    """
    if name == webvision.NAME:
        return webvision.load_webvision(root, num_class, on_bad_image, workers, imagenet)
    if name == clothing1m.NAME:
        return clothing1m.load_clothing1m(root, train_on, on_bad_image, workers)
    return food101n.load_food101n(root, on_bad_image, workers)


def check(
    name: str,
    root: str | Path,
    images: bool = False,
    workers: int = 0,
    imagenet: str | None = None,
    num_class: int = webvision.CLASSES,
) -> None:
    """Print what a data set holds, and each thing missing from it: list files, whole folders, single images.

    images: also decode every image in `workers` processes and print each damaged one. UserError, at the end: an image is
    missing or damaged.
    """
    root = Path(root)
    data = _read(name, root, imagenet, num_class)
    listings: dict[bytes, set[bytes]] = {}
    missing = damaged = 0
    for split in data.splits():
        there = are_there(split, listings)
        missing += int((~there).sum())
        for line in missing_lines(split, there):
            print(line)
        if images:
            reasons = find_damaged(split, np.flatnonzero(there), workers)
            damaged += len(reasons)
            for i in sorted(reasons):
                print(f"damaged: {split.path(i)} ({reasons[i]})")
    if missing or damaged:
        raise UserError(
            f"{name} in {root.resolve()}: {missing} images missing, {damaged} damaged; get them from {source(name)}"
        )
    print(f"{name} in {root.resolve()}: every image is there{' and whole' if images else ''}")


def _read(name: str, root: Path, imagenet: str | None, num_class: int) -> FileData:
    """The images that the lists name. Prints a line for each missing list. UserError: a list is missing."""
    module = MODULES[name]
    folder = clothing1m.folder_of_lists(root) if module is clothing1m else root
    files = module.list_files(folder) if module in (mini_imagenet, clothing1m) else module.FILES
    missing = missing_files(folder, files)
    for file in missing:
        print(f"missing: {folder / file}")
    if missing:
        raise UserError(
            f"{name} in {root.resolve()}: {len(missing)} of {len(files)} list files missing; get them from {module.SOURCE}"
        )
    if module is mini_imagenet:
        return mini_imagenet.read_every_list(root)
    if module is webvision:
        data = webvision.read_webvision(root, num_class, imagenet)
        report(data, webvision.official(num_class))
        return data
    data = module.read_food101n(root) if module is food101n else module.read_clothing1m(root)
    report(data, module.OFFICIAL)
    return data


def missing_lines(split: FileSplit, there: np.ndarray) -> list[str]:
    """A line for each folder without any listed image, and for each other missing image. there: bool [N]."""
    folders = [os.path.dirname(path) for path in split.paths.tolist()]
    listed = Counter(folders)
    missing = Counter(folders[i] for i in np.flatnonzero(~there))
    empty = [folder for folder in missing if missing[folder] == listed[folder] > 1]
    lines = [
        f"missing: {split.folder / os.fsdecode(folder)} ({listed[folder]} {split.part} images)"
        for folder in empty
    ]
    return lines + [
        f"missing: {split.path(i)}" for i in np.flatnonzero(~there).tolist() if folders[i] not in empty
    ]
