"""Me-Momentum (ICCV 2021) on Clothing1M: each class has its best checkpoint, which extracts its confident examples.

    python me_momentum/Clothing.py                                     # Clothing1M under data/Clothing1M_Official/
    torchrun --nproc_per_node=8 me_momentum/Clothing.py                # the same on eight GPUs

The labels of the clean validation images choose the checkpoints and weigh the loss (README, section 8).
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
from me_momentum.flags import make_clothing_parser as make_parser

cli.show_help(__name__, make_parser)  # before imports that take seconds

import torch
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.loader import Labelled
from common.gpu.weights import cpu_copy
from common.runs import selection_report
from common.runs.label_quality import Estimate, save_label_quality
from common.runs.run import Run
from common.runs.selection_report import Selected
from me_momentum.clothing_images import Data, load, smallest_set
from me_momentum.confident import confident_examples
from me_momentum.flags import clothing_cell as cell
from me_momentum.flags import clothing_directory_name as directory_name
from me_momentum.flags import method
from me_momentum.flags import parse_clothing_args as parse_args
from me_momentum.losses import prior_weights
from me_momentum.networks import clothing_network
from me_momentum.per_class import (
    ClassModels,
    Scores,
    class_score,
    in_use,
    model_of_class,
    no_models,
    samples_by_model,
    scores,
    update,
)
from me_momentum.report import clothing_summary, estimate_label_quality
from me_momentum.training import predict, train_weighted_epoch
from me_momentum.validation import accuracy, batch_mean_accuracy

MOMENTUM = 0.9
MILESTONES = (10, 20)  # the learning rate drops by 10x after these epochs of an outer loop


class Place(NamedTuple):
    """Where an epoch of the run is; all from 1."""

    outer: int
    inner: int
    epoch: int  # of the outer loop: checkpoints are numbered so
    first: bool  # of the inner loop


def place_of(epoch: int, args: Namespace) -> Place:
    """Outer and inner loop of an epoch of the run, from 1."""
    outer, before = divmod(epoch - 1, args.max_inner_loop * args.n_epoch)
    inner, of_inner = divmod(before, args.n_epoch)
    return Place(outer + 1, inner + 1, before + 1, of_inner == 0)


def name_of(place: Place) -> str:
    """The place in words."""
    return f"outer loop {place.outer}, inner loop {place.inner}"


def learning_rate(place: Place, lr: float) -> float:
    """`lr`, 10x lower after each milestone. The epochs are those of the outer loop, across its inner loops."""
    for milestone in MILESTONES:
        if place.epoch > milestone:
            lr *= 0.1
    return lr


def is_new_best(accuracy: float, rows: list[dict]) -> bool:
    """Whether a validation accuracy is above those of all epochs before, of all loops."""
    return accuracy > max((row["validation_accuracy"] for row in rows), default=0.0)


def fresh_memory(num_classes: int) -> dict:
    """The state of the loops, which a checkpoint holds beside network and optimiser."""
    return {
        "confident": None,  # positions of the images that are trained on, ascending; None: all
        "models": no_models(num_classes)._asdict(),
        "weights": {},  # of the epochs that are the model of a class, on the CPU
        "streaks": selection_report.no_streaks(1, num_classes),
    }


def begin_inner_loop(
    place: Place,
    network: nn.Module,
    optimizer: SGD,
    memory: dict,
    fresh_network: Callable,
    data: Data,
    run: Run,
) -> None:
    """Extract confident examples; in a new outer loop also start from a fresh network."""
    if run.args.selection == "confident" and (place.outer, place.inner) != (1, 1):
        select(network, memory, data, name_of(place), run)
    if place.outer > 1 and place.inner == 1:
        network.load_state_dict(fresh_network().state_dict())
        optimizer.state.clear()
        memory["models"] = no_models(run.args.num_classes)._asdict()
        memory["weights"] = {}


def select(network: nn.Module, memory: dict, data: Data, what: str, run: Run) -> None:
    """Extract the confident examples of the noisy list, to train on them (README, section 8).

    Each checkpoint in use predicts the samples of all its classes once; the network keeps its own weights.
    If the set is smaller than a batch, a warning is printed and the set before is kept.
    """
    models = model_of_class(ClassModels(**memory["models"]))
    own, predicted = cpu_copy(network), torch.full_like(data.labels, -1)
    for epoch, positions in samples_by_model(data.labels, models).items():
        network.load_state_dict(memory["weights"][epoch])
        batches = run.progress(data.plain(positions, run.args), f"{what} selection", training=False)
        predicted[positions] = predict(network, batches, len(positions), run.device).cpu()
    network.load_state_dict(own)
    confident = confident_examples(predicted, data.labels)
    if len(confident) >= smallest_set(run.args):
        memory["confident"] = confident
        chosen = [Selected(confident, data.labels, None)]
        memory["streaks"] = selection_report.follow(
            memory["streaks"], chosen, "longer inner loops (--n_epoch)"
        )
    elif processes.rank() == 0:
        print(
            f"warning: {what}: {len(confident)} confident examples are too few for a batch, the set before is kept",
            file=sys.stderr,
        )


def keep_models(network: nn.Module, memory: dict, epoch: int, score: Tensor, accuracy: float) -> None:
    """Make this epoch the model of the classes that it is best for; drop the weights that no class uses any more."""
    models = update(ClassModels(**memory["models"]), epoch, score, accuracy)
    used = in_use(models)
    if epoch in used:
        memory["weights"][epoch] = cpu_copy(network)
    memory["weights"] = {of: weights for of, weights in memory["weights"].items() if of in used}
    memory["models"] = models._asdict()


def load_reported(network: nn.Module, run: Run) -> None:
    """Load model_best.pt; if no epoch's validation accuracy was above 0 there is none, and the last weights stay."""
    path = run.folder / "model_best.pt"
    processes.wait()  # the first process has written it
    if path.is_file():
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def quality(network: nn.Module, memory: dict, data: Data, run: Run) -> Estimate:
    """What the reported weights say about the noisy labels."""
    load_reported(network, run)
    batches = data.plain(torch.arange(len(data.labels)), run.args)
    batches = run.progress(batches, "label quality", training=False)
    parts, confident = [data.order], memory["confident"]
    return estimate_label_quality(network, parts, [batches], confident, run.args.num_classes, run.device)


