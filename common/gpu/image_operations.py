"""PIL's image operations on uint8 batches [B, C, H, W], C = 1 (mode L) or 3 (RGB), with one parameter per image.

The results are PIL's bit for bit (compared with Pillow 13), so a policy written for PIL runs on batches, on their device. No
operation changes its input, loops over the images or waits for the device; all keep the shape and return uint8. `apply_in_turn`
applies to each image its own operations, and starts those of a family together. Empty batches and images of any size from 1 x 1
are allowed.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """CPU tensors on a device: a card gets them in one copy from pinned memory, which the host does not wait for."""
    if device.type == "cpu":
        return tensors
    # each begins at a multiple of 8 bytes, so that it can be viewed as what it was
    flat = [x.reshape(-1).view(torch.uint8) for x in tensors]
    flat = [F.pad(x, (0, -len(x) % 8)) for x in flat]
    packed = torch.cat(flat).pin_memory().to(device, non_blocking=True)
    parts = zip(packed.split([len(x) for x in flat]), tensors, strict=True)
    return tuple(part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in parts)


def per_image(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1], to broadcast with a batch of images."""
    return values[:, None, None, None]


@cache
def luminance_weights(device: torch.device) -> Tensor:
    """The weights of red, green and blue in PIL's grey, float32 [3, 1, 1]."""
    return torch.tensor([19595, 38470, 7471], device=device).view(3, 1, 1) / 65536


def luminance(images: Tensor) -> Tensor:
    """PIL's convert("L"): uint8 [B, 3, H, W] to its grey values [B, 1, H, W]; a grey batch is returned as it is.

    Raises ValueError for a batch that has neither 1 nor 3 channels.
    """
    if images.shape[1] == 1:
        return images
    return float_luminance(images.float()).to(torch.uint8)


def float_luminance(images: Tensor) -> Tensor:
    """`luminance` of whole numbers in float32; returns a new tensor."""
    channels = images.shape[1]
    if channels == 1:
        return images.clone()
    if channels != 3:
        raise ValueError(f"images must have 1 or 3 channels, got {channels}")
    # multiples of 2^-16 below 2^8: exact in float32
    return (images * luminance_weights(images.device)).sum(1, keepdim=True).add_(0.5).floor_()


@cache
def interior(height: int, width: int, device: torch.device) -> Tensor:
    """Which pixels of an image have all eight neighbours, bool [H, W]."""
    return F.pad(torch.ones(max(height - 2, 0), max(width - 2, 0), dtype=torch.bool), (1, 1, 1, 1))[
        :height, :width
    ].to(device)


def smooth(images: Tensor) -> Tensor:
    """PIL's SMOOTH filter, (1, 1, 1; 1, 5, 1; 1, 1, 1) / 13, but for the outermost pixels, which stay. float32 [B, C, H, W]."""
    # a sum of whole numbers divided by 13 is half a thirteenth away from a whole number or more: far more than the rounding
    weighted = F.avg_pool2d(images, 3, stride=1, padding=1, divisor_override=13)
    weighted = weighted.add_(images, alpha=4 / 13).add_(0.5).floor_()
    return torch.where(interior(*images.shape[2:], images.device), weighted, images)


