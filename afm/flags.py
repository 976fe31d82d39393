"""The command line of afm/train.py: its flags, their checks, and the names of runs and results."""

from argparse import BooleanOptionalAction, Namespace
from argparse import _ArgumentGroup as ArgumentGroup
from pathlib import Path
from typing import TYPE_CHECKING

from afm.choices import (
    ATTENTIONS,
    IMAGE_SIZE,
    INTERACTIONS,
    NETWORKS,
    ON_DISK,
    ORDERS,
    TARGETS,
    WEIGHTS,
    reads_files,
)
from common.noise import NOISE_TYPES
from common.runs import cli
from common.runs.data_flags import (
    FOLDER,
    POSTERIOR_HELP,
    add_folder_flags,
    add_posterior_flag,
    check_posterior_flag,
)
from common.runs.names import run_name

if TYPE_CHECKING:
    from afm.data import Data

PRESETS = Path(__file__).with_name("presets.toml")
# what --fidelity decides where the flag is not typed
DEFAULTS = {
    "paper": {"attention": "relu-sigmoid", "mix_target": "soft", "group_order": "random", "group_rounds": 4},
    "released": {"attention": "complement", "mix_target": "both", "group_order": "halves", "group_rounds": 1},
}
# defaults that differ for a folder: its labels as they are
OF_FOLDER = {"noise_type": "given"}
# flags of the release that are other names here. `parse_args` sets them to None once it has read them:
#   --weight-naive  for --weight-mixed, swapped as in the release
#   --weight-afm    for --weight-plain, swapped as in the release
#   --checkpoint    for --out; the release never reads it
SWAPPED_NAMES = {"weight_naive": "weight_mixed", "weight_afm": "weight_plain"}


def make_parser() -> cli.Parser:
    """The release's flags with their defaults, further flags, and the flags that all scripts share."""
    parser = cli.Parser(
        prog="train.py",
        description="Attentive Feature Mixup (ECCV 2020) on Food-101N, Clothing1M, CIFAR-10/100, MNIST and the embedded digits.",
    )
    released = parser.add_argument_group("of the release")
    further = parser.add_argument_group("not in the release")
    for add_flags in (add_data_flags, add_network_flags, add_method_flags, add_training_flags):
        add_flags(released, further)
    cli.add_shared_flags(parser, default_seed=0)
    return parser


def add_data_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    """Which images and labels."""
    released.add_argument(
        "--dataset",
        default="food",
        help="food (Food-101N, tested on Food-101), clothing1m, cifar10, cifar100, mnist, fashion_mnist, digits, NAME "
        "for DATA_ROOT/NAME.npz, or folder for the images in DATA_ROOT, which are read from their files in every epoch with "
        f"--image_size {IMAGE_SIZE}",
    )
    released.add_argument(
        "--data-root",
        "--data_path",
        metavar="DIR",
        type=cli.place,
        help="where the data set is; by default ./data/food, ./data/clothing1m, and ./data for the others",
    )
    further.add_argument(
        "--train-on",
        choices=["noisy", "noisy+verified", "noisy+clean"],
        default="noisy",
        help="Clothing1M: the million noisy images; with the images verified to be right; with fine-tuning on 50k clean",
    )
    further.add_argument(
        "--noise-type",
        choices=[*NOISE_TYPES, "given", "none"],
        default="symmetric",
        help="label noise that is added to data sets with clean labels; "
        f"{POSTERIOR_HELP}; given: the noisy_labels of an .npz or, by default, the labels of the folder",
    )
    further.add_argument("--noise-rate", type=cli.fraction, default=0.5, help="rate of the added noise")
    add_posterior_flag(further)
    further.add_argument(
        "--on_bad_image",
        choices=["error", "skip"],
        default="error",
        help="missing or damaged images: stop with an error, or leave them out",
    )
    further.add_argument(
        "--image-cache",
        metavar="DIR",
        type=cli.place,
        help="read images from a cache made by python -m common.datasets cache",
    )
    released.add_argument("--workers", type=cli.count_or_zero, default=4, help="processes that decode images")
    cli.add_decode_flag(further)
    add_folder_flags(further, without=("on_bad_image", "workers"))


