"""The passes over the data that SFA's scripts are made of: warm-up, semi-supervised training, features, test (Sec. 4).

Batches are (views, index): a tuple of [B, ...] tensors and the samples' positions in the training set, int [B]. Labels,
clean probabilities and class counts are tensors on the device of the images. Under torchrun each process trains on its piece of
every batch with the loss of all of it, and evaluates its share of the batches; each ends up with the results of all.
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


def warm_up(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    class_counts: Tensor,
    device: Device,
    loss: Callable[..., Tensor] = cross_entropy,
) -> Tensor:
    """One epoch on all samples with their observed labels: loss(h1, y) + CE(h2 + ln n, y). Returns each step's loss."""
    network.train()
    losses = []
    for (images,), index in batches:
        given = labels[processes.gather_rows(index)]
        with device.autocast():
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
    """One epoch of co-divided training: one pass over the labelled batches of the peer's split.

    labelled and unlabelled yield two views each; unlabelled goes on for ever, and is None where every sample is
    confident. weight(step): lambda of the unlabelled losses. Each step draws the weight and the partners of its mixture
    by the two functions. loss: of the standard head. parallel: the network around which gradients are averaged, under
    torchrun. Returns each step's losses [steps, 5]: total, L_x, L_u, L_x', L_u'.
    """
    network.train()
    peer.eval()
    losses = []
    for step, (views, index) in enumerate(labelled):
        doubtful = next(unlabelled)[0] if unlabelled is not None else None
        rows = 2 * len(index) + (2 * len(doubtful[0]) if doubtful is not None else 0)
        with device.autocast():
            loss_and_parts = step_loss(
                network,
                peer,
                (views, labels[index], clean[index]),
                doubtful,
                class_counts=class_counts,
                weight=weight(step),
                lam=draw_lam(),
                permutation=draw_permutation(processes.world() * rows),
                temperature=temperature,
                forward_unlabelled=forward_unlabelled,
                loss=loss,
                parallel=parallel,
            )
        _step(optimizer, loss_and_parts.total)
        losses.append(torch.stack([part.detach() for part in loss_and_parts]))
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
    features = torch.zeros(len(labels), network.heads.feature_size, device=labels.device)
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
    """The test protocol: the sum of the raw logits of both heads of all networks, [size, K], by the positions 0 .. size - 1."""
    networks = [network.eval() for network in networks]
    logits = torch.zeros(size, num_classes, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            outputs = [network(images) for network in networks]
        logits[index] = sum(standard + auxiliary for _, standard, auxiliary in outputs)
    return processes.total(logits)
