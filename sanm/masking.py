"""Label-quality-guided adversarial masking and label modulation, the method's own idea (Sec. 5; Sec. 9 for Clothing1M).

A network's activation map says where it looks. The rectangle at its maximum is painted over on one copy of the image, the
rectangle at its minimum on another; the worse the label seems, the larger the rectangles. What the mask takes from the image,
modulation takes from the top class of the target. All is done for a whole batch at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class MaskRule(NamedTuple):
    """How large the rectangles are, as shares of the image, and where they stand."""

    low: float = 0.02  # a base share is drawn between low and high
    high: float = 0.07
    quality: float = 0.03  # times (1 - clean probability) is added to it
    anchor: str = "corner"  # what of the rectangle stands at the extremum: its top-left corner, or its centre
    clamp: bool = False  # whether modulated targets are kept above zero
    as_released: bool = False  # Clothing1M: with the accidents of the release (Sec. 12, 13 to 15)


CLOTHING_RULE = MaskRule(low=0.06, high=0.13, quality=0.1)
ASPECT = (0.8, 1.25)


class Masked(NamedTuple):
    """The masked copies of B images, and their targets."""

    at_max: Tensor  # [B, C, H, W] the activation's maximum painted over
    at_min: Tensor
    targets_max: Tensor  # [B, K]
    targets_min: Tensor


class Extrema(NamedTuple):
    """Where the activation is largest and smallest, in pixels of the image, int [B] each."""

    row_max: Tensor
    column_max: Tensor
    row_min: Tensor
    column_min: Tensor


def activation_energy(maps: Tensor) -> Tensor:
    """Sum over channels of the squared map: [B, D, h, w] -> [B, h, w], float32."""
    return maps.float().square().sum(dim=1)


def quantised_activation(maps: Tensor, height: int, width: int) -> Tensor:
    """The energy at the size of the image, scaled to whole numbers 0 .. 255 image by image: float32 [B, H, W].

    Resized bilinearly with half-pixel centres, which makes plateaus at the borders; 1e-3 before rounding down keeps
    the last bit of the arithmetic from breaking them.
    """
    energy = activation_energy(maps)
    energy = energy - energy.amin(dim=(1, 2), keepdim=True)  # of a constant map exactly nothing is left
    energy = F.interpolate(energy[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    low, high = (extreme[:, None, None] for extreme in (energy.amin(dim=(1, 2)), energy.amax(dim=(1, 2))))
    return torch.floor(255 * ((energy - low) / (high - low + 1e-12)) + 1e-3)


def extrema(maps: Tensor, height: int, width: int) -> Extrema:
    """The first place, row by row, of the largest and of the smallest quantised activation."""
    flat = quantised_activation(maps, height, width).flatten(1)
    largest, smallest = flat.argmax(dim=1), flat.argmin(dim=1)
    return Extrema(largest // width, largest % width, smallest // width, smallest % width)


# rectangles -----------------------------------------------------------------------------------------------------------


def side_lengths(area: Tensor, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of rectangles of given areas (pixels) and aspects (rows / columns), float64 [B], rounded half to even."""
    return (area * aspect).sqrt().round(), (area / aspect).sqrt().round()


