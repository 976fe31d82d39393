"""Self-supervised Adversarial Noisy Masking on Clothing1M (CVPR 2023): the release's algorithm without its defects.

    python sanm/Train_clothing1M.py --data_path data/Clothing1M                          # official lists, or the release's
    torchrun --nproc_per_node=8 sanm/Train_clothing1M.py --data_path data/Clothing1M     # the same on eight GPUs

The labels of the clean validation images choose the weights that are reported.
"""

import math
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli
from sanm import flags

make_parser = partial(flags.clothing_parser, __doc__)
cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.device import Device
from common.gpu.loader import Labelled, Part
from common.gpu.weights import cpu_copy
from common.runs import selection_report
from common.runs.label_quality import Estimate, save_label_quality
from common.runs.run import Run
from common.runs.selection_report import Selected
from sanm import clothing
from sanm.masking import draw_clothing_masks, mask_clothing
from sanm.mixmatch import Samples
from sanm.networks import clothing_network
from sanm.selection import clean_probability, divide, estimate_label_quality, normalised
from sanm.training import (
    Masks,
    Step,
    accuracy,
    learning_rate,
    network_scores,
    sample_losses,
    train_divided,
    warm_up,
)


def parse_args(argv=None) -> Namespace:
    """Parse, and settle the defaults that depend on other flags."""
    return flags.clothing_args(argv, __doc__)


# the method -----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What every pass over the training images shares."""

    args: Namespace
    device: Device
    run: Run
    data: clothing.Data
    draws: np.random.Generator  # subsets, mixture weights, starts of the GMM
    masks: torch.Generator  # masks and mixing partners, on the device, alike in all processes

    def subset(self, num_samples: int) -> np.ndarray:
        """A fresh class-balanced subset of the training images: positions, int64 [n]."""
        rng = random.Random(int(self.draws.integers(2**63)))
        return clothing.balanced_subset(self.data.split.labels, num_samples, self.args.num_class, rng)

    def labels(self, positions: np.ndarray) -> Tensor:
        """Their noisy labels, int [n], on the device."""
        return torch.from_numpy(self.data.split.labels[positions]).to(self.device.device)


class Division(NamedTuple):
    """A class-balanced subset and its clean probabilities by one network's losses."""

    positions: Tensor  # int64 [n]: of the images, on the CPU
    clean: Tensor  # float64 [n]


def warm_up_epoch(network: nn.Module, optimizer: SGD, name: str, s: Setting) -> float:
    """Mean loss of cross-entropy with a penalty on confident predictions, on a subset twice as large (README, section 9)."""
    args = s.args
    positions = s.subset(2 * args.num_batches * args.batch_size)
    batches = s.run.progress(s.data.training(positions, 2 * args.batch_size, 1, args), name)
    labels = s.labels(positions)
    losses = warm_up(network, optimizer, batches, labels, s.device, penalise_confidence=True, clip=None)
    return float(losses.mean())


def warm_up_steps(s: Setting) -> int:
    """The optimiser steps of the warm-up of a network."""
    labels, batch_size = s.data.split.labels, 2 * s.args.batch_size
    batches = clothing.subset_size(labels, s.args.num_batches * batch_size, s.args.num_class) / batch_size
    return math.floor(batches) if clothing.drops_last(s.args) else math.ceil(batches)


def label_quality(network: nn.Module, name: str, s: Setting) -> Division:
    """The clean probabilities of a fresh class-balanced subset by one network's losses (README, sections 6 and 9).

    The release pairs them with the first images of the list. If classes are short of images, it leaves the rest of the losses
    at zero (README, row 8 of the table of differences).
    """
    args = s.args
    asked = args.num_batches * args.batch_size
    positions = s.subset(asked)
    plain = s.run.progress(s.data.plain(positions, args), name, training=False)
    losses = sample_losses(network, plain, s.labels(positions), len(positions), s.device)
    if args.fidelity == "released":
        asked = min(asked, len(s.data.split.labels))
        losses = torch.cat([losses, losses.new_zeros(asked - len(losses))])
        positions = np.arange(asked)
    clean = clean_probability(normalised(losses), int(s.draws.integers(2**31)))
    return Division(torch.from_numpy(positions), clean.cpu())


