"""Outlier scores against plain loops and scikit-learn, who is removed, and when how many are."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common import noise
from manifold_dividemix.outliers import (
    kept_samples,
    knn_scores,
    outlier_auroc,
    removal_count,
    sklearn_knn_scores,
    split_epochs,
)


def rows(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def plain_scores(embeddings: Tensor, k: int = 10) -> list[float]:
    """By two loops over Python's numbers."""
    points, scores = embeddings.double().tolist(), []
    for i, own in enumerate(points):
        distances = []
        for j, other in enumerate(points):
            if i == j:
                continue
            if len(own) > 3:
                norms = math.hypot(*own) * math.hypot(*other)
                dot = sum(a * b for a, b in zip(own, other, strict=True))
                distances.append(1 - dot / norms if norms else 1.0)
            else:
                distances.append(math.dist(own, other))
        nearest = sorted(distances)[:k]
        scores.append(math.exp(-sum(nearest) / len(nearest)))
    return scores


def agree(embeddings: Tensor, k: int = 10) -> Tensor:
    """Scores by ours, in one chunk and in several, by scikit-learn and by the loops are the same; ours."""
    found = knn_scores(embeddings, k)
    assert found.shape == embeddings.shape[:1] and found.dtype == torch.float32
    expected = torch.tensor(plain_scores(embeddings, k))
    for scores in (found, *(knn_scores(embeddings, k, chunk) for chunk in (1, 7, len(embeddings)))):
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(sklearn_knn_scores(embeddings, k).float(), expected, rtol=0, atol=2e-6)
    return found


# scores -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 5, 64])
def test_scores_are_those_of_a_double_loop_and_of_scikit_learn(dimensions, k):
    agree(2 * rows(40, dimensions) + 0.5, k)


def test_only_directions_count_above_three_dimensions_and_only_lengths_below():
    many, lengths = rows(30, 6), torch.arange(1.0, 31)[:, None]
    torch.testing.assert_close(knn_scores(many * lengths), knn_scores(many), rtol=0, atol=1e-6)
    few = rows(30, 3)
    assert not torch.allclose(knn_scores(few * lengths), knn_scores(few), atol=1e-2)
    torch.testing.assert_close(knn_scores(few + 5), knn_scores(few), rtol=0, atol=1e-5)


def test_a_sample_is_not_its_own_neighbour_and_a_duplicate_of_it_is():
    """Pairs of the same point are at distance 0 of each other, wherever in the order they stand."""
    points = rows(6, 8)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 5, 2, 0, 4, 1, 3])
    found = agree(points[order], k=1)
    torch.testing.assert_close(found, torch.ones(12), rtol=0, atol=1e-6)
    # without the duplicates there is something between all
    assert agree(points, k=1).max() < 0.99
    # of three alike the two nearest are at 0, and the third is another
    thrice = points[:4].repeat(3, 1)
    torch.testing.assert_close(agree(thrice, k=2), torch.ones(12), rtol=0, atol=1e-6)
    assert agree(thrice, k=3).max() < 0.99


def test_all_points_alike_have_the_highest_score():
    torch.testing.assert_close(agree(torch.ones(15, 7)), torch.ones(15), rtol=0, atol=1e-6)
    torch.testing.assert_close(agree(torch.ones(15, 2)), torch.ones(15))


def test_a_row_of_zeros_is_at_distance_1_of_all():
    embeddings = rows(20, 8)
    embeddings[[3, 11]] = 0
    found = agree(embeddings)
    torch.testing.assert_close(found[[3, 11]], torch.full((2,), math.exp(-1)))
    assert agree(torch.zeros(4, 5), k=2).tolist() == pytest.approx([math.exp(-1)] * 4)


@pytest.mark.parametrize("k", [4, 5, 100])
def test_of_too_few_samples_all_others_are_neighbours(k):
    found = agree(rows(5, 8), k)
    assert torch.equal(found, knn_scores(rows(5, 8), 4))
    assert agree(rows(2, 8), k).tolist() == pytest.approx(plain_scores(rows(2, 8), 1), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} samples have no neighbours"):
        knn_scores(torch.ones(count, 8))


