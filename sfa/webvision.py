"""mini-WebVision or a folder as SFA trains and tests on it (README, section 7): images, long tail, batches by process."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from common import datasets, noise
from common.datasets import FileData, FileSplit, folder
from common.datasets.image_cache import ImageCache, open_caches
from common.gpu import processes
from common.gpu.augment import resize_and_center_crop, resize_random_resized_crop_and_flip
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled, Part
from common.runs.cli import UserError

CACHE_SIZES = (320, 256)


class Data(NamedTuple):
    """What a run trains and tests on."""

    index: np.ndarray  # int64 [N]: positions of the training images in the list of these classes, ascending
    split: FileSplit  # the training images with the labels of the search
    cache: ImageCache | None  # of `split`
    tests: dict[str, Labelled]  # test, and imagenet if it is there; all images, or those of --limit_test
    skipped: tuple[tuple[str, int, str], ...]  # images left out: path, position in its list, reason
    batches: Callable  # (split, cache, transform, batch_size, **training) -> FileBatches
    full_tests: dict[str, Labelled] | None = None  # all images
    classes: tuple[str, ...] = ()  # names
    clean: np.ndarray | None = None  # int64 [N]: true labels, where a folder has them

    def training(
        self, positions: np.ndarray, batch_size: int, views: int, generator: torch.Generator, args: Namespace
    ) -> Part | None:
        """Shuffled batches of augmented training images at `positions` [n], whose index counts within the training set.

        Fewer images than batch_size are one batch; None if there are fewer than processes.
        """
        world = processes.world()
        size = min(batch_size, len(positions) // world * world)
        if size == 0:
            return None
        split = self.split.only(positions)
        cache = None if self.cache is None else self.cache.only(positions)
        transform = resize_random_resized_crop_and_flip(before_crop(args), args.image_size)
        options = {"shuffle": True, "drop_last": drops_last(args), "generator": generator, "views": views}
        batches = self.batches(split, cache, transform, size, **options)
        return Part(batches, torch.from_numpy(positions).to(batches.device))

    def plain(self, args: Namespace) -> FileBatches:
        """All training images in order, with the transform of the test."""
        return self.batches(self.split, self.cache, test_transform(args), 8 * args.batch_size)


def drops_last(args: Namespace) -> bool:
    """Whether a smaller last batch of training images is left out: it cannot be cut into equal pieces for processes."""
    return args.fidelity != "released" or processes.world() > 1


def before_crop(args: Namespace) -> int:
    """Pixels of the shorter side that an image is resized to: 320 for a crop of 299."""
    return round(args.image_size * 320 / 299)


def test_transform(args: Namespace) -> Callable:
    """Resize and centre crop."""
    return resize_and_center_crop(before_crop(args), args.image_size)


def load(args: Namespace, device: Device) -> Data:
    """The training images of the first classes, and both test sets. UserError: data or flags do not fit.

    Sets --num_class to that of a folder.
    """
    files = processes.from_first(lambda: load_files(args))
    args.num_class = files.num_classes
    kept = kept_images(args, files)
    caches = open_caches(args.image_cache, files, CACHE_SIZES) if args.image_cache else {}
    loading = {"mean": files.mean, "std": files.std, "device": device.device, "workers": args.workers}
    loading["decoded_on"] = args.decode

    def batches(split: FileSplit, cache: ImageCache | None, transform, size: int, **training) -> FileBatches:
        world = processes.world()
        piece: dict[str, Any] = {"world": world, "rank": processes.rank() if world > 1 else 0}
        return FileBatches(split, size, transform, cache=cache, **loading, **piece, **training)

    def in_order(split: FileSplit, limit: int | None = None) -> Labelled:
        tested = datasets.limited_test(split.labels, limit, args.seed)
        cache, split = caches[split.part].only(tested) if caches else None, split.only(tested)
        ordered = batches(split, cache, test_transform(args), 8 * args.batch_size)
        return Labelled(ordered, torch.from_numpy(split.labels).to(device.device))

    splits = [split for split in (files.test, files.imagenet) if split is not None]
    return Data(
        index=files.positions[kept],
        split=files.train.only(kept),
        cache=caches["train"].only(kept) if caches else None,
        tests={split.part: in_order(split, args.limit_test) for split in splits},
        skipped=files.skipped,
        batches=batches,
        full_tests={split.part: in_order(split) for split in splits},
        classes=files.classes,
        clean=None if files.true_labels is None else files.true_labels[kept],
    )


def load_files(args: Namespace) -> FileData:
    """The lists of images, with the labels of --noise_file if it is given. UserError: data or flags do not fit."""
    if args.parallel == "data" and args.batch_size % processes.world():
        raise UserError(
            f"--batch_size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    reading = args.on_bad_image, args.workers
    if args.dataset == folder.NAME:
        data = folder.load_folder_files(args.data_path, args.test_split, *reading)
    else:
        data = datasets.load_webvision(args.data_path, args.num_class, *reading, args.imagenet)
    data = datasets.relabelled(data, args.noise_file)
    images = len(kept_images(args, data))
    if images < processes.planned():
        raise UserError(f"{images} training images are too few for {processes.planned()} processes")
    return data


def kept_images(args: Namespace, data: FileData) -> np.ndarray:
    """Positions of the images that are trained on, ascending; fewer than all in a long tail or by --limit_train."""
    kept = np.arange(len(data.positions))
    decisions = datasets.read_decisions(args.noise_file)
    if (
        args.imb_factor < 1 and decisions is not None
    ):  # it lists the long tail, drawn from labels before their correction
        kept = np.flatnonzero(np.isin(data.positions, decisions.images))
    elif args.imb_factor < 1:
        labels = data.train.labels
        counts = np.bincount(labels, minlength=data.num_classes)
        budget = noise.web_class_budget(counts, args.imb_type, args.imb_factor)
        kept = np.sort(noise.long_tailed(labels, budget, np.random.RandomState(args.seed)))
    return datasets.kept_images(args, kept, data.positions)
