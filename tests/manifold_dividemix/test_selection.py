"""Clean probabilities and the split, from hand-made and from extreme losses."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from common.runs.cli import UserError
from manifold_dividemix.selection import clean_probability, divide, normalised


def two_kinds(count: int = 400, seed: int = 0) -> torch.Tensor:
    """Losses of which the first three in four are low, the others high."""
    generator = torch.Generator().manual_seed(seed)
    high = torch.arange(count) >= count * 3 // 4
    return torch.where(high, 3.0, 0.5) + 0.3 * torch.randn(count, generator=generator)


def unit(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXTREMES = {
    "one high": torch.cat([torch.zeros(99), torch.ones(1)]),
    "one low": torch.cat([torch.zeros(1), torch.ones(99)]),
    "half": torch.cat([torch.zeros(50), torch.ones(50)]),
    "equal": torch.full((100,), 2.3),
    "nearly equal": 2.3 + torch.linspace(0, 1e-6, 100),
    "huge": torch.linspace(0, 3e38, 100),
    "two": torch.tensor([0.0, 1.0]),
    "two equal": torch.zeros(2),
    "one": torch.ones(1),
    "one far": torch.cat([torch.linspace(0, 1e-6, 99), torch.ones(1)]),
}


# losses -----------------------------------------------------------------------------------------------------------------


def test_losses_are_scaled_to_0_and_1_whatever_their_unit():
    losses = torch.tensor([2.0, 4.0, 3.0, 2.5])
    assert normalised(losses).tolist() == [0, 1, 0.5, 0.25]
    torch.testing.assert_close(normalised(7 * losses + 3), normalised(losses))
    assert normalised(torch.tensor([0.1, 1e30])).tolist() == [0, 1]
    assert losses.tolist() == [2, 4, 3, 2.5]


@pytest.mark.parametrize("value", [0.0, 2.3, 1e30])
def test_equal_losses_are_all_zero(value):
    assert normalised(torch.full((5,), value)).tolist() == [0] * 5


# clean probability ------------------------------------------------------------------------------------------------------


def test_the_probability_is_that_of_scikit_learns_mixture_with_the_settings_of_the_release():
    losses = 3 * torch.rand(500, generator=torch.Generator().manual_seed(3)) ** 4 + 1
    column = ((losses - losses.min()) / (losses.max() - losses.min())).numpy().reshape(-1, 1)
    settings = {"max_iter": 20, "tol": 1e-2, "reg_covar": 5e-4}
    mixture = GaussianMixture(n_components=2, random_state=11, **settings).fit(column)
    expected = mixture.predict_proba(column)[:, mixture.means_.argmin()]
    found = clean_probability(losses, 11)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    # tolerance and floor matter for these losses
    for name, value in (("tol", 1e-3), ("reg_covar", 1e-6)):
        other = GaussianMixture(n_components=2, random_state=11, **{**settings, name: value}).fit(column)
        assert np.abs(other.predict_proba(column)[:, other.means_.argmin()] - expected).max() > 1e-4, name


def test_the_mixture_is_given_twenty_iterations_from_one_start_by_k_means(monkeypatch):
    made = []
    monkeypatch.setattr(
        "sklearn.mixture.GaussianMixture",
        lambda *given, **named: made.append(GaussianMixture(*given, **named)) or made[0],
    )
    clean_probability(two_kinds(), 7)
    settings = {"n_components": 2, "max_iter": 20, "tol": 1e-2, "reg_covar": 5e-4, "random_state": 7}
    assert made[0].get_params() == GaussianMixture(**settings).get_params()
    assert (made[0].init_params, made[0].n_init) == ("kmeans", 1)


def test_the_seed_decides_and_the_global_generators_do_not():
    losses = torch.rand(300, generator=torch.Generator().manual_seed(4))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = clean_probability(losses, 1)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(5)
    assert torch.equal(clean_probability(losses, 1), first)
    # where the start of k-means matters, so does the seed
    assert len({tuple(clean_probability(losses, seed).tolist()) for seed in range(8)}) > 1


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_two_kinds_of_losses_are_told_apart_from_any_start(seed):
    clean = clean_probability(two_kinds(), seed)
    assert clean[:300].min() > 0.9 and clean[300:].max() < 0.1


def test_losses_of_half_precision_or_with_a_gradient_will_do():
    losses = two_kinds().requires_grad_()
    found = clean_probability(losses, 0)
    assert not found.requires_grad
    near = clean_probability(losses.detach().bfloat16(), 0)
    assert ((near > 0.5) == (found > 0.5)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_losses_give_probabilities_without_a_warning(name):
    losses = EXTREMES[name]
    clean = clean_probability(losses, 0)
    assert clean.shape == losses.shape and torch.isfinite(clean).all() and clean.dtype == torch.float64
    assert clean.min() >= 0 and clean.max() <= 1
    if name in ("equal", "two equal", "one"):  # every sample is as clean as any
        assert (clean == 1).all()
    if name in ("one high", "one low", "half", "two", "one far"):
        assert (clean > 0.5).tolist() == (losses < 0.5).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_are_an_error_in_one_line(value):
    losses = two_kinds()
    losses[7] = value
    with pytest.raises(UserError, match="not finite: lower --lr-head and --lr-backbone") as error:
        clean_probability(losses, 0)
    assert "\n" not in str(error.value)


# division ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.03, 0.3, 0.9])
def test_above_the_threshold_is_labelled_and_at_it_is_not(threshold):
    clean, kept = unit(200, seed=1), torch.ones(200, dtype=torch.bool)
    clean[:3] = torch.tensor([threshold, np.nextafter(threshold, 1), np.nextafter(threshold, 0)])
    labelled, unlabelled = divide(clean, kept, threshold)
    assert labelled.dtype == unlabelled.dtype == torch.int64
    assert labelled.tolist() == [i for i, p in enumerate(clean.tolist()) if p > threshold]
    assert unlabelled.tolist() == [i for i, p in enumerate(clean.tolist()) if not p > threshold]
    assert 1 in labelled and 0 in unlabelled and 2 in unlabelled


def test_removed_samples_are_on_neither_side():
    clean = torch.tensor([0.9, 0.9, 0.1, 0.1, 0.2, 0.8], dtype=torch.float64)
    kept = torch.tensor([True, False, True, False, True, True])
    labelled, unlabelled = divide(clean, kept, 0.3)
    assert labelled.tolist() == [0, 5] and unlabelled.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("threshold", "kept", "sizes"),
    [(0.0, True, (4, 0)), (1.0, True, (0, 4)), (0.5, False, (0, 0)), (0.5, True, (2, 2))],
)
def test_either_side_can_be_empty(threshold, kept, sizes):
    clean = torch.tensor([0.1, 0.9, 0.2, 1.0], dtype=torch.float64)
    sides = divide(clean, torch.full((4,), kept), threshold)
    assert tuple(len(side) for side in sides) == sizes
    assert all(side.dtype == torch.int64 and side.dim() == 1 for side in sides)
