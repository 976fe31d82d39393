"""One epoch of cross-entropy, and predictions, with one transfer from the device per pass (README, sections 4 and 6)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from common.gpu import graphs, processes
from common.gpu.device import Device
from me_momentum.losses import weighted_cross_entropy


def train_epoch(
    network: nn.Module, optimizer: Optimizer, batches: Iterable, labels: Tensor, device: Device
) -> tuple[float, float]:
    """One pass of plain cross-entropy on the observed labels, int [N] on the device: mean loss, accuracy in percent.

    Both are means over samples of what each step saw. batches: (views, index), views a tuple of one [B, C, H, W].
    """
    network.train()
    losses, hits, rows = [], [], 0
    for (images,), index in batches:
        given = labels[index]
        with device.autocast(*graphs.unrecorded(network)):
            logits = network(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, given)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(index))
        hits.append((logits.detach().argmax(dim=1) == given).sum())
        rows += len(index)
    return float(torch.stack(losses).sum()) / rows, 100 * float(torch.stack(hits).sum()) / rows


def train_weighted_epoch(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    weights: Tensor,
    device: Device,
) -> float:
    """One pass of weighted cross-entropy on the noisy labels, int [N] on the device: the mean loss of its steps.

    weights: of the classes, [K]. Under torchrun the loss of every step is that of the global batch.
    """
    network.train()
    losses = []
    for (images,), piece in batches:
        given = labels[processes.gather_rows(piece)]
        with device.autocast(network):
            logits = network(images)
        loss = weighted_cross_entropy(processes.gather_rows(logits.float()), given, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def class_probabilities(
    network: nn.Module, batches: Iterable, shape: tuple[int, int], device: Device
) -> Tensor:
    """Probabilities of the classes, float32 [N, K] = shape, of batches as those of `predict`."""
    network.eval()
    probabilities = torch.zeros(shape, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            logits = network(images)
        probabilities[index] = F.softmax(logits.float(), dim=1).to(probabilities)
    return processes.total(probabilities)


@torch.no_grad()
def predict(network: nn.Module, batches: Iterable, size: int, device: Device) -> Tensor:
    """Predicted classes, int [size], of batches that hold each position 0 .. size - 1 once, in eval mode.

    Under torchrun each process predicts its own batches, and all processes return all predictions.
    """
    network.eval()
    predicted = torch.zeros(size, dtype=torch.int64, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            predicted[index] = network(images).argmax(dim=1)
    return processes.total(predicted)


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on their device."""
    return {name: value.clone() for name, value in network.state_dict().items()}
