"""One epoch of attentive feature mixup, the test, and the attention of each sample (README, sections 4 to 8).

Batches are (views, index): a tuple of one [B, C, H, W] tensor, and the samples' positions in their split, int [B]. Under
torchrun they are this process's piece of the global batch; groups and losses are those of the global batch everywhere.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from afm.data import Data
from afm.grouping import random_groups
from afm.mixing import mixed_features, mixed_loss, target_weights, total_loss
from afm.networks import AttentiveFeatureMixup
from common.gpu import device as gpu
from common.gpu import processes
from common.gpu.device import Device
from common.runs.label_quality import Estimate
from common.runs.run import Run

# from the number of rows N of a global batch: its groups [M, K], and their mixing weights [M, K] or None: the attention's
Grouping = Callable[[int], tuple[Tensor, Tensor | None]]


class Epoch(NamedTuple):
    """Means over the steps of an epoch, and the mixing weight of every group member."""

    loss: float | None  # of the total loss
    mixed_loss: float | None
    plain_loss: float | None
    accuracy: float | None  # percent of plain predictions equal to the observed label
    members: Tensor  # int [M, K]: positions in the training set of the members of all groups
    weights: Tensor  # [M, K]
    dead: float | None = None  # share of attention scores z <= 0; None if there is no score


class Evaluation(NamedTuple):
    """Top-1 accuracy in percent and mean cross-entropy of a split."""

    accuracy: float
    loss: float  # mean over samples
    loss_batchmean: float  # mean over batches of the batch mean, as the release prints it
    mixed_accuracy: float  # of the classifier of mixtures; the same where it is shared


def train_epoch(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    grouping: Grouping,
    *,
    loss_weights: tuple[float, float],
    target: str = "soft",
    detach_target: bool = False,
    device: Device,
) -> Epoch:
    """One pass over the training batches (README, section 4). labels: observed, int [N] on the device.

    loss_weights: W_mix and W_plain. target, detach_target: see `target_weights`. The training accuracy is that of the plain
    logits.
    """
    network.train()
    losses, hits, members, mixing_weights, dead = [], [], [], [], []
    for (images,), piece in batches:
        index = processes.gather_rows(piece)
        given = labels[index]
        groups, weights = _groups(grouping, index)
        with device.autocast(network):
            outputs = network(images, groups, weights)
        label_weights = target_weights(outputs.weights, target, detach_target)
        mixed = mixed_loss(outputs.mixed, given[groups], label_weights)
        plain = F.cross_entropy(outputs.plain, given)
        loss = total_loss(mixed, plain, *loss_weights)
        _step(optimizer, loss)
        losses.append(torch.stack([loss, mixed, plain]).detach())
        hits.append((outputs.plain.argmax(dim=1) == given).float().mean())
        members.append(index[groups])
        mixing_weights.append(outputs.weights.detach())
        if outputs.scores is not None:
            dead.append(outputs.scores <= 0)
    total, of_mixtures, of_plain = torch.stack(losses).mean(dim=0).tolist()
    accuracy = 100 * float(torch.stack(hits).mean())
    weights = torch.cat(mixing_weights)
    return Epoch(total, of_mixtures, of_plain, accuracy, torch.cat(members), weights, _share(dead))


def train_epoch_mixing_inputs(
    network: nn.Module,
    optimizer: Optimizer,
    batches: Iterable,
    labels: Tensor,
    grouping: Grouping,
    *,
    weight: float,
    device: Device,
) -> Epoch:
    """One pass of mixup (Zhang et al. 2018), the comparison that mixes images instead of features; in one process.

    It classifies mixtures alone, so there is neither a plain loss nor a training accuracy. weight: of the loss.
    """
    network.train()
    losses = []
    for (images,), index in batches:
        groups, weights = _groups(grouping, index)
        with device.autocast(network):
            logits = network(mixed_features(images[groups], weights))
        loss = mixed_loss(logits, labels[index][groups], weights)
        _step(optimizer, weight * loss)
        losses.append(loss.detach())
    mean = float(torch.stack(losses).mean())
    return Epoch(weight * mean, mean, None, None, labels.new_empty(0, 2), logits.new_empty(0, 2).float())


def _groups(grouping: Grouping, index: Tensor) -> tuple[Tensor, Tensor | None]:
    groups, weights = grouping(len(index))
    return groups.to(index.device), None if weights is None else weights.to(index.device)


def _share(flags: list[Tensor]) -> float | None:
    joined = torch.cat([part.flatten() for part in flags]) if flags else torch.empty(0)
    return float(joined.float().mean()) if len(joined) else None


def _step(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def evaluate(network: AttentiveFeatureMixup, batches: Iterable, labels: Tensor, device: Device) -> Evaluation:
    """The test (README, section 8): one forward in eval mode, plain features through the plain classifier."""
    network.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=gpu.home(labels.device))
    for (images,), index in batches:
        with device.autocast():
            features = network.features(images)
        logits, given = network.classifier(features), labels[index]
        mixed_hits = (network.mixed_classifier(features).argmax(dim=1) == given).sum()
        loss = gpu.wide(F.cross_entropy(logits, given))
        sums_of_batch = [
            len(index),
            (logits.argmax(dim=1) == given).sum(),
            loss * len(index),
            1,
            loss,
            mixed_hits,
        ]
        sums += torch.stack([torch.as_tensor(value, device=sums.device).double() for value in sums_of_batch])
    samples, hits, loss, steps, batch_means, mixed_hits = processes.total(sums).tolist()
    return Evaluation(100 * hits / samples, loss / samples, batch_means / steps, 100 * mixed_hits / samples)


# the attention of each sample ------------------------------------------------------------------------------------------


def mean_weights(members: Tensor, weights: Tensor, size: int) -> Tensor:
    """The mean mixing weight of each of `size` samples over the groups [M, K] it is in: [size]; NaN where it is in none."""
    members, weights = members.flatten(), weights.flatten()
    sums = torch.zeros(size, device=weights.device).index_add_(0, members, weights)
    counts = torch.zeros(size, device=weights.device).index_add_(0, members, torch.ones_like(weights))
    return sums / counts


def mean_peak(weights: Tensor) -> float | None:
    """The mean over groups of the largest weight: 1 / K if all weights are equal, 1 if one member takes all."""
    return float(weights.amax(dim=1).mean()) if len(weights) else None


def attention_statistics(weights: Tensor, known: Tensor) -> dict[str, float | None]:
    """Mean weight of right and of wrong labels, and the AUC of the weight as a detector of right ones (README, section 7).

    weights: [N] of samples, NaN for no weight. known: int [N], 1 for a right label, 0 for a wrong one, -1 for unknown.
    A value is None if it has no sample.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415  (a second of import)

    weighted = ~weights.isnan()
    right, wrong = (weights[weighted & (known == truth)] for truth in (1, 0))
    statistics = dict.fromkeys(("attention_auc", "attention_right", "attention_wrong"))
    if len(right):
        statistics["attention_right"] = float(right.mean())
    if len(wrong):
        statistics["attention_wrong"] = float(wrong.mean())
    if len(right) and len(wrong):
        truth = torch.cat([torch.ones_like(right), torch.zeros_like(wrong)])
        statistics["attention_auc"] = float(
            roc_auc_score(truth.cpu().numpy(), torch.cat([right, wrong]).cpu().numpy())
        )
    return statistics


