"""Run a script by its command line, and record where its time goes.

    python -m benchmarks.timed_script times.json sfa/Train_cifar.py --dataset digits --num_epochs 3 --warm_up 1
    python -m benchmarks.timed_script --plain times.json sfa/Train_cifar.py --dataset digits ...

The script runs unchanged in this process. Timed is what all scripts share: epochs and passes (common.runs.run.Run), the views
of a batch (common.gpu.loader.Batches), the forward passes of the networks prepared for a device (common.gpu.device.Device),
Tensor.backward and the steps of optimisers. On a GPU each moment is an event of its stream. The events are read after the
epoch, so nothing waits because it is timed.

--plain: the usual way instead of ours. PIL and torchvision make the views, image by image, in the workers of a DataLoader;
networks keep PyTorch's memory format, and convolutions on a GPU its TF32. For data in memory only.
"""

import argparse
import json
import math
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.operators import Operators, replay_seconds
from common.gpu.device import Device
from common.gpu.loader import Batches
from common.runs import cli
from common.runs.files import write_atomic
from common.runs.run import Run, peak_resident_mb

PARTS = ("augment", "forward", "backward", "optimiser")
WAITING = "waiting for a turn"  # printed before a line is read from standard input
LEAST_STEPS = 2  # of a pass that is cut short: the first starts the workers and is unlike the others

Mark = Any  # a moment: seconds on the CPU, an event on a GPU


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
    whole: bool  # no batch of it was smaller than the batch size
    start: Mark
    end: Mark
    parts: list[tuple[str, Mark, Mark]]  # name, start, end


class Pass(NamedTuple):
    """A pass over images."""

    kind: str  # training, selection or evaluation
    warm_up: bool
    length: int  # its steps if it were not cut short
    start: Mark
    end: Mark
    steps: list[Step]  # of training


def step_record(step: Step) -> dict:
    """A step in seconds, with its parts."""
    parts = dict.fromkeys(PARTS, 0.0)
    for name, start, end in step.parts:
        parts[name] += between(start, end)
    seconds = between(step.start, step.end)
    return {"images": step.images, "whole": step.whole, "seconds": seconds, **parts}


def epoch_record(start: Mark, end: Mark, passes: list[Pass]) -> dict:
    """An epoch in seconds. selection: from the start of each selection pass to that of the next pass, its fits included."""
    later = [*(one.start for one in passes[1:]), end]
    selections = [(one, after) for one, after in zip(passes, later, strict=True) if one.kind == "selection"]
    training = [
        {
            "seconds": between(one.start, one.end),
            "length": one.length,
            "steps": list(map(step_record, one.steps)),
        }
        for one in passes
        if one.kind == "training"
    ]
    return {
        "seconds": between(start, end),
        "selection": sum(between(one.start, after) for one, after in selections),
        "evaluation": sum(between(one.start, one.end) for one in passes if one.kind == "evaluation"),
        "warm_up": any(one.warm_up for one in passes),
        "training": training,
    }


