"""Stochastic feature averaging where the recorded cases do not go: guards and state."""

import ast
import math
from pathlib import Path

import pytest
import torch

from common.gpu.mixture import sklearn_upper_posterior, upper_posterior
from common.runs.cli import UserError
from sfa import selection, small_loss
from sfa.selection import Moments, incoming_moments, stochastic_feature_averaging

NUM_CLASSES, SIZE, DIM = 4, 200, 8


def features_of(labels: torch.Tensor, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    """Features around one direction per label."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(DIM)[: int(labels.max()) + 1]
    return directions[labels] + spread * torch.randn(len(labels), DIM, generator=generator)


def average(labels, confidence, moments=None, *, features=None, num_classes=NUM_CLASSES, **options):
    """The selection with its settings filled in."""
    features = features_of(labels) if features is None else features
    draws = options.pop("draws", 1)
    normals = torch.randn(draws, num_classes, features.shape[1], generator=torch.Generator().manual_seed(1))
    settings = {"threshold": 0.5, "beta": 0.99, "min_draw_count": 10, "normals": normals.double()} | options
    return stochastic_feature_averaging(features, labels, confidence, moments, **settings)


@pytest.fixture
def labels():
    return torch.arange(SIZE) % NUM_CLASSES


def test_without_any_confident_sample_the_first_centroids_are_those_of_all_samples(labels):
    found = average(labels, torch.zeros(SIZE))
    unit = selection.centred_unit_features(features_of(labels))
    expected = torch.stack([unit[labels == k].double().mean(0) for k in range(NUM_CLASSES)])
    torch.testing.assert_close(found.moments.mean, expected)
    assert found.selected.any() and not found.drawn.any()
    assert torch.isfinite(found.clean).all()


@pytest.mark.parametrize("lost", [[2], [0, 1, 2, 3]])
def test_classes_that_lose_their_confident_samples_keep_their_moments_and_the_others_move(lost, labels):
    first = average(labels, torch.ones(SIZE)).moments
    confidence = (~torch.isin(labels, torch.tensor(lost))).float()
    second = average(labels, confidence, first, features=features_of(labels, seed=5)).moments
    for before, after in zip(first, second, strict=True):
        assert (before == after).all(dim=1).nonzero()[:, 0].tolist() == lost


def test_zeros_handed_in_as_moments_are_no_moments_to_keep(labels):
    """The release starts every later epoch from zeros; a class without confident samples then needs a centroid as well."""
    zeros = Moments(*(torch.zeros(NUM_CLASSES, DIM, dtype=torch.float64) for _ in range(2)))
    found = average(labels, (labels != 2).float(), zeros)
    assert found.moments.mean[2].norm() > 0


def test_a_class_with_one_sample_is_clean_and_a_class_with_none_is_harmless():
    labels = torch.tensor([0] * 50 + [1] * 50 + [3])
    found = average(labels, torch.ones(101), features=features_of(labels))
    assert found.clean[100] == 1 and found.selected[100]
    assert found.counts[2] == 0 and found.counts[3] == 1
    assert torch.isfinite(found.clean).all() and torch.isfinite(found.moments.mean).all()


def test_equal_scores_are_all_clean_and_a_feature_equal_to_the_mean_is_finite():
    labels = torch.zeros(20, dtype=torch.long)
    probability = selection.clean_probability(torch.full((20,), -1.5), labels, NUM_CLASSES)
    assert torch.equal(probability, torch.ones(20, dtype=torch.float64))
    features = torch.stack([torch.ones(3), -torch.ones(3), torch.zeros(3)])
    assert torch.isfinite(selection.centred_unit_features(features)).all()


def test_a_class_missing_from_the_labels_does_not_shift_the_others():
    labels = torch.tensor([0, 0, 2, 2, 3, 3])
    unit = torch.arange(12.0).reshape(6, 2)
    means, counts = selection.class_means(unit, labels, torch.ones(6, dtype=torch.bool), NUM_CLASSES)
    assert counts.tolist() == [2, 0, 2, 2]
    assert means[2].tolist() == [5, 6] and means[1].tolist() == [0, 0]


def test_only_classes_above_min_draw_count_are_drawn_and_all_if_it_is_0(labels):
    confidence = torch.ones(SIZE)
    confidence[(labels == 1).nonzero()[10:, 0]] = 0  # leaves ten, which is not more than ten
    assert average(labels, confidence, min_draw_count=10).drawn.tolist() == [True, False, True, True]
    assert average(labels, torch.zeros(SIZE), min_draw_count=0).drawn.all()


def test_the_state_handed_in_is_not_changed(labels):
    moments = average(labels, torch.ones(SIZE)).moments
    before = [tensor.clone() for tensor in moments]
    average(labels, torch.ones(SIZE), moments, draws=3)
    assert all(torch.equal(a, b) for a, b in zip(before, moments, strict=True))


def test_clean_samples_are_found_where_features_tell_them_apart():
    generator = torch.Generator().manual_seed(3)
    true = torch.arange(400) % NUM_CLASSES
    wrong = torch.rand(400, generator=generator) < 0.4
    flips = 1 + torch.randint(3, (400,), generator=generator)
    observed = torch.where(wrong, (true + flips) % NUM_CLASSES, true)
    features, confidence = features_of(true, spread=0.05), torch.where(wrong, 0.1, 0.9)
    for posterior in (upper_posterior, sklearn_upper_posterior):
        found = average(observed, confidence, features=features, posterior=posterior)
        assert torch.equal(found.selected, ~wrong)
        assert torch.equal(found.counts, torch.bincount(observed[~wrong], minlength=NUM_CLASSES))


def test_moments_are_handed_on_or_begin_from_zeros_as_in_the_release_on_the_device_asked_for():
    cpu, before = torch.device("cpu"), Moments(torch.rand(2, 3).double(), torch.rand(2, 3).double())
    for mode in ("persist", "released"):
        assert incoming_moments(None, mode, cpu) is None
        # a list of two, as it comes out of a checkpoint
        moments = incoming_moments([moment.clone() for moment in before], mode, cpu)
        assert isinstance(moments, Moments)
        for own, earlier in zip(moments, before, strict=True):
            assert torch.equal(own, earlier if mode == "persist" else torch.zeros_like(earlier))
        moved = incoming_moments(before, mode, torch.device("meta"))
        assert [moment.device.type for moment in moved] == ["meta", "meta"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_features_that_are_not_finite_or_whose_squares_are_not_are_refused(labels, value):
    features = features_of(labels)
    features[3, 2] = value
    with pytest.raises(UserError, match="features of training samples are not finite: lower --lr"):
        average(labels, torch.ones(SIZE), features=features)


@pytest.mark.parametrize("module", [selection, small_loss])
def test_a_selection_needs_no_network_and_no_script(module):
    tree = ast.parse(Path(module.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in modules if name.startswith("sfa")]
