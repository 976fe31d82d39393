"""Confident examples: training samples whose observed label the network predicts (README, section 6)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# of `set_statistics`
SET_COLUMNS = (
    *("confident_size", "confident_share", "confident_precision", "confident_recall"),
    *("hard_share", "hard_precision"),
)


def confident_examples(predicted: Tensor, labels: Tensor) -> Tensor:
    """Positions, ascending, of the samples whose prediction is their observed label; both int [N]. No threshold."""
    return (predicted == labels).nonzero()[:, 0]


def set_statistics(
    confident: Tensor, right: Tensor | None, first: Tensor, size: int
) -> dict[str, float | int | None]:
    """Size, precision and recall of a confident set, and its hard examples.

    confident, first: int positions of this set and of the run's first one, which the early-stopped network extracted. right:
    bool [N], whether an observed label is the true one; None if that is unknown, as then what depends on it. size: N. Hard
    examples are those that are not in the first set.
    Returned: confident_size; confident_share of all N; confident_precision, the share of right labels in the set;
    confident_recall, the share of all right labels that are in it; hard_share of the set; hard_precision, the share of right
    labels among the hard examples. None if the denominator is 0.
    """
    hard = torch.ones(size, dtype=torch.bool, device=confident.device)
    hard[first] = False
    hard = hard[confident]
    sizes = {
        "confident_size": len(confident),
        "confident_share": _share(len(confident), size),
        "hard_share": _share(hard.sum(), len(confident)),
    }
    if right is None:
        return {name: sizes.get(name) for name in SET_COLUMNS}
    kept = right[confident]
    quality = {
        "confident_precision": _share(kept.sum(), len(confident)),
        "confident_recall": _share(kept.sum(), int(right.sum())),
        "hard_precision": _share(kept[hard].sum(), int(hard.sum())),
    }
    return {name: {**sizes, **quality}[name] for name in SET_COLUMNS}


def set_growth(sets: Sequence[tuple[float, float | None]]) -> dict[str, float | None]:
    """How the confident sets changed from extraction to extraction; None for fewer than two sets.

    sets: (share, precision) in the order of extraction. Returned: confident_growth and confident_precision_change, last set
    minus first set; confident_grew, the share of the later extractions whose set is larger than the one before.
    """
    names = ("confident_growth", "confident_precision_change", "confident_grew")
    if len(sets) < 2:
        return dict.fromkeys(names)
    shares, precisions = zip(*sets, strict=True)
    grew = sum(after > before for before, after in pairwise(shares)) / (len(shares) - 1)
    change = None if None in (precisions[0], precisions[-1]) else precisions[-1] - precisions[0]
    return dict(zip(names, (shares[-1] - shares[0], change, grew), strict=True))


def _share(part: Tensor | int, whole: int) -> float | None:
    return int(part) / whole if whole else None
