"""The split. Clean probabilities: test_dividemix.py."""

import numpy as np
import pytest
import torch

from common.gpu import processes
from manifold_dividemix.selection import divide, too_small


@pytest.mark.parametrize("threshold", [0.03, 0.3, 0.9])
def test_above_the_threshold_is_labelled_and_at_it_is_not_and_removed_samples_are_on_neither_side(threshold):
    clean = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clean[:3] = torch.tensor([threshold, np.nextafter(threshold, 1), np.nextafter(threshold, 0)])
    kept = torch.arange(200) % 7 != 3
    labelled, unlabelled = divide(clean, kept, threshold)
    assert labelled.dtype == unlabelled.dtype == torch.int64
    rows = [(i, p) for i, p in enumerate(clean.tolist()) if i % 7 != 3]
    assert labelled.tolist() == [i for i, p in rows if p > threshold] and 1 in labelled
    assert unlabelled.tolist() == [i for i, p in rows if not p > threshold] and {0, 2} < {
        *unlabelled.tolist()
    }
    nothing = divide(clean, torch.zeros_like(kept), threshold)
    assert [side.shape for side in nothing] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("world", "labelled", "unlabelled", "small"),
    [
        *((1, 0, 9, True), (1, 9, 0, True), (1, 9, 1, True), (1, 1, 2, False), (1, 9, 9, False)),
        # several processes need a whole batch on each side
        *((2, 7, 8, True), (2, 8, 7, True), (2, 8, 8, False)),
    ],
)
def test_a_side_that_is_too_small_gives_a_note(world, labelled, unlabelled, small, capsys, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    assert too_small(torch.arange(labelled), torch.arange(unlabelled), 8) is small
    note = f"the split is {labelled} labelled and {unlabelled} unlabelled samples\n"
    text = capsys.readouterr().out
    assert text.endswith(note) if small else text == ""
