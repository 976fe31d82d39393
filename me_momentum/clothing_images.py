"""The images of Clothing.py: noisy training images, validation and test images of Clothing1M, or of a folder."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import datasets
from common.datasets import FileData, FileSplit, folder
from common.datasets.clothing1m import folder_of_lists
from common.datasets.file_lists import missing_files, without_bad_images
from common.datasets.image_cache import ImageCache, open_caches
from common.gpu import processes
from common.gpu.augment import resize_crop_and_flip, resize_to_square
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled
from common.runs.cli import UserError
from me_momentum.choices import INDEX
from me_momentum.ClothingData import LISTS, read_index


class Data(NamedTuple):
    """What a run trains and tests on."""

    index: np.ndarray  # int64 [N]: positions of the training images in the official list, ascending
    observed: np.ndarray  # int64 [N]: their noisy labels
    split: FileSplit  # the same images in the order of training
    cache: ImageCache | None  # of `split`
    labels: Tensor  # noisy labels of `split`, int [N], on the CPU
    validation: Labelled
    test: Labelled  # all test images, or those of --limit_test
    skipped: tuple[tuple[str, int, str], ...]  # images left out: path, position in its list, reason
    generator: torch.Generator  # orders, crops and flips the training images
    batches: Callable  # (split, cache, transform, **training) -> FileBatches
    whole_test: Labelled | None = None  # all test images
    order: np.ndarray | None = None  # int64 [N]: where the images of `split` stand in `index`
    classes: tuple[str, ...] = ()  # names
    clean: np.ndarray | None = None  # int64 [N]: true labels of `index`, where a folder has them

    def training(self, positions: Tensor, args: Namespace) -> FileBatches:
        """Augmented batches of the training images at `positions`, in a new order at every pass."""
        transform = resize_crop_and_flip(args.image_size)
        training = {"shuffle": True, "drop_last": drops_last(args), "generator": self.generator}
        return self.batches(*self._only(positions), transform, **training)

    def plain(self, positions: Tensor, args: Namespace) -> FileBatches:
        """The training images at `positions` in order, resized as for the test."""
        return self.batches(*self._only(positions), resize_to_square(args.image_size))

    def _only(self, positions: Tensor) -> tuple[FileSplit, ImageCache | None]:
        keep = positions.numpy()
        return self.split.only(keep), None if self.cache is None else self.cache.only(keep)


def load(args: Namespace, device: Device) -> Data:
    """The noisy training list, the clean validation list and the clean test list (README, section 8).

    The training list is shuffled once, as in the release, before any other random number. Sets --num_classes to that of a
    folder. UserError: data or flags do not fit.
    """
    files = processes.from_first(lambda: _load_files(args))
    args.num_classes = files.num_classes
    kept = datasets.kept_images(args, np.arange(len(files.positions)), files.positions)
    order = shuffled(len(kept), args.seed)
    caches = open_caches(args.image_cache, files) if args.image_cache else {}
    loading = {"mean": files.mean, "std": files.std, "device": device.device, "workers": args.workers}
    loading |= {"rank": processes.rank(), "world": processes.world(), "decoded_on": args.decode}

    def batches(split: FileSplit, cache: ImageCache | None, transform: Callable, **training) -> FileBatches:
        return FileBatches(split, args.batch_size, transform, cache=cache, **loading, **training)

    def in_order(split: FileSplit, keep: np.ndarray | slice = slice(None)) -> Labelled:
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        plain = batches(split, cache, resize_to_square(args.image_size))
        return Labelled(plain, torch.from_numpy(split.labels).to(device.device))

    train = files.train.only(kept[order])
    return Data(
        files.positions[kept],
        files.train.labels[kept],
        train,
        caches["train"].only(kept[order]) if caches else None,
        torch.from_numpy(train.labels),
        in_order(files.validation),
        in_order(files.test, datasets.limited_test(files.test.labels, args.limit_test, args.seed)),
        files.skipped,
        torch.Generator().manual_seed(args.seed),
        batches,
        in_order(files.test),
        order,
        files.classes,
        None if files.true_labels is None else files.true_labels[kept],
    )


def _load_files(args: Namespace) -> FileData:
    if args.batch_size % processes.world():
        raise UserError(
            f"--batch_size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    root = Path(args.data_root)
    if args.dataset == folder.NAME:
        data = folder.load_folder_files(
            root, args.test_split, args.on_bad_image, args.workers, validates=True
        )
    elif missing_files(folder_of_lists(root, LISTS), LISTS) and (root / INDEX).is_file():
        data = without_bad_images(read_index(root), root, args.on_bad_image, args.workers)
    else:
        data = datasets.load_clothing1m(root, "noisy", args.on_bad_image, args.workers)
    data = datasets.relabelled(data, args.noise_file)
    count = len(datasets.kept_images(args, np.arange(len(data.positions)), data.positions))
    if count < smallest_set(args):
        raise UserError(
            f"--batch_size {args.batch_size}: there are only {count} training images, and a partial batch is dropped; "
            "use a smaller batch"
        )
    return data


def shuffled(count: int, seed: int) -> np.ndarray:
    """Positions 0 .. count - 1 in the order in which the release keeps its training list."""
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return order


def drops_last(args: Namespace) -> bool:
    """Whether a smaller last batch of training images is dropped: several processes cannot cut it into equal pieces."""
    return args.fidelity != "released" or processes.world() > 1


def smallest_set(args: Namespace) -> int:
    """The fewest images that can be trained on."""
    return args.batch_size if drops_last(args) else 1
