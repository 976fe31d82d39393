"""The network's own operators of a training step, replayed alone: what no code around them can save.

Recorded are convolutions, matrix products and batch normalisations, forward and backward, with shapes, strides and types of
their tensors. The replay runs the same operators in the same order on random numbers. What it leaves out of a step is the
rest: views, activations, losses, the optimiser, Python.

`python -m benchmarks.speed operators` measures the steps of all methods on random images, in seconds of the processor, which
other work on the machine disturbs least; `benchmarks.speed steps` those of whole runs.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from common.gpu.device import Device, keep_freed_memory
from common.runs import cli
from common.runs.cli import UserError

OWN = ("convolution", "mm", "addmm", "bmm", "batch_norm")  # and what backward makes of them


class Like(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Call(NamedTuple):
    """An operator and its arguments, with a `Like` for each tensor."""

    operator: Any  # of torch, with its schema
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
def replay_seconds(
    calls: list[Call], repeats: int = 3, now: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest of some replays of all calls, in seconds of the clock `now`, after one that is not timed."""
    made: dict[Like, torch.Tensor] = {}
    is_like = {"is_leaf": lambda value: isinstance(value, Like)}
    ready = [
        (call.operator, *tree_map(lambda value: with_numbers(value, made), tuple(call[1:]), **is_like))
        for call in calls
    ]
    seconds = []
    for _ in range(1 + repeats):
        start = now()
        for operator, arguments, named in ready:
            operator(*arguments, **named)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(now() - start)
    return min(seconds[1:])


def add_operator_flags(parser: cli.Parser) -> None:
    """The flags of this measurement."""
    count: dict[str, Any] = {"type": cli.count, "metavar": "N"}
    parser.add_argument("--methods", nargs="+", metavar="STEP", help="these only, by the names of the table")
    parser.add_argument(
        "--size", **count, default=32, help="pixels of both sides; networks are narrow below 16"
    )
    parser.add_argument("--batch", **count, default=32, help="images of a batch")
    parser.add_argument("--passes", **count, default=5, help="the fastest counts")


def operators(args: Namespace) -> Iterator[dict]:
    """The step of each method, with its views, and its own operators, on one thread of a CPU: rows of the CSV.

    Milliseconds of the processor: the shortest of args.passes. Of a pass's two steps the second counts.
    UserError: an unknown step.
    """
    from benchmarks.speed_inputs import surroundings  # noqa: PLC0415 (seconds to import)
    from tests.card_steps import STEPS, Bench  # noqa: PLC0415 (a clone has them, an installed copy does not)

    if unknown := {*(args.methods or [])} - {*STEPS}:
        raise UserError(f"--methods {min(unknown)}: unknown, choose from {', '.join(STEPS)}")
    torch.set_num_threads(1)
    keep_freed_memory()
    device, now = Device(torch.device("cpu"), "fp32", "one thread"), time.process_time
    for name in args.methods or STEPS:
        bench = (device, args.size, 1 if args.size < 16 else 3, args.batch)
        steps, marks, recorded = [], [], Operators()
        for _ in range(args.passes):
            marks.clear()
            STEPS[name](Bench(*bench, lambda marks=marks: marks.append(now())))  # type: ignore[misc]
            steps.append(marks[1] - marks[0])
        switches = iter([recorded.__enter__, partial(recorded.__exit__, None, None, None)])
        STEPS[name](Bench(*bench, lambda switches=switches: next(switches)()))  # type: ignore[misc]
        convolutions = [call for call in recorded.calls if "convolution" in call.operator._schema.name]
        parts = [replay_seconds(calls, args.passes, now) for calls in (recorded.calls, convolutions)]
        row = {"step": name, "network": "narrow" if args.size < 16 else "ResNet-18", "image_size": args.size}
        row |= {"batch_size": args.batch, "passes": args.passes, "step_ms": round(1000 * min(steps), 2)}
        for part, seconds in zip(("operators", "convolutions"), parts, strict=True):
            row |= {f"{part}_ms": round(1000 * seconds, 2), f"{part}_share": round(seconds / min(steps), 3)}
        yield row | surroundings(device.device)


def operator_line(row: dict) -> str:
    """A row as it is printed."""
    shares = ", ".join(f"{part} {100 * row[f'{part}_share']:.0f} %" for part in ("operators", "convolutions"))
    return f"{row['step']:28} {row['step_ms']:9.2f} ms of the processor, {shares}"
