"""The losses against plain sums, and where they must stay finite."""

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


def test_the_losses_of_scores_are_their_plain_sums_also_for_targets_with_a_negative_entry(generator):
    scores, targets = (torch.randn(5, K, generator=generator) for _ in range(2))
    scores, targets = 3 * scores, torch.softmax(targets, dim=1)
    targets[2] = torch.tensor([-0.1, 0.3, 0.3, 0.3, 0.1, 0.1])
    p = plain_softmax(scores)
    pairs = [pair for rows in zip(p, targets.tolist(), strict=True) for pair in zip(*rows, strict=True)]
    mean = [sum(column) / 5 for column in zip(*p, strict=True)]
    for found, plain in (
        (losses.soft_cross_entropy(scores, targets), -sum(t * math.log(p) for p, t in pairs) / 5),
        (losses.squared_error(scores, targets), sum((p - t) ** 2 for p, t in pairs) / (5 * K)),
        (losses.prior_penalty(scores), sum(math.log(1 / K / p) / K for p in mean)),
        (losses.negative_entropy(scores), sum(p * math.log(p) for p, _ in pairs) / 5),
    ):
        assert float(found) == pytest.approx(plain, rel=1e-5)


def test_values_at_the_ends_of_the_scale():
    # each sample is sure, but of another class: the prior has nothing against it
    assert float(losses.prior_penalty(50 * torch.eye(K))) == pytest.approx(0, abs=1e-6)
    assert float(losses.negative_entropy(torch.zeros(3, K))) == pytest.approx(-math.log(K), rel=1e-6)
    assert float(losses.negative_entropy(100 * torch.eye(K))) == pytest.approx(0, abs=1e-6)
    assert float(losses.squared_error(torch.zeros(0, K), torch.zeros(0, K))) == 0


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
    plain = sum(float((half - images).double().square().sum()) / 120 for half in (first, second))
    found = losses.reconstruction_error(torch.cat([first, second]), images)
    assert float(found) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("position", "weight"), [(0, 0), (10, 0), (10.5, 25 / 32), (14, 6.25), (18, 12.5), (26, 25), (360, 25)]
)
def test_the_unlabelled_weight_rises_over_sixteen_epochs_after_warm_up(position, weight):
    assert losses.ramp_up(25, position, 10) == pytest.approx(weight, abs=1e-12)
