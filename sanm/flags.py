"""Flags of SANM's three scripts, their checks, and the names of runs and of the cells of result tables.

Each parser has two groups: flags of the release, with its names and defaults, and flags not in the release.
"""

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from common.noise import POSTERIOR_TYPES
from common.pretraining.flags import add_recipe_flags, settle
from common.runs import cli
from common.runs.cli import UserError
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
from sanm.choices import ARCHS, BASES, CLOTHING_RULE, HISTORY, MaskRule, averages_history

PRESETS = Path(__file__).with_name("presets.toml")
BASE_NAMES = {"dividemix": "DivideMix", "c2d": "C2D"}

# defaults that differ for a folder: its labels as they are
OF_FOLDER = {"noise_mode": "given"}
CLOTHING_OF_FOLDER = {"data_path": "./data"}  # of Train_clothing1M.py
# flags of the release without effect here; --num_class of Train_clothing1M.py must fit
WITHOUT_EFFECT = {
    "--num_class": "ignored: the data set decides",
    "--check_path": "ignored, as in the release: logs go to --out",
    "--id": "ignored: logs go to --out",
    "--lambda_u": "ignored, as in the release: Clothing1M has no unlabelled loss",
}


def _add_without_effect(group, flag: str, **options: Any) -> None:
    group.add_argument(flag, help=WITHOUT_EFFECT[flag], **options)


def _groups(parser: cli.Parser):
    return parser.add_argument_group("of the release"), parser.add_argument_group("not in the release")


# masks, of both training scripts --------------------------------------------------------------------------------------


def _add_mask_flags(group, rule: MaskRule, recon_weight: float) -> None:
    """The flags of masking and reconstruction, with the defaults of a rule."""
    group.add_argument(
        "--masking",
        choices=["adversarial", "none"],
        default="adversarial",
        help="none: the base alone, without masks, modulated labels and reconstruction",
    )
    group.add_argument("--mask-lo", type=cli.fraction, default=rule.low, help="smallest base ratio of a mask")
    group.add_argument("--mask-hi", type=cli.fraction, default=rule.high, help="largest base ratio of a mask")
    group.add_argument(
        "--mask-quality",
        type=cli.fraction,
        default=rule.quality,
        help="this times (1 - clean probability) is added to the ratio",
    )
    group.add_argument(
        "--mask-anchor",
        choices=["corner", "centre"],
        help="which point of the rectangle is at the extremum of the activation; by default centre (the paper's Eq. 4), "
        "under --fidelity released corner",
    )
    group.add_argument("--clamp-targets", action="store_true", help="keep modulated targets above zero")
    group.add_argument(
        "--recon-weight",
        type=cli.non_negative,
        default=recon_weight,
        help="weight of the reconstruction error",
    )


def _settle_mask_flags(parser: cli.Parser, args: Namespace) -> None:
    """Settle the anchor by the fidelity; end with a message if the smallest ratio is above the largest."""
    if args.mask_lo > args.mask_hi:
        parser.error(f"argument --mask-lo: must be at most --mask-hi {args.mask_hi}, got {args.mask_lo}")
    if args.mask_anchor is None:
        args.mask_anchor = "corner" if args.fidelity == "released" else "centre"


def mask_rule(args: Namespace) -> MaskRule:
    """The rule that the flags describe."""
    return MaskRule(args.mask_lo, args.mask_hi, args.mask_quality, args.mask_anchor, args.clamp_targets)


# Train_cifar.py -------------------------------------------------------------------------------------------------------


