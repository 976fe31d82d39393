"""Confident examples: training items whose observed label the network predicts (Sec. 6), and what they are like."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def confident_examples(predicted: Tensor, labels: Tensor) -> Tensor:
    """Positions, ascending, of the items whose prediction is their observed label; both int [N]. No threshold."""
    return (predicted == labels).nonzero()[:, 0]


def set_statistics(confident: Tensor, right: Tensor, first: Tensor) -> dict[str, float | int | None]:
    """What a confident set is made of.

    confident, first: int positions of this set and of the run's first one, which the early-stopped network chose; right:
    bool [N], whether an item's label is the true one. Returned: the size of the set and its share of all N; precision, the
    share of right labels in it; recall, the share of all right labels that are in it; hard_share, the share of hard examples,
    those that are not in the first set; and hard_precision, the share of right labels among these. None where there is
    nothing to take a share of.
    """
    hard = torch.ones_like(right)
    hard[first] = False
    hard = hard[confident]
    kept = right[confident]
    return {
        "confident_size": len(confident),
        "confident_share": _share(len(confident), len(right)),
        "confident_precision": _share(kept.sum(), len(confident)),
        "confident_recall": _share(kept.sum(), int(right.sum())),
        "hard_share": _share(hard.sum(), len(confident)),
        "hard_precision": _share(kept[hard].sum(), int(hard.sum())),
    }


def set_growth(sets: Sequence[tuple[float, float | None]]) -> dict[str, float | None]:
    """How the confident sets changed from extraction to extraction.

    sets: (share, precision) of each in the order of their extraction. confident_growth and confident_precision_change: of the
    last one, less that of the first; confident_grew: share of the extractions after the first whose set is larger than the one
    before. None of fewer than two sets.
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
