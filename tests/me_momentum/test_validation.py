"""The split and the accuracies where the recorded cases do not go."""

import math
import warnings

import numpy as np
import pytest
import torch

from me_momentum.validation import accuracy, balanced_accuracy, batch_mean_accuracy, split


@pytest.mark.parametrize(
    ("count", "fraction", "sizes"),
    [(60000, 0.9, (54000, 6000)), (1437, 0.9, (1293, 144)), (10, 0.85, (8, 2)), (2, 0.5, (1, 1))],
)
def test_the_training_part_keeps_the_shuffled_order_of_the_seed_alone(count, fraction, sizes):
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    parts = split(count, fraction, 7)
    assert np.random.get_state()[1].tolist() == state
    assert (len(parts.train), len(parts.validation)) == sizes
    assert sorted([*parts.train, *parts.validation]) == list(range(count))
    assert (np.diff(parts.validation) > 0).all()
    assert parts.train.tolist() == np.random.RandomState(7).choice(count, sizes[0], replace=False).tolist()


@pytest.mark.parametrize(("count", "fraction"), [(100, 1.0), (5, 0.1), (1, 0.9), (100, 1.5), (100, -0.1)])
def test_a_part_without_any_image_is_an_error_that_names_share_and_size(count, fraction):
    with pytest.raises(ValueError, match=f"{fraction} of {count} images"):
        split(count, fraction, 1)


def test_labels_count_by_their_own_class_and_not_by_the_predicted_one():
    # class 0: one of four, class 1: one of one, class 2: two of three
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 1, 2, 2, 0])
    found = balanced_accuracy(predicted, labels, 3)
    assert found == 63.89 and type(found) is float
    assert accuracy(predicted, labels) == 50


def test_an_absent_class_makes_it_nan_without_a_warning():
    labels = torch.tensor([0, 0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(balanced_accuracy(labels, labels, 3))
        assert math.isnan(balanced_accuracy(labels[:2], labels[:2], 2))
        assert math.isnan(balanced_accuracy(torch.tensor([1, 1, 1]), labels, 3))


def test_a_short_last_batch_counts_like_the_others():
    labels, predicted = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 0, 0, 1, 1])
    assert accuracy(predicted, labels) == pytest.approx(60)
    for size, expected in ((4, (75 + 0) / 2), (5, 60), (256, 60), (2, (100 + 50 + 0) / 3)):
        assert batch_mean_accuracy(predicted, labels, size) == pytest.approx(expected)