def cifar_parser(description: str | None = None) -> cli.Parser:
    """The parser of Train_cifar.py."""
    parser = cli.Parser(prog="Train_cifar.py", description=description)
    released, ours = _groups(parser)
    released.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, NAME for DATA_PATH/NAME.npz, or folder for the images in "
        "DATA_PATH",
    )
    released.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="folder of the data sets"
    )
    released.add_argument(
        "--noise_mode",
        choices=["sym", "asym", *POSTERIOR_TYPES, "given"],
        default="sym",
        help="sym: a class drawn from all; asym: the look-alike class, on CIFAR-100 another class of the superclass; "
        f"{POSTERIOR_HELP}; given: the labels of --noise_file, of the .npz or, by default, of the folder",
    )
    released.add_argument(
        "--r",
        type=cli.fraction,
        default=0.5,
        help="noise rate: fraction of samples that get a new label. From 0.9 on, clean probabilities come from the mean of "
        "the last 5 loss vectors (the 90 %% rule); with labels from a file --r decides only this",
    )
    add_posterior_flag(ours)
    _add_without_effect(released, "--num_class", type=cli.count, default=10)
    _add_without_effect(released, "--check_path", default="")
    _add_without_effect(released, "--id", default="")
    _add_base_flags(ours)
    _add_cifar_training_flags(released, ours)
    _add_mask_flags(ours, MaskRule(), recon_weight=0.02)
    ours.add_argument(
        "--ref-views",
        choices=["strong", "weak"],
        default="strong",
        help="the views that give targets, maps and masked images: AutoAugment as in the release, or crop and flip",
    )
    add_folder_flags(ours)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def _add_base_flags(group) -> None:
    group.add_argument(
        "--base",
        choices=BASES,
        default="c2d",
        help="c2d: SimCLR-style ResNet-18 from a pre-trained encoder; dividemix: PreAct ResNet-18 from random weights",
    )
    group.add_argument(
        "--arch",
        choices=ARCHS,
        default="auto",
        help="auto: the base's network, narrow below 16 pixels; narrow: for --base dividemix, a PreAct ResNet of three "
        "blocks at any size",
    )
    group.add_argument(
        "--pretrained",
        metavar="FILE|none",
        type=cli.place,
        help="the encoder of --base c2d: encoder.safetensors of pretrain.py or a published SimCLR checkpoint; "
        "by default pretrained/ckpt_DATASET_resnet18.pth, as in the release",
    )
    group.add_argument(
        "--released-softmax",
        action=BooleanOptionalAction,
        help="--base c2d returns probabilities, and every loss takes softmax of them once more; by default under "
        "--fidelity released",
    )
    group.add_argument(
        "--selection",
        choices=["gmm", "none"],
        default="gmm",
        help="none: no split, the warm-up lasts to the end: cross-entropy of the same network",
    )


def _add_cifar_training_flags(released, ours) -> None:
    released.add_argument(
        "--batch_size",
        type=cli.count,
        default=64,
        help="labelled = unlabelled batch; warm-up uses twice that",
    )
    released.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.02, help="initial learning rate"
    )
    ours.add_argument(
        "--lr_drop",
        type=cli.count,
        default=150,
        help="epoch, counted from 0, from which the learning rate is a tenth",
    )
    released.add_argument(
        "--num_epochs", type=cli.count, default=360, help="the last epoch, counted from 0, as in the release"
    )
    ours.add_argument(
        "--warm_up", type=cli.count, help="epochs of warm-up; by default 10, and 20 on cifar100"
    )
    ours.add_argument(
        "--warm-up-views",
        choices=["strong", "weak"],
        default="strong",
        help="strong: colour jitter, crop, flip and affine, as in the release; weak: crop and flip, as DivideMix and C2D",
    )
    released.add_argument(
        "--alpha", type=cli.positive, default=4, help="parameter of the Beta distribution of the mixture"
    )
    released.add_argument(
        "--lambda_u", type=cli.non_negative, default=25, help="final weight of the unlabelled loss"
    )
    released.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    released.add_argument(
        "--p_threshold",
        type=cli.fraction,
        default=0.5,
        help="samples with a clean probability above this are labelled",
    )
    released.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")
    cli.add_cuda_graphs_flag(ours, "full batches after the warm-up")


def cifar_args(argv=None, description: str | None = None) -> Namespace:
    """Parse the flags of Train_cifar.py, and settle the defaults that depend on other flags."""
    parser = cifar_parser(description)
    args = cli.parse_args(parser, argv, PRESETS, OF_FOLDER)
    _settle_mask_flags(parser, args)
    if args.noise_file:
        args.noise_mode = "given"
    check_posterior_flag(parser, args, args.noise_mode, "--noise_mode")
    if args.arch == "narrow" and args.base == "c2d":
        parser.error(
            "argument --arch: narrow is for --base dividemix; encoders for --base c2d are of another shape"
        )
    if args.base == "dividemix" and args.pretrained not in (None, "none"):
        parser.error(f"argument --pretrained: is for --base c2d, got {args.pretrained} with --base dividemix")
    if args.released_softmax is None:
        args.released_softmax = args.fidelity == "released" and args.base == "c2d"
    if args.released_softmax and args.base == "dividemix":
        parser.error("argument --released-softmax: --base dividemix returns logits in the release too")
    if args.warm_up is None:
        args.warm_up = 20 if args.dataset == "cifar100" else 10
    return args


def pretrained_file(args: Namespace) -> Path:
    """The file of base C2D's encoder; the release reads CIFAR-10's for CIFAR-100 too. UserError: not there."""
    if args.pretrained:
        return Path(args.pretrained)
    name = "cifar10" if args.fidelity == "released" else args.dataset
    usual = Path("pretrained") / f"ckpt_{name}_resnet18.pth"
    if not usual.is_file():
        raise UserError(
            f"--base c2d begins from a pre-trained encoder, and there is no {usual}: make one with "
            f"python sanm/pretrain.py --dataset {args.dataset} and name its encoder.safetensors with --pretrained FILE, "
            "or use --pretrained none or --base dividemix"
        )
    return usual


