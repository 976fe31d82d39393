"""The losses of SANM (README, section 7). Scores and targets are [N, K]; means over rows unless said.

L_x, L_u and the prior penalty are the parts of the LNL loss (Eq. 8, `mixmatch.semi_loss`). The reconstruction error is that of
SMR (Eq. 10).
"""

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """L_x = -mean_i sum_c t_ic log softmax(s_i)_c. Modulated targets may have a negative entry."""
    return -(targets * F.log_softmax(scores, dim=1)).sum(dim=1).mean()


def squared_error(scores: Tensor, targets: Tensor) -> Tensor:
    """L_u: mean over all N x K entries of (softmax(s) - t)^2; 0 without rows."""
    if not len(scores):
        return scores.new_zeros(())
    return F.mse_loss(F.softmax(scores, dim=1), targets)


def prior_penalty(scores: Tensor) -> Tensor:
    """sum_c pi log(pi / pbar_c), pi = 1/K, pbar the mean prediction: keeps predictions from collapsing on few classes."""
    mean_prediction = F.softmax(scores, dim=1).mean(dim=0).clamp_min(1e-30)
    prior = 1 / scores.shape[1]
    return (prior * (prior / mean_prediction).log()).sum()


def negative_entropy(scores: Tensor) -> Tensor:
    """mean_i sum_c p_ic log p_ic: penalises confident predictions in the warm-up under asymmetric noise."""
    log_p = F.log_softmax(scores, dim=1)
    return (log_p.exp() * log_p).sum(dim=1).mean()


def reconstruction_error(reconstruction: Tensor, images: Tensor) -> Tensor:
    """L_rec of SMR (Eq. 10): mean squared errors of the reconstructions [2B, C, H, W] to the unmasked images [B, C, H, W].

    First half: of the copies masked at the maximum. Second half: of those masked at the minimum. Their two means are added.
    """
    at_max, at_min = reconstruction.chunk(2)
    return F.mse_loss(at_max, images) + F.mse_loss(at_min, images)


def ramp_up(lambda_u: float, position: float, warm_up: int, length: float = 16) -> float:
    """lambda_u clip((position - warm_up) / 16, 0, 1); position = epoch + step / steps per epoch, epochs from 0."""
    return lambda_u * min(max((position - warm_up) / length, 0.0), 1.0)
