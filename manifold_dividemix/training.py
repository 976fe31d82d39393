"""The passes over the data of both training scripts: warm-up, MixEMatch, embeddings, test (README, section 4).

Batches are (views, index): a tuple of [B, C, H, W] tensors and the samples' positions, int [B]. Labels, clean probabilities and
masks are tensors by position, on the device of the images.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from common.gpu import processes
from common.gpu.augment import crop_and_flip, training_augmentation
from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from common.runs.data_flags import MINI_IMAGENET
from common.runs.run import Run
from manifold_dividemix.choices import Lambdas
from manifold_dividemix.losses import symmetric_cross_entropy, warm_up_loss
from manifold_dividemix.mixematch import Views, encode, step_loss
from manifold_dividemix.networks import Network


class Setting(NamedTuple):
    """What every pass over the training set shares."""

    args: Namespace
    device: Device
    run: Run
    train: Images
    labels: Tensor  # observed, int [N]
    loader: torch.Generator  # order, augmentation and mixing partners, alike in all processes
    draws: np.random.Generator  # mixture weights and starts of the GMM, alike in all processes

    def crop(self):
        """The crop-and-flip of all training views; of mini-ImageNet by 4 pixels at any size, as in the release."""
        if self.args.dataset == MINI_IMAGENET:
            return crop_and_flip
        return training_augmentation(self.args.dataset, self.train.pixels.shape[2])

    def batches(self, augmentation, subset: Tensor | None = None) -> Batches:
        """Shuffled, augmented batches. Several processes drop a smaller last one, which they cannot share."""
        return Batches(
            self.train,
            self.args.batch_size,
            subset=subset,
            shuffle=True,
            augmentation=augmentation,
            generator=self.loader,
            drop_last=processes.world() > 1,
        )

    def plain(self, name: str):
        """All training images without augmentation, dealt out to the processes."""
        return self.run.progress(plain_batches(self.train), name, training=False)


def plain_batches(images: Images) -> Batches:
    """All images in order, dealt out to the processes."""
    return Batches(images, 512, rank=processes.rank(), world=processes.world())


class Step(NamedTuple):
    """What the MixEMatch steps of an epoch share."""

    draw_lam: Callable[[], float]  # the Beta draw of the mixture
    draw_permutation: Callable[[int], Tensor]  # its partners
    ramp: Callable[[int], float]  # factor of the unlabelled losses by step
    lambdas: Lambdas
    temperature: float  # of sharpening
    threshold: float  # of confident guesses
    kind: str  # of the labelled loss: RL or CE
    rce: str  # log or released
    device: Device


class Embedded(NamedTuple):
    """What one pass over the plain training images gives, in their order."""

    embeddings: Tensor  # float32 [N, D]
    losses: Tensor  # float32 [N], cross-entropy with the observed labels
    hits: Tensor  # bool [N]: whether the observed label is predicted


def set_mode(network: Network, mode: str, warming_up: bool, frozen_encoder: bool) -> None:
    """Whether batch norms use batch statistics (README, difference 2). mode: train, always; frozen, never; warm-up, only then.

    An encoder that is not trained keeps its statistics.
    """
    network.train(mode == "train" or (mode == "warm-up" and warming_up))
    if frozen_encoder:
        network.encoder.eval()


def update(network: Network, optimizer: Optimizer, loss: Tensor) -> None:
    """One step of gradient descent."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    processes.average_gradients(network.parameters())
    optimizer.step()


def warm_up(
    network: Network,
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
    """One epoch of warm-up on the samples that are not removed (README, section 4.3): the loss of each step.

    labels int [N], kept bool [N]. loss: symmetric ("SCE") or plain ("CE") cross-entropy. mask: see `losses.warm_up_loss`.
    project: the projection runs in every forward pass, so that its batch norm collects running statistics; it is not trained,
    and batches of one sample, which have no statistics, are left out.
    """
    kept_ratio = float(kept.float().mean())
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
        value = warm_up_loss(each, kept[index], mask, kept_ratio)
        update(network, optimizer, value)
        losses.append(value.detach())
    return torch.stack(losses)


def without_single(batches: Iterator) -> Iterator:
    """The batches of two samples and more: batch norm has no statistics of one projection."""
    return (batch for batch in batches if len(batch[1]) > 1)


def train_divided(
    network: Network,
    optimizer: Optimizer,
    labelled: Iterable,
    unlabelled: Iterator,
    step: Step,
    *,
    labels: Tensor,
    clean: Tensor,
) -> Tensor:
    """One MixEMatch epoch (README, section 4.5): each step's losses [steps, 7], in the order of `mixematch.Loss`.

    labelled: decides the number of steps. unlabelled: an endless iterator. Views: two weak, then two strong ones. labels int [N],
    clean probabilities [N].
    """
    losses = []
    for number, (views_x, index) in enumerate(labelled):
        views_u, _ = next(unlabelled)
        with step.device.autocast():
            loss = step_loss(
                network,
                (Views(views_x[:2], views_x[2:]), labels[index], clean[index]),
                Views(views_u[:2], views_u[2:]),
                lambdas=step.lambdas,
                ramp=step.ramp(number),
                lam=step.draw_lam(),
                permutation=step.draw_permutation(2 * len(views_x[0]) + 2 * len(views_u[0])),
                temperature=step.temperature,
                threshold=step.threshold,
                kind=step.kind,
                rce=step.rce,
            )
        update(network, optimizer, loss.total)
        losses.append(torch.stack([loss.total.detach(), *loss[1:]]))
    return torch.stack(losses)


@torch.no_grad()
def embed(network: Network, batches: Iterable, labels: Tensor, device: Device) -> Embedded:
    """Embeddings and losses of all plain training images in one pass, in eval mode; labels int [N].

    Under torchrun each process passes over its batches, and all have the result.
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
    return Embedded(processes.total(embeddings), processes.total(losses), processes.total(hits).bool())


@torch.no_grad()
def all_logits(network: Network, batches: Iterable, size: int, num_classes: int, device: Device) -> Tensor:
    """The logits of positions 0 .. size - 1, float32 [size, K], in eval mode."""
    network.eval()
    logits = torch.zeros(size, num_classes, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            embeddings = network(images)
        logits[index] = network.classify(embeddings)
    return processes.total(logits)


def top_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the rows of logits [N, K] whose label, int [N], is among the k largest."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * float((best == labels[:, None]).any(dim=1).float().mean())
