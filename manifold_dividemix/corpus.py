"""What the scripts train on: images of which some are from elsewhere, with observed labels, and a clean test set (Sec. 2)."""

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import datasets
from common.datasets.open_set import Corruption, corrupt
from common.datasets.posterior import add_flag, check_flag, posterior_for
from common.gpu import processes
from common.runs import cli
from common.runs.cli import UserError
from common.runs.run import Run


class Corpus(NamedTuple):
    """A training set with its observed labels, and a test set. clean and ood are None where nobody knows them."""

    name: str
    index: np.ndarray  # int64 [N]: where the training images stand in their data set
    images: np.ndarray  # uint8 [N, H, W, C]
    observed: np.ndarray  # int64 [N]
    clean: (
        np.ndarray | None
    )  # int64 [N]; of an image from elsewhere, the label of the one whose place it took
    ood: np.ndarray | None  # bool [N]: from elsewhere
    test_images: np.ndarray  # uint8 [M, H, W, C]
    test_labels: np.ndarray  # int64 [M]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: dict  # what tells these images from others of the same name
    tested: np.ndarray | slice = slice(None)  # positions of the test images of every epoch: --limit_test


def add_open_set_flags(parser: cli.Parser, datasets_help: str = "") -> None:
    """The flags of data in memory, their corruption included: the release's, and our own."""
    data = parser.add_argument_group("data and their corruption")
    data.add_argument(
        "--dataset",
        default="cifar100",
        help=f"cifar10, cifar100, digits, mnist, fashion_mnist, or NAME for DATA_PATH/NAME.npz{datasets_help}",
    )
    data.add_argument(
        "--data-dir",
        "--data_path",
        dest="data_path",
        default="./data",
        metavar="DIR",
        type=cli.place,
        help="where the data sets are; the folder of the CIFAR batches too, as in the release",
    )
    data.add_argument(
        "--corruption",
        metavar="POOL",
        help="where images from elsewhere come from: imagenet32, place365, photographs (scikit-learn's two), or any data set; "
        "by default imagenet32, and photographs on digits",
    )
    data.add_argument(
        "--ood-dir",
        metavar="DIR",
        type=cli.place,
        help="the files of that pool; by default DATA_PATH/imagenet32, DATA_PATH/places365 or DATA_PATH",
    )
    data.add_argument("--ood-ratio", type=cli.fraction, default=0.2, help="share of images from elsewhere")
    data.add_argument(
        "--open-set-cache",
        metavar="DIR|none",
        type=cli.place,
        help="where what was taken from files is kept; by default DATA_PATH/open_set",
    )
    data.add_argument("--num-class", type=cli.count, default=100, help="ignored: the data set decides")


def add_noise_flags(parser: cli.Parser, types: list[str], default: str | None, help_of_type: str) -> None:
    """The flags of label noise."""
    noise = parser.add_argument_group("label noise")
    noise.add_argument("--noise-type", choices=types, default=default, help=help_of_type)
    noise.add_argument("--noise-ratio", type=cli.fraction, default=0.2, help="its share of all images")
    if "sym" in types:
        add_flag(noise)
        noise.add_argument(
            "--noise-seed",
            type=cli.seed,
            default=0,
            help="of the labels; the images from elsewhere are the benchmark's, whatever the seeds",
        )
        noise.add_argument(
            "--label-rng",
            choices=["python", "numpy"],
            default="python",
            help="what draws symmetric labels: python, as released; numpy, as SNCF",
        )


def add_mini_imagenet_flags(parser: cli.Parser) -> argparse._ArgumentGroup:
    """The flags of images in files; returns their group."""
    files = parser.add_argument_group("image files of mini-ImageNet")
    files.add_argument(
        "--img-size",
        type=cli.count,
        default=32,
        help="pixels of both sides; the paper's is not known, 32 is what later work compares at",
    )
    files.add_argument(
        "--on_bad_image",
        choices=["error", "skip"],
        default="error",
        help="images that are missing or damaged: stop, or leave them out",
    )
    files.add_argument(
        "--decoded",
        metavar="DIR|none",
        type=cli.place,
        help="where the decoded images are kept; by default DATA_PATH/decoded",
    )
    return files


def settle_corruption(parser: cli.Parser, args: Namespace) -> None:
    """The default of --corruption that depends on the data set; whether --posterior is of use."""
    check_flag(parser, args, drawn_noise(args), "--noise-type")
    if args.corruption is None:
        args.corruption = "photographs" if args.dataset == "digits" else "imagenet32"


