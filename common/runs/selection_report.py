"""Classes in a selection of samples: two columns of the log, and warnings about lost classes.

Methods that train on selected samples can lose a class: if none of its samples is selected, none of its labels is used.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.gpu import device as gpu
from common.gpu import processes

COLUMNS = ("right_selected_min", "classes_unselected")
PATIENCE = 3  # selections in a row without a sample of a class until the warning
FEW_STEPS = 300  # a shorter warm-up gets a note


class Selected(NamedTuple):
    """The samples that one network selects, out of N."""

    chosen: Tensor  # bool [N], or their positions, int [n]
    given: Tensor  # given labels, int [N]
    right: Tensor | None  # bool [N]: the given label is the true one; None if the true labels are unknown


def right_selected_min(selected: Selected) -> float | None:
    """The lowest fraction, over classes, of right labels that are selected.

    A class without a right label does not count. None without such a class, or if the true labels are unknown.
    """
    chosen, given, right = selected
    if right is None or not right.any():
        return None
    all_right = torch.bincount(given[right])
    selected_right = torch.bincount(given[chosen][right[chosen]], minlength=len(all_right))
    present = all_right > 0
    return float((gpu.wide(selected_right[present]) / gpu.wide(all_right[present])).min())


def unselected(selected: Selected, num_classes: int | None = None) -> Tensor:
    """The classes that have given labels but no selected sample, bool [K]; K at least num_classes."""
    counts = torch.bincount(selected.given, minlength=num_classes or 0)
    chosen = torch.bincount(selected.given[selected.chosen], minlength=len(counts))
    return (counts > 0) & (chosen == 0)


def columns(selections: Sequence[Selected]) -> dict[str, float | int | None]:
    """The two columns for the selections of an epoch, one per network: the lowest fraction and the largest number of classes.

    None without a selection, as in the warm-up.
    """
    if not selections:
        return dict.fromkeys(COLUMNS)
    fractions = [value for value in map(right_selected_min, selections) if value is not None]
    counts = [int(unselected(selected).sum()) for selected in selections]
    return {"right_selected_min": min(fractions, default=None), "classes_unselected": max(counts)}


def no_streaks(networks: int, num_classes: int) -> Tensor:
    """The streaks before the first selection, int [networks, num_classes]; a run keeps them in its checkpoints."""
    return torch.zeros(networks, num_classes, dtype=torch.int64)


def count(streaks: Tensor, selections: Sequence[Selected], patience: int = PATIENCE) -> tuple[Tensor, Tensor]:
    """Streaks after one more selection by each network, and the classes to warn about, each for its first network.

    streaks, int [networks, K] on the CPU: selections in a row without a sample of the class. From `patience` on they only grow,
    so that each class gets one warning. Returns int [networks, K] and bool [networks, K].
    """
    without = torch.stack([unselected(selected, streaks.shape[1]).cpu() for selected in selections])
    warned = streaks >= patience
    streaks = torch.where(without | warned, streaks + 1, 0)
    lost = (streaks >= patience) & ~warned.any(dim=0)
    return streaks, lost & (lost.cumsum(dim=0) == 1)


def follow(streaks: Tensor, selections: Sequence[Selected], remedy: str, patience: int = PATIENCE) -> Tensor:
    """Streaks after one more selection by each network; prints a warning for each lost class.

    Without a selection, as in the warm-up, the streaks stay. remedy: advice for the warning.
    """
    if not selections:
        return streaks
    streaks, lost = count(streaks, selections, patience)
    for network, class_ in lost.nonzero().tolist() if processes.rank() == 0 else ():
        whose = f" by network {network + 1}" if len(selections) > 1 else ""
        when = f"for {patience} selections in a row" if patience > 1 else "in the only selection"
        print(
            f"warning: class {class_} has had no selected sample {when}{whose}: try {remedy}, with another --out",
            file=sys.stderr,
        )
    return streaks


def note_short_warm_up(steps: int, flag: str) -> None:
    """Print a note if the warm-up has few optimiser steps; flag: the flag of its length, with its value."""
    if steps < FEW_STEPS:
        processes.say(
            f"note: warm-up of {steps} steps ({flag}), below {FEW_STEPS}: "
            "classes that it does not learn are lost to the selection"
        )
