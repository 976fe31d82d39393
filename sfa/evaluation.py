"""Accuracy by class and by shot, the quality of the selection and of the given labels (README, sections 6 and 8)."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.device import Device
from common.runs.label_quality import Estimate
from sfa.training import summed_logits

SHOTS = ("many", "medium", "few")
SELECTION_STATISTICS = (
    "selected",
    "auc",
    *(f"{s}{q}" for s in ("", "many_", "medium_", "few_") for q in ("precision", "recall")),
)


def shots(observed_counts: np.ndarray) -> dict[str, np.ndarray]:
    """The many-, medium- and few-shot classes, bool [K] each, as in the release's log.

    10 classes: many = 0 and 1, few = 7 to 9. Otherwise by the observed labels: many above 100 samples, few below 20.
    """
    num_classes = len(observed_counts)
    if num_classes == 10:
        many, few = np.arange(10) <= 1, np.arange(10) >= 7
    else:
        many, few = observed_counts > 100, observed_counts < 20
    return {"many": many, "medium": ~many & ~few, "few": few}


def accuracies(predicted: np.ndarray, labels: np.ndarray, observed_counts: np.ndarray) -> dict[str, float]:
    """Percent: test_accuracy, {many,medium,few}_accuracy (mean recall of the classes of the shot), class_0, class_1, ...

    NaN where the test set has no sample of a class or a shot has no class.
    """
    correct = predicted == labels
    sizes = np.bincount(labels, minlength=len(observed_counts))
    recall = 100 * np.bincount(labels, weights=correct, minlength=len(sizes)) / np.where(sizes, sizes, np.nan)
    report = {"test_accuracy": 100 * float(correct.mean())}
    for name, classes in shots(observed_counts).items():
        present = recall[classes & (sizes > 0)]
        report[f"{name}_accuracy"] = float(present.mean()) if len(present) else float("nan")
    return report | {f"class_{k}": float(value) for k, value in enumerate(recall)}


def selection_statistics(
    clean_probability: np.ndarray,
    selected: np.ndarray,
    observed: np.ndarray,
    clean: np.ndarray,
    num_classes: int,
) -> dict[str, float]:
    """Quality of a selection against the true labels: selected, auc, precision and recall overall and per shot.

    All inputs [N]. precision: fraction of the selected that is clean, 0 without a selected sample. recall: fraction of the
    clean that is selected, NaN if a shot has no clean sample. auc: of clean_probability against (observed == clean), NaN if
    all or none is clean.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of import)

    is_clean, counts = observed == clean, np.bincount(observed, minlength=num_classes)
    both = 0 < is_clean.sum() < len(is_clean)
    auc = float(roc_auc_score(is_clean, clean_probability)) if both else float("nan")
    report = {"selected": int(selected.sum()), "auc": auc}
    overall = {"": np.ones(num_classes, dtype=bool)}
    for name, classes in (overall | shots(counts)).items():
        prefix, members = f"{name}_" if name else "", classes[observed]
        chosen, truly = members & selected, members & is_clean
        report[f"{prefix}precision"] = float(is_clean[chosen].mean()) if chosen.any() else 0.0
        report[f"{prefix}recall"] = float(selected[truly].mean()) if truly.any() else float("nan")
    return report


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Percent of rows of logits [N, K] whose label int [N] is among the k largest."""
    largest = logits.topk(k, dim=1).indices
    return 100 * float((largest == labels[:, None]).any(dim=1).float().mean())


def estimate_label_quality(
    networks: Sequence[nn.Module],
    clean: Sequence[Tensor | None],
    plain: Iterable,
    shape: tuple[int, int],
    threshold: float,
    device: Device,
) -> Estimate:
    """The mean of both networks' last clean probabilities, which labels both select, and class probabilities by all heads.

    clean: [N] each; None: there was no selection, and the score is the probability of the given label. plain: the N training
    images in order, without augmentation. shape: N and K. threshold: a label above it is selected.
    """
    logits = summed_logits(networks, plain, *shape, device)
    probabilities = F.softmax(logits / (2 * len(networks)), dim=1)
    if clean[0] is None:
        return Estimate(probabilities)
    both = torch.stack([own.cpu() for own in clean])
    return Estimate(probabilities, both.mean(dim=0), (both > threshold).all(dim=0))
