"""AutoAugment (CIFAR-10 policy) and FixMatch's RandAugment of uint8 batches [B, C, H, W], drawn per image, and the papers' views.

Drawing is separate from applying. The images equal PIL's bit for bit: see `image_operations`. Generators and draws are on the
CPU, wherever the images are: a card gets what it needs of them in one copy, which the host does not wait for.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from common.gpu.image_operations import (
    KINDS,
    Tables,
    affine_nearest,
    apply_in_turn,
    invert,
    posterize,
    rotation,
    shear_taps,
    solarize,
    to_device,
)

# The policy for CIFAR-10 (AutoAugment, Cubuk et al. 2019): operation, probability, index of the magnitude
CIFAR10_POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translateX", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shearY", 0.5, 8), ("translateY", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shearY", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translateX", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translateY", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translateY", 0.9, 9), ("translateY", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translateY", 0.7, 9), ("autocontrast", 0.9, 0)),
)

# index 0 to 9 to the magnitude; the operations that are not named here have none
AUTO_AUGMENT_MAGNITUDES = {
    "shearX": np.linspace(0, 0.3, 10),
    "shearY": np.linspace(0, 0.3, 10),
    "translateX": np.linspace(0, 150 / 331, 10),  # of the image's width
    "translateY": np.linspace(0, 150 / 331, 10),  # of its height
    "rotate": np.linspace(0, 30, 10),  # degrees
    "color": np.linspace(0, 0.9, 10),  # enhancing factor: 1 plus or minus this
    "posterize": np.array([8, 8, 7, 7, 6, 6, 5, 5, 4, 4]),  # bits kept
    "solarize": np.linspace(256, 0, 10),  # threshold
    "contrast": np.linspace(0, 0.9, 10),
    "sharpness": np.linspace(0, 0.9, 10),
    "brightness": np.linspace(0, 0.9, 10),
}
AUTO_AUGMENT_FILL = 128

# magnitude and sign (float64 [n]), height and width to one of KINDS and its parameter: a matrix of `affine_nearest`, the shears
# of `shear_bicubic`, a table of values, or a factor [n]; rotate has no sign, its angle is positive
AUTO_AUGMENT_OPERATIONS = {
    "shearX": lambda amount, sign, height, width: ("bicubic", (sign * amount, 0 * amount)),
    "shearY": lambda amount, sign, height, width: ("bicubic", (0 * amount, sign * amount)),
    "translateX": lambda amount, sign, height, width: ("nearest", affine(c=sign * amount * width)),
    "translateY": lambda amount, sign, height, width: ("nearest", affine(f=sign * amount * height)),
    "rotate": lambda amount, sign, height, width: ("nearest", rotation(amount, height, width)),
    "color": lambda amount, sign, height, width: ("color", 1 + sign * amount),
    "posterize": lambda amount, sign, height, width: ("table", posterize(all_values(amount), amount)),
    "solarize": lambda amount, sign, height, width: ("table", solarize(all_values(amount), amount)),
    "contrast": lambda amount, sign, height, width: ("contrast", 1 + sign * amount),
    "sharpness": lambda amount, sign, height, width: ("sharpness", 1 + sign * amount),
    "brightness": lambda amount, sign, height, width: ("brightness", 1 + sign * amount),
    "autocontrast": lambda amount, sign, height, width: ("autocontrast", None),
    "equalize": lambda amount, sign, height, width: ("equalize", None),
    "invert": lambda amount, sign, height, width: ("table", invert(all_values(amount))),
}

# level 0 to 9 to the magnitude, in the float64 arithmetic of FixMatch (Sohn et al. 2020), whose pool of operations this is
LEVEL = np.arange(10)
RAND_AUGMENT_MAGNITUDES = {
    "Brightness": 0.9 * LEVEL / 10 + 0.05,  # enhancing factor: always below 1
    "Color": 0.9 * LEVEL / 10 + 0.05,
    "Contrast": 0.9 * LEVEL / 10 + 0.05,
    "Posterize": np.trunc(4 * LEVEL / 10) + 4,  # bits kept
    "Rotate": np.trunc(30 * LEVEL / 10),  # degrees
    "Sharpness": 0.9 * LEVEL / 10 + 0.05,
    "ShearX": 0.3 * LEVEL / 10,
    "ShearY": 0.3 * LEVEL / 10,
    "Solarize": 256 - np.trunc(256 * LEVEL / 10),  # threshold
    "TranslateX": 0.3 * LEVEL / 10,  # of the image's width, then integer pixels
    "TranslateY": 0.3 * LEVEL / 10,  # of its height
}

# as above, in the order of the numbers that are drawn
RAND_AUGMENT_OPERATIONS = {
    "AutoContrast": lambda amount, sign, height, width: ("autocontrast", None),
    "Brightness": lambda amount, sign, height, width: ("brightness", amount),
    "Color": lambda amount, sign, height, width: ("color", amount),
    "Contrast": lambda amount, sign, height, width: ("contrast", amount),
    "Equalize": lambda amount, sign, height, width: ("equalize", None),
    "Identity": lambda amount, sign, height, width: ("none", None),
    "Posterize": lambda amount, sign, height, width: ("table", posterize(all_values(amount), amount)),
    "Rotate": lambda amount, sign, height, width: ("nearest", rotation(sign * amount, height, width)),
    "Sharpness": lambda amount, sign, height, width: ("sharpness", amount),
    "ShearX": lambda amount, sign, height, width: ("nearest", affine(b=sign * amount)),
    "ShearY": lambda amount, sign, height, width: ("nearest", affine(d=sign * amount)),
    "Solarize": lambda amount, sign, height, width: ("table", solarize(all_values(amount), amount)),
    "TranslateX": lambda amount, sign, height, width: (
        "nearest",
        affine(c=(sign * amount * width).trunc()),
    ),
    "TranslateY": lambda amount, sign, height, width: (
        "nearest",
        affine(f=(sign * amount * height).trunc()),
    ),
}
FILLS = (0, AUTO_AUGMENT_FILL)


def affine(**entries: Tensor) -> Tensor:
    """The matrices [B, 6] of `affine_nearest` that are the identity but for one of the entries a to f, given as float64 [B]."""
    ((name, values),) = entries.items()
    matrix = values.new_zeros(len(values), 6)
    matrix[:, [0, 4]] = 1
    matrix[:, "abcdef".index(name)] = values
    return matrix


def all_values(amount: Tensor) -> Tensor:
    """Images of the values 0 to 255 for amounts [n]: uint8 [n, 1, 1, 256]."""
    return torch.arange(256, dtype=torch.uint8).expand(len(amount), 1, 1, 256)


class Operations(NamedTuple):
    """Operations with their magnitudes and signs, for images of one size, in the terms of `apply_in_turn`."""

    kind: np.ndarray  # int [k]
    row: np.ndarray  # int64 [k]
    factor: np.ndarray  # float32 [k]
    tables: Tables

    def apply(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        """The operations of these numbers, int [n, B], one row after the other: uint8 [B, C, H, W] to uint8 [B, C, H, W]."""
        return apply_in_turn(images, self.kind[numbers], self.row[numbers], self.factor[numbers], self.tables)


def make_operations(
    chosen: list[tuple[dict[str, Callable], str, float, float]], shape: torch.Size, device: torch.device
) -> Operations:
    """Operations in the order of `chosen`: of which policy, by name, magnitude and sign. shape: [C, H, W] of the images.

    Outside of the image AutoAugment's show grey 128, RandAugment's black.
    """
    channels, height, width = shape
    kind, row = (np.zeros(len(chosen), dtype=np.int64) for _ in range(2))
    factor = np.zeros(len(chosen), dtype=np.float32)
    tables = {  # row 0 is of those that look nothing up
        "nearest": [torch.zeros(1, height * width, dtype=torch.int64)],
        "bicubic": [torch.zeros(1, 5 * height * width, dtype=torch.int64)],
        "table": [torch.zeros(1, channels, 256, dtype=torch.uint8)],
    }
    groups: dict[tuple[bool, str], list[int]] = {}
    for i, (operations, name, _, _) in enumerate(chosen):
        groups.setdefault((operations is AUTO_AUGMENT_OPERATIONS, name), []).append(i)
    for (auto, name), members in groups.items():
        amount, sign = (torch.tensor([chosen[i][k] for i in members], dtype=torch.float64) for k in (2, 3))
        found, parameter = chosen[members[0]][0][name](amount, sign, height, width)
        kind[members] = KINDS.index(found)
        if found in tables:
            row[members] = np.arange(len(members)) + sum(map(len, tables[found]))
            tables[found].append(table_rows(found, parameter, shape, outside=height * width + auto))
        elif parameter is not None:
            factor[members] = parameter
    made = [*map(torch.cat, tables.values()), torch.tensor(FILLS, dtype=torch.uint8)]
    return Operations(kind, row, factor, Tables(*(table.to(device) for table in made)))


def table_rows(
    kind: str, parameter: Tensor | tuple[Tensor, Tensor], shape: torch.Size, outside: int
) -> Tensor:
    """Rows of `Tables` for the parameter of an operation. outside: the number of the value of what lies outside."""
    channels, height, width = shape
    if isinstance(parameter, tuple):  # bicubic
        taps, fraction = shear_taps(*parameter, height, width)
        return torch.cat(
            [taps.masked_fill_(taps == height * width, outside), fraction.view(torch.int64)], dim=1
        )
    if kind == "nearest":
        # where the pixels of an image of their numbers go
        pixels = torch.arange(height * width).view(1, 1, height, width).expand(len(parameter), -1, -1, -1)
        return affine_nearest(pixels, parameter, fill=outside).flatten(1)
    return parameter.view(-1, 1, 256).expand(-1, channels, -1)


@cache
def all_operations(shape: torch.Size, device: torch.device) -> Operations:
    """Nothing, then AutoAugment's [25, 2, 2] and RandAugment's [14, 10, 2], the last of each by sign, -1 first."""
    auto = [
        (AUTO_AUGMENT_OPERATIONS, name, AUTO_AUGMENT_MAGNITUDES.get(name, 0 * LEVEL)[index], sign)
        for pair in CIFAR10_POLICY
        for name, _, index in pair
        for sign in (-1, 1)
    ]
    rand = [
        (RAND_AUGMENT_OPERATIONS, name, RAND_AUGMENT_MAGNITUDES.get(name, 0 * LEVEL)[level], sign)
        for name in RAND_AUGMENT_OPERATIONS
        for level in LEVEL
        for sign in (-1, 1)
    ]
    nothing = (RAND_AUGMENT_OPERATIONS, "Identity", 0, 1)
    return make_operations([nothing, *auto, *rand], shape, device)


def apply_numbers(images: Tensor, numbers: np.ndarray) -> Tensor:
    """Operations of `all_operations` by their numbers, int [n, B], one row after the other.

    ValueError for images that are no uint8 [B, 1 or 3, H, W], and for draws of another number of images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
    if len(images) != numbers.shape[1]:
        raise ValueError(f"{len(images)} images, but draws for {numbers.shape[1]}")
    return all_operations(images.shape[1:], images.device).apply(images, numbers)


