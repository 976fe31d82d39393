"""One step of semi-supervised training (README, section 4): guess, refine, mix, MixMatch's loss with a balanced copy.

Networks map images to (features, standard logits, balanced logits). Pseudo-labels come from the standard head alone. Under
torchrun a step sees this process's piece of both global batches, and every process computes the same loss of all their rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu import processes
from sfa.losses import balanced, cross_entropy, prior_penalty, soft_cross_entropy, squared_error


class Loss(NamedTuple):
    """The total that is back-propagated, and its parts (detached)."""

    total: Tensor
    labelled: Tensor
    unlabelled: Tensor
    balanced_labelled: Tensor
    balanced_unlabelled: Tensor


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), rows renormalised. [N, K]; T = 1 leaves the rows as they are. ValueError: T <= 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # in log space: p^(1/T) underflows in float32 where T is small
    return torch.softmax(probabilities.clamp_min(1e-30).log() / temperature, dim=1)


@torch.no_grad()
def guess_labels(network: nn.Module, peer: nn.Module, views: Sequence[Tensor], temperature: float) -> Tensor:
    """Co-guessed targets [B, K] of unlabelled samples: the mean prediction of both networks on both views, sharpened.

    network is in train mode, so each view is a batch of its own for its batch norms. peer is in evaluation mode, where
    joining the views changes nothing.
    """
    own = [F.softmax(network(view)[1], dim=1) for view in views]
    other = F.softmax(peer(torch.cat(list(views)))[1], dim=1).chunk(len(views))
    predictions = [*own, *other]
    mean: Tensor = sum(predictions) / len(predictions)
    return sharpen(mean, temperature)


@torch.no_grad()
def refine_labels(
    network: nn.Module, views: Sequence[Tensor], labels: Tensor, clean: Tensor, temperature: float
) -> Tensor:
    """Targets [B, K] of labelled samples: w onehot(observed) + (1 - w) own mean prediction, sharpened.

    labels int [B]; clean: clean probabilities w [B].
    """
    predictions = [F.softmax(network(view)[1], dim=1) for view in views]
    mean: Tensor = sum(predictions) / len(predictions)
    observed = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
    weight = clean.to(mean.dtype)[:, None]
    return sharpen(weight * observed + (1 - weight) * mean, temperature)


def mix(rows: Tensor, lam: float, permutation: Tensor) -> Tensor:
    """Each row mixed with its partner: l row + (1 - l) partner, l = max(lam, 1 - lam). [N, ...].

    permutation: the partners, int [N]; a shorter one [n] mixes the first n rows alone.
    """
    lam = max(lam, 1 - lam)
    return lam * rows[: len(permutation)] + (1 - lam) * rows[permutation]


def gather_logits(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Standard and auxiliary logits [world B, K] of the images of all processes, of which [B, ...] are this one's."""
    _, standard, auxiliary = network(images)
    return processes.gather_rows(standard), processes.gather_rows(auxiliary)


def semi_loss(
    standard: Tensor,
    auxiliary: Tensor,
    targets: Tensor,
    labelled_rows: int,
    class_counts: Tensor,
    weight: float,
    loss: Callable[..., Tensor] = cross_entropy,
) -> Loss:
    """L = L_x + lambda L_u + L_x' + lambda L_u' + L_prior of mixed rows [N, K], of which the first labelled_rows are labelled.

    The primed losses are those of the auxiliary head with the prior shift. weight: lambda. loss: L_x of the standard head.
    """
    x, u = slice(labelled_rows), slice(labelled_rows, None)
    shifted = balanced(auxiliary, class_counts)
    l_x = loss(standard[x], targets[x], class_counts)
    l_u = squared_error(standard[u], targets[u])
    l_x_balanced = soft_cross_entropy(shifted[x], targets[x])
    l_u_balanced = squared_error(shifted[u], targets[u])
    total = l_x + weight * l_u + l_x_balanced + weight * l_u_balanced + prior_penalty(standard)
    return Loss(total, *(part.detach() for part in (l_x, l_u, l_x_balanced, l_u_balanced)))


def step_loss(
    network: nn.Module,
    peer: nn.Module,
    labelled: tuple[Sequence[Tensor], Tensor, Tensor],
    unlabelled: Sequence[Tensor] | None,
    *,
    class_counts: Tensor,
    weight: float,
    lam: float,
    permutation: Tensor,
    temperature: float,
    forward_unlabelled: bool = True,
    loss: Callable[..., Tensor] = cross_entropy,
    parallel: nn.Module | None = None,
) -> Loss:
    """The loss of one step (README, section 4, steps 2 to 6).

    labelled: (two views [B, ...], observed labels [B], clean probabilities [B]). unlabelled: two views, or None if all
    samples are labelled. class_counts [K]: labelled samples per observed class. weight: lambda of the unlabelled losses.
    lam: the Beta draw. permutation: the partners of all stacked rows, of the global batch under torchrun.
    forward_unlabelled=False is WebVision's form: unlabelled rows are partners only. loss: of the standard head.
    parallel: the network around which gradients are averaged, under torchrun.
    """
    views, labels, clean = labelled
    input_parts, target_parts = list(views), []
    if unlabelled is not None:
        input_parts += unlabelled
        target_parts = [guess_labels(network, peer, unlabelled, temperature)] * len(unlabelled)
    target_parts = [refine_labels(network, views, labels, clean, temperature)] * len(views) + target_parts
    inputs, targets = processes.gather_parts(input_parts), processes.gather_parts(target_parts)
    labelled_rows = processes.world() * len(views) * len(labels)
    if not forward_unlabelled:
        permutation = permutation[:labelled_rows]
    inputs, targets = mix(inputs, lam, permutation), mix(targets, lam, permutation)
    standard, auxiliary = gather_logits(parallel or network, processes.piece(inputs))
    return semi_loss(standard, auxiliary, targets, labelled_rows, class_counts, weight, loss)
