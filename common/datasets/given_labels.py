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
    """One integer label per sample from .npy, .npz, .json or .csv: int64 [N], N one of `lengths`, values in
    0..K-1.

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
