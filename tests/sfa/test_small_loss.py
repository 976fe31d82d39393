"""Selection by small losses against scikit-learn's mixture, and where there is nothing to fit one to."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from common.runs.cli import UserError
from sfa.small_loss import clean_probability, divide

NUM_CLASSES = 4


def two_kinds(count: int = 200) -> torch.Tensor:
    """Losses: the first three in four are low, the others high."""
    high = torch.arange(count) >= count * 3 // 4
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return torch.where(high, 5.0, 1.0) + 0.3 * noise


def skewed(count: int = 300) -> torch.Tensor:
    """Losses without a gap: the fit is cut short and its start matters."""
    return 7 * torch.rand(count, generator=torch.Generator().manual_seed(9)) ** 6 + 2


def by_scikit_learn(losses: torch.Tensor, seed: int) -> np.ndarray:
    """As the release of DivideMix does it."""
    values = losses.numpy()
    values = ((values - values.min()) / (values.max() - values.min())).reshape(-1, 1)
    mixture = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    mixture.fit(values)
    return mixture.predict_proba(values)[:, mixture.means_.argmin()]


@pytest.mark.filterwarnings("ignore:.*did not converge")  # it has ten iterations
@pytest.mark.parametrize("make", [two_kinds, skewed])
def test_the_clean_probability_is_that_of_scikit_learns_mixture(make):
    losses, seen = make(), set()
    before = losses.clone()
    for seed in (0, 1, 7, 2**31 - 1):
        clean = clean_probability(losses, seed)
        assert clean.dtype == torch.float64 and clean.shape == losses.shape
        assert clean.tolist() == pytest.approx(by_scikit_learn(losses, seed).tolist(), abs=1e-6)
        seen.add(tuple(clean.tolist()))
    assert torch.equal(losses, before)
    assert make is two_kinds or len(seen) > 1, "the seed matters"


def test_the_component_of_the_smaller_losses_is_the_clean_one_whatever_its_number():
    for seed in range(8):
        clean = clean_probability(two_kinds(), seed)
        assert clean[:150].min() > 0.9 and clean[150:].max() < 0.1


def test_above_the_threshold_is_selected_and_counted_by_observed_class():
    clean = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 2, 2])
    for threshold, counts in ((0.5, [1, 0, 2, 0]), (0.7, [0, 0, 2, 0]), (0.0, [3, 0, 2, 0]), (1.0, [0] * 4)):
        split = divide(clean, labels, NUM_CLASSES, threshold)
        assert split.selected.tolist() == [value > threshold for value in clean.tolist()]
        assert split.counts.tolist() == counts and torch.equal(split.clean, clean)


@pytest.mark.parametrize("value", [0.0, 2.3, 1e30])
@pytest.mark.parametrize("count", [1, 50])
def test_where_all_losses_are_equal_every_sample_is_clean(value, count):
    clean = clean_probability(torch.full((count,), value), seed=0)
    assert clean.tolist() == [1.0] * count and clean.dtype == torch.float64


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses", [[3.0, 1], [0.0] * 99 + [1], [0.0] + [1] * 99, [0, 1e-8, 1e-7], [0, 0, 1e30], [2, 2, 2.0000002]]
)
def test_few_or_close_losses_are_told_apart_without_a_warning(losses):
    losses = torch.tensor(losses)
    clean = clean_probability(losses, seed=0)
    assert clean.min() >= 0 and clean.max() <= 1
    assert clean[losses.argmin()] > 0.5 >= clean[losses.argmax()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_end_in_one_line(value):
    losses = two_kinds()
    losses[17] = value
    with pytest.raises(UserError, match="not finite: lower --lr") as error:
        clean_probability(losses, seed=0)
    assert "\n" not in str(error.value)
