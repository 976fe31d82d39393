"""Outlier scores against scikit-learn, who is removed, and when how many are."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_dividemix import outliers
from manifold_dividemix.choices import removal_count, split_epochs
from manifold_dividemix.outliers import kept_samples, knn_scores, outlier_auroc
from tests.manifold_dividemix.toy import sklearn_knn_scores


def rows(count: int, dimensions: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0))


def agree(embeddings: Tensor, k: int = 10) -> Tensor:
    """Scores by ours, in one chunk and in several, and by scikit-learn are the same; ours."""
    expected = sklearn_knn_scores(embeddings, k).float()
    for chunk in (1, 7, outliers.CHUNK):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outliers, "CHUNK", chunk)
            found = knn_scores(embeddings, k)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    return found


@pytest.mark.parametrize(("k", "count"), [(1, 40), (10, 40), (10, 5), (3, 2)])
@pytest.mark.parametrize("dimensions", [1, 3, 4, 64])
def test_scores_are_those_of_scikit_learn(dimensions, k, count):
    """Of too few samples all others are neighbours. Up to three dimensions distances are Euclidean."""
    agree(2 * rows(count, dimensions) + 0.5, k)


def test_a_sample_is_not_its_own_neighbour_and_a_duplicate_of_it_is():
    points = rows(4, 8)
    assert agree(points, k=1).max() < 0.99
    # of three alike the two nearest are at 0, and the third is another
    thrice = points.repeat(3, 1)
    torch.testing.assert_close(agree(thrice, k=2), torch.ones(12), rtol=0, atol=1e-6)
    assert agree(thrice, k=3).max() < 0.99


def test_points_alike_opposite_or_at_zero():
    torch.testing.assert_close(agree(torch.ones(15, 7)), torch.ones(15), rtol=0, atol=1e-6)
    opposite = agree(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    torch.testing.assert_close(opposite, torch.full((2,), math.exp(-2)))
    embeddings = rows(20, 8)
    embeddings[[3, 11]] = 0  # at distance 1 of all
    torch.testing.assert_close(agree(embeddings)[[3, 11]], torch.full((2,), math.exp(-1)))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} samples have no neighbours"):
        knn_scores(torch.ones(count, 8))


def test_products_are_float32_and_not_rounded_to_tf32_even_where_training_does(monkeypatch):
    precisions, product = [], Tensor.__matmul__

    def watched(own, other):
        precisions.append((torch.get_float32_matmul_precision(), own.dtype))
        return product(own, other)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    monkeypatch.setattr(outliers, "CHUNK", 4)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        knn_scores(rows(9, 8).bfloat16())
        assert precisions == [("highest", torch.float32)] * 3
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(usual)


def test_the_lowest_scores_go_and_of_equal_ones_the_earlier():
    scores = torch.tensor([0.5, 0.1, 0.5, 0.1, 0.1, 0.9])
    removed = [(~kept_samples(scores, n)).nonzero()[:, 0].tolist() for n in range(8)]
    assert removed[:5] == [[], [1], [1, 3], [1, 3, 4], [0, 1, 3, 4]]
    assert removed[5:] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert kept_samples(torch.full((5000,), 0.3), 1234).tolist() == [False] * 1234 + [True] * (5000 - 1234)


@pytest.mark.parametrize(
    ("epochs", "warm_up", "interval", "clustering", "splits"),
    [
        (20, 5, 100, True, [5]),
        (20, 0, 6, True, [0, 6, 12, 18]),
        (20, 19, 1, True, [19]),
        # a warm-up that never ends
        (20, 20, 1, True, []),
        (20, 30, 1, False, []),
    ],
)
def test_splits_come_after_the_warm_up_and_at_multiples_of_the_interval(
    epochs, warm_up, interval, clustering, splits
):
    assert split_epochs(epochs, warm_up, interval, clustering) == splits


@pytest.mark.parametrize(
    ("size", "ratio", "factor", "splits", "counts"),
    [
        (101, 0.01, 10, [1, 2], [11, 13, 15]),  # rounded up each for itself
        (5, 0.01, 10, [1], [1, 2, 2]),
        (101, 0.01, 0, [1], [0, 2, 2]),
        (101, 0.01, 2.5, [], [3, 3, 3]),
        (50000, 0, 10, [0, 1, 2], [0, 0, 0]),
        (1000, 0.01, 10, [0, 2], [110, 110, 120]),  # without a warm-up
    ],
)
def test_the_number_of_removed_samples_by_epoch(size, ratio, factor, splits, counts):
    assert [removal_count(epoch, size, ratio, factor, splits) for epoch in range(3)] == counts


def test_the_area_under_the_curve_is_that_of_all_pairs():
    scores, ood = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([True, True, False, False, False])
    pairs = [float(a < b) + 0.5 * float(a == b) for a in scores[ood] for b in scores[~ood]]
    assert outlier_auroc(scores, ood) == pytest.approx(sum(pairs) / 6)
    assert type(outlier_auroc(scores, ood)) is float
    assert outlier_auroc(torch.tensor([0.1, 0.9]), np.array([True, False])) == 1


@pytest.mark.parametrize("ood", [None, np.zeros(3, dtype=bool), np.ones(3, dtype=bool)])
def test_there_is_none_if_ood_images_are_unknown_or_all_are_of_one_kind(ood):
    assert outlier_auroc(torch.rand(3), ood) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_there_is_none_of_scores_that_are_not_finite(value):
    assert outlier_auroc(torch.tensor([0.1, 0.9, value]), np.array([True, False, False])) is None
    assert outlier_auroc(knn_scores(torch.full((3, 5), value)), np.array([True, False, False])) is None
