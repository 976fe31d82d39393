"""The batches of a run: small data sets from memory, Food-101N and Clothing1M from files (README, section 2)."""

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from afm.choices import IMAGE_SIZE, reads_files
from common import datasets
from common.datasets import FileData, FileSplit, folder
from common.datasets.image_cache import open_caches
from common.datasets.posterior import posterior_for
from common.gpu import processes
from common.gpu.augment import random_resized_crop_and_flip, resize_and_center_crop, training_augmentation
from common.gpu.device import Device
from common.gpu.loader import Batches, FileBatches, Images, Labelled, test_batches
from common.runs.cli import UserError

FOLDERS = {"food": "./data/food", "clothing1m": "./data/clothing1m"}
SAMPLED = 20_000  # training images at most whose attention is measured at the end of a run


class Data(NamedTuple):
    """What a run trains and tests on."""

    name: str
    num_classes: int
    image_size: int
    channels: int
    index: np.ndarray  # int64 [N]: positions of the training images in the data set
    clean: np.ndarray | None  # int64 [N]: true labels; None if unknown
    observed: np.ndarray  # int64 [N]
    known: np.ndarray  # int8 [N]: 1 for a right label, 0 for a wrong one, -1 for unknown
    train: Labelled  # shuffled, augmented, the last partial batch dropped
    test: Labelled  # all test images, or those of --limit_test
    whole_test: Labelled  # all test images
    validation: Labelled | None = None
    clean_train: Labelled | None = None  # Clothing1M's clean training images, as `train`
    sampled: np.ndarray | None = None  # int64 [S]: the training images whose attention is measured
    sampled_batches: Iterable = ()  # those images in order, without augmentation, numbered 0 .. S - 1
    plain: Iterable = ()  # all training images in order, without augmentation
    skipped: tuple[tuple[str, int, str], ...] = ()  # images left out: path, position in its list, reason
    files: FileSplit | None = None  # the training images, if they are in files
    paths: tuple[str, ...] = ()  # of the data set's training images, for data in memory from files
    classes: tuple[str, ...] = ()  # names