def two_samples(views: tuple[Tensor, ...], clean: Tensor) -> Samples:
    """The two weak views are trained on; they also make targets, maps and masked images (README, section 9)."""
    return Samples(views, views, clean)


def co_divide(
    networks: tuple[nn.Module, nn.Module],
    parallel: nn.Module,
    optimizer: SGD,
    peers: Division,
    name: str,
    s: Setting,
) -> tuple[list[float], Selected]:
    """One epoch of the first network on the division by the second's losses (README, section 9): mean losses [5], selection."""
    args, device = s.args, s.device.device
    positions, clean = peers.positions.numpy(), peers.clean.to(device)
    selected = divide(peers.clean, args.p_threshold, args.batch_size)
    labelled, unlabelled = (
        Part(s.data.training(positions[own.numpy()], args.batch_size, 2, args), own.to(device))
        for own in (side.nonzero()[:, 0] for side in (selected, ~selected))
    )
    rule = flags.mask_rule(args)._replace(as_released=args.fidelity == "released")
    masks = Masks(draw_clothing_masks, mask_clothing, rule, s.masks)
    step = Step(
        two_samples,
        masks=masks if args.masking == "adversarial" else None,
        draw_lam=lambda: s.draws.beta(args.alpha, args.alpha),
        draw_permutation=partial(s.device.permutation, generator=s.masks),
        weight=lambda _: 0.0,
        temperature=args.T,
        reconstruction_weight=args.recon_weight,
        device=s.device,
        forward_unlabelled=False,
    )
    losses = train_divided(
        *networks,
        optimizer,
        s.run.progress(labelled, name),
        unlabelled.endless(),
        step,
        labels=s.labels(positions),
        clean=clean,
        parallel=parallel,
    )
    return losses.mean(dim=0).tolist(), Selected(selected, s.labels(positions).cpu(), None)


def scores(networks: Sequence[nn.Module], split: Labelled, name: str, s: Setting) -> Tensor:
    """The scores of each network, [networks, N, K]."""
    batches = s.run.progress(split.batches, name, training=False)
    return network_scores(networks, batches, len(split.labels), s.args.num_class, s.device)


def validate(nets: Sequence[nn.Module], best: list[dict], name: str, s: Setting) -> dict[str, float]:
    """Each network's validation accuracy. `best` keeps accuracy and weights of the best epoch so far, the first of equals."""
    report, own = {}, scores(nets, s.data.validation, name, s)
    for i, kept in enumerate(best):
        found = report[f"net{i + 1}_validation"] = accuracy(own[i], s.data.validation.labels)
        if found > kept["accuracy"]:
            kept["accuracy"], kept["weights"] = found, cpu_copy(nets[i])
    return report


def reported(nets: Sequence[nn.Module], best: list[dict], s: Setting) -> dict[str, float]:
    """The test accuracy that is reported: of both networks' sum, each with the weights that are best on validation."""
    for i, net in enumerate(nets):
        net.load_state_dict(best[i]["weights"])
        s.run.save_weights(f"net{i + 1}_best.pt", best[i]["weights"])
    summed = scores(nets, s.data.test, "test of the best weights", s).sum(dim=0)
    validation = {f"best_validation_net{i + 1}": kept["accuracy"] for i, kept in enumerate(best)}

    def full_test() -> dict[str, float]:
        summed = scores(nets, s.data.full_test, "full test of the best weights", s).sum(dim=0)
        labels = s.data.full_test.labels
        return {"full_test": accuracy(summed, labels), "full_test_images": len(labels)}

    reported = {"at_best_validation": accuracy(summed, s.data.test.labels), **validation}
    return reported | s.run.full_test(full_test)


def quality(nets: list[nn.Module], best: list[dict], s: Setting) -> Estimate:
    """Clean probabilities of all training images, by the losses of the reported weights; an epoch has those of a subset."""
    for net, kept in zip(nets, best, strict=True):
        net.load_state_dict(kept["weights"])
    everything = np.arange(len(s.data.split.labels))
    of_nets = scores(
        nets, Labelled(s.data.plain(everything, s.args), s.labels(everything)), "label quality", s
    )
    losses = [F.cross_entropy(own, s.labels(everything), reduction="none") for own in of_nets]
    clean = [clean_probability(normalised(own), s.args.seed) for own in losses]
    return estimate_label_quality(of_nets, clean, s.args.p_threshold, softmax=False)


