"""The two loss terms (Sec. 4.1, steps 5 to 7; Sec. 4.2, steps 5 to 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("soft", "both")


def mixed_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, target: str = "soft", detach_target: bool = False
) -> Tensor:
    """Cross-entropy of the mixtures, the mean over groups; 0 where there is no group.

    logits: [M, C] of the mixed features. labels: int [M, K] observed labels of the members. weights: [M, K] mixing weights.
    target: `soft`, the label of a mixture is mixed with the weights of its features (Fig. 2); `both`, every member's
    label counts 1 / K whatever its weight (release). detach_target: no gradient to the weights through the label.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target}")
    if target == "both":
        weights = torch.full_like(weights, 1 / weights.shape[1])
    elif detach_target:
        weights = weights.detach()
    log_probabilities = F.log_softmax(logits, dim=1).gather(1, labels)  # [M, K]
    return -(weights * log_probabilities).sum() / max(len(logits), 1)


def total_loss(mixed: Tensor, plain: Tensor, weight_mixed: float, weight_plain: float) -> Tensor:
    """W_mix CE_mixed + W_plain CE_plain; the release has 1.5 and 0.5, that is twice lambda = 0.75 and 1 - lambda."""
    return weight_mixed * mixed + weight_plain * plain
