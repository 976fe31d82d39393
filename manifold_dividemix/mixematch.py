"""One step of MixEMatch (README, section 4.5): guess, refine, mix inputs and embeddings, MixMatch's loss of both.

Networks are `networks.Network`, or anything with its calls. Under torchrun every process has the views of the whole batch,
encodes its piece of them, and computes the same loss of all embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu import passes, processes
from manifold_dividemix.choices import Lambdas
from manifold_dividemix.losses import balance_penalty, contrastive_loss, labelled_loss, unlabelled_loss
from manifold_dividemix.networks import Network


class Loss(NamedTuple):
    """The total that is back-propagated, and its parts (detached)."""

    total: Tensor
    labelled: Tensor
    unlabelled: Tensor
    labelled_embedding: Tensor
    unlabelled_embedding: Tensor
    contrastive: Tensor
    penalty: Tensor


class Views(NamedTuple):
    """Two weak and two strong views of a batch, [B, C, H, W] each."""

    weak: Sequence[Tensor]
    strong: Sequence[Tensor]


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), rows renormalised. [N, K]; T = 1 leaves the rows as they are. ValueError: T <= 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # in log space: p^(1/T) underflows in float32 where T is small
    return torch.softmax(probabilities.clamp_min(1e-30).log() / temperature, dim=1)


@torch.no_grad()
def guess_labels(network: Network, views: Sequence[Tensor], temperature: float) -> Tensor:
    """Targets [B, K] of unlabelled samples: the mean prediction on both views, sharpened."""
    predictions = [F.softmax(network.classify(h), dim=1) for h in encode(network, views)]
    mean: Tensor = sum(predictions) / len(predictions)
    return sharpen(mean, temperature)


@torch.no_grad()
def refine_labels(
    network: Network, views: Sequence[Tensor], labels: Tensor, clean: Tensor, temperature: float
) -> Tensor:
    """Targets [B, K] of labelled samples: w onehot(observed) + (1 - w) own mean prediction, sharpened.

    labels int [B]; clean: clean probabilities w [B].
    """
    predictions = [F.softmax(network.classify(h), dim=1) for h in encode(network, views)]
    mean: Tensor = sum(predictions) / len(predictions)
    observed = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
    weight = clean.to(mean.dtype)[:, None]
    return sharpen(weight * observed + (1 - weight) * mean, temperature)


def mix(rows: Tensor, lam: float, permutation: Tensor) -> Tensor:
    """Each row mixed with its partner: l row + (1 - l) partner, l = max(lam, 1 - lam). [N, ...].

    permutation: the partners, int [N].
    """
    lam = max(lam, 1 - lam)
    return lam * rows + (1 - lam) * rows[permutation]


def encode(network: Network, views: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings [B, D] of each view.

    In train mode each view is a batch of its own for the batch norms, as in the release. With frozen batch norms joining the
    views changes nothing.
    """
    joined = views if network.encoder.training else [torch.cat(list(views))]
    batches = [processes.piece(view) for view in joined]
    rows = [processes.gather_rows(network(batch)) for batch in passes.separate(network, batches)]
    return rows if network.encoder.training else list(rows[0].split([len(view) for view in views]))


def confident(targets: Tensor, threshold: float) -> Tensor:
    """Which guesses are trained on: 1. or 0. per row, by the largest entry of the sharpened targets [N, K]."""
    return (targets.max(dim=1).values >= threshold).to(targets.dtype)


def semi_loss(
    logits: Tensor,
    logits_embedding: Tensor,
    projections: Tensor,
    targets: Tensor,
    mask: Tensor,
    labelled_rows: int,
    lambdas: Lambdas,
    ramp: float,
    kind: str = "RL",
    rce: str = "released",
) -> Loss:
    """The total loss (README, section 5.6) of mixed rows [N, K], of which the first labelled_rows are labelled.

    logits: of mixed inputs; logits_embedding: of mixed embeddings. projections [Bu, 2, P]: of the unlabelled strong views, of
    length 1. mask [N]: mixed as the rows. ramp: factor of both unlabelled losses. kind, rce: of the labelled losses.
    """
    x, u = slice(labelled_rows), slice(labelled_rows, None)
    l_x = labelled_loss(logits[x], targets[x], mask[x], kind, rce)
    l_u = unlabelled_loss(logits[u], targets[u], mask[u])
    l_xe = labelled_loss(logits_embedding[x], targets[x], mask[x], kind, rce)
    l_ue = unlabelled_loss(logits_embedding[u], targets[u], mask[u])
    l_c, penalty, w = contrastive_loss(projections), balance_penalty(logits), lambdas
    total = w.x * l_x + ramp * w.u * l_u + w.xe * l_xe + ramp * w.ue * l_ue + w.c * l_c + penalty
    return Loss(total, *(part.detach() for part in (l_x, l_u, l_xe, l_ue, l_c, penalty)))


def step_loss(
    network: Network,
    labelled: tuple[Views, Tensor, Tensor],
    unlabelled: Views,
    *,
    lambdas: Lambdas,
    ramp: float,
    lam: float,
    permutation: Tensor,
    temperature: float,
    threshold: float,
    kind: str = "RL",
    rce: str = "released",
) -> Loss:
    """The loss of one step (README, section 4.5).

    labelled: (views, observed labels [B], clean probabilities [B]). lam: the Beta draw. permutation: the partners of all
    2B + 2Bu strong views. temperature: of sharpening. threshold: from which guesses are trained on.
    """
    views, labels, clean = labelled
    guessed = guess_labels(network, unlabelled.weak, temperature)
    refined = refine_labels(network, views.weak, labels, clean, temperature)
    targets = mix(torch.cat([refined, refined, guessed, guessed]), lam, permutation)
    trained = confident(guessed, threshold)
    mask = mix(torch.cat([refined.new_ones(2 * len(labels)), trained, trained]), lam, permutation)
    strong = [*views.strong, *unlabelled.strong]
    *embeddings, of_mixed = encode(network, [*strong, mix(torch.cat(strong), lam, permutation)])
    projections = torch.stack([F.normalize(network.project(h), dim=1) for h in embeddings[2:]], dim=1)
    logits = network.classify(of_mixed)
    logits_embedding = network.classify(mix(torch.cat(embeddings), lam, permutation))
    rows = 2 * len(labels)
    return semi_loss(logits, logits_embedding, projections, targets, mask, rows, lambdas, ramp, kind, rce)
