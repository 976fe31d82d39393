"""Groups of a mini-batch: by halves, by permutation, in pieces, with rows left over."""

import pytest
import torch

from afm.grouping import form_groups, groups_by_halves, random_groups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("order", ["halves", "random"])
@pytest.mark.parametrize(("rows", "group_size"), [(7, 2), (8, 3), (1, 2), (2, 3), (0, 2), (256, 2)])
def test_rows_left_over_are_in_no_group_and_the_others_in_one(rows, group_size, order):
    groups = form_groups(rows, group_size, generator(), order=order)
    assert groups.shape == (rows // group_size, group_size) and groups.dtype == torch.int64
    assert len(groups.unique()) == groups.numel() and ((groups >= 0) & (groups < rows)).all()
    if order == "halves":  # the last ones; a group's rows are a part of the batch apart
        used = torch.arange(rows - rows % group_size)
        assert groups.T.flatten().tolist() == used.tolist()


def test_random_groups_are_a_permutation_in_pieces():
    groups, order = random_groups(10, 3, generator(4)), torch.randperm(10, generator=generator(4))
    assert groups.tolist() == order[:9].view(3, 3).tolist()


@pytest.mark.parametrize(("order", "halves"), [("halves", 1), ("random", 0)])
def test_rounds_are_permutations_but_the_first_of_halves(order, halves):
    used, same = generator(1), generator(1)
    groups = form_groups(9, 2, used, order=order, rounds=3).split(4)
    assert len(groups) == 3
    assert halves == 0 or torch.equal(groups[0], groups_by_halves(9, 2))
    for part in groups[halves:]:
        assert torch.equal(part, random_groups(9, 2, same))
    assert torch.equal(used.get_state(), same.get_state()), "halves need no random number"


def test_halves_inside_pieces_of_the_batch():
    groups, same = form_groups(12, 2, generator(2), chunks=3, rounds=2), generator(2)
    assert groups[:6].tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]]
    assert torch.equal(groups[6:], random_groups(12, 2, same)), "pieces are of the first round only"
    # torch.chunk, as DataParallel scatters: pieces of 4, 4 and 3 rows
    assert form_groups(11, 2, generator(), chunks=3).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 9]]
    assert form_groups(3, 2, generator(), chunks=8).shape == (0, 2), "pieces of one row have no pair"


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="got thirds"):
        form_groups(8, 2, generator(), order="thirds")
