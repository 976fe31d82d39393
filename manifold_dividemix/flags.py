"""The training flags of both train_semisup scripts: the release's names and defaults, and our own."""

from argparse import BooleanOptionalAction, Namespace

from common.gpu import processes
from common.runs import cli
from manifold_dividemix.mixematch import Weights
from manifold_dividemix.networks import ARCH_HELP, ARCHS

ENCODER = "save/last.pth"


def switch(text: str) -> bool:
    """true or false, as the release's commands have them after a flag. ValueError: another word."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def add_training_flags(parser: cli.Parser, *, epochs: int, warm_up: int, start_factor: float) -> None:
    """The flags that follow the data's. The defaults given are those that the two released scripts do not share."""
    _network_flags(parser)
    _schedule_flags(parser, epochs, warm_up)
    _outlier_flags(parser, start_factor)
    _loss_flags(parser)
    _other_flags(parser)


def _network_flags(parser: cli.Parser) -> None:
    network = parser.add_argument_group("network")
    network.add_argument("--arch", choices=list(ARCHS), default="resnet18", help=ARCH_HELP)
    network.add_argument(
        "--pretrained",
        metavar="FILE|none",
        nargs="?",  # the release's README has it without a value
        type=cli.place,
        const=ENCODER,
        default=ENCODER,
        help="the pre-trained encoder: encoder.safetensors of pretrain.py, or a checkpoint in SupContrast's format",
    )
    network.add_argument(
        "--weights",
        choices=["finetune", "freeze"],
        default="finetune",
        help="freeze: the encoder stays as it is, batch-norm statistics included",
    )


def _schedule_flags(parser: cli.Parser, epochs: int, warm_up: int) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.count, default=epochs, help="epochs, warm-up included")
    training.add_argument("--warmup-epoch", type=cli.count_or_zero, default=warm_up, help="epochs of warm-up")
    training.add_argument(
        "--batch-size", type=cli.count, default=64, help="of every pass; over all processes"
    )
    training.add_argument(
        "--lr-backbone", type=cli.positive, default=0.03, help="of the encoder; cosine to 0"
    )
    training.add_argument(
        "--lr-head", type=cli.positive, default=0.3, help="of classifier and projection; cosine"
    )
    training.add_argument("--weight-decay", type=cli.non_negative, default=5e-4, help="SGD's")
    training.add_argument("--momentum", type=cli.fraction, default=0.9, help="SGD's")
    training.add_argument(
        "--bn-mode",
        choices=["train", "frozen", "warm-up"],
        help="whether batch norms take a batch's statistics: always, never, in the warm-up only; by default train, and under "
        "--fidelity released frozen for data in memory, warm-up for mini-ImageNet",
    )
    training.add_argument("--gpu", type=cli.count_or_zero, default=0, help="which CUDA device")


def _outlier_flags(parser: cli.Parser, start_factor: float) -> None:
    outliers = parser.add_argument_group("outliers and split")
    outliers.add_argument(
        "--remove-ood",
        type=cli.fraction,
        default=0.01,
        help="q: share of samples removed more at each split; 0 removes none at all",
    )
    outliers.add_argument(
        "--ood-start-factor",
        type=cli.non_negative,
        default=start_factor,
        help="times q: share of samples removed at the start",
    )
    outliers.add_argument("--knn-k", type=cli.count, default=10, help="neighbours of the outlier score")
    outliers.add_argument(
        "--knn-encoder",
        choices=["current", "pretrained"],
        default="current",
        help="whose embeddings are scored: at each split those of the encoder in training, as released; or always those of the "
        "encoder as it was before training",
    )
    outliers.add_argument(
        "--clustering",
        type=switch,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="split again every --interval epochs, not only after the warm-up",
    )
    outliers.add_argument(
        "--no-clustering", dest="clustering", action="store_false", help="split only after the warm-up"
    )
    outliers.add_argument("--interval", type=cli.count, default=30, help="a split in epochs it divides")
    outliers.add_argument(
        "--p-threshold",
        type=cli.fraction,
        default=0.3,
        help="clean probability above which a label is taken",
    )
    outliers.add_argument(
        "--selection",
        choices=["gmm", "none"],
        default="gmm",
        help="none: no split, the warm-up goes on to the end",
    )


