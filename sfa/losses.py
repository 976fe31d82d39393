"""The training losses of SFA (Sec. 5), and those of others that its standard head can be trained with (Sec. 9).

Logits and targets are [N, K]; means over rows unless said.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TARGET_MIN = 1e-4  # what the logarithm of a target is taken of at least, in the reverse cross-entropy


def balanced(logits: Tensor, class_counts: Tensor) -> Tensor:
    """Balanced softmax: shift the auxiliary head's logits by ln n_k, so that the head itself learns without the prior.

    class_counts [K]; a count of 0 is read as 1, where the release gets an infinite loss.
    """
    return logits + class_counts.to(logits.dtype).clamp_min(1).log()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """L_x = -mean_i sum_k t_ik log softmax(z_i)_k."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """L_u: mean over all N x K entries of (softmax(z) - t)^2; 0 without rows."""
    if len(logits) == 0:
        return logits.new_zeros(())
    return F.mse_loss(torch.softmax(logits, dim=1), targets)


def prior_penalty(logits: Tensor) -> Tensor:
    """sum_k (1/K) ln((1/K) / pbar_k), pbar the mean prediction: keeps predictions from collapsing on few classes."""
    mean_prediction = torch.softmax(logits, dim=1).mean(dim=0)
    prior = 1 / logits.shape[1]
    return (prior * (prior / mean_prediction).log()).sum()


def ramp_up(lambda_u: float, position: float, warm_up: int, length: float = 16) -> float:
    """lambda_u clip((position - warm_up) / 16, 0, 1), position = epoch + step / steps per epoch."""
    return lambda_u * min(max((position - warm_up) / length, 0.0), 1.0)


# losses of the standard head: (logits, targets, class_counts [K]) -> scalar -------------------------------------------
# Targets are one-hot in the warm-up and soft afterwards. With soft ones each is the mean of its hard form, weighed by the target;
# but the reverse term of SCE takes the logarithm of the target as it is.


def cross_entropy(logits: Tensor, targets: Tensor, _class_counts: Tensor) -> Tensor:
    """SFA's own."""
    return soft_cross_entropy(logits, targets)


def balanced_softmax(logits: Tensor, targets: Tensor, class_counts: Tensor) -> Tensor:
    """Cross-entropy of z + ln n (Ren et al. 2020): robust to the distribution of classes."""
    return soft_cross_entropy(balanced(logits, class_counts), targets)


def logit_adjusted(logits: Tensor, targets: Tensor, class_counts: Tensor, tau: float = 1) -> Tensor:
    """Cross-entropy of z + tau ln pi, pi = n / sum n (Menon et al. 2021). With tau 1 that is balanced softmax."""
    counts = class_counts.to(logits.dtype).clamp_min(1)
    return soft_cross_entropy(logits + tau * (counts / counts.sum()).log(), targets)


def ldam(
    logits: Tensor, targets: Tensor, class_counts: Tensor, largest_margin: float = 0.5, scale: float = 30
) -> Tensor:
    """Cross-entropy with a margin of the labelled class: z_y - scale Delta_y, Delta_y ~ n_y^(-1/4) (Cao et al. 2019).

    logits: scale times cosines (networks.CosineHead). The rarest class has the largest margin, in cosines.
    """
    rarity = class_counts.to(logits.dtype).clamp_min(1) ** -0.25
    margin = scale * largest_margin * rarity / rarity.max()
    # of each row one version for each class that may be the label: [N, K, K]
    reduced = logits[:, None, :] - torch.diag(margin)
    log_p = logits - margin - reduced.logsumexp(dim=2)
    return -(targets * log_p).sum(dim=1).mean()


def generalised_cross_entropy(
    logits: Tensor, targets: Tensor, _class_counts: Tensor, q: float = 0.7
) -> Tensor:
    """GCE, (1 - p_y^q) / q (Zhang and Sabuncu 2018): robust to label noise; cross-entropy for q -> 0, 1 - p_y for q = 1."""
    # p^q by its logarithm: the gradient of a power is not finite at 0
    powers = (q * F.log_softmax(logits, dim=1)).exp()
    return (targets * (1 - powers) / q).sum(dim=1).mean()


def symmetric_cross_entropy(
    logits: Tensor, targets: Tensor, _class_counts: Tensor, ce_weight: float = 0.1, rce_weight: float = 1
) -> Tensor:
    """SCE, ce_weight CE + rce_weight RCE, RCE = -sum_k p_k log t_k (Wang et al. 2019): robust to label noise.

    log t is log 1e-4 at least.
    """
    log_targets = targets.clamp_min(TARGET_MIN).log()
    reverse = -(torch.softmax(logits, dim=1) * log_targets).sum(dim=1).mean()
    return ce_weight * soft_cross_entropy(logits, targets) + rce_weight * reverse


def warm_up_loss(
    standard: Tensor, auxiliary: Tensor, labels: Tensor, class_counts: Tensor, loss=cross_entropy
) -> Tensor:
    """CE(h1, y) + CE(h2 + ln n, y): labels int [N], class_counts [K] of the observed labels of the whole training set.

    loss: of the standard head h1, another than cross-entropy if asked.
    """
    targets = F.one_hot(labels, standard.shape[1]).to(standard.dtype)
    return loss(standard, targets, class_counts) + F.cross_entropy(balanced(auxiliary, class_counts), labels)
