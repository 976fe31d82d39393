"""PIL's image operations on uint8 batches [B, C, H, W], C = 1 (mode L) or 3 (RGB), with one parameter per image.

The results are PIL's bit for bit (compared with Pillow 13), so a policy written for PIL runs on batches, on their device. No
function changes its input, loops over the images or waits for the device; all keep the shape and return uint8. Empty batches
and images of any size from 1 x 1 are allowed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_image(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1], to broadcast with a batch of images."""
    return values[:, None, None, None]


def luminance(images: Tensor) -> Tensor:
    """PIL's convert("L"): uint8 [B, 3, H, W] to its grey values [B, 1, H, W]; a grey batch is returned as it is.

    Raises ValueError for a batch that has neither 1 nor 3 channels.
    """
    channels = images.shape[1]
    if channels == 1:
        return images
    if channels != 3:
        raise ValueError(f"images must have 1 or 3 channels, got {channels}")
    red, green, blue = images.int().split(1, dim=1)
    weighted = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(0x8000)
    return weighted.bitwise_right_shift_(16).to(torch.uint8)


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """PIL's Image.blend: degenerate + factor (images - degenerate), in float32, clipped to 0..255, the fraction cut off.

    images: uint8 [B, C, H, W]. degenerate: integers that broadcast to it. factor: [B]. Returns uint8 [B, C, H, W].
    """
    # one operation after the other: a fused multiply-add (lerp, addcmul) rounds once less than PIL
    difference = images.float() - degenerate
    return difference.mul_(per_image(factor.float())).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Brightness: factor [B], >= 0; 0 gives black, 1 the image. uint8 [B, C, H, W]."""
    return (images * per_image(factor.float())).clamp_(0, 255).to(torch.uint8)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Color: factor [B], >= 0; 0 gives the grey image, 1 the image; grey stays grey. uint8 [B, C, H, W]."""
    return blend(luminance(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Contrast: factor [B], >= 0; 0 gives the mean grey value of the image everywhere. uint8 [B, C, H, W]."""
    pixels = images.shape[2] * images.shape[3]
    total = luminance(images).sum(dim=(1, 2, 3), keepdim=True)
    mean = (2 * total + pixels) // (2 * pixels)  # rounded, halves up
    return blend(mean, images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance.Sharpness: factor [B], >= 0; 0 gives the smoothed image, 1 the image. uint8 [B, C, H, W].

    Smoothed with (1, 1, 1; 1, 5, 1; 1, 1, 1) / 13, but for the outermost pixels, which stay.
    """
    if min(images.shape[2:]) < 3:
        return images.clone()  # nothing but a border
    values = images.short()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    weighted = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    weighted.add_(values[:, :, 1:-1, 1:-1], alpha=4)
    # n * 20165 >> 18 is n // 13 for every n up to 13 * 255 + 6, and halves do not occur
    smooth = weighted.add_(6).int().mul_(20165).bitwise_right_shift_(18)
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = blend(smooth, images[:, :, 1:-1, 1:-1], factor)
    return result


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value v of channel c of image b by tables[b, c, v]; tables: uint8 [B, C, 256]."""
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def autocontrast(images: Tensor) -> Tensor:
    """PIL's ImageOps.autocontrast: each channel stretched from its range to 0..255; a constant one stays. uint8 [B, C, H, W]."""
    lowest, highest = images.flatten(2).aminmax(dim=2, keepdim=True)
    values = torch.arange(256, device=images.device)
    # in float64 and in PIL's order: the fraction is cut off, and a product can lie just below an integer. A quotient of tensors,
    # for 255 / tensor would be 255 times a rounded reciprocal
    extent = highest.double() - lowest
    scale = torch.full_like(extent, 255).div_(extent)
    stretched = (values * scale).sub_(lowest * scale).clamp_(0, 255).to(torch.uint8)
    return look_up(images, torch.where(highest > lowest, stretched, values.to(torch.uint8)))


def equalize(images: Tensor) -> Tensor:
    """PIL's ImageOps.equalize: the histogram of each channel [H, W] made as flat as can be. uint8 [B, C, H, W].

    A channel with fewer than 255 pixels below its highest value stays as it is: any channel of an 8 x 8 image.
    """
    values = images.flatten(2).long()
    # not bincount, which would wait for the device
    histogram = values.new_zeros(*values.shape[:2], 256, dtype=torch.int32)
    histogram.scatter_add_(2, values, histogram.new_ones(1).expand_as(values))
    at_highest = histogram.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - at_highest) // 255
    below = histogram.cumsum(2, dtype=torch.int32).sub_(histogram)
    flat = below.add_(step // 2).floor_divide_(step.clamp_min(1)).clamp_(max=255)
    identity = torch.arange(256, device=images.device, dtype=torch.int32)
    tables = torch.where(step > 0, flat, identity).to(torch.uint8)
    return tables.gather(2, values).view(images.shape)


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

    matrix: float64 [B, 6], the `data` (a, b, c, d, e, f): the output shows at (x, y) the input at (a x + b y + c, d x + e y + f),
    in pixels, x to the right, y down; these positions must be less than 32768 pixels away. fill: the grey value outside
    the image. Returns uint8 [B, C, H, W].
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrix.double()[:, :, None, None].unbind(1)  # [B, 1, 1] each
    x = torch.arange(width, device=images.device, dtype=torch.int32)
    y = torch.arange(height, device=images.device, dtype=torch.int32)[:, None]
    # PIL goes in 16.16 fixed point from the centre of the first pixel, but adds up in float64 where the axes stay what they are
    straight = (b == 0) & (d == 0)
    column = fixed_point(c + a * 0.5 + b * 0.5) + fixed_point(a) * x
    column = torch.where(straight, pixels_along(c, a, width).transpose(1, 2), column)  # [B, 1, W]
    column = (column + fixed_point(b) * y).bitwise_right_shift_(16)
    row = fixed_point(f + d * 0.5 + e * 0.5) + fixed_point(e) * y
    row = torch.where(straight, pixels_along(f, e, height), row)  # [B, H, 1]
    row = (row + fixed_point(d) * x).bitwise_right_shift_(16)
    # a frame one pixel wide represents everything outside
    framed = F.pad(images, (1, 1, 1, 1), value=fill).flatten(2)
    index = (row.clamp_(-1, height) + 1).mul_(width + 2).add_(column.clamp_(-1, width) + 1).long()
    index = index.view(-1, 1, height * width).expand(-1, images.shape[1], -1)
    return framed.gather(2, index).view(images.shape)


def fixed_point(values: Tensor) -> Tensor:
    """Numbers as PIL's 16.16 fixed point: int32, rounded."""
    return (values * 65536 + 0.5).floor().int()


def pixels_along(offset: Tensor, scale: Tensor, count: int) -> Tensor:
    """The pixels that offset + scale (i + 0.5) lies in for i < count: [B, 1, 1] to [B, count, 1], in 16.16 fixed point.

    Summed term by term as in PIL, as the rounding can decide between two pixels.
    """
    places = torch.cat([offset + scale * 0.5, scale.expand(-1, count - 1, -1)], dim=1).cumsum(1)
    return places.floor().clamp_(-1, 32767).int() << 16


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
    height, width = images.shape[2:]
    down = (vertical != 0)[:, None, None]
    x = torch.arange(width, device=images.device).expand(height, width)
    y = torch.arange(height, device=images.device)[:, None].expand(height, width)
    # positions lie between pixels only along the shear: four taps along that line are enough
    along, across = torch.where(down, y, x), torch.where(down, x, y)
    length, stride, other_stride = (
        torch.where(down, *pair) for pair in ((height, width), (width, 1), (1, width))
    )
    place = (across + 0.5) * (horizontal + vertical)[:, None, None] + (along + 0.5)
    inside = (place >= 0) & (place < length)
    place = place.sub_(0.5)
    first = place.floor()
    fraction = place.sub_(first)[:, None]
    first, across = first.long(), across * other_stride
    flat, taps = images.flatten(2), []
    for k in (-1, 0, 1, 2):
        pixel = (first + k).clamp_min_(0).minimum(length - 1)
        index = pixel.mul_(stride).add_(across).view(-1, 1, height * width)
        taps.append(flat.gather(2, index.expand(-1, images.shape[1], -1)).view(images.shape).double())
    before, here, after, beyond = taps
    # the cubic through the taps with the tangents of Catmull and Rom (a = -1), in float64 and in Horner's form as in PIL
    cubic = (here - before + beyond - after) * fraction
    cubic = cubic.add_(2 * (before - here) + after - beyond).mul_(fraction)
    cubic = cubic.add_(after - before).mul_(fraction).add_(here)
    return cubic.clamp_(0, 255).to(torch.uint8).masked_fill_(~inside[:, None], fill)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of the colour circle, as torchvision's adjust_hue on PIL images; grey stays grey.

    shift: [B], -0.5 to 0.5, applied as int(255 shift) to the 8-bit hue of PIL's mode HSV, modulo 256. A shift of 0 also
    rounds, by the conversion to HSV and back. Returns uint8 [B, C, H, W].
    """
    if images.shape[1] == 1:
        return images.clone()
    angle, saturation, value = to_hsv(images)
    turn = (shift.double() * 255).int()  # the fraction cut off, towards 0
    return from_hsv((angle + turn[:, None, None, None]) & 255, saturation, value)


def to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PIL's convert("HSV") of uint8 [B, 3, H, W]: hue, saturation and value, int32 [B, 1, H, W] each, from 0 to 255."""
    value, lowest = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = (value - lowest).float()
    saturation = (chroma / value.clamp(min=1) * 255).int()
    red, green, blue = images.split(1, dim=1)
    is_red, is_green = red == value, green == value
    before = torch.where(is_red, blue, torch.where(is_green, red, green))
    after = torch.where(is_red, green, torch.where(is_green, blue, red))
    primary = torch.where(is_red, 0, torch.where(is_green, 2, 4).to(torch.uint8))
    # float32 and float64 exactly as in PIL, since the fraction is cut off at the end
    chroma.clamp_(min=1)
    sixths = ((value - before) / chroma).double().sub_((value - after) / chroma).add_(primary).float()
    turns = sixths.double().div_(6).add_(1).frac_().float()
    return (turns * 255).int(), saturation, value.int()


def from_hsv(angle: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `to_hsv`, each input int32 [B, 1, H, W] from 0 to 255: uint8 [B, 3, H, W]."""
    offset = 255 * torch.arange(5, 0, -2, dtype=torch.int32, device=angle.device).view(3, 1, 1)
    place = (6 * angle + offset) % 1530
    # a channel is lower than `value` by a part of it that grows with the saturation and with the angle from its own colour
    distance = torch.minimum(place, 1020 - place).clamp_(0, 255)
    # all below 2^24: exact in float32 up to the division
    return ((value * (65025 - saturation * distance)).float() / 65025 + 0.5).to(torch.uint8)
