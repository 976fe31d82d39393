"""Masks and label modulation of whole batches, against loops over single images and pixels."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, spearmanr
from torch import Tensor

from sanm.masking import (
    ASPECT,
    CLOTHING_RULE,
    MaskRule,
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
    "tall": (1, 28, 18, 2, 7, 4),
    "one place": (3, 16, 16, 2, 1, 1),
}
KINDS = ("random", "plateaus", "constant", "corners", "edges", "zero")
RULES = {"cifar": MaskRule(), "clothing": CLOTHING_RULE}


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
    if kind == "corners":
        for i, (row, column) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)]):
            maps[i, :, row, column] = 2.0
    if kind == "edges":
        for i, (row, column) in enumerate(
            [(0, width // 2), (-1, width // 2), (height // 2, 0), (height // 2, -1)]
        ):
            maps[i] = 1.0
            maps[i, :, row, column] = 0.1 + i
    return maps


# the loops --------------------------------------------------------------------------------------------------------------


def nearest_two(place: int, size: int, source: int) -> tuple[int, int, float]:
    """Between which entries of a line a pixel of its enlargement lies, and how far on, half-pixel centres."""
    at = (place + 0.5) * source / size - 0.5
    low = math.floor(at)
    return min(max(low, 0), source - 1), min(max(low + 1, 0), source - 1), at - low


def plain_quantised(maps: np.ndarray, height: int, width: int) -> list[list[int]]:
    """q of one image's map [D, h, w]."""
    energy = [
        [sum(float(v) ** 2 for v in maps[:, r, c]) for c in range(maps.shape[2])]
        for r in range(maps.shape[1])
    ]
    large = []
    for i in range(height):
        above, below, down = nearest_two(i, height, len(energy))
        row = []
        for j in range(width):
            left, right, across = nearest_two(j, width, len(energy[0]))
            top = (1 - across) * energy[above][left] + across * energy[above][right]
            bottom = (1 - across) * energy[below][left] + across * energy[below][right]
            row.append((1 - down) * top + down * bottom)
        large.append(row)
    low, high = min(map(min, large)), max(map(max, large))
    return [[math.floor(255 * (e - low) / (high - low + 1e-12) + 1e-3) for e in row] for row in large]


