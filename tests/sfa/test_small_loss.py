"""Selection by small losses. Clean probabilities: test_dividemix.py."""

import torch

from sfa.small_loss import divide

NUM_CLASSES = 4


def test_above_the_threshold_is_selected_and_counted_by_observed_class():
    clean = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 2, 2])
    for threshold, counts in ((0.5, [1, 0, 2, 0]), (0.7, [0, 0, 2, 0]), (0.0, [3, 0, 2, 0]), (1.0, [0] * 4)):
        split = divide(clean, labels, NUM_CLASSES, threshold)
        assert split.selected.tolist() == [value > threshold for value in clean.tolist()]
        assert split.counts.tolist() == counts and torch.equal(split.clean, clean)
