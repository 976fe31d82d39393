"""--limit_test: a seeded subset of the test images, stratified by class, and all of them beside it."""

import numpy as np
import pytest
import torch

from common import datasets
from common.gpu.loader import test_batches as batches_of
from common.runs import cli

LABELS = np.repeat([0, 1, 2], [60, 30, 10])[np.random.default_rng(0).permutation(100)]


def test_each_class_keeps_its_proportion_and_the_seed_decides_who():
    kept = [datasets.limited_test(LABELS, 20, seed) for seed in (1, 1, 2)]
    assert np.bincount(LABELS[kept[0]]).tolist() == [12, 6, 2]
    assert (np.diff(kept[0]) > 0).all()
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])
    for limit in range(1, 100):
        counts = np.bincount(LABELS[datasets.limited_test(LABELS, limit, 1)], minlength=3)
        assert counts.sum() == limit and np.abs(counts - limit * np.array([0.6, 0.3, 0.1])).max() <= 1


@pytest.mark.parametrize("limit", [None, 100, 1000])
def test_where_as_many_are_asked_for_all_are_taken(limit):
    assert datasets.limited_test(LABELS, limit, 1).tolist() == list(range(100))


def test_the_batches_are_of_the_subset_and_of_all():
    data = datasets.load("digits")
    tests = batches_of(data, 50, 3, 32, torch.device("cpu"))
    kept = datasets.limited_test(data.test.labels, 50, 3)
    assert tests.limited.labels.tolist() == data.test.labels[kept].tolist()
    assert tests.whole.labels.tolist() == data.test.labels.tolist()
    few, every = (torch.cat([views[0] for views, _ in tested.batches]) for tested in tests)
    assert torch.equal(few, every[kept]) and len(every) == 360
    same = batches_of(data, None, 3, 32, torch.device("cpu"))
    assert same.limited is same.whole


def test_a_full_test_at_the_end_is_for_limited_tests(capsys):
    parser = cli.Parser(prog="script.py")
    cli.add_shared_flags(parser, default_seed=1)
    assert cli.parse_args(parser, ["--limit_test", "5", "--full_test_at_end"], None).full_test_at_end
    with pytest.raises(SystemExit) as stop:
        cli.parse_args(parser, ["--full_test_at_end"], None)
    assert stop.value.code == 2
    assert "argument --full_test_at_end: without --limit_test" in capsys.readouterr().err