def rectangle(
    row: Tensor,
    column: Tensor,
    rows: Tensor,
    columns: Tensor,
    height: int,
    width: int,
    anchor: str = "corner",
) -> Tensor:
    """The pixels of each image's rectangle, bool [B, H, W]: at (row, column), moved back inside where it would stand out."""
    if anchor == "centre":
        row, column = row - rows // 2, column - columns // 2
    top = torch.minimum(row.clamp_min(0), height - rows)[:, None]
    left = torch.minimum(column.clamp_min(0), width - columns)[:, None]
    y = torch.arange(height, device=row.device)
    x = torch.arange(width, device=row.device)
    inside_rows = (y >= top) & (y < top + rows[:, None])  # [B, H]
    inside_columns = (x >= left) & (x < left + columns[:, None])  # [B, W]
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def paint(images: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """Images [B, C, H, W] with one value per channel, fill [B, C], inside the rectangles [B, H, W]."""
    return torch.where(inside[:, None], fill.to(images.dtype)[:, :, None, None], images)


def modulate(targets: Tensor, ratio: Tensor, clamp: bool = False) -> Tensor:
    """Label modulation: ratio [B] is taken off the largest entry of each target [B, K] and spread evenly over the others.

    Rows still sum to 1; the largest entry may become negative, unless clamp, which sets it to 0 and rescales the row.
    """
    ratio = ratio.to(targets.dtype)[:, None]
    top = F.one_hot(targets.argmax(dim=1), targets.shape[1]).bool()
    modulated = torch.where(top, targets - ratio, targets + ratio / (targets.shape[1] - 1))
    if clamp:
        modulated = modulated.clamp_min(0)
        modulated = modulated / modulated.sum(dim=1, keepdim=True)
    return modulated


def _uniform(count: int, columns: int, generator: Generator) -> Tensor:
    return torch.rand(count, columns, dtype=torch.float64, generator=generator, device=generator.device)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


# CIFAR ----------------------------------------------------------------------------------------------------------------


def draw_masks(count: int, channels: int, rule: MaskRule, generator: Generator) -> Tensor:
    """The draws of `mask`, float64 [count, 2 + 2 C]: base share, aspect, fills of the maximum's rectangle, of the minimum's."""
    uniform = _uniform(count, 2 + 2 * channels, generator)
    share, aspect = _between(uniform[:, 0], rule.low, rule.high), _between(uniform[:, 1], *ASPECT)
    return torch.cat([share[:, None], aspect[:, None], uniform[:, 2:]], dim=1)


def mask(
    images: Tensor, maps: Tensor, clean: Tensor, targets: Tensor, draws: Tensor, rule: MaskRule
) -> Masked:
    """Both masked copies of normalised images [B, C, H, W], and their modulated targets, as on CIFAR (Sec. 5).

    maps [B, D, h, w] of the same views; clean probabilities [B]; targets [B, K]; draws of `draw_masks`. The two rectangles have
    the same shape and cover half of the ratio each; the target loses the whole of it, once.
    """
    height, width, channels = *images.shape[2:], images.shape[1]
    ratio = draws[:, 0] + rule.quality * (1 - clean.double())
    rows, columns = side_lengths(0.5 * ratio * height * width, draws[:, 1])
    at = extrema(maps, height, width)
    size = rows, columns, height, width, rule.anchor
    modulated = modulate(targets, ratio, rule.clamp)
    return Masked(
        paint(images, rectangle(at.row_max, at.column_max, *size), draws[:, 2 : 2 + channels]),
        paint(images, rectangle(at.row_min, at.column_min, *size), draws[:, 2 + channels :]),
        modulated,
        modulated,
    )


# Clothing1M -----------------------------------------------------------------------------------------------------------


def draw_clothing_masks(count: int, channels: int, rule: MaskRule, generator: Generator) -> Tensor:
    """The draws of `mask_clothing`, float64 [count, 4 + 2 C]: share and aspect at the maximum, at the minimum, then fills."""
    uniform = _uniform(count, 4 + 2 * channels, generator)
    shapes = [
        _between(uniform[:, i], *bounds) for i, bounds in enumerate(2 * [(rule.low, rule.high), ASPECT])
    ]
    return torch.cat([torch.stack(shapes, dim=1), uniform[:, 4:]], dim=1)


def mask_clothing(
    images: Tensor, maps: Tensor, clean: Tensor, targets: Tensor, draws: Tensor, rule: MaskRule
) -> Masked:
    """As `mask`, with two rectangles of shapes of their own that cover their whole ratios; each target loses its own (Sec. 9).

    rule.as_released: the quality term counts pixels and the targets shift by areas in pixels; the maximum's rectangle always
    stands at the bottom edge (Sec. 12).
    """
    height, width, channels = *images.shape[2:], images.shape[1]
    at = extrema(maps, height, width)
    copies, modulated = [], []
    for side, (row, column) in enumerate(((at.row_max, at.column_max), (at.row_min, at.column_min))):
        ratio, aspect = draws[:, 2 * side], draws[:, 2 * side + 1]
        quality = rule.quality * (1 - clean.double())
        area = ratio * height * width + quality if rule.as_released else (ratio + quality) * height * width
        if rule.as_released and side == 0:
            row = torch.full_like(row, height)  # noqa: PLW2901
        inside = rectangle(row, column, *side_lengths(area, aspect), height, width, rule.anchor)
        fill = draws[:, 4 + side * channels : 4 + (side + 1) * channels]
        copies.append(paint(images, inside, fill))
        lost = area if rule.as_released else ratio + quality
        modulated.append(modulate(targets, lost, rule.clamp))
    return Masked(*copies, *modulated)
