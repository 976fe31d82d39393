"""Confident examples and what is said about them, against loops over single samples."""

import numpy as np
import pytest
import torch

from me_momentum.confident import SET_COLUMNS, confident_examples, set_growth, set_statistics


def drawn(seed: int, size: int = 200, num_classes: int = 7) -> tuple[np.ndarray, ...]:
    """True labels, observed ones, and predictions that are often one or the other."""
    rng = np.random.default_rng(seed)
    clean, wrong, guess = rng.integers(num_classes, size=(3, size))
    observed = np.where(rng.random(size) < 0.4, wrong, clean)
    kind = rng.random(size)
    return clean, observed, np.where(kind < 0.5, clean, np.where(kind < 0.6, observed, guess))


def statistics(confident, right, first) -> dict:
    confident, first = (torch.tensor(list(positions), dtype=torch.int64) for positions in (confident, first))
    return set_statistics(confident, torch.tensor(right, dtype=torch.bool), first, len(right))


def test_confident_examples_are_those_predicted_as_observed_in_ascending_order():
    _, observed, predicted = drawn(0)
    found = confident_examples(torch.from_numpy(predicted), torch.from_numpy(observed))
    assert found.dtype == torch.int64 and 0 < len(found) < 200
    assert found.tolist() == [i for i in range(200) if predicted[i] == observed[i]]
    labels = torch.tensor([2, 0, 1])
    none = confident_examples((labels + 1) % 3, labels)
    assert none.shape == (0,) and none.dtype == torch.int64


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_those_of_a_loop_over_samples(seed):
    clean, observed, predicted = drawn(seed)
    other, right = drawn(seed + 100)[2], clean == observed
    confident, first = ([i for i in range(200) if of[i] == observed[i]] for of in (predicted, other))
    hard = [i for i in confident if i not in first]
    found = statistics(confident, right, first)
    expected = {
        "confident_size": len(confident),
        "confident_share": len(confident) / 200,
        "confident_precision": np.mean([right[i] for i in confident]),
        "confident_recall": sum(right[i] for i in confident) / sum(right),
        "hard_share": len(hard) / len(confident),
        "hard_precision": np.mean([right[i] for i in hard]),
    }
    assert found == pytest.approx(expected) and tuple(found) == SET_COLUMNS
    assert 0 < found["hard_share"] < 1 and 0 < found["hard_precision"] < 1
    assert {type(value) for value in found.values()} == {int, float}


@pytest.mark.parametrize(
    ("confident", "right", "first", "expected"),
    [
        ([1, 3, 4], [1, 1, 0, 1, 0], [0, 1, 2], (3, 3 / 5, 2 / 3, 2 / 3, 2 / 3, 1 / 2)),  # new ones are hard
        ([1, 3], [1, 1, 0, 1], [1, 3], (2, 1 / 2, 1, 2 / 3, 0, None)),
        ([], [1, 0], [0], (0, 0, None, 0, None, None)),
        ([0, 1], [0, 0], [0], (2, 1, 0, None, 1 / 2, 0)),
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_take_a_share_of(confident, right, first, expected):
    assert tuple(statistics(confident, right, first).values()) == pytest.approx(expected)


def test_the_growth_of_the_sets_is_from_the_first_to_the_last():
    found = set_growth([(0.25, 0.9), (0.5, 0.95), (0.5, 0.85), (0.75, 0.875)])
    assert found == pytest.approx(
        {"confident_growth": 0.5, "confident_precision_change": -0.025, "confident_grew": 2 / 3}
    )
    assert set_growth([(0.25, 0.9), (0, None)])["confident_precision_change"] is None
    for few in ([], [(0.25, 0.9)]):
        assert set(set_growth(few).values()) == {None}
