"""Label noise and long-tailed subsets. Pure NumPy functions from labels to new labels, without input or output.

Given the same labels and seed, each function returns the labels of the authors' release, bit for bit. Each docstring says
which random numbers are drawn, and in which order. The global generators stay untouched. Noise from a posterior (margin1 to
margin3, hard) follows formulas; no release of it exists. "50 % symmetric" differs between papers, so each kind has its name:

name                  who uses it             a corrupted label becomes                        realised rate at rate r
symmetric             Me-Momentum             one of the other K-1 classes                     about r
symmetric_inclusive   DivideMix, SANM         one of all K classes, the true one included      about r (K-1)/K
asymmetric            DivideMix, SANM         its look-alike (CIFAR-10 map)                    about r/2 on CIFAR-10
superclass            C2D, SANM               another class of its superclass (CIFAR-100)      about r
pairflip              Me-Momentum             the next class                                   about r
oneflip               Me-Momentum             2, if it was 1                                   about r/K
instance              Me-Momentum (Xia 2020)  the class whose projection of the image is large about r
imb, sym              SFA                     long-tail aware; any other class                 int(r N)/N
sym, asym             Manifold DivideMix      of in-distribution images only; see below        about r (K-1)/K; about r
margin1, 2, 3         Zhang et al. 2021       the most likely wrong class of a posterior       r on average
hard                  this project            one of the other K-1 classes                     round(r N)/N

For Manifold DivideMix, `open_set` chooses the out-of-distribution (OOD) images and `in_distribution_noise` the noisy labels.

Rate 0 returns a copy of the labels. ValueError: a rate outside [0, 1] or NaN, an unknown name, labels of the wrong shape,
type or range.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import RandomState

# truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse (Patrini et al. 2017, as in DivideMix and SANM)
CIFAR10_LOOK_ALIKES = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}

# the superclass of each class of CIFAR-100, in the data set's own numbers (Krizhevsky 2009)
CIFAR100_SUPERCLASSES = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)

CLASS_CONDITIONAL = ("symmetric", "pairflip", "oneflip")
# probability of a flip at a margin m in [0, 1], up to a factor: PMD noise of types I, II and III (Zhang et al. 2021)
MARGIN_TYPES = {
    "margin1": lambda m: (1 - m**2) / 2,
    "margin2": lambda m: 1 - m**3,
    "margin3": lambda m: 1 - (m**3 + m**2 + m) / 3,
}
POSTERIOR_TYPES = (*MARGIN_TYPES, "hard")
NOISE_TYPES = (
    *CLASS_CONDITIONAL,
    *("symmetric_inclusive", "asymmetric", "superclass", "instance"),
    *POSTERIOR_TYPES,
)
POSTERIOR_TOLERANCE = 1e-3  # how far a row's sum may be from 1


class Realised(NamedTuple):
    """Realised noise of a label vector."""

    rate: float  # fraction of labels that differ from the clean ones
    matrix: np.ndarray  # [K, K] float64: fraction of class i with label j; rows of absent classes are 0


def realised(clean: np.ndarray, noisy: np.ndarray, num_classes: int) -> Realised:
    """The realised noise rate and transition matrix of noisy against clean labels (both int [N])."""
    clean, noisy = _checked_labels(clean, num_classes), _checked_labels(noisy, num_classes)
    if clean.shape != noisy.shape:
        raise ValueError(f"clean and noisy labels differ in length: {len(clean)} and {len(noisy)}")
    matrix = np.bincount(clean * num_classes + noisy, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    matrix = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return Realised(rate=float(np.mean(clean != noisy)) if len(clean) else 0.0, matrix=matrix)


def add_noise(
    noise_type: str,
    labels: np.ndarray,
    rate: float,
    num_classes: int,
    seed: int,
    images: np.ndarray | None = None,
    posterior: np.ndarray | None = None,
) -> np.ndarray:
    """Corrupt labels [N] by one of NOISE_TYPES.

    images (N of any shape, raw pixel values) are for "instance", posterior [N, K] for POSTERIOR_TYPES.
    """
    if noise_type in CLASS_CONDITIONAL:
        return class_conditional(noise_type, labels, rate, num_classes, seed)
    if noise_type == "symmetric_inclusive":
        return symmetric_inclusive(labels, rate, num_classes, seed)
    if noise_type == "asymmetric":
        return asymmetric(labels, rate, num_classes, seed)
    if noise_type == "superclass":
        return superclass(labels, rate, num_classes, seed)
    if noise_type == "instance":
        if images is None:
            raise ValueError("instance-dependent noise needs the images")
        return instance_dependent(images, labels, rate, num_classes, seed)
    if noise_type in POSTERIOR_TYPES:
        return from_posterior(noise_type, labels, rate, num_classes, seed, posterior)
    raise ValueError(f"unknown noise type {noise_type!r}: choose from {', '.join(NOISE_TYPES)}")


# Me-Momentum ----------------------------------------------------------------------------------------------------------


def transition_matrix(noise_type: str, rate: float, num_classes: int) -> np.ndarray:
    """T[i, j] = P(noisy = j | clean = i), float64 [K, K], of symmetric, pairflip or oneflip noise (Me-Momentum)."""
    _check_rate(rate)
    if noise_type == "symmetric":
        if num_classes < 2:
            raise ValueError(f"symmetric noise needs at least 2 classes, got {num_classes}")
        matrix = np.full((num_classes, num_classes), rate / (num_classes - 1))
        np.fill_diagonal(matrix, 1 - rate)
        return matrix
    matrix = np.eye(num_classes)
    if noise_type == "pairflip":
        matrix *= 1 - rate
        matrix[np.arange(num_classes), (np.arange(num_classes) + 1) % num_classes] += rate
    elif noise_type == "oneflip":
        if num_classes < 3:
            raise ValueError(
                f"oneflip noise turns class 1 into class 2 and needs 3 classes, got {num_classes}"
            )
        matrix[1, 1], matrix[1, 2] = 1 - rate, rate
    else:
        raise ValueError(f"unknown noise type {noise_type!r}: choose from {', '.join(CLASS_CONDITIONAL)}")
    return matrix


def class_conditional(
    noise_type: str, labels: np.ndarray, rate: float, num_classes: int, seed: int
) -> np.ndarray:
    """Noise by a transition matrix, drawn from RandomState(seed) (Me-Momentum's release)."""
    labels = _checked_labels(labels, num_classes)
    matrix = transition_matrix(noise_type, rate, num_classes)
    return labels.copy() if rate == 0 else by_matrix(labels, matrix, RandomState(seed))


def by_matrix(labels: np.ndarray, matrix: np.ndarray, rng: RandomState) -> np.ndarray:
    """Noisy labels drawn by a transition matrix [K, K]: one legacy multinomial draw per label [N], in order.

    A draw visits the classes in order, with one uniform each, and stops at the first hit.
    """
    num_classes = len(matrix)
    walks = [_legacy_walk(row) for row in matrix]
    uniforms, position = rng.random_sample(2 * len(labels) + num_classes), 0
    noisy = np.empty_like(labels)
    for i, label in enumerate(labels):
        classes, thresholds, hit_above = walks[label]
        if position + num_classes > len(uniforms):
            more = rng.random_sample(len(labels) + num_classes)
            uniforms, position = np.append(uniforms[position:], more), 0
        hits = (uniforms[position : position + len(thresholds)] > thresholds) == hit_above
        # the last class takes what no other took
        hit = int(hits.argmax()) if hits.any() else len(thresholds)
        noisy[i] = classes[hit]
        position += min(hit + 1, len(thresholds))
    return noisy


def _legacy_walk(row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the legacy multinomial(1, row) maps uniforms to a class: classes, thresholds, whether a hit lies above them.

    It draws a binomial(1, row[j] / remaining probability) by inversion for each class but the last. A class of probability 0
    takes no draw up to NumPy 2.4. From NumPy 2.5 on it takes one, and the same seed gives other labels.
    """
    thresholds, hit_above, left = [], [], 1.0
    classes = np.append(np.flatnonzero(row[:-1]), len(row) - 1)
    for probability in row[classes[:-1]].tolist():
        p = probability / left if left > 0 else 1.0  # no draw passes a certain hit
        thresholds.append(math.exp(math.log(1.0 - p if p <= 0.5 else 1.0 - (1.0 - p))))
        hit_above.append(p <= 0.5)
        left -= probability
    return classes, np.array(thresholds), np.array(hit_above)


def instance_dependent(
    images: np.ndarray, labels: np.ndarray, rate: float, num_classes: int, seed: int, std: float = 0.1
) -> np.ndarray:
    """Instance-dependent noise: images with a large projection on a class get its label (Xia et al. 2020; Me-Momentum).

    images: [N, ...] raw pixel values (0..255), flattened in storage order. Draws from RandomState(seed), in this order:
    N flip rates from a normal(rate, std) truncated to [0, 1], the projections W [K, F, K], N uniforms. The logits of a
    sample are its pixels times W[its class]; they are float32, as in the release.
    """
    _check_rate(rate)
    labels = _checked_labels(labels, num_classes)
    if len(images) != len(labels):
        raise ValueError(f"images and labels differ in length: {len(images)} and {len(labels)}")
    if not np.isfinite(images).all():
        raise ValueError("the images hold NaN or infinite pixels")
    if rate == 0 or len(labels) == 0:
        return labels.copy()
    from scipy.stats import truncnorm  # noqa: PLC0415  (half a second of import, of use only here)

    rng = RandomState(seed)
    flip_rate = truncnorm((0 - rate) / std, (1 - rate) / std, loc=rate, scale=std).rvs(
        len(labels), random_state=rng
    )
    pixels = np.asarray(images).reshape(len(labels), -1)
    projection = rng.randn(num_classes, pixels.shape[1], num_classes).astype(np.float32)
    probabilities = np.empty((len(labels), num_classes), dtype=np.float32)
    for k in range(num_classes):
        members = np.flatnonzero(labels == k)
        logits = pixels[members].astype(np.float32) @ projection[k]
        logits[:, k] = -np.inf
        probabilities[members] = _softmax(logits) * flip_rate[members, None].astype(np.float32)
        probabilities[members, k] = (1 - flip_rate[members]).astype(np.float32)
    cumulative = probabilities.astype(np.float64).cumsum(axis=1)
    cumulative /= cumulative[:, -1:]
    return (cumulative <= rng.random_sample(len(labels))[:, None]).sum(axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


# DivideMix and SANM ---------------------------------------------------------------------------------------------------


def symmetric_inclusive(labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """int(rate N) random samples get a class drawn from all K, so that 1 in K keeps its own (DivideMix, SANM).

    Draws from random.Random(seed): one shuffle of 0..N-1, whose head is corrupted, then a class per corrupted sample in
    ascending order.
    """
    labels = _checked_labels(labels, num_classes)
    rng = random.Random(seed)
    noisy = labels.copy()
    for i in _corrupted(len(labels), rate, rng):
        noisy[i] = rng.randint(0, num_classes - 1)
    return noisy


def asymmetric(
    labels: np.ndarray,
    rate: float,
    num_classes: int,
    seed: int,
    look_alikes: dict[int, int] = CIFAR10_LOOK_ALIKES,
) -> np.ndarray:
    """int(rate N) random samples take the look-alike of their class, if it has one (DivideMix, SANM on CIFAR-10)."""
    labels = _checked_labels(labels, num_classes)
    if max([*look_alikes, *look_alikes.values()]) >= num_classes:
        raise ValueError(f"the asymmetric map needs {max(look_alikes) + 1} classes, got {num_classes}")
    noisy = labels.copy()
    for i in _corrupted(len(labels), rate, random.Random(seed)):
        noisy[i] = look_alikes.get(int(labels[i]), labels[i])
    return noisy


def superclass(
    labels: np.ndarray,
    rate: float,
    num_classes: int,
    seed: int,
    superclasses: Sequence[int] = CIFAR100_SUPERCLASSES,
) -> np.ndarray:
    """int(rate N) random samples take another class of their superclass, each equally likely (C2D on CIFAR-100).

    superclasses: of each class. Draws from random.Random(seed): the shuffle of `asymmetric`, then one choice per corrupted
    sample in ascending order, from the other classes in their order. The release of SANM has no such noise.
    """
    labels = _checked_labels(labels, num_classes)
    if len(superclasses) != num_classes:
        raise ValueError(f"the superclasses are those of {len(superclasses)} classes, got {num_classes}")
    others = [
        [k for k, of in enumerate(superclasses) if of == own and k != c] for c, own in enumerate(superclasses)
    ]
    rng = random.Random(seed)
    noisy = labels.copy()
    for i in _corrupted(len(labels), rate, rng):
        noisy[i] = rng.choice(others[labels[i]] or [int(labels[i])])
    return noisy


def _corrupted(size: int, rate: float, rng: random.Random) -> np.ndarray:
    """The ascending positions of the int(rate N) samples to corrupt: the head of one standard-library shuffle."""
    _check_rate(rate)
    order = list(range(size))
    rng.shuffle(order)
    return np.sort(np.array(order[: int(rate * size)], dtype=np.int64))


# SFA ------------------------------------------------------------------------------------------------------------------


def class_counts(total: int, num_classes: int, imb_type: str, imb_factor: float) -> np.ndarray:
    """Samples to keep per class of a balanced set of `total` (SFA): int [K].

    exp: m rho^(c/(K-1)); step: m for the first half of the classes, m rho for the second; none: m. m = total / K,
    rho = imb_factor = smallest / largest, in (0, 1]. Truncated, not rounded.
    """
    if num_classes < 1 or total < 0:
        raise ValueError(f"total must be >= 0 and num_classes >= 1, got {total} and {num_classes}")
    if not 0 < imb_factor <= 1:
        raise ValueError(f"imb_factor must be in (0, 1], got {imb_factor}")
    largest, half = total / num_classes, num_classes // 2
    if imb_type == "exp":
        counts = [int(largest * imb_factor ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
    elif imb_type == "step":
        # the release lists 2 (K // 2) classes; an odd last one goes to the tail
        counts = [int(largest)] * half + [int(largest * imb_factor)] * (num_classes - half)
    elif imb_type == "none":
        counts = [int(largest)] * num_classes
    else:
        raise ValueError(f"unknown imb_type {imb_type!r}: choose from exp, step, none")
    return np.array(counts, dtype=np.int64)


def long_tailed(labels: np.ndarray, counts: np.ndarray, rng: RandomState) -> np.ndarray:
    """Positions to keep so that class c has counts[c] samples (or all it has), class after class (SFA).

    Draws from rng: one in-place shuffle of each class's ascending positions, in class order. The order of the result is
    the training order of the release: blocks of one class.
    """
    labels = _checked_labels(labels, len(counts))
    kept = []
    for c, count in enumerate(counts):
        positions = np.flatnonzero(labels == c)
        rng.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)


def long_tailed_noise(
    mode: str, labels: np.ndarray, num_classes: int, rate: float, python_rng: random.Random, rng: RandomState
) -> np.ndarray:
    """SFA's noise on the clean labels of a long-tailed set: exactly int(rate N) labels change.

    imb: the new class of a sample of class i is j != i with probability n_j / sum_{l != i} n_l, n = class counts.
    sym: every other class is equally likely. Draws: one shuffle of 0..N-1 from python_rng, whose head is corrupted; then
    per corrupted sample, ascending, one uniform from rng (imb) or one offset in 1..K-1 from python_rng (sym).
    """
    labels = _checked_labels(labels, num_classes)
    if mode not in ("imb", "sym"):
        raise ValueError(f"unknown noise_mode {mode!r}: choose from imb, sym")
    corrupted = _corrupted(len(labels), rate, python_rng)
    noisy = labels.copy()
    if len(corrupted) == 0:
        return noisy
    if len(np.unique(labels)) < 2:
        raise ValueError("label noise needs samples of at least 2 classes, got 1")
    if mode == "sym":
        offsets = [python_rng.randint(1, num_classes - 1) for _ in corrupted]
        noisy[corrupted] = (labels[corrupted] + offsets) % num_classes
        return noisy
    others = np.tile(np.bincount(labels, minlength=num_classes).astype(np.float64), (num_classes, 1))
    np.fill_diagonal(others, 0)
    cumulative = (others / others.sum(axis=1, keepdims=True)).cumsum(axis=1)
    cumulative /= cumulative[:, -1:]
    uniforms = rng.random_sample(len(corrupted))
    noisy[corrupted] = (cumulative[labels[corrupted]] <= uniforms[:, None]).sum(axis=1)
    return noisy


def web_class_budget(raw_counts: np.ndarray, imb_type: str, imb_factor: float) -> np.ndarray:
    """Images to keep per class when mini-WebVision is made long-tailed (SFA): int [K].

    The curve of `class_counts` starts at the largest class; the class of rank r by raw count keeps min(curve[r], raw).
    """
    raw_counts = np.asarray(raw_counts)
    curve = class_counts(int(raw_counts.max()) * len(raw_counts), len(raw_counts), imb_type, imb_factor)
    ranked = np.argsort(raw_counts)[::-1]  # ties: the reverse of NumPy's ascending order, as in the release
    budget = raw_counts.copy()
    budget[ranked] = np.minimum(curve, raw_counts[ranked])
    return budget


# Manifold DivideMix ---------------------------------------------------------------------------------------------------

OPEN_SET_SEED = 2718  # round(1000 e): the images and positions of the DSOS, SNCF and PLS benchmark
BLOCK = 5  # consecutive classes of CIFAR-100 among which the release's asymmetric noise moves


class OpenSet(NamedTuple):
    """Which training images are replaced by OOD images, and by which."""

    positions: np.ndarray  # int64 [M], ascending
    source: np.ndarray  # int64 [M]: the row of the pool for each position


def open_set(size: int, ood_ratio: float, pool_size: int, rng: RandomState) -> OpenSet:
    """The out-of-distribution part of a training set of `size` images (DSOS, SNCF; Manifold DivideMix).

    Draws from rng: a uniform per image, and the image is replaced if it is below ood_ratio; a permutation of the pool, whose
    head goes to the ascending positions. Nothing is drawn at ratio 0. RandomState(OPEN_SET_SEED) gives the benchmark's images.
    ValueError: a pool with fewer images than positions.
    """
    _check_rate(ood_ratio, "ood ratio")
    if ood_ratio == 0:
        return OpenSet(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    positions = np.flatnonzero(rng.random_sample(size) < ood_ratio)
    if pool_size < len(positions):
        raise ValueError(f"{len(positions)} images are to be replaced, and the pool has only {pool_size}")
    return OpenSet(positions, rng.permutation(pool_size)[: len(positions)])


def in_distribution_noise(
    noise_type: str,
    labels: np.ndarray,
    ood: np.ndarray,
    rate: float,
    ood_ratio: float,
    num_classes: int,
    rng: RandomState,
    python_rng: random.Random | None = None,
    matrix_rng: RandomState | None = None,
) -> np.ndarray:
    """Label noise of the in-distribution images (Manifold DivideMix): int64 [N].

    labels [N]; ood: int [M], the positions of the OOD images, which keep their labels. rate and ood_ratio are fractions of all
    images. Draws: from python_rng a shuffle of N numbers, unused; from rng, in the state after `open_set`, a uniform per
    in-distribution image, ascending; the label is noisy if it is below rate / (1 - ood_ratio). Then, by type:

    sym: one of all K classes per noisy label, from python_rng; without python_rng (SNCF's rule) floor(K u) from rng.
    asym: the look-alike of CIFAR-10 for 10 classes. Else every label, of OOD images too, becomes the next of its block of
    five with probability `rate`, drawn from matrix_rng, independent of the draws before.
    superclass: the same with CIFAR-100's superclasses as blocks; not in the release.

    ValueError: rates with a sum above 1; a type without a rule for that many classes.
    """
    labels = _checked_labels(labels, num_classes)
    _check_shares(rate, ood_ratio)
    if noise_type not in ("sym", "asym", "superclass"):
        raise ValueError(f"unknown noise type {noise_type!r}: choose from sym, asym, superclass")
    if rate == 0:
        return labels.copy()
    if python_rng is not None:
        python_rng.shuffle(list(range(len(labels))))
    others = np.setdiff1d(np.arange(len(labels)), ood)
    drawn = others[rng.random_sample(len(others)) < rate / (1 - ood_ratio)] if len(others) else others
    noisy = labels.copy()
    if noise_type == "sym" and python_rng is not None:
        noisy[drawn] = [python_rng.randint(0, num_classes - 1) for _ in drawn]
    elif noise_type == "sym":
        noisy[drawn] = np.floor(num_classes * rng.random_sample(len(drawn))).astype(np.int64)
    elif noise_type == "asym" and num_classes == 10:
        noisy[drawn] = [CIFAR10_LOOK_ALIKES.get(label, label) for label in labels[drawn].tolist()]
    else:
        groups = np.arange(num_classes) // BLOCK if noise_type == "asym" else np.array(CIFAR100_SUPERCLASSES)
        if len(groups) != num_classes or (noise_type == "asym" and num_classes % BLOCK):
            raise ValueError(f"{noise_type} noise has no rule for {num_classes} classes")
        if matrix_rng is None:
            raise ValueError(f"{noise_type} noise of {num_classes} classes needs matrix_rng")
        noisy = by_matrix(labels, next_in_group(groups, rate), matrix_rng)
    return noisy


def in_distribution_from_posterior(
    noise_type: str,
    labels: np.ndarray,
    ood: np.ndarray,
    rate: float,
    ood_ratio: float,
    num_classes: int,
    seed: int,
    posterior: np.ndarray | None,
) -> np.ndarray:
    """Noise of one of POSTERIOR_TYPES on the labels of the in-distribution images only: int64 [N].

    labels [N]; ood: int [M], the positions of OOD images, which keep their labels; posterior: float [N, K] of the images of
    the data set. rate and ood_ratio are fractions of all images, as for `in_distribution_noise`: the rate among in-distribution
    images is rate / (1 - ood_ratio). Draws from RandomState(seed). ValueError: as from_posterior; rates of more than 1.
    """
    labels = _checked_labels(labels, num_classes)
    _check_shares(rate, ood_ratio)
    posterior = _checked_posterior(noise_type, posterior, len(labels), num_classes)
    noisy = labels.copy()
    if rate == 0:
        return noisy
    others = np.setdiff1d(np.arange(len(labels)), ood)
    own_rate = min(1, rate / (1 - ood_ratio)) if ood_ratio < 1 else 0
    noisy[others] = from_posterior(noise_type, labels[others], own_rate, num_classes, seed, posterior[others])
    return noisy


def next_in_group(groups: Sequence[int] | np.ndarray, rate: float) -> np.ndarray:
    """T [K, K]: a class becomes the next class of its group, the last one the first, with probability `rate`.

    groups: the group of each class.
    """
    _check_rate(rate)
    groups = np.asarray(groups)
    matrix = np.eye(len(groups)) * (1 - rate)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        matrix[members, np.roll(members, -1)] += rate
    return matrix


# from a posterior -----------------------------------------------------------------------------------------------------


def from_posterior(
    noise_type: str,
    labels: np.ndarray,
    rate: float,
    num_classes: int,
    seed: int,
    posterior: np.ndarray | None,
) -> np.ndarray:
    """Noise of one of POSTERIOR_TYPES: `margin_dependent` or `hardest`."""
    if noise_type == "hard":
        return hardest(labels, rate, num_classes, seed, posterior)
    return margin_dependent(noise_type, labels, rate, num_classes, seed, posterior)


def margin_dependent(
    noise_type: str,
    labels: np.ndarray,
    rate: float,
    num_classes: int,
    seed: int,
    posterior: np.ndarray | None,
) -> np.ndarray:
    """Polynomial-margin-diminishing (PMD) noise: a smaller margin gives a more likely flip (Zhang et al. 2021).

    Zhang, Zheng, Wu, Goswami, Chen: "Learning with feature-dependent label noise: a progressive approach", ICLR 2021.
    See `margin_flips`. Draws from RandomState(seed): N uniforms; a label flips if its uniform is below its probability.
    """
    labels = _checked_labels(labels, num_classes)
    probabilities, targets = margin_flips(noise_type, labels, rate, num_classes, posterior)
    flips = RandomState(seed).random_sample(len(labels)) < probabilities
    return np.where(flips, targets, labels)


def margin_flips(
    noise_type: str, labels: np.ndarray, rate: float, num_classes: int, posterior: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The probability that each label flips, float64 [N], and the label it flips to, int64 [N].

    posterior: float [N, K], rows on the simplex. A label flips to the most likely other class s (the lowest of equals),
    with probability min(1, c f(m)). m = max(0, posterior of the label - posterior of s) is the margin, f the formula of the
    noise type (MARGIN_TYPES), and c the factor with which the probabilities have the mean `rate`.

    If the label y is the most likely class u, this is the rule of the paper. The paper has no other case: it first replaces
    every label by u. Here the labels are true labels. A label y != u has margin 0 and flips to u with the largest probability.

    ValueError: an unknown type, unfit labels or posterior, fewer than 2 classes, a rate outside [0, 1], or one that cannot
    be reached because the margins of too many labels are 1.
    """
    if noise_type not in MARGIN_TYPES:
        raise ValueError(f"unknown noise type {noise_type!r}: choose from {', '.join(MARGIN_TYPES)}")
    _check_rate(rate)
    labels = _checked_labels(labels, num_classes)
    posterior = _checked_posterior(noise_type, posterior, len(labels), num_classes)
    rows = np.arange(len(labels))
    others = posterior.copy()
    others[rows, labels] = -1
    targets = others.argmax(axis=1)
    margins = np.clip(posterior[rows, labels] - posterior[rows, targets], 0, 1)
    return _with_mean(MARGIN_TYPES[noise_type](margins), rate), targets


def _with_mean(factors: np.ndarray, rate: float) -> np.ndarray:
    """min(1, c factors) with the c that gives it the mean `rate`; factors: float [N] >= 0."""
    positive = np.sort(factors[factors > 0])[::-1]
    wanted = rate * len(factors)
    if wanted > len(positive) * (1 + 1e-9):
        raise ValueError(
            f"noise rate {rate} cannot be reached: only {len(positive)} of {len(factors)} labels have a margin below 1"
        )
    if not len(positive):
        return np.zeros(len(factors))
    # if the k largest are capped at 1, the others must sum to wanted - k: the smallest k that caps no more
    capped = np.arange(len(positive))
    rest = positive[::-1].cumsum()[::-1]
    fits = (wanted - capped) * positive <= rest
    k = int(fits.argmax()) if fits.any() else len(positive) - 1
    return np.minimum(1, (wanted - k) / positive[k:].sum() * factors)


def hardest(
    labels: np.ndarray, rate: float, num_classes: int, seed: int, posterior: np.ndarray | None
) -> np.ndarray:
    """The round(rate N) labels of the smallest posterior get another class, each equally likely: "hard" images are mislabelled.

    posterior: float [N, K], rows on the simplex. Ties: the first sample counts as harder. Draws from
    RandomState(seed): an offset in 1..K-1 per corrupted sample, ascending. ValueError: as margin_flips.
    """
    _check_rate(rate)
    labels = _checked_labels(labels, num_classes)
    posterior = _checked_posterior("hard", posterior, len(labels), num_classes)
    order = posterior[np.arange(len(labels)), labels].argsort(kind="stable")
    corrupted = np.sort(order[: round(rate * len(labels))])
    noisy = labels.copy()
    offsets = RandomState(seed).randint(1, num_classes, size=len(corrupted))
    noisy[corrupted] = (labels[corrupted] + offsets) % num_classes
    return noisy


def _checked_posterior(
    noise_type: str, posterior: np.ndarray | None, size: int, num_classes: int
) -> np.ndarray:
    if posterior is None:
        raise ValueError(f"{noise_type} noise needs a posterior")
    if num_classes < 2:
        raise ValueError(f"{noise_type} noise needs at least 2 classes, got {num_classes}")
    return checked_posterior(posterior, size, num_classes)


# checks ---------------------------------------------------------------------------------------------------------------


def _check_rate(rate: float, name: str = "noise rate") -> None:
    if not 0 <= rate <= 1:  # also refuses NaN
        raise ValueError(f"{name} must be in [0, 1], got {rate}")


def _check_shares(rate: float, ood_ratio: float) -> None:
    _check_rate(rate)
    _check_rate(ood_ratio, "ood ratio")
    if rate + ood_ratio > 1 + 1e-9:
        raise ValueError(
            f"noise rate {rate} and ood ratio {ood_ratio} are fractions of all images: their sum is more than 1"
        )


def checked_posterior(posterior: np.ndarray, size: int, num_classes: int) -> np.ndarray:
    """A posterior as float64 [size, num_classes]. ValueError: another shape, or rows that are no probabilities."""
    posterior = np.asarray(posterior)
    if posterior.shape != (size, num_classes) or posterior.dtype.kind not in "fiu":
        raise ValueError(
            f"the posterior must be numbers of shape [{size}, {num_classes}], got {posterior.dtype} of shape "
            f"{list(posterior.shape)}"
        )
    posterior = posterior.astype(np.float64)
    finite = np.isfinite(posterior).all(axis=1)
    if not finite.all():
        raise ValueError(f"the posterior holds NaN or infinity, first in row {finite.argmin()}")
    sums = posterior.sum(axis=1)
    wrong = (posterior.min(axis=1, initial=0) < 0) | (np.abs(sums - 1) > POSTERIOR_TOLERANCE)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"the rows of the posterior must be probabilities with the sum 1: row {row} has the sum {sums[row]:.6g} and the "
            f"minimum {posterior[row].min():.6g}"
        )
    return posterior


def _checked_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or (labels.dtype.kind not in "iu" and labels.size):
        raise ValueError(f"labels must be a vector of integers, got {labels.dtype} of shape {labels.shape}")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
    return labels.astype(np.int64)
