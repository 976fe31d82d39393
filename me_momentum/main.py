"""Me-Momentum (ICCV 2021) on MNIST, Fashion-MNIST, CIFAR-10/100 with label noise, and on the embedded digits.

    python me_momentum/main.py --preset embedded/digits-sym0.4/me-momentum            # under a minute, no data needed
    python me_momentum/main.py --dataset mnist --noise_type instance --noise_rate 0.2   # MNIST under ./data

The nested loops stand as pseudo-code in alternation.py.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from me_momentum.flags import cell, directory_name, loop_limits, make_parser, method, parse_args

cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from common import datasets
from common.datasets import Data, posterior
from common.gpu import device as gpu
from common.gpu.augment import training_augmentation
from common.gpu.loader import Batches, Images
from common.runs import selection_report
from common.runs.label_quality import Estimate, save_label_quality
from common.runs.run import Run
from me_momentum.alternation import Place, Verdict, advance, learning_rate, name_of
from me_momentum.confident import SET_COLUMNS, confident_examples, set_statistics
from me_momentum.networks import make_network, usual_network
from me_momentum.report import estimate_label_quality, reported, summary
from me_momentum.training import copy_of, predict, train_epoch
from me_momentum.validation import Parts, accuracy, balanced_accuracy, batch_mean_accuracy, split


def split_part(observed: np.ndarray, num_classes: int, args: Namespace) -> Parts:
    """Images with these observed labels, int [n], cut into training and validation part (README, section 2.2)."""
    try:
        parts = split(len(observed), args.data_percent, args.seed)
    except ValueError as error:
        raise cli.UserError(f"--data_percent {args.data_percent}: {error}") from None
    absent = np.flatnonzero(np.bincount(observed[parts.validation], minlength=num_classes) == 0)
    if len(absent):
        # the release would validate as NaN, keep no weights and die after twenty epochs
        raise cli.UserError(
            f"class {absent[0]} is not among the {len(parts.validation)} observed labels of the validation part: "
            f"use a --data_percent below {args.data_percent}, a larger --limit_train or another --seed"
        )
    return parts


def network_maker(args: Namespace, data: Data) -> Callable[[], nn.Module]:
    """A function that makes a network with fresh initial weights from the global generator (README, section 3)."""
    height, width, channels = data.train.images.shape[1:]
    size = min(height, width)
    name = usual_network(data.name, channels, size) if args.network == "auto" else args.network
    if name == "lenet" and height != width:
        raise cli.UserError(
            f"--network lenet: images of {height} x {width} pixels are not square; use resnet18, or small below 14 pixels"
        )
    return partial(make_network, name, data.num_classes, channels, size, args.stem_padding)


class Setting(NamedTuple):
    """What all passes over images share."""

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
    right: (
        Tensor | None
    )  # bool [N]: the observed label is the true one; for the log alone; None: truth unknown
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
    """Training, validation and test images and their labels, all on the device.

    index: positions in the data set of the images used, int [n]; observed: their labels, int [n]; parts: of these.
    """

    def to_device(images: np.ndarray) -> Images:
        return Images(images, data.mean, data.std, device.device)

    truth = data.true_labels(index, args.noise_type)
    right = None if truth is None else torch.from_numpy((observed == truth)[parts.train]).to(device.device)
    tested = data.test.only(datasets.limited_test(data.test.labels, args.limit_test, args.seed))
    arrays = (observed[parts.train], observed[parts.validation], tested.labels)
    labels, validation_labels, test_labels = (torch.from_numpy(array).to(device.device) for array in arrays)
    size, channels = data.train.images.shape[2:]
    return Setting(
        args,
        run,
        device,
        data.num_classes,
        to_device(data.train.images[index[parts.train]]),
        to_device(data.train.images[index[parts.validation]]),
        to_device(tested.images),
        labels,
        validation_labels,
        test_labels,
        right,
        # random crop and flip of colour images, nothing for grey ones (README, section 2.1)
        training_augmentation(data.name, size) if channels == 3 else None,
        device.generator(args.seed),
    )


def fresh_memory(size: int, num_classes: int) -> dict:
    """The state of the loops, which a checkpoint holds beside network and optimiser."""
    return {
        "place": Place()._asdict(),
        "confident": torch.arange(size),  # positions in the training part that are trained on; at first all
        "first_confident": None,  # the first set that was extracted
        "statistics": dict.fromkeys((*SET_COLUMNS, *selection_report.COLUMNS)),
        "streaks": selection_report.no_streaks(1, num_classes),
        "best_of_loop": {},  # weights that are best on validation in this outer loop
        "reported": {},  # weights whose test accuracy is reported; early-stopped ones until fine-tuning is better
        "reported_validation": 0.0,
    }


def extract(network: nn.Module, memory: dict, what: str, s: Setting) -> None:
    """Extract the confident examples of the noisy training part, to train on them (README, section 6)."""
    predicted = s.predictions(network, s.train, s.args.select_view, f"{what} selection")
    confident = confident_examples(predicted, s.labels)
    if not len(confident):
        print(f"warning: {what}: no confident example, the set before is kept", file=sys.stderr)
        return
    memory["confident"] = confident
    if memory["first_confident"] is None:
        memory["first_confident"] = confident
    first = memory["first_confident"].to(confident.device)
    memory["statistics"] = set_statistics(confident, s.right, first, len(s.labels))
    chosen = [selection_report.Selected(confident, s.labels, s.right)]
    memory["statistics"] |= selection_report.columns(chosen)
    memory["streaks"] = selection_report.follow(
        memory["streaks"], chosen, "a larger --es_limit, for a longer early-stopping phase"
    )


def begin_phase(
    place: Place, network: nn.Module, optimizer: SGD, memory: dict, fresh_network: Callable, s: Setting
) -> None:
    """Start a phase: an outer loop with a fresh network, a round with the best weights so far and the set they extract."""
    optimizer.state.clear()
    if place.round > 0:
        network.load_state_dict(memory["best_of_loop"])
        extract(network, memory, name_of(place), s)
    elif place.outer > 0:
        network.load_state_dict(fresh_network().state_dict())
        memory["best_of_loop"] = {}


def keep_weights(network: nn.Module, memory: dict, place: Place, verdict: Verdict, validation: float) -> None:
    """Keep the epoch's weights if they are the best of the outer loop, and as the reported ones if they are to be reported."""
    if not verdict.best_of_loop:
        return
    memory["best_of_loop"] = copy_of(network)
    early_stopped = place.best_of_run == 0 and validation > memory["reported_validation"]
    if verdict.best_of_run or early_stopped:
        memory["reported"], memory["reported_validation"] = memory["best_of_loop"], validation


