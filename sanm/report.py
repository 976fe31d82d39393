"""What a run of Train_cifar.py leaves at its end: clean probabilities, label quality, metrics of the result.

s: the setting of the script.
"""

from typing import Any

import numpy as np
from torch import Tensor

from common.gpu.loader import Labelled
from common.runs.label_quality import Estimate
from common.runs.run import Run
from sanm.activation import concentration_statistics, map_concentrations
from sanm.networks import MaskedNetwork
from sanm.selection import STATISTICS, estimate_label_quality
from sanm.training import accuracy, network_scores


def save_clean_probability(run: Run, clean: list, observed: np.ndarray, labels: np.ndarray | None) -> None:
    """Write clean_probability.npz if the run selected samples. clean: each network's; labels: the true ones, if known."""
    if clean[0] is not None:
        first, second = (probability.cpu().numpy() for probability in clean)
        truth = {} if labels is None else {"clean": labels}
        run.save_arrays("clean_probability", net1=first, net2=second, observed=observed, **truth)


def quality(nets: list[MaskedNetwork], clean: list, num_classes: int, s: Any) -> Estimate:
    """What the last clean probabilities and both networks at the end say about the given labels."""
    scores = network_scores(nets, s.plain("label quality"), len(s.labels), num_classes, s.device)
    return estimate_label_quality(scores, clean, s.args.p_threshold, nets[0].softmax)


def final_metrics(
    nets: list[MaskedNetwork], right: Tensor | None, tests: Labelled, num_classes: int, s: Any
) -> dict[str, float | None]:
    """The result's metrics beside the test accuracy by epoch. right: bool [N] or None; tests: all test images."""

    def full_test() -> dict[str, float]:
        scores = network_scores(nets, tests.batches, len(tests.labels), num_classes, s.device)
        return {"full_test": accuracy(scores.sum(dim=0), tests.labels), "full_test_images": len(tests.labels)}

    metrics = {f"last_net1_{name}": s.run.rows[-1][f"net1_{name}"] for name in STATISTICS}
    if not s.run.is_finished():
        values = map_concentrations(nets[0], s.plain("activation maps"), len(s.labels), s.device)
        metrics |= concentration_statistics(values, right)
    return metrics | s.run.full_test(full_test)
