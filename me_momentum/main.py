"""Me-Momentum (ICCV 2021) on MNIST, Fashion-MNIST, CIFAR-10/100 with label noise, and on the embedded digits.

    python me_momentum/main.py --preset embedded/digits-sym0.4/me-momentum            # under a minute, no data needed
    python me_momentum/main.py --dataset mnist --noise_type instance --noise_rate 0.2   # MNIST under ./data

The sections in brackets are those of the method's description in me_momentum/README.md.
"""

import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets, noise
from common.datasets import Data, posterior
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation
from common.gpu.loader import Batches, Images
from common.runs import cli, selection_report
from common.runs.cli import UserError
from common.runs.run import Run, run_name
from common.runs.selection_report import Selected
from me_momentum.alternation import Limits, Place, Verdict, advance, learning_rate, name_of
from me_momentum.confident import confident_examples, set_growth, set_statistics
from me_momentum.networks import NETWORKS, make_network, usual_network
from me_momentum.training import predict, train_epoch
from me_momentum.validation import Parts, accuracy, balanced_accuracy, batch_mean_accuracy, split

PRESETS = Path(__file__).with_name("presets.toml")
# what set_statistics says of a confident set
SET_COLUMNS = (
    *("confident_size", "confident_share", "confident_precision", "confident_recall"),
    *("hard_share", "hard_precision"),
)


def make_parser() -> cli.Parser:
    """The release's flags and defaults, flags for its single quirks, and the flags all scripts share."""
    parser = cli.Parser(prog="main.py", description=__doc__)
    data = parser.add_argument_group("data and label noise")
    data.add_argument(
        "--dataset",
        default="mnist",
        help="mnist, fashion_mnist, cifar10, cifar100, digits, or NAME for DATA_PATH/NAME.npz",
    )
    data.add_argument(
        "--data_path", default="./data", metavar="DIR", type=cli.place, help="where the data sets are"
    )
    data.add_argument(
        "--noise_type",
        choices=[*noise.NOISE_TYPES, "given"],
        default="symmetric",
        help="label noise of the whole training set, validation part included; "
        f"{posterior.HELP}; given: the noisy_labels of an .npz",
    )
    data.add_argument("--noise_rate", type=cli.fraction, default=0.2, help="rate of that noise")
    posterior.add_flag(data)
    data.add_argument(
        "--data_percent",
        type=cli.fraction,
        default=0.9,
        help="share that is trained on; the rest, with noisy labels too, validates",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--network",
        choices=["auto", *NETWORKS],
        default="auto",
        help="auto: LeNet for mnist and grey images, ResNet-34 for cifar100, ResNet-18 for cifar10 and colour images, a "
        "small one for digits; never chosen by auto: preact_resnet18, narrow below 16 pixels, and preact_narrow, narrow at any "
        "size",
    )
    training.add_argument(
        "--stem_padding",
        type=cli.count_or_zero,
        default=0,
        help="of the first convolution of resnet18 and resnet34; 0 as released: 32 pixels become 30; that of "
        "the PreAct ResNets is always 1",
    )
    training.add_argument("--lr", type=cli.positive, default=0.01, help="learning rate of SGD")
    training.add_argument("--weight_decay", type=cli.non_negative, default=1e-4, help="of SGD, on everything")
    training.add_argument(
        "--batch_size", type=cli.count, default=128, help="batch size; twice that where nothing is trained"
    )
    training.add_argument(
        "--n_epoch",
        type=cli.count,
        default=100,
        dest="num_epochs",
        help="epochs of a round, and of the early-stopping phase at most",
    )
    training.add_argument(
        "--cuda_graphs",
        action=BooleanOptionalAction,
        default=True,
        help="on CUDA replay recorded training steps, so that small networks do not wait for launches; not with --compile",
    )
    training.add_argument(
        "--model_dir",
        metavar="DIR",
        type=cli.place,
        help="the release's folder of weights: here a name for --out",
    )

    method = parser.add_argument_group("Me-Momentum")
    method.add_argument(
        "--selection",
        choices=["confident", "none"],
        default="confident",
        help="none: no confident examples, plain cross-entropy on the noisy training part for n_epoch epochs",
    )
    method.add_argument(
        "--max_outer_loop", type=cli.count, default=3, help="how often a fresh network begins"
    )
    method.add_argument(
        "--max_inner_loop",
        type=cli.count,
        default=20,
        help="one more than the rounds of fine-tuning, as released",
    )
    method.add_argument(
        "--es_step",
        type=cli.positive,
        default=0.1,
        help="points that a failure adds to early stopping's margin",
    )
    method.add_argument(
        "--es_limit",
        type=cli.non_negative,
        default=2.0,
        help="early stopping ends when its margin is above this",
    )
    for what, name in (("select", "confident examples are extracted from"), ("val", "validation uses")):
        method.add_argument(
            f"--{what}_view",
            choices=["train", "test"],
            default="train",
            help=f"images that {name}: augmented as in training (train, as released) or plain (test)",
        )
    method.add_argument(
        "--legacy_batch_mean",
        action=BooleanOptionalAction,
        help="report the mean over test batches, as the release does; by default under --fidelity released alone",
    )
    cli.add_shared_flags(parser, default_seed=1)
    return parser


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    parser = make_parser()
    args = cli.parse_args(parser, argv, PRESETS)
    released = args.fidelity == "released"
    args.legacy_batch_mean = released if args.legacy_batch_mean is None else args.legacy_batch_mean
    if args.model_dir and args.out and args.model_dir != args.out:
        parser.error(
            f"argument --model_dir: is a name for --out, give one of them, got {args.model_dir} and {args.out}"
        )
    args.out, args.model_dir = args.out or args.model_dir, None
    if args.noise_file:
        args.noise_type = "given"
    posterior.check_flag(parser, args, args.noise_type, "--noise_type")
    if not 0 < args.data_percent < 1:
        parser.error(f"argument --data_percent: both parts need images, got {args.data_percent}")
    return args


