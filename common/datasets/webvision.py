"""mini-WebVision (Li et al. 2017; its first classes, as Jiang et al. 2020 and most of the field use it): images found by Google.

Trained on with the labels of the search, tested on WebVision's own validation images and on those of ILSVRC12.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.datasets.file_lists import (
    FileData,
    FileSplit,
    make_split,
    numbered,
    read_list,
    report,
    require,
    without_bad_images,
)

NAME = "webvision"
TRAIN, TEST, SYNSETS = "info/train_filelist_google.txt", "info/val_filelist.txt", "info/synsets.txt"
FILES = (TRAIN, TEST)
TEST_IMAGES = "val_images_256"
CLASSES, ALL_CLASSES, PER_CLASS = 50, 1000, 50  # of mini-WebVision; of WebVision; test images of each class
# of the training images the count that the literature gives, not checked against the list by us
OFFICIAL = {"train": 65_944, "test": CLASSES * PER_CLASS, "imagenet": CLASSES * PER_CLASS}
SOURCE = (
    "WebVision 1.0 of data.vision.ee.ethz.ch/cvl/webvision (the Google images, val_images_256 and info) and, below imagenet/val, "
    "the validation images of ILSVRC12 from image-net.org in a folder per class"
)


def load_webvision(
    root: str | Path,
    num_class: int = CLASSES,
    on_bad_image: str = "error",
    workers: int = 0,
    imagenet: str | Path | None = None,
) -> FileData:
    """The first num_class classes: images of Google with the labels of the search, and both sets to test on.

    root holds info/ and val_images_256/ as WebVision's archives unpack, and the training images where the list says (google/...).
    The validation images of ILSVRC12 (`imagenet` of what is returned) are below `imagenet`/val or root/imagenet/val, in a
    folder per class: named by class id (0, 1, ...) as for the release, or by synset (n01440764, ...) as torchvision's
    ImageNet has them, for which info/synsets.txt says the order; "none" does without. on_bad_image, workers: as for
    Food-101N. UserError: what is missing, and where to get it; a list that cannot be understood, by its line.
    """
    data = read_webvision(Path(root), num_class, imagenet)
    report(data, official(num_class))
    return without_bad_images(data, Path(root), on_bad_image, workers)


def read_webvision(root: Path, num_class: int = CLASSES, imagenet: str | Path | None = None) -> FileData:
    """What the lists name, whether it is there or not."""
    if not 2 <= num_class <= ALL_CLASSES:
        raise ValueError(f"num_class must be from 2 to {ALL_CLASSES}, got {num_class}")
    require(NAME, root, root, FILES, SOURCE)
    paths, labels = read_list(root / TRAIN, list_lines, num_class)
    test_paths, test_labels = read_list(root / TEST, list_lines, num_class)
    names = read_list(root / SYNSETS, synset_lines) if (root / SYNSETS).is_file() else ()
    other = None
    if str(imagenet) != "none":
        other = imagenet_validation(Path(imagenet or root / "imagenet"), num_class, names)
    return FileData(
        NAME,
        make_split(root, paths, labels),
        make_split(root / TEST_IMAGES, test_paths, test_labels, "test"),
        num_class,
        names[:num_class] or tuple(map(str, range(num_class))),
        positions=np.arange(len(paths)),
        listed=len(paths),
        verified=np.full(len(paths), -1, dtype=np.int8),
        imagenet=other,
    )


def official(num_class: int) -> dict[str, int]:
    """How many images each split has of the first num_class classes, as far as that is known."""
    return OFFICIAL if num_class == CLASSES else dict.fromkeys(("test", "imagenet"), num_class * PER_CLASS)


def list_lines(lines: Iterable[str], num_class: int) -> tuple[list[str], list[int]]:
    """Paths and labels of the images of the first num_class classes, in the order of the lines: a path, a blank, a class id.

    ValueError: another line, or no image of these classes.
    """
    paths, labels = [], []
    for number, line in numbered(lines):
        path, _, label = line.rpartition(" ")
        if not path or not label.isdecimal() or int(label) >= ALL_CLASSES:
            raise ValueError(
                f"line {number}: {line!r} is not a path, a blank and a class id 0..{ALL_CLASSES - 1}"
            )
        if int(label) < num_class:
            paths.append(path.strip())
            labels.append(int(label))
    if not paths:
        raise ValueError(f"no image of the first {num_class} classes in it")
    return paths, labels


def synset_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """The synsets in the order of their class ids: the first word of each line. ValueError: not one for every class."""
    names = tuple(line.split()[0] for _, line in numbered(lines))
    if len(set(names)) != ALL_CLASSES or len(names) != ALL_CLASSES:
        raise ValueError(f"{len(set(names))} synsets in {len(names)} lines, not {ALL_CLASSES} in as many")
    return names


def imagenet_validation(folder: Path, num_class: int, synsets: tuple[str, ...]) -> FileSplit:
    """ILSVRC12's validation images of the first num_class classes below folder/val. UserError: a class that is not there."""
    folder = folder / "val"
    by_id = (folder / "0").is_dir()
    if not by_id and not synsets and folder.is_dir():
        raise UserError(
            f"{folder.resolve()} has no folder 0, 1, ..., and there is no {SYNSETS} to find the classes by their synsets with: "
            "get it from WebVision's info archive, or use --imagenet none"
        )
    names = [str(k) for k in range(num_class)] if by_id or not synsets else synsets[:num_class]
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{NAME}: looked in {folder.resolve()} for a folder of each of {num_class} classes of ILSVRC12's validation images, "
            f"{missing[0]} is missing ({len(missing)} are): get them from image-net.org, or use --imagenet none"
        )
    paths, labels = [], []
    for k, name in enumerate(names):
        try:
            files = sorted(file for file in os.listdir(folder / name) if not file.startswith("."))
        except OSError as error:
            raise UserError(f"{folder / name} cannot be listed ({error.strerror})") from None
        paths += [f"{name}/{file}" for file in files]
        labels += [k] * len(files)
    if not paths:
        raise UserError(
            f"{NAME}: no image below {folder.resolve()}: get them from image-net.org, or use --imagenet none"
        )
    return make_split(folder, paths, labels, "imagenet")
