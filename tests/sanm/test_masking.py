"""Masks and label modulation of whole batches, against loops over single images and pixels."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, spearmanr
from torch import Tensor

from sanm import masking
from sanm.choices import CLOTHING_RULE, MaskRule

# channels, height and width of the image; channels, height and width of the map
SIZES = {
    "CIFAR": (3, 32, 32, 5, 4, 4),
    "digits": (1, 8, 8, 4, 4, 4),
    "wide": (3, 12, 20, 3, 3, 5),
    "one place": (3, 16, 16, 2, 1, 1),
}
KINDS = ("random", "plateaus", "constant", "corners")
FORMS = {
    "cifar": (masking.draw_masks, masking.mask, MaskRule()),
    "clothing": (masking.draw_clothing_masks, masking.mask_clothing, CLOTHING_RULE),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps_of(kind: str, depth: int, height: int, width: int, count: int = 4) -> Tensor:
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


def plain_corner(at: tuple, sides: tuple, size: tuple, anchor: str) -> list[int]:
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
    *at_max, row, column = (int(place) for place in masking.extrema(torch.from_numpy(maps)[None], *size))
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


def test_the_extrema_are_the_first_pixels_of_the_plateaus_at_the_ends_of_an_enlarged_map():
    """Of a map of 3 x 5 on 12 x 20 pixels the last place has its centre at 9.5, 17.5: from pixel 10, 18 on it is alone."""
    maps = torch.full((3, 2, 3, 5), 1.0)
    maps[0, 0, 2, 4], maps[0, :, 0, 4] = 2.0, 0.0
    maps[1, 0, 1, 2], maps[1, :, 2, 0] = -2.0, 0.0
    maps[2] = 1.7  # constant: the first pixel
    found = torch.stack(masking.extrema(maps, 12, 20), dim=1).tolist()
    assert found == [[10, 18, 0, 18], [5, 9, 10, 0], [0, 0, 0, 0]]
    assert masking.quantised_activation(maps, 12, 20).amax(dim=(1, 2)).tolist() == [255, 255, 0]


def test_the_smallest_place_is_the_first_below_a_255th_of_the_range():
    maps = torch.full((1, 1, 1, 4), 1.0)
    maps[0, 0, 0] = torch.tensor([1.0, 0.05, 0.0, 0.06])  # energies 1, 0.0025, 0, 0.0036
    assert masking.extrema(maps, 1, 4) == (0, 0, 0, 1)
    maps[0, 0, 0, 1] = 0.1  # 0.01 is above
    assert masking.extrema(maps, 1, 4) == (0, 0, 0, 2)


def test_maps_in_bfloat16_are_handled_in_float32():
    maps = torch.randn(16, 64, 4, 4, generator=generator()).bfloat16()
    found, wanted = (masking.quantised_activation(given, 32, 32) for given in (maps, maps.float()))
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert len(found.unique()) > 200  # of 256: bfloat16 could not tell them apart


@pytest.mark.parametrize("anchor", ["corner", "centre"])
def test_rectangles_of_every_size_at_every_place(anchor):
    """Moved inside none loses a part of it, and each covers its anchor."""
    size = height, width = 5, 7
    axes = [torch.arange(n) for n in (height, width, height + 1, width + 1)]
    cases = torch.cartesian_prod(*axes)
    row, column, rows, columns = cases.unbind(1)
    found = masking.rectangle(row, column, rows.double(), columns.double(), *size, anchor)
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
        ((10, 12), (5, 3), "centre", (8, 12), (11, 13)),  # odd: as many pixels before as behind
        ((10, 12), (4, 6), "centre", (8, 11), (9, 14)),  # even: one more before
        ((0, 31), (5, 4), "centre", (0, 4), (28, 31)),  # shifted inside at the border, not cut
        ((3, 2), (40, 2), "corner", (0, 31), (2, 3)),  # higher than the image
    ],
)
def test_the_anchor_is_the_centre_or_the_corner_of_the_rectangle(at, sides, anchor, rows, columns):
    row, column, height, width = (torch.tensor([number]) for number in (*at, *sides))
    inside = masking.rectangle(row, column, height.double(), width.double(), 32, 32, anchor)[0].nonzero()
    first, last = inside.amin(dim=0).tolist(), inside.amax(dim=0).tolist()
    assert [*zip(first, last, strict=True)] == [rows, columns]


def test_side_lengths_are_rounded_as_python_rounds():
    area = torch.tensor([6.25, 12.25, 20.25, 2.25, 40.0], dtype=torch.float64)  # roots 2.5, 3.5, 4.5, 1.5
    aspect = torch.tensor([1, 1, 1, 1, 0.8], dtype=torch.float64)
    rows, columns = masking.side_lengths(area, aspect)
    assert rows.tolist() == [2, 4, 4, 2, 6] and columns.tolist() == [2, 4, 4, 2, 7]


def test_a_flat_target_may_become_negative_unless_clamped_and_the_first_of_equals_loses():
    flat, ratio = torch.full((1, 100), 0.01, dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)
    found, clamped = masking.modulate(flat, ratio)[0], masking.modulate(flat, ratio, clamp=True)[0]
    assert float(found[0]) == pytest.approx(-0.04) and (found[1:] > 0.01).all()
    assert float(clamped[0]) == 0 and clamped[1:].tolist() == pytest.approx([1 / 99] * 99)
    assert masking.modulate(flat.float(), ratio).dtype == torch.float32


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
        for ours, wanted, exact in zip(found, expected, (True, True, False, False), strict=True):
            np.testing.assert_allclose(ours[i], wanted, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_draws_are_uniform_within_their_bounds_independent_and_of_the_generator_alone(form):
    draw, _, rule = FORMS[form]
    found, state = draw(20000, 3, rule, generator()), torch.get_rng_state()
    shape = [(0.02, 0.07), masking.ASPECT] if form == "cifar" else 2 * [(0.06, 0.13), masking.ASPECT]
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
