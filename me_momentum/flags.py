"""The command lines of main.py and Clothing.py: their flags, the checks, and the names of runs and results."""

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from common import noise
from common.runs import cli
from common.runs.data_flags import (
    CLOTHING1M,
    CLOTHING1M_CLASSES,
    POSTERIOR_HELP,
    add_dataset_flag,
    add_folder_flags,
    add_posterior_flag,
    check_posterior_flag,
    noise_of_files,
)
from common.runs.names import run_name, run_name_of_files
from me_momentum.alternation import Limits
from me_momentum.choices import DATA_ROOT, INDEX, NETWORKS

if TYPE_CHECKING:
    from common.datasets import Data

PRESETS = Path(__file__).with_name("presets.toml")
# defaults that differ for a folder: its labels as they are
OF_FOLDER = {"noise_type": "given"}
CLOTHING_OF_FOLDER = {"data_root": "./data"}  # of Clothing.py
# flags of the release that only keep its commands valid:
#   --model_dir    another name for --out; None once it is read (`settle_shared`)
#   --num_classes  Clothing1M has 14 classes, no other number is accepted
#   --pretrain     inverted, as in the release: it turns ImageNet weights off; --no_pretrain does the same


def _groups(parser: cli.Parser):
    return parser.add_argument_group("of the release"), parser.add_argument_group("not in the release")


# flags of both scripts ------------------------------------------------------------------------------------------------


def _add_sgd_flags(group, lr: float, drops: str, weight_decay: float, batch_size: int, batches: str) -> None:
    """The flags of SGD with their defaults. drops, batches: the ends of two help texts."""
    group.add_argument("--lr", type=cli.positive, default=lr, help=f"learning rate of SGD{drops}")
    group.add_argument(
        "--weight_decay", type=cli.non_negative, default=weight_decay, help="of SGD, on everything"
    )
    group.add_argument("--batch_size", type=cli.count, default=batch_size, help=batches)


def _add_selection_flag(group, alone: str) -> None:
    """alone: what is done without a selection."""
    choices = ["confident", "none"]
    text = f"none: no confident examples, {alone}"
    group.add_argument("--selection", choices=choices, default="confident", help=text)


def _add_outer_loops_flag(group) -> None:
    text = "outer loops; each starts from a fresh network"
    group.add_argument("--max_outer_loop", type=cli.count, default=3, help=text)


def _add_batch_mean_flag(group) -> None:
    text = (
        "report the mean over test batches, as the release does; by default under --fidelity released alone"
    )
    group.add_argument("--legacy_batch_mean", action=BooleanOptionalAction, help=text)


def _add_model_dir_flag(group) -> None:
    text = "the release's folder of weights: another name for --out"
    group.add_argument("--model_dir", metavar="DIR", type=cli.place, help=text)


# main.py --------------------------------------------------------------------------------------------------------------


def make_parser() -> cli.Parser:
    """The parser of main.py: the release's flags with their defaults, further flags, those that all scripts share."""
    parser = cli.Parser(
        prog="main.py",
        description="Me-Momentum (ICCV 2021) on MNIST, Fashion-MNIST, CIFAR-10/100 with label noise, and on the embedded digits.",
    )
    released, further = _groups(parser)
    _add_data_flags(released, further)
    _add_network_flags(further)
    batches = "batch size of training; selection, validation and test use twice as many"
    _add_sgd_flags(released, 0.01, "", 1e-4, 128, batches)
    _add_epoch_flags(released, further)
    _add_model_dir_flag(released)
    _add_alternation_flags(released, further)
    _add_batch_mean_flag(further)
    add_folder_flags(further)
    cli.add_shared_flags(parser, default_seed=1)
    return parser


def _add_data_flags(released, further) -> None:
    """The data set, its label noise, and the part that is trained on."""
    released.add_argument(
        "--dataset",
        default="mnist",
        help="mnist, fashion_mnist, cifar10, cifar100, digits, NAME for DATA_PATH/NAME.npz, or folder for the images in "
        "DATA_PATH",
    )
    released.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="where the data sets are"
    )
    released.add_argument(
        "--noise_type",
        choices=[*noise.NOISE_TYPES, "given"],
        default="symmetric",
        help="label noise of the whole training set, validation part included; "
        f"{POSTERIOR_HELP}; given: the noisy_labels of an .npz or, by default, the labels of the folder",
    )
    released.add_argument("--noise_rate", type=cli.fraction, default=0.2, help="rate of the label noise")
    add_posterior_flag(further)
    released.add_argument(
        "--data_percent",
        type=cli.fraction,
        default=0.9,
        help="fraction of the images that is trained on; the rest, with noisy labels too, is the validation part",
    )


def _add_network_flags(group) -> None:
    group.add_argument(
        "--network",
        choices=["auto", *NETWORKS],
        default="auto",
        help="auto: LeNet for mnist and grey images, ResNet-34 for cifar100, ResNet-18 for cifar10 and colour images, a "
        "small network for digits. auto never takes preact_resnet18 (narrow below 16 pixels) and preact_narrow (narrow at any "
        "size)",
    )
    group.add_argument(
        "--stem_padding",
        type=cli.count_or_zero,
        default=0,
        help="padding of the first convolution of resnet18 and resnet34; 0 as in the release: 32 pixels become 30. The "
        "PreAct ResNets always have 1",
    )


