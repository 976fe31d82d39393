"""AutoAugment (CIFAR-10 policy) and FixMatch's RandAugment of uint8 batches [B, C, H, W], drawn per image, and the papers' views.

Drawing is separate from applying. The images equal PIL's bit for bit: see `image_operations`.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from common.gpu.image_operations import (
    affine_nearest,
    autocontrast,
    brightness,
    color,
    contrast,
    equalize,
    invert,
    posterize,
    rotation,
    sharpness,
    shear_bicubic,
    solarize,
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

# a batch, the magnitude and the sign of each image (float64 [B]) to the batch; rotate has no sign, its angle is positive
AUTO_AUGMENT_OPERATIONS = {
    "shearX": lambda images, amount, sign: shear_bicubic(
        images, sign * amount, 0 * amount, AUTO_AUGMENT_FILL
    ),
    "shearY": lambda images, amount, sign: shear_bicubic(
        images, 0 * amount, sign * amount, AUTO_AUGMENT_FILL
    ),
    "translateX": lambda images, amount, sign: affine_nearest(
        images, affine(c=sign * amount * images.shape[3]), AUTO_AUGMENT_FILL
    ),
    "translateY": lambda images, amount, sign: affine_nearest(
        images, affine(f=sign * amount * images.shape[2]), AUTO_AUGMENT_FILL
    ),
    "rotate": lambda images, amount, sign: affine_nearest(
        images, rotation(amount, *images.shape[2:]), AUTO_AUGMENT_FILL
    ),
    "color": lambda images, amount, sign: color(images, 1 + sign * amount),
    "posterize": lambda images, amount, sign: posterize(images, amount),
    "solarize": lambda images, amount, sign: solarize(images, amount),
    "contrast": lambda images, amount, sign: contrast(images, 1 + sign * amount),
    "sharpness": lambda images, amount, sign: sharpness(images, 1 + sign * amount),
    "brightness": lambda images, amount, sign: brightness(images, 1 + sign * amount),
    "autocontrast": lambda images, amount, sign: autocontrast(images),
    "equalize": lambda images, amount, sign: equalize(images),
    "invert": lambda images, amount, sign: invert(images),
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
    "AutoContrast": lambda images, amount, sign: autocontrast(images),
    "Brightness": lambda images, amount, sign: brightness(images, amount),
    "Color": lambda images, amount, sign: color(images, amount),
    "Contrast": lambda images, amount, sign: contrast(images, amount),
    "Equalize": lambda images, amount, sign: equalize(images),
    "Identity": lambda images, amount, sign: images,
    "Posterize": lambda images, amount, sign: posterize(images, amount),
    "Rotate": lambda images, amount, sign: affine_nearest(images, rotation(sign * amount, *images.shape[2:])),
    "Sharpness": lambda images, amount, sign: sharpness(images, amount),
    "ShearX": lambda images, amount, sign: affine_nearest(images, affine(b=sign * amount)),
    "ShearY": lambda images, amount, sign: affine_nearest(images, affine(d=sign * amount)),
    "Solarize": lambda images, amount, sign: solarize(images, amount),
    "TranslateX": lambda images, amount, sign: affine_nearest(
        images, affine(c=(sign * amount * images.shape[3]).trunc())
    ),
    "TranslateY": lambda images, amount, sign: affine_nearest(
        images, affine(f=(sign * amount * images.shape[2]).trunc())
    ),
}


def affine(**entries: Tensor) -> Tensor:
    """The matrices [B, 6] of `affine_nearest` that are the identity but for one of the entries a to f, given as float64 [B]."""
    ((name, values),) = entries.items()
    matrix = values.new_zeros(len(values), 6)
    matrix[:, [0, 4]] = 1
    matrix[:, "abcdef".index(name)] = values
    return matrix


def apply_operations(
    images: Tensor, operations: dict[str, Callable], operation: Tensor, amount: Tensor, sign: Tensor
) -> Tensor:
    """Apply to each image the operation of that number: int [B], len(operations) for none; amount and sign: float64 [B]."""
    functions = [*operations.values(), lambda images, amount, sign: images]
    numbers = torch.arange(len(functions), device=images.device)
    # one wait for the device, for any number of operations
    sizes = (operation == numbers[:, None]).sum(1).tolist()
    order = operation.argsort()
    groups = zip(
        *(values.index_select(0, order).split(sizes) for values in (images, amount, sign)), strict=True
    )
    results = [
        function(*group) for function, group in zip(functions, groups, strict=True) if len(group[0]) > 0
    ]
    return torch.cat([images[:0], *results]).index_select(0, order.argsort())


def check_batch(images: Tensor, draws: Tensor) -> None:
    """Raise ValueError for images that are not uint8 [B, 1 or 3, H, W], and for draws of another number of images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
    if len(images) != len(draws):
        raise ValueError(f"{len(images)} images, but draws for {len(draws)}")