def end_phase(network: nn.Module, memory: dict, run: Run) -> None:
    """Write model_best.pt. If no epoch of the outer loop was kept, its last weights take that place."""
    memory["best_of_loop"] = memory["best_of_loop"] or copy_of(network)
    run.save_weights("model_best.pt", reported(memory))


def full_test(network: nn.Module, memory: dict, data: Data, s: Setting) -> dict[str, float]:
    """Accuracy on all test images of the reported network, the one in model_best.pt, for --full_test_at_end."""
    network.load_state_dict(reported(memory))
    images = Images(data.test.images, data.mean, data.std, s.device.device)
    predicted = s.predictions(network, images, "test", "full test")
    labels = torch.from_numpy(data.test.labels).to(s.device.device)
    measured = accuracy(predicted, labels)
    if s.args.legacy_batch_mean:
        measured = batch_mean_accuracy(predicted, labels, 2 * s.args.batch_size)
    return {"full_test": measured, "full_test_images": len(labels)}


def quality(network: nn.Module, memory: dict, parts: Parts, s: Setting) -> Estimate:
    """What the reported weights say about the given labels, those of the validation part included."""
    network.load_state_dict(reported(memory))
    plain = [s.batches(images, 2 * s.args.batch_size, "test") for images in (s.train, s.validation)]
    passed = [s.run.progress(batches, "label quality", training=False) for batches in plain]
    confident = None if memory["first_confident"] is None else memory["confident"]
    return estimate_label_quality(network, parts, passed, confident, s.num_classes, s.device)


def measure(network: nn.Module, what: str, s: Setting) -> dict[str, float]:
    """Columns of the log: accuracy on the validation part, and on the test images over samples and over batches."""
    predicted = s.predictions(network, s.validation, s.args.val_view, f"{what} validation")
    validation = balanced_accuracy(predicted, s.validation_labels, s.num_classes)
    predicted = s.predictions(network, s.test, "test", f"{what} test")
    return {
        "validation_accuracy": validation,
        "test_accuracy": accuracy(predicted, s.test_labels),
        "test_accuracy_batchmean": batch_mean_accuracy(predicted, s.test_labels, 2 * s.args.batch_size),
    }


@cli.script
def main(argv=None) -> None:
    """Train Me-Momentum and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, fidelity=args.fidelity)
    data = datasets.from_arguments(vars(args))
    index = datasets.kept_images(args, np.arange(len(data.train.labels)))
    eta = posterior.posterior_for(args.noise_type, data, args.data_path, args.posterior)
    observed = datasets.observed_labels(
        data, index, args.noise_type, args.noise_rate, args.seed, args.noise_file, posterior=eta
    )
    parts = split_part(observed, data.num_classes, args)
    fresh_network = network_maker(args, data)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = device.prepare(fresh_network(), args.compile)
    name, columns = directory_name(args), cell(args, data)
    run = Run(args, device, paper="me_momentum", method=method(args), name=name, cell=columns)
    run.save_labels(index, data.true_labels(index, args.noise_type), observed, data.num_classes)
    run.save_skipped(data.skipped)
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
        subset = memory["confident"].to(device.device)
        batches = s.batches(s.train, args.batch_size, "train", subset=subset, shuffle=True)
        loss, train_accuracy = train_epoch(network, optimizer, run.progress(batches, what), s.labels, device)

        measured = measure(network, what, s)
        following, verdict = advance(place, measured["validation_accuracy"], limits)
        keep_weights(network, memory, place, verdict, measured["validation_accuracy"])
        if following.epoch == 0:
            end_phase(network, memory, run)
        memory["place"] = following._asdict()
        batchmean = measured.pop("test_accuracy_batchmean")
        report = {"outer": place.outer + 1, "round": place.round, "loss": loss, **measured}
        report |= {**memory["statistics"], "train_accuracy": train_accuracy, "lr": lr}
        report |= {"test_accuracy_batchmean": batchmean}
        run.log(epoch, **report, kept=int(verdict.best_of_loop), new_best=int(verdict.best_of_run))

    metric = "test_accuracy_batchmean" if args.legacy_batch_mean else "test_accuracy"
    save_label_quality(run, partial(quality, network, memory, parts, s), data.paths, data.classes)
    full = run.full_test(lambda: full_test(network, memory, data, s))
    run.finish(metric, **summary(run.rows, metric, args), **full)


if __name__ == "__main__":
    cli.exit_cleanly(main)
