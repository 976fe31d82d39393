"""mini-WebVision: the Google images of the first classes of WebVision 1.0 (Li et al. 2017), as in Jiang et al. 2020.

Training uses the labels of the image search. Tests use WebVision's validation images and those of ILSVRC12.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

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
from common.datasets.images import is_image_name
from common.runs.cli import UserError
from common.runs.data_flags import WEBVISION as NAME

TRAIN, TEST, SYNSETS = "info/train_filelist_google.txt", "info/val_filelist.txt", "info/synsets.txt"
FILES = (TRAIN, TEST)
TEST_IMAGES, RESIZED = "val_images_256", "google_resized_256"
# lists of ILSVRC12's validation images, in val/, beside it or in info/: a name and a class id or synset in each line; Kaggle's;
# the development kit's ids in the order of the images, with their synsets in meta.mat
FLAT_LISTS = (
    "val.txt",
    "imagenet_val.txt",
    "ILSVRC2012_val.txt",
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
)
CLASSES, ALL_CLASSES, PER_CLASS = 50, 1000, 50  # of mini-WebVision; of WebVision; test images of each class
# the number of training images is from the literature; we have not checked it against the list
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
    """The first num_class classes: Google images with the labels of the search, and both test sets.

    root holds info/ and val_images_256/ as WebVision's archives unpack, and the training images where the list says (google/...)
    or in google_resized_256/, the archive of small images. The validation images of ILSVRC12 (`imagenet` of the result) are
    below `imagenet`/val or root/imagenet/val, in a folder per class: named by class id (0, 1, ...) as in the release, or by
    synset (n01440764, ...) as in torchvision's ImageNet, in the order of info/synsets.txt. Or all are in val/ itself, with one of
    FLAT_LISTS in val/, beside it or in info/. "none": no such test set. on_bad_image, workers: as for Food-101N. UserError:
    missing files, with their source; a list with a bad line, which is named.
    """
    data = read_webvision(Path(root), num_class, imagenet)
    report(data, official(num_class))
    return without_bad_images(data, Path(root), on_bad_image, workers)


def read_webvision(root: Path, num_class: int = CLASSES, imagenet: str | Path | None = None) -> FileData:
    """The images that the lists name, whether they exist or not."""
    if not 2 <= num_class <= ALL_CLASSES:
        raise ValueError(f"num_class must be from 2 to {ALL_CLASSES}, got {num_class}")
    require(NAME, root, root, FILES, SOURCE)
    paths, labels = read_list(root / TRAIN, list_lines, num_class)
    if not (root / "google").is_dir() and (root / RESIZED).is_dir():  # the archive of small images unpacks so
        paths = [f"{RESIZED}/{path.removeprefix('google/')}" for path in paths]
    test_paths, test_labels = read_list(root / TEST, list_lines, num_class)
    names = read_list(root / SYNSETS, synset_lines) if (root / SYNSETS).is_file() else ()
    other = None
    if str(imagenet) != "none":
        other = imagenet_validation(Path(imagenet or root / "imagenet"), num_class, names, root / "info")
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
    """The number of images of the first num_class classes in each split, as far as published."""
    return OFFICIAL if num_class == CLASSES else dict.fromkeys(("test", "imagenet"), num_class * PER_CLASS)


def list_lines(lines: Iterable[str], num_class: int) -> tuple[list[str], list[int]]:
    """Paths and labels of the images of the first num_class classes, in the order of the lines: a path, a blank, a class id.

    ValueError: any other line, or no image of these classes.
    """
    paths, labels = [], []
    for number, line in numbered(lines):
        *path, label = line.rsplit(maxsplit=1)
        if not path or not label.isdecimal() or int(label) >= ALL_CLASSES:
            raise ValueError(
                f"line {number}: {line!r} is not a path, a blank and a class id 0..{ALL_CLASSES - 1}"
            )
        if int(label) < num_class:
            paths.append(path[0].strip())
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


def imagenet_validation(folder: Path, num_class: int, synsets: tuple[str, ...], info: Path) -> FileSplit:
    """ILSVRC12's validation images of the first num_class classes below folder/val. UserError: a class without a folder."""
    folder = folder / "val"
    by_id = (folder / "0").is_dir()
    flat = _image_names(folder)
    if flat and not any(path.is_dir() for path in folder.iterdir()):
        return _flat_validation(folder, flat, num_class, synsets, info)
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
        files = _image_names(folder / name)
        paths += [f"{name}/{file}" for file in files]
        labels += [k] * len(files)
    if not paths:
        raise UserError(
            f"{NAME}: no image below {folder.resolve()}: get them from image-net.org, or use --imagenet none"
        )
    return make_split(folder, paths, labels, "imagenet")


