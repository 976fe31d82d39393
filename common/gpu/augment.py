"""Augmentations of image batches on their device, each parameter drawn per sample from the generator passed in.

The generator is on the CPU, wherever the images are, and so are draws: a card gets what it needs of them in one copy, which
the host does not wait for.

Batches are [B, C, H, W] of any dtype. The distribution is that of torchvision's transforms applied image by image.
(torchvision's transforms draw one parameter per call, so all images of a batch would get the same crop.)

Colour jitter, affine maps, grayscale and resized crops take uint8 batches, C = 1 or 3. They equal torchvision's on PIL
images, bit for bit. `draw_...` draws the parameters and `apply_...` applies them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.gpu.image_operations import (
    KINDS,
    affine_nearest,
    apply_in_turn,
    hue_steps,
    luminance,
    per_image,
    to_device,
)

JITTER = ("brightness", "contrast", "color", "hue")  # ColorJitter's operations, as its `order` numbers them


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad each side with `padding` zeros and cut out the original size at a random position of each image.

    The (2 padding + 1)^2 positions are equally likely, as in torchvision's RandomCrop(size, padding=padding).
    The result has channels-last strides.
    """
    top, left = draw_crop(len(images), padding, generator)
    return cut_out(images, padding, top, left)


def draw_crop(count: int, padding: int, generator: Generator) -> Tensor:
    """Top and left of `random_crop`: int64 [2, count, 1]."""
    return torch.randint(2 * padding + 1, (2, count, 1), generator=generator)


def cut_out(
    images: Tensor, padding: int, top: Tensor, left: Tensor, mirrored: Tensor | None = None
) -> Tensor:
    """Cut the original size out of images padded with zeros, then mirror: top and left int64 [B, 1], mirrored bool [B]."""
    height, width = images.shape[2:]
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # [B, H], [B, W]
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    sample = torch.arange(len(images))
    sample, rows, columns = to_device(images.device, sample, rows, columns)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # [B, H + 2p, W + 2p, C]
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability p, as torchvision's RandomHorizontalFlip."""
    (mirrored,) = to_device(images.device, draw_flip(len(images), generator, p))
    return torch.where(per_image(mirrored), images.flip(3), images)


def draw_flip(count: int, generator: Generator, p: float = 0.5) -> Tensor:
    """Which images `random_flip` mirrors: bool [count]."""
    return torch.rand(count, generator=generator) < p