def split_part(observed: np.ndarray, num_classes: int, args: Namespace) -> Parts:
    """Images with these observed labels, int [n], cut into training and validation part [Sec. 2.2]."""
    try:
        parts = split(len(observed), args.data_percent, args.seed)
    except ValueError as error:
        raise UserError(f"--data_percent {args.data_percent}: {error}") from None
    absent = np.flatnonzero(np.bincount(observed[parts.validation], minlength=num_classes) == 0)
    if len(absent):
        # the release would validate as NaN, keep no weights and die after twenty epochs
        raise UserError(
            f"class {absent[0]} is not among the {len(parts.validation)} observed labels of the validation part: "
            f"use a --data_percent below {args.data_percent}, a larger --limit_train or another --seed"
        )
    return parts


def network_maker(args: Namespace, data: Data) -> Callable[[], nn.Module]:
    """What makes a network with fresh initial weights, from the global generator [Sec. 3]."""
    height, width, channels = data.train.images.shape[1:]
    size = min(height, width)
    name = usual_network(data.name, channels, size) if args.network == "auto" else args.network
    if name == "lenet" and height != width:
        raise UserError(
            f"--network lenet: images of {height} x {width} pixels are not square; use resnet18, or small below 14 pixels"
        )
    return partial(make_network, name, data.num_classes, channels, size, args.stem_padding)


class Setting(NamedTuple):
    """What every pass shares."""

    args: Namespace
    run: Run
    device: gpu.Device
    num_classes: int
    train: Images  # the training part
    validation: Images
    test: Images
    labels: Tensor  # observed, of the training part, int [N]
    validation_labels: Tensor  # observed
    test_labels: Tensor  # clean
    right: Tensor  # bool [N]: whose observed label is the true one; for the log alone
    augmentation: Callable | None  # of training images
    generator: torch.Generator  # shuffles, crops and flips

    def batches(self, images: Images, size: int, view: str, **options) -> Batches:
        """Batches of plain images (view test) or augmented ones (view train)."""
        augmentation = self.augmentation if view == "train" else None
        return Batches(images, size, augmentation=augmentation, generator=self.generator, **options)

    def predictions(self, network: nn.Module, images: Images, view: str, what: str) -> Tensor:
        """Predicted classes, int [len(images)]."""
        batches = self.batches(images, 2 * self.args.batch_size, view)
        return predict(network, self.run.progress(batches, what, training=False), len(images), self.device)


def make_setting(
    args: Namespace,
    run: Run,
    device: gpu.Device,
    data: Data,
    index: np.ndarray,
    observed: np.ndarray,
    parts: Parts,
) -> Setting:
    """All three parts, images and labels, on the device, where they stay.

    index: positions in the data set of the images used, int [n]; observed: their labels, int [n]; parts: of them.
    """

    def to_device(images: np.ndarray) -> Images:
        return Images(images, data.mean, data.std, device.device)

    right = observed == data.train.labels[index]
    tested = data.test.only(datasets.limited_test(data.test.labels, args.limit_test, args.seed))
    labels = (observed[parts.train], observed[parts.validation], tested.labels, right[parts.train])
    size, channels = data.train.images.shape[2:]
    return Setting(
        args,
        run,
        device,
        data.num_classes,
        *(to_device(data.train.images[index[of_part]]) for of_part in parts),
        to_device(tested.images),
        *(torch.from_numpy(of_part).to(device.device) for of_part in labels),
        # random crop and flip of colour images, nothing for grey ones [Sec. 2.1]
        training_augmentation(data.name, size) if channels == 3 else None,
        device.generator(args.seed),
    )


