"""Run a script by its command line, and write down where its time goes.

    python -m benchmarks.timed_script times.json sfa/Train_cifar.py --dataset digits --num_epochs 3 --warm_up 1
    python -m benchmarks.timed_script --plain times.json sfa/Train_cifar.py --dataset digits ...

The script runs as it is, in this process. Timed are the borders that all scripts have in common: epochs and passes
(common.runs.run.Run), the views of a batch (common.gpu.loader.Batches), the forward passes of the networks prepared for a
device (common.gpu.device.Device), Tensor.backward and the steps of optimisers. On a card every border is an event of its stream,
and the events are read when the epoch is over and the card has been waited for: nothing waits because it is timed.

--plain: the usual way instead of ours. The views are made by PIL and torchvision, image by image, in the workers of a
DataLoader; networks keep PyTorch's own memory format, and on a card convolutions its own TF32. Data in memory alone.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from common.gpu.device import Device
from common.gpu.loader import Batches
from common.runs import cli
from common.runs.files import write_atomic
from common.runs.run import Run, peak_resident_mb

PARTS = ("augment", "forward", "backward", "optimiser")
WAITING = "waiting for a turn"  # what is printed before a line is read from standard input
LEAST_STEPS = 2  # of a pass that is cut short: the first is not like the others, since it starts the workers

Mark = Any  # a moment: seconds on the CPU, an event on a card


def now(device: torch.device) -> Mark:
    """The moment at which everything asked for so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Mark, end: Mark) -> float:
    """Seconds from one moment to another; events must have happened."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class Step(NamedTuple):
    """A training step: from asking for its batch to asking for the next one."""

    images: int
    whole: bool  # no batch of it was smaller than it is to be
    start: Mark
    end: Mark
    parts: list[tuple[str, Mark, Mark]]


class Pass(NamedTuple):
    """A pass over images."""

    kind: str  # training, selection or evaluation
    warm_up: bool
    length: int  # its steps, were it not cut short
    start: Mark
    end: Mark
    steps: list[Step]  # of training


class Recorder:
    """What a script does and when; the methods stand in the place of those that they are given."""

    def __init__(self, pass_seconds: float | None, turns: bool, count_flops: bool):
        """pass_seconds: end a training pass after that time. turns: wait for a line of standard input before each epoch."""
        self.pass_seconds, self.turns, self.count_flops = pass_seconds, turns, count_flops
        self.device: Device | None = None
        self.networks: list[nn.Module] = []
        self.epochs: list[dict] = []  # those that are over
        self.flops: dict[str, int] | None = None  # of one training step of the main phase
        self.batch_size: int | None = None  # of the main phase
        self.passes: list[Pass] | None = None  # of the epoch that is going on
        self.inside = False  # a pass
        self.parts: list[tuple[str, Mark, Mark]] | None = None  # of the step that is going on
        self.whole = True  # its batches, so far
        self.forward_started: Mark = None
        self.optimiser_started: Mark = None

    def now(self) -> Mark:
        """This moment, on the device that the script trains on."""
        return now(self.device.device)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside is a part of the training step that is going on, if one is."""
        start = self.now() if self.parts is not None else None
        yield
        if start is not None and self.parts is not None:
            self.parts.append((name, start, self.now()))

    def watch_epochs(self, original: Callable, run: Run, last: int | None) -> Iterator[int]:
        """Run.epochs: an epoch is what the script does in it; the checkpoint after it is no part of that."""
        self.device = run.device
        for network in self.networks:
            network.register_forward_pre_hook(self.begin_forward)
            network.register_forward_hook(self.end_forward)
        for epoch in original(run, last):
            if self.turns:
                wait_for_turn()
            self.passes, start = [], self.now()
            yield epoch
            end = self.now()
            if self.device.on_cuda():
                torch.cuda.synchronize(self.device.device)
            self.epochs.append(epoch_record(start, end, self.passes))
            self.passes = None

    def watch_pass(
        self,
        original: Callable,
        run: Run,
        batches: Iterable,
        description: str,
        training: bool = True,
        whole: bool = False,
    ) -> Iterator:
        """Run.progress: its batches, each of them a step where it trains."""
        source = iter(original(run, batches, description, training, whole))
        if self.passes is None:  # before the first epoch, or after the last one
            yield from source
            return
        main = training and "warm-up" not in description
        self.batch_size = batches.batch_size if main else self.batch_size
        self.inside, start, began, steps = True, self.now(), time.perf_counter(), []
        while not training or self.goes_on(began, len(steps)):
            self.parts, self.whole, asked = [] if training else None, True, self.now()
            batch = next(source, None)
            if batch is None:
                break
            with self.counting_flops(len(batch[1])) if main and not steps else nullcontext():
                yield batch
            if training:
                steps.append(Step(len(batch[1]), self.whole, asked, self.now(), self.parts))
        self.inside, self.parts = False, None
        kind = kind_of_pass(description, training)
        found = Pass(kind, training and not main, len(batches), start, self.now(), steps)
        self.passes.append(found)

    def goes_on(self, began: float, steps: int) -> bool:
        """Whether a training pass that began then takes another step."""
        cut = self.pass_seconds is not None and time.perf_counter() - began > self.pass_seconds
        return not cut or steps < LEAST_STEPS

    @contextmanager
    def counting_flops(self, images: int) -> Iterator[None]:
        """Count what one step computes, once, if that is asked for: the first step of a pass, whose time is not to count."""
        if not self.count_flops or self.flops is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        if self.whole:  # or the next pass's first step will do
            self.flops = {"flops": counter.get_total_flops(), "images": images}

    def watch_batches(self, original: Callable, batches: Batches) -> Iterator:
        """Batches.__iter__: how long the views of a batch take, or are waited for.

        Batches that a script goes through without Run.progress are a pass that evaluates, as the baseline's are.
        """
        source = iter(original(batches))
        if self.passes is not None and not self.inside:
            start = self.now()
            yield from source
            self.passes.append(Pass("evaluation", False, len(batches), start, self.now(), []))
            return
        while True:
            with self.part("augment"):
                batch = next(source, None)
            if batch is None:
                return
            self.whole &= len(batch[1]) == batches.batch_size
            yield batch

    def prepare(self, original: Callable, device: Device, network: nn.Module, *given) -> nn.Module:
        """Device.prepare: the networks whose forward passes are timed."""
        self.networks.append(original(device, network, *given))
        return self.networks[-1]

    def backward(self, original: Callable, loss: Tensor, *given, **named) -> None:
        """Tensor.backward."""
        with self.part("backward"):
            original(loss, *given, **named)

    def begin_forward(self, *_) -> None:
        """A network is called."""
        self.forward_started = self.now() if self.parts is not None else None

    def end_forward(self, *_) -> None:
        """It has answered."""
        if self.parts is not None:
            self.parts.append(("forward", self.forward_started, self.now()))

    def begin_optimiser(self, *_) -> None:
        """An optimiser begins its step."""
        self.optimiser_started = self.now() if self.parts is not None else None

    def end_optimiser(self, *_) -> None:
        """And ends it."""
        if self.parts is not None:
            self.parts.append(("optimiser", self.optimiser_started, self.now()))