# AutoAugment ------------------------------------------------------------------------------------------------------------


class AutoAugmentDraws(NamedTuple):
    """What AutoAugment draws for B images."""

    sub_policy: Tensor  # int [B], row of CIFAR10_POLICY
    applied: Tensor  # bool [B, 2], whether each of its two operations is applied
    sign: Tensor  # int [B, 2], 1 or -1; of no effect on operations without a sign


def draw_auto_augment(count: int, generator: Generator) -> AutoAugmentDraws:
    """One of the 25 sub-policies for each of `count` images, each of its operations with its probability, and fair signs."""
    probability = torch.tensor([[p for _, p, _ in pair] for pair in CIFAR10_POLICY])
    sub_policy = torch.randint(len(CIFAR10_POLICY), (count,), generator=generator)
    applied = torch.rand(count, 2, generator=generator) < probability[sub_policy]
    sign = 2 * torch.randint(2, (count, 2), generator=generator) - 1
    return AutoAugmentDraws(sub_policy, applied, sign)


def auto_augment_numbers(draws: AutoAugmentDraws) -> np.ndarray:
    """The numbers of the drawn operations in `all_operations`: int [2, B]."""
    sub_policy, applied, sign = (values.numpy() for values in draws)
    number = 1 + 4 * sub_policy[:, None] + [0, 2] + (sign > 0)
    return np.where(applied, number, 0).T


