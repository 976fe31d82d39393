"""The command lines of the three scripts: flags, their checks, and the names of runs and results."""

from argparse import BooleanOptionalAction, Namespace
from argparse import _ArgumentGroup as ArgumentGroup
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.noise import POSTERIOR_TYPES
from common.pretraining.flags import add_recipe_flags, settle
from common.runs import cli
from common.runs.cli import UserError
from common.runs.data_flags import (
    FOLDER,
    MINI_IMAGENET,
    POSTERIOR_HELP,
    add_folder_flags,
    add_posterior_flag,
    check_posterior_flag,
)
from common.runs.names import run_name
from manifold_dividemix.choices import ARCH_HELP, ARCHS, Lambdas, removal_count, split_epochs

PRESETS = Path(__file__).with_name("presets.toml")
ENCODER = "save/last.pth"
LISTS = ("red", "blue")  # of mini-ImageNet
# defaults that differ for a folder: its images and labels as they are
OF_FOLDER = {"noise_type": "given", "ood_ratio": 0.0}
# flags of the release that have no effect, there or here: type, default, and what decides in their place
WITHOUT_EFFECT: dict[str, tuple[Callable[[str], Any], float | str, str]] = {
    "--num-class": (cli.count, 100, "the data set decides"),
    "--print-freq": (int, 100, "the log has a row per epoch"),
    "--drops": (float, 0.005, "nothing reads it"),
    "--lambda_ce": (float, 1, "nothing reads it"),
    "--emb-loss": (str, "no", "nothing reads it"),
}


# Run directories are named after flags in the order in which they stand here.


def _groups(parser: cli.Parser) -> tuple[ArgumentGroup, ArgumentGroup]:
    return parser.add_argument_group("of the release"), parser.add_argument_group("not in the release")


def _add_without_effect(group: ArgumentGroup, *names: str) -> None:
    for name in names:
        type_, default, instead = WITHOUT_EFFECT[name]
        group.add_argument(name, type=type_, default=default, help=f"no effect: {instead}")


# data -----------------------------------------------------------------------------------------------------------------


def _add_open_set_flags(released: ArgumentGroup, further: ArgumentGroup, datasets_help: str = "") -> None:
    """Data in memory and their corruption."""
    further.add_argument(
        "--dataset",
        default="cifar100",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, NAME for DATA_PATH/NAME.npz, folder for the images in "
        f"DATA_PATH{datasets_help}",
    )
    _add_data_dir(released, "where the data sets are; the folder of the CIFAR batches too, as in the release")
    released.add_argument(
        "--corruption",
        metavar="POOL",
        help="the pool of OOD images: imagenet32, place365, photographs (scikit-learn's two), or any data set; "
        "by default imagenet32, and photographs on digits",
    )
    further.add_argument(
        "--ood-dir",
        metavar="DIR",
        type=cli.place,
        help="the files of that pool; by default DATA_PATH/imagenet32, DATA_PATH/places365 or DATA_PATH",
    )
    released.add_argument("--ood-ratio", type=cli.fraction, default=0.2, help="ratio of OOD images")
    further.add_argument(
        "--open-set-cache",
        metavar="DIR|none",
        type=cli.place,
        help="cache of images taken from files; by default DATA_PATH/open_set",
    )
    _add_without_effect(released, "--num-class")


def _add_data_dir(group: ArgumentGroup, text: str) -> None:
    names = "--data-dir", "--data_path"
    group.add_argument(*names, dest="data_path", default="./data", metavar="DIR", type=cli.place, help=text)


def _add_noise_flags(
    released: ArgumentGroup, further: ArgumentGroup, types: list[str], default: str | None, help_of_type: str
) -> None:
    """Label noise."""
    released.add_argument("--noise-type", choices=types, default=default, help=help_of_type)
    released.add_argument(
        "--noise-ratio", type=cli.fraction, default=0.2, help="ratio of mislabelled samples to all images"
    )
    if "sym" in types:
        add_posterior_flag(further)
        further.add_argument(
            "--noise-seed",
            type=cli.seed,
            default=0,
            help="seed of the labels; the OOD images are the benchmark's under any seed",
        )
        further.add_argument(
            "--label-rng",
            choices=["python", "numpy"],
            default="python",
            help="generator of symmetric labels: python, as in the release; numpy, as in SNCF",
        )


