"""Your own images: `--dataset folder --data_path DIR`, with a folder per class or lists of paths and labels.

DIR/train/CLASS/ and DIR/test/CLASS/ hold image files, or DIR/train.csv and DIR/test.csv the columns path (relative to DIR), label
and perhaps true_label. These labels are the observed ones. Without a test part, some of the training images are tested on.
Scripts that need validation images find them in a part of that name, or take some of the training images.
"""

import csv
import hashlib
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.datasets.file_lists import (
    FileData,
    FileSplit,
    are_there,
    find_damaged,
    make_split,
    read_list,
    remember,
    without_bad_images,
)
from common.datasets.images import is_image_name
from common.datasets.in_memory import Data, Split, load, pixel_statistics
from common.datasets.limit import limited_test
from common.datasets.mini_imagenet import decoded
from common.gpu import processes
from common.runs.cli import UserError
from common.runs.data_flags import FOLDER as NAME
from common.runs.data_flags import IMAGE_SIZE, TEST_SPLIT

PARTS = ("train", "test", "validation")
# of the test split: the same images for every --seed, so that runs compare and a label's index names one image
SPLIT_SEED = 0
LAYOUT = "DIR/train/CLASS/ with image files, or DIR/train.csv with the columns path,label[,true_label]"


class Listed(NamedTuple):
    """The images of one part, and their labels as names of classes."""

    paths: list[str]  # relative to DIR
    labels: list[str]
    true_labels: list[str] | None
    classes: tuple[str, ...]  # in the order of their ids; of the training part alone


def from_arguments(arguments: dict[str, Any], root: str | Path | None = None) -> Data:
    """The data set in memory that a script's arguments name, by their names in args.json.

    root: where the data sets are, if not where the arguments say. Of several processes, all must call this. UserError: as `load`
    and `load_folder`.
    """
    root = root or arguments.get("data_path") or arguments.get("data_root") or "./data"
    if arguments["dataset"] != NAME:
        return load(arguments["dataset"], root)
    size = arguments["image_size"] if "image_size" in arguments else arguments["img_size"]
    reading = {name: arguments[name] for name in ("test_split", "on_bad_image", "workers")}
    return load_folder(root, size, **reading)


# loading --------------------------------------------------------------------------------------------------------------


def load_folder(
    root: str | Path,
    size: int = IMAGE_SIZE,
    test_split: float = TEST_SPLIT,
    on_bad_image: str = "error",
    workers: int = 0,
) -> Data:
    """The images of a folder in memory, RGB, resized to size x size. They are decoded once and kept in DIR/decoded.

    train.labels are the true labels if train.csv has them, else the observed ones. noisy_labels are the observed ones. Of several
    processes, all must call this. UserError: no such layout, labels that do not fit, missing or damaged images.
    """
    root, workers = Path(root), min(workers, os.cpu_count() or 1)
    files = processes.from_first(lambda: load_folder_files(root, test_split, on_bad_image, workers))
    train, test = (
        decoded(split, size, workers, root / "decoded", state_of(split))
        for split in (files.train, files.test)
    )
    observed, truth = files.train.labels, files.true_labels
    return Data(
        NAME,
        Split(train, observed if truth is None else truth),
        Split(test, files.test.labels),
        files.num_classes,
        *pixel_statistics(train),
        noisy_labels=observed,
        truth_known=truth is not None,
        classes=files.classes,
        paths=tuple(map(os.fsdecode, files.train.paths.tolist())),
        skipped=files.skipped,
    )


