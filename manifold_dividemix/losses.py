"""The losses of Manifold DivideMix (README, section 5). Logits and targets are [N, K]; a value per row unless said."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

P_MIN, TARGET_MIN = 1e-7, 1e-4  # what probabilities and one-hot targets are clipped to
CONTRASTIVE_TEMPERATURE = 0.05
RAMP_EPOCHS = 16


def symmetric_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE + RCE with given labels int [N], of the warm-up (README, section 5.1): [N]. RCE = -sum_c p_c log y_c, both clipped."""
    p = F.softmax(logits, dim=1).clamp(P_MIN, 1)
    log_target = F.one_hot(labels, logits.shape[1]).to(p.dtype).clamp(TARGET_MIN, 1).log()
    return F.cross_entropy(logits, labels, reduction="none") - (p * log_target).sum(dim=1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c t_c log p_c: [N]."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1)


def soft_symmetric_cross_entropy(logits: Tensor, targets: Tensor, rce: str = "released") -> Tensor:
    """CE + RCE with soft targets, of the labelled rows (README, section 5.2): [N].

    rce: "log", the formula of the hard form with t for y; "released", a second softmax over the targets for their logarithm,
    which hardly penalises anything.
    """
    p = F.softmax(logits, dim=1).clamp(P_MIN, 1)
    log_target = targets.clamp(TARGET_MIN, 1).log()
    if rce == "released":
        log_target = F.log_softmax(targets.clamp(P_MIN, 1), dim=1)
    return soft_cross_entropy(logits, targets) - (p * log_target).sum(dim=1)


def warm_up_loss(losses: Tensor, kept: Tensor, mask: str, kept_ratio: float) -> Tensor:
    """Mean loss of a batch without the removed samples (README, section 4.3). losses [B]; kept [B], 1 or True if not removed.

    mask: "sample", each loss times its own mask; "batch", the mean of all losses times the kept ratio of the batch, as in the
    released CIFAR script; "all", times kept_ratio, that of the training set, as in the mini-ImageNet script.
    """
    if mask == "sample":
        return (losses * kept).mean()
    return losses.mean() * (kept.to(losses.dtype).mean() if mask == "batch" else kept_ratio)


def labelled_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, kind: str = "RL", rce: str = "released"
) -> Tensor:
    """L_x, a scalar: the mean over all rows of mask times loss (README, section 5.3). mask [N], mixed and so a fraction.

    kind: "RL", symmetric cross-entropy; "CE", cross-entropy.
    """
    if kind == "CE":
        return (mask * soft_cross_entropy(logits, targets)).mean()
    return (mask * soft_symmetric_cross_entropy(logits, targets, rce)).mean()


def unlabelled_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """L_u, a scalar: the mean over all rows of mask times squared error, a mean over classes (README, section 5.3)."""
    return (mask * (F.softmax(logits, dim=1) - targets).square().mean(dim=1)).mean()


def view_log_probabilities(features: Tensor, temperature: float) -> Tensor:
    """Log-softmax of cosine / temperature of each view over all other views, [VB, VB], 0 on the diagonal.

    features [B, V, D]: V views of B images, rows of length 1. Rows and columns: all first views, then all second ones, ...
    """
    rows = features.transpose(0, 1).flatten(0, 1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        logits = (rows @ rows.T / temperature).masked_fill(itself, -math.inf)
        return F.log_softmax(logits, dim=1).masked_fill(itself, 0)


def contrastive_loss(features: Tensor, temperature: float = CONTRASTIVE_TEMPERATURE) -> Tensor:
    """L_c, SimCLR's loss (README, section 5.4), a scalar: the mean over all views of -log p of the other view of the image.

    features: [B, 2, D], rows of length 1.
    """
    images = len(features)
    view = torch.arange(2 * images, device=features.device)
    return -view_log_probabilities(features, temperature)[view, view.roll(images)].mean()


def balance_penalty(logits: Tensor) -> Tensor:
    """sum_c (1/K) log((1/K) / pbar_c), pbar the mean prediction (README, section 5.5): a scalar, 0 if pbar is uniform."""
    rows, classes = logits.shape
    # in logarithms: pbar can underflow
    log_mean = F.log_softmax(logits, dim=1).logsumexp(dim=0) - math.log(rows)
    return -log_mean.mean() - math.log(classes)


def ramp_up(position: float, warm_up: int) -> float:
    """clip((position - warm_up) / 16, 0, 1), of the unlabelled losses (README, section 5.6); position in epochs from 0."""
    return min(max((position - warm_up) / RAMP_EPOCHS, 0.0), 1.0)


def ramp_steps(labelled: int, batch_size: int, steps: int, ramp: str = "fixed") -> int:
    """Steps per epoch according to the ramp: all there are; "released": labelled // batch_size + 1 (README, difference 3).

    labelled: labelled samples. The release counts one step too many where the batch size divides them.
    """
    return labelled // batch_size + 1 if ramp == "released" else steps


def position(epoch: int, step: int, steps: int, ramp: str = "fixed") -> float:
    """Where the ramp is: epoch + step / steps; "released": finished epochs count twice (README, difference 3).

    steps: of an epoch, as `ramp_steps` counts them.
    """
    return epoch + step / steps + (epoch if ramp == "released" else 0)


def learning_rate(epoch: int, base: float, epochs: int) -> float:
    """Cosine from base to 0 over all epochs, constant within each; epochs count from 0 (README, section 4.1)."""
    return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
