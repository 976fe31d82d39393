"""Label quality and the split. Clean probabilities: test_dividemix.py."""

import numpy as np
import pytest
import torch

from sanm.choices import averages_history
from sanm.selection import divide, estimate_label_quality, remember, split_statistics


def unit(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("rate", "paper", "released"),
    [(0.5, False, False), (0.89, False, False), (0.9, True, True), (0.95, True, False), (1.0, True, False)],
)
def test_the_90_percent_rule_begins_at_90_percent_and_is_for_90_percent_alone_in_the_release(
    rate, paper, released
):
    assert averages_history(rate, released=False) is paper
    assert averages_history(rate, released=True) is released


def test_the_last_five_losses_are_remembered_in_their_order():
    history = []
    for epoch in range(8):
        before = list(history)
        history = remember(history, torch.tensor([float(epoch)]))
        assert [float(of) for of in history] == list(range(max(0, epoch - 4), epoch + 1))
        assert [float(of) for of in before] == [float(of) for of in history[:-1]] or len(before) == 5


@pytest.mark.parametrize("threshold", [0.03, 0.5, 0.9])
def test_above_the_threshold_is_selected_and_at_it_is_not(threshold):
    clean = unit(200, seed=1)
    clean[:3] = torch.tensor([threshold, np.nextafter(threshold, 1), np.nextafter(threshold, 0)])
    selected = divide(clean, threshold)
    assert selected.dtype == torch.bool
    assert selected.tolist() == [p > threshold for p in clean.tolist()]
    assert selected[:3].tolist() == [False, True, False]


def test_the_threshold_is_kept_within_the_range_of_the_probabilities():
    clean = torch.tensor([0.70, 0.8, 0.9, 0.95], dtype=torch.float64)
    assert divide(clean, 0.5).tolist() == [False, True, True, True]
    assert divide(clean - 0.6, 0.5).tolist() == [False, False, False, True]
    # a hundred-thousandth inside: what is nearer to the end than that goes with it
    clean = torch.tensor([0.70, 0.700005, 0.8, 0.9, 0.899995], dtype=torch.float64)
    assert divide(clean, 0.5).tolist() == [False, False, True, True, True]
    assert divide(clean, 0.95).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_of_equal_probabilities_the_last_is_left_and_of_nearly_equal_ones_the_lowest(value, count):
    selected = divide(torch.full((count,), value, dtype=torch.float64), 0.5)
    assert selected.tolist() == [True] * (count - 1) + [False]
    clean = value + 1e-6 * torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    assert divide(clean, 0.5).tolist() == [True, False, True]


@pytest.mark.parametrize("at_least", [1, 2, 5, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.95, 1.0])
def test_each_side_gets_at_least_what_is_asked_and_no_less_clean_sample_is_preferred(threshold, at_least):
    for seed in range(30):
        clean = (torch.linspace(0, 1, 16, dtype=torch.float64) ** (1 + seed % 3))[unit(16, seed).argsort()]
        selected = divide(clean, threshold, at_least)
        assert at_least <= selected.sum() <= 16 - at_least
        assert clean[selected].min() > clean[~selected].max()
        plain = clean > threshold
        if at_least <= plain.sum() <= 16 - at_least:
            assert torch.equal(selected, plain)
        else:  # no more is moved than needed
            assert int(selected.sum()) == (at_least if plain.sum() < at_least else 16 - at_least)


@pytest.mark.parametrize(("count", "at_least"), [(1, 1), (15, 8)])
def test_too_few_for_two_sides_are_refused(count, at_least):
    with pytest.raises(ValueError, match=f"{count} samples .* at least {at_least}"):
        divide(unit(count, 0), 0.5, at_least)


def test_the_statistics_of_a_split_are_those_of_each_network_against_the_right_labels():
    right = torch.tensor([True, True, True, False, False])
    clean = [torch.tensor([0.9, 0.8, 0.2, 0.7, 0.1]), torch.tensor([0.6, 0.4, 0.3, 0.2, 0.1])]
    selected = [probability > 0.5 for probability in clean]
    found = split_statistics(clean, selected, right)
    assert found == pytest.approx(
        {"net1_selected": 3, "net1_auc": 5 / 6, "net1_precision": 2 / 3, "net1_recall": 2 / 3}
        | {"net2_selected": 1, "net2_auc": 1, "net2_precision": 1, "net2_recall": 1 / 3}
    )
    assert split_statistics([], [], right) == dict.fromkeys(found)  # in warm-up
    found = split_statistics(clean, selected, torch.ones(5, dtype=torch.bool))
    assert (found["net1_precision"], found["net1_auc"], found["net1_recall"]) == (1, None, None)


def test_label_quality_is_the_mean_clean_probability_and_what_both_networks_select():
    scores = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 3.0], [0.0, 2.0]]])
    clean = [torch.tensor([0.9, 0.8, 0.2]), torch.tensor([0.6, 0.4, 0.1])]
    found = estimate_label_quality(scores, clean, 0.5, softmax=False)
    assert found.score.tolist() == pytest.approx([0.75, 0.6, 0.15])
    assert found.selected.tolist() == [True, False, False]
    expected = torch.softmax(torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 1.0]]), dim=1)
    torch.testing.assert_close(found.probabilities, expected)
    found = estimate_label_quality(scores / 4, [None, None], 0.5, softmax=True)
    assert found.score is None and found.selected is None
    torch.testing.assert_close(found.probabilities, scores.mean(dim=0) / 4)
