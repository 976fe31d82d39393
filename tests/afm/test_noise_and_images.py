"""Which kinds of label noise an attention on features can detect at all: a detector that is trained on the answer."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from common import datasets
from common.datasets.posterior import posterior_for


@pytest.mark.parametrize(
    ("noise_type", "rate", "low", "high"),
    [
        ("symmetric", 0.5, 0.42, 0.58),
        ("instance", 0.4, 0.42, 0.58),
        ("margin1", 0.4, 0.7, 1),
        ("hard", 0.4, 0.8, 1),
    ],
)
def test_what_a_supervised_detector_of_wrong_labels_finds_in_the_images(noise_type, rate, low, high):
    """The detector sees the image alone: 30 nearest neighbours on pixels, 5 folds, told which other labels are wrong."""
    data = datasets.load("digits", "./data")
    train, every = data.train, np.arange(len(data.train.labels))
    posterior = posterior_for(noise_type, data, "./no_such_folder")
    observed = datasets.observed_labels(data, every, noise_type, rate, 1, posterior=posterior)
    right = observed == train.labels
    pixels = train.images.reshape(len(train.images), -1)
    found = cross_val_predict(KNeighborsClassifier(30), pixels, right, cv=5, method="predict_proba")[:, 1]
    assert low < roc_auc_score(right, found) < high
