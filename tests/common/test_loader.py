"""Mini-batches from images on the device: what a pass goes through, in which order, and what a view is."""

from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from common import datasets
from common.gpu import augment
from common.gpu.loader import Batches, Images
from common.gpu.loader import test_batches as batches_of
from common.runs import cli

N, MEAN, STD = 10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PIXELS = np.random.RandomState(0).randint(0, 256, size=(N, 8, 6, 3), dtype=np.uint8)


@pytest.fixture
def images() -> Images:
    return Images(PIXELS, MEAN, STD, torch.device("cpu"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def order(batches) -> list[int]:
    """The positions that some batches go through."""
    return [i for _, index in batches for i in index.tolist()]


CROP_AND_FLIP = partial(augment.crop_and_flip, padding=2)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [1] * N), (4, [4, 4, 2]), (5, [5, 5]), (9, [9, 1]), (10, [10]), (11, [10])]
)
def test_a_pass_has_every_sample_once_and_may_drop_a_smaller_last_batch(
    images, batch_size, sizes, shuffle, drop_last
):
    if drop_last:
        sizes = [size for size in sizes if size == batch_size]
    batches = Batches(images, batch_size, shuffle=shuffle, drop_last=drop_last, generator=generator())
    assert len(batches) == len(sizes)
    assert [len(index) for _, index in batches] == sizes
    visited = order(batches)
    if shuffle:
        assert len({*visited}) == sum(sizes)
    else:
        assert visited == list(range(sum(sizes)))


def test_a_subset_is_gone_through_in_its_order_or_shuffled(images):
    subset = torch.tensor([7, 2, 9, 4, 0])
    assert order(Batches(images, 2, subset=subset)) == subset.tolist()
    shuffled = Batches(images, 2, subset=subset, shuffle=True, generator=generator())
    assert sorted(order(shuffled)) == sorted(subset.tolist())
    assert len(shuffled) == 3


def test_an_unaugmented_view_is_the_normalised_image(images):
    views = torch.cat([view for (view,), _ in Batches(images, 4)])
    expected = torch.from_numpy((PIXELS / 255 - MEAN) / STD).permute(0, 3, 1, 2).float()
    assert torch.equal(views, augment.normalise(images.pixels, images.mean, images.std))
    torch.testing.assert_close(views, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_each_view_has_draws_of_its_own(images, views):
    for batch, index in Batches(images, 5, views=views, augmentation=CROP_AND_FLIP, generator=generator()):
        assert len(batch) == views
        assert all(view.shape == (len(index), 3, 8, 6) for view in batch)
        assert len({view.numpy().tobytes() for view in batch}) == views


def test_the_order_is_new_at_every_pass_and_follows_from_the_generator(images):
    def passes(seed):
        batches = Batches(images, 4, shuffle=True, generator=generator(seed))
        return [order(batches) for _ in range(3)]

    first = passes(0)
    assert first[0] != first[1] != first[2] != first[0]
    assert first == passes(0)
    assert first != passes(1)
    # an endless pass starts again in a new order, too
    taken = list(islice(Batches(images, 4, shuffle=True, generator=generator()).endless(), 9))
    assert [len(index) for _, index in taken] == [4, 4, 2] * 3
    assert [order(taken[i : i + 3]) for i in (0, 3, 6)] == first


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_empty_subset_gives_no_batch_and_cannot_be_endless(images, shuffle):
    nothing = torch.tensor([], dtype=torch.long)
    batches = Batches(images, 4, subset=nothing, shuffle=shuffle, generator=generator())
    assert len(batches) == 0 and list(batches) == []
    with pytest.raises(ValueError, match="no batch"):
        next(batches.endless())


@pytest.mark.parametrize("need", [{"shuffle": True}, {"augmentation": CROP_AND_FLIP}])
def test_shuffling_and_augmenting_need_a_generator(images, need):
    with pytest.raises(ValueError, match="need a generator"):
        Batches(images, 4, **need)


WORLD = 2
TRAINING = {"shuffle": True, "drop_last": True, "views": 2, "augmentation": CROP_AND_FLIP}


@pytest.mark.parametrize("world", [2, 4])
def test_shuffled_batches_are_cut_into_consecutive_pieces_drawn_as_if_by_one_process(images, world):
    subset = torch.tensor([9, 1, 7, 3, 5, 0, 2, 8, 6])
    draws = [generator(4) for _ in range(world + 1)]
    alone = Batches(images, 4, subset=subset, generator=draws[world], **TRAINING)
    pieces = [
        Batches(images, 4, subset=subset, generator=draws[rank], rank=rank, world=world, **TRAINING)
        for rank in range(world)
    ]
    for _ in range(2):  # the second pass goes on from the generators of the first
        for (views, index), *parts in zip(alone, *pieces, strict=True):
            assert torch.equal(torch.stack([own for _, own in parts]), index.view(world, -1))
            for number, view in enumerate(views):
                assert torch.equal(torch.cat([own[number] for own, _ in parts]), view)
        assert all(torch.equal(draw.get_state(), draws[world].get_state()) for draw in draws)
    assert [len(batches) for batches in pieces] == [len(alone)] * world == [2] * world


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ordered_batches_are_dealt_out_in_turn(images, world):
    whole = list(Batches(images, 3))
    assert len(whole) == 4
    for rank in range(world):
        dealt = Batches(images, 3, rank=rank, world=world)
        for ((view,), index), ((expected,), places) in zip(dealt, whole[rank::world], strict=True):
            assert torch.equal(view, expected) and torch.equal(index, places)


@pytest.mark.parametrize("wrong", [{"drop_last": False}, {"batch_size": 5}, {"batch_size": 4, "world": 3}])
def test_batches_that_cannot_be_cut_into_equal_pieces_are_refused(images, wrong):
    options = {"batch_size": 4, "shuffle": True, "drop_last": True, "world": WORLD} | wrong
    with pytest.raises(ValueError, match=f"{options['batch_size']}.*{options['world']} equal pieces"):
        Batches(images, **options, generator=generator())
    # one process may have any batches, and so may several that do not train
    Batches(images, **(options | {"world": 1}), generator=generator())
    Batches(images, **(options | {"shuffle": False}))


def four_views(pixels: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """uint8 [4, B, C, H, W]: as it is, mirrored, and twice with draws of their own."""
    cropped = CROP_AND_FLIP(pixels.repeat(2, 1, 1, 1), draws)
    return torch.cat([pixels[None], pixels.flip(3)[None], cropped.view(2, *pixels.shape)])


def test_views_made_at_once_are_normalised_and_come_one_by_one(images):
    draws, twin = generator(3), generator(3)
    for batch, index in Batches(images, 6, augmentation=four_views, generator=draws):
        assert isinstance(batch, tuple)
        expected = four_views(images.pixels[index], twin)  # one call for a batch
        for view, own in zip(batch, expected, strict=True):
            assert torch.equal(view, augment.normalise(own, images.mean, images.std))
        assert torch.equal(batch[0], images.view(index))
        assert len({view.numpy().tobytes() for view in batch}) == 4
    assert torch.equal(draws.get_state(), twin.get_state())
    shuffled = Batches(images, 4, augmentation=four_views, shuffle=True, generator=draws)
    for (plain, mirrored, *_), index in shuffled:
        assert torch.equal(plain, images.view(index)) and torch.equal(mirrored, plain.flip(3))


# --limit_test: a seeded subset of the test images, stratified by class, and all of them beside it ---------------------

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