def _add_epoch_flags(released, further) -> None:
    """The length of a round, and how its steps are done on a GPU."""
    released.add_argument(
        "--n_epoch",
        type=cli.count,
        default=100,
        dest="num_epochs",
        help="epochs of a round, and of the early-stopping phase at most",
    )
    further.add_argument(
        "--cuda_graphs",
        action=BooleanOptionalAction,
        default=False,
        help="on CUDA, replay recorded training steps, which saves launching each kernel; the first 20 steps are checked against "
        "eager ones; not with --compile",
    )


def _add_alternation_flags(released, further) -> None:
    """The outer and inner loops, early stopping, and the images that selection and validation look at."""
    _add_selection_flag(further, "plain cross-entropy on the noisy training part for n_epoch epochs")
    _add_outer_loops_flag(released)
    released.add_argument(
        "--max_inner_loop",
        type=cli.count,
        default=20,
        help="one more than the most rounds of fine-tuning in an outer loop, as in the release",
    )
    further.add_argument(
        "--es_step",
        type=cli.positive,
        default=0.1,
        help="percentage points that each failure adds to the margin of early stopping",
    )
    further.add_argument(
        "--es_limit",
        type=cli.non_negative,
        default=2.0,
        help="early stopping ends when its margin is above this",
    )
    for what, name in (("select", "confident examples are extracted from"), ("val", "validation uses")):
        further.add_argument(
            f"--{what}_view",
            choices=["train", "test"],
            default="train",
            help=f"images that {name}: augmented as in training (train, as released) or plain (test)",
        )


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS, OF_FOLDER)
    settle_shared(parser, args)
    if args.noise_file:
        args.noise_type = "given"
    check_posterior_flag(parser, args, args.noise_type, "--noise_type")
    if not 0 < args.data_percent < 1:
        parser.error(f"argument --data_percent: both parts need images, got {args.data_percent}")
    return args


def loop_limits(args: Namespace) -> Limits:
    """The bounds of the loops; without selection there is one phase, which never stops early.

    The release's --max_inner_loop is one more than the rounds that it runs; `Limits.rounds` is their number.
    """
    if args.selection == "none":
        return Limits(args.num_epochs, outer_loops=1, rounds=0, margin_step=0)
    rounds = args.max_inner_loop - 1
    return Limits(args.num_epochs, args.max_outer_loop, rounds, args.es_step, args.es_limit)


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, noise and seed, then every flag that is not at its default."""
    always = [
        "dataset",
        "noise_type",
        "noise_rate",
        *(["fidelity"] if args.fidelity == "released" else []),
        "seed",
    ]
    defaults = parse_args(["--fidelity", args.fidelity])
    return run_name(args, vars(defaults), always)


def cell(args: Namespace, data: "Data") -> dict:
    """The columns of a result row for the data set, its noise and the profile."""
    defaults = parse_args([])
    bounds = ("num_epochs", "max_outer_loop", "max_inner_loop", "es_step", "es_limit")
    shortened = any(getattr(args, bound) < getattr(defaults, bound) for bound in bounds)
    return {
        "dataset": data.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else args.noise_type,
        "noise_rate": None if args.noise_type == "given" else args.noise_rate,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "embedded" if args.dataset == "digits" else "short" if shortened else "paper",
    }


# Clothing.py ----------------------------------------------------------------------------------------------------------


def make_clothing_parser() -> cli.Parser:
    """The parser of Clothing.py: the release's flags with their defaults, further flags, those that all scripts share."""
    parser = cli.Parser(prog="Clothing.py", description="Me-Momentum (ICCV 2021) on Clothing1M.")
    released, further = _groups(parser)
    _add_clothing_data_flags(released, further)
    _add_clothing_network_flags(released, further)
    _add_clothing_loop_flags(released, further)
    _add_clothing_training_flags(released, further)
    _add_batch_mean_flag(further)
    _add_model_dir_flag(released)
    cli.add_shared_flags(parser, default_seed=1)
    return parser


def _add_clothing_data_flags(released, further) -> None:
    released.add_argument(
        "--data_root",
        "--data_path",
        default=DATA_ROOT,
        metavar="DIR",
        type=cli.place,
        help=f"the lists of Clothing1M are in it or in its annotations/; without lists its {INDEX} is read; of a folder by "
        "default ./data",
    )
    released.add_argument(
        "--num_classes",
        type=cli.count,
        default=CLOTHING1M_CLASSES,
        help="of Clothing1M, where no other number fits; a folder has its own",
    )
    add_dataset_flag(further, CLOTHING1M)
    further.add_argument(
        "--image_size",
        type=cli.count,
        default=256,
        help="pixels of both sides; training crops pad an eighth of it (32)",
    )
    cli.add_image_file_flags(further, workers=8)


