"""Clothing1M as SANM reads it: both layouts of its lists, and the class-balanced subset of an epoch (README, section 9)."""

import random
from pathlib import Path

import numpy as np

from common import datasets
from common.datasets import FileData
from common.datasets.clothing1m import CLASSES, NAME, OFFICIAL, label_lines, located
from common.datasets.file_lists import make_split, missing_files, read_list, report, without_bad_images
from common.runs.cli import UserError

MEAN, STD = (0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)
RELEASED_LISTS = {"train": "noisy_train.txt", "validation": "clean_val.txt", "test": "clean_test.txt"}


def load(root: Path, on_bad_image: str, workers: int) -> FileData:
    """The noisy training list, the clean validation and test lists: the release's own where they are, else the official ones.

    The release's lists stand in root, with a path and a label in each line, paths relative to root. UserError as
    common.datasets.load_clothing1m.
    """
    if missing_files(root, RELEASED_LISTS.values()):
        return datasets.load_clothing1m(root, "noisy", on_bad_image, workers)
    splits = {}
    for part, file in RELEASED_LISTS.items():
        labels = read_list(root / file, label_lines, len(CLASSES))
        if not labels:
            raise UserError(f"{root / file}: no image in it")
        splits[part] = make_split(root, located(root, labels), list(labels.values()), part)
    count = len(splits["train"].labels)
    data = FileData(
        NAME,
        splits["train"],
        splits["test"],
        len(CLASSES),
        CLASSES,
        np.arange(count),
        count,
        np.full(count, -1, dtype=np.int8),
        validation=splits["validation"],
    )
    report(data, OFFICIAL)
    return without_bad_images(data, root, on_bad_image, workers)


def balanced_subset(labels: np.ndarray, num_samples: int, num_classes: int, rng: random.Random) -> np.ndarray:
    """Positions of a class-balanced subset in random order, int64 [n]; n < num_samples where classes are short of images.

    All positions are shuffled; walking them, one is taken while its class has fewer than num_samples / num_classes and all have
    fewer than num_samples; what was taken is shuffled once more.
    """
    order = list(range(len(labels)))
    rng.shuffle(order)
    counts, chosen, given = [0] * num_classes, [], labels.tolist()
    for i in order:
        if counts[given[i]] < num_samples / num_classes and len(chosen) < num_samples:
            counts[given[i]] += 1
            chosen.append(i)
    rng.shuffle(chosen)
    return np.array(chosen, dtype=np.int64)


def subset_size(labels: np.ndarray, num_samples: int, num_classes: int) -> int:
    """How many positions `balanced_subset` has, whatever is drawn."""
    quota = -(-num_samples // num_classes)
    return min(int(np.minimum(np.bincount(labels, minlength=num_classes), quota).sum()), num_samples)
