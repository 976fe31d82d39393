"""DivideMix's selection by small losses (Li et al. 2020), for comparison with stochastic feature averaging.

Losses and observed labels go in, clean probabilities come out. One mixture serves all classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.gpu import device as gpu
from common.gpu.mixture import lower_posterior
from common.runs.cli import UserError


class SmallLoss(NamedTuple):
    """The selection of one network."""

    clean: Tensor  # [N] float64: probability that the observed label is clean
    selected: Tensor  # [N] bool: clean > threshold
    counts: Tensor  # [K] selected samples per observed class


def normalised(losses: Tensor) -> Tensor:
    """Losses [N] scaled to [0, 1] by their minimum and maximum; zeros where all are equal."""
    losses = losses - losses.min()
    spread = losses.max()
    return losses / spread if spread > 0 else losses


def clean_probability(losses: Tensor, seed: int) -> Tensor:
    """Posterior w of the component with the smaller mean, float64 [N], of the losses [N] of all samples.

    losses: cross-entropy with the observed labels, of un-augmented samples in evaluation mode. scikit-learn's mixture of two
    Gaussians with DivideMix's settings; seed: of its k-means start. 1 if all losses are equal. UserError: losses that are
    not finite.
    """
    scaled = normalised(losses)
    if not torch.isfinite(scaled).all():
        raise UserError(
            "losses of training samples are not finite: lower --lr or try --precision fp32, with another --out"
        )
    if not scaled.any():
        return gpu.put(torch.ones(len(scaled), dtype=torch.float64), losses.device)
    return lower_posterior(scaled, seed)


def divide(clean: Tensor, labels: Tensor, num_classes: int, threshold: float) -> SmallLoss:
    """Samples with a clean probability [N] above the threshold are selected. labels: observed, int [N]."""
    selected = clean > threshold
    return SmallLoss(clean, selected, torch.bincount(labels[selected], minlength=num_classes))
