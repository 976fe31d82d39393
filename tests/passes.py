"""Small random images, their labels and batches, for passes over the data."""

import torch
from torch import Generator, Tensor

from common.gpu.loader import Images

K, N = 4, 26  # classes, images


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def images() -> Images:
    pixels = torch.randint(256, (N, 8, 8, 1), generator=seeded(2)).byte()
    return Images(pixels.numpy(), (0.5,), (0.25,), torch.device("cpu"))


def labels() -> Tensor:
    return torch.randint(K, (N,), generator=seeded(9))


def pass_over(order: Tensor, size: int, views: int = 1) -> list:
    """Batches (views, index) in an order; of several views each is another image."""
    return [
        (tuple(images().view((index + k) % N) for k in range(views)), index) for index in order.split(size)
    ]
