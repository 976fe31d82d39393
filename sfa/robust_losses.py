"""Losses of others that the standard head can be trained with in the place of L_x (README, section 9). Not in the release.

Each takes logits [N, K], targets [N, K] and class_counts [K], and returns a scalar. Targets are one-hot in the warm-up and soft
afterwards. With soft targets a loss is the mean of its hard form, weighted by the target. The reverse term of SCE is an
exception: it takes the logarithm of the soft target itself. The paper's abstract names combinations with distribution-robust
and noise-robust losses, but neither it nor the release says which. The auxiliary head keeps balanced softmax.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa.losses import balanced, cross_entropy, soft_cross_entropy

TARGET_MIN = 1e-4  # the reverse cross-entropy takes the logarithm of no smaller target


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

    logits: scale times cosines (networks.CosineHead). The rarest class has the largest margin, in cosines. Without
    LDAM's deferred re-weighting.
    """
    rarity = class_counts.to(logits.dtype).clamp_min(1) ** -0.25
    margin = scale * largest_margin * rarity / rarity.max()
    # each row once for each class that may be its label: [N, K, K]
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


def standard_loss(args: Namespace) -> Callable[..., Tensor]:
    """The loss of the standard head that --loss names, with its flags."""
    losses: dict[str, Callable[..., Tensor]] = {
        "ce": cross_entropy,
        "ldam": partial(ldam, largest_margin=args.ldam_margin, scale=args.ldam_scale),
        "gce": partial(generalised_cross_entropy, q=args.gce_q),
        "sce": partial(symmetric_cross_entropy, ce_weight=args.sce_ce, rce_weight=args.sce_rce),
        "logit_adjusted": partial(logit_adjusted, tau=args.adjustment_tau),
        "balanced_softmax": balanced_softmax,
    }
    return losses[args.loss]