def apply_auto_augment(images: Tensor, draws: AutoAugmentDraws) -> Tensor:
    """AutoAugment with the CIFAR-10 policy as drawn: uint8 [B, C, H, W] to uint8 [B, C, H, W].

    SANM, AutoAugment with the CIFAR-10 policy (Cubuk et al. 2019): grey 128 outside the image, shears bicubic,
    rotations and translations nearest, translations by fractions of a pixel. Raises ValueError for another kind of batch and for
    draws of another number of images.
    """
    return apply_numbers(images, auto_augment_numbers(draws))


def auto_augment(images: Tensor, generator: Generator) -> Tensor:
    """AutoAugment with the CIFAR-10 policy, drawn for each image of uint8 [B, C, H, W]; see `apply_auto_augment`."""
    return apply_auto_augment(images, draw_auto_augment(len(images), generator))


# RandAugment ------------------------------------------------------------------------------------------------------------


class RandAugmentDraws(NamedTuple):
    """What RandAugment draws for B images and n operations each."""

    operation: Tensor  # int [B, n], number in RAND_AUGMENT_OPERATIONS
    level: Tensor  # int [B, n], 1 to m - 1
    applied: Tensor  # bool [B, n]
    negated: Tensor  # bool [B, n]; of no effect on operations without a sign
    cutout_centre: Tensor  # float64 [B, 2], x and y in pixels


