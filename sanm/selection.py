"""Label quality: the clean probability of each sample from its loss, and the split that it makes (README, section 6)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu.mixture import lower_posterior
from common.runs.cli import UserError
from common.runs.label_quality import Estimate
from sanm.choices import HISTORY

MARGIN = 1e-5  # the threshold stays this far inside the range of the clean probabilities
STATISTICS = ("selected", "auc", "precision", "recall")


def normalised(losses: Tensor) -> Tensor:
    """Losses [N] scaled to [0, 1] by their minimum and maximum; zeros where all are equal."""
    losses = losses - losses.min()
    spread = losses.max()
    return losses / spread if spread > 0 else losses


def remember(history: list[Tensor], losses: Tensor) -> list[Tensor]:
    """The last HISTORY normalised loss vectors [N] of a network, this one included."""
    return [*history, losses][-HISTORY:]


def clean_probability(values: Tensor, seed: int) -> Tensor:
    """Posterior of the component with the smaller mean, float64 [N], for normalised losses [N].

    scikit-learn's mixture of two Gaussians with the release's settings (ten iterations); seed: of its k-means start.
    UserError: losses that are not finite.
    """
    if not torch.isfinite(values).all():
        raise UserError(
            "losses of training samples are not finite: lower --lr or try --precision fp32, with another --out"
        )
    return lower_posterior(values, seed)


def divide(clean: Tensor, threshold: float, at_least: int = 1) -> Tensor:
    """Which samples count as labelled, bool [N]: those of clean probability above the threshold; neither side is ever empty.

    The threshold is kept inside the range of the probabilities (as C2D does). Where a side still has fewer than at_least
    samples, which is so if all probabilities are equal, it gets those nearest to it. ValueError: N < 2 at_least.
    """
    if len(clean) < 2 * at_least:
        raise ValueError(f"{len(clean)} samples cannot be divided into two sets of at least {at_least}")
    low, high = float(clean.min()) + MARGIN, float(clean.max()) - MARGIN
    selected = clean > min(max(threshold, low), high)
    count = int(selected.sum())
    enough = min(max(count, at_least), len(clean) - at_least)
    if enough != count:
        selected = torch.zeros_like(selected)
        selected[clean.argsort(descending=True, stable=True)[:enough]] = True
    return selected


def split_statistics(
    clean: list[Tensor], selected: list[Tensor], right: Tensor | None
) -> dict[str, float | None]:
    """Columns net1_..., net2_... of the log: samples selected, AUC of the clean probability, precision and recall.

    clean float64 [N], selected bool [N]: of each network, empty in warm-up, where all columns are None. right: bool [N],
    which observed labels are the true ones. AUC and recall are None if all are of one kind; without `right` only the number of
    samples selected is known.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of import)

    columns, truth = {}, None if right is None else right.cpu().numpy()
    for net in (0, 1):
        report = dict.fromkeys(STATISTICS)
        if clean:
            probability, chosen = clean[net].cpu().numpy(), selected[net].cpu().numpy()
            report["selected"] = int(chosen.sum())
            if truth is not None:
                report["precision"] = float(truth[chosen].mean())
            if truth is not None and 0 < truth.sum() < len(truth):
                report["auc"] = float(roc_auc_score(truth, probability))
                report["recall"] = float(chosen[truth].mean())
        columns |= {f"net{net + 1}_{name}": value for name, value in report.items()}
    return columns


def estimate_label_quality(
    scores: Tensor, clean: Sequence[Tensor | None], threshold: float, softmax: bool
) -> Estimate:
    """The mean of both networks' clean probabilities, and which labels both select; class probabilities by the mean of scores.

    scores [2, N, K]: the networks' logits; with `softmax` probabilities already. clean: [N] each; None: there was no split, and
    the score is the probability of the given label.
    """
    mean = scores.mean(dim=0)
    probabilities = mean if softmax else F.softmax(mean, dim=1)
    if clean[0] is None:
        return Estimate(probabilities)
    selected = torch.stack([divide(own, threshold) for own in clean]).all(dim=0)
    return Estimate(probabilities, torch.stack(list(clean)).mean(dim=0), selected)
