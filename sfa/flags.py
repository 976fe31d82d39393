"""The command lines of Train_cifar.py and Train_webvision.py: flags, their checks, and the names of runs and results."""

from argparse import Namespace
from argparse import _ArgumentGroup as ArgumentGroup
from pathlib import Path
from typing import TYPE_CHECKING

from common.noise import POSTERIOR_TYPES
from common.runs import cli
from common.runs.data_flags import (
    FOLDER,
    POSTERIOR_HELP,
    WEBVISION,
    add_dataset_flag,
    add_folder_flags,
    add_posterior_flag,
    check_posterior_flag,
    noise_of_files,
)
from common.runs.names import run_name, run_name_of_files

if TYPE_CHECKING:
    from common.datasets import Data

PRESETS = Path(__file__).with_name("presets.toml")
# as a result row calls them
SELECTIONS = {"sfa": "SFA", "gmm": "GMM", "none": "no selection"}
LOSSES = {
    "ce": "CE",
    "ldam": "LDAM",
    "gce": "GCE",
    "sce": "SCE",
    "logit_adjusted": "logit adjustment",
    "balanced_softmax": "balanced softmax",
}
# defaults that differ for a folder: its labels and images as they are
OF_FOLDER = {"noise_mode": "given", "imb_type": "none"}
WEBVISION_OF_FOLDER = {"data_path": "./data"}  # of Train_webvision.py
# flags of the release that have no effect, there or here: type, default, and what decides in their place
WITHOUT_EFFECT = {
    "--num_class": (cli.count, 10, "the data set decides"),  # Train_cifar.py
    "--feat_size": (cli.count, 1536, "the network decides (1536; 2048; 512)"),  # Train_webvision.py
    "--lambda_u": (cli.non_negative, 0, "there is no unlabelled loss"),  # Train_webvision.py
}
WEBVISION_WARM_UP = 1  # epochs
# pixels: with smaller crops a last batch of one image has no statistics for its batch norms
SMALLEST_CROP = {"inception_resnet_v2": 107, "resnet50": 33, "resnet18": 33}


# Run directories are named after flags in the order in which they stand here.


def _groups(parser: cli.Parser) -> tuple[ArgumentGroup, ArgumentGroup]:
    return parser.add_argument_group("of the release"), parser.add_argument_group("not in the release")


def _add_without_effect(released: ArgumentGroup, name: str) -> None:
    type_, default, instead = WITHOUT_EFFECT[name]
    released.add_argument(name, type=type_, default=default, help=f"no effect, as in the release: {instead}")


def _add_averaging_flags(
    released: ArgumentGroup,
    moments: ArgumentGroup,
    further: ArgumentGroup,
    *,
    beta: float,
    min_draw_count: int | None,
    default_count: str = "",
) -> None:
    """Stochastic feature averaging (README, section 6).

    moments: the group of the moments' flags, which the release has for CIFAR alone. default_count: the default of
    --min_draw_count in words.
    """
    released.add_argument(
        "--p_threshold",
        type=cli.fraction,
        default=0.5,
        help="samples with a larger clean probability are selected",
    )
    moments.add_argument(
        "--beta", type=cli.fraction, default=beta, help="smoothing factor of the running moments"
    )
    moments.add_argument(
        "--phi", type=cli.positive, default=1.005, help="growth of the confidence threshold per epoch"
    )
    moments.add_argument(
        "--sample_rate", type=cli.count, default=1, help="Gaussian draws per class and epoch"
    )
    further.add_argument(
        "--min_draw_count",
        type=cli.count_or_zero,
        default=min_draw_count,
        help=f"classes with more confident samples are drawn; 0: all{default_count}",
    )
    further.add_argument(
        "--ema_mode",
        choices=["persist", "released"],
        help="whether the running moments outlive the epoch; by default released under --fidelity released",
    )


# Train_cifar.py -------------------------------------------------------------------------------------------------------