def wait_for_turn() -> None:
    """Say that it is another process's turn, and wait until it is ours again."""
    print(WAITING, flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody is there to give the next turn")


def kind_of_pass(description: str, training: bool) -> str:
    """What a pass is for, by what the script calls it."""
    if training:
        return "training"
    return "evaluation" if description.endswith(("test", "validation")) else "selection"


# what is written down -------------------------------------------------------------------------------------------------


def epoch_record(start: Mark, end: Mark, passes: list[Pass]) -> dict:
    """An epoch in seconds.

    selection: from the beginning of each selection pass to that of the next pass, so that what is fitted to its results counts.
    """
    later = [*(found.start for found in passes[1:]), end]
    selection = [
        between(found.start, following)
        for found, following in zip(passes, later, strict=True)
        if found.kind == "selection"
    ]
    return {
        "seconds": between(start, end),
        "selection": sum(selection),
        "evaluation": sum(between(p.start, p.end) for p in passes if p.kind == "evaluation"),
        "warm_up": any(found.warm_up for found in passes),
        "training": [pass_record(found) for found in passes if found.kind == "training"],
    }


def pass_record(found: Pass) -> dict:
    """A training pass in seconds, with its steps."""
    return {
        "seconds": between(found.start, found.end),
        "length": found.length,
        "steps": [step_record(step) for step in found.steps],
    }


def step_record(step: Step) -> dict:
    """A step in seconds, with its parts."""
    parts = dict.fromkeys(PARTS, 0.0)
    for name, start, end in step.parts:
        parts[name] += between(start, end)
    return {"images": step.images, "whole": step.whole, "seconds": between(step.start, step.end), **parts}


def report(recorder: Recorder) -> dict:
    """All that is known when the script has come to its end; memory in MiB: of tensors on a card, else of the process."""
    device = recorder.device
    return {
        "precision": device.precision,
        "batch_size": recorder.batch_size,
        "peak_memory_mb": device.peak_memory_mb() or most_memory_mb(),
        "flops": recorder.flops,
        "epochs": recorder.epochs,
    }


def most_memory_mb() -> float:
    """The most memory that this process has had so far, in MiB; without its workers."""
    status = Path("/proc/self/status")
    if status.exists():  # the other way would begin with what the process had that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return peak_resident_mb()


# the plain path -------------------------------------------------------------------------------------------------------


def plain_batches(batches: Batches, workers: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """What Batches.__iter__ yields, with the views made by PIL, one by one, in worker processes."""
    if not len(batches):
        return
    if not hasattr(batches, "plain_loader"):  # its workers stay from pass to pass
        batches.plain_loader = plain_loader(batches, workers)
    device = batches.images.device
    for *views, index in batches.plain_loader:
        yield tuple(view.to(device, non_blocking=True) for view in views), index.to(device)


def plain_loader(batches: Batches, workers: int) -> DataLoader:
    """The DataLoader that takes the place of batches of colour images in memory."""
    # seconds to import, and memory, of use on this path alone
    from benchmarks.speed_inputs import PilViews, views_by_pil  # noqa: PLC0415

    images, size = batches.images, batches.images.pixels.shape[2]
    views = PilViews(
        images.pixels.permute(0, 2, 3, 1).cpu().numpy(),
        views_by_pil(batches.augmentation, batches.views, size),
        images.mean.tolist(),
        images.std.tolist(),
        batches.subset.tolist(),
    )
    return DataLoader(
        views,
        batches.batch_size,
        shuffle=batches.shuffle,
        drop_last=batches.drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=images.device.type == "cuda",
    )


def plain_prepare(device: Device, network: nn.Module, compiled: bool = False) -> nn.Module:
    """The network on the device, and nothing else done to it."""
    if compiled:
        raise ValueError("the plain path does not compile: leave --compile out")
    if device.on_cuda():
        torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it where nobody changes it
    return network.to(device.device)


# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def instrumented(recorder: Recorder, plain: bool, workers: int) -> Iterator[None]:
    """The recorder stands between scripts that run inside and what they share. workers: of each loader of the plain path."""
    iterate, prepare = Batches.__iter__, Device.prepare
    if plain:
        iterate, prepare = partial(plain_batches, workers=workers), plain_prepare
    with ExitStack() as undone:
        for owner, name, method, original in (
            (Batches, "__iter__", recorder.watch_batches, iterate),
            (Device, "prepare", recorder.prepare, prepare),
            (Run, "epochs", recorder.watch_epochs, Run.epochs),
            (Run, "progress", recorder.watch_pass, Run.progress),
            (Tensor, "backward", recorder.backward, Tensor.backward),
        ):
            undone.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, partialmethod(in_place_of, method, original))
        undone.callback(register_optimizer_step_pre_hook(recorder.begin_optimiser).remove)
        undone.callback(register_optimizer_step_post_hook(recorder.end_optimiser).remove)
        yield


def in_place_of(owner: Any, method: Callable, original: Callable, *given, **named) -> Any:
    """What owner.name(...) comes to: the recorder's method, which is given the original."""
    return method(original, owner, *given, **named)


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.timed_script", description=__doc__)
    parser.add_argument(
        "--plain", action="store_true", help="views by PIL in workers, and PyTorch's own formats"
    )
    parser.add_argument(
        "--workers", type=cli.count_or_zero, default=2, metavar="N", help="those of --plain, for each loader"
    )
    parser.add_argument(
        "--pass_seconds",
        type=cli.positive,
        metavar="S",
        help=f"end a training pass after that time, but not before its step {LEAST_STEPS}",
    )
    parser.add_argument(
        "--turns",
        action="store_true",
        help=f"print {WAITING!r} and wait for a line of standard input before each epoch",
    )
    parser.add_argument(
        "--count_flops", action="store_true", help="count the operations of one step, which is not timed"
    )
    parser.add_argument("out", metavar="OUT.json", help="what is written when the script has ended")
    parser.add_argument("script", help="to run")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    return parser


def main(argv=None) -> None:
    """Run the script, and write its times."""
    args = make_parser().parse_args(argv)
    recorder = Recorder(args.pass_seconds, args.turns, args.count_flops)
    sys.argv = [args.script, *args.flags]
    with instrumented(recorder, args.plain, args.workers):
        runpy.run_path(args.script, run_name="__main__")
    write_atomic(Path(args.out), json.dumps(report(recorder)).encode())


if __name__ == "__main__":
    cli.exit_cleanly(main)
