"""Stochastic Feature Averaging (README, section 6): features and drawn class centroids say which labels are clean.

Features, observed labels, the auxiliary head's confidences and the running moments go in. Clean probabilities and the new
moments come out. No function here needs a network or a script.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.gpu import device as gpu
from common.gpu.mixture import sklearn_upper_posterior, upper_posterior
from common.runs.cli import UserError

POSTERIORS = {"em": upper_posterior, "sklearn": sklearn_upper_posterior}  # by --mixture


class Moments(NamedTuple):
    """Running averages of the class centroids and of their squares, float64 [K, D] each."""

    mean: Tensor
    square: Tensor


class Selection(NamedTuple):
    """The selection of one network at one epoch."""

    clean: Tensor  # [N] float64: probability that the observed label is clean
    selected: Tensor  # [N] bool: clean > p_threshold
    counts: Tensor  # [K] selected samples per observed class
    confident_counts: Tensor  # [K] samples that the centroid of each class was averaged over
    drawn: Tensor  # [K] bool: classes whose centroid was drawn from its Gaussian
    centroids: Tensor  # [draws, K, D] float64: the centroids that the samples were compared with
    moments: Moments


def confidence_threshold(num_classes: int, phi: float, epoch: int) -> float:
    """tau_e = (1/K) phi^e, e the epoch counted from 1, warm-up included."""
    return phi**epoch / num_classes


def centred_unit_features(features: Tensor) -> Tensor:
    """g_i = (f_i - fbar) / ||f_i - fbar||, fbar the mean over all samples. [N, D] -> [N, D]."""
    centred = features - features.mean(dim=0)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)


def class_means(unit: Tensor, labels: Tensor, members: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean of the members' rows per class, float64 [K, D] (0 for a class without), and their number [K].

    unit [N, D], labels int [N], members bool [N].
    """
    labels, rows = labels[members], unit[members].double()
    counts = torch.bincount(labels, minlength=num_classes)
    sums = torch.zeros(num_classes, unit.shape[1], dtype=torch.float64, device=unit.device).index_add_(
        0, labels, rows
    )
    return sums / counts.clamp_min(1)[:, None], counts


def update_moments(moments: Moments | None, centroids: Tensor, present: Tensor, beta: float) -> Moments:
    """M <- beta M + (1 - beta) c and Q <- beta Q + (1 - beta) c^2; M = c, Q = c^2 where there are none yet.

    centroids float64 [K, D]; present bool [K]: classes without a confident sample keep their moments.
    """
    if moments is None:
        return Moments(centroids.clone(), centroids**2)
    mean = beta * moments.mean + (1 - beta) * centroids
    square = beta * moments.square + (1 - beta) * centroids**2
    keep = ~present[:, None]
    return Moments(torch.where(keep, moments.mean, mean), torch.where(keep, moments.square, square))


def incoming_moments(moments: Sequence[Tensor] | None, ema_mode: str, device: torch.device) -> Moments | None:
    """The moments that an epoch starts from, at the `home` of a device; None at the first selection, where there are none.

    moments: those of the epoch before. ema_mode: "persist" hands them on. The release rebinds them inside its routine, so
    every later epoch starts from zeros: "released".
    """
    if moments is None:
        return None
    if ema_mode == "released":
        moments = [torch.zeros_like(moment) for moment in moments]
    return Moments(*(moment.to(gpu.home(device)) for moment in moments))


def draw_centroids(moments: Moments, drawn: Tensor, normals: Tensor) -> Tensor:
    """M + std * eps for the drawn classes, M for the others; std = sqrt(clip(Q - M^2, 1e-30, 1e30)).

    drawn bool [K]; normals [draws, K, D]. Returns float64 [draws, K, D].
    """
    std = (moments.square - moments.mean**2).clamp(1e-30, 1e30).sqrt()
    return moments.mean + drawn[:, None] * std * normals.to(std)


def closeness(unit: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """S_i = sum over draws of -||g_i - m||^2, m the drawn centroid of the sample's observed class: [N]."""
    score = unit.new_zeros(len(unit))
    for drawn in centroids.to(unit.dtype):
        own = drawn[labels]
        score -= (unit**2).sum(dim=1) + (own**2).sum(dim=1) - 2 * (unit * own).sum(dim=1)
    return score


def scale_within_class(scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Min-max scale to [0, 1] within each observed class; a class of equal scores gets 0. [N] -> [N]."""
    extremes = torch.zeros(num_classes, dtype=scores.dtype, device=scores.device)
    lowest = extremes.scatter_reduce(0, labels, scores, "amin", include_self=False)
    shifted = scores - lowest[labels]
    highest = extremes.scatter_reduce(0, labels, shifted, "amax", include_self=False)
    return shifted / torch.where(highest > 0, highest, 1)[labels]


def clean_probability(
    scores: Tensor, labels: Tensor, num_classes: int, posterior: Callable[..., Tensor] = upper_posterior
) -> Tensor:
    """w_i: posterior of the closer component of a two-component mixture of the scores of the sample's observed class.

    scores, labels [N]. 1 for a class with one sample or with equal scores. posterior: the mixture to fit.
    """
    return posterior(scale_within_class(scores, labels, num_classes), labels, num_classes)


def stochastic_feature_averaging(
    features: Tensor,
    labels: Tensor,
    confidence: Tensor,
    moments: Moments | None,
    *,
    normals: Tensor,
    threshold: float,
    beta: float,
    min_draw_count: int,
    p_threshold: float = 0.5,
    posterior: Callable[..., Tensor] = upper_posterior,
) -> Selection:
    """The selection of one network at one epoch (README, section 6).

    features: float32 [N, D], of un-augmented images in evaluation mode. labels: observed, int [N]. confidence [N]: softmax of
    the auxiliary head at the observed label. moments: of the epoch before, None at the first one. normals [draws, K, D]:
    standard normal draws. threshold: tau of this epoch. A class is drawn from its Gaussian if it has more than
    min_draw_count confident samples (0: every class is). All is computed at the `home` of the features' device, where normals and
    moments are; clean, selected and counts are on the device. UserError: features that are not finite.
    """
    device = features.device
    features, labels, confidence = (x.to(gpu.home(device)) for x in (features, labels, confidence))
    # the sum of squares too: it is divided by
    if not features.square().sum().isfinite():
        raise UserError(
            "features of training samples are not finite: lower --lr or try --precision fp32, with another --out"
        )
    num_classes = normals.shape[1]
    unit = centred_unit_features(features)
    confident = confidence > threshold
    centroids, counts = class_means(unit, labels, confident, num_classes)
    present = counts > 0
    if not present.all():
        # a class without a confident sample keeps its moments; if it has none yet, the centroid of all its samples serves
        has_moments = torch.zeros_like(present) if moments is None else (moments.square > 0).any(dim=1)
        of_all, sizes = class_means(unit, labels, torch.ones_like(confident), num_classes)
        fallback = ~present & ~has_moments & (sizes > 0)
        centroids = torch.where(fallback[:, None], of_all, centroids)
        present = present | fallback
    moments = update_moments(moments, centroids, present, beta)
    drawn = counts > min_draw_count if min_draw_count else torch.ones_like(present)
    centroids = draw_centroids(moments, drawn, normals)
    clean = clean_probability(closeness(unit, labels, centroids), labels, num_classes, posterior)
    selected = clean > p_threshold
    selected_counts = torch.bincount(labels[selected], minlength=num_classes)
    clean, selected, selected_counts = (gpu.put(x, device) for x in (clean, selected, selected_counts))
    return Selection(clean, selected, selected_counts, counts, drawn, centroids, moments)
