"""What the training scripts write about removal and split: columns of the log, warnings, files for the figure."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu import processes
from common.runs.label_quality import Estimate
from common.runs.run import Run
from manifold_dividemix.dataset import Dataset
from manifold_dividemix.selection import divide
from manifold_dividemix.training import Embedded

SHOWN = 2000  # samples whose embeddings are kept for the figure


def save_outliers(
    run: Run, name: str, embedded: Embedded, scores: Tensor, kept: Tensor, clean: Tensor | None, seed: int
) -> None:
    """Write the first or the last removal and split to outliers_<name>.npz, with the embeddings of some samples."""
    tensors = {"score": scores, "kept": kept, "loss": embedded.losses}
    if clean is not None:
        tensors["clean_probability"] = clean
    shown = np.sort(np.random.default_rng(seed).permutation(len(scores))[:SHOWN])
    tensors["embedding"] = embedded.embeddings[torch.from_numpy(shown).to(scores.device)]
    arrays = {key: value.cpu().numpy() for key, value in tensors.items()}
    run.save_arrays(f"outliers_{name}", **arrays, shown=shown)


def estimate_label_quality(
    logits: Tensor, kept: Tensor, clean: Tensor | None, scores: Tensor | None, threshold: float
) -> Estimate:
    """The last clean probabilities, which samples are labelled in the last split, and 1 - the last outlier scores.

    logits [N, K]; kept bool [N], clean [N], scores [N]: of the last removal and split. clean None: there was no split, and the
    score is the probability of the given label.
    """
    probabilities, ood_score = F.softmax(logits, dim=1), None if scores is None else 1 - scores
    if clean is None:
        return Estimate(probabilities, ood_score=ood_score)
    selected = torch.zeros_like(kept)
    selected[divide(clean, kept, threshold)[0]] = True
    return Estimate(probabilities, clean, selected, ood_score)


def correctly_labelled(dataset: Dataset) -> np.ndarray | None:
    """Which samples are in distribution and have their true label, bool [N]; None if the true labels are unknown."""
    return None if dataset.clean is None else (dataset.observed == dataset.clean) & ~dataset.ood


def removal_columns(kept: Tensor, ood: np.ndarray | None) -> dict[str, float | None]:
    """Removed samples: how many, how many of them are OOD (precision), how many OOD images are removed (recall)."""
    removed = ~kept.cpu().numpy()
    columns: dict[str, float | None] = dict.fromkeys(("removed", "removal_precision", "removal_recall"))
    columns["removed"] = int(removed.sum())
    if ood is not None and removed.any():
        columns["removal_precision"] = float(ood[removed].mean())
    if ood is not None and ood.any():
        columns["removal_recall"] = float(removed[ood].mean())
    return columns


def removed_by_class(kept: Tensor, dataset: Dataset) -> dict[str, int]:
    """How many samples of each given label are removed: removed_class_0, removed_class_1, ..."""
    counts = np.bincount(dataset.observed[~kept.cpu().numpy()], minlength=dataset.num_classes)
    return {f"removed_class_{k}": int(count) for k, count in enumerate(counts)}


def split_columns(
    sides: tuple[Tensor, Tensor] | None, clean: Tensor | None, dataset: Dataset
) -> dict[str, float | None]:
    """Sizes of the split; of the labelled samples the ratios of correct labels and of OOD images; AUC of the clean probability.

    The AUC is that against correct labels, over the in-distribution samples. None in the warm-up, and if the true labels are
    unknown.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of import)

    columns = dict.fromkeys(("labelled", "unlabelled", "labelled_precision", "labelled_ood", "clean_auc"))
    if sides is None:
        return columns
    labelled, unlabelled = (side.cpu().numpy() for side in sides)
    columns |= {"labelled": len(labelled), "unlabelled": len(unlabelled)}
    right = correctly_labelled(dataset)
    if right is None:
        return columns
    if len(labelled):
        columns["labelled_precision"] = float(right[labelled].mean())
        columns["labelled_ood"] = float(dataset.ood[labelled].mean())
    inside = right[~dataset.ood]
    if 0 < inside.sum() < len(inside):
        columns["clean_auc"] = float(roc_auc_score(inside, clean.cpu().numpy()[~dataset.ood]))
    return columns


def lost_classes(kept: Tensor, sides: tuple[Tensor, Tensor] | None, dataset: Dataset) -> np.ndarray:
    """The classes of which more than half of the correctly labelled samples are removed or unlabelled, int [L], ascending.

    If the true labels are unknown: of all samples with the given label. sides None: no split yet, samples that are not removed
    count as kept.
    """
    lost = ~kept.cpu().numpy()
    if sides is not None:
        lost[sides[1].cpu().numpy()] = True
    right = correctly_labelled(dataset)
    members = np.ones(len(lost), bool) if right is None else right
    size, out = (
        np.bincount(dataset.observed[which], minlength=dataset.num_classes)
        for which in (members, members & lost)
    )
    return np.flatnonzero(2 * out > size)


def warn_of_lost_classes(kept: Tensor, sides: tuple[Tensor, Tensor] | None, dataset: Dataset) -> None:
    """Print a warning that names the lost classes, at most ten."""
    classes = lost_classes(kept, sides, dataset)
    if len(classes):
        names = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
        which = "samples" if dataset.clean is None else "correctly labelled samples"
        processes.say(
            f"warning: more than half of the {which} of {len(classes)} of {dataset.num_classes} classes are removed or "
            f"unlabelled: {names}"
        )