def _add_clothing_network_flags(released, further) -> None:
    """The network, and the weights that it starts from."""
    further.add_argument(
        "--network", choices=["resnet50", "resnet18"], default="resnet50", help="torchvision's"
    )
    further.add_argument(
        "--pretrained",
        metavar="PATH|imagenet|none",
        type=cli.place,
        help="initial weights; by default imagenet",
    )
    released.add_argument(
        "--pretrain",
        action="store_false",
        help="the release's inverted switch: giving it turns ImageNet weights off (%(default)s without it)",
    )
    further.add_argument(
        "--no_pretrain",
        action="store_false",
        dest="pretrain",
        help="the same as --pretrain by a clear name (%(default)s without it)",
    )


def _add_clothing_loop_flags(released, further) -> None:
    """Whether and how confident examples are extracted, and the lengths of the loops."""
    alone = "the same weighted cross-entropy on all noisy images for one outer loop"
    _add_selection_flag(further, alone)
    released.add_argument(
        "--beta",
        type=cli.fraction,
        default=0.45,
        help="weight of recall, against precision, in the score of a class",
    )
    released.add_argument("--n_epoch", type=cli.count, default=5, help="epochs of an inner loop")
    released.add_argument(
        "--max_inner_loop",
        type=cli.count,
        default=6,
        help="inner loops; confident examples are extracted between them",
    )
    _add_outer_loops_flag(released)


def _add_clothing_training_flags(released, further) -> None:
    drops = "; it drops by 10x after epochs 10 and 20 of an outer loop"
    batches = (
        "over all processes. A smaller last batch of training images is dropped, so that any number of processes "
        "trains alike; under --fidelity released one process keeps it"
    )
    _add_sgd_flags(released, 0.005, drops, 0.001, 32, batches)
    further.add_argument(
        "--sync_bn",
        action=BooleanOptionalAction,
        help="batch statistics over all processes; by default yes, under --fidelity released no",
    )


def parse_clothing_args(argv=None) -> Namespace:
    """Parse, settle the defaults that depend on other flags, and count the epochs of all loops as num_epochs."""
    parser = make_clothing_parser()
    args = cli.parse_args(parser, argv, PRESETS, CLOTHING_OF_FOLDER)
    if not args.pretrain and args.pretrained not in (None, "none"):
        parser.error(
            f"argument --pretrained: --pretrain and --no_pretrain both mean none, got {args.pretrained} beside one of them"
        )
    args.pretrained = args.pretrained or ("imagenet" if args.pretrain else "none")
    args.pretrain = args.pretrained != "none"
    settle_shared(parser, args)
    args.sync_bn = args.fidelity != "released" if args.sync_bn is None else args.sync_bn
    if args.dataset == CLOTHING1M and args.num_classes != CLOTHING1M_CLASSES:
        parser.error(
            f"argument --num_classes: Clothing1M has {CLOTHING1M_CLASSES} classes, got {args.num_classes}"
        )
    if args.image_size < 64:
        parser.error(f"argument --image_size: must be at least 64, got {args.image_size}")
    if args.selection == "none":
        args.max_outer_loop = 1
    args.num_epochs = args.max_outer_loop * args.max_inner_loop * args.n_epoch
    return args


def clothing_directory_name(args: Namespace) -> str:
    """The run directory's name: data and seed, then every flag that is not at its default."""
    released, alone = args.fidelity == "released", args.selection == "none"
    always = [*(["selection"] if alone else []), *(["fidelity"] if released else []), "seed"]
    words = ["--dataset", args.dataset, "--fidelity", args.fidelity, "--selection", args.selection]
    # num_epochs follows from the loops
    defaults = {**vars(parse_clothing_args(words)), "num_epochs": args.num_epochs}
    return run_name_of_files(args, defaults, always, "num_classes")


def clothing_cell(args: Namespace) -> dict:
    """The columns of a result row for the data set, its noise and the profile."""
    defaults = parse_clothing_args(["--selection", args.selection])
    bounds = ("n_epoch", "max_inner_loop", "max_outer_loop", "image_size")
    shortened = any(getattr(args, bound) < getattr(defaults, bound) for bound in bounds)
    published = args.dataset == CLOTHING1M and args.network == defaults.network and not shortened
    return {
        "dataset": args.dataset,
        "noise_type": noise_of_files(args),
        "noise_rate": None,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "paper" if published else "short",
    }


# both scripts -----------------------------------------------------------------------------------------------------------


def method(args: Namespace) -> str:
    """The method's name in a result row."""
    return "CE" if args.selection == "none" else "Me-Momentum"


def settle_shared(parser: cli.Parser, args: Namespace) -> None:
    """Settle the metric that is reported, and where the run directory is."""
    if args.legacy_batch_mean is None:
        args.legacy_batch_mean = args.fidelity == "released"
    if args.model_dir and args.out and args.model_dir != args.out:
        parser.error(
            f"argument --model_dir: is a name for --out, give one of them, got {args.model_dir} and {args.out}"
        )
    args.out, args.model_dir = args.out or args.model_dir, None
