"""DivideMix's selection by small losses (Li et al. 2020), to compare stochastic feature averaging with.

As sfa.selection it knows no script: losses and observed labels go in, clean probabilities come out. One mixture serves all
classes, so that a rare class, whose losses are large, is easily taken for mislabelled: what SFA is meant to mend.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.gpu.mixture import lower_posterior
from common.runs.cli import UserError


class SmallLoss(NamedTuple):
    """One network's judgement of the training set."""

    clean: Tensor  # [N] float64: probability that the observed label is clean
    selected: Tensor  # [N] bool: clean > p_threshold
    counts: Tensor  # [K] selected samples per observed class


def small_loss_selection(
    losses: Tensor, labels: Tensor, num_classes: int, *, p_threshold: float = 0.5, seed: int = 0
) -> SmallLoss:
    """Clean: the component of the smaller losses, in a mixture of two Gaussians of all losses scaled to [0, 1].

    losses [N]: cross-entropy with the observed labels int [N], of un-augmented samples in evaluation mode. seed: of the mixture's
    start. Where all losses are equal every sample is as clean as any: 1. UserError: losses that are not finite.
    """
    if not torch.isfinite(losses).all():
        raise UserError(
            "losses of training samples are not finite: lower --lr or try --precision fp32, with another --out"
        )
    shifted = losses - losses.min()
    clean = torch.ones(len(losses), dtype=torch.float64, device=losses.device)
    if shifted.any():
        clean = lower_posterior(shifted / shifted.max(), seed)
    selected = clean > p_threshold
    return SmallLoss(clean, selected, torch.bincount(labels[selected], minlength=num_classes))
