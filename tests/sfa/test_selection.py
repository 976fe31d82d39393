"""Stochastic feature averaging where the recorded cases do not go: guards, the fast steps against plain ones, state."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.gpu.mixture import sklearn_upper_posterior, upper_posterior
from common.runs import checkpoint
from common.runs.cli import UserError
from sfa import selection, small_loss
from sfa.selection import Moments, Selection, incoming_moments, stochastic_feature_averaging

NUM_CLASSES, SIZE, DIM = 4, 200, 8


def features_of(labels: torch.Tensor, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    """Features around one direction per label."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(DIM)[: int(labels.max()) + 1]
    return directions[labels] + spread * torch.randn(len(labels), DIM, generator=generator)


def average(labels, confidence, moments=None, *, features=None, num_classes=NUM_CLASSES, **options):
    """The whole selection with its settings filled in."""
    features = features_of(labels) if features is None else features
    draws = options.pop("draws", 1)
    normals = torch.randn(draws, num_classes, features.shape[1], generator=torch.Generator().manual_seed(1))
    settings = {"threshold": 0.5, "beta": 0.99, "min_draw_count": 10} | options
    return stochastic_feature_averaging(
        features, labels, confidence, moments, normals=normals.double(), **settings
    )


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


def test_without_any_confident_sample_later_moments_carry_on(labels):
    first = average(labels, torch.ones(SIZE)).moments
    second = average(labels, torch.zeros(SIZE), first, features=features_of(labels, seed=5)).moments
    assert torch.equal(first.mean, second.mean) and torch.equal(first.square, second.square)


def test_a_class_that_loses_its_confident_samples_keeps_its_moments_and_the_others_move(labels):
    first = average(labels, torch.ones(SIZE)).moments
    confidence = (labels != 2).float()
    second = average(labels, confidence, first, features=features_of(labels, seed=5)).moments
    same = (first.mean == second.mean).all(dim=1)
    assert same.tolist() == [False, False, True, False]


def test_zeros_handed_in_as_moments_are_no_moments_to_keep(labels):
    """The release starts every later epoch from zeros; a class without confident samples then needs a centroid as well."""
    zeros = Moments(*(torch.zeros(NUM_CLASSES, DIM, dtype=torch.float64) for _ in range(2)))
    found = average(labels, (labels != 2).float(), zeros)
    assert found.moments.mean[2].norm() > 0


def test_one_confident_sample_makes_a_centroid(labels):
    confidence = torch.zeros(SIZE)
    confidence[7] = 1
    found = average(labels, confidence)
    unit = selection.centred_unit_features(features_of(labels))
    torch.testing.assert_close(found.moments.mean[int(labels[7])], unit[7].double())
    assert int(found.confident_counts.sum()) == 1


def test_a_class_with_one_sample_is_clean_and_a_class_with_none_is_harmless():
    labels = torch.cat(
        [torch.zeros(50, dtype=torch.long), torch.ones(50, dtype=torch.long), torch.tensor([3])]
    )
    found = average(labels, torch.ones(101), features=features_of(labels))
    assert found.clean[100] == 1 and found.selected[100]
    assert found.counts[2] == 0 and found.counts[3] == 1
    assert torch.isfinite(found.clean).all() and torch.isfinite(found.moments.mean).all()


def test_equal_scores_are_all_clean():
    labels = torch.zeros(20, dtype=torch.long)
    probability = selection.clean_probability(torch.full((20,), -1.5), labels, NUM_CLASSES)
    assert torch.equal(probability, torch.ones(20, dtype=torch.float64))


def test_a_feature_equal_to_the_mean_does_not_divide_by_zero():
    features = torch.stack([torch.ones(3), -torch.ones(3), torch.zeros(3)])
    assert torch.isfinite(selection.centred_unit_features(features)).all()


def test_a_class_missing_from_the_labels_does_not_shift_the_others():
    labels = torch.tensor([0, 0, 2, 2, 3, 3])
    unit = torch.arange(12.0).reshape(6, 2)
    means, counts = selection.class_means(unit, labels, torch.ones(6, dtype=torch.bool), NUM_CLASSES)
    assert counts.tolist() == [2, 0, 2, 2]
    assert means[2].tolist() == [5, 6] and means[1].tolist() == [0, 0]


def test_every_class_is_drawn_where_min_draw_count_is_zero(labels):
    assert average(labels, torch.zeros(SIZE), min_draw_count=0).drawn.all()


def test_only_classes_above_min_draw_count_are_drawn(labels):
    confidence = torch.ones(SIZE)
    confidence[(labels == 1).nonzero()[10:, 0]] = 0  # leaves ten, which is not more than ten
    assert average(labels, confidence, min_draw_count=10).drawn.tolist() == [True, False, True, True]