def load_folder_files(
    root: str | Path,
    test_split: float = TEST_SPLIT,
    on_bad_image: str = "error",
    workers: int = 0,
    validates: bool = False,
) -> FileData:
    """The image files of a folder with their observed labels. on_bad_image, workers: as for Food-101N.

    validates: also give validation images. Where they are taken from the training images, they keep their observed labels, and
    `positions` leaves them out, so that a position names the same image in every script. UserError: as `load_folder`.
    """
    root = Path(root)
    train, test, validation = read_folder(root)
    labels, truth = numbers(train.labels, train.classes), None
    if train.true_labels is not None:
        truth = numbers(train.true_labels, train.classes)
    kept = np.arange(len(labels))
    if test is None:
        # drawn from the whole list, so that images left out later do not change who is tested on
        tested = split_off(labels, test_split)
        kept = np.setdiff1d(kept, tested)
        test_paths = [train.paths[i] for i in tested]
        test_labels = (labels if truth is None else truth)[tested]
    else:
        test_paths = test.paths
        test_labels = best_labels(test, train.classes)
    listed, positions, validated = len(kept), np.arange(len(kept)), None
    if validates and validation is not None:
        validated = make_split(root, validation.paths, best_labels(validation, train.classes), "validation")
    elif validates:
        held = split_off(labels[kept], test_split)
        validated = make_split(root, [train.paths[i] for i in kept[held]], labels[kept[held]], "validation")
        positions = np.setdiff1d(positions, held)
        kept = kept[positions]
    data = FileData(
        NAME,
        make_split(root, [train.paths[i] for i in kept], labels[kept]),
        make_split(root, test_paths, test_labels, "test"),
        len(train.classes),
        train.classes,
        positions=positions,
        listed=listed,
        validation=validated,
        verified=np.full(len(kept), -1) if truth is None else (truth == labels)[kept].astype(np.int8),
        true_labels=None if truth is None else truth[kept],
    )
    for split in data.splits():
        print(f"{NAME} {split.part}: {len(split.paths)} images of {data.num_classes} classes")
    if test is None and truth is None:
        print(
            f"warning: {root} has no test part: --test_split {test_split} of its training images are tested on, and their "
            "labels are as noisy as those that are trained on",
            file=sys.stderr,
        )
    if validates and validation is None:
        print(
            f"warning: {root} has no validation part: --test_split {test_split} of its training images validate, with their "
            "observed labels",
            file=sys.stderr,
        )
    return without_bad_images(data, root, on_bad_image, workers)


