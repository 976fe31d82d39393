"""Flags that choose data and label noise, for several scripts. No torch here: `--help` needs none."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.noise import POSTERIOR_TYPES
from common.runs import cli

# names of data sets on the command line
FOLDER = "folder"
CLOTHING1M = "clothing1m"
MINI_IMAGENET = "mini_imagenet"
WEBVISION = "webvision"
CLOTHING1M_CLASSES = 14
# of --dataset folder
IMAGE_SIZE = 32
TEST_SPLIT = 0.2
# the help line of these noise types for a script's flag
POSTERIOR_HELP = (
    "margin1 to margin3: likelier at a small margin of a posterior (PMD, types I to III); hard: where the posterior of the true "
    "label is smallest"
)


def add_folder_flags(group: Any, without: Collection[str] = ()) -> None:
    """Add the flags of --dataset folder to an argument group. without: names of flags that the script has already."""
    size = {"type": cli.count, "default": IMAGE_SIZE}
    split = {"type": cli.fraction, "default": TEST_SPLIT}
    bad = {"choices": ["error", "skip"], "default": "error"}
    workers = {"type": cli.count_or_zero, "default": 4}
    flags: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("image_size", size, "pixels of both sides that its images are resized to, the aspect not kept"),
        (
            "test_split",
            split,
            "without a test part: fraction of the training images that is tested on instead; scripts for image files that "
            "validate take as many to validate on, without a validation part",
        ),
        ("on_bad_image", bad, "images that are missing or damaged: stop, or leave them out"),
        ("workers", workers, "processes that decode its images, once"),
    )
    for name, options, what in flags:
        if name not in without:
            group.add_argument(f"--{name}", **options, help=f"of {FOLDER}: {what}")


def add_dataset_flag(group: Any, name: str) -> None:
    """Add --dataset to a script for the image files of one data set, of this name, and --test_split."""
    what = f"the data set, or {FOLDER}: the images in DIR, which are read from their files in every epoch"
    group.add_argument("--dataset", choices=[name, FOLDER], default=name, help=what)
    add_folder_flags(group, without=("image_size", "on_bad_image", "workers"))


def noise_of_files(args: Namespace) -> str:
    """The noise type in a result row of a script with `add_dataset_flag`."""
    if args.noise_file:
        return Path(args.noise_file).name
    return "given" if args.dataset == FOLDER else "real"


def add_posterior_flag(group: Any) -> None:
    """Add --posterior to an argument group."""
    group.add_argument(
        "--posterior",
        metavar="FILE",
        type=cli.place,
        help=f"for {', '.join(POSTERIOR_TYPES)}: class probabilities [N, K] of all training images (.npy); by default those of "
        "a logistic regression on pixels, kept beside the data. On colour images that is a poor posterior: better give a file",
    )


def check_posterior_flag(parser: cli.Parser, args: Namespace, noise_type: str, flag: str) -> None:
    """Refuse --posterior if the noise type does not use it. noise_type: "given" with --noise_file."""
    if args.posterior and noise_type not in POSTERIOR_TYPES:
        parser.error(f"argument --posterior: is for {flag} {', '.join(POSTERIOR_TYPES)}, got {noise_type}")
