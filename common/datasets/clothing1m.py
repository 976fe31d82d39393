"""Clothing1M (Xiao et al. 2015): a million images with noisy labels, and three clean lists."""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from common.datasets.file_lists import (
    FileData,
    FileSplit,
    make_split,
    missing_files,
    numbered,
    read_list,
    remember,
    report,
    require,
    without_bad_images,
)
from common.runs.cli import UserError
from common.runs.data_flags import CLOTHING1M as NAME

CLASSES = (
    *("T-shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket", "Down Coat", "Suit"),
    *("Shawl", "Dress", "Vest", "Underwear"),
)  # fmt: skip
TRAIN_ON = ("noisy", "noisy+verified", "noisy+clean")
NOISY_LABELS, CLEAN_LABELS = "noisy_label_kv.txt", "clean_label_kv.txt"
NOISY_TRAIN, CLEAN_TRAIN = "noisy_train_key_list.txt", "clean_train_key_list.txt"
TEST, VALIDATION = "clean_test_key_list.txt", "clean_val_key_list.txt"
# the same as one list per part with a key and a label in each line, as several repositories have it
COMBINED = {
    NOISY_TRAIN: "noisy_train.txt",
    CLEAN_TRAIN: "clean_train.txt",
    VALIDATION: "clean_val.txt",
    TEST: "clean_test.txt",
}
FILES = (NOISY_LABELS, CLEAN_LABELS, NOISY_TRAIN, CLEAN_TRAIN, VALIDATION, TEST)
OFFICIAL = {"train": 1_000_000, "test": 10_526, "validation": 14_313, "clean_train": 47_570}
SOURCE = "its authors, who give it out on request for non-commercial research"


def load_clothing1m(
    root: str | Path, train_on: str = "noisy", on_bad_image: str = "error", workers: int = 0
) -> FileData:
    """Clothing1M with its lists in root or root/annotations, and its images below root/images or root.

    train_on: "noisy" trains on the million of noisy_train_key_list.txt; "noisy+clean" also gives the 47,570 of
    clean_train_key_list.txt as `clean_train`, to fine-tune on; "noisy+verified" adds to the million those images of the
    clean list whose noisy label is the clean one. The last is our reading of the "25k verified" of the literature:
    images verified as wrong are left out. The position of an added image is the length of the noisy list plus its position
    in the clean list.
    test and validation are the clean ones. on_bad_image, workers: as for Food-101N. UserError: missing files, with their
    source; a list with a bad line, which is named.
    """
    data = read_clothing1m(Path(root), train_on)
    added = int((data.verified == 1).sum())
    report(data, OFFICIAL, added)
    if added:
        print(f"{NAME} train: {added} of them from the clean list, their noisy labels verified right")
    return without_bad_images(data, Path(root), on_bad_image, workers)


def read_clothing1m(root: Path, train_on: str = "noisy+clean") -> FileData:
    """The images that the lists name, whether they exist or not."""
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on}")
    lists = folder_of_lists(root)
    combined = has_combined_lists(lists)
    needed = [
        file
        for file in list_files(lists)
        if train_on != "noisy" or file not in (CLEAN_TRAIN, COMBINED[CLEAN_TRAIN])
    ]
    require(NAME, root, lists, needed, SOURCE)
    if combined:
        if train_on == "noisy+verified":
            raise UserError(
                f"{lists}: noisy+verified needs {NOISY_LABELS}, the lists here hold one label for each image"
            )
        parts = {
            key: read_list(lists / file, label_lines, len(CLASSES))
            for key, file in COMBINED.items()
            if file in needed
        }
        noisy = parts[NOISY_TRAIN]
        clean = {image: label for key in parts if key != NOISY_TRAIN for image, label in parts[key].items()}
        keys = {key: {image: line for line, image in enumerate(of, start=1)} for key, of in parts.items()}
    else:
        noisy, clean = (
            read_list(lists / file, label_lines, len(CLASSES)) for file in (NOISY_LABELS, CLEAN_LABELS)
        )
        keys = {file: read_list(lists / file, key_lines) for file in needed if file.endswith("key_list.txt")}

    def split(file: str, part: str) -> FileSplit:
        labels, labels_file = (noisy, NOISY_LABELS) if file == NOISY_TRAIN else (clean, CLEAN_LABELS)
        return make_split(
            root, located(root, keys[file]), _labels_of(keys[file], labels, lists / file, labels_file), part
        )

    train, right = split(NOISY_TRAIN, "train"), np.array([], dtype=np.int64)
    if train_on == "noisy+verified":
        right = verified_right(keys[NOISY_TRAIN], keys[CLEAN_TRAIN], noisy, clean)
        train = _joined(train, split(CLEAN_TRAIN, "train").only(right))
    count = len(keys[NOISY_TRAIN])
    return FileData(
        NAME,
        train,
        split(TEST, "test"),
        len(CLASSES),
        CLASSES,
        positions=np.concatenate([np.arange(count), count + right]),
        listed=count + (len(keys[CLEAN_TRAIN]) if train_on == "noisy+verified" else 0),
        verified=np.repeat(np.array([-1, 1], dtype=np.int8), [count, len(right)]),
        validation=split(VALIDATION, "validation"),
        clean_train=split(CLEAN_TRAIN, "clean_train") if train_on == "noisy+clean" else None,
    )