# AutoAugment ------------------------------------------------------------------------------------------------------------


class AutoAugmentDraws(NamedTuple):
    """What AutoAugment draws for B images."""

    sub_policy: Tensor  # int [B], row of CIFAR10_POLICY
    applied: Tensor  # bool [B, 2], whether each of its two operations is applied
    sign: Tensor  # int [B, 2], 1 or -1; of no effect on operations without a sign


@cache
def cifar10_policy(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The policy as three tensors [25, 2]: the number of the operation, its probability, its magnitude (float64)."""
    names = list(AUTO_AUGMENT_OPERATIONS)
    operation = [[names.index(name) for name, _, _ in pair] for pair in CIFAR10_POLICY]
    probability = [[p for _, p, _ in pair] for pair in CIFAR10_POLICY]
    magnitude = [
        [
            AUTO_AUGMENT_MAGNITUDES[name][index] if name in AUTO_AUGMENT_MAGNITUDES else 0
            for name, _, index in pair
        ]
        for pair in CIFAR10_POLICY
    ]
    return (
        torch.tensor(operation, device=device),
        torch.tensor(probability, device=device),
        torch.tensor(magnitude, device=device, dtype=torch.float64),
    )


def draw_auto_augment(count: int, generator: Generator) -> AutoAugmentDraws:
    """One of the 25 sub-policies for each of `count` images, each of its operations with its probability, and fair signs.

    The draws are on the generator's device.
    """
    device = generator.device
    _, probability, _ = cifar10_policy(device)
    sub_policy = torch.randint(len(CIFAR10_POLICY), (count,), generator=generator, device=device)
    applied = torch.rand(count, 2, generator=generator, device=device) < probability[sub_policy]
    sign = 2 * torch.randint(2, (count, 2), generator=generator, device=device) - 1
    return AutoAugmentDraws(sub_policy, applied, sign)


def apply_auto_augment(images: Tensor, draws: AutoAugmentDraws) -> Tensor:
    """AutoAugment with the CIFAR-10 policy as drawn: uint8 [B, C, H, W] to uint8 [B, C, H, W].

    SANM, AutoAugment with the CIFAR-10 policy (Cubuk et al. 2019): grey 128 outside the image, shears bicubic,
    rotations and translations nearest, translations by fractions of a pixel. Raises ValueError for another kind of batch and for
    draws of another number of images.
    """
    check_batch(images, draws.sub_policy)
    operation, _, magnitude = cifar10_policy(images.device)
    result = images.contiguous()
    for slot in range(2):
        chosen = operation[draws.sub_policy, slot].where(draws.applied[:, slot], len(AUTO_AUGMENT_OPERATIONS))
        result = apply_operations(
            result,
            AUTO_AUGMENT_OPERATIONS,
            chosen,
            magnitude[draws.sub_policy, slot],
            draws.sign[:, slot].double(),
        )
    return result


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


@cache
def rand_augment_magnitudes(device: torch.device) -> Tensor:
    """The magnitude of each operation at each level, float64 [14, 10]."""
    rows = [RAND_AUGMENT_MAGNITUDES.get(name, 0 * LEVEL) for name in RAND_AUGMENT_OPERATIONS]
    return torch.tensor(np.array(rows), device=device, dtype=torch.float64)


def draw_rand_augment(
    count: int, height: int, width: int, generator: Generator, n: int = 2, m: int = 10
) -> RandAugmentDraws:
    """n of the 14 operations, with replacement, for each of `count` images, each with a level of 1 to m - 1.

    Each is applied with probability 1/2, and negated with probability 1/2; the centre of the cutout is uniform over the image.
    Raises ValueError for n < 1 and for m outside 2 to 10. The draws are on the generator's device.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 2 <= m <= len(LEVEL):
        raise ValueError(f"m must be from 2 to {len(LEVEL)}, got {m}")
    device = generator.device
    operation = torch.randint(len(RAND_AUGMENT_OPERATIONS), (count, n), generator=generator, device=device)
    level = torch.randint(1, m, (count, n), generator=generator, device=device)
    applied, negated = torch.rand(2, count, n, generator=generator, device=device) < 0.5
    centre = torch.rand(count, 2, generator=generator, device=device, dtype=torch.float64)
    # a column at a time: a tensor made of (width, height) would be copied to the device
    centre[:, 0] *= width
    centre[:, 1] *= height
    return RandAugmentDraws(operation, level, applied, negated, centre)


def apply_rand_augment(images: Tensor, draws: RandAugmentDraws, side: int | None = None) -> Tensor:
    """RandAugment as drawn, then the cutout: uint8 [B, C, H, W] to uint8 [B, C, H, W].

    SANM, RandAugment of FixMatch (Sohn et al. 2020): geometric operations nearest, black outside the image. side: of the
    cutout, in pixels; 16 of 32 in the release. By default half of the image's height, our choice for other sizes.
    Raises ValueError for another kind of batch and for draws of another number of images.
    """
    check_batch(images, draws.operation)
    magnitudes = rand_augment_magnitudes(images.device)
    result = images.contiguous()
    for slot in range(draws.operation.shape[1]):
        operation = draws.operation[:, slot]
        result = apply_operations(
            result,
            RAND_AUGMENT_OPERATIONS,
            operation.where(draws.applied[:, slot], len(RAND_AUGMENT_OPERATIONS)),
            magnitudes[operation, draws.level[:, slot]],
            1 - 2 * draws.negated[:, slot].double(),
        )
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
    left, top = (centres - side / 2).clamp_min(0).long().unbind(1)
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    columns = (x >= left[:, None]) & (x <= left[:, None] + side)  # [B, W]
    rows = (y >= top[:, None]) & (y <= top[:, None] + side)  # [B, H]
    # bits of a byte: on a CPU twenty times as fast as a masked_fill
    rows, columns = rows.to(torch.uint8) * 255, columns.to(torch.uint8) * 255
    painted = (rows[:, :, None] & columns[:, None, :])[:, None]
    return (images & ~painted).bitwise_or_(painted & fill)


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
    cropped = crop(images.repeat(6, 1, 1, 1), generator)
    rand, auto, plain = cropped.split([n * len(images) for n in ((2, 2, 2) if weak_reference else (2, 4, 0))])
    views = torch.cat([auto_augment(auto, generator), plain]).view(4, *images.shape)
    rand = rand_augment(rand, generator).view(2, *images.shape)
    return torch.cat([views[:2], rand, views[2:]])


def four_views(images: Tensor, generator: Generator, crop: Callable[[Tensor, Generator], Tensor]) -> Tensor:
    """Manifold DivideMix's views of a batch uint8 [B, C, H, W]: uint8 [4, B, C, H, W], two weak, then two strong ones.

    Weak views are cropped; strong views are cropped, then AutoAugment, each with its own draws. crop: as for `six_views`.
    """
    weak, strong = crop(images.repeat(4, 1, 1, 1), generator).chunk(2)
    return torch.cat([weak, auto_augment(strong, generator)]).view(4, *images.shape)