def uses_history(args: Namespace) -> bool:
    """Whether the 90 % rule holds. Labels from a file do not set --r, so for them it holds only if --r is typed."""
    return averages_history(args.r, args.fidelity == "released")


def cifar_notes(args: Namespace) -> list[str]:
    """Lines to print at the start: schedules that do not fit --num_epochs, and whether the 90 % rule is on."""
    notes = []
    if args.selection == "gmm" and args.warm_up > args.num_epochs:
        notes.append(
            f"note: warm-up only, --warm_up {args.warm_up} is not within --num_epochs {args.num_epochs}"
        )
    if args.lr_drop > args.num_epochs:
        notes.append(
            f"note: the learning rate never drops, --lr_drop {args.lr_drop}, --num_epochs {args.num_epochs}"
        )
    if args.selection == "gmm" and uses_history(args):
        notes.append(
            f"90 % rule on, --r {args.r}: clean probabilities come from the mean of the last {HISTORY} loss vectors"
        )
    elif args.selection == "gmm":
        given = " (given labels do not set --r: type --r 0.9 if 90 % are wrong)"
        more = given if args.noise_mode == "given" else ""
        notes.append(
            f"90 % rule off, --r {args.r}: clean probabilities come from the losses of each epoch{more}"
        )
    return notes


def cifar_method(args: Namespace) -> str:
    """The method's name in a result row."""
    if args.selection == "none":
        return "CE"
    base = BASE_NAMES[args.base]
    without = " without reconstruction" if args.recon_weight == 0 else ""
    return f"SANM({base}){without}" if args.masking == "adversarial" else base


def cifar_directory(args: Namespace) -> str:
    """The run directory's name: data, noise, base and seed, then every flag not at its default."""
    fidelity = ["fidelity"] if args.fidelity == "released" else []
    always = ("dataset", "noise_mode", "r", "base", *fidelity, "seed")
    words = ["--dataset", args.dataset, "--base", args.base, "--fidelity", args.fidelity]
    return run_name(args, vars(cifar_args(words)), always)


def cifar_cell(args: Namespace, dataset: str) -> dict:
    """The columns of a result row for the cell of the table. dataset: its name."""
    noise = Path(args.noise_file).name if args.noise_file else args.noise_mode
    profile = "embedded" if args.dataset == "digits" else "paper" if args.num_epochs >= 360 else "short"
    return _cell(dataset, noise, None if args.noise_mode == "given" else args.r, profile)


def _cell(dataset: str, noise: str, rate: float | None, profile: str) -> dict:
    row = {"dataset": dataset, "noise_type": noise, "noise_rate": rate}
    return row | {"imb_factor": None, "ood_ratio": None, "profile": profile}


# Train_clothing1M.py --------------------------------------------------------------------------------------------------


def clothing_parser(description: str | None = None) -> cli.Parser:
    """The parser of Train_clothing1M.py."""
    parser = cli.Parser(prog="Train_clothing1M.py", description=description)
    released, ours = _groups(parser)
    released.add_argument(
        "--data_path",
        default="./Dataset/noise_label_data/Clothing1M",
        metavar="DIR",
        type=cli.place,
        help="folder with Clothing1M's official lists (in it or in its annotations/), or with the release's lists; of a folder "
        "by default ./data",
    )
    released.add_argument(
        "--num_batches", type=cli.count, default=15625, help="batches that a class-balanced subset fills"
    )
    released.add_argument(
        "--num_class",
        type=cli.count,
        default=CLOTHING1M_CLASSES,
        help="classes of Clothing1M, where no other number fits; a folder has its own",
    )
    add_dataset_flag(ours, CLOTHING1M)
    ours.add_argument(
        "--image_size",
        type=cli.count,
        default=224,
        help="pixels of both sides of a crop; images are resized to 8/7 of it (256) before",
    )
    cli.add_image_file_flags(ours, workers=5)
    _add_without_effect(released, "--id", default="clothing1m")
    ours.add_argument(
        "--network", choices=["resnet50", "resnet18"], default="resnet50", help="torchvision's network"
    )
    ours.add_argument(
        "--pretrained",
        metavar="PATH|imagenet|none",
        type=cli.place,
        default="imagenet",
        help="initial weights of the encoder; a file is read as Train_cifar.py reads it",
    )
    _add_clothing_training_flags(released, ours)
    _add_mask_flags(ours, CLOTHING_RULE, recon_weight=0.3)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def _add_clothing_training_flags(released, ours) -> None:
    released.add_argument(
        "--batch_size",
        type=cli.count,
        default=8,
        help="labelled = unlabelled batch, over all processes; the warm-up uses twice that. A smaller last batch is dropped, "
        "so that any number of processes trains alike; under --fidelity released one process keeps it",
    )
    released.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.0009, help="initial learning rate"
    )
    ours.add_argument(
        "--lr_drop",
        type=cli.count,
        default=40,
        help="epoch, counted from 0, from which the learning rate is a tenth",
    )
    released.add_argument(
        "--num_epochs", type=cli.count, default=80, help="the last epoch, counted from 0, as in the release"
    )
    released.add_argument(
        "--alpha", type=cli.positive, default=0.5, help="parameter of the Beta distribution of the mixture"
    )
    _add_without_effect(released, "--lambda_u", type=cli.non_negative, default=0)
    released.add_argument("--T", type=cli.positive, default=0.5, help="sharpening temperature")
    released.add_argument(
        "--p_threshold",
        type=cli.fraction,
        default=0.5,
        help="samples with a clean probability above this are labelled",
    )
    ours.add_argument(
        "--sync_bn",
        action=BooleanOptionalAction,
        help="batch statistics over all processes; by default yes, under --fidelity released no",
    )
    released.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")


