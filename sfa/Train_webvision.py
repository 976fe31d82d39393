"""Stochastic Feature Averaging on mini-WebVision (IJCAI 2023), tested on WebVision and on ILSVRC12.

    python sfa/Train_webvision.py --data_path ./webvision/                                 # one card, or a network on each of two
    torchrun --nproc_per_node=4 sfa/Train_webvision.py --data_path ./webvision/            # both networks on all of four

The labels are those of the web search. sfa/README.md describes the method in numbered sections; this script is section 7.
"""

import math
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from sfa.flags import make_webvision_parser as make_parser

cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
from torch import Tensor, nn

from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.device import Device
from common.gpu.loader import FileBatches, Labelled
from common.runs import selection_report
from common.runs.label_quality import save_label_quality
from common.runs.run import Run
from common.runs.selection_report import Selected
from sfa.evaluation import SHOTS, accuracies, estimate_label_quality, top_k_accuracy
from sfa.flags import WEBVISION_WARM_UP as WARM_UP
from sfa.flags import parse_webvision_args as parse_args
from sfa.flags import webvision_cell, webvision_directory
from sfa.learners import Learner, make_learner, start_two_processes, train_one_each
from sfa.record import classes_last, empty_memory, remember, save_selections
from sfa.selection import (
    Moments,
    Selection,
    confidence_threshold,
    incoming_moments,
    stochastic_feature_averaging,
)
from sfa.training import features_and_confidence, summed_logits, train_semi, warm_up
from sfa.webvision import Data, drops_last, load


class Setting(NamedTuple):
    """What every pass over the training images shares."""

    args: Namespace
    device: Device
    run: Run
    data: Data
    labels: Tensor  # observed, int [N]


def warm_up_epoch(learner: Learner, name: str, setting: Setting) -> Tensor:
    """One epoch on all images with their observed labels, in batches twice as large: each step's loss."""
    args, labels = setting.args, setting.labels
    batches = setting.data.training(np.arange(len(labels)), 2 * args.batch_size, 1, learner.images, args)
    batches = setting.run.progress(batches, name)
    counts = torch.bincount(labels, minlength=args.num_class)
    return warm_up(learner.parallel, learner.optimizer, batches, labels, counts, setting.device)


def note_warm_up(setting: Setting) -> None:
    """Print a note if a selection that is trained on follows a warm-up of few steps."""
    args = setting.args
    if args.num_epochs > WARM_UP:
        batches = len(setting.labels) / (2 * args.batch_size)
        steps = WARM_UP * max(1, math.floor(batches) if drops_last(args) else math.ceil(batches))
        selection_report.note_short_warm_up(steps, f"one epoch, --batch_size {args.batch_size}")


def co_divide(learner: Learner, peer: nn.Module, clean: Tensor, name: str, setting: Setting) -> Tensor:
    """One epoch of a network on its peer's selection, the peer as it was at the end of the epoch before: each step's loss.

    clean [N]: by the peer. Only labelled rows are mixed and trained on; unlabelled ones are partners.
    """
    args, device = setting.args, setting.device
    selected = clean > args.p_threshold
    sides = [side.nonzero()[:, 0].cpu().numpy() for side in (selected, ~selected)]
    labelled, unlabelled = (
        setting.data.training(side, args.batch_size, 2, learner.images, args) for side in sides
    )
    if labelled is None:
        print(f"warning: {name}: no sample selected, one network is not trained", file=sys.stderr)
        return torch.empty(0, device=device.device)
    losses = train_semi(
        learner.network,
        peer,
        learner.optimizer,
        setting.run.progress(labelled, name),
        None if unlabelled is None else unlabelled.endless(),
        labels=setting.labels,
        clean=clean,
        class_counts=torch.bincount(setting.labels[selected], minlength=args.num_class),
        weight=lambda _: 0.0,
        draw_lam=lambda: learner.draws.beta(args.alpha, args.alpha),
        draw_permutation=partial(device.permutation, generator=learner.partners),
        temperature=args.T,
        device=device,
        forward_unlabelled=False,
        parallel=learner.parallel,
    )
    return losses[:, 0]


def train_both(learners: list[Learner], clean: list[Tensor | None], epoch: int, setting: Setting) -> Tensor:
    """One epoch of both networks: the losses of all steps. One after the other or in two processes, the result is the same."""
    args, device = setting.args, setting.device
    peers = [deepcopy(learner.network) for learner in learners]

    def train(i: int) -> Tensor:
        if args.reset_momentum == "yes":
            learners[i].optimizer.state.clear()
        if epoch <= WARM_UP:
            return warm_up_epoch(learners[i], f"epoch {epoch} warm-up of network {i + 1}", setting)
        name = f"epoch {epoch} training of network {i + 1}"
        return co_divide(learners[i], peers[1 - i], clean[1 - i].to(device.device), name, setting)

    if args.parallel == "networks":
        return train_one_each(learners, train, setting.run, device)
    return torch.cat([train(i) for i in (0, 1)])


def select(
    learner: Learner, moments: Moments | None, plain: FileBatches, name: str, setting: Setting
) -> Selection:
    """Clean samples according to one network (README, section 6): the same in all processes, on the CPU.

    moments: those the epoch starts from, None at the first selections.
    """
    args, labels, epoch = setting.args, setting.labels, len(setting.run.rows) + 1
    plain = setting.run.progress(plain, name, training=False)
    features, confidence = features_and_confidence(learner.network, plain, labels, setting.device)
    normals = learner.draws.normal(size=(args.sample_rate, args.num_class, features.shape[1]))
    # the release has 0.02 whatever the number of classes
    classes = 50 if args.fidelity == "released" else args.num_class

    def on_cpu() -> Selection:
        selection = stochastic_feature_averaging(
            features,
            labels,
            confidence,
            moments,
            normals=torch.from_numpy(normals).to(gpu.home(setting.device.device)),
            threshold=confidence_threshold(classes, args.phi, epoch),
            beta=args.beta,
            min_draw_count=args.min_draw_count,
            p_threshold=args.p_threshold,
        )
        tensors = selection._asdict()
        new_moments = Moments(*(own.cpu() for own in tensors.pop("moments")))
        return Selection(**{name: tensor.cpu() for name, tensor in tensors.items()}, moments=new_moments)

    return processes.from_first(on_cpu)  # on a card the order of sums differs between processes


