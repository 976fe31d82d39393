"""Manifold DivideMix on mini-ImageNet with controlled noise from the web, CNWL (CVPR-W 2024).

    python manifold_dividemix/train_semisup_miniimagenet.py --data-dir DIR --pretrained .../encoder.safetensors
    torchrun --nproc_per_node=4 manifold_dividemix/train_semisup_miniimagenet.py ...        # the same on four cards

DIR, by default data/mini-imagenet, holds split/, all_images/ and validation/. Images are decoded once and stay on the device;
the training is that of train_semisup.py. Which of them are from elsewhere nobody knows, so that the log has no figures of it.
"""

import sys
from argparse import Namespace
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.datasets.mini_imagenet import NAME as MINI_IMAGENET
from common.gpu import device as gpu
from common.runs import cli
from common.runs.run import run_name
from manifold_dividemix import corpus as data
from manifold_dividemix.corpus import Corpus
from manifold_dividemix.flags import add_training_flags, settle
from manifold_dividemix.train_semisup import start

PRESETS = Path(__file__).with_name("presets.toml")


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags for its single quirks, and the flags all scripts share."""
    parser = cli.Parser(prog="train_semisup_miniimagenet.py", description=__doc__)
    files = data.add_mini_imagenet_flags(parser)
    files.add_argument(
        "--data-dir",
        "--data_path",
        dest="data_path",
        default="./data",
        metavar="DIR",
        type=cli.place,
        help="split/, all_images/ and validation/ are in it, or in its mini-imagenet/",
    )
    files.add_argument("--num-class", type=cli.count, default=100, help="ignored: the data set decides")
    files.add_argument(
        "--workers", type=cli.count_or_zero, default=8, help="processes that decode images, once at the start"
    )
    data.add_noise_flags(
        parser, ["red", "blue"], "red", "red: wrong labels and images of the web; blue: synthetic"
    )
    add_training_flags(parser, epochs=50, warm_up=10, start_factor=1)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    settle(parser, args, released_bn="warm-up", released_mask="all")
    args.dataset = MINI_IMAGENET
    return args


@cli.script
def main(argv=None) -> None:
    """Train Manifold DivideMix on mini-ImageNet and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpu, several=True, fidelity=args.fidelity)
    corpus = data.load_mini_imagenet(args)
    start(corpus, args, device, directory_name(args), cell(args, corpus))


def directory_name(args: Namespace) -> str:
    """The run directory's name: list, image size and seed, then whatever differs from the defaults."""
    always = ("dataset", "noise_type", "noise_ratio", "img_size", "seed")
    defaults = vars(parse_args(["--fidelity", args.fidelity]))
    return run_name(args, {**defaults, "fidelity": "paper"}, always)


def cell(args: Namespace, corpus: Corpus) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    defaults = parse_args([])
    whole = args.epochs >= defaults.epochs and args.img_size >= defaults.img_size
    return {
        "dataset": corpus.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else args.noise_type,
        "noise_rate": None if args.noise_file else args.noise_ratio,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "paper" if whole else "short",
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