def drawn_noise(args: Namespace) -> str:
    """The noise type, "given" where a file has the labels."""
    return "given" if args.noise_file else args.noise_type


def load_open_set(args: Namespace) -> Corpus:
    """A data set in memory, corrupted (Sec. 2.1). UserError: data or pool that are not there, rates that do not fit."""
    root = Path(args.data_path)
    if drawn_noise(args) not in ("no", "given") and args.noise_ratio + args.ood_ratio > 1 + 1e-9:
        raise UserError(
            f"--noise-ratio {args.noise_ratio} and --ood-ratio {args.ood_ratio} are shares of all images: together at most 1"
        )
    data = datasets.load(args.dataset, root)
    posterior = posterior_for(drawn_noise(args), data, root, args.posterior)
    corruption = Corruption(
        args.corruption, args.ood_ratio, args.noise_type, args.noise_ratio, args.noise_seed, args.label_rng
    )
    pool_folder = Path(args.ood_dir) if args.ood_dir else None
    cache = _folder(args.open_set_cache, root / "open_set")
    # of several processes the first reads the pool, the others what it kept
    found = processes.first_alone(
        lambda: corrupt(data, corruption, root, pool_folder, cache, args.noise_file, posterior)
    )
    index = datasets.limited(np.arange(len(found.observed)), args.limit_train, args.seed)
    return Corpus(
        name=data.name,
        index=index,
        images=found.images[index],
        observed=found.observed[index],
        clean=data.train.labels[index],
        ood=found.ood[index],
        test_images=data.test.images,
        test_labels=data.test.labels,
        num_classes=data.num_classes,
        mean=data.mean,
        std=data.std,
        origin={"replaced": int(found.ood.sum()), "sha256": found.sha256},
        tested=datasets.limited_test(data.test.labels, args.limit_test, args.seed),
    )


def load_mini_imagenet(args: Namespace) -> Corpus:
    """mini-ImageNet with controlled noise from the web (Sec. 2.2), decoded at --img-size. UserError: files missing, damaged."""
    root = Path(args.data_path)
    if not (root / "split").is_dir() and (root / "mini-imagenet").is_dir():
        root = root / "mini-imagenet"
    files = processes.from_first(
        lambda: datasets.load_mini_imagenet(
            root, args.noise_type, args.noise_ratio, args.on_bad_image, args.workers
        )
    )
    observed = files.train.labels
    if args.noise_file:
        observed = datasets.labels_of(args.noise_file, files.positions, files.listed, files.num_classes)
    folder = _folder(args.decoded, root / "decoded")
    images, test_images = (
        datasets.decoded(split, args.img_size, args.workers, folder) for split in (files.train, files.test)
    )
    kept = datasets.limited(np.arange(len(observed)), args.limit_train, args.seed)
    return Corpus(
        name=files.name,
        index=files.positions[kept],
        images=images[kept],
        observed=observed[kept],
        clean=None,
        ood=None,
        test_images=test_images,
        test_labels=files.test.labels,
        num_classes=files.num_classes,
        mean=files.mean,
        std=files.std,
        origin={"skipped": len(files.skipped), "sha256": files.train.sha256()},
        tested=datasets.limited_test(files.test.labels, args.limit_test, args.seed),
    )


def _folder(given: str | None, usual: Path) -> Path | None:
    return None if given == "none" else Path(given) if given else usual


def keep(corpus: Corpus, run: Run) -> None:
    """Write down in the run directory what is trained on. UserError: the run began with other images or labels."""
    run.save_labels(corpus.index, corpus.clean, corpus.observed, corpus.num_classes)
    processes.from_first(lambda: _keep_origin(corpus, run))


def _keep_origin(corpus: Corpus, run: Run) -> None:
    path = run.folder / "images.json"
    if path.exists() and json.loads(path.read_text()) != corpus.origin:
        raise UserError(
            f"{run.folder} began with other images: the pool or the list changed since; choose another --out"
        )
    run.save_file(path.name, (json.dumps(corpus.origin, indent=2) + "\n").encode())
    known = {name: getattr(corpus, name) for name in ("clean", "ood") if getattr(corpus, name) is not None}
    run.save_arrays("samples", observed=corpus.observed, **known)
