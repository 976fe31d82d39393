"""SimCLR pre-training of the encoder of SANM's base C2D, without labels; also on the embedded digits.

    python sanm/pretrain.py --preset embedded/digits/simclr      # seconds on a laptop, no data needed
    python sanm/pretrain.py --dataset cifar10                    # CIFAR-10 under ./data

The encoder is in encoder.safetensors of the run directory. Neither the paper nor the release has this script: the recipe is the
one that SupContrast documents for SimCLR (see common/pretraining/simclr.py).
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from sanm import flags

make_parser = partial(flags.pretrain_parser, __doc__)
cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch

from common import datasets
from common.datasets import Data
from common.gpu import device as gpu
from common.gpu.loader import Images
from common.pretraining.simclr import pre_train
from common.runs.cli import UserError
from common.runs.run import Run
from sanm.networks import make_simclr

# SupContrast's constants; those of the other scripts, which are the release's, end at the third digit
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    return flags.pretrain_args(argv, __doc__)


def normalisation(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that images are normalised with (README, section 10)."""
    return CIFAR100 if data.name == "cifar100" and len(data.mean) == 3 else (data.mean, data.std)


@cli.script
def main(argv=None) -> None:
    """Pre-train an encoder and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpuid, fidelity=args.fidelity)
    data = datasets.from_arguments(vars(args))
    index = datasets.limited(np.arange(len(data.train.labels)), args.limit_train, args.seed)
    if args.drop_last and len(index) < args.batch_size:
        raise UserError(f"--drop_last: a batch of {args.batch_size} is more than all {len(index)} images")
    clean = data.train.labels[index]
    name, cell = flags.pretrain_directory(args), flags.pretrain_cell(args, data.name)
    run = Run(args, device, paper="sanm", method="SimCLR", name=name, cell=cell)
    # the true ones, if they are known: kNN alone uses them
    run.save_labels(index, data.true_labels(index, "given"), clean, data.num_classes)
    run.save_skipped(data.skipped)

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


if __name__ == "__main__":
    cli.exit_cleanly(main)
