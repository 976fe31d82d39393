"""The passes over the data that SFA's scripts are made of: warm-up, semi-supervised training, features, test (Sec. 4).

Batches are (views, index): a tuple of [B, ...] tensors and the samples' positions in the training set, int [B]. Labels,
clean probabilities and class counts are tensors on the device of the images.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.gpu import Device
from sfa.losses import warm_up_loss
from sfa.mixmatch import mixmatch_loss


def warm_up(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    class_counts: Tensor,
    device: Device,
) -> Tensor:
    """One epoch on all samples with their observed labels: CE(h1, y) + CE(h2 + ln n, y). Returns each step's loss."""
    network.train()
    losses = []
    for (images,), index in batches:
        with device.autocast():
            _, standard, auxiliary = network(images)
            loss = warm_up_loss(standard, auxiliary, labels[index], class_counts)
        _step(optimizer, loss)
        losses.append(loss.detach())
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
    draw_mix_weight: Callable[[], float],
    draw_permutation: Callable[[int], Tensor],
    temperature: float,
    device: Device,
    forward_unlabelled: bool = True,
) -> Tensor:
    """One epoch of co-divided training: one pass over the labelled batches of the peer's split.

    labelled and unlabelled yield two views each; unlabelled goes on for ever, and is None where every sample is
    confident. weight(step): lambda of the unlabelled losses. Each step draws the weight and the partners of its mixture
    by the two functions. Returns each step's losses [steps, 5]: total, L_x, L_u, L_x', L_u'.
    """
    network.train()
    peer.eval()
    losses = []
    for step, (views, index) in enumerate(labelled):
        doubtful = next(unlabelled)[0] if unlabelled is not None else None
        rows = 2 * len(index) + (2 * len(doubtful[0]) if doubtful is not None else 0)
        with device.autocast():
            loss = mixmatch_loss(
                network,
                peer,
                (views, labels[index], clean[index]),
                doubtful,
                class_counts=class_counts,
                weight=weight(step),
                mix_weight=draw_mix_weight(),
                permutation=draw_permutation(rows),
                temperature=temperature,
                forward_unlabelled=forward_unlabelled,
            )
        _step(optimizer, loss.total)
        losses.append(torch.stack([loss.total.detach(), *loss[1:]]))
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
    features, confidence = None, torch.empty(len(labels), device=labels.device)
    for (images,), index in batches:
        with device.autocast():
            found, _, auxiliary = network(images)
        if features is None:
            features = torch.empty(len(labels), found.shape[1], device=found.device)
        features[index] = found
        confidence[index] = F.softmax(auxiliary, dim=1).gather(1, labels[index, None])[:, 0]
    return features, confidence


@torch.no_grad()
def summed_logits(networks: Iterable[nn.Module], batches: Iterable, device: Device) -> Tensor:
    """The test protocol: the sum of the raw logits of both heads of all networks, [N, K], in the batches' order."""
    networks = [network.eval() for network in networks]
    rows = []
    for (images,), _ in batches:
        with device.autocast():
            outputs = [network(images) for network in networks]
        rows.append(sum(standard + auxiliary for _, standard, auxiliary in outputs))
    return torch.cat(rows)