def test_opposite_points_are_at_distance_2():
    found = agree(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    assert found.tolist() == pytest.approx([math.exp(-2)] * 2)


def test_scores_of_half_precision_embeddings_are_computed_in_float32():
    embeddings = rows(30, 16).bfloat16()
    assert torch.equal(knn_scores(embeddings), knn_scores(embeddings.float()))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert knn_scores(embeddings).dtype == torch.float32


def test_matrix_products_are_not_rounded_to_tf32_even_where_training_does(monkeypatch):
    precisions, product = [], Tensor.__matmul__

    def watched(own, other):
        precisions.append(torch.get_float32_matmul_precision())
        return product(own, other)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        knn_scores(rows(9, 8), chunk=4)
        assert precisions == ["highest"] * 3
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(usual)


def test_outliers_are_found_among_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = F.one_hot(torch.arange(5), 16).float()
    inside = centres.repeat_interleave(30, dim=0) + 0.05 * torch.randn(150, 16, generator=generator)
    outside = torch.randn(10, 16, generator=generator)
    scores = knn_scores(torch.cat([inside, outside]))
    assert (~kept_samples(scores, 10)).nonzero()[:, 0].tolist() == list(range(150, 160))
    assert outlier_auroc(scores, np.arange(160) >= 150) == 1


# who is removed ---------------------------------------------------------------------------------------------------------


def test_the_lowest_scores_go_and_of_equal_ones_the_earlier():
    scores = torch.tensor([0.5, 0.1, 0.5, 0.1, 0.1, 0.9])
    removed = [(~kept_samples(scores, n)).nonzero()[:, 0].tolist() for n in range(8)]
    assert removed == [
        [], [1], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
    assert kept_samples(scores, 0).dtype == torch.bool


def test_of_many_equal_scores_the_first_are_removed():
    kept = kept_samples(torch.full((5000,), 0.3), 1234)
    assert kept.tolist() == [False] * 1234 + [True] * (5000 - 1234)


# when how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "warm_up", "interval", "clustering", "splits"),
    [
        (300, 20, 10, True, list(range(20, 300, 10))),
        (50, 10, 10, True, [10, 20, 30, 40]),
        # the first split is not at a multiple, and comes all the same
        (20, 5, 3, True, [5, 6, 9, 12, 15, 18]),
        (20, 5, 100, True, [5]),
        (20, 5, 1, True, list(range(5, 20))),
        (20, 5, 3, False, [5]),
        (20, 0, 6, True, [0, 6, 12, 18]),
        (20, 0, 6, False, [0]),
        (20, 19, 1, True, [19]),
        # a warm-up that never ends
        (20, 20, 1, True, []),
        (20, 30, 1, True, []),
        (20, 20, 1, False, []),
    ],
)
def test_splits_come_after_the_warm_up_and_at_multiples_of_the_interval(
    epochs, warm_up, interval, clustering, splits
):
    assert split_epochs(epochs, warm_up, interval, clustering) == splits


def test_the_published_run_removes_a_tenth_then_a_hundredth_more_at_each_split():
    splits = split_epochs(300, 20, 10, True)
    counts = [removal_count(epoch, 50000, 0.01, 10, splits) for epoch in (0, 19, 20, 29, 30, 299)]
    assert counts == [5000, 5000, 5500, 5500, 6000, 19000]
    # 38 % in the end, of which at least 18 % of all are in distribution: fewer than 20 % are OOD
    ood = noise.open_set(50000, 0.2, 50000, np.random.RandomState(noise.OPEN_SET_SEED)).positions
    assert len(ood) == 9831 and 19000 / 50000 == 0.38 and (19000 - len(ood)) / 50000 >= 0.18
    # of mini-ImageNet a hundredth at first
    assert [removal_count(e, 50000, 0.01, 1, [10, 20]) for e in (0, 10, 20, 49)] == [500, 1000, 1500, 1500]


def test_counts_are_rounded_up_each_for_itself():
    assert [removal_count(e, 101, 0.01, 10, [1, 2]) for e in range(3)] == [11, 13, 15]
    assert [removal_count(e, 5, 0.01, 10, [1]) for e in range(2)] == [1, 2]
    assert [removal_count(e, 101, 0.01, 0, [1]) for e in range(2)] == [0, 2]
    assert removal_count(0, 101, 0.01, 2.5, []) == 3


def test_a_share_of_0_removes_none_whatever_the_splits():
    assert {removal_count(e, 50000, 0, 10, range(5, 50)) for e in range(50)} == {0}
    assert kept_samples(torch.rand(9), 0).all()


def test_without_a_warm_up_the_first_removal_is_that_of_the_first_split():
    splits = split_epochs(20, 0, 10, True)
    assert [removal_count(e, 1000, 0.01, 10, splits) for e in (0, 9, 10)] == [110, 110, 120]


# how good the score is --------------------------------------------------------------------------------------------------


def test_the_area_under_the_curve_is_that_of_all_pairs():
    scores, ood = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([True, True, False, False, False])
    pairs = [float(a < b) + 0.5 * float(a == b) for a in scores[ood] for b in scores[~ood]]
    assert outlier_auroc(scores, ood) == pytest.approx(sum(pairs) / 6)
    assert outlier_auroc(scores, ood) > 0.5
    assert type(outlier_auroc(scores, ood)) is float
    assert outlier_auroc(torch.tensor([0.1, 0.9]), np.array([True, False])) == 1
    assert outlier_auroc(torch.tensor([0.1, 0.9]), np.array([False, True])) == 0


@pytest.mark.parametrize("ood", [None, np.zeros(4, dtype=bool), np.ones(4, dtype=bool)])
def test_there_is_none_where_nobody_knows_or_all_are_of_one_kind(ood):
    assert outlier_auroc(torch.rand(4), ood) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_there_is_none_of_scores_that_are_not_finite(value):
    assert outlier_auroc(torch.tensor([0.1, 0.9, value]), np.array([True, False, False])) is None
    assert outlier_auroc(knn_scores(torch.full((3, 5), value)), np.array([True, False, False])) is None
