"""Augmentations of image batches on their device, each parameter drawn per sample from the generator passed in.

Batches are [B, C, H, W] of any dtype. torchvision's own transforms draw one parameter per call, so that a
whole batch would get the same crop; these follow the distribution of torchvision's transforms applied image
by image.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad each side with `padding` zeros and cut the original size out of it, at a place of each image's own.

    The (2 padding + 1)^2 places are equally likely, as in torchvision's RandomCrop(size, padding=padding).
    The result has channels-last strides.
    """
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)  # [B, H]
    columns = left + torch.arange(width, device=device)  # [B, W]
    sample = torch.arange(count, device=device)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)  # [B, H + 2p, W + 2p, C]
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability p, as torchvision's RandomHorizontalFlip."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < p
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop_and_flip(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """The CIFAR training transform of SFA and Me-Momentum: random crop with zero padding, then horizontal flip."""
    return random_flip(random_crop(images, padding, generator), generator)


def training_augmentation(dataset: str, size: int) -> Callable[[Tensor, Generator], Tensor]:
    """The crop-and-flip transform at a data set's own size: padding of an eighth of it (4 pixels of 32).

    Handwritten digits are not mirrored: a mirrored digit is another sign or none.
    """
    padding = max(size // 8, 1)
    if dataset in ("digits", "mnist"):
        return lambda images, generator: random_crop(images, padding, generator)
    return partial(crop_and_flip, padding=padding)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] to float32 (x / 255 - mean) / std, as ToTensor and Normalize; mean and std are [C]."""
    scale = 1 / (255 * std)
    return images.float() * scale[:, None, None] - (mean / std)[:, None, None]


def random_resized_crop_and_flip(size: int = 224) -> Callable[[Tensor], Tensor]:
    """AFM's training transform of one uint8 image [3, H, W]: a random part of it as [3, size, size], mirrored or not.

    torchvision's defaults: area 0.08 to 1, aspect 3/4 to 4/3, bilinear; it draws from torch's global CPU generator.
    """
    from torchvision.transforms import v2  # noqa: PLC0415 (seconds to import, of use only for image files)

    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])


def resize_and_center_crop(resize: int = 256, size: int = 224) -> Callable[[Tensor], Tensor]:
    """AFM's test transform of one uint8 image [3, H, W]: shorter side to `resize`, the middle [3, size, size] of it."""
    from torchvision.transforms import v2  # noqa: PLC0415

    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])


def resize_crop_and_flip(size: int = 256) -> Callable[[Tensor], Tensor]:
    """Me-Momentum's training transform of one uint8 image [3, H, W] of Clothing1M: [3, size, size], all of it but for a shift.

    Both sides to `size`, so that the aspect is not kept; padded by an eighth of it (32 of 256) with zeros, cut at random to
    the old size, mirrored or not; it draws from torch's global CPU generator.
    """
    from torchvision.transforms import v2  # noqa: PLC0415

    resized = v2.Resize((size, size), antialias=True)
    return v2.Compose([resized, v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()])


def resize_to_square(size: int = 256) -> Callable[[Tensor], Tensor]:
    """Me-Momentum's test transform of one uint8 image [3, H, W] of Clothing1M: both sides to `size`, the aspect not kept."""
    from torchvision.transforms import v2  # noqa: PLC0415

    return v2.Resize((size, size), antialias=True)
