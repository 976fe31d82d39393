"""The passes over the data that both scripts are made of: warm-up, MixEMatch, one look at all samples, test (Sec. 4, 6).

Batches are (views, index): a tuple of [B, C, H, W] tensors and the samples' positions, int [B]. What is known of the samples are
tensors on the device of the images, by those positions.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.gpu import processes
from common.gpu.device import Device
from manifold_dividemix.losses import symmetric_cross_entropy, warm_up_loss
from manifold_dividemix.mixematch import Views, Weights, encode, make_targets, step_loss


class Step(NamedTuple):
    """What the MixEMatch steps of an epoch share."""

    draw_share: Callable[[], float]  # the Beta draw of the mixture
    draw_permutation: Callable[[int], Tensor]  # its partners
    ramp: Callable[[int], float]  # factor of the unlabelled losses by step
    weights: Weights
    temperature: float  # of sharpening
    threshold: float  # of confident guesses
    kind: str  # of the labelled loss: RL or CE
    rce: str  # log or released
    device: Device


class Look(NamedTuple):
    """What one pass over plain training images gives, in their order."""

    embeddings: Tensor  # float32 [N, D]
    losses: Tensor  # float32 [N], cross-entropy with the observed labels
    hits: Tensor  # bool [N]: whether the observed label is predicted


def set_mode(network: nn.Module, mode: str, warming_up: bool, frozen_encoder: bool) -> None:
    """Whether batch norms take a batch's statistics: train, always; frozen, never; warm-up, in the warm-up only (Sec. 10, 2).

    An encoder that is not trained keeps its statistics.
    """
    network.train(mode == "train" or (mode == "warm-up" and warming_up))
    if frozen_encoder:
        network.encoder.eval()


def update(network: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
    """One step of gradient descent."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    processes.average_gradients(network.parameters())
    optimizer.step()


def warm_up(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    kept: Tensor,
    device: Device,
    *,
    loss: str = "SCE",
    mask: str = "sample",
    project: bool = False,
) -> Tensor:
    """One epoch of symmetric cross-entropy (loss "CE": plain) on the samples that are not removed: each step's loss (Sec. 4.3).

    labels int [N], kept bool [N]. mask: see `losses.warm_up_loss`. project: the projection runs in every forward pass, so that
    its batch norm collects running statistics; it is not trained. A batch of one sample has none, and is left out of them.
    """
    share = float(kept.float().mean())
    losses = []
    for (images,), index in batches:
        with device.autocast():
            (embeddings,) = encode(network, [images])
        if project and len(embeddings) > 1:
            with torch.no_grad():
                network.project(embeddings)
        logits = network.classify(embeddings)
        if loss == "SCE":
            each = symmetric_cross_entropy(logits, labels[index])
        else:
            each = F.cross_entropy(logits, labels[index], reduction="none")
        value = warm_up_loss(each, kept[index], mask, share)
        update(network, optimizer, value)
        losses.append(value.detach())
    return torch.stack(losses)


def without_single(batches: Iterator) -> Iterator:
    """The batches of two samples and more: batch norm has no statistics of one projection."""
    return (batch for batch in batches if len(batch[1]) > 1)


def train_divided(
    network: nn.Module,
    optimizer: Optimizer,
    labelled: Iterable,
    unlabelled: Iterator,
    step: Step,
    *,
    labels: Tensor,
    clean: Tensor,
) -> Tensor:
    """One MixEMatch epoch (Sec. 4.5): each step's losses [steps, 7], in the order of `mixematch.Loss`.

    unlabelled goes on for ever; the labelled batches decide the number of steps. Views: two weak, then two strong ones.
    labels int [N], clean probabilities [N].
    """
    losses = []
    for number, (views, index) in enumerate(labelled):
        x = Views(views[:2], views[2:])
        views_u, _ = next(unlabelled)
        u = Views(views_u[:2], views_u[2:])
        with step.device.autocast():
            targets = make_targets(
                network, x, u, labels[index], clean[index], step.temperature, step.threshold
            )
            loss = step_loss(
                network,
                x,
                u,
                targets,
                share=step.draw_share(),
                permutation=step.draw_permutation(2 * len(views[0]) + 2 * len(views_u[0])),
                weights=step.weights,
                ramp=step.ramp(number),
                kind=step.kind,
                rce=step.rce,
            )
        update(network, optimizer, loss.total)
        losses.append(torch.stack([loss.total.detach(), *loss[1:]]))
    return torch.stack(losses)


@torch.no_grad()
def look(network: nn.Module, batches: Iterable, labels: Tensor, device: Device) -> Look:
    """Embeddings and losses of all plain training images in one pass, in eval mode (Sec. 4.2, 4.4); labels int [N].

    Under torchrun each process goes through its batches, and all have everything.
    """
    network.eval()
    embeddings = torch.zeros(len(labels), network.classifier.in_features, device=device.device)
    losses, hits = torch.zeros(2, len(labels), device=device.device)
    for (images,), index in batches:
        with device.autocast():
            embeddings[index] = network(images)
        logits = network.classify(embeddings[index])
        losses[index] = F.cross_entropy(logits, labels[index], reduction="none")
        hits[index] = (logits.argmax(dim=1) == labels[index]).to(logits.dtype)
    return Look(processes.total(embeddings), processes.total(losses), processes.total(hits).bool())


@torch.no_grad()
def all_logits(network: nn.Module, batches: Iterable, size: int, num_classes: int, device: Device) -> Tensor:
    """The logits of positions 0 .. size - 1, float32 [size, K], in eval mode."""
    network.eval()
    logits = torch.zeros(size, num_classes, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            embeddings = network(images)
        logits[index] = network.classify(embeddings)
    return processes.total(logits)


def top_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the rows of logits [N, K] whose label, int [N], is among the k largest (Sec. 6)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * float((best == labels[:, None]).any(dim=1).float().mean())
