"""The network's own operators of a training step, replayed alone: what no code around them can save.

Recorded are convolutions, matrix products and batch normalisations, forward and backward, with shapes, strides and types of
their tensors. The replay runs the same operators in the same order on random numbers. What it leaves out of a step is the
rest: views, activations, losses, the optimiser, Python.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

OWN = ("convolution", "mm", "addmm", "bmm", "batch_norm")  # and what backward makes of them


class Like(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Call(NamedTuple):
    """An operator and its arguments, with a `Like` for each tensor."""

    operator: Callable
    arguments: tuple
    named: dict[str, Any]


class Operators(TorchDispatchMode):
    """Inside it, the network's own operators are recorded in `calls`."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in OWN or name.startswith("convolution") or "batch_norm" in name:
            self.calls.append(Call(func, *tree_map(without_numbers, (args, kwargs))))
        return func(*args, **kwargs)


def without_numbers(value: Any) -> Any:
    """A `Like` for a tensor; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return Like(tuple(value.shape), value.stride(), value.dtype, value.device)


def with_numbers(value: Any, made: dict[Like, torch.Tensor]) -> Any:
    """A tensor like a `Like`, the same for equal ones: positive numbers, for they may be variances."""
    if not isinstance(value, Like):
        return value
    if value not in made:
        # one expanded from a scalar has strides of 0 and cannot be written to
        extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.strides, strict=True))
        numbers = torch.rand(extent, device=value.device).add_(0.5).to(value.dtype)
        made[value] = numbers.as_strided(value.shape, value.strides)
    return made[value]


@torch.no_grad()
def replay_seconds(calls: list[Call], repeats: int = 3) -> float:
    """The shortest of some replays of all calls, in seconds, after one that is not timed."""
    made: dict[Like, torch.Tensor] = {}
    is_like = {"is_leaf": lambda value: isinstance(value, Like)}
    ready = [
        (call.operator, *tree_map(lambda value: with_numbers(value, made), tuple(call[1:]), **is_like))
        for call in calls
    ]
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for operator, arguments, named in ready:
            operator(*arguments, **named)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