def clothing_args(argv=None, description: str | None = None) -> Namespace:
    """Parse the flags of Train_clothing1M.py, and settle the defaults that depend on other flags."""
    parser = clothing_parser(description)
    args = cli.parse_args(parser, argv, PRESETS, CLOTHING_OF_FOLDER)
    _settle_mask_flags(parser, args)
    if args.dataset == CLOTHING1M and args.num_class != CLOTHING1M_CLASSES:
        parser.error(
            f"argument --num_class: Clothing1M has {CLOTHING1M_CLASSES} classes, got {args.num_class}"
        )
    if args.image_size < 64:
        parser.error(f"argument --image_size: must be at least 64, got {args.image_size}")
    args.sync_bn = args.fidelity != "released" if args.sync_bn is None else args.sync_bn
    return args


def clothing_method(args: Namespace) -> str:
    """The method's name in a result row."""
    return "SANM(DivideMix)" if args.masking == "adversarial" else "DivideMix"


def clothing_directory(args: Namespace) -> str:
    """The run directory's name: data and seed, then every flag not at its default."""
    always = [*(["fidelity"] if args.fidelity == "released" else []), "seed"]
    defaults = vars(clothing_args(["--dataset", args.dataset, "--fidelity", args.fidelity]))
    return run_name_of_files(args, defaults, always, "num_class")


def clothing_cell(args: Namespace) -> dict:
    """The columns of a result row for the cell of the table."""
    defaults = clothing_args([])
    bounds = ("num_epochs", "num_batches", "image_size")
    full = (args.dataset, args.network) == (CLOTHING1M, defaults.network)
    full &= all(getattr(args, bound) >= getattr(defaults, bound) for bound in bounds)
    return _cell(args.dataset, noise_of_files(args), None, "paper" if full else "short")


# pretrain.py ----------------------------------------------------------------------------------------------------------


def pretrain_parser(description: str | None = None) -> cli.Parser:
    """The parser of pretrain.py, which the release does not have: the recipe's settings under SupContrast's names."""
    parser = cli.Parser(
        prog="pretrain.py",
        description=description,
        epilog="There is no released code of this step: --fidelity released changes the precision alone. No label is used "
        "in training, so there is no label noise to choose and --noise_file is refused.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, NAME for DATA_PATH/NAME.npz, or folder for the images in "
        "DATA_PATH",
    )
    data.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="folder of the data sets"
    )
    add_folder_flags(data)
    training = add_recipe_flags(parser)
    training.add_argument(
        "--model",
        choices=["resnet18"],
        default="resnet18",
        help="ResNet-18 for small images; its narrow form below 16 pixels",
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def pretrain_args(argv=None, description: str | None = None) -> Namespace:
    """Parse the flags of pretrain.py, and settle the defaults that depend on other flags."""
    parser = pretrain_parser(description)
    args = cli.parse_args(parser, argv, PRESETS, {})
    if args.noise_file:
        parser.error(f"argument --noise_file: no label is used in pre-training, got {args.noise_file}")
    settle(args)
    return args


def pretrain_directory(args: Namespace) -> str:
    """The run directory's name: data, epochs and seed, then every flag not at its default."""
    defaults = vars(pretrain_args(["--dataset", args.dataset, "--batch_size", str(args.batch_size)]))
    defaults |= {"batch_size": 1024, "num_epochs": args.num_epochs}
    return "pretrain-" + run_name(args, defaults, ("dataset", "epochs", "seed"))


def pretrain_cell(args: Namespace, dataset: str) -> dict:
    """The columns of a result row for the cell of the table. dataset: its name."""
    profile = "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 1000 else "short"
    return _cell(dataset, "none", None, profile)
