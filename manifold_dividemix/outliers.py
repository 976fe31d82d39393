"""Which samples are out of distribution: those that are far from their nearest neighbours (README, section 4.2)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu import device as gpu

CHUNK = 1024  # rows that are compared with all others at once: 200 MB of float32 at 50000 samples


def knn_scores(embeddings: Tensor, k: int = 10) -> Tensor:
    """exp(-mean distance to the k nearest other samples), float32 [N]; the smallest are the outliers.

    embeddings [N, D]. Distance: 1 - cosine; Euclidean for D <= 3. A sample is not its own neighbour, a duplicate of it is; a
    row of zeros has distance 1 to all. Exact: matrix products of chunks of rows with all. ValueError: fewer than 2 samples.
    """
    size, dimensions = embeddings.shape
    if size < 2:
        raise ValueError(f"{size} samples have no neighbours")
    euclidean = dimensions <= 3
    rows = gpu.wide(embeddings) if euclidean else F.normalize(embeddings.float(), dim=1)
    scores = []
    for start in range(0, size, CHUNK):
        own = rows[start : start + CHUNK]
        if euclidean:
            distances = torch.cdist(own, rows, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            with gpu.exact_products():
                distances = (1 - own @ rows.T).clamp_min(0)
        here = torch.arange(len(own), device=rows.device)
        distances[here, start + here] = math.inf
        nearest = distances.topk(min(k, size - 1), dim=1, largest=False).values
        scores.append(torch.exp(-nearest.mean(dim=1)))
    return torch.cat(scores).float().to(embeddings.device)


def kept_samples(scores: Tensor, removed: int) -> Tensor:
    """Which samples stay, bool [N], when those with the `removed` lowest scores go; of equal ones the earlier goes first."""
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[:removed]] = False
    return kept


def outlier_auroc(scores: Tensor, ood: np.ndarray | None) -> float | None:
    """Area under the ROC curve of low scores against the true OOD images, bool [N].

    None if these are unknown, if there are none or no others, and for scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of import)

    if ood is None or not 0 < ood.sum() < len(ood) or not scores.isfinite().all():
        return None
    return float(roc_auc_score(ood, -scores.cpu().numpy()))
