"""One MixEMatch step (Sec. 4.5): guess, refine, mix inputs and embeddings, losses.

A network is `networks.Network`, or anything with its calls. Under torchrun every process has the views of the whole batch,
encodes its piece of them, and computes the same losses of all embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu import processes
from manifold_dividemix.losses import balance_penalty, contrastive_loss, labelled_loss, unlabelled_loss


class Views(NamedTuple):
    """Two weak and two strong views of a batch, [B, C, H, W] each."""

    weak: tuple[Tensor, Tensor]
    strong: tuple[Tensor, Tensor]


class Weights(NamedTuple):
    """What the parts of the loss are multiplied by (Sec. 5.6)."""

    labelled: float = 1  # lambda_x
    unlabelled: float = 100  # lambda_u, of the ramp
    labelled_embedding: float = 1  # lambda_xe
    unlabelled_embedding: float = 100  # lambda_ue, of the ramp
    contrastive: float = 1  # lambda_c


class Loss(NamedTuple):
    """The total that is back-propagated, and its parts (detached)."""

    total: Tensor
    labelled: Tensor
    unlabelled: Tensor
    labelled_embedding: Tensor
    unlabelled_embedding: Tensor
    contrastive: Tensor
    penalty: Tensor


def encode(network: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings of each view, [B, D] each.

    A forward pass per view, as in the release: joined they would share batch statistics. Where the encoder's batch norms are
    frozen that changes nothing, and there is one pass for all.
    """
    if network.encoder.training:
        return [processes.gather_rows(network(processes.piece(view))) for view in views]
    joined = processes.gather_rows(network(processes.piece(torch.cat(list(views)))))
    return list(joined.split([len(view) for view in views]))


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), rows renormalised. [N, K]; T = 1 leaves the rows as they are. ValueError: T <= 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # in log space: p^(1/T) underflows in float32 where T is small
    return torch.softmax(probabilities.clamp_min(1e-30).log() / temperature, dim=1)


def mean_prediction(network: nn.Module, embeddings: Sequence[Tensor]) -> Tensor:
    """The mean over views of softmax(f2(h)), [B, K]."""
    return sum(F.softmax(network.classify(own), dim=1) for own in embeddings) / len(embeddings)


def confident(targets: Tensor, threshold: float) -> Tensor:
    """Which guesses are sure enough to be trained on: 1. or 0. per row, asked of the sharpened targets [N, K]."""
    return (targets.max(dim=1).values >= threshold).to(targets.dtype)


def refined(mean: Tensor, labels: Tensor, clean: Tensor) -> Tensor:
    """w onehot(observed) + (1 - w) mean prediction, [B, K]. labels int [B], clean probabilities w [B]."""
    weight = clean.to(mean.dtype)[:, None]
    return weight * F.one_hot(labels, mean.shape[1]).to(mean.dtype) + (1 - weight) * mean


class Targets(NamedTuple):
    """What a step's weak views give."""

    labelled: Tensor  # tx [B, K]
    unlabelled: Tensor  # tu [Bu, K]
    mask: Tensor  # m [Bu]: 1. where the guess is sure


@torch.no_grad()
def make_targets(
    network: nn.Module,
    labelled: Views,
    unlabelled: Views,
    labels: Tensor,
    clean: Tensor,
    temperature: float,
    threshold: float,
) -> Targets:
    """Guessed targets of the unlabelled samples, refined ones of the labelled, from their weak views."""
    embeddings = encode(network, [*unlabelled.weak, *labelled.weak])
    guessed = sharpen(mean_prediction(network, embeddings[:2]), temperature)
    own = refined(mean_prediction(network, embeddings[2:]), labels, clean)
    return Targets(sharpen(own, temperature), guessed, confident(guessed, threshold))


def mix(rows: Tensor, share: float, permutation: Tensor) -> Tensor:
    """Each row mixed with a partner: l row + (1 - l) partner, l = max(share, 1 - share) for the whole batch."""
    share = max(share, 1 - share)
    return share * rows + (1 - share) * rows[permutation]


def step_loss(
    network: nn.Module,
    labelled: Views,
    unlabelled: Views,
    targets: Targets,
    *,
    share: float,
    permutation: Tensor,
    weights: Weights,
    ramp: float = 1,
    kind: str = "RL",
    rce: str = "released",
    temperature: float = 0.05,
) -> Loss:
    """The loss of the strong views, mixed as inputs and as embeddings by one share and one permutation of 2B + 2Bu rows.

    ramp: factor of both unlabelled losses. kind, rce: of the labelled loss. temperature: of the contrastive loss, which is
    taken of the unlabelled strong views.
    """
    views = [*labelled.strong, *unlabelled.strong]
    mixed_inputs = mix(torch.cat(views), share, permutation)
    *embeddings, of_mixed = encode(network, [*views, mixed_inputs])
    rows = torch.cat([targets.labelled, targets.labelled, targets.unlabelled, targets.unlabelled])
    mask = torch.cat([torch.ones_like(rows[: 2 * len(targets.labelled), 0]), targets.mask, targets.mask])
    rows, mask = mix(rows, share, permutation), mix(mask, share, permutation)
    z = torch.stack([F.normalize(network.project(own), dim=1) for own in embeddings[2:]], dim=1)

    def pair(logits: Tensor) -> tuple[Tensor, Tensor]:
        x = slice(2 * len(targets.labelled))
        u = slice(2 * len(targets.labelled), None)
        return (
            labelled_loss(logits[x], rows[x], mask[x], kind, rce),
            unlabelled_loss(logits[u], rows[u], mask[u]),
        )

    logits_in = network.classify(of_mixed)
    logits_emb = network.classify(mix(torch.cat(embeddings), share, permutation))
    parts = (
        *pair(logits_in),
        *pair(logits_emb),
        contrastive_loss(z, temperature),
        balance_penalty(logits_in),
    )
    factors = weights._replace(
        unlabelled=ramp * weights.unlabelled, unlabelled_embedding=ramp * weights.unlabelled_embedding
    )
    total = sum(factor * part for factor, part in zip((*factors, 1), parts, strict=True))
    return Loss(total, *(part.detach() for part in parts))
