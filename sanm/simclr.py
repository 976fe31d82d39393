"""SimCLR, with which the encoder of the C2D base is pre-trained without labels (Sec. 10).

Neither the paper nor the release has this step: they start from published encoders. Loss, schedule and head follow the SimCLR
recipe that SupContrast documents.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanm.networks import simclr_resnet, width_of

QUERIES = 512  # of kNN that are compared with the whole bank at once: 100 MB at a bank of 50000


class SimCLR(nn.Module):
    """Encoder and projection head, under the names `encoder.*` and `head.*` of the published checkpoints."""

    def __init__(self, encoder: nn.Module, width: int, dimensions: int):
        """encoder: images -> maps [B, width, h, w]; dimensions: of the embeddings."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dimensions))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> embeddings [B, dimensions] of length 1, float32 whatever the autocast."""
        embeddings = self.head(self.features(images))
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(embeddings.float(), dim=1)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> pooled maps [B, width], float32: what is kept of the network."""
        return self.encoder(images).float().mean(dim=(2, 3))


def make_simclr(channels: int = 3, size: int = 32) -> SimCLR:
    """SimCLR for images [channels, size, size]: ResNet-18 and 128 dimensions; narrow and 64 below 16 pixels (Sec. 3 A, 10)."""
    return SimCLR(simclr_resnet(channels, size), width_of(size), 64 if size < 16 else 128)


def nt_xent(embeddings: Tensor, temperature: float, base_temperature: float = 0.07) -> Tensor:
    """NT-Xent over the 2B views of B images, times temperature / base_temperature as in SupContrast (Sec. 10).

    embeddings: [B, 2, D], rows of length 1. Of each view, the cross-entropy of finding the other view of its image among
    the 2B - 1 other views by exp(cosine / temperature); the mean over all 2B, float32. One image alone has nothing to be told
    from: its loss and gradient are 0. ValueError for a temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    images = len(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        views = embeddings.float().transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
        itself = torch.eye(2 * images, dtype=torch.bool, device=views.device)
        logits = (views @ views.T / temperature).masked_fill(itself, -math.inf)
        other_view = torch.arange(2 * images, device=views.device).roll(images)
        return temperature / base_temperature * F.cross_entropy(logits, other_view)


def learning_rate(
    epoch: int,
    batch: int,
    *,
    base: float,
    epochs: int,
    batches_per_epoch: int,
    cosine: bool = True,
    warm: bool = True,
    decay_epochs: Sequence[int] = (700, 800, 900),
    decay_rate: float = 0.1,
) -> float:
    """The rate of a step; epochs from 1, batches from 0 (Sec. 10).

    cosine: from base to base / 1000 in the last epoch, constant within an epoch; else times decay_rate after each of
    decay_epochs. warm: through the first 10 epochs linearly from 0.01 to the rate of the tenth, step by step. Of fewer than 10
    epochs, for which the recipe has no rule, the first half (rounded down) is warm-up, up to the rate of its last epoch.
    """

    def scheduled(epoch: int) -> float:
        if not cosine:
            return base * decay_rate ** sum(epoch > end for end in decay_epochs)
        lowest = base * 1e-3
        return lowest + (base - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    warm_epochs = 10 if epochs >= 10 else epochs // 2
    if not warm or epoch > warm_epochs:
        return scheduled(epoch)
    progress = (batch + (epoch - 1) * batches_per_epoch) / (warm_epochs * batches_per_epoch)
    return 0.01 + progress * (scheduled(warm_epochs) - 0.01)


def knn_accuracy(
    bank_features: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Accuracy in percent of k nearest neighbours by cosine, each voting with exp(cosine / temperature). A diagnostic of ours.

    bank_features [N, D] with bank_labels [N]: among whom neighbours are sought, all of them where there are fewer than k;
    features [M, D] with labels [M]: who is classified. Neither paper nor recipe reports it; no training depends on it.
    """
    bank = F.normalize(bank_features.float(), dim=1)
    hits = torch.zeros((), dtype=torch.int64, device=features.device)
    for queries, wanted in zip(features.split(QUERIES), labels.split(QUERIES), strict=True):
        cosines, neighbours = (F.normalize(queries.float(), dim=1) @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(queries), num_classes, device=features.device)
        # relative to the nearest: no temperature overflows
        votes.scatter_add_(1, bank_labels[neighbours], ((cosines - cosines[:, :1]) / temperature).exp())
        hits += (votes.argmax(dim=1) == wanted).sum()
    return 100 * float(hits) / len(labels)