def _add_mini_imagenet_flags(further: ArgumentGroup, *names_of_size: str) -> None:
    """Image files of mini-ImageNet. names_of_size: further names of --img-size."""
    further.add_argument(
        "--img-size",
        *names_of_size,
        type=cli.count,
        default=32,
        help="pixels of both sides; the paper's size is not known, later work compares at 32",
    )
    further.add_argument(
        "--on_bad_image",
        choices=["error", "skip"],
        default="error",
        help="images that are missing or damaged: stop, or leave them out",
    )
    further.add_argument(
        "--decoded",
        metavar="DIR|none",
        type=cli.place,
        help="cache of decoded images; by default DATA_PATH/decoded",
    )


def drawn_noise(args: Namespace) -> str:
    """The noise type; "given" if a file has the labels."""
    return "given" if args.noise_file else args.noise_type


def _settle_corruption(parser: cli.Parser, args: Namespace) -> None:
    """The default of --corruption, which depends on the data set; the check of --posterior."""
    check_posterior_flag(parser, args, drawn_noise(args), "--noise-type")
    if args.corruption is None:
        args.corruption = "photographs" if args.dataset == "digits" else "imagenet32"


# training, of both train_semisup scripts ------------------------------------------------------------------------------


def _add_training_flags(
    released: ArgumentGroup, further: ArgumentGroup, *, epochs: int, warm_up: int, start_factor: float
) -> None:
    """Flags that both scripts have. The arguments are the defaults in which they differ."""
    _add_network_flags(released)
    _add_schedule_flags(released, further, epochs, warm_up)
    _add_outlier_flags(released, further, start_factor)
    _add_loss_flags(released, further)
    further.add_argument(
        "--eval-train",
        action=BooleanOptionalAction,
        default=False,
        help="log the accuracy on the noisy training labels after each epoch, which costs a pass; nothing is selected by it",
    )
    released.add_argument(
        "--exp-dir",
        dest="out",
        nargs="?",
        metavar="DIR",
        type=cli.place,
        help="the release's name of --out; without a value, its default",
    )
    _add_without_effect(released, "--print-freq", "--drops", "--lambda_ce", "--emb-loss")


def _add_network_flags(released: ArgumentGroup) -> None:
    released.add_argument("--arch", choices=list(ARCHS), default="resnet18", help=ARCH_HELP)
    released.add_argument(
        "--pretrained",
        metavar="FILE|none",
        nargs="?",  # the release's README has it without a value
        type=cli.place,
        const=ENCODER,
        default=ENCODER,
        help="the pre-trained encoder: encoder.safetensors of pretrain.py, or a checkpoint in SupContrast's format",
    )
    released.add_argument(
        "--weights",
        choices=["finetune", "freeze"],
        default="finetune",
        help="freeze: the encoder is not trained, its batch-norm statistics do not change",
    )


def _add_schedule_flags(released: ArgumentGroup, further: ArgumentGroup, epochs: int, warm_up: int) -> None:
    released.add_argument("--epochs", type=cli.count, default=epochs, help="epochs, warm-up included")
    released.add_argument("--warmup-epoch", type=cli.count_or_zero, default=warm_up, help="epochs of warm-up")
    released.add_argument(
        "--batch-size", type=cli.count, default=64, help="of every pass; over all processes"
    )
    released.add_argument(
        "--lr-backbone", type=cli.positive, default=0.03, help="learning rate of the encoder; cosine to 0"
    )
    released.add_argument(
        "--lr-head",
        type=cli.positive,
        default=0.3,
        help="learning rate of classifier and projection; cosine to 0",
    )
    released.add_argument("--weight-decay", type=cli.non_negative, default=5e-4, help="weight decay of SGD")
    released.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    further.add_argument(
        "--bn-mode",
        choices=["train", "frozen", "warm-up"],
        help="whether batch norms use batch statistics: always, never, in the warm-up only; by default train, and under "
        "--fidelity released frozen for data in memory, warm-up for mini-ImageNet",
    )
    released.add_argument("--gpu", type=cli.count_or_zero, default=0, help="which CUDA device")


