"""Groups of K samples of a mini-batch, as row indices [M, K] (README, section 4, step 1)."""

import torch
from torch import Generator, Tensor

from afm.choices import ORDERS


def form_groups(
    rows: int,
    group_size: int,
    generator: Generator,
    *,
    order: str = "halves",
    rounds: int = 1,
    chunks: int = 1,
) -> Tensor:
    """The groups of one mini-batch of `rows` samples: int64 [M, K] on the generator's device.

    Each round puts every row into at most one group; rows mod K are left over. order: `random` forms every round from a
    random permutation; `halves` forms the first round without one, as the release does, because the loader has shuffled.
    chunks: the halves are formed inside this many consecutive pieces of the batch, as the release does on this many GPUs.
    ValueError: an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order}")
    groups = []
    if order == "halves":
        pieces = torch.arange(rows, device=generator.device).chunk(chunks)
        groups = [piece[groups_by_halves(len(piece), group_size, piece.device)] for piece in pieces]
    random_rounds = rounds - (order == "halves")
    groups += [random_groups(rows, group_size, generator) for _ in range(random_rounds)]
    return torch.cat(groups)


def groups_by_halves(rows: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Group g is rows g, g + M, ..., g + (K - 1) M with M = rows // K: int64 [M, K]; for K = 2 the release's pairs."""
    count = rows // group_size
    return torch.arange(count * group_size, device=device).view(group_size, count).T


def random_groups(rows: int, group_size: int, generator: Generator) -> Tensor:
    """A random permutation of the rows cut into rows // K consecutive groups: int64 [M, K]."""
    count = rows // group_size
    order = torch.randperm(rows, generator=generator, device=generator.device)
    return order[: count * group_size].view(count, group_size)