def load(args: Namespace, device: Device, loader: Generator) -> Data:
    """The data that the flags ask for; `loader` gives the order and the augmentation. UserError: data or flags do not fit."""
    if args.train_batch % processes.world():
        raise UserError(
            f"--train-batch {args.train_batch}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    data = (from_files if reads_files(args) else from_memory)(args, device, loader)
    if len(data.observed) < args.train_batch:
        raise UserError(
            f"--train-batch {args.train_batch}: there are only {len(data.observed)} training images, and a partial "
            "batch is dropped; use a smaller batch"
        )
    return data


def from_memory(args: Namespace, device: Device, loader: Generator) -> Data:
    """Digits, MNIST, CIFAR, an .npz or a folder; label noise is drawn before any image is touched."""
    data = datasets.from_arguments(vars(args))
    index = datasets.kept_images(args, np.arange(len(data.train.labels)))
    clean = data.true_labels(index, args.noise_type)
    posterior = posterior_for(args.noise_type, data, args.data_root or "./data", args.posterior)
    observed = datasets.observed_labels(
        data,
        index,
        args.noise_type,
        args.noise_rate,
        args.seed,
        args.noise_file,
        flag="--noise-type",
        posterior=posterior,
    )

    size, channels = data.train.images.shape[2:]
    shared: dict[str, Any] = {"rank": processes.rank(), "world": processes.world()}
    images = Images(data.train.images[index], data.mean, data.std, device.device)
    training = {"shuffle": True, "drop_last": True, "generator": loader, **shared}
    train = Batches(images, args.train_batch, augmentation=training_augmentation(data.name, size), **training)
    tests = test_batches(data, args.limit_test, args.seed, args.test_batch, device.device, **shared)
    plain = Batches(images, args.test_batch, **shared)
    return Data(
        data.name,
        data.num_classes,
        size,
        channels,
        index,
        clean,
        observed,
        np.full(len(index), -1, dtype=np.int8) if clean is None else (clean == observed).astype(np.int8),
        Labelled(train, _on(device, observed)),
        *tests,
        sampled=np.arange(len(index)),
        sampled_batches=plain,
        plain=plain,
        paths=data.paths,
        classes=data.classes,
        skipped=data.skipped,
    )


def from_files(args: Namespace, device: Device, loader: Generator) -> Data:
    """Food-101N with Food-101's test images, Clothing1M in one of its settings, or a folder; with the labels they come with."""
    data = processes.from_first(lambda: _load_files(args))
    listed, data = data.train.labels, datasets.relabelled(data, args.noise_file)
    verified = np.where(data.train.labels == listed, data.verified, -1).astype(np.int8)
    if data.true_labels is not None:
        verified = (data.train.labels == data.true_labels).astype(np.int8)
    data = data._replace(verified=verified)
    kept = datasets.kept_images(args, np.arange(len(data.positions)), data.positions)
    sampled = sampled_positions(data.verified[kept], args.seed)
    caches = open_caches(args.image_cache, data) if args.image_cache else {}
    loading = {"mean": data.mean, "std": data.std, "device": device.device, "workers": args.workers}
    loading |= {"rank": processes.rank(), "world": processes.world(), "decoded_on": args.decode}
    training = {"shuffle": True, "drop_last": True, "generator": loader, **loading}

    crop, plain = random_resized_crop_and_flip(IMAGE_SIZE), resize_and_center_crop(size=IMAGE_SIZE)

    def for_training(split: FileSplit, keep: np.ndarray) -> Labelled:
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        batches = FileBatches(split, args.train_batch, crop, cache=cache, **training)
        return Labelled(batches, _on(device, split.labels))

    def in_order(split: FileSplit, keep: np.ndarray | slice = slice(None)) -> Labelled:
        cache, split = caches[split.part].only(keep) if caches else None, split.only(keep)
        return Labelled(
            FileBatches(split, args.test_batch, plain, cache=cache, **loading), _on(device, split.labels)
        )

    clean_train = None
    if data.clean_train is not None:
        clean = datasets.limited(np.arange(len(data.clean_train.labels)), args.limit_train, args.seed)
        clean_train = for_training(data.clean_train, clean)
    return Data(
        data.name,
        data.num_classes,
        IMAGE_SIZE,
        3,
        data.positions[kept],
        None if data.true_labels is None else data.true_labels[kept],
        data.train.labels[kept],
        data.verified[kept],
        for_training(data.train, kept),
        in_order(data.test, datasets.limited_test(data.test.labels, args.limit_test, args.seed)),
        in_order(data.test),
        in_order(data.validation) if data.validation is not None else None,
        clean_train,
        sampled,
        in_order(data.train, kept[sampled]).batches,
        in_order(data.train, kept).batches,
        data.skipped,
        data.train.only(kept),
        classes=data.classes,
    )


def _load_files(args: Namespace) -> FileData:
    if args.dataset == folder.NAME:
        root = args.data_root or "./data"
        return folder.load_folder_files(root, args.test_split, args.on_bad_image, args.workers)
    root = Path(args.data_root or FOLDERS[args.dataset])
    if (root / args.dataset).is_dir():
        root = root / args.dataset  # ./data serves as well as ./data/food
    name = datasets.ALIASES.get(args.dataset, args.dataset)
    return datasets.load_files(name, root, args.train_on, args.on_bad_image, args.workers)


def images_at(args: Namespace, positions: np.ndarray) -> list[np.ndarray]:
    """The training images at these positions of the data set, to be shown: uint8 [H, W, 1 or 3] each."""
    if not reads_files(args):
        return list(datasets.from_arguments(vars(args)).train.images[positions])
    data = _load_files(args)
    place = {position: i for i, position in enumerate(data.positions.tolist())}
    plain = resize_and_center_crop(size=IMAGE_SIZE)
    return [
        plain(data.train.read(place[position])).permute(1, 2, 0).numpy() for position in positions.tolist()
    ]


def sampled_positions(known: np.ndarray, seed: int) -> np.ndarray:
    """At most SAMPLED positions, ascending: those with a known true label first, then any."""
    order = np.random.RandomState(seed).permutation(len(known))
    return np.sort(order[np.argsort(known[order] < 0, kind="stable")][:SAMPLED])


def _on(device: Device, labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels).to(device.device)
