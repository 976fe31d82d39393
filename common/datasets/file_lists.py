"""Data sets whose images stay in their files: lists, missing and damaged images."""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.datasets.given_labels import labels_of
from common.datasets.images import DamagedImage, in_workers, read_image
from common.gpu import processes
from common.runs.cli import UserError
from common.runs.files import write_atomic

# the usual constants of ImageNet; AFM's release uses them for Food-101N
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TRAINED_ON = ("train", "clean_train")
THREADS = 16  # that read heads of images: they wait for the disk


class FileSplit(NamedTuple):
    """Image files and their labels."""

    folder: Path
    # relative to folder, UTF-8 as bytes 'S' [N]: a million strings would be copied into each worker process
    paths: np.ndarray
    labels: np.ndarray  # int64 [N]
    part: str = "train"  # train, test, validation, clean_train or imagenet

    def path(self, i: int) -> Path:
        """The path of image i."""
        return self.folder / os.fsdecode(self.paths[i])

    def only(self, keep: np.ndarray | slice) -> "FileSplit":
        """The images at `keep`, a mask [N] or positions."""
        return self._replace(paths=self.paths[keep], labels=self.labels[keep])

    def read(self, i: int) -> Tensor:
        """Image i as uint8 [3, H, W]. UserError: it is damaged or cannot be read; names path and position."""
        try:
            return read_image(self.path(i))
        except DamagedImage as error:
            reason = f"is damaged ({error.reason}): use --on_bad_image skip"
        except OSError as error:
            reason = f"cannot be read ({error.strerror}): repair or remove it"
        raise UserError(f"image {i} of the {self.part} list, {self.path(i)}, {reason}")

    def sha256(self) -> str:
        """Of the paths, in their order."""
        return hashlib.sha256(b"\n".join(self.paths.tolist())).hexdigest()


class FileData(NamedTuple):
    """A data set of image files with given labels."""

    name: str
    train: FileSplit
    test: FileSplit
    num_classes: int
    classes: tuple[str, ...]  # names, by class id
    positions: np.ndarray  # int64 [N]: positions of the kept training images in the official training list
    listed: int  # number of images in that list
    verified: np.ndarray  # int8 [N]: 1: label verified as right, 0: verified as wrong, -1: not verified
    validation: FileSplit | None = None
    clean_train: FileSplit | None = None  # verified images to fine-tune on
    imagenet: FileSplit | None = None  # test images of another data set
    skipped: tuple[
        tuple[str, int, str], ...
    ] = ()  # images left out: path, position in the official list, reason
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    true_labels: np.ndarray | None = None  # int64 [N]: of the training images, where all are known

    def splits(self) -> tuple[FileSplit, ...]:
        """The splits that exist."""
        all_splits = (self.train, self.test, self.validation, self.clean_train, self.imagenet)
        return tuple(split for split in all_splits if split is not None)


def relabelled(data: FileData, noise_file: str | None) -> FileData:
    """The data set with the training labels of --noise_file, if it is given. UserError: as labels_of.

    Images that a decisions file does not list keep their labels; `without_removed` refuses them if they are trained on.
    """
    if not noise_file:
        return data
    own = data.train.labels
    paths = [os.fsdecode(path) for path in data.train.paths.tolist()]
    place = data.positions, data.listed, data.num_classes
    labels = labels_of(noise_file, *place, otherwise=own, paths=paths)
    return data._replace(train=data.train._replace(labels=labels))


def make_split(
    folder: Path, paths: Iterable[str | bytes], labels: Iterable[int], part: str = "train"
) -> FileSplit:
    """A split from paths relative to the folder and their labels."""
    return FileSplit(
        folder, np.array([os.fsencode(p) for p in paths], dtype="S"), np.array(labels, dtype=np.int64), part
    )


# list files -----------------------------------------------------------------------------------------------------------


def require(name: str, root: Path, folder: Path, files: Iterable[str], source: str) -> None:
    """UserError if list files are missing below `folder`; it names the folder and the source of the data."""
    missing = missing_files(folder, files)
    if missing:
        raise UserError(
            f"{name} not found in {root}; looked in {folder.resolve()} for {', '.join(missing)}; get it from {source}; "
            f"see what is there with: python -m common.datasets check {name} --data_path {shlex.quote(str(root))}"
        )


