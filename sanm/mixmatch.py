"""One step of semi-supervised training (README, section 4): guess, refine, mask (AMG, NLR), mix, LNL loss and SMR.

Networks map images to `networks.Outputs`. Under torchrun a step sees this process's piece of both global batches, and every
process computes the same loss of all their rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu import processes
from sanm.losses import prior_penalty, reconstruction_error, soft_cross_entropy, squared_error
from sanm.masking import Masked


class Samples(NamedTuple):
    """A batch of one side of the split."""

    trained: tuple[Tensor, ...]  # the views that are mixed and trained on, [B, C, H, W] each
    reference: tuple[Tensor, ...]  # the two views that targets, maps and masked images come from
    clean: Tensor  # [B] clean probabilities by the peer's losses


class Guess(NamedTuple):
    """What the reference views give."""

    targets: Tensor  # [B, K] sharpened
    maps: Tensor  # [B, D, h, w] of the first view


class Loss(NamedTuple):
    """The total that is back-propagated, and its parts (detached)."""

    total: Tensor
    labelled: Tensor
    unlabelled: Tensor
    prior: Tensor
    reconstruction: Tensor


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), rows renormalised. [N, K]; T = 1 leaves the rows as they are. ValueError: T <= 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # in log space: p^(1/T) underflows in float32 where T is small
    return torch.softmax(probabilities.clamp_min(1e-30).log() / temperature, dim=1)


@torch.no_grad()
def guess_labels(network: nn.Module, peer: nn.Module, views: Sequence[Tensor], temperature: float) -> Guess:
    """Co-guessed targets [B, K] of unlabelled samples: the mean prediction of both networks on both views, sharpened.

    network is in train mode, so each view is a batch of its own for its batch norms. peer is in evaluation mode, where
    joining the views changes nothing.
    """
    outputs = [network(view) for view in views]
    own = [F.softmax(out.scores, dim=1) for out in outputs]
    other = F.softmax(peer(torch.cat(list(views))).scores, dim=1).chunk(len(views))
    predictions = [*own, *other]
    mean: Tensor = sum(predictions) / len(predictions)
    return Guess(sharpen(mean, temperature), outputs[0].maps)


@torch.no_grad()
def refine_labels(
    network: nn.Module, views: Sequence[Tensor], labels: Tensor, clean: Tensor, temperature: float
) -> Guess:
    """Targets [B, K] of labelled samples: w onehot(observed) + (1 - w) own mean prediction, sharpened.

    labels int [B]; clean: clean probabilities w [B].
    """
    outputs = [network(view) for view in views]
    predictions = [F.softmax(out.scores, dim=1) for out in outputs]
    mean: Tensor = sum(predictions) / len(predictions)
    observed = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
    weight = clean.to(mean.dtype)[:, None]
    return Guess(sharpen(weight * observed + (1 - weight) * mean, temperature), outputs[0].maps)


def mix(rows: Tensor, lam: float, permutation: Tensor) -> Tensor:
    """Each row mixed with its partner: l row + (1 - l) partner, l = max(lam, 1 - lam). [N, ...].

    permutation: the partners, int [N]; a shorter one [n] mixes the first n rows alone.
    """
    lam = max(lam, 1 - lam)
    return lam * rows[: len(permutation)] + (1 - lam) * rows[permutation]


def stack(
    labelled: Samples, unlabelled: Samples, targets: Tensor, masked: Masked | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Images and targets of the LNL loss (Eq. 8), a part for each version of the labelled, then of the unlabelled samples.

    The versions are the views, with refined or guessed targets, and the masked copies with modulated targets.
    targets [Bx + Bu, K]; masked: of both sides' first reference views together, or None for training without masks.
    """
    sizes = [len(labelled.clean), len(unlabelled.clean)]
    inputs, rows = [], []
    for side, samples in enumerate((labelled, unlabelled)):
        inputs += samples.trained
        rows += [targets.split(sizes)[side]] * len(samples.trained)
        if masked is not None:
            at_max, at_min, targets_max, targets_min = (part.split(sizes)[side] for part in masked)
            inputs += [at_max, at_min]
            rows += [targets_max, targets_min]
    return inputs, rows


def semi_loss(
    scores: Tensor,
    targets: Tensor,
    labelled_rows: int,
    weight: float,
    reconstruction: Tensor,
    reconstruction_weight: float,
) -> Loss:
    """L = L_x + lambda L_u + L_prior + gamma L_rec of mixed rows [N, K], of which the first labelled_rows are labelled.

    The first three are the LNL loss (Eq. 8), the last is SMR's (Eq. 10). weight: lambda. reconstruction: L_rec.
    reconstruction_weight: gamma.
    """
    x, u = slice(labelled_rows), slice(labelled_rows, None)
    l_x = soft_cross_entropy(scores[x], targets[x])
    l_u = squared_error(scores[u], targets[u])
    l_prior = prior_penalty(scores)
    total = l_x + weight * l_u + l_prior + reconstruction_weight * reconstruction
    return Loss(total, *(part.detach() for part in (l_x, l_u, l_prior, reconstruction)))


def step_loss(
    network: nn.Module,
    peer: nn.Module,
    labelled: Samples,
    unlabelled: Samples,
    labels: Tensor,
    *,
    masks: Callable[..., Masked] | None,
    weight: float,
    reconstruction_weight: float,
    draw_lam: Callable[[], float],
    draw_permutation: Callable[[int], Tensor],
    temperature: float,
    forward_unlabelled: bool = True,
    parallel: nn.Module | None = None,
) -> Loss:
    """The loss of one step (README, section 4).

    labels: observed, of the labelled samples, int [B]. masks: `training.Masks`; None trains without masks and reconstruction.
    weight: lambda of the unlabelled loss. draw_lam, draw_permutation: the Beta draw and the partners of all stacked rows, of
    the global batch under torchrun; both after the masks' draws. forward_unlabelled=False is Clothing1M's form: unlabelled
    rows are partners only. parallel: the network around which gradients are averaged, under torchrun.
    """
    guessed = guess_labels(network, peer, unlabelled.reference, temperature)
    refined = refine_labels(network, labelled.reference, labels, labelled.clean, temperature)
    targets = torch.cat([refined.targets, guessed.targets])
    images = torch.cat([labelled.reference[0], unlabelled.reference[0]])
    masked = copies = None
    if masks is not None:
        maps, clean = torch.cat([refined.maps, guessed.maps]), torch.cat([labelled.clean, unlabelled.clean])
        masked = masks(images, maps, clean, targets, (len(labelled.clean), len(unlabelled.clean)))
        copies = torch.cat([masked.at_max, masked.at_min])
    input_parts, target_parts = stack(labelled, unlabelled, targets, masked)
    sizes = [len(part) for part in target_parts]
    inputs, targets = processes.gather_parts(input_parts), processes.gather_parts(target_parts)
    lam, permutation = draw_lam(), draw_permutation(len(targets))
    versions = len(sizes) // 2
    labelled_rows = processes.world() * sum(sizes[:versions])
    if not forward_unlabelled:
        permutation, sizes = permutation[:labelled_rows], sizes[:versions]
    inputs, targets = mix(inputs, lam, permutation), mix(targets, lam, permutation)
    out = (parallel or network)(processes.piece_parts(inputs, sizes), copies)
    scores = processes.gather_parts(out.scores.split(sizes))
    l_rec = scores.new_zeros(())
    if masked is not None:
        l_rec = processes.mean_loss(reconstruction_error(out.reconstruction, images))
    return semi_loss(scores, targets, labelled_rows, weight, l_rec, reconstruction_weight)