def full_test(network: nn.Module, data: Data, run: Run) -> dict[str, float]:
    """Accuracy on all test images of the reported network, for --full_test_at_end."""
    load_reported(network, run)
    accuracy = test(network, data.whole_test, "full test", run)["test_accuracy"]
    return {"full_test": accuracy, "full_test_images": len(data.whole_test.labels)}


def training_set(memory: dict, count: int) -> Tensor:
    """Positions of the images that are trained on, int [n], ascending."""
    return torch.arange(count) if memory["confident"] is None else memory["confident"]


def loss_weights(labels: Tensor, validation_labels: Tensor, num_classes: int) -> Tensor:
    """The weights of the classes for the current training set's noisy labels, float32 [K] (README, section 5)."""
    counts = (torch.bincount(given, minlength=num_classes) for given in (labels, validation_labels))
    return prior_weights(*counts)


def predictions(network: nn.Module, split: Labelled, what: str, run: Run) -> Tensor:
    """The class that the network predicts for each image of a split, int [N]."""
    batches = run.progress(split.batches, what, training=False)
    return predict(network, batches, len(split.labels), run.device)


def validate(network: nn.Module, split: Labelled, what: str, run: Run) -> Scores:
    """The network's scores on the clean validation images."""
    return scores(predictions(network, split, what, run), split.labels, run.args.num_classes)


