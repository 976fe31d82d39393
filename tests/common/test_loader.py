"""Mini-batches from images on the device: what a pass goes through, in which order, and what a view is."""

from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from common.gpu import augment
from common.gpu.loader import Batches, Images

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


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [1] * N), (4, [4, 4, 2]), (5, [5, 5]), (9, [9, 1]), (10, [10]), (64, [10])]
)
def test_a_pass_has_every_sample_once_and_keeps_the_last_smaller_batch(images, batch_size, sizes, shuffle):
    batches = Batches(images, batch_size, shuffle=shuffle, generator=generator())
    assert len(batches) == len(sizes)
    assert [len(index) for _, index in batches] == sizes
    assert sorted(order(batches)) == list(range(N))


def test_a_subset_is_gone_through_in_its_order_or_shuffled(images):
    subset = torch.tensor([7, 2, 9, 4, 0])
    assert order(Batches(images, 2, subset=subset)) == subset.tolist()
    shuffled = Batches(images, 2, subset=subset, shuffle=True, generator=generator())
    assert sorted(order(shuffled)) == sorted(subset.tolist())
    assert len(shuffled) == 3


def test_an_unaugmented_view_is_the_normalised_image(images):
    views = torch.cat([view for (view,), _ in Batches(images, 4)])
    expected = (PIXELS / 255 - MEAN) / STD
    assert views.dtype == torch.float32
    assert torch.equal(views, augment.normalise(images.pixels, images.mean, images.std))
    torch.testing.assert_close(
        views, torch.from_numpy(expected).permute(0, 3, 1, 2).float(), rtol=0, atol=2e-6
    )


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


def test_endless_starts_again_in_a_new_order(images):
    batches = Batches(images, 4, shuffle=True, generator=generator())
    taken = list(islice(batches.endless(), 3 * len(batches)))
    assert [len(index) for _, index in taken] == [4, 4, 2] * 3
    passes = [order(taken[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(p) == list(range(N)) for p in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_empty_subset_gives_no_batch_and_cannot_be_endless(images, shuffle):
    batches = Batches(
        images, 4, subset=torch.tensor([], dtype=torch.long), shuffle=shuffle, generator=generator()
    )
    assert len(batches) == 0
    assert list(batches) == []
    with pytest.raises(ValueError, match="no batch"):
        next(batches.endless())


@pytest.mark.parametrize("need", [{"shuffle": True}, {"augmentation": CROP_AND_FLIP}])
def test_shuffling_and_augmenting_need_a_generator(images, need):
    with pytest.raises(ValueError, match="need a generator"):
        Batches(images, 4, **need)


WORLD = 2
TRAINING = {"shuffle": True, "drop_last": True, "views": 2, "augmentation": CROP_AND_FLIP}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "count"), [(1, N), (4, 2), (5, 2), (9, 1), (10, 1), (11, 0)])
def test_a_smaller_last_batch_is_dropped_where_asked(images, batch_size, count, shuffle):
    batches = Batches(images, batch_size, shuffle=shuffle, drop_last=True, generator=generator())
    assert len(batches) == count
    assert [len(index) for _, index in batches] == [batch_size] * count
    gone_through = order(batches)
    assert len(set(gone_through)) == len(gone_through)
    if not shuffle:
        assert gone_through == list(range(count * batch_size))


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
        for whole, *parts in zip(alone, *pieces, strict=True):
            assert [len(index) for _, index in parts] == [4 // world] * world
            assert torch.equal(torch.cat([index for _, index in parts]), whole[1])
            for number, view in enumerate(whole[0]):
                assert torch.equal(torch.cat([views[number] for views, _ in parts]), view)
        assert all(torch.equal(draw.get_state(), draws[world].get_state()) for draw in draws)
    assert [len(batches) for batches in pieces] == [len(alone)] * world == [2] * world


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ordered_batches_are_dealt_out_in_turn(images, world):
    whole = list(Batches(images, 3))
    dealt = [list(Batches(images, 3, rank=rank, world=world)) for rank in range(world)]
    for rank in range(world):
        assert [index.tolist() for _, index in dealt[rank]] == [
            index.tolist() for _, index in whole[rank::world]
        ]
        for ((view,), _), ((expected,), _) in zip(dealt[rank], whole[rank::world], strict=True):
            assert torch.equal(view, expected)
    assert sum(map(len, dealt)) == len(whole) == 4


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
    sizes = []
    for batch, index in Batches(images, 4, augmentation=four_views, shuffle=True, generator=generator()):
        assert isinstance(batch, tuple) and len(batch) == 4
        assert {view.shape for view in batch} == {(len(index), 3, 8, 6)}
        assert {view.dtype for view in batch} == {torch.float32}
        plain = images.view(index)
        assert torch.equal(batch[0], plain)
        assert torch.equal(batch[1], plain.flip(3))
        assert len({view.numpy().tobytes() for view in batch}) == 4
        sizes.append(len(index))
    assert sizes == [4, 4, 2]


def test_views_made_at_once_draw_once_for_a_batch(images):
    calls = []

    def noted(pixels, draws):
        calls.append(len(pixels))
        return four_views(pixels, draws)

    draws, twin = generator(3), generator(3)
    for (*_, third, fourth), index in Batches(images, 6, augmentation=noted, generator=draws):
        expected = CROP_AND_FLIP(images.pixels[index].repeat(2, 1, 1, 1), twin)
        for found, own in zip((third, fourth), expected.chunk(2), strict=True):
            assert torch.equal(found, augment.normalise(own, images.mean, images.std))
    assert calls == [6, 4]
    assert torch.equal(draws.get_state(), twin.get_state())