@torch.no_grad()
def pooled_features(network: AttentiveFeatureMixup, batches: Iterable, size: int, device: Device) -> Tensor:
    """Pooled features [size, D] of batches that hold each position 0 .. size - 1 once, in eval mode, in every process."""
    network.eval()
    features = torch.zeros(size, network.classifier.in_features, device=device.device)
    for (images,), index in batches:
        with device.autocast():
            features[index] = network.features(images)
    return processes.total(features)


@torch.no_grad()
def attention_of_samples(
    network: AttentiveFeatureMixup, features: Tensor, rounds: int, generator: torch.Generator
) -> Tensor:
    """Each sample's mixing weight [N], its mean over `rounds` random groups (README, section 7)."""
    members, weights = [], []
    group_size = len(network.attention.projections)
    for _ in range(rounds):
        groups = random_groups(len(features), group_size, generator).to(features.device)
        members.append(groups)
        weights.append(torch.cat([network.attention(features[part]) for part in groups.split(1024)]))
    return mean_weights(torch.cat(members), torch.cat(weights), len(features))


@torch.no_grad()
def weights_beside(
    network: AttentiveFeatureMixup, features: Tensor, pool: Tensor, partners: Tensor
) -> Tensor:
    """Each row's mixing weight [B], its mean over groups with the same partners for all rows.

    features [B, D]; partners: int [rounds, K - 1], rows of pool [S, D]. The rows stand at each position of the group in turn.
    """
    weights = torch.zeros(len(features), device=features.device)
    for number, own in enumerate(partners):
        others = pool[own].expand(len(features), -1, -1)
        place = number % (len(own) + 1)
        members = torch.cat([others[:, :place], features[:, None], others[:, place:]], dim=1)
        weights += network.attention(members)[:, place]
    return weights / len(partners)


