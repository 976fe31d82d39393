"""SimCLR pre-training of the encoder that SANM's C2D base begins from, without labels; also on the embedded digits.

    python sanm/pretrain.py --preset embedded/digits/simclr      # seconds on a laptop, no data needed
    python sanm/pretrain.py --dataset cifar10                    # CIFAR-10 under ./data

The encoder is in encoder.safetensors of the run directory. Neither the paper nor the release has this script: the recipe is the
one that SupContrast documents for SimCLR. The sections in brackets are those of the method's description in sanm/README.md.
"""

import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, datasets, gpu
from common.augment import simclr_view
from common.cli import UserError
from common.datasets import Data
from common.gpu import Device
from common.loader import Batches, Images
from common.run import Run, run_name
from sanm.simclr import SimCLR, knn_accuracy, learning_rate, make_simclr, nt_xent

PRESETS = Path(__file__).with_name("presets.toml")
# SupContrast's constants; those of the other scripts, which are the release's, end at the third digit
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def make_parser() -> cli.Parser:
    """The recipe's settings under SupContrast's names, and the flags all scripts share."""
    parser = cli.Parser(
        prog="pretrain.py",
        description=__doc__.splitlines()[0],
        epilog="There is no released code of this step, so --fidelity makes no difference. No label is used in training, so "
        "there is no label noise to choose and --noise_file is refused.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, digits, mnist, fashion_mnist, or NAME for DATA_PATH/NAME.npz",
    )
    data.add_argument("--data_path", default="./data", metavar="DIR", help="where the data sets are")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.count, default=1000, help="epochs")
    training.add_argument(
        "--batch_size",
        "--batch-size",
        type=cli.count,
        default=1024,
        help="images of a step, each in two views",
    )
    training.add_argument(
        "--drop_last",
        action=BooleanOptionalAction,
        default=False,
        help="leave out an epoch's last batch where it is smaller",
    )
    training.add_argument(
        "--lr", "--learning_rate", type=cli.positive, default=0.5, help="initial learning rate"
    )
    training.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    training.add_argument("--weight_decay", type=cli.non_negative, default=1e-4, help="weight decay of SGD")
    training.add_argument(
        "--temp", type=cli.positive, default=0.5, help="temperature of the contrastive loss"
    )
    training.add_argument(
        "--cosine",
        action=BooleanOptionalAction,
        default=True,
        help="cosine learning rate, down to a thousandth in the last epoch; else steps",
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
        "--lr_decay_rate", type=cli.positive, default=0.1, help="factor by which it drops then"
    )
    training.add_argument(
        "--warm",
        action=BooleanOptionalAction,
        help="linear warm-up from 0.01 in the first 10 epochs, in the first half of less than 10; by default where the "
        "batch size is above 256",
    )
    training.add_argument(
        "--model",
        choices=["resnet18"],
        default="resnet18",
        help="ResNet-18 for small images; its narrow form on images below 16 pixels",
    )
    training.add_argument(
        "--knn_every",
        type=cli.count,
        metavar="N",
        help="kNN accuracy and encoder.safetensors every N epochs and at the end; by default 10, and 1 on digits",
    )
    training.add_argument("--gpuid", type=cli.count_or_zero, default=0, help="which CUDA device")
    cli.add_shared_flags(parser, default_seed=123)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    if args.noise_file:
        parser.error(f"argument --noise_file: no label is used in pre-training, got {args.noise_file}")
    args.warm = args.batch_size > 256 if args.warm is None else args.warm
    args.knn_every = args.knn_every or (1 if args.dataset == "digits" else 10)
    args.num_epochs = args.epochs  # what result rows read
    return args


