"""What the recorded losses do not show: the ends of the scale, and scores so extreme that a loss must stay finite."""

import math

import pytest
import torch

from sanm import losses

K = 6


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


def test_the_reconstruction_error_is_the_sum_of_the_mean_squared_errors_of_both_halves():
    images, halves = (
        torch.zeros(2, 3, 4, 4),
        torch.cat([torch.full((2, 3, 4, 4), value) for value in (2.0, 3.0)]),
    )
    assert float(losses.reconstruction_error(halves, images)) == 4 + 9
