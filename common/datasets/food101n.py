"""Food-101N for training (CleanNet, Lee et al. 2018), the test images of Food-101 (Bossard et al. 2014) for evaluation."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.datasets.file_lists import (
    FileData,
    make_split,
    numbered,
    read_list,
    remember,
    report,
    require,
    without_bad_images,
)

NAME = "food101n"
TRAIN, TEST = "Food-101N_release", "food-101"  # the folders below the root
CLASSES, IMAGES = f"{TEST}/meta/classes.txt", f"{TRAIN}/meta/imagelist.tsv"
VERIFIED = (f"{TRAIN}/meta/verified_train.tsv", f"{TRAIN}/meta/verified_val.tsv")
TEST_IMAGES = f"{TEST}/meta/test.txt"
FILES = (CLASSES, IMAGES, *VERIFIED, TEST_IMAGES)
OFFICIAL = {"train": 310_009, "test": 25_250}
SOURCE = (
    f"http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz (for {TEST}) and the project page of CleanNet "
    f"(Food-101N_release.zip, for {TRAIN})"
)
HEADER = "class_name"


def load_food101n(root: str | Path, on_bad_image: str = "error", workers: int = 0) -> FileData:
    """The images and given labels of Food-101N, and the test images of Food-101.

    root holds Food-101N_release/ and food-101/ as their archives unpack. The id of a class is the rank of its name in
    alphabetical order, whatever the order of the lists. verified joins the two verified lists of Food-101N; for an
    image in both, verified_train.tsv counts. on_bad_image: "error" stops at a missing image, "skip" leaves missing and damaged
    images out, checked by `workers` processes. UserError: missing files, with their source; a list with a bad line, which is
    named.
    """
    data = read_food101n(Path(root))
    report(data, OFFICIAL)
    return without_bad_images(data, Path(root), on_bad_image, workers)


def read_food101n(root: Path) -> FileData:
    """The images that the lists name, whether they exist or not."""
    require(NAME, root, root, FILES, SOURCE)
    classes = read_list(root / CLASSES, class_lines)
    paths, labels = read_list(root / IMAGES, food101n_lines, classes)
    verified, unknown = join_verified(paths, [read_list(root / file, verified_lines) for file in VERIFIED])
    print(
        f"{NAME}: {(verified >= 0).sum()} training labels verified, {(verified == 1).sum()} of them right; "
        f"{unknown} verified rows of no listed image"
    )
    test_paths, test_labels = read_list(root / TEST_IMAGES, food101_test_lines, classes)
    return FileData(
        NAME,
        make_split(root / TRAIN, paths, labels),
        make_split(root / TEST, test_paths, test_labels, "test"),
        len(classes),
        classes,
        positions=np.arange(len(paths)),
        listed=len(paths),
        verified=verified,
    )


def class_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """Class names in alphabetical order. ValueError: a name that occurs twice, or no name."""
    seen: dict[str, int] = {}
    for number, line in numbered(lines):
        if not (number == 1 and line == HEADER):
            remember(seen, line, number)
    if not seen:
        raise ValueError("no class in it")
    return tuple(sorted(seen))


def food101n_lines(lines: Iterable[str], classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Paths below Food-101N_release and class ids int64 [N] of imagelist.tsv; further columns are ignored.

    ValueError: a line that is not CLASS/FILE, has a class that `classes` (in the order of ids) lacks, or occurs twice.
    """
    return _labelled(lines, classes, "")


def food101_test_lines(lines: Iterable[str], classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The same for test.txt of Food-101, below food-101; its lines lack the .jpg."""
    return _labelled(lines, classes, ".jpg")


def _labelled(lines: Iterable[str], classes: Sequence[str], suffix: str) -> tuple[list[str], np.ndarray]:
    ids = {name: i for i, name in enumerate(classes)}
    seen: dict[str, int] = {}
    labels = []
    for number, line in numbered(lines, HEADER):
        key = line.split("\t")[0]
        class_name = _class_of(key, number)
        if class_name not in ids:
            raise ValueError(
                f"line {number}: class {class_name} is not among the {len(ids)} of {Path(CLASSES).name}"
            )
        remember(seen, key, number)
        labels.append(ids[class_name])
    if not seen:
        raise ValueError("no image in it")
    return [f"images/{key}{suffix}" for key in seen], np.array(labels, dtype=np.int64)


def verified_lines(lines: Iterable[str]) -> dict[str, int]:
    """1 (the label is right) or 0 (wrong) by path, from verified_train.tsv or verified_val.tsv. ValueError: neither."""
    seen: dict[str, int] = {}
    verified = {}
    for number, line in numbered(lines, HEADER):
        key, *rest = line.split("\t")
        _class_of(key, number)
        if not rest or rest[0].strip() not in ("0", "1"):
            raise ValueError(f"line {number}: {line!r} is not CLASS/FILE, a tab, and 0 or 1")
        remember(seen, key, number)
        verified[f"images/{key}"] = int(rest[0])
    return verified


def _class_of(key: str, number: int) -> str:
    class_name, _, file = key.partition("/")
    if not class_name or not file or "/" in file:
        raise ValueError(f"line {number}: {key!r} is not CLASS/FILE")
    return class_name


def join_verified(paths: Sequence[str], parts: Sequence[dict[str, int]]) -> tuple[np.ndarray, int]:
    """int8 [N]: the value of each path in the first of the parts that has it, else -1; and the number of rows without a path.

    The match is by class and file: verified_train.tsv has one file of the release under another class.
    """
    labels = {key: label for part in reversed(parts) for key, label in part.items()}
    verified = np.array([labels.pop(path, -1) for path in paths], dtype=np.int8)
    return verified, len(labels)