def missing_files(root: Path, files: Iterable[str]) -> list[str]:
    """The files that do not exist below root."""
    return [file for file in files if not (root / file).is_file()]


def read_list(path: Path, reader: Callable[..., Any], *arguments: Any) -> Any:
    """reader(lines of the file, *arguments); a ValueError or an unreadable file becomes a UserError that names the file."""
    try:
        return reader(path.read_text(encoding="utf-8-sig").splitlines(), *arguments)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def numbered(lines: Iterable[str], header: str | None = None) -> Iterable[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1; skips a first line that starts with the header."""
    for number, line in enumerate(lines, start=1):
        if line.strip() and not (number == 1 and header is not None and line.startswith(header)):
            yield number, line.strip()


def remember(seen: dict[str, int], key: str, number: int) -> None:
    """Keep the line number of a key. ValueError: an earlier line has the key."""
    if key in seen:
        raise ValueError(f"line {number}: {key} is there already, in line {seen[key]}")
    seen[key] = number


def report(data: FileData, official: dict[str, int], added: int = 0) -> None:
    """Print the size of each split, and a note if a list differs in length from the official one (by part).

    added: number of training images from another list.
    """
    for split in data.splits():
        count, expected = len(split.paths), official.get(split.part)
        print(f"{data.name} {split.part}: {count} images of {data.num_classes} classes")
        listed = count - added if split.part == "train" else count
        if expected is not None and listed != expected:
            print(f"note: the {split.part} list names {listed} images, the official one {expected}")


# missing and damaged images -------------------------------------------------------------------------------------------


def are_there(split: FileSplit, listings: dict[bytes, set[bytes]]) -> np.ndarray:
    """Which images exist: bool [N]. Each folder is listed once and kept in `listings`."""
    root = os.fsencode(split.folder)
    exists = np.zeros(len(split.paths), dtype=bool)
    for i, path in enumerate(split.paths.tolist()):
        folder, name = os.path.split(os.path.join(root, path))
        if folder not in listings:
            listings[folder] = _names_in(folder)
        exists[i] = name in listings[folder]
    return exists


def _names_in(folder: bytes) -> set[bytes]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise UserError(f"{os.fsdecode(folder)} cannot be listed ({error.strerror})") from None


def find_damaged(split: FileSplit, positions: np.ndarray, workers: int) -> dict[int, str]:
    """Decode the images at `positions` in worker processes; the reason for each damaged one, by its position.

    UserError: an image cannot be read, so nothing is known about its content.
    """
    chunks = np.array_split(positions, max(len(positions) // 32, 1))
    damaged: dict[int, str] = {}
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(positions), desc=f"reading {split.part}", unit="image", disable=quiet) as bar:
        for read, bad in in_workers(partial(_damaged_of, split), chunks, workers):
            damaged |= bad
            bar.update(read)
    return damaged


def _damaged_of(split: FileSplit, positions: np.ndarray) -> tuple[int, dict[int, str]] | UserError:
    damaged = {}
    for i in positions.tolist():
        try:
            read_image(split.path(i))
        except DamagedImage as error:
            damaged[i] = error.reason
        except OSError as error:
            return UserError(f"{split.path(i)} cannot be read ({error.strerror}): repair or remove it")
    return len(positions), damaged


def without_bad_images(data: FileData, root: Path, on_bad_image: str, workers: int) -> FileData:
    """The data set without bad images; `data` has all images of the lists.

    on_bad_image: "error" raises UserError if an image is missing; "skip" leaves missing and damaged images out of every
    split. For "skip" all images are decoded once, and the outcome is kept in root.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be error or skip, got {on_bad_image}")
    listings: dict[bytes, set[bytes]] = {}
    keep, skipped = {}, []
    for split in data.splits():
        there = are_there(split, listings)
        if on_bad_image == "error":
            _require_all(data.name, root, split, there)
            continue
        bad = {int(i): "missing" for i in np.flatnonzero(~there)}
        bad |= _damaged_images(data.name, root, split, there, workers)
        keep[split.part] = np.array([i not in bad for i in range(len(split.paths))], dtype=bool)
        positions = data.positions if split.part == "train" else np.arange(len(split.paths))
        skipped += [(str(split.path(i)), int(positions[i]), bad[i]) for i in sorted(bad)]
        print(
            f"{data.name} {split.part}: {(~there).sum()} missing and {len(bad) - (~there).sum()} damaged images "
            f"left out, {keep[split.part].sum()} kept"
        )
        if not keep[split.part].any():
            raise UserError(f"{data.name} {split.part}: no image left below {split.folder}")
    if on_bad_image == "error":
        return data
    kept: dict[str, Any] = {split.part: split.only(keep[split.part]) for split in data.splits()}
    kept |= {name: getattr(data, name)[keep["train"]] for name in ("positions", "verified")}
    if data.true_labels is not None:
        kept["true_labels"] = data.true_labels[keep["train"]]
    return data._replace(**kept, skipped=tuple(skipped))


def _require_all(name: str, root: Path, split: FileSplit, there: np.ndarray) -> None:
    missing = np.flatnonzero(~there)
    if len(missing):
        raise UserError(
            f"image {missing[0]} of the {split.part} list, {split.path(missing[0])}, is missing ({len(missing)} of "
            f"{len(split.paths)} are): see which with python -m common.datasets check {name} --data_path "
            f"{shlex.quote(str(root))}, or use --on_bad_image skip"
        )


def require_heads(split: FileSplit) -> None:
    """UserError: a file of a part to test on does not start as an image. A run would otherwise end after its first epoch."""
    if split.part in TRAINED_ON:
        return
    paths = [split.path(i) for i in range(len(split.paths))]
    quiet = not sys.stderr.isatty() or processes.rank() > 0
    with ThreadPoolExecutor(THREADS) as pool:
        heads = tqdm(
            pool.map(_damage_in_head, paths),
            f"checking {split.part}",
            len(paths),
            disable=quiet,
            unit="image",
        )
        bad = {i: reason for i, reason in enumerate(heads) if reason is not None}
    if bad:
        first = min(bad)
        raise UserError(
            f"image {first} of the {split.part} list, {paths[first]}, is damaged ({bad[first]}; {len(bad)} of {len(paths)} are): "
            "replace it, or use --on_bad_image skip"
        )


def _damage_in_head(path: Path) -> str | None:
    """What is wrong with the first bytes of an image file; None if nothing is."""
    try:
        with Image.open(path):
            return None
    except Exception:  # whatever Pillow's dozens of formats raise: what trains decides
        try:
            read_image(path)
        except DamagedImage as error:
            return error.reason
        except OSError as error:
            return f"cannot be read, {error.strerror}"
    return None


def _damaged_images(
    name: str, root: Path, split: FileSplit, there: np.ndarray, workers: int
) -> dict[int, str]:
    """The damaged images among the existing ones, by position. Images that an earlier run checked are not read again."""
    sha = split.sha256()
    if not split.folder.is_relative_to(root):  # another folder has other files with these names
        sha = hashlib.sha256(os.fsencode(split.folder.resolve()) + sha.encode()).hexdigest()
    record = root / f"damaged_images.{name}_{split.part}_{sha[:8]}.json"
    damaged, unseen = _read_record(record, sha, len(split.paths))
    look = np.flatnonzero(unseen & there)
    if len(look):
        damaged |= find_damaged(split, look, workers)
        unseen[look] = False
        content = {
            "list_sha256": sha,
            "damaged": {str(i): damaged[i] for i in sorted(damaged)},
            "not_looked_at": np.flatnonzero(unseen).tolist(),
        }
        try:
            write_atomic(record, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            print(
                f"note: {record} cannot be written ({error.strerror}): the next run will read every image again"
            )
    elif damaged:
        print(f"{name} {split.part}: damaged images as in {record}; delete it to read every image again")
    return {i: reason for i, reason in damaged.items() if there[i]}


def _read_record(record: Path, sha: str, count: int) -> tuple[dict[int, str], np.ndarray]:
    """The outcome of an earlier run: the damaged images by position, and which images it did not check, bool [N]."""
    unseen = np.zeros(count, dtype=bool)
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        if content["list_sha256"] == sha:
            unseen[content["not_looked_at"]] = True
            return {int(i): reason for i, reason in content["damaged"].items()}, unseen
    except FileNotFoundError:
        pass  # the first check of this list
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        print(f"note: {record} cannot be read ({type(error).__name__}): every image is read again")
    return {}, np.ones(count, dtype=bool)
