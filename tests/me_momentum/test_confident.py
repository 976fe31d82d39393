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


def confident_one_by_one(predicted, observed) -> list[int]:
    return [i for i in range(len(observed)) if predicted[i] == observed[i]]


def statistics_one_by_one(confident, right, first) -> dict:
    def share(part, whole):
        return len(part) / len(whole) if len(whole) else None

    kept = [i for i in confident if right[i]]
    hard = [i for i in confident if i not in set(first)]
    return {
        "confident_size": len(confident),
        "confident_share": share(confident, right),
        "confident_precision": share(kept, confident),
        "confident_recall": share(kept, [i for i in range(len(right)) if right[i]]),
        "hard_share": share(hard, confident),
        "hard_precision": share([i for i in hard if right[i]], hard),
    }


def statistics(confident, right, first) -> dict:
    confident, first = (torch.tensor(list(positions), dtype=torch.int64) for positions in (confident, first))
    return set_statistics(confident, torch.tensor(right, dtype=torch.bool), first)


@pytest.mark.parametrize("seed", range(5))
def test_confident_examples_are_those_predicted_as_observed_in_ascending_order(seed):
    _, observed, predicted = drawn(seed)
    found = confident_examples(torch.from_numpy(predicted), torch.from_numpy(observed))
    assert found.dtype == torch.int64
    assert found.tolist() == confident_one_by_one(predicted, observed)
    assert 0 < len(found) < len(observed)


def test_all_some_one_or_none_may_be_confident():
    labels = torch.tensor([2, 0, 1])
    assert confident_examples(labels, labels).tolist() == [0, 1, 2]
    assert confident_examples(torch.tensor([1, 1, 1]), labels).tolist() == [2]
    none = confident_examples((labels + 1) % 3, labels)
    assert none.shape == (0,) and none.dtype == torch.int64
    assert confident_examples(labels[:0], labels[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
def test_statistics_are_those_of_a_loop_over_samples(seed):
    clean, observed, predicted = drawn(seed)
    confident = confident_one_by_one(predicted, observed)
    first = confident_one_by_one(drawn(seed + 100)[2], observed)
    found = statistics(confident, clean == observed, first)
    assert found == pytest.approx(statistics_one_by_one(confident, clean == observed, first))
    assert 0 < found["hard_share"] < 1 and 0 < found["hard_precision"] < 1
    assert 0 < found["confident_recall"] < found["confident_precision"] < 1


def test_of_the_first_set_nothing_is_hard():
    clean, observed, predicted = drawn(0)
    confident = confident_one_by_one(predicted, observed)
    found = statistics(confident, clean == observed, confident)
    assert found["hard_share"] == 0 and found["hard_precision"] is None


def test_hard_examples_are_new_ones_and_not_those_that_left():
    right = [True, True, False, True, False]
    found = statistics([1, 3, 4], right, [0, 1, 2])
    assert found["hard_share"] == 2 / 3 and found["hard_precision"] == 1 / 2
    assert found["confident_precision"] == 2 / 3 and found["confident_recall"] == 2 / 3
    assert statistics([], right, [])["hard_share"] is None


def test_nothing_is_said_of_an_empty_set_or_where_no_label_is_right():
    nothing = {"confident_size": 0, "confident_share": 0, "confident_precision": None}
    nothing |= {"confident_recall": 0, "hard_share": None, "hard_precision": None}
    assert statistics([], [True, False], [0]) == nothing
    found = statistics([0, 1], [False, False], [0])
    assert found["confident_recall"] is None
    assert found["confident_precision"] == 0 and found["hard_precision"] == 0


def test_the_numbers_are_pythons_own_and_the_arguments_stay_as_they_are():
    confident, first = torch.tensor([0, 2, 3]), torch.tensor([0, 1])
    right = torch.tensor([True, False, True, True])
    found = set_statistics(confident, right, first)
    assert {type(value) for value in found.values()} == {int, float}
    assert right.tolist() == [True, False, True, True]
    assert confident.tolist() == [0, 2, 3] and first.tolist() == [0, 1]


def test_the_statistics_are_the_columns_of_the_log():
    assert tuple(statistics([0], [True], [0])) == SET_COLUMNS


def test_the_growth_of_the_sets_is_from_the_first_to_the_last():
    found = set_growth([(0.25, 0.9), (0.5, 0.95), (0.5, 0.85), (0.75, 0.875)])
    assert found == pytest.approx(
        {"confident_growth": 0.5, "confident_precision_change": -0.025, "confident_grew": 2 / 3}
    )
    assert set_growth([(0.25, 0.9), (0, None)])["confident_precision_change"] is None
    for few in ([], [(0.25, 0.9)]):
        assert set(set_growth(few).values()) == {None}
