"""SimCLR pre-training of the encoder that SANM's C2D base begins from, without labels; also on the embedded digits.

    python sanm/pretrain.py --preset embedded/digits/simclr      # seconds on a laptop, no data needed
    python sanm/pretrain.py --dataset cifar10                    # CIFAR-10 under ./data

The encoder is in encoder.safetensors of the run directory. Neither the paper nor the release has this script: the recipe is the
one that SupContrast documents for SimCLR (see common/pretraining/simclr.py). The sections in brackets are those of the method's
description in sanm/README.md.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets
from common.datasets import Data
from common.gpu import device as gpu
from common.gpu.loader import Images
from common.pretraining.simclr import add_recipe_flags, pre_train, settle
from common.runs import cli
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from sanm.networks import make_simclr

PRESETS = Path(__file__).with_name("presets.toml")
# SupContrast's constants; those of the other scripts, which are the release's, end at the third digit
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def make_parser() -> cli.Parser:
    """The recipe's settings under SupContrast's names, and the flags all scripts share."""
    parser = cli.Parser(
        prog="pretrain.py",
        description=__doc__,
        epilog="There is no released code of this step: --fidelity released changes the precision alone. No label is used "
        "in training, so there is no label noise to choose and --noise_file is refused.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, or NAME for DATA_PATH/NAME.npz",
    )
    data.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="where the data sets are"
    )

    training = add_recipe_flags(parser)
    training.add_argument(
        "--model",
        choices=["resnet18"],
        default="resnet18",
        help="ResNet-18 for small images; its narrow form on images below 16 pixels",
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    if args.noise_file:
        parser.error(f"argument --noise_file: no label is used in pre-training, got {args.noise_file}")
    settle(args)
    return args


def normalisation(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that images are normalised with [section 10]."""
    return CIFAR100 if data.name == "cifar100" and len(data.mean) == 3 else (data.mean, data.std)


@cli.script
def main(argv=None) -> None:
    """Pre-train an encoder and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpuid, fidelity=args.fidelity)
    data = datasets.load(args.dataset, args.data_path)
    index = datasets.limited(np.arange(len(data.train.labels)), args.limit_train, args.seed)
    if args.drop_last and len(index) < args.batch_size:
        raise UserError(f"--drop_last: a batch of {args.batch_size} is more than all {len(index)} images")
    clean = data.train.labels[index]
    run = Run(
        args,
        device,
        paper="sanm",
        method="SimCLR",
        name=directory_name(args),
        cell=cell(args, data),
    )
    run.save_labels(index, clean, clean, data.num_classes)  # the true ones: kNN alone looks at them

    train = Images(data.train.images[index], *normalisation(data), device.device)
    test = Images(data.test.images, *normalisation(data), device.device)
    labels, test_labels = (torch.from_numpy(of).to(device.device) for of in (clean, data.test.labels))
    size, channels = data.train.images.shape[2:]
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = device.prepare(make_simclr(channels, size), args.compile)
    flip = args.dataset not in ("digits", "mnist")  # a mirrored digit is another sign or none
    tested = datasets.limited_test(data.test.labels, args.limit_test, args.seed)
    images, classes = (train, test, labels, test_labels), data.num_classes
    pre_train(run, args, device, network, *images, classes, flip=flip, tested=tested)


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, epochs and seed, then whatever differs from the defaults."""
    defaults = vars(parse_args(["--dataset", args.dataset, "--batch_size", str(args.batch_size)]))
    defaults |= {"batch_size": 1024, "num_epochs": args.num_epochs}
    return "pretrain-" + run_name(args, defaults, ("dataset", "epochs", "seed"))


def cell(args: Namespace, data: Data) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    profile = "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 1000 else "short"
    return {
        "dataset": data.name,
        "noise_type": "none",
        "noise_rate": None,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": profile,
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