def test_the_score_of_the_observed_class_equals_the_column_of_the_full_matrix(labels):
    unit = selection.centred_unit_features(features_of(labels))
    centroids = torch.randn(
        3, NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    full = -sum(
        torch.cdist(unit.double(), c) ** 2 for c in centroids
    )  # the release's N x K matrix, summed over draws
    own = full[torch.arange(SIZE), labels]
    torch.testing.assert_close(
        selection.closeness(unit, labels, centroids).double(), own, rtol=1e-4, atol=1e-4
    )


def test_running_averages_equal_a_plain_loop(labels):
    moments, beta = None, 0.9
    mean = square = None
    for epoch in range(5):
        centroids = torch.randn(
            NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(epoch), dtype=torch.float64
        )
        moments = selection.update_moments(
            moments, centroids, torch.ones(NUM_CLASSES, dtype=torch.bool), beta
        )
        if mean is None:
            mean, square = centroids.numpy().copy(), centroids.numpy() ** 2
        else:
            mean = beta * mean + (1 - beta) * centroids.numpy()
            square = beta * square + (1 - beta) * centroids.numpy() ** 2
    assert np.allclose(moments.mean, mean, atol=1e-12) and np.allclose(moments.square, square, atol=1e-12)


def test_persisting_moments_draw_near_the_centroid_and_released_ones_far_from_it(labels):
    """The quirk that --ema_mode is about: from zeros, the spread is sqrt(beta / (1 - beta)) = 10 times the mean."""
    zeros = Moments(*(torch.zeros(NUM_CLASSES, DIM, dtype=torch.float64) for _ in range(2)))
    carried = average(labels, torch.ones(SIZE))
    unit = selection.centred_unit_features(features_of(labels))
    instant, _ = selection.class_means(unit, labels, torch.ones(SIZE, dtype=torch.bool), NUM_CLASSES)

    def cosine(found):
        return torch.cosine_similarity(found.centroids[0], instant, dim=1).mean()

    persist, released = (average(labels, torch.ones(SIZE), m, draws=1) for m in (carried.moments, zeros))
    assert cosine(persist) > 0.999
    assert cosine(released) < 0.6


def test_the_state_handed_in_is_not_changed(labels):
    moments = average(labels, torch.ones(SIZE)).moments
    before = [tensor.clone() for tensor in moments]
    average(labels, torch.ones(SIZE), moments, draws=3)
    assert all(torch.equal(a, b) for a, b in zip(before, moments, strict=True))


def test_clean_samples_are_found_where_features_tell_them_apart():
    generator = torch.Generator().manual_seed(3)
    true = torch.arange(400) % NUM_CLASSES
    wrong = torch.rand(400, generator=generator) < 0.4
    observed = torch.where(
        wrong, (true + 1 + torch.randint(3, (400,), generator=generator)) % NUM_CLASSES, true
    )
    features = features_of(true, spread=0.05)
    confidence = torch.where(wrong, 0.1, 0.9)
    for posterior in (upper_posterior, sklearn_upper_posterior):
        found = average(observed, confidence, features=features, posterior=posterior)
        assert torch.equal(found.selected, ~wrong)
        assert torch.equal(found.counts, torch.bincount(observed[~wrong], minlength=NUM_CLASSES))


# the state from epoch to epoch ------------------------------------------------------------------------------------------


def epoch_by_epoch(between=lambda memory: memory) -> list[Selection]:
    """Three epochs of plain random tensors, the state kept as the scripts keep it. between: what happens to it on the way."""
    memory, found = {"moments": [None]}, []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(epoch)
        kept = memory["moments"][0]
        selection = stochastic_feature_averaging(
            torch.randn(SIZE, DIM, generator=generator),
            torch.randint(NUM_CLASSES, (SIZE,), generator=generator),
            torch.rand(SIZE, generator=generator),
            None if kept is None else Moments(*kept),
            normals=torch.randn(2, NUM_CLASSES, DIM, generator=generator, dtype=torch.float64),
            threshold=0.3,
            beta=0.8,
            min_draw_count=0,
        )
        found.append(selection)
        memory = between({"moments": [list(selection.moments)]})
    return found


def test_plain_tensors_and_the_state_of_the_epoch_before_are_all_it_needs():
    first, second, third = epoch_by_epoch()
    assert torch.equal(first.moments.square, first.moments.mean**2)
    for before, after in ((first, second), (second, third)):
        # M' = 0.8 M + 0.2 c, so c can be found again, and with it Q'
        centroids = (after.moments.mean - 0.8 * before.moments.mean) / 0.2
        square = 0.8 * before.moments.square + 0.2 * centroids**2
        torch.testing.assert_close(after.moments.square, square)
        assert not torch.equal(after.moments.mean, before.moments.mean)
    assert all(0 < int(found.selected.sum()) < SIZE for found in (first, second, third))


def test_the_state_may_go_through_a_checkpoint_between_epochs(tmp_path):
    def through_a_checkpoint(memory):
        checkpoint.save(tmp_path, {"state": checkpoint.collect(memory)})
        fresh = {"moments": [None]}
        checkpoint.restore(fresh, checkpoint.load(tmp_path)["state"])
        return fresh

    for found, expected in zip(epoch_by_epoch(through_a_checkpoint), epoch_by_epoch(), strict=True):
        *tensors, moments = found
        *expected_tensors, expected_moments = expected
        for own, other in zip([*tensors, *moments], [*expected_tensors, *expected_moments], strict=True):
            assert own.dtype == other.dtype and torch.equal(own, other)


def test_moments_are_handed_on_or_begin_from_zeros_as_in_the_release():
    cpu = torch.device("cpu")
    assert [incoming_moments(None, mode, cpu) for mode in ("persist", "released")] == [None, None]
    kept = epoch_by_epoch()[-1].moments
    before = [tensor.clone() for tensor in kept]
    persist, released = (incoming_moments(kept, mode, cpu) for mode in ("persist", "released"))
    assert isinstance(persist, Moments) and isinstance(released, Moments)
    for own, handed, zeros in zip(before, persist, released, strict=True):
        assert torch.equal(handed, own)
        assert zeros.shape == own.shape and zeros.dtype == own.dtype and not zeros.any()
    assert all(torch.equal(own, other) for own, other in zip(before, kept, strict=True))


def test_moments_are_brought_to_the_device_of_the_features():
    kept = Moments(torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    for mode in ("persist", "released"):
        found = incoming_moments(kept, mode, torch.device("meta"))
        assert [tensor.device.type for tensor in found] == ["meta", "meta"]


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