def crop_and_flip(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """The CIFAR training transform of SFA and Me-Momentum: random crop with zero padding, then horizontal flip."""
    top, left = draw_crop(len(images), padding, generator)
    return cut_out(images, padding, top, left, draw_flip(len(images), generator))


class ColorJitterDraws(NamedTuple):
    """Parameters of a colour jitter, one row per image."""

    strength: Tensor  # [B, 4]: factor of brightness, of contrast, of saturation, and the shift of the hue
    order: Tensor  # int64 [B, 4]: the first, second, ... operation, 0 to 3; 4 is none


def draw_color_jitter(
    count: int,
    generator: Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.4,
    p: float = 1.0,
) -> ColorJitterDraws:
    """Draws of torchvision's ColorJitter, applied with probability p, for `count` images.

    Factors are uniform in [max(0, 1 - x), 1 + x], the shift of the hue in [-x, x], all 24 orders equally likely.
    Raises ValueError for a negative strength, or a hue above 0.5.
    """
    ranges = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    for name, value in ranges.items():
        if value < 0 or (name == "hue" and value > 0.5):
            raise ValueError(f"{name} must be >= 0{' and <= 0.5' * (name == 'hue')}, got {value}")
    bounds = [(max(0.0, 1 - x), 1 + x) for x in (brightness, contrast, saturation)] + [(-hue, hue)]
    strength = torch.stack([uniform(count, generator, low, high) for low, high in bounds], dim=1)
    order = uniform((count, len(JITTER)), generator).argsort(dim=1)
    omitted = uniform((count, 1), generator) >= p
    if hue == 0:  # the others do nothing at strength 0, but a hue shift by 0 rounds
        omitted = omitted | (order == JITTER.index("hue"))
    return ColorJitterDraws(strength, order.masked_fill(omitted, len(JITTER)))


def apply_color_jitter(images: Tensor, draws: ColorJitterDraws) -> Tensor:
    """Colour jitter with given parameters. uint8 [B, C, H, W]; of grey images saturation and hue change nothing."""
    order = draws.order.numpy()
    hue, none = JITTER.index("hue"), len(JITTER)
    # the hues of all images in one step, the other operations in as many as come before and after them
    shifted = (order == hue).any(1)
    position = np.where(shifted, (order == hue).argmax(1), none)[:, None]
    places = np.arange(order.shape[1])
    before, after = (np.where(chosen, order, none).T for chosen in (places < position, places > position))
    steps = np.concatenate([before, np.where(shifted, hue, none)[None], after])  # [9, B]
    steps = steps[(steps != none).any(1)]
    kind = np.array([KINDS.index(name) for name in (*JITTER, "none")])[steps]
    factor = F.pad(draws.strength, (0, 1)).float().numpy()[np.arange(len(images)), steps]
    turn = hue_steps(draws.strength[:, hue]).expand(steps.shape).numpy()
    return apply_in_turn(images, kind, turn, factor)


def color_jitter(
    images: Tensor,
    generator: Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.4,
    p: float = 1.0,
) -> Tensor:
    """torchvision's ColorJitter with probability p, with an order of the four operations per image. uint8 [B, C, H, W].

    The default strengths are those of SANM's warm-up. Raises ValueError as `draw_color_jitter`.
    """
    draws = draw_color_jitter(len(images), generator, brightness, contrast, saturation, hue, p)
    return apply_color_jitter(images, draws)


class AffineDraws(NamedTuple):
    """Parameters of an affine map about the centre of the image, float64 [B] each: what torchvision's `affine` takes."""

    angle: Tensor  # degrees, clockwise
    right: Tensor  # integer pixels
    down: Tensor  # integer pixels
    scale: Tensor
    shear_x: Tensor  # degrees
    shear_y: Tensor  # degrees


def draw_affine(
    count: int,
    height: int,
    width: int,
    generator: Generator,
    degrees: float = 15,
    translate: tuple[float, float] = (0.1, 0.1),
    scale: tuple[float, float] = (2 / 3, 3 / 2),
    shear: tuple[float, float, float, float] = (-0.1, 0.1, -0.1, 0.1),
) -> AffineDraws:
    """Draws of torchvision's RandomAffine for `count` images; its arguments are those of `random_affine`.

    All are uniform; the translation is rounded to integer pixels.
    """
    right, down = translate[0] * width, translate[1] * height
    return AffineDraws(
        angle=uniform(count, generator, -degrees, degrees),
        right=uniform(count, generator, -right, right).round(),
        down=uniform(count, generator, -down, down).round(),
        scale=uniform(count, generator, *scale),
        shear_x=uniform(count, generator, *shear[:2]),
        shear_y=uniform(count, generator, *shear[2:]),
    )


def apply_affine(images: Tensor, draws: AffineDraws) -> Tensor:
    """Scale and shear, turn and shift each image about its centre: nearest pixel, black outside. uint8 [B, C, H, W]."""
    height, width = images.shape[2:]
    angle, shear_x, shear_y = (torch.deg2rad(x) for x in (draws.angle, draws.shear_x, draws.shear_y))
    # forward = scale * rotation(angle) @ shear along y @ shear along x, whose determinant is scale^2
    xx, yx = (angle - shear_y).cos() / shear_y.cos(), (angle - shear_y).sin() / shear_y.cos()
    xy, yy = -xx * shear_x.tan() - angle.sin(), -yx * shear_x.tan() + angle.cos()
    a, b, d, e = (value / draws.scale for value in (yy, -xy, -yx, xx))
    # an output pixel comes from inverse(pixel - centre - translation) + centre
    x, y = width * 0.5, height * 0.5
    c = a * (-x - draws.right) + b * (-y - draws.down) + x
    f = d * (-x - draws.right) + e * (-y - draws.down) + y
    return affine_nearest(images, torch.stack([a, b, c, d, e, f], dim=1))


def random_affine(
    images: Tensor,
    generator: Generator,
    degrees: float = 15,
    translate: tuple[float, float] = (0.1, 0.1),
    scale: tuple[float, float] = (2 / 3, 3 / 2),
    shear: tuple[float, float, float, float] = (-0.1, 0.1, -0.1, 0.1),
) -> Tensor:
    """torchvision's RandomAffine, nearest pixel and black outside. uint8 [B, C, H, W].

    degrees: the largest rotation. translate: the largest shift, as fractions of width and height. shear: along x from the first
    to the second, along y from the third to the fourth, in degrees. The default values are those of SANM's warm-up.
    """
    height, width = images.shape[2:]
    draws = draw_affine(len(images), height, width, generator, degrees, translate, scale, shear)
    return apply_affine(images, draws)


def random_grayscale(images: Tensor, generator: Generator, p: float = 0.2) -> Tensor:
    """Make each image grey with probability p, in three equal channels, as torchvision's RandomGrayscale. uint8 [B, C, H, W]."""
    (rows,) = to_device(images.device, (torch.rand(len(images), generator=generator) < p).nonzero()[:, 0])
    grey = luminance(images.index_select(0, rows)).expand(-1, images.shape[1], -1, -1)
    return images.index_copy(0, rows, grey)


class CropDraws(NamedTuple):
    """Boxes within images, in integer pixels, int64 [B] each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def draw_resized_crop(
    count: int,
    height: int,
    width: int,
    generator: Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> CropDraws:
    """Draws of torchvision's RandomResizedCrop for images [height, width].

    Ten attempts at an area (uniform in `scale`, as a fraction of the image) and an aspect (width / height, log-uniform in
    `ratio`). The first box that fits gets a random position. If none fits: the largest central box with an allowed aspect.
    """
    area = height * width * uniform((10, count), generator, *scale)
    aspect = uniform((10, count), generator, math.log(ratio[0]), math.log(ratio[1])).exp()
    widths, heights = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.byte().argmax(dim=0, keepdim=True)
    any_fits = fits.any(0)
    # the aspect nearest to the image's own
    middle = min(max(width / height, ratio[0]), ratio[1])
    box_height = torch.where(any_fits, heights.gather(0, first)[0], min(height, round(width / middle)))
    box_width = torch.where(any_fits, widths.gather(0, first)[0], min(width, round(height * middle)))
    free_rows, free_columns = height - box_height, width - box_width
    top = (uniform(count, generator) * (free_rows + 1)).long()
    left = (uniform(count, generator) * (free_columns + 1)).long()
    return CropDraws(
        top=torch.where(any_fits, top, free_rows // 2),
        left=torch.where(any_fits, left, free_columns // 2),
        height=box_height,
        width=box_width,
    )


def apply_resized_crop(images: Tensor, draws: CropDraws, mirrored: Tensor | None = None) -> Tensor:
    """Each image's box, resized to the whole size of the image as PIL does, bilinear, and mirrored left to right: bool [B].

    uint8 [B, C, H, W], channels-last.
    """
    count, channels, height, width = images.shape
    device = images.device
    x = triangle_places(draws.left, draws.width, width)
    y = triangle_places(draws.top, draws.height, height)
    if mirrored is not None:
        x = x._replace(centre=torch.where(mirrored[:, None], x.centre.flip(1), x.centre))
    if height == width:
        both = to_device(device, *map(torch.cat, zip(x, y, strict=True)))
        across, down = triangle_weights(*both).chunk(2)  # [B, W, W], [B, H, H]
    else:
        sent = to_device(device, *x, *y)
        across, down = triangle_weights(*sent[: len(x)]), triangle_weights(*sent[len(x) :])
    # multiples of 2^-22 throughout, below 2^9: exact in float64 whatever the order of the sums
    half = torch.full((), 0.5, dtype=torch.float64, device=device)
    rows = images.reshape(count, channels * height, width).double()
    rows = torch.baddbmm(half, rows, across.mT).floor_().view(count, channels, height, width)
    columns = rows.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    columns = torch.baddbmm(half, down, columns).to(torch.uint8)
    return columns.view(count, height, width, channels).permute(0, 3, 1, 2)


class TrianglePlaces(NamedTuple):
    """What PIL's bilinear weights depend on, for the pixels of a line, float64 [B, size] each."""

    place: Tensor  # of the inputs, counted from the start of the part
    centre: Tensor  # of the outputs, on the same scale
    inside: Tensor  # whether an input is in the part, 1 or 0
    width: Tensor  # [B, 1], of half a triangle


def triangle_places(start: Tensor, length: Tensor, size: int) -> TrianglePlaces:
    """Places by which PIL resizes the part [start, start + length) of a line of `size` pixels to the whole of it.

    start, length: int64 [B], in pixels.
    """
    pixel = torch.arange(size, dtype=torch.float64)
    scale = (length.double() / size)[:, None]
    place = pixel - start[:, None] + 0.5
    inside = (place > 0) & (place < length[:, None])
    # the triangle grows with the pixels where a line is shrunk
    return TrianglePlaces(place, (pixel + 0.5) * scale, inside.double(), scale.clamp_min(1))


def triangle_weights(place: Tensor, centre: Tensor, inside: Tensor, width: Tensor) -> Tensor:
    """PIL's bilinear weights, see `TrianglePlaces`: float64 [B, size, size], output by input, whole parts of 2^22."""
    distance = (place[:, None, :] - centre[:, :, None]).abs_().div_(width[:, None])
    weights = (1 - distance).clamp_(min=0).mul_(inside[:, None, :])
    weights /= weights.sum(dim=2, keepdim=True)
    return weights.mul_(2**22).add_(0.5).floor_().mul_(2.0**-22)


def uniform(shape: int | tuple[int, ...], generator: Generator, low: float = 0, high: float = 1) -> Tensor:
    """Draws from [low, high) in float64."""
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    return low + (high - low) * draws


def simclr_view(images: Tensor, generator: Generator, flip: bool = True) -> Tensor:
    """A view of SimCLR pre-training, as SupContrast's for CIFAR. uint8 [B, C, H, W].

    A resized crop, colour jitter with probability 0.8, grayscale with probability 0.2. flip: mirror half of the images, not for
    handwritten digits.
    """
    height, width = images.shape[2:]
    box = draw_resized_crop(len(images), height, width, generator, scale=(0.2, 1.0))
    mirrored = draw_flip(len(images), generator) if flip else None
    images = apply_resized_crop(images, box, mirrored)
    images = color_jitter(images, generator, 0.4, 0.4, 0.4, 0.1, p=0.8)
    return random_grayscale(images, generator, p=0.2)


def warm_up_view(images: Tensor, generator: Generator, crop: Callable[[Tensor, Generator], Tensor]) -> Tensor:
    """SANM's transform of the warm-up epochs: colour jitter, `crop` (crop and flip, at the data set's size), affine map.

    uint8 [B, C, H, W].
    """
    return random_affine(crop(color_jitter(images, generator), generator), generator)


def training_augmentation(dataset: str, size: int) -> Callable[[Tensor, Generator], Tensor]:
    """The crop-and-flip transform for images of a size: padding of an eighth of it (4 pixels of 32).

    Handwritten digits are not mirrored, as a mirrored digit is no digit.
    """
    padding = max(size // 8, 1)
    if dataset in ("digits", "mnist"):
        return lambda images, generator: random_crop(images, padding, generator)
    return partial(crop_and_flip, padding=padding)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [..., C, H, W] to float32 (x / 255 - mean) / std, as ToTensor and Normalize; mean and std are [C]."""
    return scaled(images, *scale_and_shift(mean, std))


def scaled(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """images * scale - shift in a new float32 tensor with the strides of images [..., C, H, W]; scale, shift: [C, 1, 1]."""
    last = images.movedim(-3, -1)
    if images.is_cuda or len(scale) == 1 or not last.is_contiguous():
        pixels = images.float()
        return (pixels * scale if pixels is images else pixels.mul_(scale)).sub_(shift)
    # a CPU is slow with C numbers at a time: rows of W C numbers instead, the same operations
    pixels = new_memory(last.shape).copy_(last)
    scale, shift = (values.flatten().repeat(last.shape[-2]) for values in (scale, shift))
    pixels.flatten(-2).mul_(scale).sub_(shift)
    return pixels.movedim(-1, -3)


def new_memory(shape: Sequence[int]) -> Tensor:
    """An empty float32 tensor on the CPU, from numpy: filled in less time than one of torch.empty."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


def scale_and_shift(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """What `normalise` multiplies with, then subtracts: [C, 1, 1] each."""
    return (1 / (255 * std))[:, None, None], (mean / std)[:, None, None]


def random_resized_crop_and_flip(size: int = 224) -> Callable[[Tensor], Tensor]:
    """AFM's training transform of one uint8 image [3, H, W]: a random resized crop [3, size, size] and flip.

    torchvision's defaults: area 0.08 to 1, aspect 3/4 to 4/3, bilinear; it draws from torch's global CPU generator.
    """
    from torchvision.transforms import v2  # noqa: PLC0415 (takes seconds to import, needed only for image files)

    return v2.Compose([ResizedCrop(v2.RandomResizedCrop(size, antialias=True)), v2.RandomHorizontalFlip()])


class ResizedCrop(NamedTuple):
    """A torchvision RandomResizedCrop of uint8 images [3, H, W] that are channels-last in memory, with the same pixels."""

    drawn: Any  # the RandomResizedCrop

    def __call__(self, image: Tensor) -> Tensor:
        """The resized crop, channels-last in memory: torchvision resizes a contiguous channels-last image in less time."""
        from torchvision.transforms.v2.functional import resize  # noqa: PLC0415

        top, left, height, width = map(
            self.drawn.make_params([image]).get, ("top", "left", "height", "width")
        )
        part = (
            image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        )
        return resize(part, self.drawn.size, self.drawn.interpolation, antialias=True)


def resize_random_crop_and_flip(resize: int = 256, size: int = 224) -> Callable[[Tensor], Tensor]:
    """DivideMix's and SANM's training transform of one uint8 image [3, H, W] of Clothing1M.

    Shorter side to `resize`, a random crop [3, size, size] and flip; it draws from torch's global CPU generator.
    """
    from torchvision.transforms import v2  # noqa: PLC0415

    resized = v2.Resize(resize, antialias=True)
    return v2.Compose([resized, v2.RandomCrop(size), v2.RandomHorizontalFlip()])


def resize_random_resized_crop_and_flip(resize: int = 320, size: int = 299) -> Callable[[Tensor], Tensor]:
    """SFA's training transform of one uint8 image [3, H, W] of WebVision: a random resized crop [3, size, size] and flip.

    Shorter side to `resize`, then as `random_resized_crop_and_flip`; it draws from torch's global CPU generator.
    """
    from torchvision.transforms import v2  # noqa: PLC0415

    return v2.Compose([v2.Resize(resize, antialias=True), random_resized_crop_and_flip(size)])


def resize_and_center_crop(resize: int = 256, size: int = 224) -> Callable[[Tensor], Tensor]:
    """AFM's test transform of one uint8 image [3, H, W]: shorter side to `resize`, then the centre crop [3, size, size]."""
    from torchvision.transforms import v2  # noqa: PLC0415

    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])


def resize_crop_and_flip(size: int = 256) -> Callable[[Tensor], Tensor]:
    """Me-Momentum's training transform of one uint8 image [3, H, W] of Clothing1M: [3, size, size].

    Both sides to `size` (the aspect not kept), zero padding of an eighth of it (32 of 256), a random crop to `size` and flip; it
    draws from torch's global CPU generator.
    """
    from torchvision.transforms import v2  # noqa: PLC0415

    resized = v2.Resize((size, size), antialias=True)
    return v2.Compose([resized, v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()])


def resize_to_square(size: int = 256) -> Callable[[Tensor], Tensor]:
    """Me-Momentum's test transform of one uint8 image [3, H, W] of Clothing1M: both sides to `size`, the aspect not kept."""
    from torchvision.transforms import v2  # noqa: PLC0415

    return v2.Resize((size, size), antialias=True)
