"""Clean probabilities and the split, from hand-made and from extreme losses."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from common.gpu import processes
from common.runs.cli import UserError
from manifold_dividemix.selection import clean_probability, divide, normalised, too_small

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


def test_losses_are_scaled_to_0_and_1_whatever_their_unit():
    losses = torch.tensor([2.0, 4.0, 3.0, 2.5])
    assert normalised(losses).tolist() == [0, 1, 0.5, 0.25]
    torch.testing.assert_close(normalised(7 * losses + 3), normalised(losses))
    assert losses.tolist() == [2, 4, 3, 2.5]
    assert normalised(torch.full((5,), 1e30)).tolist() == [0] * 5


def test_the_probability_is_that_of_scikit_learns_mixture_with_the_settings_of_the_release(monkeypatch):
    losses = 3 * torch.rand(500, generator=torch.Generator().manual_seed(3)) ** 4 + 1
    column = ((losses - losses.min()) / (losses.max() - losses.min())).numpy().reshape(-1, 1)
    settings = {"max_iter": 20, "tol": 1e-2, "reg_covar": 5e-4}
    mixture = GaussianMixture(n_components=2, random_state=11, **settings).fit(column)
    expected = mixture.predict_proba(column)[:, mixture.means_.argmin()]
    made = []
    monkeypatch.setattr(
        "sklearn.mixture.GaussianMixture",
        lambda *given, **named: made.append(GaussianMixture(*given, **named)) or made[0],
    )
    found = clean_probability(losses.requires_grad_(), 11)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert made[0].get_params() == mixture.get_params()


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
    with pytest.raises(UserError, match="not finite: lower --lr-head and --lr-backbone") as error:
        clean_probability(torch.tensor([0.5, value, 3.0]), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", [0.03, 0.3, 0.9])
def test_above_the_threshold_is_labelled_and_at_it_is_not_and_removed_samples_are_on_neither_side(threshold):
    clean = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clean[:3] = torch.tensor([threshold, np.nextafter(threshold, 1), np.nextafter(threshold, 0)])
    kept = torch.arange(200) % 7 != 3
    labelled, unlabelled = divide(clean, kept, threshold)
    assert labelled.dtype == unlabelled.dtype == torch.int64
    rows = [(i, p) for i, p in enumerate(clean.tolist()) if i % 7 != 3]
    assert labelled.tolist() == [i for i, p in rows if p > threshold] and 1 in labelled
    assert unlabelled.tolist() == [i for i, p in rows if not p > threshold] and {0, 2} < {
        *unlabelled.tolist()
    }
    nothing = divide(clean, torch.zeros_like(kept), threshold)
    assert [side.shape for side in nothing] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("world", "labelled", "unlabelled", "small"),
    [
        *((1, 0, 9, True), (1, 9, 0, True), (1, 9, 1, True), (1, 1, 2, False), (1, 9, 9, False)),
        # several processes need a whole batch on each side
        *((2, 7, 8, True), (2, 8, 7, True), (2, 8, 8, False)),
    ],
)
def test_a_side_that_is_too_small_gives_a_note(world, labelled, unlabelled, small, capsys, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    assert too_small(torch.arange(labelled), torch.arange(unlabelled), 8) is small
    note = f"the split is {labelled} labelled and {unlabelled} unlabelled samples\n"
    text = capsys.readouterr().out
    assert text.endswith(note) if small else text == ""