def _loss_flags(parser: cli.Parser) -> None:
    losses = parser.add_argument_group("losses")
    default = Weights()
    for flag, value, what in (
        ("lambda_x", default.labelled, "labelled loss of mixed inputs"),
        ("lambda_u", default.unlabelled, "unlabelled loss of mixed inputs, after the ramp"),
        ("lambda_xe", default.labelled_embedding, "labelled loss of mixed embeddings"),
        ("lambda_ue", default.unlabelled_embedding, "unlabelled loss of mixed embeddings, after the ramp"),
        ("lambda_c", default.contrastive, "contrastive loss of unlabelled samples"),
    ):
        losses.add_argument(f"--{flag}", type=cli.non_negative, default=value, help=f"weight of the {what}")
    losses.add_argument("--temperature", type=cli.positive, default=0.5, help="of sharpening")
    losses.add_argument("--alpha", type=cli.positive, default=4, help="of the mixture's Beta distribution")
    losses.add_argument(
        "--thr_un", type=cli.fraction, default=0.9, help="sharpened guess from which one is trained on"
    )
    losses.add_argument(
        "--LN-loss",
        choices=["RL", "CE"],
        default="RL",
        help="labelled loss: symmetric or plain cross-entropy",
    )
    losses.add_argument(
        "--rce",
        choices=["released", "log"],
        default="released",
        help="reverse part of the soft symmetric cross-entropy: a second softmax over the targets, the only form known to "
        "have been run; or their logarithm",
    )
    losses.add_argument(
        "--ramp",
        choices=["fixed", "released"],
        help="released: counts finished epochs twice; by default as --fidelity says",
    )
    losses.add_argument(
        "--warmup-mask",
        choices=["sample", "released"],
        help="released: removed samples are trained on too, the mean loss is scaled; by default as --fidelity says",
    )
    losses.add_argument(
        "--warmup-loss",
        choices=["SCE", "CE"],
        default="SCE",
        help="of the warm-up: symmetric or plain cross-entropy",
    )


def _other_flags(parser: cli.Parser) -> None:
    other = parser.add_argument_group("logging, and flags without effect")
    other.add_argument(
        "--eval-train",
        action=BooleanOptionalAction,
        default=False,
        help="accuracy on the noisy training labels after each epoch, which costs a pass; nothing is chosen by it",
    )
    other.add_argument(
        "--exp-dir",
        dest="out",
        nargs="?",
        metavar="DIR",
        type=cli.place,
        help="the release's name for --out; without a value, its default",
    )
    for flag, kind, value in (
        ("--print-freq", int, 100),
        ("--drops", float, 0.005),
        ("--lambda_ce", float, 1),
        ("--emb-loss", str, "no"),
    ):
        other.add_argument(flag, type=kind, default=value, help="ignored: without use in the release too")


def settle(parser: cli.Parser, args: Namespace, released_bn: str, released_mask: str) -> None:
    """Settle the defaults that depend on --fidelity, and check what single flags cannot.

    released_bn, released_mask: what the script's release does.
    """
    released = args.fidelity == "released"
    args.bn_mode = args.bn_mode or (released_bn if released else "train")
    args.ramp = args.ramp or ("released" if released else "fixed")
    mask = args.warmup_mask or ("released" if released else "sample")
    args.warmup_mask = released_mask if mask == "released" else mask
    args.num_epochs = args.epochs  # what result rows read
    if args.batch_size < 2:
        parser.error(f"argument --batch-size: must be at least 2, got {args.batch_size}")
    if args.knn_encoder == "pretrained" and args.pretrained == "none":
        parser.error("argument --knn-encoder: pretrained needs a pre-trained encoder, got --pretrained none")
    if args.selection == "gmm" and args.warmup_epoch >= args.epochs:
        processes.say(
            f"note: warm-up only, --warmup-epoch {args.warmup_epoch} is not below --epochs {args.epochs}"
        )
