"""What the flags of the three scripts choose between, and the schedule that they set. No torch here: `--help` needs none."""

import math
from collections.abc import Iterable
from typing import NamedTuple

# blocks per stage, and whether they are bottlenecks
ARCHITECTURES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
ARCHS = (*ARCHITECTURES, "narrow")
ARCH_HELP = "PreAct ResNet, a narrow one below 16 pixels; narrow: one of three blocks at any size"


class Lambdas(NamedTuple):
    """The weights of the losses (README, section 5.6), by the names of their flags."""

    x: float = 1
    u: float = 100
    xe: float = 1
    ue: float = 100
    c: float = 1


def split_epochs(epochs: int, warm_up: int, interval: int, clustering: bool) -> list[int]:
    """The epochs, from 0, at whose start samples are removed and split again (README, section 4.4)."""
    return [e for e in range(warm_up, epochs) if e == warm_up or (clustering and e % interval == 0)]


def removal_count(epoch: int, size: int, ratio: float, start_factor: float, splits: Iterable[int]) -> int:
    """How many of `size` samples are removed in an epoch: ceil(factor q N) at first, ceil(q N) more at each split.

    ratio: q. start_factor: 10 in the CIFAR script, 1 in the mini-ImageNet script (README, section 4.2).
    """
    first = math.ceil(ratio * start_factor * size)
    return first + math.ceil(ratio * size) * sum(split <= epoch for split in splits)