def make_cifar_parser() -> cli.Parser:
    """The parser of Train_cifar.py."""
    parser = cli.Parser(
        prog="Train_cifar.py",
        description="Stochastic Feature Averaging (IJCAI 2023) on long-tailed noisy data sets in memory",
    )
    released, further = _groups(parser)
    _add_cifar_data_flags(released, further)
    _add_cifar_training_flags(released, further)
    _add_loss_flags(further)
    further.add_argument(
        "--selection",
        choices=list(SELECTIONS),
        default="sfa",
        help="sfa: stochastic feature averaging; gmm: DivideMix's small losses; none: all labels are trained on as they are",
    )
    default_count = "; by default 300, on digits 9, of a folder 6 %% of its images per class"
    _add_averaging_flags(
        released, released, further, beta=0.99, min_draw_count=None, default_count=default_count
    )
    further.add_argument(
        "--mixture",
        choices=["em", "sklearn"],
        default="em",
        help="em: all classes at once on the device; sklearn: the reference path",
    )
    add_folder_flags(further)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def _add_cifar_data_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    released.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, NAME for DATA_PATH/NAME.npz, or folder for the images in "
        "DATA_PATH",
    )
    released.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="where the data sets are"
    )
    released.add_argument(
        "--imb_type", choices=["exp", "step", "none"], default="exp", help="shape of the long tail"
    )
    released.add_argument(
        "--imb_factor", type=cli.positive, default=0.01, help="smallest class / largest class"
    )
    released.add_argument(
        "--noise_mode",
        choices=["imb", "sym", *POSTERIOR_TYPES, "given"],
        default="imb",
        help="imb: flips follow the class sizes; sym: all other classes alike; "
        f"{POSTERIOR_HELP}; given: the labels of --noise_file, of the .npz or, by default, of the folder",
    )
    released.add_argument(
        "--noise_ratio", type=cli.fraction, default=0.5, help="fraction of labels that are flipped"
    )
    add_posterior_flag(further)
    _add_without_effect(released, "--num_class")


def _add_cifar_training_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    released.add_argument(
        "--batch_size", type=cli.count, default=64, help="batch size; warm-up uses twice that"
    )
    released.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.02, help="initial learning rate"
    )
    further.add_argument(
        "--lr_drop", type=cli.count, default=150, help="the learning rate drops by 10x after this epoch"
    )
    released.add_argument("--num_epochs", type=cli.count, default=200, help="epochs, warm-up included")
    released.add_argument("-w", "--warm_up", type=cli.count, default=30, help="epochs of warm-up")
    released.add_argument(
        "--alpha", type=cli.positive, default=4, help="parameter of the Beta distribution of the mixture"
    )
    released.add_argument(
        "--lambda_u", type=cli.non_negative, default=25, help="final weight of both unlabelled losses"
    )
    released.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    released.add_argument(
        "--arch",
        choices=["resnet18", "narrow"],
        default="resnet18",
        help="resnet18: PreAct ResNet-18, its narrow form on images below 16 pixels; narrow: that form at any size",
    )
    released.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")
    cli.add_cuda_graphs_flag(further, "full batches after the warm-up")


def _add_loss_flags(group: ArgumentGroup) -> None:
    """The loss of the standard head (README, section 9)."""
    group.add_argument(
        "--loss",
        choices=list(LOSSES),
        default="ce",
        help="of the standard head, on observed labels and on the labelled rows; robust to the distribution of classes: "
        "ldam, logit_adjusted, balanced_softmax; to label noise: gce, sce",
    )
    group.add_argument("--ldam_margin", type=cli.positive, default=0.5, help="ldam: of the rarest class")
    group.add_argument("--ldam_scale", type=cli.positive, default=30, help="ldam: of the cosines")
    group.add_argument("--gce_q", type=cli.positive, default=0.7, help="gce: exponent, at most 1")
    group.add_argument(
        "--sce_ce", type=cli.non_negative, help="sce: weight of CE, by default 0.1; 6 on cifar100"
    )
    group.add_argument(
        "--sce_rce", type=cli.non_negative, help="sce: weight of reverse CE, by default 1; 0.1 on cifar100"
    )
    group.add_argument(
        "--adjustment_tau", type=cli.positive, default=1, help="logit_adjusted: weight of the log prior"
    )


def parse_cifar_args(argv: list[str] | None = None) -> Namespace:
    """The checked arguments of Train_cifar.py, with the defaults that depend on other flags."""
    parser = make_cifar_parser()
    args = cli.parse_args(parser, argv, PRESETS, OF_FOLDER)
    for name in ("imb_factor", "gce_q"):
        if getattr(args, name) > 1:
            parser.error(f"argument --{name}: must be at most 1, got {getattr(args, name)}")
    if args.noise_file:
        args.noise_mode = "given"
    check_posterior_flag(parser, args, args.noise_mode, "--noise_mode")
    # Wang et al. weigh the two for CIFAR-100 the other way round
    weights = (6, 0.1) if args.dataset == "cifar100" else (0.1, 1)
    args.sce_ce = weights[0] if args.sce_ce is None else args.sce_ce
    args.sce_rce = weights[1] if args.sce_rce is None else args.sce_rce
    args.ema_mode = args.ema_mode or usual_ema_mode(args)
    if args.min_draw_count is None and args.dataset != FOLDER:
        # 300 of CIFAR-10's 5000 images per class, scaled to the 143 of digits
        args.min_draw_count = 9 if args.dataset == "digits" else 300
    return args


