"""Observed labels from a file: human label noise (CIFAR-N), an earlier run's labels, your own.

`--noise_file FILE` or `--noise_file FILE:COLUMN`. A file is a table of named columns or arrays. A column of indices sorts its
rows into the order of the data set. COLUMN names the labels if several columns could be labels. A `decisions.csv` (see
common.datasets.decisions) corrects the labels of an earlier run and removes images from training.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from common.datasets.arrays import is_integer, read_npy, read_npz, read_pt
from common.datasets.decisions import Decisions, is_decisions, make_decisions
from common.runs.cli import UserError

# columns that say which training image a row is of, in lower case; pandas leaves its index without a name
INDEX_NAMES = ("index", "idx", "id", "image_id", "dataset_index")
UNNAMED = ("", "unnamed: 0")
DELIMITERS = ",;\t|"
TEXT = (".csv", ".tsv", ".txt")
OWN = {"labels", "index", "sha256"}  # the arrays of a run's noisy_labels.npz

Table = dict[str, Any]  # columns by name; a single column without a name is called ""


def read_labels(path: str | Path, lengths: tuple[int, ...], num_classes: int) -> np.ndarray:
    """One integer label per training image: int64 [N], N one of `lengths`, values in 0..K-1.

    path: FILE or FILE:COLUMN, a .npy, .npz, .pt, .json, .csv or .tsv. An index column (index, idx, id, image_id, dataset_index,
    or pandas' unnamed one) puts the labels in its order. UserError: no such file or column, several columns that could be the
    labels, an index that is no permutation of 0..N-1, a wrong length, type or range.
    """
    file, column = split_column(path)
    where = f"--noise_file {path}"
    table = _read(file, where)
    if set(table) == OWN:  # a run's own file: its index may be a subset, which only labels_of can match
        table.pop("sha256")
    try:
        labels = _in_order(table, _chosen(table, column))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return _checked(labels, where, lengths, num_classes)


def labels_of(
    path: str | Path,
    index: np.ndarray,
    total: int,
    num_classes: int,
    is_subset: Callable[[np.ndarray], bool] | None = None,
    otherwise: np.ndarray | None = None,
    paths: Sequence[str] = (),
) -> np.ndarray:
    """The file's labels of the training images at `index` [n], out of `total`: int64 [n].

    The file holds one label per training image of the data set. A run's noisy_labels.npz (or .npy with the train_index.npy
    beside it) says itself whose labels it holds. is_subset: whether labels [n] without an index provably belong to
    the images at `index`, in that order; without it such a file is refused. otherwise: labels [n] of the images that a
    decisions file does not list; without it such a file is refused. paths: the files of these images [n], if they come from
    files; a decisions file that has others is refused. UserError: as read_labels, or labels of other images.
    """
    file, column = split_column(path)
    where = f"--noise_file {path}"
    decisions = read_decisions(path)
    if decisions is not None:
        try:
            decisions.check_files(index[: len(paths)], paths)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        labels = _checked(decisions.labels, where, (len(decisions.images),), num_classes)
        return _matched(labels, decisions.images, index, where, otherwise)
    own = _own_labels(file, where) if column is None else None
    if own is not None:
        labels, owners = own
        return _matched(_checked(labels, where, (len(owners),), num_classes), owners, index, where)
    lengths = (total,) if is_subset is None else (total, len(index))
    labels = read_labels(path, lengths, num_classes)
    if len(labels) == total:
        return labels[index]
    if is_subset is None or not is_subset(labels):
        raise UserError(
            f"{where}: nothing shows which {len(labels)} of the {total} training images these labels are of; give one label "
            "per training image, or a run's noisy_labels.npz"
        )
    return labels


def read_decisions(path: str | Path | None) -> Decisions | None:
    """The decisions in a file; None for any other file. UserError: it is damaged."""
    file, column = split_column(path or "")
    if column is not None or file.suffix.lower() not in TEXT or not file.is_file():
        return None
    state = file.stat()
    return _decisions(str(path), file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)  # a run asks several times, and a million lines take seconds
def _decisions(path: str, file: Path, *_state: int) -> Decisions | None:
    where = f"--noise_file {path}"
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        heading = text.readline()
    if not is_decisions(heading.strip().replace('"', "").split(_delimiter(heading))):
        return None
    try:
        return make_decisions(_read(file, where), _whole_numbers)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def without_removed(
    kept: np.ndarray, noise_file: str | Path | None, positions: np.ndarray | None = None
) -> np.ndarray:
    """`kept` [n] without the images that a decisions file removes; all of it for any other file.

    positions: where image i of the training list stands in the data set, int [N]; None if image i stands at i. UserError: the
    decisions file does not list one of the images, or removes all.
    """
    decisions = read_decisions(noise_file)
    if decisions is None:
        return kept
    try:
        left = kept[decisions.without_removed(kept if positions is None else positions[kept])]
    except ValueError as error:
        raise UserError(f"--noise_file {noise_file}: {error}") from None
    if not len(left):
        raise UserError(f"--noise_file {noise_file}: removes all {len(kept)} training images: keep some")
    return left


def split_column(path: str | Path) -> tuple[Path, str | None]:
    """FILE:COLUMN as (FILE, COLUMN). A name with a colon that is a file, or whose FILE is none, stays as it is."""
    head, colon, column = str(path).rpartition(":")
    if colon and not Path(path).is_file() and Path(head).is_file():
        return Path(head), column
    return Path(path), None


def own_file(labels: np.ndarray, index: np.ndarray) -> bytes:
    """The content of a run's noisy_labels.npz: the observed labels [n], the training images they belong to [n], sha256."""
    buffer = io.BytesIO()
    np.savez(buffer, labels=labels, index=index, sha256=np.array(labels_sha256(labels)))
    return buffer.getvalue()