def _add_outlier_flags(released: ArgumentGroup, further: ArgumentGroup, start_factor: float) -> None:
    """Outliers and split."""
    released.add_argument(
        "--remove-ood",
        type=cli.fraction,
        default=0.01,
        help="q: ratio of samples that each split removes in addition; 0: none is ever removed",
    )
    further.add_argument(
        "--ood-start-factor",
        type=cli.non_negative,
        default=start_factor,
        help="times q: ratio of samples removed at the start",
    )
    further.add_argument("--knn-k", type=cli.count, default=10, help="neighbours of the outlier score")
    further.add_argument(
        "--knn-encoder",
        choices=["current", "pretrained"],
        default="current",
        help="whose embeddings are scored: of the encoder in training, as in the release; or of the encoder before training",
    )
    released.add_argument(
        "--clustering",
        type=_switch,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="split again every --interval epochs, not only after the warm-up",
    )
    further.add_argument(
        "--no-clustering", dest="clustering", action="store_false", help="split only after the warm-up"
    )
    released.add_argument("--interval", type=cli.count, default=30, help="a split in epochs it divides")
    released.add_argument(
        "--p-threshold",
        type=cli.fraction,
        default=0.3,
        help="samples with a larger clean probability are labelled",
    )
    further.add_argument(
        "--selection",
        choices=["gmm", "none"],
        default="gmm",
        help="none: no split, the warm-up lasts to the end",
    )