def settle_draw_count(args: Namespace, images: int, num_classes: int) -> None:
    """The default of --min_draw_count for a folder: the same 6 % of its training images per class."""
    if args.min_draw_count is None:
        args.min_draw_count = max(round(0.06 * images / num_classes), 1)


def usual_ema_mode(args: Namespace) -> str:
    """The --ema_mode that --fidelity stands for."""
    return "released" if args.fidelity == "released" else "persist"


def note_schedule(args: Namespace) -> None:
    """Print a note if a schedule made for 200 epochs does not fit --num_epochs."""
    if args.warm_up >= args.num_epochs and args.selection != "none":
        print(f"note: warm-up only, --warm_up {args.warm_up} is not below --num_epochs {args.num_epochs}")
    if args.lr_drop >= args.num_epochs:
        print(
            f"note: the learning rate never drops, --lr_drop {args.lr_drop}, --num_epochs {args.num_epochs}"
        )


def cifar_method(args: Namespace) -> str:
    """The method's name in a result row."""
    differs = args.selection == "sfa" and args.ema_mode != usual_ema_mode(args)
    moments = f" (ema_mode {args.ema_mode})" if differs else ""
    loss = f" + {LOSSES[args.loss]}" if args.loss != "ce" else ""
    return SELECTIONS[args.selection] + moments + loss


def cifar_directory(args: Namespace) -> str:
    """The run directory's name: data, noise and seed, then every flag that is not at its default."""
    always = ("dataset", "imb_type", "imb_factor", "noise_mode", "noise_ratio", "seed")
    return run_name(args, vars(parse_cifar_args(["--dataset", args.dataset])), always)


def cifar_cell(args: Namespace, data: "Data") -> dict:
    """The columns of a result row for the data set, its noise and the profile."""
    profile = "embedded" if args.dataset == "digits" else "paper" if args.num_epochs >= 200 else "short"
    return {
        "dataset": data.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else args.noise_mode,
        "noise_rate": None if args.noise_mode == "given" else args.noise_ratio,
        "imb_factor": args.imb_factor if args.imb_type != "none" else 1.0,
        "ood_ratio": None,
        "profile": profile,
    }


# Train_webvision.py ---------------------------------------------------------------------------------------------------


def make_webvision_parser() -> cli.Parser:
    """The parser of Train_webvision.py."""
    parser = cli.Parser(
        prog="Train_webvision.py", description="Stochastic Feature Averaging (IJCAI 2023) on mini-WebVision"
    )
    released, further = _groups(parser)
    _add_webvision_data_flags(released, further)
    _add_webvision_training_flags(released, further)
    _add_averaging_flags(released, further, further, beta=0.9, min_draw_count=0)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def _add_webvision_data_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    add_dataset_flag(further, WEBVISION)
    released.add_argument(
        "--data_path",
        default="./webvision/",
        metavar="DIR",
        type=cli.place,
        help="info/, val_images_256/ and the training images of WebVision 1.0 are in it; of a folder by default ./data",
    )
    further.add_argument(
        "--imagenet",
        metavar="DIR|none",
        type=cli.place,
        help="val/ of ILSVRC12 is in it; none: test on WebVision alone; by default DATA_PATH/imagenet",
    )
    released.add_argument(
        "--num_class",
        type=cli.count,
        default=50,
        help="train on the first so many classes; a folder's are all",
    )
    further.add_argument(
        "--imb_type",
        choices=["exp", "step"],
        default="exp",
        help="shape of the long tail, if one is asked for",
    )
    further.add_argument(
        "--imb_factor",
        type=cli.positive,
        default=1,
        help="below 1: make the training set long-tailed, smallest class / largest class; 1: all images",
    )
    further.add_argument(
        "--image_size",
        type=cli.count,
        default=299,
        help="pixels of both sides of a crop; images are resized to 320/299 of it (320) before",
    )
    cli.add_image_file_flags(further, workers=8, how=" webvision --size 320 (or 256)")


