"""What the scripts train and test on: images with given labels, some of them OOD, and a test set (README, section 2)."""

import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import datasets
from common.datasets import FileSplit
from common.datasets.open_set import Corruption, corrupt
from common.datasets.posterior import posterior_for
from common.gpu import processes
from common.runs.cli import UserError
from common.runs.run import Run
from manifold_dividemix.flags import drawn_noise


class Dataset(NamedTuple):
    """A training set with its observed labels, and a test set. clean and ood are None if the true labels are unknown."""

    name: str
    index: np.ndarray  # int64 [N]: positions of the training images in their data set
    images: np.ndarray  # uint8 [N, H, W, C]
    observed: np.ndarray  # int64 [N]
    clean: np.ndarray | None  # int64 [N]; of an OOD image, the label of the image that it replaced
    ood: np.ndarray | None  # bool [N]: out of distribution
    test_images: np.ndarray  # uint8 [M, H, W, C]
    test_labels: np.ndarray  # int64 [M]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: dict  # tells these images from others of the same name
    tested: np.ndarray | slice = slice(None)  # positions of the test images of every epoch: --limit_test
    files: FileSplit | None = None  # the training images, if they come from files
    paths: tuple[str, ...] = ()  # of the data set's training images, for data in memory from files
    classes: tuple[str, ...] = ()  # names
    # a folder's images left out: path, position in its list, reason
    skipped: tuple[tuple[str, int, str], ...] = ()

    def true_labels(self) -> np.ndarray | None:
        """int64 [N], -1 for OOD images; None if they are unknown."""
        return None if self.clean is None else np.where(self.ood, -1, self.clean)


def load_open_set(args: Namespace) -> Dataset:
    """A data set in memory, corrupted (README, section 2.1). UserError: data or pool are missing, rates do not fit."""
    root = Path(args.data_path)
    if drawn_noise(args) not in ("no", "given") and args.noise_ratio + args.ood_ratio > 1 + 1e-9:
        raise UserError(
            f"--noise-ratio {args.noise_ratio} and --ood-ratio {args.ood_ratio} are shares of all images: "
            "together at most 1"
        )
    data = datasets.from_arguments(vars(args))
    posterior = posterior_for(drawn_noise(args), data, root, args.posterior)
    corruption = Corruption(
        args.corruption, args.ood_ratio, args.noise_type, args.noise_ratio, args.noise_seed, args.label_rng
    )
    pool_folder = Path(args.ood_dir) if args.ood_dir else None
    cache = _folder(args.open_set_cache, root / "open_set")
    # of several processes the first reads the pool, the others its cache
    corrupted = processes.first_alone(
        lambda: corrupt(data, corruption, root, pool_folder, cache, args.noise_file, posterior)
    )
    index = datasets.kept_images(args, np.arange(len(corrupted.observed)))
    clean = data.true_labels(index, drawn_noise(args))
    return Dataset(
        name=data.name,
        index=index,
        images=corrupted.images[index],
        observed=corrupted.observed[index],
        clean=clean,
        ood=None if clean is None and not args.ood_ratio else corrupted.ood[index],
        test_images=data.test.images,
        test_labels=data.test.labels,
        num_classes=data.num_classes,
        mean=data.mean,
        std=data.std,
        origin={"replaced": int(corrupted.ood.sum()), "sha256": corrupted.sha256},
        skipped=data.skipped,
        tested=datasets.limited_test(data.test.labels, args.limit_test, args.seed),
        paths=data.paths,
        classes=data.classes,
    )


def load_mini_imagenet(args: Namespace) -> Dataset:
    """mini-ImageNet with controlled web noise (README, section 2.2), decoded at --img-size.

    UserError: files that are missing or damaged.
    """
    root = Path(args.data_path)
    if not (root / "split").is_dir() and (root / "mini-imagenet").is_dir():
        root = root / "mini-imagenet"
    files = processes.from_first(
        lambda: datasets.load_mini_imagenet(
            root, args.noise_type, args.noise_ratio, args.on_bad_image, args.workers
        )
    )
    observed = datasets.relabelled(files, args.noise_file).train.labels
    folder = _folder(args.decoded, root / "decoded")
    images, test_images = (
        datasets.decoded(split, args.img_size, args.workers, folder) for split in (files.train, files.test)
    )
    limited = datasets.kept_images(args, np.arange(len(observed)), files.positions)
    return Dataset(
        name=files.name,
        index=files.positions[limited],
        images=images[limited],
        observed=observed[limited],
        clean=None,
        ood=None,
        test_images=test_images,
        test_labels=files.test.labels,
        num_classes=files.num_classes,
        mean=files.mean,
        std=files.std,
        origin={"skipped": len(files.skipped), "sha256": files.train.sha256()},
        skipped=files.skipped,
        tested=datasets.limited_test(files.test.labels, args.limit_test, args.seed),
        files=files.train.only(limited),
        classes=files.classes,
    )


def _folder(given: str | None, default: Path) -> Path | None:
    return None if given == "none" else Path(given) if given else default


def save(dataset: Dataset, run: Run) -> None:
    """Write the labels and the origin of the images to the run directory. UserError: the run began with others."""
    run.save_labels(dataset.index, dataset.clean, dataset.observed, dataset.num_classes)
    run.save_skipped(dataset.skipped)
    processes.from_first(lambda: _save_origin(dataset, run))


def _save_origin(dataset: Dataset, run: Run) -> None:
    path = run.folder / "images.json"
    if path.exists() and json.loads(path.read_text()) != dataset.origin:
        raise UserError(
            f"{run.folder} began with other images: the pool or the list changed since; choose another --out"
        )
    run.save_file(path.name, (json.dumps(dataset.origin, indent=2) + "\n").encode())
    truth = {} if dataset.clean is None else {"clean": dataset.clean, "ood": dataset.ood}
    run.save_arrays("samples", observed=dataset.observed, **truth)