def _switch(text: str) -> bool:
    """true or false, as in the release's commands. ValueError: another word."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _add_loss_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    default = Lambdas()
    for flag, value, what in (
        ("lambda_x", default.x, "labelled loss of mixed inputs"),
        ("lambda_u", default.u, "unlabelled loss of mixed inputs, after the ramp"),
        ("lambda_xe", default.xe, "labelled loss of mixed embeddings"),
        ("lambda_ue", default.ue, "unlabelled loss of mixed embeddings, after the ramp"),
        ("lambda_c", default.c, "contrastive loss of unlabelled samples"),
    ):
        released.add_argument(f"--{flag}", type=cli.non_negative, default=value, help=f"weight of the {what}")
    released.add_argument("--temperature", type=cli.positive, default=0.5, help="sharpening temperature")
    released.add_argument(
        "--alpha", type=cli.positive, default=4, help="parameter of the Beta distribution of the mixture"
    )
    released.add_argument(
        "--thr_un",
        type=cli.fraction,
        default=0.9,
        help="guesses are trained on from this sharpened probability on",
    )
    released.add_argument(
        "--LN-loss",
        choices=["RL", "CE"],
        default="RL",
        help="labelled loss: symmetric or plain cross-entropy",
    )
    further.add_argument(
        "--rce",
        choices=["released", "log"],
        default="released",
        help="reverse part of the soft symmetric cross-entropy: a second softmax over the targets, the only form known to "
        "have been run; or their logarithm",
    )
    further.add_argument(
        "--ramp",
        choices=["fixed", "released"],
        help="released: counts finished epochs twice; by default as --fidelity says",
    )
    further.add_argument(
        "--warmup-mask",
        choices=["sample", "released"],
        help="released: removed samples are trained on too, the mean loss is scaled; by default as --fidelity says",
    )
    further.add_argument(
        "--warmup-loss",
        choices=["SCE", "CE"],
        default="SCE",
        help="loss of the warm-up: symmetric or plain cross-entropy",
    )
    further.add_argument(
        "--cuda_graphs",
        action="store_true",
        default=None,
        help="refused, though other scripts have it: a step has five forward passes before its backward pass, and each replay "
        "would overwrite what the one before it keeps for it",
    )


def _settle_training(parser: cli.Parser, args: Namespace, released_bn: str, released_mask: str) -> None:
    """The defaults that depend on --fidelity, and the checks of several flags together.

    released_bn, released_mask: what the script's release does.
    """
    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    released = args.fidelity == "released"
    args.bn_mode = args.bn_mode or (released_bn if released else "train")
    args.ramp = args.ramp or ("released" if released else "fixed")
    mask = args.warmup_mask or ("released" if released else "sample")
    args.warmup_mask = released_mask if mask == "released" else mask
    args.num_epochs = args.epochs  # what result rows read
    if args.cuda_graphs:
        parser.error(
            "argument --cuda_graphs: a step of Manifold DivideMix has five forward passes before its backward pass, a recorded "
            "graph keeps the values of one; leave it out"
        )
    if args.batch_size < 2:
        parser.error(f"argument --batch-size: must be at least 2, got {args.batch_size}")
    if args.knn_encoder == "pretrained" and args.pretrained == "none":
        parser.error("argument --knn-encoder: pretrained needs a pre-trained encoder, got --pretrained none")
    if args.selection == "gmm" and args.warmup_epoch >= args.epochs:
        processes.say(
            f"note: warm-up only, --warmup-epoch {args.warmup_epoch} is not below --epochs {args.epochs}"
        )


def splits_of(args: Namespace) -> list[int]:
    """The epochs, from 0, that begin with a split (README, section 4.4)."""
    if args.selection == "none":
        return []
    return split_epochs(args.epochs, args.warmup_epoch, args.interval, args.clustering)


def check_sizes(args: Namespace, size: int) -> None:
    """UserError: a removal that leaves too few of `size` samples, or batches that the processes cannot share."""
    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    if size < 2:
        raise UserError("one training image has no neighbours: use a larger --limit_train or data set")
    removed = removal_count(args.epochs - 1, size, args.remove_ood, args.ood_start_factor, splits_of(args))
    if size - removed < 2:
        raise UserError(
            f"--remove-ood {args.remove_ood}: {removed} of {size} images would be removed in the end; "
            "use a smaller one"
        )
    if args.batch_size % processes.world():
        raise UserError(
            f"--batch-size {args.batch_size}: cannot be cut into equal pieces for {processes.world()} processes"
        )
    if processes.world() > 1 and size < args.batch_size:
        raise UserError(
            f"--batch-size {args.batch_size}: more than all {size} images, "
            f"which {processes.world()} processes share"
        )


def method(args: Namespace) -> str:
    """The method's name in a result row of either script."""
    if args.selection == "none":
        pretrained = "" if args.pretrained == "none" else " (pre-trained)"
        return args.warmup_loss + pretrained + (" with OOD removal" if args.remove_ood else "")
    parts = {
        "OOD removal": args.remove_ood == 0,
        "manifold mixup": args.lambda_xe == args.lambda_ue == 0,
        "contrastive loss": args.lambda_c == 0,
        "unlabelled losses": args.lambda_u == args.lambda_ue == 0,
    }
    left_out = " and ".join(part for part, is_out in parts.items() if is_out)
    scored = ", scored by the pre-trained encoder" if args.knn_encoder == "pretrained" else ""
    return "Manifold DivideMix" + (f" without {left_out}" if left_out else "") + scored


# train_semisup.py -----------------------------------------------------------------------------------------------------


