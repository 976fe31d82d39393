"""Figure 2 from the mixing weights on: mixed features x', mixed targets y', and the two losses (README, section 4).

x' = sum_k beta_k x_k                     mixed_features
y' = sum_k beta_k onehot(y_k)             target_weights
L  = W_mix CE(x', y') + W_plain CE(x, y)  mixed_loss, total_loss
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from afm.choices import TARGETS


def mixed_features(members: Tensor, weights: Tensor) -> Tensor:
    """x' of Figure 2, the weighted mean of each group's members: [M, K, ...] and [M, K] -> [M, ...]."""
    return torch.einsum("mk...,mk->m...", members, weights)


def target_weights(weights: Tensor, target: str = "soft", detach: bool = False) -> Tensor:
    """The weights of the members' labels in y' of Figure 2: [M, K], rows on the simplex.

    weights: [M, K] mixing weights of the features. target: `soft`, the labels have the weights of the features (Figure 2);
    `both`, each label has 1 / K (release). detach: no gradient to the mixing weights through the label.
    ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target}")
    if target == "both":
        return torch.full_like(weights, 1 / weights.shape[1])
    return weights.detach() if detach else weights


def mixed_loss(logits: Tensor, labels: Tensor, label_weights: Tensor) -> Tensor:
    """CE(x', y'), the mean over groups: -sum_k beta_k log p(y_k | x'); 0 where there is no group.

    logits: [M, C] of the mixed features. labels: int [M, K] observed labels of the members. label_weights: [M, K] of
    `target_weights`.
    """
    log_probabilities = F.log_softmax(logits, dim=1).gather(1, labels)  # [M, K]
    return -(label_weights * log_probabilities).sum() / max(len(logits), 1)


def total_loss(mixed: Tensor, plain: Tensor, weight_mixed: float, weight_plain: float) -> Tensor:
    """W_mix CE_mixed + W_plain CE_plain; the release has 1.5 and 0.5, that is twice lambda = 0.75 and 1 - lambda."""
    return weight_mixed * mixed + weight_plain * plain