class Recorder:
    """What a script does and when. Its methods replace those of the shared classes, which they call."""

    def __init__(self, pass_seconds: float | None, turns: bool, count_flops: bool):
        """pass_seconds: end a training pass after that time. turns: wait for a line of standard input before each epoch."""
        self.pass_seconds, self.turns, self.count_flops = pass_seconds, turns, count_flops
        self.device: Device | None = None
        self.networks: list[nn.Module] = []
        self.epochs: list[dict] = []  # those that are over
        self.flops: dict[str, int] | None = None  # of one training step of the main phase
        self.operators = Operators()  # of that step
        self.replays: list[float] = []  # of these operators, after each epoch
        self.batch_size: int | None = None  # of the main phase
        self.passes: list[Pass] | None = None  # of the current epoch
        self.inside = False  # a pass
        self.parts: list[tuple[str, Mark, Mark]] | None = None  # of the current training step
        self.started: dict[str, Mark] = {}  # parts of it that have begun, by name
        self.whole = True  # its batches, so far

    def now(self) -> Mark:
        """This moment, on the device that the script trains on."""
        return now(self.device.device)

    def begin(self, name: str, *_) -> None:
        """A part of the training step begins, if a step is under way."""
        self.started[name] = self.now() if self.parts is not None else None

    def end(self, name: str, *_) -> None:
        """The part ends."""
        if self.parts is not None and self.started.get(name) is not None:
            self.parts.append((name, self.started[name], self.now()))

    def watch_epochs(self, original: Callable, run: Run, last: int | None) -> Iterator[int]:
        """Run.epochs: an epoch is what the script does in it, without the checkpoint after it."""
        self.device = run.device
        for network in self.networks:
            network.register_forward_pre_hook(partial(self.begin, "forward"))
            network.register_forward_hook(partial(self.end, "forward"))
        for epoch in original(run, last):
            if self.turns:
                wait_for_turn()
            self.passes, start = [], self.now()
            yield epoch
            end = self.now()
            if self.device.on_cuda():
                torch.cuda.synchronize(self.device.device)
            self.epochs.append(epoch_record(start, end, self.passes))
            if self.flops is not None:
                self.replays.append(replay_seconds(self.operators.calls))
            self.passes = None

    def watch_pass(
        self,
        original: Callable,
        run: Run,
        batches: Batches,
        description: str,
        training: bool = True,
        whole: bool = False,
    ) -> Iterator:
        """Run.progress: its batches, each of them a step if the pass trains."""
        source = iter(original(run, batches, description, training, whole))
        if self.passes is None:  # before the first epoch, or after the last one
            yield from source
            return
        main = training and "warm-up" not in description
        self.batch_size = batches.batch_size if main else self.batch_size
        self.inside, start, steps = True, self.now(), []
        last = time.perf_counter() + (self.pass_seconds or math.inf)
        while not training or len(steps) < LEAST_STEPS or time.perf_counter() <= last:
            self.parts, self.whole, asked = [] if training else None, True, self.now()
            batch = next(source, None)
            if batch is None:
                break
            with self.counting_flops(len(batch[1])) if main and not steps else nullcontext():
                yield batch
            if training:
                steps.append(Step(len(batch[1]), self.whole, asked, self.now(), self.parts))
        self.inside, self.parts = False, None
        tests = description.endswith(("test", "validation"))
        kind = "training" if training else "evaluation" if tests else "selection"
        self.passes.append(Pass(kind, training and not main, len(batches), start, self.now(), steps))

    @contextmanager
    def counting_flops(self, images: int) -> Iterator[None]:
        """Count the operations of one step, once, if asked for: of the first step of a pass, which is not timed."""
        if not self.count_flops or self.flops is not None:
            yield
            return
        self.operators.calls.clear()
        with self.operators, FlopCounterMode(display=False) as counter:
            yield
        if self.whole:  # else the first step of the next pass
            self.flops = {"flops": counter.get_total_flops(), "images": images}

    def watch_batches(self, original: Callable, batches: Batches) -> Iterator:
        """Batches.__iter__: how long the views of a batch take, or are waited for.

        A script that iterates without Run.progress, as the baseline does, makes a pass of evaluation.
        """
        source = iter(original(batches))
        if self.passes is not None and not self.inside:
            start = self.now()
            yield from source
            self.passes.append(Pass("evaluation", False, len(batches), start, self.now(), []))
            return
        while True:
            self.begin("augment")
            batch = next(source, None)
            self.end("augment")
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
        self.begin("backward")
        original(loss, *given, **named)
        self.end("backward")

    def report(self) -> dict:
        """Everything recorded, at the end of the script. Memory in MiB: of tensors on a GPU, else of the process."""
        return {
            "precision": self.device.precision,
            "batch_size": self.batch_size,
            "peak_memory_mb": self.device.peak_memory_mb() or most_memory_mb(),
            "flops": self.flops,
            "operators_seconds": min(self.replays, default=None),
            "epochs": self.epochs,
        }


