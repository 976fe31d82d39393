"""What a run keeps of its selections: for the next epoch, for the log, and in its directory for `sfa.visualize`."""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch

from common.runs import selection_report
from common.runs.run import Run
from sfa.evaluation import SELECTION_STATISTICS, selection_statistics
from sfa.selection import Selection
from sfa.small_loss import SmallLoss


def empty_memory(num_classes: int) -> dict:
    """What the checkpoints of a run keep of the selections of its two networks, before the first one."""
    streaks = selection_report.no_streaks(2, num_classes)
    return {"moments": [None, None], "clean": [None, None], "centroids": [], "streaks": streaks}


def remember(memory: dict, selections: Sequence[Selection | SmallLoss]) -> None:
    """Put both networks' selections of an epoch into the memory: clean probabilities, and the moments if they have any.

    Also the centroids of the first network, the mean over draws, as float16 on the CPU.
    """
    memory["clean"] = [selection.clean for selection in selections]
    averaged = [selection for selection in selections if isinstance(selection, Selection)]
    if averaged:
        memory["moments"] = [list(selection.moments) for selection in averaged]
        memory["centroids"].append(averaged[0].centroids.mean(dim=0).half().cpu())


def save_selections(run: Run, memory: dict, **labels: np.ndarray | None) -> None:
    """Write clean_probability.npz, with labels [N] by name, and centroids.npz. Without a selection neither is written.

    Labels that are None are unknown and left out.
    """
    if memory["clean"][0] is not None:
        first, second = (clean.cpu().numpy() for clean in memory["clean"])
        known = {name: values for name, values in labels.items() if values is not None}
        run.save_arrays("clean_probability", net1=first, net2=second, **known)
    if memory["centroids"]:
        run.save_arrays("centroids", net1=torch.stack(memory["centroids"]).numpy())


def quality_columns(
    selections: Sequence[Selection | SmallLoss], observed: np.ndarray, clean: np.ndarray | None
) -> dict[str, float | None]:
    """Columns net1_..., net2_... of the log: selection statistics and the number of drawn classes.

    observed, clean: labels, int [N]; clean None if they are unknown. None in the warm-up; without true labels all but the sizes.
    Small losses have no drawn classes: None.
    """
    columns = {}
    for i in (1, 2):
        report = dict.fromkeys((*SELECTION_STATISTICS, "drawn_classes"))
        if selections:
            selection = selections[i - 1]
            arrays = selection.clean.cpu().numpy(), selection.selected.cpu().numpy()
            report["selected"] = int(arrays[1].sum())
            if clean is not None:
                report |= selection_statistics(*arrays, observed, clean, len(selection.counts))
            if isinstance(selection, Selection):
                report["drawn_classes"] = int(selection.drawn.sum())
        columns |= {f"net{i}_{name}": value for name, value in report.items()}
    return columns


def classes_last(report: dict) -> dict:
    """The columns of an epoch with those of single classes, class_0 ..., behind all others."""
    return dict(sorted(report.items(), key=lambda column: column[0].startswith("class_")))


def note_warm_up(args: Namespace, batches: int) -> None:
    """Print a note if a selection follows a warm-up of few steps. batches: of an epoch of the warm-up."""
    if args.selection != "none" and args.warm_up < args.num_epochs:
        selection_report.note_short_warm_up(args.warm_up * batches, f"--warm_up {args.warm_up}")