def test(network: nn.Module, split: Labelled, what: str, run: Run) -> dict[str, float]:
    """Columns of the log: test accuracy over samples, and as the release's mean over batches, in percent."""
    predicted = predictions(network, split, what, run)
    batchmean = batch_mean_accuracy(predicted, split.labels, run.args.batch_size)
    return {"test_accuracy": accuracy(predicted, split.labels), "test_accuracy_batchmean": batchmean}


def set_columns(memory: dict, labels: Tensor, num_classes: int) -> dict[str, float | int | None]:
    """Columns of the log about the set that was trained on, and the number of checkpoints that make the next one.

    confident_size and confident_share, of all noisy images, are empty before the first selection; smallest_class: how
    often the rarest class is in the set, of the classes that the noisy list has.
    """
    confident = memory["confident"]
    current = training_set(memory, len(labels))
    counts = torch.bincount(labels[current], minlength=num_classes)
    return {
        "confident_size": None if confident is None else len(confident),
        "confident_share": None if confident is None else len(confident) / len(labels),
        "smallest_class": int(counts[labels.unique()].min()),
        "class_models": len(memory["weights"]) or None,
        **selection_report.columns([] if confident is None else [Selected(confident, labels, None)]),
    }


@cli.script
def main(argv=None) -> None:
    """Train Me-Momentum on Clothing1M and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(args.device, args.precision, several=True, fidelity=args.fidelity)
    data = load(args, device)
    fresh_network = partial(clothing_network, args.num_classes, args.network, args.pretrained)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    network = fresh_network()
    run = Run(
        args, device, paper="me_momentum", method=method(args), name=directory_name(args), cell=cell(args)
    )
    run.save_labels(data.index, data.clean, data.observed, args.num_classes)
    run.save_skipped(data.skipped)

    network = device.prepare(network, args.compile)
    if args.sync_bn:
        network = processes.synchronised(network)
    parallel = processes.parallel(network, device.device)
    optimizer = SGD(
        network.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, fused=device.on_cuda()
    )
    memory = fresh_memory(args.num_classes)
    run.resume({"network": network, "optimizer": optimizer, "generator": data.generator, "memory": memory})

    batches = None
    for epoch in run.epochs(args.num_epochs):
        place = place_of(epoch, args)
        if place.first:
            begin_inner_loop(place, network, optimizer, memory, fresh_network, data, run)
        current = training_set(memory, len(data.labels))
        if place.first or batches is None:
            batches = data.training(current, args)
        optimizer.param_groups[0]["lr"] = learning_rate(place, args.lr)
        labels = data.labels[current].to(device.device)
        weights = loss_weights(labels, data.validation.labels, args.num_classes)
        loss = train_weighted_epoch(
            parallel, optimizer, run.progress(batches, name_of(place)), labels, weights, device
        )
        processes.share_buffers(network)

        validation = validate(network, data.validation, f"{name_of(place)} validation", run)
        if args.selection == "confident":
            score = class_score(validation.recall, validation.precision, args.beta)
            keep_models(network, memory, place.epoch, score, validation.accuracy)
        new_best = is_new_best(validation.accuracy, run.rows)
        if new_best:
            run.save_weights("model_best.pt", network.state_dict())
        report = {"outer": place.outer, "inner": place.inner, "loss": loss}
        report |= {"validation_accuracy": validation.accuracy}
        report |= test(network, data.test, f"{name_of(place)} test", run)
        report |= set_columns(memory, data.labels, args.num_classes)
        report |= {"validation_std": validation.std, "lr": learning_rate(place, args.lr)}
        run.log(epoch, **report, new_best=int(new_best))

    metric = "test_accuracy_batchmean" if args.legacy_batch_mean else "test_accuracy"
    files = data.split.only(data.order.argsort())
    save_label_quality(run, partial(quality, network, memory, data, run), files=files, classes=data.classes)
    full = run.full_test(lambda: full_test(network, data, run))
    run.finish(metric, **clothing_summary(run.rows, metric), **full)


if __name__ == "__main__":
    cli.exit_cleanly(main)