def split_off(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Positions, ascending, of a fraction of images with these labels [N], stratified by class: the same at every call.

    UserError: no image would be left on one side.
    """
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise UserError(
            f"--test_split {fraction}: {count} of {len(labels)} images would be tested on; use a number between 0 and 1"
        )
    return limited_test(labels, count, SPLIT_SEED)


def state_of(split: FileSplit) -> str:
    """sha256 of the paths, lengths and times of change of the files: another one after an image changed."""
    digest = hashlib.sha256(split.sha256().encode())
    for i in range(len(split.paths)):
        status = split.path(i).stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# what the folder lists ------------------------------------------------------------------------------------------------


def read_folder(root: Path) -> tuple[Listed, Listed | None, Listed | None]:
    """The training, test and validation images of a folder, whether the files exist or not; None for a part that it has not.

    UserError: no such layout; a list with a bad line, which is named; fewer than two classes; a class of another part without
    training images.
    """
    train, test, validation = (read_part(root, part) for part in PARTS)
    if train is None:
        raise UserError(f"{NAME} needs {LAYOUT}: there is neither in {root.resolve()}")
    if len(train.classes) < 2:
        raise UserError(
            f"{root}: its training images are of {len(train.classes)} class, 2 at least are needed"
        )
    for part, listed in (("test", test), ("validation", validation)):
        new = sorted({*listed.labels, *(listed.true_labels or [])} - {*train.classes}) if listed else []
        if new:
            raise UserError(
                f"{root}: class {new[0]} of the {part} part is not among the {len(train.classes)} of train"
            )
    return train, test, validation


def read_part(root: Path, part: str) -> Listed | None:
    """The images that DIR/<part>.csv lists, else those in DIR/<part>/; None if there is neither."""
    if (root / f"{part}.csv").is_file():
        return read_list(root / f"{part}.csv", list_lines, part)
    if (root / part).is_dir():
        return in_class_folders(root, part)
    return None


def list_lines(lines: Sequence[str], part: str = "train") -> Listed:
    """The rows of <part>.csv: columns path, label and perhaps true_label, others are ignored.

    Labels that are all whole numbers are class ids, else names, whose ids follow their order. ValueError: a bad line, ids without
    end, or no image.
    """
    rows = csv.DictReader(lines, strict=True)
    columns = [name.strip() for name in rows.fieldnames or []]
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise ValueError(f"has no column {missing[0]}: its first line must name path,label[,true_label]")
    rows.fieldnames = columns
    names = [name for name in ("label", "true_label") if name in columns]
    seen: dict[str, int] = {}
    values: dict[str, list[str]] = {name: [] for name in names}
    try:
        for row in rows:
            cells = {name: (row[name] or "").strip() for name in ("path", *names)}
            if empty := [name for name, value in cells.items() if not value]:
                raise ValueError(
                    f"line {rows.line_num}: no {empty[0]}; fill the column in every row, or leave true_label out"
                )
            remember(seen, cells["path"], rows.line_num)
            for name in names:
                values[name].append(cells[name])
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    if not seen:
        raise ValueError("no image in it")
    known = {name for column in values.values() for name in column}
    classes = ordered(known, len(seen)) if part == "train" else ()
    return Listed(list(seen), values["label"], values.get("true_label"), classes)


def ordered(names: set[str], images: int) -> tuple[str, ...]:
    """Names of classes in the order of their ids: as text, or 0 .. K - 1 if all are whole numbers. ValueError: K > images."""
    if not all(name.isdecimal() and name == str(int(name)) for name in names):
        return tuple(sorted(names))
    count = max(map(int, names)) + 1
    if count > images:
        raise ValueError(f"label {count - 1} is too large for {images} images: number the classes from 0")
    return tuple(map(str, range(count)))


def in_class_folders(root: Path, part: str) -> Listed:
    """The image files in DIR/<part>/CLASS/ and below, in the order of torchvision's ImageFolder. Hidden folders are left out."""
    top = root / part
    classes = sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and entry.name[0] != ".")
    files = {name: list(images_below(top / name)) for name in classes}
    empty = [name for name in classes if not files[name]]
    if part == "train" and empty:
        raise UserError(f"{top / empty[0]} holds no image: remove it, or put images of the class into it")
    paths = [os.path.relpath(file, root) for name in classes for file in files[name]]
    if not paths:
        raise UserError(
            f"{top} holds no image in a folder of its class: remove it, or see the layout, {LAYOUT}"
        )
    labels = [name for name in classes for _ in files[name]]
    return Listed(paths, labels, None, tuple(classes))


def images_below(folder: Path) -> Iterator[str]:
    """The paths of all image files below a folder, in order."""
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        yield from (os.path.join(place, name) for name in sorted(names) if is_image_name(name))


def best_labels(listed: Listed, classes: Sequence[str]) -> np.ndarray:
    """The ids of the true labels where they are known, else of the observed ones, int64 [N]."""
    return numbers(listed.labels if listed.true_labels is None else listed.true_labels, classes)


