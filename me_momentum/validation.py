"""The noisy validation part, and the accuracies on it and on the test images (README, sections 2.2 and 7)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.gpu import device as gpu


class Parts(NamedTuple):
    """Positions of the training and the validation part, int64."""

    train: np.ndarray  # in the shuffled order in which the release keeps them
    validation: np.ndarray  # ascending


def split(count: int, fraction: float, seed: int) -> Parts:
    """The release's split of `count` items: int(count fraction) of them are drawn with RandomState(seed) to train on.

    The rest is the validation part. Not stratified. ValueError: a part would be empty.
    """
    size = int(count * fraction)
    if not 0 < size < count:
        raise ValueError(f"a share of {fraction} of {count} images leaves a part without any")
    train = np.random.RandomState(seed).permutation(count)[:size]
    return Parts(train, np.setdiff1d(np.arange(count), train))


def balanced_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Mean over classes of the accuracy on each class, in percent, rounded to 2 decimals; both int [N], labels noisy.

    All comparisons use the rounded value. NaN if a class is absent. Two counts on the device, one transfer.
    """
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes)
    hits, counts = torch.stack([hits, torch.bincount(labels, minlength=num_classes)]).cpu().double().numpy()
    with np.errstate(invalid="ignore"):
        return float(np.round(np.mean(hits / counts * 100), 2))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy over samples, in percent."""
    return 100 * float(gpu.wide(predicted == labels).mean())


def batch_mean_accuracy(predicted: Tensor, labels: Tensor, batch_size: int) -> float:
    """The release's test accuracy in percent: the plain mean over batches, a short last one counting like the others."""
    batches = gpu.wide(predicted == labels).split(batch_size)
    return 100 * float(torch.stack([batch.mean() for batch in batches]).mean())
