"""Confident examples and what is said about them."""

import pytest
import torch

from me_momentum.confident import SET_COLUMNS, confident_examples, set_growth, set_statistics


def test_confident_examples_are_those_predicted_as_observed_in_ascending_order():
    labels = torch.tensor([2, 0, 1, 1])
    assert confident_examples(torch.tensor([2, 1, 0, 1]), labels).tolist() == [0, 3]
    none = confident_examples((labels + 1) % 3, labels)
    assert none.shape == (0,) and none.dtype == torch.int64


@pytest.mark.parametrize(
    ("confident", "right", "first", "expected"),
    [
        ([1, 3, 4, 6, 7], [1, 1, 0, 1, 0, 1, 1, 1, 1], [1, 3], (5, 5 / 9, 4 / 5, 4 / 7, 3 / 5, 2 / 3)),
        ([1, 3, 4], [1, 1, 0, 1, 0], [0, 1, 2], (3, 3 / 5, 2 / 3, 2 / 3, 2 / 3, 1 / 2)),
        ([1, 3], [1, 1, 0, 1], [1, 3], (2, 1 / 2, 1, 2 / 3, 0, None)),
        ([], [1, 0], [0], (0, 0, None, 0, None, None)),
        ([0, 1], [0, 0], [0], (2, 1, 0, None, 1 / 2, 0)),
    ],
)
def test_shares_of_a_set_of_right_labels_and_of_hard_examples(confident, right, first, expected):
    confident, first = (torch.tensor(positions, dtype=torch.int64) for positions in (confident, first))
    found = set_statistics(confident, torch.tensor(right, dtype=torch.bool), first, len(right))
    assert tuple(found.values()) == pytest.approx(expected) and tuple(found) == SET_COLUMNS
    assert {type(value) for value in found.values()} <= {int, float, type(None)}


def test_the_growth_of_the_sets_is_from_the_first_to_the_last():
    found = set_growth([(0.25, 0.9), (0.5, 0.95), (0.5, 0.85), (0.75, 0.875)])
    assert list(found) == ["confident_growth", "confident_precision_change", "confident_grew"]
    assert [*found.values()] == pytest.approx([0.5, -0.025, 2 / 3])
    assert set_growth([(0.25, 0.9), (0, None)])["confident_precision_change"] is None
    for few in ([], [(0.25, 0.9)]):
        assert set(set_growth(few).values()) == {None}
