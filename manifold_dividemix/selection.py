"""The split into labelled and unlabelled samples by a Gaussian mixture of their losses (Sec. 4.4)."""

import torch
from torch import Tensor

from common.gpu.mixture import lower_posterior
from common.runs.cli import UserError


def normalised(losses: Tensor) -> Tensor:
    """Losses [N] scaled to [0, 1] by their minimum and maximum; zeros where all are equal."""
    losses = losses - losses.min()
    spread = losses.max()
    return losses / spread if spread > 0 else losses


def clean_probability(losses: Tensor, seed: int) -> Tensor:
    """Posterior w of the component with the smaller mean, float64 [N], of the losses [N] of all samples, removed ones too.

    scikit-learn's mixture of two Gaussians with the release's settings; seed: of its k-means start. Where all losses are equal
    every sample is as clean as any: 1. UserError: losses that are not finite.
    """
    scaled = normalised(losses)
    if not torch.isfinite(scaled).all():
        raise UserError(
            "losses of training samples are not finite: lower --lr-head and --lr-backbone or try --precision fp32, "
            "with another --out"
        )
    if not scaled.any():
        return torch.ones(len(scaled), dtype=torch.float64, device=losses.device)
    return lower_posterior(scaled, seed, max_iterations=20)


def divide(clean: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The positions of the labelled and of the unlabelled samples, ascending, int64 each; either can be empty.

    clean [N]: a label is taken where its clean probability is above the threshold. kept, bool [N]: all others are in neither.
    """
    chosen = clean > threshold
    return (chosen & kept).nonzero()[:, 0], (~chosen & kept).nonzero()[:, 0]
