"""The stand-in network of the recorded steps: h = tanh(W flatten(x) + b), a linear classifier, a batch-normalised projection."""

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from manifold_dividemix.networks import Network


class ToyEncoder(nn.Module):
    """Images [B, 3, 4, 4] to maps [B, D, 1, 1]."""

    def __init__(self, pixels: int, width: int):
        super().__init__()
        self.linear = nn.Linear(pixels, width)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.linear(images.flatten(1)))[:, :, None, None]


PARTS = {"enc": "encoder.linear", "cls": "classifier", "proj": "projection"}
STATISTICS = {"scale": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var"}


def toy_from(arrays: dict) -> Network:
    """The network whose weights are under model_*, in eval mode."""
    width, pixels = arrays["model_enc_w"].shape
    classes, projection = len(arrays["model_cls_b"]), len(arrays["model_proj_b"])
    network = Network(ToyEncoder(pixels, width), width, classes)
    network.projection, network.projection_bn = nn.Linear(width, projection), nn.BatchNorm1d(projection)
    state = {ours: torch.from_numpy(arrays[f"model_{theirs}"]) for theirs, ours in names().items()}
    network.load_state_dict(state, strict=False)
    return network.eval()


def names() -> dict[str, str]:
    """A case's name of each parameter and statistic, and ours."""
    linear = {
        f"{theirs}_{name[0]}": f"{ours}.{name}"
        for theirs, ours in PARTS.items()
        for name in ("weight", "bias")
    }
    return linear | {f"bn_{theirs}": f"projection_bn.{ours}" for theirs, ours in STATISTICS.items()}


def sklearn_knn_scores(embeddings: Tensor, k: int = 10) -> Tensor:
    """`outliers.knn_scores` by scikit-learn's exact nearest neighbours."""
    rows = embeddings.double().numpy()
    metric = "cosine" if rows.shape[1] > 3 else "euclidean"
    found = NearestNeighbors(n_neighbors=min(k, len(rows) - 1), metric=metric, algorithm="brute").fit(rows)
    distances, _ = found.kneighbors()  # of the fitted samples, without themselves
    return torch.from_numpy(np.exp(-distances.mean(axis=1)))