@torch.no_grad()
def estimate_label_quality(network: AttentiveFeatureMixup, data: Data, rounds: int, run: Run) -> Estimate:
    """The rank of each training image's mean attention weight, scaled to [0, 1], and the class probabilities.

    Without attention the score is the probability of the given label. Of data sets with more images than are sampled for
    attention.npz, all are compared with the same random images of that sample.
    """
    device, generator = run.device, run.device.generator(run.args.seed)
    sampled = run.progress(data.sampled_batches, "label quality", training=False)
    pool = pooled_features(network, sampled, len(data.sampled), device)
    weights = None
    if len(pool) == len(data.observed):
        logits = network.classifier(pool)
        if network.attention is not None:
            weights = attention_of_samples(network, pool, rounds, generator)
    else:
        logits = torch.zeros(len(data.observed), data.num_classes, device=device.device)
        if network.attention is not None:
            weights = torch.zeros(len(logits), device=device.device)
            shape = (rounds, len(network.attention.projections) - 1)
            partners = torch.randint(len(pool), shape, generator=generator, device=generator.device)
            partners = partners.to(device.device)
        for (images,), index in run.progress(data.plain, "label quality", training=False):
            with device.autocast():
                features = network.features(images)
            logits[index] = network.classifier(features).float()
            if weights is not None:
                weights[index] = weights_beside(network, features.float(), pool, partners)
        logits = processes.total(logits)
        weights = None if weights is None else processes.total(weights)
    probabilities = F.softmax(logits, dim=1)
    return Estimate(probabilities, None if weights is None else scaled_ranks(weights))


def scaled_ranks(values: Tensor) -> Tensor:
    """Ranks scaled to [0, 1], float64 [N] on the CPU: 0 for the smallest, the mean rank for equal ones, NaN for NaN."""
    from scipy.stats import rankdata  # noqa: PLC0415  (half a second of import)

    ranks = rankdata(values.cpu().numpy(), nan_policy="omit")
    return torch.from_numpy((ranks - 1) / max(len(values) - 1, 1))


@torch.no_grad()
def pair_weights(network: AttentiveFeatureMixup, features: Tensor) -> Tensor:
    """Both members' weights for every ordered pair of T samples: [T, D] -> [T, T, 2] (the release's vis.py)."""
    count = len(features)
    pairs = torch.cartesian_prod(*[torch.arange(count, device=features.device)] * 2)
    weights = [network.attention(features[part]) for part in pairs.split(4096)]
    return torch.cat(weights).view(count, count, 2)
