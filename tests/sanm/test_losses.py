"""The losses against plain sums in float64, and where they must stay finite."""

import math

import pytest
import torch
from torch import Tensor

from sanm import losses

K = 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def plain_softmax(scores: Tensor) -> list[list[float]]:
    rows = []
    for row in scores.tolist():
        exponentials = [math.exp(s - max(row)) for s in row]
        rows.append([e / sum(exponentials) for e in exponentials])
    return rows


def simplex(count: int, generator: torch.Generator) -> Tensor:
    return torch.softmax(torch.randn(count, K, generator=generator), dim=1)


def test_soft_cross_entropy_also_of_targets_with_a_negative_entry(generator):
    scores, targets = 3 * torch.randn(5, K, generator=generator), simplex(5, generator)
    targets[2] = torch.tensor([-0.1, 0.3, 0.3, 0.3, 0.1, 0.1])
    rows = zip(plain_softmax(scores), targets.tolist(), strict=True)
    plain = -sum(t * math.log(p) for ps, ts in rows for p, t in zip(ps, ts, strict=True)) / 5
    assert float(losses.soft_cross_entropy(scores, targets)) == pytest.approx(plain, rel=1e-5)


def test_the_squared_error_is_the_mean_over_samples_and_classes(generator):
    scores, targets = 3 * torch.randn(5, K, generator=generator), simplex(5, generator)
    rows = zip(plain_softmax(scores), targets.tolist(), strict=True)
    plain = sum((p - t) ** 2 for ps, ts in rows for p, t in zip(ps, ts, strict=True)) / (5 * K)
    assert float(losses.squared_error(scores, targets)) == pytest.approx(plain, rel=1e-5)


def test_the_prior_is_compared_with_the_mean_prediction(generator):
    scores = 3 * torch.randn(5, K, generator=generator)
    mean = [sum(column) / 5 for column in zip(*plain_softmax(scores), strict=True)]
    plain = sum(math.log(1 / K / p) / K for p in mean)
    assert float(losses.prior_penalty(scores)) == pytest.approx(plain, rel=1e-5)
    # each sample is sure, but of another class: nothing to be said against it
    assert float(losses.prior_penalty(50 * torch.eye(K))) == pytest.approx(0, abs=1e-6)


def test_negative_entropy_is_largest_for_the_surest(generator):
    scores = 3 * torch.randn(5, K, generator=generator)
    plain = sum(p * math.log(p) for row in plain_softmax(scores) for p in row) / 5
    assert float(losses.negative_entropy(scores)) == pytest.approx(plain, rel=1e-5)
    assert float(losses.negative_entropy(torch.zeros(3, K))) == pytest.approx(-math.log(K), rel=1e-6)
    assert float(losses.negative_entropy(100 * torch.eye(K))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores: losses.soft_cross_entropy(scores, torch.eye(K)[:1]),
        lambda scores: losses.squared_error(scores, torch.eye(K)[:1]),
        losses.prior_penalty,
        losses.negative_entropy,
    ],
)
def test_losses_and_gradients_of_extreme_scores_are_finite(loss):
    for top in (0, 1):
        scores = torch.zeros(1, K)
        scores[0, top] = 1e4  # every other probability is 0 in float32
        scores.requires_grad_()
        value = loss(scores)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(scores.grad).all()


def test_the_reconstruction_error_compares_both_halves_with_the_same_images(generator):
    images, first, second = (torch.randn(4, 2, 5, 3, generator=generator) for _ in range(3))
    plain = sum(
        sum((a - b) ** 2 for a, b in zip(half.flatten().tolist(), images.flatten().tolist(), strict=True))
        / 120
        for half in (first, second)
    )
    assert float(losses.reconstruction_error(torch.cat([first, second]), images)) == pytest.approx(
        plain, rel=1e-5
    )
    assert losses.reconstruction_error(torch.cat([images, images]), images) == 0


@pytest.mark.parametrize(
    ("position", "weight"), [(0, 0), (10, 0), (10.5, 25 / 32), (14, 6.25), (18, 12.5), (26, 25), (360, 25)]
)
def test_the_unlabelled_weight_rises_over_sixteen_epochs_after_warm_up(position, weight):
    assert losses.ramp_up(25, position, 10) == pytest.approx(weight, abs=1e-12)