def fresh_memory(size: int, num_classes: int) -> dict:
    """What is carried from epoch to epoch, beside network and optimiser."""
    return {
        "place": Place()._asdict(),
        "set": torch.arange(size),  # positions in the training part that are trained on; at first all
        "first": None,  # the run's first confident set
        "statistics": dict.fromkeys((*SET_COLUMNS, *selection_report.COLUMNS)),
        "streaks": selection_report.no_streaks(1, num_classes),
        "latest": {},  # weights of the best validation accuracy of this outer loop
        "best": {},  # weights whose test accuracy is reported; early-stopped ones while no fine-tuning was better
        "best_validation": 0.0,
    }


def extract(network: nn.Module, memory: dict, what: str, s: Setting) -> None:
    """Extract confident examples from the whole noisy training part [Sec. 6]: the set that is trained on from here on."""
    predicted = s.predictions(network, s.train, s.args.select_view, f"{what} selection")
    confident = confident_examples(predicted, s.labels)
    if not len(confident):
        print(f"warning: {what}: no confident example, the set before is kept", file=sys.stderr)
        return
    memory["set"] = confident
    memory["first"] = confident if memory["first"] is None else memory["first"]
    memory["statistics"] = set_statistics(confident, s.right, memory["first"].to(confident.device))
    chosen = [Selected(confident, s.labels, s.right)]
    memory["statistics"] |= selection_report.columns(chosen)
    memory["streaks"] = selection_report.follow(
        memory["streaks"], chosen, "a larger --es_limit, for a longer early-stopping phase"
    )


def begin_phase(
    place: Place, network: nn.Module, optimizer: SGD, memory: dict, fresh_network: Callable, s: Setting
) -> None:
    """A fresh network on the last confident set; or, in a round, the best weights so far on the set they extract."""
    optimizer.state.clear()
    if place.round > 0:
        network.load_state_dict(memory["latest"])
        extract(network, memory, name_of(place), s)
    elif place.outer > 0:
        network.load_state_dict(fresh_network().state_dict())
        memory["latest"] = {}


def keep_weights(network: nn.Module, memory: dict, place: Place, verdict: Verdict, validation: float) -> None:
    """The epoch's weights, where they are the best of the outer loop, and where they are those to report."""
    if not verdict.keep:
        return
    memory["latest"] = copy_of(network)
    stopped = place.best_of_run == 0 and validation > memory["best_validation"]
    if verdict.new_best or stopped:
        memory["best"], memory["best_validation"] = memory["latest"], validation


def end_phase(network: nn.Module, memory: dict, run: Run) -> None:
    """Write model_best.pt. Where no epoch was ever better than nothing, the last weights are what there is to go on with."""
    memory["latest"] = memory["latest"] or copy_of(network)
    run.save_weights("model_best.pt", memory["best"] or memory["latest"])


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on their device."""
    return {name: value.clone() for name, value in network.state_dict().items()}


@cli.script
def main(argv=None) -> None:
    """Train Me-Momentum and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, fidelity=args.fidelity)
    data = datasets.load(args.dataset, args.data_path)
    index = datasets.limited(np.arange(len(data.train.labels)), args.limit_train, args.seed)
    eta = posterior.posterior_for(args.noise_type, data, args.data_path, args.posterior)
    observed = datasets.observed_labels(
        data, index, args.noise_type, args.noise_rate, args.seed, args.noise_file, posterior=eta
    )
    parts = split_part(observed, data.num_classes, args)
    fresh_network = network_maker(args, data)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = device.prepare(fresh_network(), args.compile)
    run = Run(
        args,
        device,
        paper="me_momentum",
        method=method(args),
        name=directory_name(args),
        cell=cell(args, data),
    )
    run.save_labels(index, data.train.labels[index], observed, data.num_classes)
    run.save_arrays("split", train=index[parts.train], validation=index[parts.validation])

    s = make_setting(args, run, device, data, index, observed, parts)
    if args.cuda_graphs and not args.compile:
        device.replay(network, (args.batch_size, *s.train.pixels.shape[1:]))
    optimizer = SGD(
        network.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, fused=device.on_cuda()
    )
    memory = fresh_memory(len(s.labels), s.num_classes)
    run.resume({"network": network, "optimizer": optimizer, "generator": s.generator, "memory": memory})

    limits = loop_limits(args)
    for epoch in run.epochs(None):
        place = Place(**memory["place"])
        if place.done:
            break
        what = name_of(place)
        if place.epoch == 0:
            begin_phase(place, network, optimizer, memory, fresh_network, s)
        optimizer.param_groups[0]["lr"] = lr = learning_rate(place, args.lr)
        current = memory["set"].to(device.device)
        batches = s.batches(s.train, args.batch_size, "train", subset=current, shuffle=True)
        loss, train_accuracy = train_epoch(network, optimizer, run.progress(batches, what), s.labels, device)

        predicted = s.predictions(network, s.validation, args.val_view, f"{what} validation")
        validation = balanced_accuracy(predicted, s.validation_labels, s.num_classes)
        predicted = s.predictions(network, s.test, "test", f"{what} test")
        following, verdict = advance(place, validation, limits)
        keep_weights(network, memory, place, verdict, validation)
        if following.epoch == 0:
            end_phase(network, memory, run)
        memory["place"] = following._asdict()
        report = {"outer": place.outer + 1, "round": place.round, "loss": loss}
        report |= {"validation_accuracy": validation, "test_accuracy": accuracy(predicted, s.test_labels)}
        report |= {**memory["statistics"], "train_accuracy": train_accuracy, "lr": lr}
        batchmean = batch_mean_accuracy(predicted, s.test_labels, 2 * args.batch_size)
        report |= {"test_accuracy_batchmean": batchmean}
        run.log(epoch, **report, kept=int(verdict.keep), new_best=int(verdict.new_best))

    metric = "test_accuracy_batchmean" if args.legacy_batch_mean else "test_accuracy"
    full = run.full_test(lambda: full_test(network, memory, data, s))
    run.finish(metric, **summary(run.rows, metric, args), **full)


