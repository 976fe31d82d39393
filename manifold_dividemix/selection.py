"""The split into labelled and unlabelled samples by a Gaussian mixture of their losses (Sec. 4.4)."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from common.cli import UserError


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
    column = normalised(losses).detach().float().cpu().numpy().reshape(-1, 1)
    if not np.isfinite(column).all():
        raise UserError(
            "losses of training samples are not finite: lower --lr-head and --lr-backbone or try --precision fp32, "
            "with another --out"
        )
    if not column.any():
        return torch.ones(len(column), dtype=torch.float64, device=losses.device)
    mixture = GaussianMixture(2, max_iter=20, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # twenty iterations are all that the method gives it
        posterior = mixture.fit(column).predict_proba(column)
    clean = posterior[:, np.argmin(mixture.means_)].astype(np.float64)
    return torch.from_numpy(clean).to(losses.device)


def divide(clean: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The positions of the labelled and of the unlabelled samples, ascending, int64 each; either can be empty.

    clean [N]: a label is taken where its clean probability is above the threshold. kept, bool [N]: all others are in neither.
    """
    chosen = clean > threshold
    return (chosen & kept).nonzero()[:, 0], (~chosen & kept).nonzero()[:, 0]
