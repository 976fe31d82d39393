"""The training losses of SFA (README, section 5). Logits and targets are [N, K]; means over rows unless said."""

import torch
import torch.nn.functional as F
from torch import Tensor


def balanced(logits: Tensor, class_counts: Tensor) -> Tensor:
    """Balanced softmax: the auxiliary head's logits shifted by ln n_k, so that the head itself learns without the prior.

    class_counts [K]; a count of 0 is read as 1, where the release gets an infinite loss.
    """
    return logits + class_counts.to(logits.dtype).clamp_min(1).log()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """L_x = -mean_i sum_k t_ik log softmax(z_i)_k."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def cross_entropy(logits: Tensor, targets: Tensor, _class_counts: Tensor) -> Tensor:
    """L_x of the standard head, with the arguments of those in `sfa.robust_losses` that can take its place."""
    return soft_cross_entropy(logits, targets)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """L_u: mean over all N x K entries of (softmax(z) - t)^2; 0 without rows."""
    if len(logits) == 0:
        return logits.new_zeros(())
    return F.mse_loss(torch.softmax(logits, dim=1), targets)


def prior_penalty(logits: Tensor) -> Tensor:
    """L_prior = sum_k (1/K) ln((1/K) / pbar_k), pbar the mean prediction: keeps predictions from collapsing on few classes."""
    mean_prediction = torch.softmax(logits, dim=1).mean(dim=0)
    prior = 1 / logits.shape[1]
    return (prior * (prior / mean_prediction).log()).sum()


def ramp_up(lambda_u: float, position: float, warm_up: int, length: float = 16) -> float:
    """lambda_u clip((position - warm_up) / 16, 0, 1), position = epoch + step / steps per epoch."""
    return lambda_u * min(max((position - warm_up) / length, 0.0), 1.0)


def warm_up_loss(
    standard: Tensor, auxiliary: Tensor, labels: Tensor, class_counts: Tensor, loss=cross_entropy
) -> Tensor:
    """L = CE(h1, y) + CE(h2 + ln n, y). labels int [N]; class_counts [K]: n of the observed labels of the training set.

    loss: of the standard head h1, another than cross-entropy if asked.
    """
    targets = F.one_hot(labels, standard.shape[1]).to(standard.dtype)
    return loss(standard, targets, class_counts) + F.cross_entropy(balanced(auxiliary, class_counts), labels)