def _add_webvision_training_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    further.add_argument(
        "--network",
        choices=list(SMALLEST_CROP),
        default="inception_resnet_v2",
        help="the protocol's, or a lighter one of torchvision; from random weights",
    )
    _add_without_effect(released, "--feat_size")
    released.add_argument(
        "--batch_size",
        type=cli.count,
        default=32,
        help="labelled = unlabelled batch, over all processes; the warm-up uses twice that. A smaller last batch is left out, so "
        "that any number of processes trains alike; under --fidelity released one process keeps it",
    )
    released.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.01, help="initial learning rate"
    )
    further.add_argument(
        "--lr_drop", type=cli.count, default=50, help="the learning rate drops by 10x from this epoch on"
    )
    released.add_argument("--num_epochs", type=cli.count, default=100, help="epochs, one of warm-up included")
    released.add_argument(
        "--alpha", type=cli.positive, default=0.5, help="parameter of the Beta distribution of the mixture"
    )
    _add_without_effect(released, "--lambda_u")
    released.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    further.add_argument(
        "--reset_momentum",
        choices=["yes", "no"],
        help="whether momentum starts from zero at every epoch; by default no, under --fidelity released yes",
    )
    released.add_argument(
        "--gpuid1", type=cli.count_or_zero, default=0, help="CUDA device of the first network"
    )
    released.add_argument(
        "--gpuid2", type=cli.count_or_zero, default=1, help="CUDA device of the second, if it is there"
    )
    further.add_argument(
        "--parallel",
        choices=["none", "networks", "data"],
        help="none: one process; networks: two, each trains a network; data: those of torchrun, each trains both on its piece of "
        "every batch. By default data under torchrun, networks where both cards are there, else none",
    )


def parse_webvision_args(argv: list[str] | None = None) -> Namespace:
    """The checked arguments of Train_webvision.py, with the defaults that depend on other flags."""
    parser = make_webvision_parser()
    args = cli.parse_args(parser, argv, PRESETS, WEBVISION_OF_FOLDER)
    if not 2 <= args.num_class <= 1000:
        parser.error(
            f"argument --num_class: WebVision has 1000 classes, 2 at least are needed, got {args.num_class}"
        )
    if args.imb_factor > 1:
        parser.error(f"argument --imb_factor: must be at most 1, got {args.imb_factor}")
    smallest = SMALLEST_CROP[args.network]
    if args.image_size < smallest:
        parser.error(
            f"argument --image_size: must be at least {smallest} for {args.network}, got {args.image_size}"
        )
    args.ema_mode = args.ema_mode or usual_ema_mode(args)
    args.reset_momentum = args.reset_momentum or ("yes" if args.fidelity == "released" else "no")
    args.parallel = args.parallel or _usual_parallel(args)
    _check_parallel(parser, args)
    return args


def _usual_parallel(args: Namespace) -> str:
    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    if processes.launched():
        return "data"
    return "networks" if args.device != "cpu" and _both_cards(args) else "none"


def _both_cards(args: Namespace) -> bool:
    import torch  # noqa: PLC0415  (seconds to import)

    return args.gpuid1 != args.gpuid2 and max(args.gpuid1, args.gpuid2) < torch.cuda.device_count()


def _check_parallel(parser: cli.Parser, args: Namespace) -> None:
    """End with one line if the processes and cards do not fit --parallel."""
    import torch  # noqa: PLC0415  (seconds to import)

    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    if args.parallel == "data" and not processes.launched():
        parser.error("argument --parallel: data needs several processes: start the script with torchrun")
    if args.parallel == "none" and processes.launched():
        parser.error(
            "argument --parallel: none is one process: start the script with python, not with torchrun"
        )
    if args.parallel == "networks" and processes.planned() not in (1, 2):
        parser.error(
            f"argument --parallel: networks needs two processes, torchrun started {processes.planned()}"
        )
    on_cards = args.device == "cuda" or (args.device == "auto" and torch.cuda.device_count() > 0)
    if args.parallel == "networks" and not processes.launched() and on_cards and not _both_cards(args):
        parser.error(
            f"argument --parallel: networks needs two CUDA devices, {args.gpuid1} and {args.gpuid2} by --gpuid1 and --gpuid2 "
            f"(found {torch.cuda.device_count()})"
        )


def webvision_directory(args: Namespace) -> str:
    """The run directory's name: data and seed, then every flag that is not at its default."""
    always = [*(["fidelity"] if args.fidelity == "released" else []), "seed"]
    defaults = vars(parse_webvision_args(["--dataset", args.dataset, "--fidelity", args.fidelity]))
    return run_name_of_files(args, defaults, always, "num_class")


def webvision_cell(args: Namespace) -> dict:
    """The columns of a result row for the data set, its long tail and the profile."""
    usual = parse_webvision_args([])
    published = all(
        getattr(args, flag) == getattr(usual, flag) for flag in ("network", "num_class", "imb_factor")
    )
    published &= args.num_epochs >= usual.num_epochs and args.image_size >= usual.image_size
    published &= args.dataset == WEBVISION
    return {
        "dataset": args.dataset,
        "noise_type": noise_of_files(args),
        "noise_rate": None,
        "imb_factor": args.imb_factor if args.imb_factor < 1 else None,
        "ood_ratio": None,
        "profile": "paper" if published else "short",
    }
