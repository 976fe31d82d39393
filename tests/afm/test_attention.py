"""Attention of a group's members to each other: against a loop, for extreme scores, and the weights in its place."""

import numpy as np
import pytest
import torch
from scipy import stats

from afm.attention import GroupAttention, ablation_weights, mixing_weights
from afm.choices import ATTENTIONS, INTERACTIONS


def members_of(groups: int, group_size: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups, group_size, width, generator=torch.Generator().manual_seed(seed)).relu()


def attention_of(width: int, group_size: int = 2, seed: int = 0, **options) -> GroupAttention:
    torch.manual_seed(seed)
    return GroupAttention(width, group_size, **options)


def plain_weights(attention: GroupAttention, group: torch.Tensor) -> torch.Tensor:
    """The weights [K] of one group [K, D], as the README, section 4, writes them, in float64."""
    layers = [(layer.weight.double(), layer.bias.double()) for layer in attention.projections]
    projected = [(x.double() @ w.T + b).clamp_min(0) for x, (w, b) in zip(group, layers, strict=True)]
    if attention.interaction == "concat":
        fused = torch.cat(projected)
    else:
        fused = projected[0]
        for other in projected[1:]:
            fused = fused + other if attention.interaction == "sum" else fused * other
    *further, last = [layer for layer in attention.score if hasattr(layer, "weight")]
    for layer in further:
        fused = (fused @ layer.weight.double().T + layer.bias.double()).clamp_min(0)
    z = fused @ last.weight.double().T + last.bias.double()
    if attention.attention == "complement":
        return torch.stack([1 / (1 + (-z[0]).exp()), 1 - 1 / (1 + (-z[0]).exp())])
    if attention.attention == "relu-sigmoid":
        z = z.clamp_min(0)
    alpha = z.exp() if attention.attention == "softmax" else 1 / (1 + (-z).exp())
    return alpha / alpha.sum()


@pytest.mark.parametrize(
    ("interaction", "attn_hidden"), [*zip(INTERACTIONS, (0, 5, 0), strict=True), ("concat", 0)]
)
@pytest.mark.parametrize(
    ("group_size", "attention"), [(k, a) for k in (2, 4) for a in ATTENTIONS if a != "complement" or k == 2]
)
def test_agrees_with_a_loop_over_groups(group_size, interaction, attention, attn_hidden):
    options = {"interaction": interaction, "attention": attention, "attn_hidden": attn_hidden}
    made = attention_of(9, group_size, hidden=6, **options)
    with torch.no_grad():  # scores of both signs
        made.score[-1].bias.copy_(torch.linspace(0.3, -0.1, len(made.score[-1].bias)))
    members = 2 * members_of(7, group_size, 9)
    weights = made(members)
    assert weights.shape == (7, group_size)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(7))
    expected = torch.stack([plain_weights(made, group) for group in members])
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    towards = torch.randn(7, group_size, generator=torch.Generator().manual_seed(1))
    losses = [(own * towards).sum() for own in (weights, expected)]
    gradients = [torch.autograd.grad(loss, [*made.parameters()]) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert weights.std() > 1e-3  # or there would be nothing to see


@pytest.mark.parametrize("shift", [-1e4, -200.0, -90.0, 0.0, 200.0])
@pytest.mark.parametrize("attention", ["relu-sigmoid", "sigmoid", "softmax"])
def test_weights_and_gradients_stay_finite_for_extreme_scores(attention, shift):
    scores = (torch.tensor([[0.0, 1.0, -1.0], [2.0, 2.0, 2.0]]) + shift).requires_grad_()
    weights = mixing_weights(scores, attention)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    if shift < 0 and attention != "relu-sigmoid":  # sigmoid(z) is exp(z) there
        torch.testing.assert_close(weights, torch.softmax(scores, dim=1), rtol=1e-4, atol=1e-6)
    weights[:, 0].sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("group_size", [2, 5])
def test_relu_sigmoid_keeps_every_weight_between_its_bounds(group_size):
    least, greatest = 1 / (2 * group_size - 1), 2 / (group_size + 1)
    first = torch.full((2, group_size), -50.0)
    first[0, 0], first[1, 1:] = 50.0, 50.0  # one alpha of 1 beside 1/2; one of 1/2 beside 1
    extremes = mixing_weights(first, "relu-sigmoid")
    torch.testing.assert_close(extremes[:, 0], torch.tensor([greatest, least]))
    scores = 30 * torch.randn(2000, group_size, generator=torch.Generator().manual_seed(0))
    weights = mixing_weights(scores, "relu-sigmoid")
    assert weights.min() >= least - 1e-6 and weights.max() <= greatest + 1e-6


def test_a_dead_relu_gives_uniform_weights_and_no_gradient():
    scores = torch.tensor([[-1e-3, -5.0, 0.0], [-1e4, -1.0, -80.0]], requires_grad=True)
    weights = mixing_weights(scores, "relu-sigmoid")
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
    weights[:, 0].sum().backward()
    assert (scores.grad == 0).all()


def test_complement_is_a_sigmoid_for_the_first_and_the_rest_for_the_second():
    weights = mixing_weights(torch.tensor([[0.0], [-300.0], [300.0]]), "complement")
    assert weights.tolist() == [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]


def test_a_score_whose_sigmoid_rounds_to_1_still_has_a_gradient():
    scores = torch.tensor([[30.0, 0.5]], requires_grad=True)
    assert scores[0, 0].sigmoid() == 1
    mixing_weights(scores, "relu-sigmoid")[0, 0].backward()
    assert 0 < scores.grad[0, 0] < 1e-12


@pytest.mark.parametrize(("group_size", "alpha"), [(2, 0.01), (3, 0.3), (5, 1.0), (2, 8.0)])
def test_random_weights_are_dirichlet(group_size, alpha):
    weights = ablation_weights(20000, group_size, "random", alpha, np.random.default_rng(0)).double()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(20000, dtype=torch.float64), rtol=0, atol=1e-6)
    mean = 1 / group_size
    variance = mean * (1 - mean) / (group_size * alpha + 1)
    error = 5 * (variance / 20000) ** 0.5
    assert weights.mean(dim=0).tolist() == pytest.approx([mean] * group_size, abs=error)
    assert weights.var(dim=0).tolist() == pytest.approx([variance] * group_size, rel=0.06)


def test_random_weights_of_pairs_are_those_of_mixup():
    first = ablation_weights(5000, 2, "random", 0.4, np.random.default_rng(1))[:, 0].double().numpy()
    assert stats.kstest(first, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_weights_are_uniform_or_drawn_for_each_group_from_the_generator_alone():
    uniform = ablation_weights(3, 4, "uniform", 1.0, np.random.default_rng(0))
    assert uniform.tolist() == [[0.25] * 4] * 3
    weights = [ablation_weights(9, 2, "random", 1.0, np.random.default_rng(5)) for _ in range(2)]
    assert torch.equal(*weights) and weights[0].dtype == torch.float32
    assert len(weights[0][:, 0].unique()) == 9
    assert ablation_weights(0, 3, "random", 1.0, np.random.default_rng(0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"interaction": "max"}, "sum, concat, mul, got max"),
        ({"attention": "tanh"}, "relu-sigmoid, sigmoid, softmax, complement, got tanh"),
        ({"group_size": 3, "attention": "complement"}, "groups of 2, got 3"),
    ],
)
def test_what_there_is_not_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        GroupAttention(8, **options)