def make_cifar_parser() -> cli.Parser:
    """The parser of train_semisup.py."""
    parser = cli.Parser(
        prog="train_semisup.py",
        description="Manifold DivideMix (CVPR-W 2024) on images with wrong labels and OOD images; also on the embedded digits",
    )
    released, further = _groups(parser)
    _add_open_set_flags(released, further)
    _add_noise_flags(
        released,
        further,
        ["sym", "asym", "superclass", *POSTERIOR_TYPES, "no", "given"],
        "sym",
        "sym: a class drawn from all; asym: the look-alike of 10 classes, else the next of a block of five; superclass: "
        f"the next of CIFAR-100's superclass; {POSTERIOR_HELP}; given: the labels of --noise_file, of the .npz or, by "
        "default, of the folder",
    )
    _add_training_flags(released, further, epochs=300, warm_up=5, start_factor=10)
    released.add_argument(
        "--workers",
        type=cli.count_or_zero,
        default=8,
        help=f"of {FOLDER}: processes that decode its images, once; other images stay on the device",
    )
    add_folder_flags(further, without=("workers",))
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_cifar_args(argv: list[str] | None = None) -> Namespace:
    """The checked arguments of train_semisup.py, with the defaults that depend on other flags."""
    parser = make_cifar_parser()
    args = cli.parse_args(parser, argv, PRESETS, OF_FOLDER)
    _settle_corruption(parser, args)
    _settle_training(parser, args, released_bn="frozen", released_mask="batch")
    return args


def cifar_directory(args: Namespace) -> str:
    """The run directory's name: data, corruption, noise and seed, then every flag that is not at its default."""
    always = ("dataset", "corruption", "noise_ratio", "ood_ratio", "seed")
    defaults = vars(parse_cifar_args(["--dataset", args.dataset, "--fidelity", args.fidelity]))
    return run_name(args, {**defaults, "fidelity": "paper"}, always)


def cifar_cell(args: Namespace, name: str) -> dict:
    """The columns of a result row for the data set `name`, its noise and the profile."""
    noise = Path(args.noise_file).name if args.noise_file else args.noise_type
    rate = {"no": 0.0, "given": None}.get(args.noise_type, args.noise_ratio)
    return {
        "dataset": name,
        "noise_type": f"{noise} + {args.corruption}" if args.ood_ratio else noise,
        "noise_rate": None if args.noise_file else rate,
        "imb_factor": None,
        "ood_ratio": args.ood_ratio,
        "profile": "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 300 else "short",
    }


# train_semisup_miniimagenet.py ----------------------------------------------------------------------------------------


def make_mini_imagenet_parser() -> cli.Parser:
    """The parser of train_semisup_miniimagenet.py."""
    parser = cli.Parser(
        prog="train_semisup_miniimagenet.py",
        description="Manifold DivideMix (CVPR-W 2024) on mini-ImageNet with controlled web noise, CNWL",
    )
    released, further = _groups(parser)
    _add_mini_imagenet_flags(further)
    _add_data_dir(released, "split/, all_images/ and validation/ are in it, or in its mini-imagenet/")
    _add_without_effect(released, "--num-class")
    released.add_argument(
        "--workers", type=cli.count_or_zero, default=8, help="processes that decode images, once at the start"
    )
    _add_noise_flags(
        released, further, list(LISTS), "red", "red: wrong labels and images of the web; blue: synthetic"
    )
    _add_training_flags(released, further, epochs=50, warm_up=10, start_factor=1)
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_mini_imagenet_args(argv: list[str] | None = None) -> Namespace:
    """The checked arguments of train_semisup_miniimagenet.py, with the defaults that depend on other flags."""
    parser = make_mini_imagenet_parser()
    finder = cli.Parser(add_help=False)
    finder.add_argument("--dataset")
    if finder.parse_known_args(argv)[0].dataset == FOLDER:
        parser.error(
            "argument --dataset: folder is not for this script, which keeps the images of mini-ImageNet in memory: use "
            "manifold_dividemix/train_semisup.py with --image_size 32, or any script of the other papers"
        )
    args = cli.parse_args(parser, argv, PRESETS)
    _settle_training(parser, args, released_bn="warm-up", released_mask="all")
    args.dataset = MINI_IMAGENET
    return args


def mini_imagenet_directory(args: Namespace) -> str:
    """The run directory's name: list, image size and seed, then every flag that is not at its default."""
    always = ("dataset", "noise_type", "noise_ratio", "img_size", "seed")
    defaults = vars(parse_mini_imagenet_args(["--fidelity", args.fidelity]))
    return run_name(args, {**defaults, "fidelity": "paper"}, always)


