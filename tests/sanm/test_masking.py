"""Masks and label modulation of whole batches, against loops over single images and pixels."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, spearmanr
from torch import Tensor

from sanm.choices import CLOTHING_RULE, MaskRule
from sanm.masking import (
    ASPECT,
    draw_clothing_masks,
    draw_masks,
    extrema,
    mask,
    mask_clothing,
    modulate,
    paint,
    quantised_activation,
    rectangle,
    side_lengths,
)

# channels, height and width of the image; channels, height and width of the map
SIZES = {
    "CIFAR": (3, 32, 32, 5, 4, 4),
    "digits": (1, 8, 8, 4, 4, 4),
    "wide": (3, 12, 20, 3, 3, 5),
    "one place": (3, 16, 16, 2, 1, 1),
}
KINDS = ("random", "plateaus", "constant", "corners")
FORMS = {
    "cifar": (draw_masks, mask, MaskRule()),
    "clothing": (draw_clothing_masks, mask_clothing, CLOTHING_RULE),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps_of(kind: str, depth: int, height: int, width: int, count: int = 4) -> Tensor:
    """Maps [B, D, h, w] of a kind."""
    if kind == "random":
        return torch.randn(count, depth, height, width, generator=generator(1))
    if kind == "plateaus":  # few whole numbers, so that many places are equal
        return torch.randint(3, (count, depth, height, width), generator=generator(2)).float()
    if kind == "constant":
        return torch.full((count, depth, height, width), 1.7)
    maps = torch.zeros(count, depth, height, width)
    for i, (row, column) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
        maps[i, :, row, column] = 2.0
    return maps


# the loops --------------------------------------------------------------------------------------------------------------


def plain_corner(
    at: tuple[int, int], sides: tuple[int, int], size: tuple[int, int], anchor: str
) -> list[int]:
    """Top and left of a rectangle."""
    starts = []
    for place, side, length in zip(at, sides, size, strict=True):
        start = max(place - side // 2 if anchor == "centre" else place, 0)
        starts.append(length - side if start + side > length else start)
    return starts


def plain_modulated(target: list[float], ratio: float, clamp: bool = False) -> list[float]:
    top = target.index(max(target))
    moved = [t - ratio if c == top else t + ratio / (len(target) - 1) for c, t in enumerate(target)]
    if clamp:
        moved = [max(t, 0.0) for t in moved]
        moved = [t / sum(moved) for t in moved]
    return moved


def plain_mask(form: str, image: np.ndarray, maps: np.ndarray, clean: float, target: list, draws: list, rule):
    """(at_max, at_min, its target, its target) of one image [C, H, W].

    cifar: one ratio and aspect in draws [2 + 2 C], of which each rectangle covers half; clothing: two of each [4 + 2 C].
    """
    (channels, *size), copies, targets = image.shape, [], []
    shapes, fills = (2 * [draws[:2]], draws[2:]) if form == "cifar" else ((draws[:2], draws[2:4]), draws[4:])
    *at_max, row, column = (int(place) for place in extrema(torch.from_numpy(maps)[None], *size))
    for number, at in enumerate((at_max, (row, column))):
        base, aspect = shapes[number]
        ratio = base + rule.quality * (1 - clean)
        area = ratio * size[0] * size[1] * (0.5 if form == "cifar" else 1)
        sides = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = plain_corner(at, sides, size, rule.anchor)
        copies.append(image.copy())
        for channel in range(channels):
            inside = copies[-1][channel, max(top, 0) : top + sides[0], max(left, 0) : left + sides[1]]
            inside[:] = fills[number * channels + channel]
        targets.append(plain_modulated(target, ratio, rule.clamp))
    return *copies, *targets


# where the activation is ------------------------------------------------------------------------------------------------


def test_the_extrema_are_the_first_pixels_of_the_plateaus_at_the_ends_of_an_enlarged_map():
    """Of a map of 3 x 5 on 12 x 20 pixels the last place has its centre at 9.5, 17.5: from pixel 10, 18 on it is alone."""
    maps = torch.full((3, 2, 3, 5), 1.0)
    maps[0, 0, 2, 4], maps[0, :, 0, 4] = 2.0, 0.0
    maps[1, 0, 1, 2], maps[1, :, 2, 0] = -2.0, 0.0
    maps[2] = 1.7  # constant: the first pixel
    found = torch.stack(extrema(maps, 12, 20), dim=1).tolist()
    assert found == [[10, 18, 0, 18], [5, 9, 10, 0], [0, 0, 0, 0]]
    assert quantised_activation(maps, 12, 20).amax(dim=(1, 2)).tolist() == [255, 255, 0]


def test_the_smallest_place_is_the_first_below_a_255th_of_the_range():
    maps = torch.full((1, 1, 1, 4), 1.0)
    maps[0, 0, 0] = torch.tensor([1.0, 0.05, 0.0, 0.06])  # energies 1, 0.0025, 0, 0.0036
    assert extrema(maps, 1, 4) == (0, 0, 0, 1)
    maps[0, 0, 0, 1] = 0.1  # 0.01 is above
    assert extrema(maps, 1, 4) == (0, 0, 0, 2)


def test_maps_in_bfloat16_are_handled_in_float32():
    maps = torch.randn(16, 64, 4, 4, generator=generator()).bfloat16()
    found = quantised_activation(maps, 32, 32)
    assert found.dtype == torch.float32 and torch.equal(found, quantised_activation(maps.float(), 32, 32))
    assert len(found.unique()) > 200  # of 256: bfloat16 could not tell them apart


# rectangles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["corner", "centre"])
def test_rectangles_of_every_size_at_every_place(anchor):
    """Moved inside none loses a part of it, and each covers its anchor."""
    size = height, width = 5, 7
    axes = [torch.arange(n) for n in (height, width, height + 1, width + 1)]
    cases = torch.cartesian_prod(*axes)
    row, column, rows, columns = cases.unbind(1)
    found = rectangle(row, column, rows.double(), columns.double(), *size, anchor)
    for i, (r, c, h, v) in enumerate(cases.tolist()):
        top, left = plain_corner((r, c), (h, v), size, anchor)
        plain = torch.zeros(size, dtype=torch.bool)
        plain[top : top + h, left : left + v] = True
        assert torch.equal(found[i], plain), (r, c, h, v)
    assert torch.equal(found.sum(dim=(1, 2)), rows * columns)
    assert torch.equal(found[torch.arange(len(cases)), row, column], (rows > 0) & (columns > 0))


@pytest.mark.parametrize(
    ("at", "sides", "anchor", "rows", "columns"),
    [
        ((10, 12), (5, 4), "corner", (10, 14), (12, 15)),
        ((10, 12), (5, 3), "centre", (8, 12), (11, 13)),  # odd: as many pixels before as behind
        ((10, 12), (4, 6), "centre", (8, 11), (9, 14)),  # even: one more before
        ((0, 31), (5, 4), "centre", (0, 4), (28, 31)),  # shifted inside at the border, not cut
        ((2, 29), (5, 5), "centre", (0, 4), (27, 31)),  # it just has room
        ((30, 31), (5, 4), "corner", (27, 31), (28, 31)),
        ((3, 2), (40, 2), "corner", (0, 31), (2, 3)),  # higher than the image
    ],
)
def test_the_anchor_is_the_centre_or_the_corner_of_the_rectangle(at, sides, anchor, rows, columns):
    row, column, height, width = (torch.tensor([number]) for number in (*at, *sides))
    inside = rectangle(row, column, height.double(), width.double(), 32, 32, anchor)[0].nonzero()
    first, last = inside.amin(dim=0).tolist(), inside.amax(dim=0).tolist()
    assert [*zip(first, last, strict=True)] == [rows, columns]


def test_side_lengths_are_rounded_as_python_rounds():
    area = torch.tensor([6.25, 12.25, 20.25, 2.25, 40.0], dtype=torch.float64)  # roots 2.5, 3.5, 4.5, 1.5
    aspect = torch.tensor([1, 1, 1, 1, 0.8], dtype=torch.float64)
    rows, columns = side_lengths(area, aspect)
    assert rows.tolist() == [2, 4, 4, 2, 6] and columns.tolist() == [2, 4, 4, 2, 7]


def test_painting_fills_each_channel_inside_and_leaves_the_rest_and_the_original_alone():
    images = torch.randn(2, 3, 6, 6, generator=generator())
    before, inside = images.clone(), torch.zeros(2, 6, 6, dtype=torch.bool)
    inside[0, 1:3, 2:5] = True
    fill = torch.rand(2, 3, generator=generator(), dtype=torch.float64)
    painted = paint(images, inside, fill)
    assert painted.dtype == torch.float32
    assert torch.equal(painted[0, :, 1:3, 2:5], fill[0].float()[:, None, None].expand(3, 2, 3))
    assert torch.equal(painted[0][:, ~inside[0]], before[0][:, ~inside[0]])
    assert torch.equal(painted[1], before[1]) and torch.equal(images, before)


# targets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_modulation_takes_from_the_top_and_gives_to_the_others_alike(classes, clamp):
    targets = torch.softmax(2 * torch.randn(32, classes, generator=generator(), dtype=torch.float64), dim=1)
    ratio = torch.rand(32, generator=generator(), dtype=torch.float64) / 5
    before, found = targets.clone(), modulate(targets, ratio, clamp)
    plain = [plain_modulated(t, r, clamp) for t, r in zip(targets.tolist(), ratio.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(plain, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(targets, before) and modulate(targets.float(), ratio).dtype == torch.float32


def test_a_flat_target_may_become_negative_unless_clamped_and_the_first_of_equals_loses():
    flat, ratio = torch.full((1, 100), 0.01, dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)
    found, clamped = modulate(flat, ratio)[0], modulate(flat, ratio, clamp=True)[0]
    assert float(found[0]) == pytest.approx(-0.04) and (found[1:] > 0.01).all()
    assert float(clamped[0]) == 0 and clamped[1:].tolist() == pytest.approx([1 / 99] * 99)


# whole masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["corner", "centre"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_masked_as_image_by_image(form, size, kind, anchor):
    channels, height, width, *map_size = SIZES[size]
    draw, apply, rule = FORMS[form]
    rule = rule._replace(anchor=anchor, clamp=kind == "plateaus")
    maps, images = maps_of(kind, *map_size), torch.randn(4, channels, height, width, generator=generator(3))
    clean = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    targets = torch.softmax(2 * torch.randn(4, 6, generator=generator(4)), dim=1)
    draws = draw(4, channels, rule, generator(5))
    found = apply(images, maps, clean, targets, draws, rule)
    for i, (image, own) in enumerate(zip(images.numpy(), maps.numpy(), strict=True)):
        expected = plain_mask(form, image, own, *(of[i].tolist() for of in (clean, targets, draws)), rule)
        assert all(
            np.array_equal(ours[i].numpy(), wanted)
            for ours, wanted in zip(found[:2], expected[:2], strict=True)
        )
        for ours, wanted in zip(found[2:], expected[2:], strict=True):
            assert ours[i].tolist() == pytest.approx(wanted, rel=0, abs=1e-6)


def test_half_of_the_ratio_is_painted_twice_on_cifar_and_the_whole_of_each_on_clothing1m():
    ratio = torch.tensor([0.02, 0.07, 0.05], dtype=torch.float64)[:, None]
    maps, clean = torch.randn(3, 2, 4, 4, generator=generator()), torch.ones(3, dtype=torch.float64)
    ones, fills = torch.ones(3, 1, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    cases = (
        (mask, MaskRule(), [ratio, ones, fills], (0.5, 0.5), (1, 1)),
        (mask_clothing, CLOTHING_RULE, [ratio, ones, 2 * ratio, ones, fills], (1, 2), (1, 2)),
    )
    for apply, rule, draws, painted, lost in cases:
        found = apply(torch.zeros(3, 1, 100, 100), maps, clean, torch.eye(3), torch.cat(draws, dim=1), rule)
        for copy, factor in zip(found[:2], painted, strict=True):
            assert copy.mean(dim=(1, 2, 3)).tolist() == pytest.approx(
                (factor * ratio[:, 0]).tolist(), abs=4e-3
            )
        for targets, factor in zip(found[2:], lost, strict=True):
            assert (1 - targets.amax(dim=1)).tolist() == pytest.approx(
                (factor * ratio[:, 0]).tolist(), abs=1e-6
            )


# draws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_draws_are_uniform_within_their_bounds_independent_and_of_the_generator_alone(form):
    draw, _, rule = FORMS[form]
    found, state = draw(20000, 3, rule, generator()), torch.get_rng_state()
    shape = [(0.02, 0.07), ASPECT] if form == "cifar" else 2 * [(0.06, 0.13), ASPECT]
    bounds = shape + 6 * [(0.0, 1.0)]
    assert found.shape == (20000, len(bounds)) and found.dtype == torch.float64
    for column, (low, high) in zip(found.T.numpy(), bounds, strict=True):
        assert low <= column.min() and column.max() <= high
        assert kstest(column, "uniform", (low, high - low)).pvalue > 1e-3
        assert len(np.unique(column)) == len(column)
    correlation = spearmanr(found.numpy()).statistic - np.eye(len(bounds))
    assert np.abs(correlation).max() < 4 / math.sqrt(20000)
    assert torch.equal(draw(9, 1, rule, generator(7)), draw(9, 1, rule, generator(7)))
    assert not torch.equal(draw(9, 1, rule, generator(7)), draw(9, 1, rule, generator(8)))
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(0, 1, rule, generator()).shape == (0, len(shape) + 2)
