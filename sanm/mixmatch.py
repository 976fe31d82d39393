"""One training step (README, sections 4 and 9): guess, refine, mask (AMG, NLR), reconstruct (SMR), mix, LNL loss.

Networks map images to `networks.Outputs`. Under torchrun a step sees this process's piece of both global batches; partners of the
mixture come from all rows of the global batch, and every process computes the same losses of all of them.
"""

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
    reference: tuple[Tensor, Tensor]  # the views that targets, maps and masked images come from
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
def guess_labels(
    network: nn.Module, peer: nn.Module, views: tuple[Tensor, Tensor], temperature: float
) -> Guess:
    """Unlabelled samples: the mean prediction of both networks on both views, sharpened.

    network is in train mode, so each view is a batch of its own for its batch norms; peer is in evaluation mode, where joining
    the views changes nothing.
    """
    own = [network(view) for view in views]
    other = F.softmax(peer(torch.cat(views)).scores, dim=1).chunk(len(views))
    predictions = [*(F.softmax(out.scores, dim=1) for out in own), *other]
    return Guess(sharpen(sum(predictions) / len(predictions), temperature), own[0].maps)


@torch.no_grad()
def refine_labels(
    network: nn.Module, views: tuple[Tensor, Tensor], labels: Tensor, clean: Tensor, temperature: float
) -> Guess:
    """Labelled samples: w onehot(observed) + (1 - w) own mean prediction, sharpened. labels int [B], clean w [B]."""
    own = [network(view) for view in views]
    mean = sum(F.softmax(out.scores, dim=1) for out in own) / len(own)
    observed = F.one_hot(labels, mean.shape[1]).to(mean.dtype)
    weight = clean.to(mean.dtype)[:, None]
    return Guess(sharpen(weight * observed + (1 - weight) * mean, temperature), own[0].maps)


class Stack(NamedTuple):
    """All versions of the labelled and of the unlabelled images that a step trains on, this process's pieces."""

    inputs: tuple[Tensor, Tensor]  # [versions, B, C, H, W] of either side
    targets: tuple[Tensor, Tensor]  # [versions, B, K]


def stack(labelled: Samples, unlabelled: Samples, targets: Tensor, masked: Masked | None) -> Stack:
    """The rows of the LNL loss (Eq. 8): views with refined or guessed targets, then masked copies with modulated targets.

    targets [Bx + Bu, K]; masked: of both sides' first reference views together, or None for training without masks.
    """
    sizes = [len(labelled.clean), len(unlabelled.clean)]
    inputs, labels = [], []
    for side, (samples, plain) in enumerate(zip((labelled, unlabelled), targets.split(sizes), strict=True)):
        images, given = list(samples.trained), [plain] * len(samples.trained)
        if masked is not None:
            images += [masked.at_max.split(sizes)[side], masked.at_min.split(sizes)[side]]
            given += [masked.targets_max.split(sizes)[side], masked.targets_min.split(sizes)[side]]
        inputs.append(torch.stack(images))
        labels.append(torch.stack(given))
    return Stack(tuple(inputs), tuple(labels))


def rows_of_all(versions: Tensor) -> Tensor:
    """[versions, B, ...] of this process as [versions, B of the global batch, ...]."""
    return processes.gather_rows(versions.transpose(0, 1)).transpose(0, 1)


def own_rows(versions: Tensor) -> Tensor:
    """The numbers in the global batch of this process's rows: int [versions, B] for [versions, B, ...]."""
    count, size = versions.shape[:2]
    numbers = torch.arange(count * size * processes.world(), device=versions.device).view(count, -1)
    return numbers[:, processes.rank() * size : (processes.rank() + 1) * size]


class Mixture(NamedTuple):
    """The mixed batch."""

    inputs: Tensor  # [N, C, H, W] this process's rows
    targets: tuple[Tensor, Tensor]  # of all processes' labelled and unlabelled rows
    shapes: tuple[tuple[int, int], tuple[int, int]]  # versions and samples of either side, this process's


def mix(versions: Stack, share: float, permutation: Tensor, forward_unlabelled: bool = True) -> Mixture:
    """Each row mixed with a partner: l row + (1 - l) partner, l = max(share, 1 - share) for the whole batch.

    permutation: the partners, over all rows of the global batch. forward_unlabelled False: unlabelled rows are partners only.
    """
    share = max(share, 1 - share)
    sides = [rows_of_all(side) for side in versions.inputs]
    rows = torch.cat([side.flatten(0, 1) for side in sides])
    targets = torch.cat([rows_of_all(side).flatten(0, 1) for side in versions.targets])
    labelled = sides[0].shape[0] * sides[0].shape[1]
    own = [own_rows(versions.inputs[0]).flatten()]
    if forward_unlabelled:
        own.append(labelled + own_rows(versions.inputs[1]).flatten())
    own = torch.cat(own)
    mixed_targets = share * targets + (1 - share) * targets[permutation]
    inputs = share * rows[own] + (1 - share) * rows[permutation[own]]
    shapes = tuple(side.shape[:2] for side in versions.inputs)
    return Mixture(inputs, (mixed_targets[:labelled], mixed_targets[labelled:]), shapes)


def gathered_scores(scores: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scores [versions B, K] of this process's rows as those of the global batch, in its order."""
    return rows_of_all(scores.view(*shape, -1)).flatten(0, 1)


def step_loss(
    train: nn.Module,
    mixture: Mixture,
    unmasked: Tensor,
    masked: Masked | None,
    *,
    weight: float,
    reconstruction_weight: float,
    forward_unlabelled: bool = True,
) -> Loss:
    """The LNL loss of a mixed batch (Eq. 8), L_x + weight L_u + L_prior, plus reconstruction_weight L_rec (SMR, Eq. 10).

    train: the network, under torchrun the one that averages gradients. unmasked [B, C, H, W]: what the masked copies are to
    be reconstructed to. Without masks there is no reconstruction.
    """
    copies = None if masked is None else torch.cat([masked.at_max, masked.at_min])
    out = train(mixture.inputs, copies)
    labelled_rows = mixture.shapes[0][0] * mixture.shapes[0][1]
    scores_x = gathered_scores(out.scores[:labelled_rows], mixture.shapes[0])
    loss_x = soft_cross_entropy(scores_x, mixture.targets[0])
    loss_u = rec = scores_x.new_zeros(())
    scores = scores_x
    if forward_unlabelled:
        scores_u = gathered_scores(out.scores[labelled_rows:], mixture.shapes[1])
        loss_u = squared_error(scores_u, mixture.targets[1])
        scores = torch.cat([scores_x, scores_u])
    prior = prior_penalty(scores)
    if masked is not None:
        rec = reconstruction_error(out.reconstruction, unmasked)
        # of all processes' images in value, of this process's in gradient: those are averaged
        rec = rec + (processes.total(rec) / processes.world() - rec).detach()
    total = loss_x + weight * loss_u + prior + reconstruction_weight * rec
    parts = (total, loss_x, loss_u, prior, rec)
    return Loss(total, *(part.detach() for part in parts[1:]))