def test(
    learners: list[Learner], tests: dict[str, Labelled], name: str, setting: Setting
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on both test sets, by the summed logits of both networks (README, section 8)."""
    num_classes, report, by_class = setting.args.num_class, {}, {}
    counts = np.bincount(setting.data.split.labels, minlength=num_classes)
    networks = [learner.network for learner in learners]
    for part, (batches, labels) in tests.items():
        passed = setting.run.progress(batches, f"{name} {part}", training=False)
        logits = summed_logits(networks, passed, len(labels), num_classes, setting.device)
        measured = accuracies(logits.argmax(dim=1).cpu().numpy(), labels.cpu().numpy(), counts)
        prefix = "" if part == "test" else f"{part}_"
        report[f"{prefix or 'test_'}accuracy"] = measured.pop("test_accuracy")
        report[f"{prefix}top5_accuracy"] = top_k_accuracy(logits, labels, min(5, num_classes))
        if part == "test":
            by_class = measured
    return report | by_class


def full_test(learners: list[Learner], setting: Setting) -> dict[str, float]:
    """Top-1 accuracy on all images of both test sets, for --full_test_at_end."""
    tests = setting.data.full_tests
    report = test(learners, tests, "full", setting)
    names = {"test_accuracy": "full_test", "imagenet_accuracy": "full_test_imagenet_accuracy"}
    images = {"full_test_images": len(tests["test"].labels)}
    return {new: report[old] for old, new in names.items() if old in report} | images


def further_metrics(rows: list[dict]) -> dict[str, float]:
    """Metrics beside those of test_accuracy: last and best of the other accuracies, last of shots and selections."""
    metrics = {}
    for name in ("top5_accuracy", "imagenet_accuracy", "imagenet_top5_accuracy"):
        if name in rows[0]:
            values = [row[name] for row in rows]
            metrics |= {f"last_{name}": values[-1], f"best_{name}": max(values)}
    last = (*(f"{shot}_accuracy" for shot in SHOTS), "net1_selected", "net2_selected")
    return metrics | {f"last_{name}": rows[-1][name] for name in last}


@cli.script
def main(argv: list[str] | None = None) -> None:
    """Train SFA on mini-WebVision and write its run directory."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.parallel == "networks" and not processes.launched():
        with redirect_stdout(None):  # bad data ends this process, in one line, before two are started
            load(args, Device(torch.device("cpu"), "fp32", ""))
        start_two_processes(args, argv)
    device = gpu.pick(
        args.device, args.precision, args.gpuid1, several=True, fidelity=args.fidelity, fixed_shapes=False
    )
    data = load(args, device)
    name, cell = webvision_directory(args), webvision_cell(args)
    run = Run(args, device, paper="sfa", method="SFA", name=name, cell=cell)
    run.save_labels(data.index, data.clean, data.split.labels, args.num_class)
    run.save_skipped(data.skipped)

    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    learners = [make_learner(i, args, device) for i in (0, 1)]
    plain, labels = data.plain(args), torch.from_numpy(data.split.labels).to(device.device)
    memory = empty_memory(args.num_class)
    run.resume({"learners": [learner.state() for learner in learners], "memory": memory})
    setting = Setting(args, device, run, data, labels)
    note_warm_up(setting)

    for epoch in run.epochs(args.num_epochs):
        lr = args.lr if epoch < args.lr_drop else args.lr / 10
        for learner in learners:
            learner.optimizer.param_groups[0]["lr"] = lr
        losses = train_both(learners, memory["clean"], epoch, setting)
        report = test(learners, data.tests, f"epoch {epoch}", setting)
        # the moments start again until the first epoch after the warm-up; the next epoch trains on the selections
        earlier = [None, None] if epoch <= WARM_UP + 1 else memory["moments"]
        moments = [incoming_moments(own, args.ema_mode, device.device) for own in earlier]
        selections = [
            select(learners[i], moments[i], plain, f"epoch {epoch} selection of network {i + 1}", setting)
            for i in (0, 1)
        ]
        remember(memory, selections)
        chosen = [Selected(selection.selected, labels.cpu(), None) for selection in selections]
        memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "a lower --p_threshold")
        for i, selection in enumerate(selections, start=1):
            report[f"net{i}_selected"] = int(selection.selected.sum())
            report[f"net{i}_drawn_classes"] = int(selection.drawn.sum())
        report |= selection_report.columns(chosen) | {"lr": lr}
        run.log(epoch, loss=float(losses.mean()) if len(losses) else None, **classes_last(report))

    save_selections(run, memory, observed=data.split.labels)
    nets, size = [learner.network for learner in learners], (len(labels), args.num_class)
    passed = run.progress(plain, "label quality", training=False)
    of_networks = nets, memory["clean"], passed, size, args.p_threshold, device
    save_label_quality(
        run, lambda: estimate_label_quality(*of_networks), files=data.split, classes=data.classes
    )
    full = run.full_test(lambda: full_test(learners, setting))
    run.finish(**further_metrics(run.rows), **full)


if __name__ == "__main__":
    cli.exit_cleanly(main)
