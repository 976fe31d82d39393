"""Confident examples: training items whose observed label the network predicts (Sec. 6), and what they are like."""

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


def _share(part: Tensor | int, whole: int) -> float | None:
    return int(part) / whole if whole else None
