"""What a finished run reports: the test accuracy of the best epoch on validation, its confident sets, the given labels."""

from argparse import Namespace
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.gpu.device import Device
from common.runs.label_quality import Estimate
from me_momentum.confident import SET_COLUMNS, set_growth
from me_momentum.training import class_probabilities


def summary(rows: list[dict], metric: str, args: Namespace) -> dict[str, float | None]:
    """The test accuracy to report (README, section 7), and what the last confident set was like.

    at_best_validation: the test accuracy of the fine-tuning epoch that is best on the noisy validation part, the first of
    equals. If no such epoch beat early stopping, the release reports 0, and --fidelity paper the best early-stopped epoch.
    """
    best_of_run = [row for row in rows if row["new_best"]][-1:]
    if best_of_run or args.fidelity == "paper" or args.selection == "none":
        best_kept = max(rows, key=lambda row: (row["kept"], row["validation_accuracy"]))
        [epoch] = best_of_run or [best_kept]
        test, validation = epoch[metric], epoch["validation_accuracy"]
    else:
        test, validation = 0.0, 0.0
    rounds = {(row["outer"], row["round"]): row for row in rows if row["round"]}
    sets = [
        (row["confident_share"], row["confident_precision"])
        for row in rounds.values()
        if row["confident_share"] is not None
    ]
    return {
        "at_best_validation": test,
        "best_validation": validation,
        "epochs_trained": len(rows),
        "rounds": len(rounds),
        **{name: rows[-1][name] for name in SET_COLUMNS},
        **set_growth(sets),
    }


def clothing_summary(rows: list[dict], metric: str) -> dict[str, float | None]:
    """The test accuracy `metric` of the epoch that is best on the clean validation images, the first of equals."""
    best_epoch = max(rows, key=lambda row: row["validation_accuracy"])
    last = {name: rows[-1][name] for name in ("confident_size", "confident_share")}
    return {
        "at_best_validation": best_epoch[metric],
        "best_validation": best_epoch["validation_accuracy"],
        **last,
    }


def estimate_label_quality(
    network: nn.Module,
    parts: Sequence[np.ndarray],
    passed: Sequence[Iterable],
    confident: Tensor | None,
    num_classes: int,
    device: Device,
) -> Estimate:
    """Class probabilities of the training images, and which of those that are trained on are confident examples.

    parts: rows of the parts of the training images, int [n_i], the one that is trained on first; passed: their plain batches.
    confident: positions within the first part, None before the first extraction; there is no choice among the other parts. The
    score is the probability of the given label.
    """
    size = sum(map(len, parts))
    probabilities = torch.zeros(size, num_classes)
    for rows, batches in zip(parts, passed, strict=True):
        probabilities[rows] = class_probabilities(network, batches, (len(rows), num_classes), device).cpu()
    if confident is None:
        return Estimate(probabilities)
    selected, trained_on = torch.full((size,), -1), torch.from_numpy(parts[0])
    selected[trained_on] = 0
    selected[trained_on[confident.cpu()]] = 1
    return Estimate(probabilities, selected=selected)


def reported(memory: dict) -> dict[str, Tensor]:
    """The weights whose test accuracy is reported."""
    return memory["reported"] or memory["best_of_loop"]
