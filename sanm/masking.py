"""AMG, adversarial mask generation, and NLR, the modulated label: the idea of the paper (README, sections 5 and 9).

AMG: a network's activation map locates a rectangle, which is painted over (Eq. 5). The lower the clean probability of the label,
the larger the rectangle (Eq. 2). NLR: the ratio of the image that the mask takes also leaves the top class of the target (Eq. 7).
The paper's figure draws one masked copy, at the maximum of the map. The second copy, masked at the minimum, is in the released
code alone. All functions work on batches.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from sanm.choices import MaskRule

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


def mask_ratio(base: Tensor, clean: Tensor, quality: float) -> Tensor:
    """The ratio of each image that is masked (AMG, Eq. 2), float64 [B]: base + quality (1 - clean probability)."""
    return base + quality * (1 - clean.double())


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
    anchor: str,
) -> Tensor:
    """The pixels that each image's mask covers (AMG, Eq. 5), bool [B, H, W].

    row, column int [B]: the extremum. rows, columns [B]: the sides. anchor "centre": the rectangle is centred on the extremum
    (Eq. 4); of an even side, the extremum is the second of the two middle pixels. "corner": its top-left pixel is the
    extremum, as in the released code. A rectangle that crosses the border is shifted inside, as in the release. No source says
    so for centred rectangles: that is our choice.
    """
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
    """Masked images (AMG, Eq. 5): [B, C, H, W] with one value per channel, fill [B, C], inside the rectangles [B, H, W]."""
    return torch.where(inside[:, None], fill.to(images.dtype)[:, :, None, None], images)


def modulate(targets: Tensor, ratio: Tensor, clamp: bool = False) -> Tensor:
    """Modulated targets (NLR, Eq. 7): ratio [B] leaves the largest entry of each target [B, K] and goes evenly to the others.

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
    """The draws of `mask`, float64 [count, 2 + 2 C]: base ratio, aspect, fills of the maximum's rectangle, of the minimum's."""
    uniform = _uniform(count, 2 + 2 * channels, generator)
    base, aspect = _between(uniform[:, 0], rule.low, rule.high), _between(uniform[:, 1], *ASPECT)
    return torch.cat([base[:, None], aspect[:, None], uniform[:, 2:]], dim=1)


def mask(
    images: Tensor, maps: Tensor, clean: Tensor, targets: Tensor, draws: Tensor, rule: MaskRule
) -> Masked:
    """AMG and NLR on CIFAR (README, section 5): both masked copies of normalised images [B, C, H, W], their modulated targets.

    maps [B, D, h, w] of the same views; clean probabilities [B]; targets [B, K]; draws of `draw_masks`. The two rectangles have
    the same shape and cover half of the ratio each. The target loses the full ratio once.
    """
    height, width, channels = *images.shape[2:], images.shape[1]
    ratio = mask_ratio(draws[:, 0], clean, rule.quality)
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
    """The draws of `mask_clothing`, float64 [count, 4 + 2 C]: base ratio, aspect at the maximum, both at the minimum, fills."""
    uniform = _uniform(count, 4 + 2 * channels, generator)
    shapes = [
        _between(uniform[:, i], *bounds) for i, bounds in enumerate(2 * [(rule.low, rule.high), ASPECT])
    ]
    return torch.cat([torch.stack(shapes, dim=1), uniform[:, 4:]], dim=1)


def mask_clothing(
    images: Tensor, maps: Tensor, clean: Tensor, targets: Tensor, draws: Tensor, rule: MaskRule
) -> Masked:
    """As `mask`, but each rectangle has its own shape and covers its full ratio, and each target loses the ratio of its mask.

    Clothing1M's form of AMG and NLR (README, section 9). rule.as_released: the quality term counts pixels, the targets shift by
    areas in pixels, and the maximum's rectangle always stands at the bottom edge.
    """
    height, width, channels = *images.shape[2:], images.shape[1]
    at = extrema(maps, height, width)
    copies, modulated = [], []
    for side, (row, column) in enumerate(((at.row_max, at.column_max), (at.row_min, at.column_min))):
        base, aspect = draws[:, 2 * side], draws[:, 2 * side + 1]
        ratio = mask_ratio(base, clean, rule.quality)
        area = ratio * height * width
        if rule.as_released:
            area = mask_ratio(base * height * width, clean, rule.quality)
        if rule.as_released and side == 0:
            row = torch.full_like(row, height)  # noqa: PLW2901
        inside = rectangle(row, column, *side_lengths(area, aspect), height, width, rule.anchor)
        fill = draws[:, 4 + side * channels : 4 + (side + 1) * channels]
        copies.append(paint(images, inside, fill))
        lost = area if rule.as_released else ratio
        modulated.append(modulate(targets, lost, rule.clamp))
    return Masked(*copies, *modulated)
