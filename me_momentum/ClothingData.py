"""The index of Clothing1M: its lists of keys and labels in one file, Clothing1m-data.npz, that Clothing.py can read.

    python me_momentum/ClothingData.py                                  # below data/Clothing1M_Official/

Clothing.py reads the lists themselves where they are there, so that the index is needed only without them.
"""

import io
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.datasets.arrays import is_integer, read_npz
from common.datasets.clothing1m import (
    CLASSES,
    CLEAN_LABELS,
    NAME,
    NOISY_LABELS,
    NOISY_TRAIN,
    SOURCE,
    TEST,
    VALIDATION,
    folder_of_lists,
    key_lines,
    located,
)
from common.datasets.file_lists import FileData, make_split, numbered, read_list, require
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import cannot_write, write_atomic
from me_momentum.choices import DATA_ROOT, INDEX

# of each part of the index: the list of its keys, and the file of their labels
PARTS = {
    "train": (NOISY_TRAIN, NOISY_LABELS),
    "clean_val": (VALIDATION, CLEAN_LABELS),
    "test": (TEST, CLEAN_LABELS),
}
LISTS = (NOISY_TRAIN, VALIDATION, TEST, NOISY_LABELS, CLEAN_LABELS)


def read_labels(lines: Iterable[str]) -> tuple[dict[str, int], int]:
    """Labels by key from lines of a key, a blank and a label; and how many lines of more or fewer words were ignored.

    ValueError: a label that is not the number of a class.
    """
    labels, ignored = {}, 0
    for number, line in numbered(lines):
        words = line.split(" ")
        if len(words) != 2:
            ignored += 1
            continue
        key, label = words
        if not label.isdecimal() or int(label) >= len(CLASSES):
            raise ValueError(f"line {number}: {label!r} is not a label 0..{len(CLASSES) - 1}")
        labels[key] = int(label)
    return labels, ignored


def index_part(keys: Iterable[str], labels: dict[str, int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys, unicode [N], in their order, their labels, int64 [N], and how many keys without a label were left out.

    The release leaves such a key among the keys, and every label after it belongs to the key before.
    """
    keys = list(keys)
    kept = [key for key in keys if key in labels]
    return np.array(kept, dtype=str), np.array([labels[key] for key in kept], np.int64), len(keys) - len(kept)


def build(root: Path) -> dict[str, np.ndarray]:
    """The arrays of the index, <part>_data and <part>_labels; a line is printed for each part and each thing left out.

    root: the lists are in it or in its annotations/. UserError: a list is missing, cannot be understood, or names no image
    that has a label.
    """
    folder = folder_of_lists(root, LISTS)
    require(NAME, root, folder, LISTS, SOURCE)
    labels = {}
    for file in (NOISY_LABELS, CLEAN_LABELS):
        labels[file], ignored = read_list(folder / file, read_labels)
        if ignored:
            print(
                f"note: {folder / file}: {ignored} lines that are not a key, a blank and a label are ignored"
            )
    arrays = {}
    for part, (key_file, label_file) in PARTS.items():
        keys, of_keys, dropped = index_part(read_list(folder / key_file, key_lines), labels[label_file])
        if dropped:
            print(f"note: {folder / key_file}: {dropped} keys have no label in {label_file} and are left out")
        if not len(keys):
            raise UserError(f"{folder / key_file}: no key has a label in {label_file}")
        print(f"{part}: {len(keys)} images")
        arrays |= {f"{part}_data": keys, f"{part}_labels": of_keys}
    return arrays


def read_index(root: Path) -> FileData:
    """What the index in root names, whether it is there or not. UserError: the index is damaged, or of another kind."""
    path, splits = root / INDEX, []
    try:
        arrays = read_npz(path)
        for part, name in zip(PARTS, ("train", "validation", "test"), strict=True):
            keys, labels = arrays[f"{part}_data"], arrays[f"{part}_labels"]
            fits = (
                keys.dtype.kind == "U"
                and is_integer(labels)
                and keys.ndim == 1
                and keys.shape == labels.shape
            )
            if not fits or not len(keys) or labels.min() < 0 or labels.max() >= len(CLASSES):
                raise ValueError(f"{part}_data and {part}_labels are not keys and their labels")
            splits.append(make_split(root, located(root, keys.tolist()), labels, name))
    except KeyError as error:
        raise UserError(
            f"{path}: no {error.args[0]} in it: remove it and run ClothingData.py again"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and run ClothingData.py again") from None
    train, validation, test = splits
    count = len(train.labels)
    unverified = np.full(count, -1, dtype=np.int8)
    return FileData(
        NAME, train, test, len(CLASSES), CLASSES, np.arange(count), count, unverified, validation=validation
    )


def main(argv=None) -> None:
    """Write the index beside the lists."""
    parser = cli.Parser(prog="ClothingData.py", description=__doc__)
    parser.add_argument(
        "--data_root", default=DATA_ROOT, metavar="DIR", help="the lists are in it or in its annotations/"
    )
    root = Path(parser.parse_args(argv).data_root)
    content, arrays = io.BytesIO(), build(root)
    np.savez(content, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
    try:
        write_atomic(root / INDEX, content.getvalue())
    except OSError as error:
        raise UserError(cannot_write(root / INDEX, error, "make it writable")) from None
    print(f"written to {root / INDEX}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