def numbers(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """The ids of names of classes, int64 [N]."""
    ids = {name: i for i, name in enumerate(classes)}
    return np.array([ids[name] for name in names], dtype=np.int64)


# check ----------------------------------------------------------------------------------------------------------------


def check(root: str | Path, images: bool = False, workers: int = 0) -> None:
    """Print how many images, classes and sizes a folder has, and its duplicates: files of the same bytes.

    Files of the same bytes under two labels are listed: one of the labels is wrong for certain. images: also decode every image
    in `workers` processes. UserError, at the end: an image is missing or damaged.
    """
    root = Path(root)
    train, *others = read_folder(root)
    listings: dict[bytes, set[bytes]] = {}
    files: list[tuple[Path, str]] = []
    bad = 0
    for part, listed in zip(PARTS, (train, *others), strict=True):
        if listed is None:
            if part == "test":
                print(f"{NAME} {part}: none; training tests on --test_split of the training images")
            continue
        split = make_split(root, listed.paths, numbers(listed.labels, train.classes), part)
        describe(part, listed)
        there = are_there(split, listings)
        lines = [f"missing: {split.path(i)}" for i in np.flatnonzero(~there).tolist()]
        present = np.flatnonzero(there)
        sizes, reasons = sizes_of(split, present)
        if images:
            reasons |= find_damaged(split, present, workers)
        lines += [f"damaged: {split.path(i)} ({reasons[i]})" for i in sorted(reasons)]
        print(f"{NAME} {part}: width x height {most_common(sizes)}")
        print(*lines, sep="\n", end="\n" if lines else "")
        bad += len(lines)
        files += [(split.path(i), f"{part} {listed.labels[i]}") for i in present.tolist()]
    report_duplicates(files)
    if bad:
        raise UserError(
            f"{NAME} in {root.resolve()}: {bad} images missing or damaged; replace them, or train with --on_bad_image skip"
        )
    print(f"{NAME} in {root.resolve()}: every image is there{' and whole' if images else ''}")
    if not images:
        print(
            f"decode every image with: python -m common.datasets check {NAME} --images --data_path {shlex.quote(str(root))}"
        )


def describe(part: str, listed: Listed) -> None:
    """Print the number of images and classes of a part, and of wrong labels if the true ones are known."""
    counts = Counter(listed.labels)
    rare, large = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    print(
        f"{NAME} {part}: {len(listed.paths)} images of {len(counts)} classes, from {counts[rare]} ({rare}) "
        f"to {counts[large]} ({large}) a class"
    )
    if listed.true_labels is not None:
        wrong = sum(given != true for given, true in zip(listed.labels, listed.true_labels, strict=True))
        print(f"{NAME} {part}: {wrong} labels are not the true ones, {100 * wrong / len(listed.paths):.1f} %")


def sizes_of(split: FileSplit, positions: np.ndarray) -> tuple[Counter, dict[int, str]]:
    """How often each width and height occurs, by the heads of the files; the reason for each file without a head."""
    sizes: Counter = Counter()
    reasons = {}
    for i in positions.tolist():
        try:
            with Image.open(split.path(i)) as image:
                sizes[image.size] += 1
        except Exception as error:  # whatever Pillow's dozens of formats raise
            reasons[i] = "no image of a known format" if isinstance(error, OSError) else str(error)
    return sizes, reasons


def most_common(sizes: Counter) -> str:
    """The three most frequent sizes in pixels, as text. sizes: how often each (width, height) occurs."""
    shown = [f"{width} x {height} ({count} images)" for (width, height), count in sizes.most_common(3)]
    return ", ".join(shown) + (f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else "")


def report_duplicates(files: Sequence[tuple[Path, str]]) -> None:
    """Print the number of copies, and each group of files with the same bytes under two labels. files: path, part and label."""
    groups = same_bytes([path for path, _ in files])
    copies = sum(len(group) - 1 for group in groups)
    print(f"{NAME}: {copies} copies of other images, byte by byte")
    for group in groups:
        if len({files[i][1].partition(" ")[2] for i in group}) > 1:
            shown = ", ".join(f"{files[i][0]} ({files[i][1]})" for i in group)
            print(f"the same image under two labels, one of them is wrong: {shown}")
    parts = [{files[i][1].partition(" ")[0] for i in group} for group in groups]
    if shared := sum(len(names) > 1 for names in parts):
        several = set().union(*(names for names in parts if len(names) > 1))
        print(
            f"warning: {shared} images are in {' and in '.join(part for part in PARTS if part in several)}",
            file=sys.stderr,
        )


def same_bytes(paths: Sequence[Path]) -> list[list[int]]:
    """Positions of files with the same content, for each content that several have. Only files of the same length are read."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        by_length[path.stat().st_size].append(i)
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for members in by_length.values():
        for i in members if len(members) > 1 else ():
            by_content[hashlib.sha256(paths[i].read_bytes()).digest()].append(i)
    return [members for members in by_content.values() if len(members) > 1]