def draw_rand_augment(
    count: int, height: int, width: int, generator: Generator, n: int = 2, m: int = 10
) -> RandAugmentDraws:
    """n of the 14 operations, with replacement, for each of `count` images, each with a level of 1 to m - 1.

    Each is applied with probability 1/2, and negated with probability 1/2; the centre of the cutout is uniform over the image.
    Raises ValueError for n < 1 and for m outside 2 to 10.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 2 <= m <= len(LEVEL):
        raise ValueError(f"m must be from 2 to {len(LEVEL)}, got {m}")
    operation = torch.randint(len(RAND_AUGMENT_OPERATIONS), (count, n), generator=generator)
    level = torch.randint(1, m, (count, n), generator=generator)
    applied, negated = torch.rand(2, count, n, generator=generator) < 0.5
    centre = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    centre *= torch.tensor([width, height])
    return RandAugmentDraws(operation, level, applied, negated, centre)


def rand_augment_numbers(draws: RandAugmentDraws) -> np.ndarray:
    """The numbers of the drawn operations in `all_operations`: int [n, B]."""
    operation, level, applied, negated = (values.numpy() for values in draws[:4])
    number = 1 + 4 * len(CIFAR10_POLICY) + 20 * operation + 2 * level + ~negated
    return np.where(applied, number, 0).T


def apply_rand_augment(images: Tensor, draws: RandAugmentDraws, side: int | None = None) -> Tensor:
    """RandAugment as drawn, then the cutout: uint8 [B, C, H, W] to uint8 [B, C, H, W].

    SANM, RandAugment of FixMatch (Sohn et al. 2020): geometric operations nearest, black outside the image. side: of the
    cutout, in pixels; 16 of 32 in the release. By default half of the image's height, our choice for other sizes.
    Raises ValueError for another kind of batch and for draws of another number of images.
    """
    result = apply_numbers(images, rand_augment_numbers(draws))
    return cutout(result, draws.cutout_centre, images.shape[2] // 2 if side is None else side)


def rand_augment(images: Tensor, generator: Generator, n: int = 2, m: int = 10) -> Tensor:
    """RandAugment and cutout, drawn for each image of uint8 [B, C, H, W]; see `draw_rand_augment` and `apply_rand_augment`."""
    count, _, height, width = images.shape
    return apply_rand_augment(images, draw_rand_augment(count, height, width, generator, n, m))


def cutout(images: Tensor, centres: Tensor, side: int = 16, fill: int = 127) -> Tensor:
    """Paint over a square of each image: uint8 [B, C, H, W] to uint8 [B, C, H, W].

    centres: float64 [B, 2], x and y in pixels. The rectangle of FixMatch's RandAugment: from max(centre - side / 2, 0)
    to that plus `side`, both ends included, so it is side + 1 wide. At the left and top edge it is moved into the image, at the
    right and bottom edge it is cut off.
    """
    height, width = images.shape[2:]
    left, top = (centres - side / 2).clamp_min(0).long()[:, :, None].unbind(1)
    x, y = torch.arange(width), torch.arange(height)
    columns, rows = (x >= left) & (x <= left + side), (y >= top) & (y <= top + side)  # [B, W], [B, H]
    # bits of a byte: on a CPU twenty times as fast as a masked_fill
    rows, columns = to_device(images.device, *(inside.to(torch.uint8) * 255 for inside in (rows, columns)))
    painted = (rows[:, :, None] & columns[:, None, :])[:, None]
    return (images ^ fill).bitwise_and_(painted).bitwise_xor_(images)


# views ------------------------------------------------------------------------------------------------------------------


def six_views(
    images: Tensor,
    generator: Generator,
    crop: Callable[[Tensor, Generator], Tensor],
    weak_reference: bool = False,
) -> Tensor:
    """SANM's views of a batch uint8 [B, C, H, W]: uint8 [6, B, C, H, W], in the order AA1, AA2, RA1, RA2, REF1, REF2.

    AA and REF are cropped and AutoAugment, RA cropped and RandAugment with cutout, each with its own draws.
    crop(batch, generator) is the random crop and flip of a batch. weak_reference: REF are only cropped.
    """
    count, (height, width) = len(images), images.shape[2:]
    cropped = crop(images.repeat(6, 1, 1, 1), generator)  # RA, AA, REF
    auto = draw_auto_augment((2 if weak_reference else 4) * count, generator)
    rand = draw_rand_augment(2 * count, height, width, generator)
    numbers = np.zeros((2, 6 * count), dtype=np.int64)
    numbers[:, : 2 * count] = rand_augment_numbers(rand)
    numbers[:, 2 * count :][:, : len(auto.sub_policy)] = auto_augment_numbers(auto)
    rand_views, auto_views, reference = apply_numbers(cropped, numbers).split([2 * count] * 3)
    rand_views = cutout(rand_views, rand.cutout_centre, height // 2)
    return torch.cat([auto_views, rand_views, reference]).view(6, *images.shape)


def four_views(images: Tensor, generator: Generator, crop: Callable[[Tensor, Generator], Tensor]) -> Tensor:
    """Manifold DivideMix's views of a batch uint8 [B, C, H, W]: uint8 [4, B, C, H, W], two weak, then two strong ones.

    Weak views are cropped; strong views are cropped, then AutoAugment, each with its own draws. crop: as for `six_views`.
    """
    weak, strong = crop(images.repeat(4, 1, 1, 1), generator).chunk(2)
    return torch.cat([weak, auto_augment(strong, generator)]).view(4, *images.shape)