def wait_for_turn() -> None:
    """Announce another process's turn, and wait for the next line of standard input."""
    print(WAITING, flush=True)
    if not sys.stdin.readline():
        sys.exit("no process is there to give the next turn")


def most_memory_mb() -> float:
    """The most memory that this process has had so far, in MiB; without its workers."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts with the memory of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return peak_resident_mb()


# the plain path -------------------------------------------------------------------------------------------------------


def plain_batches(batches: Batches, workers: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """What Batches.__iter__ yields, with the views made by PIL, one by one, in worker processes."""
    if not len(batches):
        return
    attributes = vars(batches)
    if "plain_loader" not in attributes:  # its workers stay from pass to pass
        attributes["plain_loader"] = plain_loader(batches, workers)
    device = batches.images.device
    for *views, index in attributes["plain_loader"]:
        yield tuple(view.to(device, non_blocking=True) for view in views), index.to(device)


def plain_loader(batches: Batches, workers: int) -> DataLoader:
    """The DataLoader in place of batches of colour images in memory."""
    # seconds to import, and memory, which only this path needs
    from benchmarks.speed_inputs import PilViews, pil_loader, views_by_pil  # noqa: PLC0415

    images, size = batches.images, batches.images.pixels.shape[2]
    pixels = images.pixels.permute(0, 2, 3, 1).cpu().numpy()
    pipelines = views_by_pil(batches.augmentation, batches.views, size)
    views = PilViews(pixels, pipelines, images.mean.tolist(), images.std.tolist(), batches.subset.tolist())
    options = {"shuffle": batches.shuffle, "drop_last": batches.drop_last}
    return pil_loader(views, batches.batch_size, workers, images.device, **options)


def plain_prepare(device: Device, network: nn.Module, compiled: bool = False) -> nn.Module:
    """The network on the device, otherwise unchanged."""
    if compiled:
        raise ValueError("the plain path does not compile: leave --compile out")
    if device.on_cuda():
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    return network.to(device.device)


# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def instrumented(recorder: Recorder, plain: bool, workers: int) -> Iterator[None]:
    """Scripts that run inside are recorded. workers: of each loader of the plain path."""
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
            # a function, unlike a partial, becomes a method
            def watched(*given, method=method, original=original, **named):
                return method(original, *given, **named)

            undone.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, watched)
        before, after = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
        undone.callback(before(partial(recorder.begin, "optimiser")).remove)
        undone.callback(after(partial(recorder.end, "optimiser")).remove)
        yield


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.timed_script", description=__doc__)
    add = parser.add_argument
    cut = f"end a training pass after that time, but not before its step {LEAST_STEPS}"
    turns = f"print {WAITING!r} and wait for a line of standard input before each epoch"
    workers: dict[str, Any] = {"type": cli.count_or_zero, "default": 2, "metavar": "N"}
    add("--plain", action="store_true", help="views by PIL in workers, and PyTorch's own formats")
    add("--workers", **workers, help="those of --plain, for each loader")
    add("--pass_seconds", type=cli.positive, metavar="S", help=cut)
    add("--turns", action="store_true", help=turns)
    add("--count_flops", action="store_true", help="count the operations of one step, which is not timed")
    add("out", metavar="OUT.json", help="the file to write when the script has ended")
    add("script", help="to run")
    add("flags", nargs=argparse.REMAINDER, help="of the script")
    return parser


def main(argv=None) -> None:
    """Run the script, and write its times."""
    args = make_parser().parse_args(argv)
    recorder = Recorder(args.pass_seconds, args.turns, args.count_flops)
    sys.argv = [args.script, *args.flags]
    with instrumented(recorder, args.plain, args.workers):
        runpy.run_path(args.script, run_name="__main__")
    write_atomic(Path(args.out), json.dumps(recorder.report()).encode())


if __name__ == "__main__":
    cli.exit_cleanly(main)
