"""Selection by small losses against scikit-learn's mixture, and where there is nothing to fit one to."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from common.runs.cli import UserError
from sfa.small_loss import SmallLoss, clean_probability, divide

NUM_CLASSES = 4


def two_kinds(count: int = 200) -> torch.Tensor:
    """Losses: the first three in four are low, the others high."""
    high = torch.arange(count) >= count * 3 // 4
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return torch.where(high, 5.0, 1.0) + 0.3 * noise


def skewed(count: int = 300, seed: int = 9) -> torch.Tensor:
    """Losses without a gap, on which the fit is cut short and its start matters."""
    return 7 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 6 + 2


def labels_of(losses: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(losses)) % NUM_CLASSES


def small_loss_selection(losses, labels, num_classes, p_threshold=0.5, seed=0) -> SmallLoss:
    return divide(clean_probability(losses, seed), labels, num_classes, p_threshold)


def select(losses: torch.Tensor, **options) -> SmallLoss:
    return small_loss_selection(losses, labels_of(losses), NUM_CLASSES, **options)


def by_scikit_learn(losses: torch.Tensor, seed: int) -> np.ndarray:
    """As the release of DivideMix does it."""
    values = losses.numpy()
    values = ((values - values.min()) / (values.max() - values.min())).reshape(-1, 1)
    mixture = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    mixture.fit(values)
    return mixture.predict_proba(values)[:, mixture.means_.argmin()]


@pytest.mark.filterwarnings("ignore:.*did not converge")  # ten iterations are all it gets
@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 - 1])
@pytest.mark.parametrize("make", [two_kinds, skewed])
def test_the_clean_probability_is_that_of_scikit_learns_mixture(make, seed):
    losses = make()
    found = select(losses, seed=seed)
    assert found.clean.dtype == torch.float64 and found.clean.shape == losses.shape
    assert found.clean.tolist() == pytest.approx(by_scikit_learn(losses, seed).tolist(), abs=1e-6)


def test_the_seed_of_the_start_is_0_unless_another_is_given_and_matters():
    losses = skewed()
    assert torch.equal(select(losses).clean, select(losses, seed=0).clean)
    assert len({tuple(select(losses, seed=seed).clean.tolist()) for seed in range(8)}) > 1


@pytest.mark.parametrize("seed", range(8))
def test_the_component_of_the_smaller_losses_is_the_clean_one_whatever_its_number(seed):
    found = select(two_kinds(), seed=seed)
    assert found.selected.tolist() == [True] * 150 + [False] * 50
    assert found.clean[:150].min() > 0.9 and found.clean[150:].max() < 0.1


def test_the_unit_of_the_losses_does_not_matter_and_they_are_left_as_they_are():
    losses = two_kinds()
    before = losses.clone()
    found = select(losses)
    assert torch.equal(losses, before)
    torch.testing.assert_close(select(1000 * losses + 300).clean, found.clean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(select(losses.double()).clean, found.clean, rtol=1e-4, atol=1e-5)


def test_above_the_threshold_is_selected_and_at_it_is_not():
    losses = skewed()
    clean = select(losses).clean
    assert torch.equal(select(losses).selected, clean > 0.5)
    for threshold in (0.0, 0.2, float(clean[5]), float(clean.median()), 1.0):
        found = select(losses, p_threshold=threshold)
        assert found.selected.dtype == torch.bool
        assert found.selected.tolist() == [probability > threshold for probability in clean.tolist()]
    assert not select(losses, p_threshold=float(clean[5])).selected[5]
    assert not select(losses, p_threshold=1.0).selected.any()


def test_selected_samples_are_counted_by_observed_class_with_0_for_the_others():
    losses = two_kinds()
    labels = torch.where(torch.arange(200) < 150, torch.arange(200) % 2, 2)
    found = small_loss_selection(losses, labels, NUM_CLASSES)
    assert found.counts.tolist() == [75, 75, 0, 0]
    none = small_loss_selection(losses, labels, NUM_CLASSES, p_threshold=1)
    assert none.counts.tolist() == [0] * 4 and none.counts.dtype == torch.int64


@pytest.mark.parametrize("value", [0.0, 2.3, 1e30])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_where_all_losses_are_equal_every_sample_is_clean(value, count):
    found = select(torch.full((count,), value))
    assert found.clean.tolist() == [1.0] * count and found.clean.dtype == torch.float64
    assert found.selected.all() and found.selected.dtype == torch.bool
    assert found.counts.sum() == count


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses",
    [
        torch.tensor([3.0, 1.0]),
        torch.cat([torch.zeros(99), torch.ones(1)]),
        torch.cat([torch.zeros(1), torch.ones(99)]),
        torch.linspace(0, 1e-7, 50),
        torch.tensor([0.0, 0.0, 1e30]),
        torch.tensor([2.0, 2.0, 2.0000002]),
    ],
    ids=["two", "one high", "one low", "nearly equal", "one far", "one apart by a bit"],
)
def test_few_or_close_losses_are_told_apart_without_a_warning(losses):
    found = select(losses)
    assert torch.isfinite(found.clean).all() and found.clean.min() >= 0 and found.clean.max() <= 1
    assert found.selected[losses.argmin()] and not found.selected[losses.argmax()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_end_in_one_line(value):
    losses = two_kinds()
    losses[17] = value
    with pytest.raises(UserError, match="not finite: lower --lr") as error:
        select(losses)
    assert "\n" not in str(error.value)


def test_the_global_generators_are_neither_read_nor_moved():
    losses = skewed()
    first = select(losses, seed=4).clean
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert torch.equal(select(losses, seed=4).clean, first)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_rare_class_of_large_losses_is_taken_for_mislabelled():
    """What one mixture for all classes cannot tell, and the reason for feature averaging."""
    losses = two_kinds()
    labels = torch.where(torch.arange(200) >= 150, 3, torch.arange(200) % 3)  # all the high ones, and clean
    assert small_loss_selection(losses, labels, NUM_CLASSES).counts[3] == 0