def add_network_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    """The backbone and its classifiers."""
    released.add_argument(
        "--network",
        choices=NETWORKS,
        default="resnet50",
        help="backbone; torchvision's have a 3x3 stem below 64 pixels and are one narrow ResNet below 16; preact_resnet18 "
        "always has that stem, and a narrow form of its own below 16; preact_narrow is that form at any size",
    )
    further.add_argument(
        "--pretrained",
        metavar="PATH|imagenet|none",
        type=cli.place,
        help="initial weights; by default imagenet for food and clothing1m, else none",
    )
    further.add_argument(
        "--shared-classifier",
        action=BooleanOptionalAction,
        default=True,
        help="one classifier for mixed and plain features",
    )


def add_method_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    """Groups, attention, mixtures and the weights of the losses."""
    further.add_argument("--group-size", type=cli.count, default=2, metavar="K", help="samples in a group")
    further.add_argument(
        "--group-rounds",
        type=cli.count,
        help="groups that each sample of a batch is in; by default 4 (our choice, the paper's number is not known), 1 under "
        "--fidelity released",
    )
    further.add_argument(
        "--group-order",
        choices=ORDERS,
        help="how the first round's groups are formed; by default random, halves under --fidelity released",
    )
    further.add_argument(
        "--pair-chunks",
        type=cli.count,
        help="cut the batch into this many pieces and form the halves inside each, as the release does on this many GPUs; by "
        "default 1, under --fidelity released one per process; for --group-order halves",
    )
    further.add_argument(
        "--interaction", choices=INTERACTIONS, default="sum", help="how projected members are fused"
    )
    further.add_argument(
        "--attention",
        choices=ATTENTIONS,
        help="attention of the scores: relu-sigmoid (Figure 2) is the default; complement (for pairs) under --fidelity "
        "released",
    )
    further.add_argument(
        "--attn-hidden",
        type=cli.count_or_zero,
        default=0,
        metavar="N",
        help="width of one more layer before the scores; 0: none",
    )
    further.add_argument(
        "--weights", choices=WEIGHTS, default="attentive", help="mixing weights: learnt, 1/K, or Dirichlet"
    )
    further.add_argument(
        "--mix-alpha", type=cli.positive, default=1.0, help="parameter of the random weights' distribution"
    )
    further.add_argument(
        "--mix-target",
        choices=TARGETS,
        help="label of a mixture: soft, by the mixing weights, is the default; both, all labels alike, under --fidelity "
        "released",
    )
    further.add_argument("--detach-target", action="store_true", help="no gradient through a mixture's label")
    further.add_argument(
        "--mix-at", choices=["feature", "input"], default="feature", help="input: plain mixup of random pairs"
    )
    further.add_argument("--weight-mixed", type=cli.non_negative, help="weight of the mixed loss (1.5)")
    further.add_argument("--weight-plain", type=cli.non_negative, help="weight of the plain loss (0.5)")
    further.add_argument(
        "--lam", type=cli.fraction, help="sets the two loss weights to S LAM and S (1 - LAM)"
    )
    further.add_argument("--lam-scale", type=cli.positive, default=2.0, metavar="S", help="S of --lam")
    released.add_argument(
        "--weight-naive",
        type=cli.non_negative,
        help="the release's name for --weight-mixed (the release swaps the two names)",
    )
    released.add_argument(
        "--weight-afm",
        type=cli.non_negative,
        help="the release's name for --weight-plain (the release swaps the two names)",
    )


