"""Groups of a mini-batch: by halves, by permutation, in pieces, with rows left over."""

import pytest
import torch

from afm.grouping import draw_groups, groups_by_halves, random_groups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_halves_pair_each_row_of_the_first_with_the_one_of_the_second():
    assert groups_by_halves(6, 2).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_groups_of_three_are_a_third_of_the_batch_apart():
    assert groups_by_halves(6, 3).tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("order", ["halves", "random"])
@pytest.mark.parametrize(("rows", "group_size"), [(7, 2), (8, 3), (1, 2), (2, 3), (0, 2), (256, 2)])
def test_rows_left_over_are_in_no_group_and_the_others_in_one(rows, group_size, order):
    groups = draw_groups(rows, group_size, generator(), order=order)
    assert groups.shape == (rows // group_size, group_size)
    assert groups.dtype == torch.int64
    assert len(groups.unique()) == groups.numel()
    assert ((groups >= 0) & (groups < rows)).all()
    if order == "halves":  # the last ones
        assert sorted(groups.flatten().tolist()) == list(range(rows - rows % group_size))


def test_random_groups_are_a_permutation_in_pieces():
    groups, order = random_groups(10, 3, generator(4)), torch.randperm(10, generator=generator(4))
    assert groups.tolist() == order[:9].view(3, 3).tolist()


def test_random_groups_give_every_partner_and_position_equally_often():
    drawn = generator()
    counts = torch.zeros(6, 6)
    for _ in range(3000):
        groups = random_groups(6, 2, drawn)
        counts[groups[:, 0], groups[:, 1]] += 1
    expected = 3 * 3000 / 30
    assert counts.diagonal().eq(0).all()
    off_diagonal = counts[~torch.eye(6, dtype=torch.bool)]
    chi_squared = ((off_diagonal - expected) ** 2 / expected).sum()
    assert chi_squared < 65  # 29 degrees of freedom: above it once in 7000


def test_the_first_round_of_halves_draws_nothing_and_further_rounds_are_permutations():
    drawn = generator(1)
    groups = draw_groups(8, 2, drawn, order="halves", rounds=1)
    assert torch.equal(drawn.get_state(), generator(1).get_state())
    assert torch.equal(groups, groups_by_halves(8, 2))

    groups, same = draw_groups(8, 2, generator(1), order="halves", rounds=3), generator(1)
    assert groups.shape == (12, 2)
    assert torch.equal(groups[:4], groups_by_halves(8, 2))
    for part in groups[4:].split(4):
        assert torch.equal(part, random_groups(8, 2, same))


def test_random_order_draws_every_round():
    groups, same = draw_groups(9, 2, generator(1), order="random", rounds=3), generator(1)
    assert groups.shape == (12, 2)
    for part in groups.split(4):
        assert torch.equal(part, random_groups(9, 2, same))
        assert len(part.unique()) == 8
    assert not torch.equal(groups[:4], groups[4:8])


def test_halves_inside_pieces_of_the_batch():
    groups = draw_groups(12, 2, generator(), chunks=3)
    assert groups.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]]


def test_pieces_that_are_not_equal_are_those_of_the_releases_scatter():
    # torch.chunk, as DataParallel scatters: pieces of 4, 4 and 3 rows
    assert draw_groups(11, 2, generator(), chunks=3).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 9]]
    # pieces of one row have no pair
    assert draw_groups(3, 2, generator(), chunks=8).shape == (0, 2)


def test_pieces_are_of_the_first_round_only():
    groups, same = draw_groups(8, 2, generator(2), rounds=2, chunks=2), generator(2)
    assert groups[:4].tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert torch.equal(groups[4:], random_groups(8, 2, same))


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="got thirds"):
        draw_groups(8, 2, generator(), order="thirds")
