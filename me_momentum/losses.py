"""The loss on Clothing1M: cross-entropy, weighted to the class shares of the clean validation images (README, section 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu import device as gpu


def prior_weights(train_counts: Tensor, validation_counts: Tensor) -> Tensor:
    """The weight of each class in the loss: w_c = mean(n) / n_c * v_c / mean(v), float32 [K].

    train_counts: n, how often each observed class is in the current training set; validation_counts: v, of the clean validation
    images; both int [K]. A class with n_c = 0, to which the release gives an infinite weight, gets 0: no sample carries it.
    """
    n, v = gpu.wide(train_counts), gpu.wide(validation_counts)
    weights = n.mean() / n * (v / v.mean())
    return weights.where(n > 0, 0.0).float().to(train_counts.device)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The cross-entropy weighted by class: sum(w l) / sum(w) over the samples, as PyTorch's weighted mean.

    logits: [B, K]; labels: int [B]; weights: [K]. 0, and not NaN, where all classes of the batch have weight 0.
    """
    total = F.cross_entropy(logits, labels, weights, reduction="sum")
    return total / weights[labels].sum().clamp_min(torch.finfo(weights.dtype).tiny)
