"""The split and the accuracies, against loops over single samples."""

import math
import warnings

import numpy as np
import pytest
import torch

from me_momentum.validation import accuracy, balanced_accuracy, batch_mean_accuracy, split


def drawn(seed: int, size: int = 333, num_classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, and labels of classes that differ much in size."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, num_classes + 1) ** 2.0
    labels = rng.choice(num_classes, size, p=share / share.sum())
    labels[:num_classes] = np.arange(num_classes)
    predicted = np.where(rng.random(size) < 0.3 + 0.1 * labels, labels, rng.integers(num_classes, size=size))
    return torch.from_numpy(predicted), torch.from_numpy(labels)


def balanced_one_by_one(predicted, labels, num_classes: int) -> float:
    hits, counts = [0] * num_classes, [0] * num_classes
    for guess, label in zip(predicted.tolist(), labels.tolist(), strict=True):
        counts[label] += 1
        hits[label] += guess == label
    return sum(100 * h / c for h, c in zip(hits, counts, strict=True)) / num_classes


# the split --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fraction", "sizes"),
    [
        (60000, 0.9, (54000, 6000)),
        (50000, 0.9, (45000, 5000)),
        (1437, 0.9, (1293, 144)),
        (10, 0.85, (8, 2)),
        (2, 0.5, (1, 1)),
        (10, 0.999, (9, 1)),
    ],
)
def test_sizes_of_the_parts(count, fraction, sizes):
    parts = split(count, fraction, 1)
    assert (len(parts.train), len(parts.validation)) == sizes
    assert sorted([*parts.train, *parts.validation]) == list(range(count))
    assert (np.diff(parts.validation) > 0).all()
    assert parts.train.dtype == parts.validation.dtype == np.int64


def test_the_training_part_keeps_the_shuffled_order_of_the_seed():
    parts = split(500, 0.9, 7)
    np.random.seed(7)  # as the release draws: without replacement from the global generator
    assert parts.train.tolist() == np.random.choice(500, 450, replace=False).tolist()
    assert (np.diff(parts.train) < 0).any()


def test_the_split_depends_on_the_seed_alone():
    np.random.seed(0)
    one = split(100, 0.9, 4)
    state = np.random.get_state()[1].tolist()
    two = split(100, 0.9, 4)
    assert np.array_equal(one.train, two.train) and np.array_equal(one.validation, two.validation)
    assert np.random.get_state()[1].tolist() == state
    assert not np.array_equal(one.train, split(100, 0.9, 5).train)


@pytest.mark.parametrize(
    ("count", "fraction"), [(100, 0.0), (100, 1.0), (5, 0.1), (1, 0.9), (0, 0.9), (100, 1.5), (100, -0.1)]
)
def test_a_part_without_any_image_is_an_error_that_names_share_and_size(count, fraction):
    with pytest.raises(ValueError, match=f"{fraction} of {count} images"):
        split(count, fraction, 1)


# balanced accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_balanced_accuracy_is_that_of_a_loop_over_samples_rounded_to_two_decimals(seed):
    predicted, labels = drawn(seed)
    exact, found = balanced_one_by_one(predicted, labels, 6), balanced_accuracy(predicted, labels, 6)
    assert found == pytest.approx(exact, abs=0.005 + 1e-9)
    assert found == round(found, 2) and type(found) is float
    # the mean over samples is another number
    assert abs(found - accuracy(predicted, labels)) > 1


def test_every_class_weighs_the_same_however_few_there_are_of_it():
    labels = torch.tensor([0] * 98 + [1, 2])
    assert balanced_accuracy(torch.zeros(100, dtype=torch.int64), labels, 3) == 33.33
    assert balanced_accuracy(labels, labels, 3) == 100
    assert balanced_accuracy((labels + 1) % 3, labels, 3) == 0


def test_labels_count_by_their_own_class_and_not_by_the_predicted_one():
    # class 0: one of four, class 1: one of one
    labels, predicted = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 1, 1, 1])
    assert balanced_accuracy(predicted, labels, 2) == 62.5


def test_an_absent_class_makes_it_nan_without_a_warning():
    labels = torch.tensor([0, 0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(balanced_accuracy(labels, labels, 3))
        assert math.isnan(balanced_accuracy(labels[:2], labels[:2], 2))
        assert math.isnan(balanced_accuracy(torch.tensor([1, 1, 1]), labels, 3))


def test_two_classes_are_enough():
    labels = torch.tensor([0, 1, 1])
    assert balanced_accuracy(torch.tensor([0, 1, 0]), labels, 2) == 75


# test accuracies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 10, 64, 100, 333, 1000])
def test_the_mean_over_batches_is_that_of_a_loop_over_batches(size):
    predicted, labels = drawn(2)
    hits = [float(p == label) for p, label in zip(predicted.tolist(), labels.tolist(), strict=True)]
    means = [100 * sum(hits[i : i + size]) / len(hits[i : i + size]) for i in range(0, len(hits), size)]
    assert batch_mean_accuracy(predicted, labels, size) == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert accuracy(predicted, labels) == pytest.approx(100 * sum(hits) / len(hits), rel=1e-12)


def test_a_short_last_batch_counts_like_the_others():
    labels = torch.zeros(5, dtype=torch.int64)
    predicted = torch.tensor([0, 0, 0, 1, 1])
    assert accuracy(predicted, labels) == pytest.approx(60)
    assert batch_mean_accuracy(predicted, labels, 4) == pytest.approx((75 + 0) / 2)
    assert batch_mean_accuracy(predicted, labels, 5) == pytest.approx(60)
    assert batch_mean_accuracy(predicted, labels, 256) == pytest.approx(60)


def test_mnists_last_batch_of_16_weighs_as_much_as_256():
    labels = torch.zeros(10_000, dtype=torch.int64)
    predicted = labels.clone()
    predicted[-16:] = 1
    assert accuracy(predicted, labels) == pytest.approx(99.84)
    assert batch_mean_accuracy(predicted, labels, 256) == pytest.approx(97.5)