def enhance(images: Tensor, factor: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """PIL's ImageEnhance on consecutive parts of a batch: brightness, contrast, color, sharpness. uint8 [B, C, H, W] to float32.

    factor: [B], >= 0; 1 gives the image. sizes: of the four parts. Each image is blended with a degenerate one:
    degenerate + factor (image - degenerate), in float32, clipped to 0..255. A cast to uint8 then cuts the fraction off.
    """
    images = images.float()
    _, contrasted, colored, sharpened = sizes
    parts = images.split([sizes[0], contrasted + colored, sharpened])
    degenerate = []  # of brightness it is 0
    if contrasted + colored:
        grey = float_luminance(parts[1])
        if contrasted:
            pixels = images.shape[2] * images.shape[3]
            total = grey[:contrasted].sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
            grey[:contrasted] = total.add_(pixels // 2).floor_divide_(pixels)  # the mean, rounded, halves up
        degenerate.append((parts[1], grey))
    if sharpened:
        degenerate.append((parts[2], smooth(parts[2])))
    # one operation after the other: a fused multiply-add (lerp, addcmul) rounds once less than PIL
    for part, other in degenerate:
        part.sub_(other)
    images.mul_(per_image(factor.float()))
    for part, other in degenerate:
        part.add_(other)
    return images.clamp_(0, 255)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Brightness: factor [B], >= 0; 0 gives black, 1 the image. uint8 [B, C, H, W]."""
    return enhance(images, factor, (len(images), 0, 0, 0)).to(torch.uint8)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Contrast: factor [B], >= 0; 0 gives the mean grey value of the image everywhere. uint8 [B, C, H, W]."""
    return enhance(images, factor, (0, len(images), 0, 0)).to(torch.uint8)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Color: factor [B], >= 0; 0 gives the grey image, 1 the image; grey stays grey. uint8 [B, C, H, W]."""
    return enhance(images, factor, (0, 0, len(images), 0)).to(torch.uint8)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Sharpness: factor [B], >= 0; 0 gives the image of `smooth`, 1 the image. uint8 [B, C, H, W]."""
    return enhance(images, factor, (0, 0, 0, len(images))).to(torch.uint8)


@cache
def ramp(device: torch.device) -> Tensor:
    """0 to 255 in float64."""
    return torch.arange(256, device=device, dtype=torch.float64)


@cache
def stretches(device: torch.device) -> Tensor:
    """PIL's autocontrast of a range: value * scale - offset, cut off. float64 [65536, 2], the row 256 * highest + lowest."""
    lowest, highest = ramp(torch.device("cpu")), ramp(torch.device("cpu"))[:, None]
    # PIL's order in float64: a product can lie just below an integer
    scale = torch.full((256, 256), 255.0, dtype=torch.float64) / (highest - lowest)
    offset = lowest * scale
    still = highest <= lowest  # a constant channel stays
    rows = torch.stack([scale.masked_fill_(still, 1), offset.masked_fill_(still, 0)], dim=2)
    return rows.view(-1, 2).to(device)


@cache
def flattenings(pixels: int, device: torch.device) -> Tensor:
    """PIL's equalize of a channel with b pixels below its highest value, float64 [pixels + 1, 3], the row b.

    A value with n pixels below it becomes (n + first) / second + third * value, cut off: (n + step // 2) / step with the step
    b // 255, or the value itself where the step is 0.
    """
    step = torch.arange(pixels + 1).div(255, rounding_mode="floor")
    still = step == 0
    rows = [step // 2, step.double().masked_fill_(still, torch.inf), still]
    return torch.stack([row.double() for row in rows], dim=1).to(device)


def look_up(images: Tensor, tables: Tensor, sizes: tuple[int, int, int], out: Tensor | None = None) -> Tensor:
    """Replace values by tables on consecutive parts of a batch: given ones, autocontrast's, equalize's. uint8 [B, C, H, W].

    tables: uint8 [B, C, 256], value v of channel c of image b becomes tables[b, c, v]; overwritten for the other two parts, whose
    tables are made here. sizes: of the three parts. out: contiguous, takes the result; it may be `images`.
    """
    values = images.flatten(2).long()
    given, stretched, _ = sizes
    if len(images) > given:
        rest = values[given:]
        lowest, highest = rest.aminmax(dim=2, keepdim=True)
        made = torch.empty(*rest.shape[:2], 256, device=images.device, dtype=torch.float64)
        if stretched:
            pair = torch.add(lowest[:stretched], highest[:stretched], alpha=256)
            scale, offset = rows_of(stretches(images.device), pair).unbind(2)
            torch.mul(ramp(images.device), scale[..., None], out=made[:stretched]).sub_(offset[..., None])
        if len(rest) > stretched:
            _flatten(rest[stretched:], highest[stretched:], made[stretched:])
        tables[given:] = made.clamp_(0, 255)
    out = torch.empty_like(images, memory_format=torch.contiguous_format) if out is None else out
    torch.gather(tables, 2, values, out=out.flatten(2))
    return out


def rows_of(table: Tensor, numbers: Tensor) -> Tensor:
    """Rows of a table [n, k] by their numbers [B, C, 1]: [B, C, k]."""
    return table.index_select(0, numbers.flatten()).view(*numbers.shape[:2], -1)


def _flatten(values: Tensor, highest: Tensor, made: Tensor) -> None:
    """PIL's tables of equalize for values int64 [B, C, H W] with the highest [B, C, 1], into made: float64 [B, C, 256]."""
    # a count stands one place behind its value, so that its sums are of the values below
    counts = torch.zeros(*values.shape[:2], 257, device=values.device, dtype=torch.float64)
    # not bincount, which would wait for the device
    counts[..., 1:].scatter_add_(2, values, ramp(values.device)[1].expand_as(values))
    below = counts.cumsum(2)[..., :256]
    rows = rows_of(flattenings(values.shape[2], values.device), below.gather(2, highest).long())
    first, second, third = rows.split(1, dim=2)
    torch.add(below, first, out=made).div_(second).addcmul_(ramp(values.device), third)


def autocontrast(images: Tensor) -> Tensor:
    """PIL's ImageOps.autocontrast: each channel stretched from its range to 0..255; a constant one stays. uint8 [B, C, H, W]."""
    return look_up(images, images.new_empty(*images.shape[:2], 256), (0, len(images), 0))


def equalize(images: Tensor) -> Tensor:
    """PIL's ImageOps.equalize: the histogram of each channel [H, W] made as flat as can be. uint8 [B, C, H, W].

    A channel with fewer than 255 pixels below its highest value stays as it is: any channel of an 8 x 8 image.
    """
    return look_up(images, images.new_empty(*images.shape[:2], 256), (0, 0, len(images)))


def invert(images: Tensor) -> Tensor:
    """PIL's ImageOps.invert: 255 - value. uint8 [B, C, H, W]."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """PIL's ImageOps.posterize: keep the `bits` highest bits of each value; bits: integer [B], 1 to 8. uint8 [B, C, H, W]."""
    mask = (256 - 2 ** (8 - bits.int())).to(torch.uint8)
    return images & per_image(mask)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """PIL's ImageOps.solarize: values below the threshold stay, the others are inverted. threshold: [B]. uint8 [B, C, H, W]."""
    # v < t is v < ceil(t) for an integer v, and 255 - v is v xor 255: many times as fast as torch.where of float64
    smallest = per_image(threshold.ceil().clamp(0, 256).short())
    return (images.short() >= smallest).to(torch.uint8).mul_(255).bitwise_xor_(images)


def affine_nearest(images: Tensor, matrix: Tensor, fill: int = 0) -> Tensor:
    """PIL's Image.transform(size, AFFINE, data, NEAREST): each pixel from the position that maps to its centre.

    matrix: float64 [B, 6] on the CPU, the `data` (a, b, c, d, e, f): the output shows at (x, y) the input at
    (a x + b y + c, d x + e y + f), in pixels, x to the right, y down; such places must be less than 32768 pixels away.
    fill: the value of what lies outside. Returns [B, C, H, W] of the type of images, uint8 or another.
    """
    height, width = images.shape[2:]
    across, down = to_device(images.device, *places(matrix, height, width))
    # a frame one pixel wide stands for all that is outside; square, so that rows and columns have the same bounds
    side = max(height, width) + 2
    framed = F.pad(images, (1, side - width - 1, 1, side - height - 1), value=fill).flatten(2)
    column, row = (across + down).bitwise_right_shift_(16).clamp_(0, side - 1)
    index = column.add_(row, alpha=side).view(-1, 1, height * width).expand(-1, images.shape[1], -1)
    return framed.gather(2, index).view(images.shape)


def places(matrix: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the pixels come from, counted from a pixel beyond the corner: [2, B, 1, W] plus [2, B, H, 1], columns and rows.

    matrix: as for `affine_nearest`. int64, PIL's 16.16 fixed point.
    """
    a, b, c, d, e, f = matrix.double()[:, :, None].unbind(1)  # [B, 1] each
    x, y = torch.arange(width), torch.arange(height)
    # PIL goes in 16.16 fixed point from the centre of the first pixel, but adds up in float64 where the axes stay what they are
    straight = (b == 0) & (d == 0)
    column = fixed_point(c + a * 0.5 + b * 0.5) + fixed_point(a) * x
    column = torch.where(straight, pixels_along(c, a, width), column)  # [B, W]
    row = fixed_point(f + d * 0.5 + e * 0.5) + fixed_point(e) * y
    row = torch.where(straight, pixels_along(f, e, height), row)  # [B, H]
    across = torch.stack([column + 65536, fixed_point(d) * x])
    down = torch.stack([fixed_point(b) * y, row + 65536])
    return across[:, :, None], down[..., None]


def fixed_point(values: Tensor) -> Tensor:
    """Numbers as PIL's 16.16 fixed point: int64, rounded."""
    return (values * 65536 + 0.5).floor().long()


def pixels_along(offset: Tensor, scale: Tensor, count: int) -> Tensor:
    """The pixels that offset + scale (i + 0.5) lies in for i < count: [B, 1] to [B, count], in 16.16 fixed point.

    Summed term by term as in PIL, as the rounding can decide between two pixels.
    """
    along = torch.cat([offset + scale * 0.5, scale.expand(-1, count - 1)], dim=1).cumsum(1)
    return along.floor().clamp_(-1, 32767).long() << 16


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """The matrix by which PIL's Image.rotate(degrees) turns an image of that size counter-clockwise about its centre.

    degrees: [B]. Returns float64 [B, 6] for `affine_nearest`.
    """
    angle = -torch.deg2rad(degrees.double() % 360)
    cosine, sine = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    x, y = width / 2, height / 2
    return torch.stack(
        [
            cosine,
            sine,
            cosine * -x + sine * -y + x,
            -sine,
            cosine,
            -sine * -x + cosine * -y + y,
        ],
        dim=1,
    )


def shear_bicubic(images: Tensor, horizontal: Tensor, vertical: Tensor, fill: int = 0) -> Tensor:
    """PIL's Image.transform(size, AFFINE, (1, horizontal, 0, vertical, 1, 0), BICUBIC).

    horizontal, vertical: float64 [B], pixels to the right per pixel down, and the other way round; at most one of the two is
    not zero for an image. fill: the grey value outside the image. Returns uint8 [B, C, H, W].
    """
    taps, fraction = shear_taps(horizontal, vertical, *images.shape[2:])
    values = F.pad(images.flatten(2), (0, 1), value=fill)
    return between_taps(values, taps, fraction).to(torch.uint8).view(images.shape)


def shear_taps(horizontal: Tensor, vertical: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The pixels that `shear_bicubic` looks at, and where between the middle two of them: int64 [B, 4 H W], float64 [B, H W].

    Pixels are numbered line by line; H W stands for the outside.
    """
    device = horizontal.device
    down = (vertical != 0)[:, None, None]
    x = torch.arange(width, device=device).expand(height, width)
    y = torch.arange(height, device=device)[:, None].expand(height, width)
    # positions lie between pixels only along the shear: four taps along that line are enough
    along, across = torch.where(down, y, x), torch.where(down, x, y)
    length, stride, other_stride = (
        torch.where(down, *pair) for pair in ((height, width), (width, 1), (1, width))
    )
    place = (across + 0.5) * (horizontal + vertical)[:, None, None] + (along + 0.5)
    outside = (place < 0) | (place >= length)
    place = place.sub_(0.5)
    first = place.floor()
    fraction = place - first
    pixels = (first.long()[:, None] + torch.arange(-1, 3, device=device)[:, None, None]).clamp_min_(0)
    pixels = pixels.minimum(length[:, None] - 1) * stride[:, None] + (across * other_stride)[:, None]
    return pixels.masked_fill_(outside[:, None], height * width).flatten(1), fraction.flatten(1)


@cache
def cubic(device: torch.device) -> Tensor:
    """Four taps to the coefficients of the cubic through them, the highest power first. float64 [4, 4].

    The tangents are those of Catmull and Rom (a = -1).
    """
    rows = [[-1, 1, -1, 1], [2, -2, 1, -1], [-1, 0, 1, 0], [0, 1, 0, 0]]
    return torch.tensor(rows, device=device, dtype=torch.float64)


def between_taps(values: Tensor, taps: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate: values [B, C, n], taps int64 [B, 4 m] numbers them, fraction float64 [B, m]. float64 [B, C, m]."""
    count, channels = values.shape[:2]
    chosen = values.gather(2, taps[:, None].expand(-1, channels, -1)).double()
    # the coefficients are whole numbers, exact in any order; then float64 and Horner's form as in PIL
    third, second, first, zeroth = (
        cubic(values.device) @ chosen.view(count, channels, 4, fraction.shape[1])
    ).unbind(2)
    fraction = fraction[:, None]
    result = (third * fraction).add_(second).mul_(fraction).add_(first).mul_(fraction).add_(zeroth)
    return result.clamp_(0, 255)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of the colour circle, as torchvision's adjust_hue on PIL images; grey stays grey.

    shift: [B], -0.5 to 0.5, applied as int(255 shift) to the 8-bit hue of PIL's mode HSV, modulo 256. A shift of 0 also
    rounds, by the conversion to HSV and back. Returns uint8 [B, C, H, W].
    """
    return turn_hue(images, hue_steps(shift)).to(torch.uint8)


def hue_steps(shift: Tensor) -> Tensor:
    """Parts of the colour circle in steps of 1/255, the fraction cut off. int64 [B]."""
    return (shift.double() * 255).long()


class HueTables(NamedTuple):
    """PIL's way to HSV and back, in tables."""

    hue: Tensor  # int16 [3 * 511 * 256], see `hue_tables`
    saturation: Tensor  # float32 [65536], the number 256 * value + chroma
    distance: Tensor  # float32 [3 * 512], of channel, and hue + steps + 128
    channel: Tensor  # int64 [3, 1, 1], where the distances of a channel begin, plus 128
    scale: Tensor  # float32, 65025


@cache
def hue_tables(device: torch.device) -> HueTables:
    """The tables of `turn_hue`.

    The 8-bit hue is a function of the primary, the channel that has the value; of the difference k of the two channels after it
    in the circle red, green, blue; and of the chroma. Its number is 130816 * primary + 256 * k + chroma; negative numbers count
    from the end.
    """
    primary = torch.arange(3, dtype=torch.float64).view(3, 1, 1)
    k, chroma = torch.arange(-255, 256).view(1, -1, 1), torch.arange(256)
    # the difference of either of the two to the value; one of them is the chroma. float32 and float64 where PIL has them,
    # since the fraction is cut off in the end
    first, second = torch.where(k < 0, chroma + k, chroma), torch.where(k < 0, chroma, chroma - k)
    first, second = (x.float() / chroma.clamp(min=1) for x in (first, second))
    sixths = (first.double() - second + 2 * primary).float()
    turns = (sixths.double() / 6 + 1).frac().float()
    angle = (turns * 255).short().flatten().roll(-255 * 256)

    value = torch.arange(256).view(-1, 1)
    saturation = (chroma.float() / value.clamp(min=1) * 255).trunc()

    # a channel is lower than the value by a part of it that grows with the saturation and the angle from its own colour
    turned = (torch.arange(512) - 128) & 255
    place = (6 * turned + 255 * torch.arange(5, 0, -2).view(3, 1)) % 1530
    distance = torch.minimum(place, 1020 - place).clamp(0, 255).float()

    begins = (torch.arange(3) * 512 + 128).view(3, 1, 1)
    tables = (angle, saturation.flatten(), distance.flatten(), begins, torch.tensor(65025.0))
    return HueTables(*(table.to(device) for table in tables))


def turn_hue(images: Tensor, steps: Tensor) -> Tensor:
    """`hue` by whole steps of 1/255 of the circle: int64 [B], -127 to 127. float32, to be cast to uint8."""
    if images.shape[1] == 1:
        return images.float()
    tables = hue_tables(images.device)
    images = images.float()
    value, primary = images.max(dim=1, keepdim=True)  # of two highest channels either gives the same hue
    chroma = value - images.amin(dim=1, keepdim=True)
    circle = torch.cat([images, images[:, :2]], dim=1)
    k = (circle[:, 1:4] - circle[:, 2:5]).gather(1, primary)
    number = torch.add(chroma, k, alpha=256).long().add_(primary, alpha=511 * 256)
    turned = tables.hue.take(number) + (per_image(steps) + tables.channel)
    distance = tables.distance.take(turned)
    saturation = tables.saturation.take(torch.add(chroma, value, alpha=256).long())
    # all below 2^24: exact in float32 up to the division, which is by a tensor: a card multiplies by the reciprocal of a number
    return (65025 - distance.mul_(saturation)).mul_(value).div_(tables.scale).add_(0.5)


# one operation after the other, for each image its own --------------------------------------------------------------------

KINDS = (
    "none", "nearest", "bicubic", "table", "autocontrast", "equalize", "brightness", "contrast", "color", "sharpness", "hue",
)  # fmt: skip


class Tables(NamedTuple):
    """What the operations "nearest", "bicubic" and "table" look up in their row, on the device of the images."""

    nearest: Tensor  # int64 [n, H W], the pixel that each comes from, then `fills`
    bicubic: Tensor  # int64 [n, 5 H W], `shear_taps`, the fractions viewed as int64
    values: Tensor  # uint8 [n, C, 256]
    fills: Tensor  # uint8 [k], values of what lies outside, numbered from H W on


def apply_in_turn(
    images: Tensor, kind: np.ndarray, row: np.ndarray, factor: np.ndarray, tables: Tables | None = None
) -> Tensor:
    """Apply to each image its sequence of operations: uint8 [B, C, H, W] to uint8 [B, C, H, W], of contiguous memory.

    kind: int [n, B], numbers in KINDS of the operations that come first, second, ... row: int64 [n, B], in `tables`, or the steps
    of a hue. factor: float32 [n, B], of brightness, contrast, color and sharpness. Operations of a kind are started together.
    """
    sizes, arrays, place = [], [], np.arange(len(images))  # place: where in the batch each image stands
    for kinds, rows, factors in zip(kind, row, factor, strict=True):
        order = kinds.argsort(kind="stable")
        sizes.append(np.bincount(kinds, minlength=len(KINDS)).tolist())
        arrays += [place[order], rows[order], factors[order]]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
    sent = to_device(images.device, *map(torch.from_numpy, [*arrays, place]))
    for counts, order, rows, factors in zip(sizes, sent[:-1:3], sent[1::3], sent[2::3], strict=True):
        images = images.index_select(0, order)
        _apply(images, counts, rows, factors, tables)
    return images.index_select(0, sent[-1])


def _apply(images: Tensor, sizes: list[int], rows: Tensor, factors: Tensor, tables: Tables | None) -> None:
    """One operation for each image, in place; the images are sorted by KINDS. sizes: how many there are of each."""
    families = (sizes[:1], sizes[1:3], sizes[3:6], sizes[6:10], sizes[10:])
    family_sizes = [sum(family) for family in families]
    _, moved, mapped, enhanced, turned = zip(
        *(x.split(family_sizes) for x in (images, rows, factors)), families, strict=True
    )
    if len(moved[0]):
        _move(moved[0], moved[1], sizes[1], tables)
    if len(mapped[0]):
        part, numbers, _, counts = mapped
        look_up(part, tables.values.index_select(0, numbers), counts, out=part)
    if len(enhanced[0]):
        part, _, factor, counts = enhanced
        part.copy_(enhance(part, factor, counts))
    if len(turned[0]):
        turned[0].copy_(turn_hue(turned[0], turned[1]))


def _move(images: Tensor, rows: Tensor, nearest: int, tables: Tables) -> None:
    """Moves, the nearest ones before the bicubic ones, in place."""
    channels = images.shape[1]
    out = images.flatten(2)
    values = torch.cat([out, tables.fills.expand(*out.shape[:2], -1)], dim=2)
    if nearest:
        index = tables.nearest.index_select(0, rows[:nearest])[:, None].expand(-1, channels, -1)
        torch.gather(values[:nearest], 2, index, out=out[:nearest])
    if len(images) > nearest:
        pixels = out.shape[2]
        packed = tables.bicubic.index_select(0, rows[nearest:])
        taps, fraction = packed[:, : 4 * pixels], packed[:, 4 * pixels :].view(torch.float64)
        out[nearest:] = between_taps(values[nearest:], taps, fraction)
