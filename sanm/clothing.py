"""Clothing1M for SANM (README, section 9), or a folder: lists of images, their batches, class-balanced subsets."""

import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import datasets
from common.datasets import FileData, FileSplit, folder
from common.datasets.clothing1m import CLASSES, NAME, OFFICIAL, label_lines, located
from common.datasets.file_lists import make_split, missing_files, read_list, report, without_bad_images
from common.datasets.image_cache import ImageCache, open_caches
from common.gpu import processes
from common.gpu.augment import resize_and_center_crop, resize_random_crop_and_flip
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled
from common.runs.cli import UserError

MEAN, STD = (0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)
RELEASED_LISTS = {"train": "noisy_train.txt", "validation": "clean_val.txt", "test": "clean_test.txt"}


def read_lists(root: Path, on_bad_image: str, workers: int) -> FileData:
    """The noisy training list, the clean validation and test lists: the release's if they are there, else the official ones.

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


# batches --------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains and tests on."""

    index: np.ndarray  # int64 [N]: where the training images stand in the training list, ascending
    split: FileSplit  # the training images with their noisy labels
    cache: ImageCache | None  # of `split`
    validation: Labelled
    test: Labelled  # all test images, or those of --limit_test
    skipped: tuple[tuple[str, int, str], ...]  # images left out: path, position in its list, reason
    generator: torch.Generator  # orders, crops and flips the training images
    batches: Callable  # (split, cache, transform, batch_size, **training) -> FileBatches
    full_test: Labelled | None = None  # all test images
    classes: tuple[str, ...] = ()  # names
    clean: np.ndarray | None = None  # int64 [N]: true labels, where a folder has them

    def training(self, positions: np.ndarray, batch_size: int, views: int, args: Namespace) -> FileBatches:
        """Shuffled batches of augmented training images at `positions` [n]; their index counts from 0 to n - 1."""
        transform = resize_random_crop_and_flip(before_crop(args), args.image_size)
        options = {
            "shuffle": True,
            "drop_last": drops_last(args),
            "generator": self.generator,
            "views": views,
        }
        return self.batches(*self._only(positions), transform, batch_size, **options)

    def plain(self, positions: np.ndarray, args: Namespace) -> FileBatches:
        """The training images at `positions` [n] as the test has them, in order; their index counts from 0 to n - 1."""
        return self.batches(*self._only(positions), test_transform(args), test_batch_size(args))

    def _only(self, positions: np.ndarray) -> tuple[FileSplit, ImageCache | None]:
        return self.split.only(positions), None if self.cache is None else self.cache.only(positions)


def before_crop(args: Namespace) -> int:
    """Pixels of the shorter side that an image is resized to: 256 for a crop of 224."""
    return args.image_size * 8 // 7


def test_transform(args: Namespace) -> Callable:
    """Resize and centre crop."""
    return resize_and_center_crop(before_crop(args), args.image_size)


def test_batch_size(args: Namespace) -> int:
    """Of passes without gradients, where the size changes nothing."""
    return 8 * args.batch_size


def load(args: Namespace, device: Device) -> Data:
    """The noisy training, clean validation and clean test images (README, section 9). UserError: data or flags do not fit.

    Sets --num_class to that of a folder.
    """
    files = processes.from_first(lambda: _load_files(args))
    args.num_class = files.num_classes
    kept = datasets.kept_images(args, np.arange(len(files.positions)), files.positions)
    caches = open_caches(args.image_cache, files) if args.image_cache else {}
    loading = {"mean": files.mean, "std": files.std, "device": device.device, "workers": args.workers}
    loading |= {"rank": processes.rank(), "world": processes.world(), "decoded_on": args.decode}

    def batches(split: FileSplit, cache: ImageCache | None, transform, size: int, **training) -> FileBatches:
        return FileBatches(split, size, transform, cache=cache, **loading, **training)

    def in_order(split: FileSplit, keep: np.ndarray | slice = slice(None)) -> Labelled:
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        plain = batches(split, cache, test_transform(args), test_batch_size(args))
        return Labelled(plain, torch.from_numpy(split.labels).to(device.device))

    return Data(
        files.positions[kept],
        files.train.only(kept),
        caches["train"].only(kept) if caches else None,
        in_order(files.validation),
        in_order(files.test, datasets.limited_test(files.test.labels, args.limit_test, args.seed)),
        files.skipped,
        torch.Generator().manual_seed(args.seed),
        batches,
        in_order(files.test),
        files.classes,
        None if files.true_labels is None else files.true_labels[kept],
    )


def _load_files(args: Namespace) -> FileData:
    if args.batch_size % processes.world():
        raise UserError(
            f"--batch_size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    root, reading = Path(args.data_path), (args.on_bad_image, args.workers)
    if args.dataset == folder.NAME:
        data = folder.load_folder_files(root, args.test_split, *reading, validates=True)
    else:
        data = read_lists(root, *reading)._replace(mean=MEAN, std=STD)
    data = datasets.relabelled(data, args.noise_file)
    kept = datasets.kept_images(args, np.arange(len(data.positions)), data.positions)
    size = subset_size(data.train.labels[kept], args.num_batches * args.batch_size, data.num_classes)
    if size < 2 * args.batch_size:
        raise UserError(
            f"--batch_size {args.batch_size}: the class-balanced subset has only {size} images, and both sides of the split need "
            "a batch; use a smaller batch, more --num_batches or more images"
        )
    return data


def drops_last(args: Namespace) -> bool:
    """Whether a smaller last batch of training images is left out: it cannot be cut into equal pieces for processes."""
    return args.fidelity != "released" or processes.world() > 1