# the script -----------------------------------------------------------------------------------------------------------


@cli.script
def main(argv=None) -> None:
    """Train SANM on Clothing1M and write its run directory."""
    args = parse_args(argv)
    device = gpu.pick(
        args.device, args.precision, args.gpuid, several=True, fidelity=args.fidelity, fixed_shapes=False
    )
    data = clothing.load(args, device)
    torch.manual_seed(args.seed)  # the initial weights are the only draws from the global generator
    nets: list[nn.Module] = [
        clothing_network(args.network, args.num_class, args.pretrained) for _ in range(2)
    ]
    method, name = flags.clothing_method(args), flags.clothing_directory(args)
    run = Run(args, device, paper="sanm", method=method, name=name, cell=flags.clothing_cell(args))
    run.save_labels(data.index, data.clean, data.split.labels, args.num_class)
    run.save_skipped(data.skipped)

    nets = [device.prepare(net, args.compile) for net in nets]
    if args.sync_bn:
        nets = [processes.synchronised(net) for net in nets]
    # the warm-up has no use for the decoder
    parallel = [processes.parallel(net, device.device, unused_parameters=True) for net in nets]
    optimizers = [
        gpu.sgd(net.parameters(), args.lr, 0.9, weight_decay=1e-3, fused=device.on_cuda()) for net in nets
    ]
    draws, masks = np.random.default_rng(args.seed), device.generator(args.seed)
    memory: dict[str, Any] = {
        "divisions": [None, None],
        "best": [{"accuracy": -1.0, "weights": {}} for _ in nets],
    }
    memory["streaks"] = selection_report.no_streaks(2, args.num_class)
    state = {"nets": nets, "optimizers": optimizers, "draws": draws, "masks": masks, "memory": memory}
    run.resume({**state, "images": data.generator})
    s = Setting(args, device, run, data, draws, masks)
    selection_report.note_short_warm_up(warm_up_steps(s), f"one epoch, --num_batches {args.num_batches}")

    for number in run.epochs(args.num_epochs + 1):
        epoch = number - 1  # the release counts from 0
        chosen = []
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, args.lr, args.lr_drop)
        if epoch == 0:
            pairs = zip(parallel, optimizers, strict=True)
            parts = [sum(warm_up_epoch(*pair, "epoch 0 warm-up", s) for pair in pairs) / 2, *[None] * 4]
        else:
            # both divisions come from the end of the epoch before; net2's losses select what net1 is trained on
            divisions = [Division(*kept) for kept in memory["divisions"]]
            trained = [
                co_divide(
                    (nets[i], nets[1 - i]), parallel[i], optimizers[i], divisions[1 - i], f"epoch {epoch}", s
                )
                for i in (0, 1)
            ]
            parts = [sum(values) / 2 for values in zip(*(losses for losses, _ in trained), strict=True)]
            chosen = [trained[1][1], trained[0][1]]
            memory["streaks"] = selection_report.follow(memory["streaks"], chosen, "more --num_batches")
        for net in nets:
            processes.share_buffers(net)
        counts = [int(own.chosen.sum()) for own in chosen] or [None, None]
        report: dict[str, float] = {"loss": parts[0], "net1_selected": counts[0], "net2_selected": counts[1]}
        report |= validate(nets, memory["best"], f"epoch {epoch} validation", s)
        if epoch < args.num_epochs:
            memory["divisions"] = [list(label_quality(net, f"epoch {epoch} losses", s)) for net in nets]
        summed = scores(nets, data.test, f"epoch {epoch} test", s).sum(dim=0)
        report["test_accuracy"] = accuracy(summed, data.test.labels)
        report |= {"labelled_loss": parts[1], "prior_loss": parts[3], "reconstruction_loss": parts[4]}
        run.log(number, **report, **selection_report.columns(chosen), lr=optimizers[0].param_groups[0]["lr"])

    estimate = partial(quality, nets, memory["best"], s)
    save_label_quality(run, estimate, files=data.split, classes=data.classes)
    run.finish(**({} if run.is_finished() else reported(nets, memory["best"], s)))


if __name__ == "__main__":
    cli.exit_cleanly(main)
