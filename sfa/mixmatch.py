"""Semi-supervised training on a split into confident and doubtful samples (Sec. 4): MixMatch with a balanced copy.

Networks map images to (features, standard logits, balanced logits); pseudo-labels come from the standard head alone. Under
torchrun a step sees this process's piece of both global batches; every process computes the same loss of all their rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu import processes
from sfa.losses import balanced, cross_entropy, prior_penalty, soft_cross_entropy, squared_error


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """q^(1/T), rows renormalised. [N, K]; T = 1 leaves the rows as they are. ValueError: T <= 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # in log space: p^(1/T) underflows in float32 where T is small
    return torch.softmax(probabilities.clamp_min(1e-30).log() / temperature, dim=1)


@torch.no_grad()
def guess_labels(
    network: nn.Module, peer: nn.Module, views: tuple[Tensor, ...], temperature: float
) -> Tensor:
    """Co-guessed targets [N, K] of doubtful samples: the mean prediction of both networks on both views, sharpened.

    network is in train mode, as in the release: each view is a batch of its own for its batch norms. peer is in
    evaluation mode, where joining the views changes nothing.
    """
    own = [F.softmax(network(view)[1], dim=1) for view in views]
    other = F.softmax(peer(torch.cat(views))[1], dim=1).chunk(len(views))
    return sharpen(sum([*own, *other]) / (2 * len(views)), temperature)


@torch.no_grad()
def refine_labels(
    network: nn.Module, views: tuple[Tensor, ...], labels: Tensor, clean: Tensor, temperature: float
) -> Tensor:
    """Targets [N, K] of confident samples: w onehot(observed) + (1 - w) own mean prediction, sharpened.

    labels int [N]; clean: clean probabilities w [N].
    """
    predictions = [F.softmax(network(view)[1], dim=1) for view in views]
    mean = sum(predictions) / len(predictions)
    observed = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
    weight = clean.to(mean.dtype)[:, None]
    return sharpen(weight * observed + (1 - weight) * mean, temperature)


class SemiLoss(NamedTuple):
    """The total that is back-propagated, and its parts (detached)."""

    total: Tensor
    labelled: Tensor
    unlabelled: Tensor
    balanced_labelled: Tensor
    balanced_unlabelled: Tensor


def semi_loss(
    standard: Tensor,
    auxiliary: Tensor,
    targets: Tensor,
    labelled_rows: int,
    class_counts: Tensor,
    weight: float,
    loss: Callable[..., Tensor] = cross_entropy,
) -> SemiLoss:
    """L_x + lambda L_u + L_x' + lambda L_u' + penalty of mixed rows [N, K], the first labelled_rows of them labelled.

    The primed losses are those of the auxiliary head with the prior shift. Without unlabelled rows their losses are 0.
    loss: L_x, another than cross-entropy if asked.
    """
    shifted, cut = balanced(auxiliary, class_counts), labelled_rows
    parts = [loss(standard[:cut], targets[:cut], class_counts)]
    parts.append(soft_cross_entropy(shifted[:cut], targets[:cut]))
    if cut < len(targets):
        parts += [squared_error(logits[cut:], targets[cut:]) for logits in (standard, shifted)]
    else:
        parts += [standard.new_zeros(())] * 2
    labelled, balanced_labelled, unlabelled, balanced_unlabelled = parts
    total = labelled + weight * unlabelled + balanced_labelled + weight * balanced_unlabelled
    total = total + prior_penalty(standard)
    return SemiLoss(
        total, *(p.detach() for p in (labelled, unlabelled, balanced_labelled, balanced_unlabelled))
    )


def mixmatch_loss(
    network: nn.Module,
    peer: nn.Module,
    labelled: tuple[tuple[Tensor, ...], Tensor, Tensor],
    unlabelled: tuple[Tensor, ...] | None,
    *,
    class_counts: Tensor,
    weight: float,
    mix_weight: float,
    permutation: Tensor,
    temperature: float,
    forward_unlabelled: bool = True,
    loss: Callable[..., Tensor] = cross_entropy,
    parallel: nn.Module | None = None,
) -> SemiLoss:
    """One step's loss (Sec. 4, steps 2 to 6): guess, refine, mix, forward.

    labelled: (two views [B, ...], observed labels [B], clean probabilities [B]); unlabelled: two views, or None where
    every sample is confident. class_counts [K]: confident samples per observed class. weight: lambda of the unlabelled
    terms. mix_weight: the Beta draw l, used as max(l, 1 - l). permutation: of all stacked rows, the mixing partners; of the
    global batch under torchrun. forward_unlabelled=False is WebVision's form: unlabelled rows are mixing partners only.
    loss: of the standard head. parallel: the network around which gradients are averaged, under torchrun.
    """
    views, labels, clean = labelled
    inputs, targets = list(views), []
    if unlabelled is not None:
        guessed = guess_labels(network, peer, unlabelled, temperature)
        inputs += list(unlabelled)
        targets = [guessed] * len(unlabelled)
    targets = [refine_labels(network, views, labels, clean, temperature)] * len(views) + targets
    inputs, targets = (
        torch.cat([processes.gather_rows(part) for part in parts]) for parts in (inputs, targets)
    )
    labelled_rows = processes.world() * len(labels) * len(views)
    rows = len(inputs) if forward_unlabelled else labelled_rows
    share, partner = max(mix_weight, 1 - mix_weight), permutation[:rows]
    mixed_inputs = share * inputs[:rows] + (1 - share) * inputs[partner]
    mixed_targets = share * targets[:rows] + (1 - share) * targets[partner]
    _, *logits = (network if parallel is None else parallel)(processes.piece(mixed_inputs))
    standard, auxiliary = (processes.gather_rows(own) for own in logits)
    return semi_loss(standard, auxiliary, mixed_targets, labelled_rows, class_counts, weight, loss)