def mini_imagenet_cell(args: Namespace, name: str) -> dict:
    """The columns of a result row for the data set `name`, its noise and the profile."""
    return {
        "dataset": name,
        "noise_type": Path(args.noise_file).name if args.noise_file else args.noise_type,
        "noise_rate": None if args.noise_file else args.noise_ratio,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "paper" if args.epochs >= 50 and args.img_size >= 32 else "short",
    }


# pretrain.py ----------------------------------------------------------------------------------------------------------


def make_pretrain_parser() -> cli.Parser:
    """The parser of pretrain.py, all of whose flags are this project's; those of the data are as in train_semisup.py."""
    parser = cli.Parser(
        prog="pretrain.py",
        description="SimCLR pre-training of Manifold DivideMix's encoder on the corrupted images, without labels; also on the "
        "embedded digits",
        epilog="The release does not include this step: --fidelity released changes the precision alone. Training uses no "
        f"labels. The flags of label noise choose the list of {MINI_IMAGENET}, and let a command be that of train_semisup.",
    )
    data = parser.add_argument_group("data")
    _add_open_set_flags(data, data, f", or {MINI_IMAGENET}")
    _add_noise_flags(
        data,
        data,
        ["sym", "asym", "superclass", *POSTERIOR_TYPES, "no", "given", *LISTS],
        None,
        f"red, blue: which list of {MINI_IMAGENET} (by default red); else without effect",
    )
    _add_mini_imagenet_flags(data, "--image_size")
    add_folder_flags(data, without=("image_size", "on_bad_image", "workers"))
    training = add_recipe_flags(parser)
    training.add_argument("--arch", choices=list(ARCHS), default="resnet18", help=ARCH_HELP)
    training.add_argument("--gpu", type=cli.count_or_zero, default=0, help="which CUDA device")
    training.add_argument("--knn-k", type=cli.count, default=10, help="neighbours of the outlier score")
    training.add_argument(
        "--workers", type=cli.count_or_zero, default=8, help="processes that decode image files"
    )
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_pretrain_args(argv: list[str] | None = None) -> Namespace:
    """The checked arguments of pretrain.py, with the defaults that depend on other flags."""
    parser = make_pretrain_parser()
    args = cli.parse_args(parser, argv, PRESETS, OF_FOLDER)
    mini = args.dataset == MINI_IMAGENET
    args.noise_type = args.noise_type or ("red" if mini else "sym")
    if (args.noise_type in LISTS) != mini:
        parser.error(f"argument --noise-type: {args.noise_type} is not for --dataset {args.dataset}")
    if args.noise_file:
        parser.error(f"argument --noise_file: no label is used in pre-training, got {args.noise_file}")
    _settle_corruption(parser, args)
    if args.noise_type in POSTERIOR_TYPES:
        args.noise_type = "no"  # no label is used, so no posterior is made
    settle(args)
    return args


def pretrain_directory(args: Namespace) -> str:
    """The run directory's name: data, epochs and seed, then every flag that is not at its default."""
    defaults = vars(parse_pretrain_args(["--dataset", args.dataset, "--batch_size", str(args.batch_size)]))
    defaults |= {"batch_size": 1024, "num_epochs": args.num_epochs}
    always = ["dataset", "epochs", "seed"]
    always += ["noise_type", "noise_ratio"] if args.dataset == MINI_IMAGENET else ["corruption", "ood_ratio"]
    return "pretrain-" + run_name(args, defaults, always)


def pretrain_cell(args: Namespace, name: str) -> dict:
    """The columns of a result row for the data set `name`, its corruption and the profile."""
    mini = args.dataset == MINI_IMAGENET
    noise = args.noise_type if mini else args.corruption if args.ood_ratio else "none"
    return {
        "dataset": name,
        "noise_type": noise,
        "noise_rate": args.noise_ratio if mini else None,
        "imb_factor": None,
        "ood_ratio": None if mini else args.ood_ratio,
        "profile": "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 1000 else "short",
    }
