"""The flags of the SimCLR recipe (common/pretraining/simclr.py). No torch here: `--help` needs none."""

from argparse import BooleanOptionalAction, Namespace, _ArgumentGroup

from common.runs import cli


def add_recipe_flags(parser: cli.Parser) -> _ArgumentGroup:
    """The recipe's settings under SupContrast's names; returns their group, which a script may add to."""
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.count, default=1000, help="epochs")
    training.add_argument(
        "--batch_size",
        type=cli.count,
        default=1024,
        help="images of a step, each in two views",
    )
    training.add_argument(
        "--drop_last",
        action=BooleanOptionalAction,
        default=False,
        help="leave out an epoch's last batch if it is smaller",
    )
    training.add_argument(
        "--lr",
        "--learning_rate",
        type=cli.positive,
        default=0.5,
        help="initial learning rate",
    )
    training.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    training.add_argument(
        "--weight_decay",
        type=cli.non_negative,
        default=1e-4,
        help="weight decay of SGD",
    )
    training.add_argument(
        "--temp", type=cli.positive, default=0.5, help="temperature of the contrastive loss"
    )
    training.add_argument(
        "--cosine",
        action=BooleanOptionalAction,
        default=True,
        help="cosine learning rate, down to 1/1000 in the last epoch; else steps",
    )
    training.add_argument(
        "--lr_decay_epochs",
        type=cli.count,
        nargs="+",
        default=[700, 800, 900],
        metavar="EPOCH",
        help="without --cosine: the learning rate drops after these epochs",
    )
    training.add_argument(
        "--lr_decay_rate",
        type=cli.positive,
        default=0.1,
        help="without --cosine: factor of each drop",
    )
    training.add_argument(
        "--warm",
        action=BooleanOptionalAction,
        help="linear warm-up of the learning rate from 0.01; by default if the batch size is above 256",
    )
    training.add_argument(
        "--warmup_epochs",
        type=cli.count,
        default=10,
        metavar="N",
        help="epochs of warm-up; with fewer --epochs, the first half of them",
    )
    training.add_argument(
        "--knn_every",
        type=cli.count,
        metavar="N",
        help="kNN accuracy and encoder.safetensors every N epochs and at the end; by default 10, and 1 on digits",
    )
    cli.add_cuda_graphs_flag(training, "full batches")
    return training


def settle(args: Namespace) -> None:
    """Set defaults that depend on other flags: warm on batch_size, knn_every on dataset; and num_epochs for the results."""
    args.warm = args.batch_size > 256 if args.warm is None else args.warm
    args.knn_every = args.knn_every or (1 if args.dataset == "digits" else 10)
    args.num_epochs = args.epochs
