"""The passes over the data: warm-up, training on a split, losses and scores (README, sections 4, 6 and 8).

Batches are (views, index): a tuple of [B, ...] tensors and the samples' positions, int [B]. Labels and clean probabilities
are tensors on the device of the images, by those positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.device import Device
from sanm.choices import MaskRule
from sanm.losses import negative_entropy
from sanm.masking import Masked
from sanm.mixmatch import Samples, step_loss


@dataclass(frozen=True)
class Masks:
    """Adversarial masking with its draws: CIFAR's functions of `masking`, or Clothing1M's."""

    draw: Callable[[int, int, MaskRule, Generator], Tensor]
    apply: Callable[..., Masked]
    rule: MaskRule
    generator: Generator

    def __call__(
        self, images: Tensor, maps: Tensor, clean: Tensor, targets: Tensor, sizes: tuple[int, int]
    ) -> Masked:
        """Masked copies of labelled and unlabelled images, `sizes` of each; drawn for the global batch, under torchrun too."""
        own, world = processes.rank(), processes.world()
        draws = [
            self.draw(world * n, images.shape[1], self.rule, self.generator)[own * n : (own + 1) * n]
            for n in sizes
        ]
        device, home = images.device, gpu.home(images.device)
        given = (values.to(home) for values in (images, maps, clean, targets))
        return Masked(*(made.to(device) for made in self.apply(*given, torch.cat(draws), self.rule)))


class Step(NamedTuple):
    """What the steps of an epoch share."""

    as_samples: Callable[[tuple[Tensor, ...], Tensor], Samples]  # of a batch's views and clean probabilities
    masks: Masks | None  # None: the base method, without masks and reconstruction
    draw_lam: Callable[[], float]  # the Beta draw of the mixture
    draw_permutation: Callable[[int], Tensor]  # its partners
    weight: Callable[[int], float]  # lambda of the unlabelled loss, by step
    temperature: float
    reconstruction_weight: float
    device: Device
    forward_unlabelled: bool = True


def learning_rate(epoch: int, lr: float, drop: int) -> float:
    """The learning rate drops by 10x from epoch `drop` on; epochs count from 0 (README, section 4)."""
    return lr if epoch < drop else lr / 10


def warm_up(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    device: Device,
    *,
    penalise_confidence: bool,
    clip: float | None,
) -> Tensor:
    """One epoch of cross-entropy on the observed labels, plus the negative entropy if asked: each step's loss [steps].

    clip: largest gradient norm. Under torchrun the loss is that of the global batch.
    """
    network.train()
    losses = []
    for (images,), index in batches:
        given = labels[processes.gather_rows(index)]
        with device.autocast(network):
            scores = processes.gather_rows(network(images).scores)
        loss = F.cross_entropy(scores, given)
        if penalise_confidence:
            loss = loss + negative_entropy(scores)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_divided(
    network: nn.Module,
    peer: nn.Module,
    optimizer: Optimizer,
    labelled: Iterable,
    unlabelled: Iterator,
    step: Step,
    *,
    labels: Tensor,
    clean: Tensor,
    parallel: nn.Module | None = None,
) -> Tensor:
    """One epoch on the split that the peer's losses made: each step's losses [steps, 5], total, L_x, L_u, L_prior, L_rec.

    `unlabelled` is an endless iterator; the labelled batches decide the number of steps. parallel: the network around which
    gradients are averaged, under torchrun.
    """
    network.train()
    peer.eval()
    losses = []
    for number, (views, index) in enumerate(labelled):
        views_u, index_u = next(unlabelled)
        with step.device.autocast(peer):
            loss = step_loss(
                network,
                peer,
                step.as_samples(views, clean[index]),
                step.as_samples(views_u, clean[index_u]),
                labels[index],
                masks=step.masks,
                weight=step.weight(number),
                reconstruction_weight=step.reconstruction_weight,
                draw_lam=step.draw_lam,
                draw_permutation=step.draw_permutation,
                temperature=step.temperature,
                forward_unlabelled=step.forward_unlabelled,
                parallel=parallel,
            )
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        optimizer.step()
        losses.append(torch.stack([part.detach() for part in loss]))
    return torch.stack(losses)


@torch.no_grad()
def sample_losses(network: nn.Module, batches: Iterable, labels: Tensor, size: int, device: Device) -> Tensor:
    """Cross-entropy of each position 0 .. size - 1 with its observed label, float32 [size], in eval mode (README, section 6).

    Under torchrun each process goes through its batches, and all have the losses of all.
    """
    network.eval()
    losses = torch.zeros(size, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            scores = network(images).scores
        losses[index] = F.cross_entropy(scores, labels[index], reduction="none")
    return processes.total(losses)


@torch.no_grad()
def network_scores(
    networks: Sequence[nn.Module], batches: Iterable, size: int, num_classes: int, device: Device
) -> Tensor:
    """The scores of each network for each position 0 .. size - 1, float32 [networks, size, K], in eval mode."""
    networks = [network.eval() for network in networks]
    scores = torch.zeros(len(networks), size, num_classes, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            for own, network in zip(scores, networks, strict=True):
                own[index] = network(images).scores
    return processes.total(scores)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of scores [N, K] against labels int [N]; the method predicts by the sum of both networks'."""
    return 100 * float((scores.argmax(dim=1) == labels).float().mean())
