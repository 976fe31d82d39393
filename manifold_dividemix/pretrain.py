"""SimCLR pre-training of Manifold DivideMix's encoder on the corrupted images, without labels; also on the embedded digits.

    python manifold_dividemix/pretrain.py --preset embedded/digits/simclr      # a minute on a laptop, no data needed
    python manifold_dividemix/pretrain.py --corruption imagenet32              # CIFAR-100 and the pool under ./data
    python manifold_dividemix/pretrain.py --dataset mini_imagenet --noise-type red --data-dir DIR

The encoder is in encoder.safetensors of the run directory. The release has neither this script nor its recipe, and the
paper's could not be read: the recipe is ours, the one that SupContrast documents for SimCLR. The sections in brackets are
those of the method's description in manifold_dividemix/README.md.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.datasets.mini_imagenet import NAME as MINI_IMAGENET
from common.gpu import device as gpu
from common.gpu.loader import Images
from common.noise import POSTERIOR_TYPES
from common.pretraining import simclr
from common.pretraining.simclr import SimCLR
from common.runs import cli
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from manifold_dividemix import corpus as data
from manifold_dividemix.corpus import Corpus
from manifold_dividemix.networks import ARCH_HELP, ARCHS, make_encoder
from manifold_dividemix.outliers import knn_scores, outlier_auroc

PRESETS = Path(__file__).with_name("presets.toml")
DIMENSIONS = 128  # of the embeddings that the loss compares; the head is dropped afterwards


def make_parser() -> cli.Parser:
    """The recipe's settings, the flags of the data as train_semisup has them, and the flags all scripts share."""
    parser = cli.Parser(
        prog="pretrain.py",
        description=__doc__,
        epilog="There is no released code of this step: --fidelity released changes the precision alone. No label is used "
        "in training; the flags of label noise name the list of mini_imagenet, and let the rest of a command be that of "
        "train_semisup.",
    )
    data.add_open_set_flags(parser, f", or {MINI_IMAGENET}")
    data.add_noise_flags(
        parser,
        ["sym", "asym", "superclass", *POSTERIOR_TYPES, "no", "given", "red", "blue"],
        None,
        f"red, blue: which list of {MINI_IMAGENET} (by default red); else without effect",
    )
    data.add_mini_imagenet_flags(parser)
    training = simclr.add_recipe_flags(parser)
    training.add_argument("--arch", choices=list(ARCHS), default="resnet18", help=ARCH_HELP)
    training.add_argument("--gpu", type=cli.count_or_zero, default=0, help="which CUDA device")
    training.add_argument("--knn-k", type=cli.count, default=10, help="of the outlier score")
    training.add_argument(
        "--workers", type=cli.count_or_zero, default=8, help="processes that decode image files"
    )
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    lists, mini = ("red", "blue"), args.dataset == MINI_IMAGENET
    args.noise_type = args.noise_type or ("red" if mini else "sym")
    if (args.noise_type in lists) != mini:
        parser.error(f"argument --noise-type: {args.noise_type} is not for --dataset {args.dataset}")
    if args.noise_file:
        parser.error(f"argument --noise_file: no label is used in pre-training, got {args.noise_file}")
    data.settle_corruption(parser, args)
    if args.noise_type in POSTERIOR_TYPES:
        args.noise_type = "no"  # no label is used, so no posterior is made
    simclr.settle(args)
    return args


@cli.script
def main(argv=None) -> None:
    """Pre-train an encoder and write its run directory [Sec. 4.0]."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpu, fidelity=args.fidelity)
    corpus = data.load_mini_imagenet(args) if args.dataset == MINI_IMAGENET else data.load_open_set(args)
    if len(corpus.observed) < 2:
        raise UserError("one training image has no neighbours: use a larger --limit_train or data set")
    if args.drop_last and len(corpus.observed) < args.batch_size:
        raise UserError(
            f"--drop_last: a batch of {args.batch_size} is more than all {len(corpus.observed)} images"
        )
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    encoder = make_encoder(args.arch, corpus.images.shape[3], corpus.images.shape[1])
    network = SimCLR(encoder, encoder.width, DIMENSIONS)
    run = Run(
        args,
        device,
        paper="manifold_dividemix",
        method="SimCLR",
        name=directory_name(args),
        cell=cell(args, corpus),
    )
    data.keep(corpus, run)

    train, test = (
        Images(pixels, corpus.mean, corpus.std, device.device)
        for pixels in (corpus.images, corpus.test_images)
    )
    # kNN alone looks at labels: the true ones where they are known, of images that are not from elsewhere
    known = corpus.observed if corpus.clean is None else corpus.clean
    bank = np.arange(len(known)) if corpus.ood is None else np.flatnonzero(~corpus.ood)
    labels, test_labels, bank = (
        torch.from_numpy(of).to(device.device) for of in (known, corpus.test_labels, bank)
    )

    def measure(features: Tensor) -> dict[str, float | None]:
        return {"ood_auroc": outlier_auroc(knn_scores(features, args.knn_k), corpus.ood)}

    simclr.pre_train(
        run,
        args,
        device,
        device.prepare(network, args.compile),
        train,
        test,
        labels,
        test_labels,
        corpus.num_classes,
        # a mirrored digit is another sign or none
        flip=args.dataset not in ("digits", "mnist"),
        bank=bank,
        tested=corpus.tested,
        measure=measure,
        measured_names=("ood_auroc",),
    )


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, epochs and seed, then whatever differs from the defaults."""
    defaults = vars(parse_args(["--dataset", args.dataset, "--batch_size", str(args.batch_size)]))
    defaults |= {"batch_size": 1024, "num_epochs": args.num_epochs}
    always = ["dataset", "epochs", "seed"]
    always += ["noise_type", "noise_ratio"] if args.dataset == MINI_IMAGENET else ["corruption", "ood_ratio"]
    return "pretrain-" + run_name(args, defaults, always)


def cell(args: Namespace, corpus: Corpus) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    mini = args.dataset == MINI_IMAGENET
    noise = args.noise_type if mini else args.corruption if args.ood_ratio else "none"
    return {
        "dataset": corpus.name,
        "noise_type": noise,
        "noise_rate": args.noise_ratio if mini else None,
        "imb_factor": None,
        "ood_ratio": None if mini else args.ood_ratio,
        "profile": "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 1000 else "short",
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