def folder_of_lists(root: Path, files: Iterable[str] | None = None) -> Path:
    """root, or root/annotations if that holds more of the lists. files: by default all lists."""

    def missing(folder: Path) -> int:
        return len(missing_files(folder, files or list_files(folder)))

    return min(root, root / "annotations", key=missing)


def has_combined_lists(folder: Path) -> bool:
    """Whether a folder holds one list of keys and labels per part instead of the official ones."""
    return (folder / COMBINED[NOISY_TRAIN]).is_file() and not (folder / NOISY_TRAIN).is_file()


def list_files(folder: Path) -> tuple[str, ...]:
    """The lists that a folder must hold: the official ones, or those of keys and labels per part if it has these."""
    return tuple(COMBINED.values()) if has_combined_lists(folder) else FILES


def _labels_of(keys: dict[str, int], labels: dict[str, int], file: Path, labels_file: str) -> list[int]:
    for key, number in keys.items():
        if key not in labels:
            raise UserError(f"{file}: line {number}: {key} has no label in {labels_file}")
    return [labels[key] for key in keys]


def verified_right(
    noisy_train: Iterable[str], clean_train: Iterable[str], noisy: dict[str, int], clean: dict[str, int]
) -> np.ndarray:
    """The positions in clean_train of images whose noisy label is the clean one, without those that noisy_train has."""
    in_noisy = set(noisy_train)
    agrees = [key not in in_noisy and noisy.get(key, -1) == clean.get(key) for key in clean_train]
    return np.flatnonzero(agrees)


def _joined(first: FileSplit, second: FileSplit) -> FileSplit:
    paths, labels = (np.concatenate([getattr(s, of) for s in (first, second)]) for of in ("paths", "labels"))
    return first._replace(paths=paths, labels=labels)


def key_lines(lines: Iterable[str]) -> dict[str, int]:
    """The keys of a key list in their order, with their line numbers. ValueError: a key that occurs twice, or no key."""
    seen: dict[str, int] = {}
    for number, key in numbered(lines):
        remember(seen, key, number)
    if not seen:
        raise ValueError("no image in it")
    return seen


def label_lines(lines: Iterable[str], num_classes: int) -> dict[str, int]:
    """Labels by key, from lines of a key, a blank and a label. ValueError: any other line, or a key that occurs twice."""
    seen: dict[str, int] = {}
    labels = {}
    for number, line in numbered(lines):
        *key, label = line.rsplit(maxsplit=1)
        if not key or not label.isdecimal() or int(label) >= num_classes:
            raise ValueError(
                f"line {number}: {line!r} is not a key, a blank and a label 0..{num_classes - 1}"
            )
        remember(seen, key[0], number)
        labels[key[0]] = int(label)
    return labels


def located(root: Path, keys: Iterable[str]) -> list[str]:
    """The keys as paths below root: as they are, or without `images/` if the archive was unpacked so.

    Checks one folder of images/0 to images/9 each, not a million files.
    """

    @cache
    def cut(top: str) -> bool:
        return not os.path.isdir(root / "images" / top) and os.path.isdir(root / top)

    paths = []
    for key in keys:
        head, _, rest = key.partition("/")
        paths.append(rest if head == "images" and cut(rest.partition("/")[0]) else key)
    return paths