def plain_extrema(quantised: list[list[int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first place of the largest and of the smallest entry, row by row."""
    largest, smallest = (0, 0), (0, 0)
    for i, row in enumerate(quantised):
        for j, value in enumerate(row):
            if value > quantised[largest[0]][largest[1]]:
                largest = i, j
            if value < quantised[smallest[0]][smallest[1]]:
                smallest = i, j
    return largest, smallest


def plain_corner(
    at: tuple[int, int], sides: tuple[int, int], size: tuple[int, int], anchor: str
) -> tuple[int, int]:
    """Top and left of a rectangle."""
    places = []
    for place, side, length in zip(at, sides, size, strict=True):
        start = place - side // 2 if anchor == "centre" else place
        start = max(start, 0)
        places.append(length - side if start + side > length else start)
    return places[0], places[1]


def plain_painted(
    image: np.ndarray, corner: tuple[int, int], sides: tuple[int, int], fill: list[float]
) -> np.ndarray:
    painted = image.copy()
    for channel in range(image.shape[0]):
        for i in range(max(corner[0], 0), corner[0] + sides[0]):
            for j in range(max(corner[1], 0), corner[1] + sides[1]):
                painted[channel, i, j] = fill[channel]
    return painted


def plain_sides(area: float, aspect: float) -> tuple[int, int]:
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def plain_modulated(target: list[float], ratio: float, clamp: bool = False) -> list[float]:
    top = target.index(max(target))
    moved = [t - ratio if c == top else t + ratio / (len(target) - 1) for c, t in enumerate(target)]
    if clamp:
        moved = [max(t, 0.0) for t in moved]
        moved = [t / sum(moved) for t in moved]
    return moved


def plain_mask(image, maps, clean, target, draws, rule):
    """(at_max, at_min, target, target) of one image [C, H, W], from its row of draws [2 + 2 C]."""
    channels, height, width = image.shape
    ratio, aspect = draws[0] + rule.quality * (1 - clean), draws[1]
    sides = plain_sides(0.5 * ratio * height * width, aspect)
    copies = []
    for number, at in enumerate(plain_extrema(plain_quantised(maps, height, width))):
        fill = draws[2 + number * channels : 2 + (number + 1) * channels]
        copies.append(
            plain_painted(image, plain_corner(at, sides, (height, width), rule.anchor), sides, fill)
        )
    modulated = plain_modulated(target, ratio, rule.clamp)
    return *copies, modulated, modulated


def plain_mask_clothing(image, maps, clean, target, draws, rule):
    """The same for Clothing1M, draws [4 + 2 C]: two shapes, two ratios, nothing halved."""
    channels, height, width = image.shape
    copies, targets = [], []
    for number, at in enumerate(plain_extrema(plain_quantised(maps, height, width))):
        ratio, aspect = draws[2 * number] + rule.quality * (1 - clean), draws[2 * number + 1]
        sides = plain_sides(ratio * height * width, aspect)
        fill = draws[4 + number * channels : 4 + (number + 1) * channels]
        copies.append(
            plain_painted(image, plain_corner(at, sides, (height, width), rule.anchor), sides, fill)
        )
        targets.append(plain_modulated(target, ratio, rule.clamp))
    return *copies, *targets


# where the activation is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_resized_scaled_and_searched_as_pixel_by_pixel(size, kind):
    _, height, width, *map_size = SIZES[size]
    maps = maps_of(kind, *map_size)
    quantised, at = quantised_activation(maps, height, width), extrema(maps, height, width)
    assert quantised.shape == (len(maps), height, width)
    for i, own in enumerate(maps.numpy()):
        plain = plain_quantised(own, height, width)
        assert quantised[i].tolist() == plain
        assert ((at.row_max[i], at.column_max[i]), (at.row_min[i], at.column_min[i])) == plain_extrema(plain)


def test_a_hot_corner_of_the_map_is_found_where_its_plateau_begins_and_a_constant_map_at_the_first_pixel():
    # of 4 places on 32 pixels the last has its centre at 27.5: from pixel 28 on nothing is mixed into it
    assert [int(of[3]) for of in extrema(maps_of("corners", 3, 4, 4), 32, 32)] == [28, 28, 0, 0]
    assert [int(of[1]) for of in extrema(maps_of("corners", 3, 4, 4), 32, 32)] == [0, 28, 0, 0]
    for kind in ("constant", "zero"):
        assert all((of == 0).all() for of in extrema(maps_of(kind, 3, 4, 4), 32, 32))


def test_the_smallest_place_is_the_first_below_a_255th_of_the_range():
    maps = torch.full((1, 1, 1, 4), 1.0)
    maps[0, 0, 0] = torch.tensor([1.0, 0.05, 0.0, 0.06])  # energies 1, 0.0025, 0, 0.0036
    assert extrema(maps, 1, 4) == (0, 0, 0, 1)
    maps[0, 0, 0, 1] = 0.1  # 0.01 is above
    assert extrema(maps, 1, 4) == (0, 0, 0, 2)


def test_maps_in_bfloat16_are_handled_in_float32():
    maps = torch.randn(16, 64, 4, 4, generator=generator()).bfloat16()
    found = quantised_activation(maps, 32, 32)
    assert found.dtype == torch.float32
    assert torch.equal(found, quantised_activation(maps.float(), 32, 32))
    assert len(found.unique()) > 200  # of 256: bfloat16 could not tell them apart
    for ours, wanted in zip(extrema(maps, 32, 32), extrema(maps.float(), 32, 32), strict=True):
        assert torch.equal(ours, wanted)


# rectangles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["corner", "centre"])
def test_rectangles_of_every_size_at_every_place(anchor):
    height, width = 5, 7
    cases = torch.cartesian_prod(
        *(torch.arange(n) for n in (height, width)), *(torch.arange(n + 1) for n in (5, 7))
    )
    row, column, rows, columns = cases.unbind(1)
    found = rectangle(row, column, rows.double(), columns.double(), height, width, anchor)
    assert found.shape == (len(cases), height, width) and found.dtype == torch.bool
    for i, (r, c, h, v) in enumerate(cases.tolist()):
        top, left = plain_corner((r, c), (h, v), (height, width), anchor)
        plain = torch.zeros(height, width, dtype=torch.bool)
        plain[top : top + h, left : left + v] = True
        assert torch.equal(found[i], plain), (r, c, h, v)
    # moved inside, none loses a part of it, and each covers its anchor
    assert torch.equal(found.sum(dim=(1, 2)), rows * columns)
    covered = found[torch.arange(len(cases)), row, column]
    assert torch.equal(covered, (rows > 0) & (columns > 0))


@pytest.mark.parametrize(
    ("at", "sides", "anchor", "rows", "columns"),
    [
        ((10, 12), (5, 4), "corner", (10, 14), (12, 15)),
        ((10, 12), (5, 3), "centre", (8, 12), (11, 13)),  # odd: as many pixels before as behind
        ((10, 12), (4, 6), "centre", (8, 11), (9, 14)),  # even: one more before
        ((10, 12), (1, 1), "centre", (10, 10), (12, 12)),
        ((0, 31), (5, 4), "centre", (0, 4), (28, 31)),  # shifted inside at the border, not cut
        ((31, 0), (4, 5), "centre", (28, 31), (0, 4)),
        ((1, 30), (5, 5), "centre", (0, 4), (27, 31)),
        ((2, 29), (5, 5), "centre", (0, 4), (27, 31)),  # it just has room
        ((30, 31), (5, 4), "corner", (27, 31), (28, 31)),
    ],
)
def test_the_anchor_is_the_centre_or_the_corner_of_the_rectangle(at, sides, anchor, rows, columns):
    row, column, height, width = (torch.tensor([number]) for number in (*at, *sides))
    inside = rectangle(row, column, height.double(), width.double(), 32, 32, anchor)[0].nonzero()
    assert list(zip(*(inside.amin(dim=0).tolist(), inside.amax(dim=0).tolist()), strict=True)) == [
        rows,
        columns,
    ]
    assert len(inside) == sides[0] * sides[1]


@pytest.mark.parametrize(("apply", "rule"), [(mask, MaskRule()), (mask_clothing, CLOTHING_RULE)])
def test_by_default_masks_are_centred_on_the_extrema(apply, rule):
    maps = torch.rand(1, 1, 64, 64, generator=generator()).mul(0.5).add(0.2)
    maps[0, 0, 20, 40], maps[0, 0, 44, 24] = 1.0, 0.0
    draw = draw_masks if apply is mask else draw_clothing_masks
    draws = draw(1, 1, rule, generator(2))
    found = apply(torch.zeros(1, 1, 64, 64), maps, torch.zeros(1), torch.eye(3)[:1], draws, rule)
    for painted, middle in zip(found[:2], ((20, 40), (44, 24)), strict=True):
        pixels = painted[0, 0].nonzero().double()
        assert len(pixels) > 50
        off = torch.tensor(middle) - pixels.mean(dim=0)
        assert set(off.tolist()) <= {0.0, 0.5}


def test_a_rectangle_higher_than_the_image_covers_all_rows():
    found = rectangle(
        *(torch.tensor([n]) for n in (3, 2)), torch.tensor([9.0]), torch.tensor([2.0]), 6, 20, "corner"
    )
    assert found[0, :, 2:4].all() and found.sum() == 12


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
    assert torch.equal(targets, before)


def test_float32_targets_stay_float32_and_sum_to_1():
    targets = torch.softmax(torch.randn(64, 100, generator=generator()), dim=1)
    found = modulate(targets, torch.full((64,), 0.1, dtype=torch.float64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=1), torch.ones(64), rtol=0, atol=2e-6)


def test_a_flat_target_may_become_negative_unless_clamped_and_the_first_of_equals_loses():
    flat, ratio = torch.full((1, 100), 0.01, dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)
    found, clamped = modulate(flat, ratio)[0], modulate(flat, ratio, clamp=True)[0]
    assert float(found[0]) == pytest.approx(-0.04) and (found[1:] > 0.01).all()
    assert float(clamped[0]) == 0 and clamped[1:].tolist() == pytest.approx([1 / 99] * 99)


# whole masks ------------------------------------------------------------------------------------------------------------


def batch(size: str, kind: str, form: str, classes: int = 6):
    """Arguments of a mask but for the rule, as if network and draws had made them."""
    channels, height, width, *map_size = SIZES[size]
    maps = maps_of(kind, *map_size)
    draw = draw_masks if form == "cifar" else draw_clothing_masks
    images = torch.randn(len(maps), channels, height, width, generator=generator(3))
    clean = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    targets = torch.softmax(2 * torch.randn(len(maps), classes, generator=generator(4)), dim=1)
    return images, maps, clean, targets, draw(len(maps), channels, RULES[form], generator(5))


@pytest.mark.parametrize("anchor", ["corner", "centre"])
@pytest.mark.parametrize("kind", ["random", "plateaus", "constant", "corners"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["cifar", "clothing"])
def test_a_batch_is_masked_as_image_by_image(form, size, kind, anchor):
    given = batch(size, kind, form)
    rule = RULES[form]._replace(anchor=anchor, clamp=kind == "plateaus")
    apply, plain = (mask, plain_mask) if form == "cifar" else (mask_clothing, plain_mask_clothing)
    found = apply(*given, rule)
    for i in range(len(given[0])):
        image, maps = given[0][i].numpy(), given[1][i].numpy()
        expected = plain(image, maps, *(of[i].tolist() for of in given[2:]), rule)
        for ours, wanted in zip(found[:2], expected[:2], strict=True):
            assert np.array_equal(ours[i].numpy(), wanted)
        for ours, wanted in zip(found[2:], expected[2:], strict=True):
            assert ours[i].tolist() == pytest.approx(wanted, rel=0, abs=1e-6)
            assert float(ours[i].sum()) == pytest.approx(1, abs=2e-6)


def test_half_of_the_ratio_is_painted_twice_on_cifar_and_the_whole_of_each_on_clothing1m():
    ratio = torch.tensor([0.02, 0.07, 0.05], dtype=torch.float64)
    maps, clean = torch.randn(3, 2, 4, 4, generator=generator()), torch.ones(3, dtype=torch.float64)
    images, targets = torch.zeros(3, 1, 100, 100), torch.eye(3)
    ones, fills = torch.ones(3, 1, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    found = mask(images, maps, clean, targets, torch.cat([ratio[:, None], ones, fills], dim=1), MaskRule())
    for painted in found[:2]:
        assert painted.mean(dim=(1, 2, 3)).tolist() == pytest.approx((ratio / 2).tolist(), abs=2e-3)
    assert (1 - found.targets_max.amax(dim=1)).tolist() == pytest.approx(ratio.tolist(), abs=1e-6)
    draws = torch.cat([ratio[:, None], ones, 2 * ratio[:, None], ones, fills], dim=1)
    found = mask_clothing(images, maps, clean, targets, draws, CLOTHING_RULE)
    for number, (painted, modulated) in enumerate(zip(found[:2], found[2:], strict=True), start=1):
        assert painted.mean(dim=(1, 2, 3)).tolist() == pytest.approx((number * ratio).tolist(), abs=4e-3)
        assert (1 - modulated.amax(dim=1)).tolist() == pytest.approx((number * ratio).tolist(), abs=1e-6)


@pytest.mark.parametrize(("apply", "rule"), [(mask, MaskRule()), (mask_clothing, CLOTHING_RULE)])
def test_the_worse_a_label_the_larger_its_rectangles_and_the_more_its_target_loses(apply, rule):
    clean = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    maps = torch.randn(1, 4, 4, 4, generator=generator()).expand(5, -1, -1, -1)
    draws = torch.tensor(
        [[0.05, 1.0] * (1 if apply is mask else 2) + [1.0, 1.0]], dtype=torch.float64
    ).expand(5, -1)
    found = apply(torch.zeros(5, 1, 96, 96), maps, clean, torch.eye(4)[[1] * 5], draws, rule)
    for painted in found[:2]:
        assert (painted.sum(dim=(1, 2, 3)).diff() > 0).all()
    for modulated in found[2:]:
        step = rule.quality / 4
        assert modulated[:, 1].diff().tolist() == pytest.approx([-step] * 4, abs=1e-6)
        assert modulated[:, 0].diff().tolist() == pytest.approx([step / 3] * 4, abs=1e-6)


def test_the_released_clothing_masks_stand_at_the_bottom_and_shift_targets_by_pixels():
    images, maps, clean, targets, draws = batch("CIFAR", "random", "clothing")
    rule = CLOTHING_RULE._replace(anchor="corner", as_released=True)
    found = mask_clothing(images, maps, clean, targets, draws, rule)
    at = extrema(maps, 32, 32)
    for i in range(len(images)):
        (share, aspect, *_), quality = draws[i].tolist(), 0.1 * (1 - float(clean[i]))
        area = share * 1024 + quality
        changed = (found.at_max[i] != images[i]).any(dim=0).nonzero()
        rows, columns = plain_sides(area, aspect)
        assert changed.amax(dim=0).tolist()[0] == 31 and changed.amin(dim=0).tolist()[0] == 32 - rows
        assert changed.amin(dim=0).tolist()[1] == min(int(at.column_max[i]), 32 - columns)
        lost = targets[i].max() - found.targets_max[i].min()
        assert float(lost) == pytest.approx(area, rel=1e-5)


# draws ------------------------------------------------------------------------------------------------------------------

DRAWS = {
    "cifar": (draw_masks, [(0.02, 0.07), ASPECT]),
    "clothing": (draw_clothing_masks, [(0.06, 0.13), ASPECT, (0.06, 0.13), ASPECT]),
}


@pytest.mark.parametrize("form", DRAWS)
def test_draws_are_uniform_within_their_bounds_and_independent(form):
    draw, shapes = DRAWS[form]
    found = draw(20000, 3, RULES[form], generator())
    bounds = shapes + 6 * [(0.0, 1.0)]
    assert found.shape == (20000, len(bounds)) and found.dtype == torch.float64
    for column, (low, high) in zip(found.T.numpy(), bounds, strict=True):
        assert low <= column.min() and column.max() <= high
        assert kstest(column, "uniform", (low, high - low)).pvalue > 1e-3
        assert len(np.unique(column)) == len(column)
    correlation = spearmanr(found.numpy()).statistic - np.eye(len(bounds))
    assert np.abs(correlation).max() < 4 / math.sqrt(20000)
    neighbours = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in found.T.numpy()]
    assert np.abs(neighbours).max() < 4 / math.sqrt(20000)


@pytest.mark.parametrize("form", DRAWS)
def test_draws_follow_the_generator_alone_and_the_rule(form):
    draw, _ = DRAWS[form]
    state = torch.get_rng_state()
    assert torch.equal(draw(9, 1, RULES[form], generator(7)), draw(9, 1, RULES[form], generator(7)))
    assert not torch.equal(draw(9, 1, RULES[form], generator(7)), draw(9, 1, RULES[form], generator(8)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (draw(9, 1, MaskRule(low=0.3, high=0.3), generator())[:, 0] == 0.3).all()
    assert draw(0, 1, RULES[form], generator()).shape == (0, 4 if form == "cifar" else 6)