def labels_sha256(labels: np.ndarray) -> str:
    """sha256 of the labels as a .npy file: that of noise.json and of every copy of noisy_labels.npy."""
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def label_notes(
    clean: np.ndarray | None, observed: np.ndarray, num_classes: int, from_file: bool
) -> list[str]:
    """Warnings about valid labels [N]: a noise rate that suggests labels of other images or true labels, and classes without
    an image. clean: None if the true labels are unknown."""
    notes = []
    if from_file and clean is not None and len(clean):
        rate = float((clean != observed).mean())
        if rate == 0:
            notes.append("the label file holds the true labels: nothing is mislabelled")
        elif rate >= (num_classes - 1) / num_classes:
            notes.append(
                f"{100 * rate:.1f} % of the file's labels are wrong, as many as of labels drawn at random: "
                "they may be in another order than the images"
            )
    truth = observed if clean is None else clean
    for empty in np.flatnonzero(np.bincount(truth, minlength=num_classes) == 0):
        start = ": labels may start at 1" if empty == 0 else ""
        notes.append(f"class {empty} has no training image{start}")
    return notes


# a run's own files ----------------------------------------------------------------------------------------------------


def _own_labels(file: Path, where: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels and their images, from a file that a run wrote; None for any other file."""
    beside = file.with_name("train_index.npy")
    if file.name == "noisy_labels.npy" and file.is_file() and beside.is_file():
        labels = _read(file, where)[""]
        try:
            owners = read_npy(beside)
        except (ValueError, OSError) as error:
            raise UserError(f"{where}: {beside.name} beside it cannot be read: {error}") from None
    elif file.suffix == ".npz" and file.is_file() and set(table := _read(file, where)) == OWN:
        labels, owners = table["labels"], table["index"]
        if labels_sha256(labels) != str(table["sha256"]):
            raise UserError(
                f"{where}: its labels do not match its sha256: the file was changed; take the run's own copy"
            )
    else:
        return None
    if owners.ndim != 1 or not is_integer(owners) or len(np.unique(owners)) != len(owners):
        raise UserError(f"{where}: the index of its labels does not name each training image once")
    return labels, owners


def _matched(
    labels: np.ndarray, owners: np.ndarray, index: np.ndarray, where: str, otherwise: np.ndarray | None = None
) -> np.ndarray:
    label_of = {} if otherwise is None else dict(zip(index.tolist(), otherwise.tolist(), strict=True))
    label_of |= dict(zip(owners.tolist(), labels.tolist(), strict=True))
    missing = [image for image in index.tolist() if image not in label_of]
    if missing:
        raise UserError(f"{where}: by its index, it has no label of training image {missing[0]}")
    return np.array([label_of[image] for image in index.tolist()], dtype=np.int64)


# which column holds the labels, and in which order --------------------------------------------------------------------


def _chosen(table: Table, column: str | None) -> np.ndarray:
    """The labels' column. ValueError: none, several, or none of that name."""
    others = [name for name in table if not _is_index(name, table)]
    if column is not None:
        if column not in table:
            raise ValueError(f"has no column {column}: choose from {', '.join(map(repr, table))}")
        return _whole_numbers(table[column], column)
    if len(others) == 1:
        return _whole_numbers(table[others[0]], others[0])
    candidates = [name for name in others if _could_be_labels(table[name])]
    if len(candidates) == 1:
        return _whole_numbers(table[candidates[0]], candidates[0])
    if not candidates:
        raise ValueError(
            f"none of its columns {', '.join(map(repr, table)) or '(none)'} holds whole numbers, one per image"
        )
    raise ValueError(
        f"several columns could be the labels, {', '.join(candidates)}: name one, such as FILE:{candidates[-1]}"
    )


def _is_index(name: str, table: Table) -> bool:
    return name.lower() in INDEX_NAMES or (name.lower() in UNNAMED and len(table) > 1)


def _could_be_labels(values: Any) -> bool:
    try:
        numbers = _whole_numbers(values, "")
    except ValueError:
        return False
    return numbers.ndim == 1


def _in_order(table: Table, labels: np.ndarray) -> np.ndarray:
    """The labels sorted by their index column, if there is one. ValueError: it is no permutation of 0..N-1."""
    names = [name for name in table if _is_index(name, table)]
    named = [name for name in names if name.lower() in INDEX_NAMES] or names
    orders = [_whole_numbers(table[name], name) for name in named]
    if not orders:
        return labels
    order, name = orders[0], named[0] or "without a name"
    if any(not np.array_equal(order, other) for other in orders[1:]):
        raise ValueError(f"the index columns {' and '.join(named)} differ: leave one")
    if not np.array_equal(np.sort(order), np.arange(len(labels))):
        raise ValueError(
            f"the index column {name} is no permutation of 0..{len(labels) - 1} "
            "that holds each once: number the training images from 0"
        )
    ordered = np.empty_like(labels)
    ordered[order] = labels
    return ordered


def _whole_numbers(values: Any, name: str) -> np.ndarray:
    """A column as integers: whole numbers of any type, [N, 1] as [N]. ValueError: any other column; names the content."""
    array = np.asarray(values)
    of = f"column {name}: " if name else ""
    if array.dtype.kind == "U":  # text of a .csv
        array = np.array([_number(text, of) for text in array.tolist()])
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and np.isin(array, (0, 1)).all() and (array.sum(axis=1) == 1).all():
        raise ValueError(
            f"{of}holds one-hot rows of shape {list(array.shape)}: save their argmax, one whole number per image"
        )
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise ValueError(f"{of}needs a vector of integers, holds {array.dtype} of shape {list(array.shape)}")
    if array.dtype.kind == "f":
        wrong = np.flatnonzero(~(array == np.round(array)) | ~np.isfinite(array))
        if len(wrong):
            raise ValueError(
                f"{of}needs whole numbers, holds {array[wrong[0]].item()!r} at position {wrong[0]}"
            )
        if len(array) and np.abs(array).max() >= 2**53:
            raise ValueError(f"{of}holds {array[np.abs(array).argmax()]}, too large for a label")
    return array.astype(np.int64)


def _number(text: str, of: str) -> float:
    with suppress(ValueError):
        return int(text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{of}needs whole numbers, holds {text!r}") from None


def _checked(labels: np.ndarray, where: str, lengths: tuple[int, ...], num_classes: int) -> np.ndarray:
    if len(labels) not in lengths:
        expected = " or ".join(str(n) for n in dict.fromkeys(lengths))
        raise UserError(
            f"{where}: holds {len(labels)} labels, the training set needs {expected}, one per image in its order"
        )
    if len(labels) and labels.min() == 1 and labels.max() == num_classes:
        raise UserError(f"{where}: its labels are 1..{num_classes}, classes count from 0: subtract 1")
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        first = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise UserError(f"{where}: label {labels[first]} at position {first} is outside 0..{num_classes - 1}")
    return labels.astype(np.int64)


# kinds of files -------------------------------------------------------------------------------------------------------


def _read(file: Path, where: str) -> Table:
    readers = {
        **{".npy": _read_npy, ".npz": read_npz, ".pt": read_pt, ".pth": read_pt, ".json": _read_json},
        **dict.fromkeys(TEXT, _read_text),
    }
    if "_human_ordered" in file.name:
        raise UserError(
            f"{where}: is CIFAR-N in TensorFlow's order, not in the order of these images: "
            f"give {file.name.replace('_ordered', '').removesuffix(file.suffix)}.pt:worse_label"
        )
    if file.suffix.lower() not in readers:
        raise UserError(f"{where}: unknown kind of file, give one of {', '.join(readers)}")
    if not file.is_file():
        raise UserError(f"{where}: no such file")
    try:
        return readers[file.suffix.lower()](file)
    except (ValueError, OSError, OverflowError, RecursionError, csv.Error) as error:
        raise UserError(f"{where}: cannot be read as {file.suffix} labels: {error}") from None


def _read_npy(path: Path) -> Table:
    return {"": read_npy(path)}


def _read_json(path: Path) -> Table:
    """A list of labels, a dict of labels by image, or a dict of named columns, each one of both."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and content and all(isinstance(v, (list, dict)) for v in content.values()):
        return {name: _json_column(column) for name, column in content.items()}
    return {"": _json_column(content)}


def _json_column(content: Any) -> np.ndarray:
    if isinstance(content, dict):
        if not all(key.isdecimal() for key in content):
            raise ValueError("its keys are no image numbers")
        order = {int(key): value for key, value in content.items()}
        if sorted(order) != list(range(len(content))):
            raise ValueError(f"its keys are no permutation of 0..{len(content) - 1}")
        content = [order[i] for i in range(len(order))]
    if not isinstance(content, list):
        raise ValueError("not a list of integers")
    flat = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in content]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in flat):
        raise ValueError("not a list of integers")
    if any(abs(v) >= 2**63 for v in flat):
        raise ValueError("holds a number too large for a label")
    return np.array(flat, dtype=np.float64 if any(isinstance(v, float) for v in flat) else np.int64)


def _read_text(path: Path) -> Table:
    """A table with or without a heading; without one it has one column."""
    text = path.read_text(encoding="utf-8-sig")
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = _delimiter(first)
    rows = [
        [field.strip() for field in row]
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        if row
    ]
    if not rows:
        return {"": np.array([], dtype=np.int64)}
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("its lines differ in length")
    if all(_is_number(field) for field in rows[0]):
        names = [""]
        if len(rows[0]) > 1:
            raise ValueError("several columns and no heading that names them")
    else:
        names = rows.pop(0)
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("two of its columns have the same name")
    return {name: np.array([row[i] for row in rows], dtype=str) for i, name in enumerate(names)}


def _delimiter(line: str) -> str:
    return max(DELIMITERS, key=line.count)  # the first one where there is none


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
