"""The passes over the data: warm-up, semi-supervised training, features, losses, test (README, sections 4, 6 and 8).

Batches are (views, index): a tuple of [B, ...] tensors and the samples' positions in the training set, int [B]. Labels, clean
probabilities and class counts are on the device of the images. Under torchrun each process trains on its piece of every batch,
with the loss of all pieces. It evaluates every n-th batch; all processes get the results of all batches.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.gpu import processes
from common.gpu.device import Device
from sfa.losses import cross_entropy, warm_up_loss
from sfa.mixmatch import gather_logits, step_loss
from sfa.networks import TwoHeads


def warm_up(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    class_counts: Tensor,
    device: Device,
    loss: Callable[..., Tensor] = cross_entropy,
) -> Tensor:
    """One epoch on all samples: each step's loss(h1, y) + CE(h2 + ln n, y), [steps].

    labels: observed, int [N]. class_counts: n, int [K]. loss: of the standard head h1.
    """
    network.train()
    losses = []
    for (images,), index in batches:
        given = labels[processes.gather_rows(index)]
        with device.autocast(network):
            standard, auxiliary = gather_logits(network, images)
            total = warm_up_loss(standard, auxiliary, given, class_counts, loss)
        _step(optimizer, total)
        losses.append(total.detach())
    return torch.stack(losses)


def train_semi(
    network: nn.Module,
    peer: nn.Module,
    optimizer: Optimizer,
    labelled: Iterable,
    unlabelled: Iterator | None,
    *,
    labels: Tensor,
    clean: Tensor,
    class_counts: Tensor,
    weight: Callable[[int], float],
    draw_lam: Callable[[], float],
    draw_permutation: Callable[[int], Tensor],
    temperature: float,
    device: Device,
    forward_unlabelled: bool = True,
    loss: Callable[..., Tensor] = cross_entropy,
    parallel: nn.Module | None = None,
) -> Tensor:
    """One epoch of co-divided training: one pass over the labelled batches. Each step's losses [steps, 5].

    The losses are total, L_x, L_u, L_x', L_u'. labelled and unlabelled yield two views each. unlabelled is an endless iterator,
    or None if all samples are labelled. labels: observed, int [N]. clean: by the peer, [N]. class_counts [K]: labelled samples
    per observed class. weight(step): lambda of the unlabelled losses. draw_lam, draw_permutation: the mixture's weight and
    partners of a step. loss: of the standard head. parallel: the network around which gradients are averaged, under torchrun.
    """
    network.train()
    peer.eval()
    losses = []
    for number, (views, index) in enumerate(labelled):
        others = None if unlabelled is None else next(unlabelled)[0]
        rows = sum(len(view) for view in (*views, *(others or ())))
        with device.autocast(network, peer):
            step = step_loss(
                network,
                peer,
                (views, labels[index], clean[index]),
                others,
                class_counts=class_counts,
                weight=weight(number),
                lam=draw_lam(),
                permutation=draw_permutation(processes.world() * rows),
                temperature=temperature,
                forward_unlabelled=forward_unlabelled,
                loss=loss,
                parallel=parallel,
            )
        _step(optimizer, step.total)
        losses.append(torch.stack([part.detach() for part in step]))
    return torch.stack(losses)


def _step(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def features_and_confidence(
    network: nn.Module, batches: Iterable, labels: Tensor, device: Device
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and the auxiliary head's softmax at the observed label [N], of un-augmented ordered batches."""
    network.eval()
    heads: TwoHeads = network.heads
    features = torch.zeros(len(labels), heads.feature_size, device=labels.device)
    confidence = torch.zeros(len(labels), device=labels.device)
    for (images,), index in batches:
        with device.autocast():
            features[index], _, auxiliary = network(images)
        confidence[index] = F.softmax(auxiliary, dim=1).gather(1, labels[index, None])[:, 0]
    return processes.total(features), processes.total(confidence)


@torch.no_grad()
def sample_losses(network: nn.Module, batches: Iterable, labels: Tensor, device: Device) -> Tensor:
    """The standard head's cross-entropy with the observed label [N], of un-augmented ordered batches."""
    network.eval()
    losses = torch.zeros(len(labels), device=labels.device)
    for (images,), index in batches:
        with device.autocast():
            _, standard, _ = network(images)
        losses[index] = F.cross_entropy(standard, labels[index], reduction="none")
    return processes.total(losses)


@torch.no_grad()
def summed_logits(
    networks: Iterable[nn.Module], batches: Iterable, size: int, num_classes: int, device: Device
) -> Tensor:
    """The sum of the raw logits of both heads of all networks, [size, K], for the samples at positions 0 .. size - 1."""
    networks = [network.eval() for network in networks]
    logits = torch.zeros(size, num_classes, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            outputs = [network(images) for network in networks]
        logits[index] = sum(standard + auxiliary for _, standard, auxiliary in outputs)
    return processes.total(logits)
