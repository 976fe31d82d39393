"""Observed labels of a data set in memory: drawn, brought along or from a file, for all images or for some."""

import numpy as np
import pytest

from common import noise
from common.datasets import Data, Split, observed_labels
from common.runs.cli import UserError

LABELS = np.arange(40) % 4
SOME = np.array([3, 7, 8, 39])


def data(noisy=None) -> Data:
    images = np.random.default_rng(0).integers(256, size=(40, 4, 4, 1), dtype=np.uint8)
    split = Split(images, LABELS)
    return Data("tiny", split, split, 4, (0.5,), (0.5,), noisy)


@pytest.mark.parametrize("noise_type", ["symmetric", "pairflip", "instance"])
def test_noise_is_drawn_for_all_and_a_subset_has_its_share(noise_type):
    whole = noise.add_noise(noise_type, LABELS, 0.4, 4, 5, data().train.images)
    assert (whole != LABELS).any()
    for index in (np.arange(40), SOME):
        assert np.array_equal(observed_labels(data(), index, noise_type, 0.4, 5), whole[index])


def test_a_file_goes_before_everything_none_is_the_clean_labels_and_given_those_of_the_data_set(tmp_path):
    noisy, file = (LABELS + 1) % 4, str(tmp_path / "labels.npy")
    np.save(file, (LABELS + 2) % 4)
    assert np.array_equal(observed_labels(data(noisy), SOME, "none", 0.4, 5), LABELS[SOME])
    assert np.array_equal(observed_labels(data(noisy), SOME, "given", 0.4, 5), noisy[SOME])
    found = observed_labels(data(), SOME, "symmetric", 0.4, 5, file)
    assert np.array_equal(found, (LABELS[SOME] + 2) % 4)


def test_labels_that_are_not_there_and_noise_for_more_classes_are_errors_that_name_the_flag():
    with pytest.raises(UserError, match=r"^--noise given: tiny brings no noisy_labels; use --noise_file$"):
        observed_labels(data(), SOME, "given", 0.4, 5, flag="--noise")
    with pytest.raises(UserError, match=r"^--noise asymmetric: .*10 classes.*; use another$"):
        observed_labels(data(), SOME, "asymmetric", 0.4, 5, flag="--noise")
