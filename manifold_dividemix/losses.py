"""The losses of Manifold DivideMix (Sec. 5). Logits and targets are [N, K]; a value per row unless said."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

P_MIN, TARGET_MIN = 1e-7, 1e-4  # what probabilities and one-hot targets are clipped to


def symmetric_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE + RCE with observed labels int [N], of the warm-up (Sec. 5.1): [N]. RCE = -sum_c p_c log y_c, both clipped."""
    p = F.softmax(logits, dim=1).clamp(P_MIN, 1)
    log_target = F.one_hot(labels, logits.shape[1]).to(p.dtype).clamp(TARGET_MIN, 1).log()
    return F.cross_entropy(logits, labels, reduction="none") - (p * log_target).sum(dim=1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c t_c log p_c: [N]."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1)


def soft_symmetric_cross_entropy(
    logits: Tensor, targets: Tensor, rce: str = "released", ce_weight: float = 1, rce_weight: float = 1
) -> Tensor:
    """CE + RCE with soft targets, of the labelled rows (Sec. 5.2): [N].

    rce: "log", the formula of the hard form with t for y; "released", a second softmax over the targets for their logarithm,
    which hardly penalises anything.
    """
    p = F.softmax(logits, dim=1).clamp(P_MIN, 1)
    log_target = targets.clamp(TARGET_MIN, 1).log()
    if rce == "released":
        log_target = F.log_softmax(targets.clamp(P_MIN, 1), dim=1)
    return ce_weight * soft_cross_entropy(logits, targets) - rce_weight * (p * log_target).sum(dim=1)


def warm_up_loss(
    losses: Tensor, kept: Tensor, mask: str = "sample", kept_share: float | None = None
) -> Tensor:
    """Mean loss of a batch without the removed samples (Sec. 4.3). losses [B], kept [B], 1 or True where not removed.

    mask: "sample", each loss times its own mask; "batch", the mean of all losses times the kept share of the batch, as the
    released CIFAR script has it; "all", times kept_share, that of the whole data set, as the mini-ImageNet script has it.
    """
    if mask == "sample":
        return (losses * kept).mean()
    return losses.mean() * (kept.to(losses.dtype).mean() if mask == "batch" else kept_share)


def labelled_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, kind: str = "RL", rce: str = "released"
) -> Tensor:
    """L_x, a scalar: the mean over all rows of mask times loss (Sec. 5.3). mask [N], mixed and so a fraction.

    kind: "RL", symmetric cross-entropy; "CE", cross-entropy.
    """
    own = soft_cross_entropy if kind == "CE" else soft_symmetric_cross_entropy
    return (mask * (own(logits, targets) if kind == "CE" else own(logits, targets, rce))).mean()


def unlabelled_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """L_u, a scalar: the mean over all rows of mask times squared error, itself a mean over classes (Sec. 5.3)."""
    return (mask * (F.softmax(logits, dim=1) - targets).square().mean(dim=1)).mean()


def contrastive_loss(
    features: Tensor,
    temperature: float = 0.05,
    base_temperature: float | None = None,
    labels: Tensor | None = None,
    pairs: Tensor | None = None,
    all_anchors: bool = True,
) -> Tensor:
    """SimCLR's loss, or with labels or pairs the supervised contrastive one (Sec. 5.4): a scalar.

    features: [B, V, D], V views of B images, rows of unit length. Positives of a view: the other views of its image; or
    all views of images of its label, int [B]; or those that pairs, [B, B], names. The mean over positives of the log-probability
    among all other views, over all views or the first ones alone; times temperature / base_temperature (by default 1).
    Training uses two views and no labels. ValueError: labels and pairs both.
    """
    if labels is not None and pairs is not None:
        raise ValueError("positives come from labels or from pairs, not from both")
    images, views = features.shape[:2]
    if labels is not None:
        pairs = labels[:, None] == labels
    elif pairs is None:
        pairs = torch.eye(images, device=features.device)
    rows = features.transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
    anchors = rows if all_anchors else rows[:images]
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)[: len(anchors)]
    positive = pairs.to(rows.dtype).repeat(len(anchors) // images, views).masked_fill(itself, 0)
    with torch.autocast(rows.device.type, enabled=False):
        logits = (anchors @ rows.T / temperature).masked_fill(itself, -math.inf)
        log_p = F.log_softmax(logits, dim=1).masked_fill(itself, 0)
    loss = -((positive * log_p).sum(dim=1) / positive.sum(dim=1)).mean()
    return loss * (temperature / (base_temperature or temperature))


def balance_penalty(logits: Tensor) -> Tensor:
    """sum_c (1/K) log((1/K) / pbar_c), pbar the mean prediction (Sec. 5.5): a scalar that keeps predictions from collapsing."""
    rows, classes = logits.shape
    # in logarithms: pbar can underflow
    log_mean = F.log_softmax(logits, dim=1).logsumexp(dim=0) - math.log(rows)
    return -log_mean.mean() - math.log(classes)


def ramp_up(position: float, warm_up: int, length: float = 16) -> float:
    """clip((position - warm_up) / 16, 0, 1), of the unlabelled losses (Sec. 5.6); position in epochs from 0."""
    return min(max((position - warm_up) / length, 0.0), 1.0)


def ramp_steps(labelled: int, batch_size: int, steps: int, ramp: str = "fixed") -> int:
    """How many steps the ramp takes an epoch for: as many as there are; "released": labelled // batch_size + 1 (Sec. 10, 3).

    labelled: samples on the labelled side. The release counts one too many where the batch size divides them.
    """
    return labelled // batch_size + 1 if ramp == "released" else steps


def position(epoch: int, step: int, steps: int, ramp: str = "fixed") -> float:
    """Where the ramp is: epoch + step / steps; "released": the steps of earlier epochs count again, so about twice that.

    steps: of an epoch, as `ramp_steps` counts them.
    """
    return epoch + step / steps + (epoch if ramp == "released" else 0)


def learning_rate(epoch: int, base: float, epochs: int) -> float:
    """Cosine from base to 0 over all epochs, constant within each, warm-up included; epochs count from 0 (Sec. 4.1)."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
