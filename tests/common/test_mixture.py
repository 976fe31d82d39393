"""The batched two-component mixtures against scikit-learn's, one group at a time, the mixture of all values, and no mixture."""

import random
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from common.gpu.mixture import lower_posterior, sklearn_upper_posterior, upper_posterior


def two_normals(rng, low: tuple[float, float, int], high: tuple[float, float, int]) -> np.ndarray:
    """Values of a lower and an upper normal component, each (mean, deviation, size)."""
    return np.concatenate([rng.normal(*low), rng.normal(*high)])


CLEAR = {
    "bimodal": lambda rng: two_normals(rng, (0.2, 0.05, 150), (0.8, 0.08, 90)),
    "small": lambda rng: two_normals(rng, (-0.5, 0.05, 6), (0.9, 0.05, 9)),
    "unequal": lambda rng: two_normals(rng, (0.0, 0.02, 190), (1.0, 0.1, 10)),
    "two samples": lambda rng: np.array([0.1, 0.9]),
}
BLURRED = {
    "overlapping": lambda rng: two_normals(rng, (0.0, 1.0, 200), (2.0, 1.0, 150)),
    "heavy-tailed": lambda rng: rng.standard_t(2, size=250),
    "skewed": lambda rng: rng.lognormal(size=180),
    "one normal": lambda rng: rng.normal(size=120),
    "cosines": lambda rng: 1 - rng.beta(5, 1, size=300),
}


def grouped(kinds: dict, seed: int) -> tuple[Tensor, Tensor, int]:
    """A group of each kind, of different sizes, the samples of all groups mixed: values, groups, number of groups."""
    rng = np.random.RandomState(seed)
    columns = [make(rng) for make in kinds.values()]
    groups = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
    order = torch.from_numpy(rng.permutation(len(groups)))
    values = torch.from_numpy(np.concatenate(columns)).float()
    return values[order], torch.from_numpy(groups)[order], len(columns)


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_and_selections_are_those_of_scikit_learn(seed):
    values, groups, count = grouped({**CLEAR, **BLURRED}, seed)
    ours, theirs = (fit(values, groups, count) for fit in (upper_posterior, sklearn_upper_posterior))
    assert ours.dtype == theirs.dtype == torch.float64
    # theirs is float32; another optimum differs by tenths
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    sure = (theirs - 0.5).abs() >= 0.05
    assert torch.equal((ours > 0.5)[sure], (theirs > 0.5)[sure])
    assert sure.double().mean() > 0.9
    values, groups, count = grouped(CLEAR, seed)
    upper = upper_posterior(values, groups, count) > 0.5
    assert torch.equal(upper, values > 0.5)  # clearly separate components lie on both sides of 0.5


@pytest.mark.parametrize("value", [0.0, -3.25, 7.1])
@pytest.mark.parametrize("size", [1, 2, 50])
def test_a_group_of_equal_values_gets_1(size, value):
    clear, _, _ = grouped({"bimodal": CLEAR["bimodal"]}, seed=0)
    values = torch.cat([clear, torch.full((size,), value)])
    groups = (torch.arange(len(values)) >= len(clear)).long()
    probability, reference = (fit(values, groups, 2) for fit in (upper_posterior, sklearn_upper_posterior))
    for found in (probability, reference):
        assert torch.equal(found[groups == 1], torch.ones(size, dtype=torch.float64))
    assert probability[groups == 0].min() < 0.01


def test_groups_without_members_change_nothing():
    values, groups, count = grouped(CLEAR, seed=0)
    gaps = upper_posterior(values, 2 * groups + 1, 2 * count + 3)
    torch.testing.assert_close(gaps, upper_posterior(values, groups, count), rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_no_values_give_no_probabilities(num_groups):
    probability = upper_posterior(torch.empty(0), torch.empty(0, dtype=torch.long), num_groups)
    assert probability.shape == (0,) and probability.dtype == torch.float64


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_values_that_are_not_finite_are_refused(wrong):
    values, groups, count = grouped(CLEAR, seed=0)
    values = values.double()
    values[17] = wrong
    with pytest.raises(ValueError, match="the values of a mixture must be finite"):
        lower_posterior(values, 0)  # in float32
    if wrong != 1e300:
        with pytest.raises(ValueError, match="the values of a mixture must be finite"):
            upper_posterior(values, groups, count)


def of_scikit_learn(values: Tensor, seed: int, iterations: int = 10) -> Tensor:
    """The posterior of the lower of two Gaussians, with the settings of DivideMix's release."""
    column = values.float().numpy().reshape(-1, 1)
    mixture = GaussianMixture(2, max_iter=iterations, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probability = mixture.fit(column).predict_proba(column)
    return torch.from_numpy(probability[:, mixture.means_.argmin()]).double()


def scaled(kind: str, seed: int = 0) -> Tensor:
    """Values in [0, 1], as losses are given to a mixture."""
    values, _, _ = grouped({kind: {**CLEAR, **BLURRED}[kind]}, seed)
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("kind", [*CLEAR, *BLURRED])
@pytest.mark.parametrize("seed", [0, 3])
def test_lower_posterior_is_that_of_scikit_learn(kind, seed):
    values = scaled(kind)
    found = lower_posterior(values, seed)
    assert found.dtype == torch.float64
    assert torch.equal(found, of_scikit_learn(values, seed))
    assert torch.equal(lower_posterior(values.double(), seed), found), "in float32 whatever is given"


def test_the_fit_is_stopped_after_so_many_iterations_in_silence(recwarn):
    values = scaled("heavy-tailed")
    found = {count: lower_posterior(values, 0, max_iterations=count) for count in (1, 3, 10)}
    for count, probability in found.items():
        assert torch.equal(probability, of_scikit_learn(values, 0, count))
    assert not torch.equal(found[1], found[3]) and not torch.equal(found[3], found[10])
    lower_posterior(torch.full((7,), 0.3), 0)  # in which there are no two clusters to start from
    assert recwarn.list == []


def test_losses_are_not_changed_nor_any_generator_drawn_from():
    values = scaled("bimodal").requires_grad_()
    before = values.detach().clone()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = lower_posterior(values, 0)
    assert not found.requires_grad
    assert torch.equal(values, before)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
