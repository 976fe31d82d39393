"""The split into labelled and unlabelled samples by a Gaussian mixture of their losses (README, section 4.4)."""

import torch
from torch import Tensor

from common.gpu import device as gpu
from common.gpu import processes
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
        return gpu.put(torch.ones(len(scaled), dtype=torch.float64), losses.device)
    return lower_posterior(scaled, seed, max_iterations=20)


def divide(clean: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The positions of the labelled and of the unlabelled samples, ascending, int64 each; either can be empty.

    clean [N]: samples with clean probability > threshold are labelled. kept, bool [N]: all others are on neither side.
    """
    chosen = clean > threshold
    return (chosen & kept).nonzero()[:, 0], (~chosen & kept).nonzero()[:, 0]


def too_small(labelled: Tensor, unlabelled: Tensor, batch_size: int) -> bool:
    """Whether a side of the split cannot be trained on, so that the epoch is one of warm-up; prints a note if so.

    Too small are an empty side, one unlabelled sample, and a side smaller than the batch that several processes share.
    """
    least = batch_size if processes.world() > 1 else 1
    if len(labelled) >= least and len(unlabelled) >= max(least, 2):
        return False
    processes.say(
        f"note: warm-up in place of MixEMatch, the split is {len(labelled)} labelled and {len(unlabelled)} "
        "unlabelled samples"
    )
    return True
