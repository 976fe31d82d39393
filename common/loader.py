"""Mini-batches of data that stays on the device: gathered, augmented and normalised there, as many views as asked."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Generator, Tensor

from common import augment


class Images:
    """The images of a split on a device, uint8 channels-last, with the constants that normalise them."""

    def __init__(
        self, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ):
        """images: uint8 [N, H, W, C]; mean and std: per channel, of pixels scaled to [0, 1]."""
        pixels = torch.as_tensor(np.ascontiguousarray(images)).to(device)
        self.pixels = pixels.permute(0, 3, 1, 2)  # [N, C, H, W], channels-last in memory
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.pixels.device

    def view(
        self, index: Tensor, augmentation: Callable | None = None, generator: Generator | None = None
    ) -> Tensor:
        """The images at index [B], augmented by augmentation(batch, generator) if given: float32 [B, C, H, W]."""
        batch = self.pixels[index]
        if augmentation is not None:
            batch = augmentation(batch, generator)
        return augment.normalise(batch, self.mean, self.std)


class Batches:
    """One pass over some images at every iteration: yields (views, index), views a tuple of k [B, C, H, W] tensors.

    subset: the positions to go through, [n] on the images' device (all by default). shuffle: a new order at every pass,
    drawn from generator. The last batch may be smaller; none is dropped. Each view is augmented by its own draws.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        subset: Tensor | None = None,
        views: int = 1,
        augmentation: Callable | None = None,
        shuffle: bool = False,
        generator: Generator | None = None,
    ):
        """generator is needed to shuffle or augment, and lives on the device of the images."""
        if (shuffle or augmentation is not None) and generator is None:
            raise ValueError("shuffling and augmenting need a generator")
        self.images, self.batch_size, self.views = images, batch_size, views
        self.subset = torch.arange(len(images), device=images.device) if subset is None else subset
        self.augmentation, self.shuffle, self.generator = augmentation, shuffle, generator

    def __len__(self) -> int:
        return math.ceil(len(self.subset) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        order = self.subset
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=self.generator, device=order.device)]
        for index in order.split(self.batch_size) if len(order) else ():
            yield (
                tuple(self.images.view(index, self.augmentation, self.generator) for _ in range(self.views)),
                index,
            )

    def endless(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Pass after pass, without end. ValueError where there is nothing to go through."""
        if not len(self.subset):
            raise ValueError("no sample to go through again and again")
        while True:
            yield from self
