"""Observed labels from a file: human label noise (CIFAR-10N, CIFAR-100N), an earlier run's noisy_labels.npy,
your own."""

import csv
import json
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.datasets.arrays import is_integer, read_npy, read_npz

COLUMN_NAMES = ("noisy_labels", "noisy_label", "labels", "label")


def read_labels(path: str | Path, lengths: tuple[int, ...], num_classes: int) -> np.ndarray:
    """One integer label per sample from .npy, .npz, .json or .csv: int64 [N], N one of `lengths`, values in 0..K-1.

    .npz: its only array, or the one called noisy_labels, noisy_label, labels or label. .csv: one column, or
    the column under one of these names. UserError: no such file, an unknown suffix, a wrong length, type or
    range.
    """
    path = Path(path)
    readers = {".npy": read_npy, ".npz": _read_npz, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UserError(f"--noise_file {path}: unknown kind of file, give one of {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"--noise_file {path}: no such file")
    try:
        labels = readers[path.suffix](path)
    except (ValueError, OSError, OverflowError, RecursionError, csv.Error) as error:
        raise UserError(f"--noise_file {path}: cannot be read as {path.suffix} labels: {error}") from None
    return _checked(labels, path, lengths, num_classes)


def labels_of(path: str | Path, index: np.ndarray, total: int, num_classes: int) -> np.ndarray:
    """The file's labels of the training images at `index` [N], out of `total`: int64 [N].

    The file holds one label per training image of the data set, in its order; or one per image of `index`, in that order
    (as a release's label file of a long-tailed set). A run's noisy_labels.npy is read with the train_index.npy beside it,
    which says whose labels they are. UserError: as read_labels, or labels of other images than these.
    """
    beside = Path(path).with_name("train_index.npy")
    if Path(path).name == "noisy_labels.npy" and beside.is_file():
        return _matched(Path(path), beside, index, num_classes)
    labels = read_labels(path, (total, len(index)), num_classes)
    return labels[index] if len(labels) == total else labels


def _matched(path: Path, beside: Path, index: np.ndarray, num_classes: int) -> np.ndarray:
    try:
        owners = read_npy(beside).tolist()
    except (ValueError, OSError) as error:
        raise UserError(f"--noise_file {path}: {beside.name} beside it cannot be read: {error}") from None
    label_of = dict(zip(owners, read_labels(path, (len(owners),), num_classes).tolist(), strict=True))
    missing = [image for image in index.tolist() if image not in label_of]
    if missing:
        raise UserError(
            f"--noise_file {path}: by {beside.name} beside it, it has no label of training image {missing[0]}"
        )
    return np.array([label_of[image] for image in index.tolist()], dtype=np.int64)


def _checked(labels: np.ndarray, path: Path, lengths: tuple[int, ...], num_classes: int) -> np.ndarray:
    where = f"--noise_file {path}"
    if labels.ndim != 1 or not is_integer(labels):
        raise UserError(
            f"{where}: needs a vector of integers, holds {labels.dtype} of shape {list(labels.shape)}"
        )
    if len(labels) not in lengths:
        expected = " or ".join(str(n) for n in dict.fromkeys(lengths))
        raise UserError(f"{where}: holds {len(labels)} labels, the training set needs {expected}")
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        first = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise UserError(f"{where}: label {labels[first]} at position {first} is outside 0..{num_classes - 1}")
    return labels.astype(np.int64)


def _read_npz(path: Path) -> np.ndarray:
    arrays = read_npz(path)
    names = list(arrays) if len(arrays) == 1 else [name for name in COLUMN_NAMES if name in arrays]
    if not names:
        raise ValueError(f"holds {len(arrays)} arrays and none called {' or '.join(COLUMN_NAMES)}")
    return arrays[names[0]]


def _read_json(path: Path) -> np.ndarray:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise ValueError("not a list of integers")
    return np.array(values, dtype=np.int64)


def _read_csv(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[field.strip() for field in row] for row in csv.reader(file) if row]
    column = 0
    known = [name for name in COLUMN_NAMES if rows and name in rows[0]]
    if known:
        column = rows.pop(0).index(known[0])
    elif rows and len(rows[0]) > 1:
        raise ValueError(f"several columns and no heading that names one {' or '.join(COLUMN_NAMES)}")
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("its lines differ in length")
    return np.array([int(row[column]) for row in rows], dtype=np.int64)
