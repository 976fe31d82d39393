"""What DivideMix gives to three papers, in the code of each: clean probabilities by small losses, and sharpening."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from common.runs.cli import UserError
from manifold_dividemix import mixematch
from manifold_dividemix import selection as manifold
from sanm import mixmatch as sanm_mixmatch
from sanm import selection as sanm
from sfa import mixmatch as sfa_mixmatch
from sfa import small_loss as sfa

SELECTIONS = {"sfa": sfa, "sanm": sanm, "manifold_dividemix": manifold}
each_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
EXTREMES = {
    "one high": torch.cat([torch.zeros(99), torch.ones(1)]),
    "one low": torch.cat([torch.zeros(1), torch.ones(99)]),
    "half": torch.cat([torch.zeros(50), torch.ones(50)]),
    "equal": torch.full((100,), 2.3),
    "nearly equal": 2.3 + torch.linspace(0, 1e-6, 100),
    "close": torch.tensor([0, 1e-8, 1e-7]),
    "huge": torch.linspace(0, 3e38, 100),
    "one huge": torch.tensor([0, 0, 1e30]),
    "two": torch.tensor([0.0, 1.0]),
    "two equal": torch.zeros(2),
    "one": torch.ones(1),
    "one far": torch.cat([torch.linspace(0, 1e-6, 99), torch.ones(1)]),
}


def clean_probability(selection, losses: torch.Tensor, seed: int) -> torch.Tensor:
    """Of raw losses; SANM's takes them normalised."""
    return selection.clean_probability(selection.normalised(losses) if selection is sanm else losses, seed)


@each_selection
def test_losses_are_scaled_to_0_and_1_whatever_their_unit(selection):
    losses = torch.tensor([2.0, 4.0, 3.0, 2.5])
    assert selection.normalised(losses).tolist() == [0, 1, 0.5, 0.25]
    torch.testing.assert_close(selection.normalised(7 * losses + 3), selection.normalised(losses))
    assert selection.normalised(torch.tensor([0.1, 1e30])).tolist() == [0, 1]
    assert losses.tolist() == [2, 4, 3, 2.5]
    for value in (0.0, 2.3, 1e30):  # equal ones are all zero
        assert selection.normalised(torch.full((5,), value)).tolist() == [0] * 5


@pytest.mark.filterwarnings("ignore:.*did not converge")
@each_selection
def test_the_probability_is_that_of_scikit_learns_mixture_and_of_the_smaller_losses(selection):
    """With DivideMix's settings; Manifold DivideMix has 20 iterations. Without a gap the fit is cut short: its start matters."""
    skewed = 7 * torch.rand(300, generator=torch.Generator().manual_seed(9)) ** 6 + 2
    two_kinds = torch.cat([torch.ones(150), torch.full((50,), 5.0)])
    two_kinds += 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    settings = {"max_iter": 20 if selection is manifold else 10, "tol": 1e-2, "reg_covar": 5e-4}
    for losses in (skewed, two_kinds):
        column = ((losses - losses.min()) / (losses.max() - losses.min())).numpy().reshape(-1, 1)
        before, seen = losses.clone(), set()
        for seed in (0, 1, 7, 2**31 - 1):
            mixture = GaussianMixture(2, random_state=seed, **settings).fit(column)
            expected = mixture.predict_proba(column)[:, mixture.means_.argmin()]
            found = clean_probability(selection, losses, seed)
            assert found.dtype == torch.float64 and not found.requires_grad
            assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
            seen.add(tuple(found.tolist()))
        assert torch.equal(losses, before) and (losses is two_kinds or len(seen) > 1)
    assert found[:150].min() > 0.9 and found[150:].max() < 0.1


@each_selection
def test_the_seed_decides_and_the_global_generators_do_not(selection):
    losses = torch.rand(300, generator=torch.Generator().manual_seed(4))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = clean_probability(selection, losses, 1)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(5)
    assert torch.equal(clean_probability(selection, losses, 1), first)


@pytest.mark.filterwarnings("error")
@each_selection
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_losses_give_probabilities_without_a_warning(selection, name):
    losses = EXTREMES[name]
    if selection is sanm and len(losses) == 1:
        return  # one sample cannot be divided
    clean = clean_probability(selection, losses, 0)
    assert clean.shape == losses.shape and torch.isfinite(clean).all() and clean.dtype == torch.float64
    assert clean.min() >= 0 and clean.max() <= 1
    if ("equal" in name and "nearly" not in name) or name == "one":  # every sample is as clean as any
        assert len(clean.unique()) == 1 and (selection is sanm or (clean == 1).all())
    if name in ("one high", "one low", "half", "two", "one far", "one huge"):  # the lower ones are clean
        assert (clean > 0.5).tolist() == (losses < 0.5).tolist()
    if selection is sanm:
        for threshold in (0.0, 0.5, 1.0):
            assert 0 < sanm.divide(clean, threshold).sum() < len(losses)


@each_selection
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_are_an_error_in_one_line(selection, value):
    with pytest.raises(UserError, match="not finite: lower --lr") as error:
        clean_probability(selection, torch.tensor([0.5, value, 3.0]), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sharpen", [sfa_mixmatch.sharpen, sanm_mixmatch.sharpen, mixematch.sharpen])
def test_sharpening_is_the_plain_formula_makes_no_nan_and_refuses_no_temperature(sharpen):
    rows = torch.softmax(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    for temperature in (0.25, 0.5, 1.0, 2.0):
        powers = rows.double() ** (1 / temperature)
        expected = (powers / powers.sum(dim=1, keepdim=True)).float()
        torch.testing.assert_close(sharpen(rows, temperature), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(sharpen(torch.eye(4), 0.5), torch.eye(4))
    surest = torch.nn.functional.one_hot(rows.argmax(dim=1), 5).float()
    torch.testing.assert_close(sharpen(rows, 1e-4), surest, atol=1e-3, rtol=0)
    for temperature in (0, -0.5):
        with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
            sharpen(rows, temperature)


@pytest.mark.parametrize("mix", [sfa_mixmatch.mix, sanm_mixmatch.mix, mixematch.mix])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_each_row_is_mixed_with_its_partner_by_the_larger_part(mix, lam):
    rows, permutation = torch.arange(30.0).view(5, 2, 3) ** 2, [3, 0, 4, 1, 2]
    larger = max(lam, 1 - lam)
    expected = torch.stack([larger * rows[i] + (1 - larger) * rows[j] for i, j in enumerate(permutation)])
    torch.testing.assert_close(mix(rows, lam, torch.tensor(permutation)), expected)
    if mix is not mixematch.mix:  # a short permutation mixes the first rows
        torch.testing.assert_close(mix(rows, lam, torch.tensor(permutation[:2])), expected[:2])