def normalisation(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that images are normalised with [Sec. 10]."""
    return CIFAR100 if data.name == "cifar100" and len(data.mean) == 3 else (data.mean, data.std)


def train_epoch(
    network: SimCLR,
    optimizer: Optimizer,
    batches: Iterable,
    rate: Callable[[int], float],
    temperature: float,
    device: Device,
) -> float:
    """One pass over batches of two views; rate(batch): the learning rate of a step. Returns the mean loss over images."""
    network.train()
    losses, images = [], 0
    for batch, (views, index) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(batch)
        with device.autocast():
            embeddings = network(
                torch.cat(views)
            )  # both at once: they share batch-norm statistics, as in the recipe
        loss = nt_xent(torch.stack(embeddings.chunk(2), dim=1), temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(index))
        images += len(index)
    return float(torch.stack(losses).sum()) / images


@torch.no_grad()
def pooled_features(network: SimCLR, batches: Iterable, device: Device) -> Tensor:
    """Features [N, D] of plain images, in eval mode."""
    network.eval()
    with device.autocast():
        return torch.cat([network.features(images) for (images,), _ in batches])


def encoder_file(network: SimCLR, args: Namespace, epochs: int) -> bytes:
    """The encoder's tensors under the names of simclr_resnet, and what it was trained on, as a .safetensors file."""
    weights = {name: value.cpu().contiguous() for name, value in network.encoder.state_dict().items()}
    origin = {"dataset": args.dataset, "epochs": str(epochs), "seed": str(args.seed)}
    return safetensors.torch.save(weights, origin)


def main(argv=None) -> None:
    """Pre-train an encoder and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, args.gpuid)
    data = datasets.load(args.dataset, args.data_path)
    index = datasets.limited(np.arange(len(data.train.labels)), args.limit_train, args.seed)
    if args.drop_last and len(index) < args.batch_size:
        raise UserError(f"--drop_last: a batch of {args.batch_size} is more than all {len(index)} images")
    clean = data.train.labels[index]
    run = Run(
        args,
        device,
        paper="sanm",
        method="SimCLR",
        name=directory_name(args),
        cell=cell(args, data),
    )
    run.save_labels(index, clean, clean, data.num_classes)  # the true ones: kNN alone looks at them

    train = Images(data.train.images[index], *normalisation(data), device.device)
    test = Images(data.test.images, *normalisation(data), device.device)
    labels, test_labels = (torch.from_numpy(of).to(device.device) for of in (clean, data.test.labels))
    size, channels = data.train.images.shape[2:]
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = device.prepare(make_simclr(channels, size), args.compile)
    optimizer = SGD(
        network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=device.on_cuda()
    )
    generator = device.generator(args.seed)
    run.resume({"network": network, "optimizer": optimizer, "generator": generator})

    batches = Batches(
        train,
        args.batch_size,
        views=2,
        # a mirrored digit is another sign or none
        augmentation=partial(simclr_view, flip=args.dataset not in ("digits", "mnist")),
        shuffle=True,
        drop_last=args.drop_last,
        generator=generator,
    )
    plain = [Batches(images, 2 * args.batch_size) for images in (train, test)]
    rate = partial(
        learning_rate,
        base=args.lr,
        epochs=args.epochs,
        batches_per_epoch=len(batches),
        cosine=args.cosine,
        warm=args.warm,
        decay_epochs=args.lr_decay_epochs,
        decay_rate=args.lr_decay_rate,
    )
    for epoch in run.epochs(args.epochs):
        steps = run.progress(batches, f"epoch {epoch}")
        loss = train_epoch(network, optimizer, steps, partial(rate, epoch), args.temp, device)
        measured, knn = epoch % args.knn_every == 0 or epoch == args.epochs, None
        if measured:
            passes = (run.progress(images, f"epoch {epoch} features", training=False) for images in plain)
            bank, queries = (pooled_features(network, images, device) for images in passes)
            knn = knn_accuracy(bank, labels, queries, test_labels, data.num_classes)
        run.log(epoch, loss=loss, knn_accuracy=knn, lr=optimizer.param_groups[0]["lr"])
        if measured:  # after the log, which refuses a loss that is not finite
            run.save_file("encoder.safetensors", encoder_file(network, args, epoch))
    run.finish("knn_accuracy", last_loss=run.rows[-1]["loss"])


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, epochs and seed, then whatever differs from the defaults."""
    defaults = vars(parse_args(["--dataset", args.dataset, "--batch_size", str(args.batch_size)]))
    defaults |= {"batch_size": 1024, "num_epochs": args.num_epochs}
    return "pretrain-" + run_name(args, defaults, ("dataset", "epochs", "seed"))


def cell(args: Namespace, data: Data) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
    profile = "embedded" if args.dataset == "digits" else "paper" if args.epochs >= 1000 else "short"
    return {
        "dataset": data.name,
        "noise_type": "none",
        "noise_rate": None,
        "imb_factor": None,
        "ood_ratio": None,
        "profile": profile,
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