def add_training_flags(released: ArgumentGroup, further: ArgumentGroup) -> None:
    """Batches, SGD and what is kept."""
    released.add_argument("--train-batch", type=cli.count, default=256, help="batch size over all processes")
    released.add_argument("--test-batch", type=cli.count, default=200, help="batch size of the test")
    released.add_argument("--lr", type=cli.positive, default=0.01, help="initial learning rate")
    released.add_argument(
        "--schedule",
        type=cli.count,
        nargs="+",
        default=[15, 25],
        help="multiply the learning rate by gamma after these epochs",
    )
    released.add_argument("--gamma", type=cli.positive, default=0.1, help="factor of the learning rate")
    released.add_argument(
        "--epochs",
        type=cli.count,
        default=30,
        dest="num_epochs",
        help="epochs, those of fine-tuning included",
    )
    further.add_argument(
        "--finetune-epochs", type=cli.count, default=5, help="last epochs on clean images, for noisy+clean"
    )
    further.add_argument(
        "--finetune-lr", type=cli.positive, default=0.001, help="learning rate of those epochs"
    )
    released.add_argument("--momentum", type=cli.fraction, default=0.9, help="of SGD")
    released.add_argument("--weight-decay", type=cli.non_negative, default=1e-4, help="of SGD, on everything")
    further.add_argument(
        "--sync-bn",
        action=BooleanOptionalAction,
        help="batch statistics over all processes; by default yes, under --fidelity released no",
    )
    further.add_argument(
        "--save-every",
        type=cli.count_or_zero,
        default=0,
        metavar="N",
        help="keep every N-th epoch's weights too",
    )
    released.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=cli.place,
        help="another name for --out; the release never reads it",
    )
    released.add_argument(
        "--device_ids",
        metavar="IDS",
        help="which CUDA devices, as CUDA_VISIBLE_DEVICES; by default all visible",
    )


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS, OF_FOLDER)
    released = args.fidelity == "released"
    settle_loss_weights(parser, args)
    defaults = dict(DEFAULTS[args.fidelity])
    if args.mix_at == "input":  # mixup has partners, not groups
        defaults |= {"group_order": "halves", "group_rounds": 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    halves = args.group_order == "halves"
    args.pair_chunks = args.pair_chunks or (processes.planned() if released and halves else 1)
    args.sync_bn = not released if args.sync_bn is None else args.sync_bn
    args.pretrained = args.pretrained or ("imagenet" if args.dataset in ON_DISK else "none")
    args.out, args.checkpoint = args.out or args.checkpoint, None
    if args.dataset in ON_DISK or args.noise_file:
        args.noise_type = "given"
    check_args(parser, args)
    return args


def check_args(parser: cli.Parser, args: Namespace) -> None:
    """End with one line where flags do not fit each other."""
    check_posterior_flag(parser, args, args.noise_type, "--noise-type")
    if args.group_size < 2:
        parser.error(f"argument --group-size: a group has at least 2 members, got {args.group_size}")
    if args.attention == "complement" and args.weights == "attentive" and args.group_size != 2:
        parser.error(
            f"argument --group-size: --attention complement is for pairs, got {args.group_size}: add --attention relu-sigmoid"
        )
    if args.pair_chunks > 1 and args.group_order != "halves":
        parser.error(
            f"argument --pair-chunks: {args.pair_chunks} pieces are for halves, not for random groups: add --group-order halves"
        )
    if args.noise_type != "given" and args.dataset == FOLDER and reads_files(args):
        parser.error(
            f"argument --noise-type: {args.noise_type} noise is drawn on images in memory: use an --image_size other "
            f"than {IMAGE_SIZE}, which reads the files"
        )
    if args.train_on != "noisy" and args.dataset != "clothing1m":
        parser.error(
            f"argument --train-on: {args.train_on} is a setting of clothing1m, not of {args.dataset}"
        )
    if args.train_on == "noisy+clean" and args.finetune_epochs >= args.num_epochs:
        parser.error(
            f"argument --finetune-epochs: must be below --epochs {args.num_epochs}, got {args.finetune_epochs}"
        )
    if args.mix_at == "input":
        check_mixup(parser, args)


def settle_loss_weights(parser: cli.Parser, args: Namespace) -> None:
    """Settle W_mix and W_plain [5] from --weight-mixed and --weight-plain, the release's swapped names, or --lam."""
    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    for old, new in SWAPPED_NAMES.items():
        if getattr(args, old) is None:
            continue
        flags = f"--{old.replace('_', '-')}", f"--{new.replace('_', '-')}"
        if getattr(args, new) is not None:
            parser.error(f"argument {flags[0]}: is the release's name for {flags[1]}, give one of them")
        processes.say(
            f"note: {flags[0]} scales the {new.removeprefix('weight_')} loss, as in the release: {flags[1]}"
        )
        setattr(args, new, getattr(args, old))
        setattr(args, old, None)
    given = [name for name in ("weight_mixed", "weight_plain") if getattr(args, name) is not None]
    if args.lam is not None and given:
        parser.error(
            f"argument --lam: sets both loss weights, so --{given[0].replace('_', '-')} cannot be given too"
        )
    scaled = (1.5, 0.5) if args.lam is None else (args.lam_scale * args.lam, args.lam_scale * (1 - args.lam))
    args.weight_mixed = scaled[0] if args.weight_mixed is None else args.weight_mixed
    args.weight_plain = scaled[1] if args.weight_plain is None else args.weight_plain
    args.lam, args.lam_scale = None, 2.0  # the two weights say it from here on
    if args.weight_mixed == args.weight_plain == 0:
        parser.error("argument --weight-plain: both losses have weight 0")


def check_mixup(parser: cli.Parser, args: Namespace) -> None:
    """--mix-at input is mixup as published: pairs, random weights, no plain loss."""
    from common.gpu import processes  # noqa: PLC0415  (imports torch)

    if args.weights != "random" or args.group_size != 2 or args.weight_plain != 0:
        parser.error(
            "argument --mix-at: input is plain mixup and needs --weights random --group-size 2 --lam 1 (no plain loss)"
        )
    without = {"mix_target": "soft", "detach_target": False, "group_rounds": 1, "group_order": "halves"}
    for name, value in {**without, "pair_chunks": 1}.items():
        if getattr(args, name) != value:
            parser.error(
                f"argument --mix-at: input goes without --{name.replace('_', '-')} {getattr(args, name)}"
            )
    if processes.launched():
        parser.error("argument --mix-at: input runs in one process; start it with python")


def method(args: Namespace) -> str:
    """The method's name in a result row: AFM with the switches that are not at their default, or what they leave of it."""
    if args.mix_at == "input":
        return "mixup"
    if args.weight_mixed == 0:
        return "CE"
    usual = DEFAULTS[args.fidelity] | {"detach_target": False, "shared_classifier": True}
    name = "AFM"
    if args.weights == "attentive":
        usual |= {"interaction": "sum", "attn_hidden": 0}
    else:
        del usual["attention"]
        name = f"feature mixup, {args.weights} weights"
    switches = [
        f"{flag} {getattr(args, flag)}" for flag, value in usual.items() if getattr(args, flag) != value
    ]
    return f"{name} ({', '.join([f'K={args.group_size}', *switches])})"


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, noise and seed, then every flag that is not at its default."""
    always = ["dataset", *(["train_on"] if args.dataset == "clothing1m" else [])]
    always += [] if args.dataset in ON_DISK else ["noise_type", "noise_rate"]
    always += ["fidelity"] if args.fidelity == "released" else []
    defaults = parse_args(["--dataset", args.dataset, "--fidelity", args.fidelity])
    return run_name(args, vars(defaults), [*always, "seed"])


def cell(args: Namespace, data: "Data") -> dict:
    """The columns of a result row for the data set, its noise and the profile."""
    synthetic = args.noise_type not in ("given", "none")
    noise_type = {"food": "web", "clothing1m": args.train_on}.get(args.dataset, args.noise_type)
    full_length = args.dataset in ON_DISK and args.num_epochs >= (30 if args.dataset == "food" else 15)
    return {
        "dataset": data.name,
        "noise_type": Path(args.noise_file).name if args.noise_file else noise_type,
        "noise_rate": args.noise_rate if synthetic else None,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": "embedded" if args.dataset == "digits" else "paper" if full_length else "short",
    }