def full_test(network: nn.Module, memory: dict, data: Data, s: Setting) -> dict[str, float]:
    """Accuracy on all test images of the reported network, the one in model_best.pt, for --full_test_at_end."""
    network.load_state_dict(memory["best"] or memory["latest"])
    images = Images(data.test.images, data.mean, data.std, s.device.device)
    predicted = s.predictions(network, images, "test", "full test")
    labels = torch.from_numpy(data.test.labels).to(s.device.device)
    measured = accuracy(predicted, labels)
    if s.args.legacy_batch_mean:
        measured = batch_mean_accuracy(predicted, labels, 2 * s.args.batch_size)
    return {"full_test": measured, "full_test_images": len(labels)}


def loop_limits(args: Namespace) -> Limits:
    """The bounds of the loops; without selection there is one phase, which never stops early."""
    if args.selection == "none":
        return Limits(args.num_epochs, outer_loops=1, inner_loops=1, margin_step=0)
    return Limits(args.num_epochs, args.max_outer_loop, args.max_inner_loop, args.es_step, args.es_limit)


def summary(rows: list[dict], metric: str, args: Namespace) -> dict[str, float | None]:
    """The reported test accuracy [Sec. 7], and what the last confident set was like.

    at_best_validation: the test accuracy of the epoch of fine-tuning that is best on the noisy validation part, the first of
    equals. Where no such epoch ever beat early stopping the release reports 0; here it is then the best early-stopped one.
    """
    chosen = [row for row in rows if row["new_best"]][-1:]
    if chosen or args.fidelity == "paper" or args.selection == "none":
        epoch = chosen[0] if chosen else max(rows, key=lambda row: (row["kept"], row["validation_accuracy"]))
        reported, validation = epoch[metric], epoch["validation_accuracy"]
    else:
        reported, validation = 0.0, 0.0
    last = {name: rows[-1][name] for name in SET_COLUMNS}
    sets = {
        (row["outer"], row["round"]): (row["confident_share"], row["confident_precision"])
        for row in rows
        if row["round"] and row["confident_share"] is not None
    }
    growth = set_growth(list(sets.values()))
    return {
        "at_best_validation": reported,
        "best_validation": validation,
        "epochs_trained": len(rows),
        "rounds": len({(row["outer"], row["round"]) for row in rows if row["round"]}),
        **last,
        **growth,
    }


def method(args: Namespace) -> str:
    """What a result row calls the method."""
    return "CE" if args.selection == "none" else "Me-Momentum"


def directory_name(args: Namespace) -> str:
    """The run directory's name: data, noise and seed, then whatever differs from the defaults."""
    always = [
        "dataset",
        "noise_type",
        "noise_rate",
        *(["fidelity"] if args.fidelity == "released" else []),
        "seed",
    ]
    defaults = parse_args(["--fidelity", args.fidelity])
    return run_name(args, vars(defaults), always)


def cell(args: Namespace, data: Data) -> dict:
    """The columns of a result row that say what was trained on, and at which profile."""
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


if __name__ == "__main__":
    cli.exit_cleanly(main)