def _image_names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if is_image_name(name)) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror})") from None


def _flat_validation(
    folder: Path, names: list[str], num_class: int, synsets: tuple[str, ...], info: Path
) -> FileSplit:
    """ILSVRC12's validation images in one folder, with their classes from a list."""
    places = [place / name for place in (folder, folder.parent, info) for name in FLAT_LISTS]
    lists = [place for place in places if place.is_file()]
    if not lists:
        raise UserError(
            f"{NAME}: the images in {folder.resolve()} are in no folder per class: put {' or '.join(FLAT_LISTS)} there, "
            "or use --imagenet none"
        )
    class_of = read_list(lists[0], flat_lines, names, synsets, lists[0].parent)
    without = [name for name in names if Path(name).stem not in class_of]
    if without:
        raise UserError(
            f"{lists[0]}: has no line for {without[0]}: get the complete list, or use --imagenet none"
        )
    kept = [(name, class_of[Path(name).stem]) for name in names if class_of[Path(name).stem] < num_class]
    if not kept:
        raise UserError(f"{lists[0]}: no image of the first {num_class} classes in it")
    return make_split(folder, [name for name, _ in kept], [label for _, label in kept], "imagenet")


def flat_lines(
    lines: Iterable[str], names: list[str], synsets: tuple[str, ...], folder: Path
) -> dict[str, int]:
    """Class ids by image names without suffix. names: of the images in order, for a list that has only ids.

    ValueError: a bad line, an unknown synset, a list of ids of another length or without its meta.mat.
    """
    rows = [line.replace(",", " ").split() for _, line in numbered(lines, "ImageId")]
    if all(len(row) == 1 for row in rows):
        return dict(
            zip(
                (Path(name).stem for name in names),
                _development_kit(rows, names, synsets, folder),
                strict=True,
            )
        )
    class_of = {}
    for number, row in enumerate(rows, start=1):
        if len(row) == 1 or not (row[1].isdecimal() or row[1] in synsets):
            raise ValueError(
                f"line {number}: {' '.join(row)!r} is not an image and its class id or a synset of {SYNSETS}"
            )
        class_of[Path(row[0]).stem] = int(row[1]) if row[1].isdecimal() else synsets.index(row[1])
    return class_of


def _development_kit(
    rows: list[list[str]], names: list[str], synsets: tuple[str, ...], folder: Path
) -> list[int]:
    """Class ids of the images in order, from the ids 1..1000 of ILSVRC12's development kit; its meta.mat names their synsets."""
    if not (folder / "meta.mat").is_file() or not synsets:
        raise ValueError(
            f"holds ids alone: put the development kit's meta.mat beside it, and {SYNSETS} into the data set"
        )
    if len(rows) != len(names):
        raise ValueError(f"holds {len(rows)} ids for {len(names)} images: they go by the order of all images")
    from scipy.io import loadmat  # noqa: PLC0415

    meta = loadmat(folder / "meta.mat", squeeze_me=True)["synsets"]
    of_id = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in meta}
    try:
        return [synsets.index(of_id[int(row[0])]) for row in rows]
    except (KeyError, ValueError):
        raise ValueError(
            "has an id that meta.mat, or a synset that the data set's list, does not have"
        ) from None
