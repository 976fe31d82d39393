"""Run scripts several times as they run by path, a process of its own each (or two), but with one import for all.

What they import at their first use, which takes seconds, is imported once too.

Takes a list of jobs as JSON, each the fields of `Job`; prints the exit statuses of each.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from common.datasets import pools
from common.gpu import augment, processes
from common.runs import cli
from common.runs.run import Run
from manifold_dividemix import train_semisup, training
from tests.end_to_end.small_networks import SMALL

AT_FIRST_USE = """torch._dynamo torch.nn.parallel torch.utils.tensorboard torchvision.io torchvision.models
torchvision.transforms.v2 sklearn.datasets sklearn.metrics sklearn.mixture"""
ROOT = Path(__file__).resolve().parents[2]


class Job(NamedTuple):
    """One start of a script."""

    script: str  # its module
    flags: list[str]
    log: str  # what it prints is appended to LOG.out and LOG.err
    moment: str = ""  # where it gets a signal, see MortalRun
    processes: int = 1  # as many as torchrun would start
    # with the small network for photographs, and in float64: there two processes differ from one by the last digits; in
    # float32 the gradients of a ResNet on smooth images agree to one to three digits, and a selection can tip over
    float64: bool = False
    slow: bool = False  # checkpoints take the first process half a second: do the others wait?


class MortalRun(Run):
    """A run that gets a signal in one epoch: EPOCH:WHERE or EPOCH:WHERE:SIGNAL, by default SIGKILL.

    WHERE is start (before the first checkpoint); a pass, by the beginning or the end of its name (warm-up, selection, ...;
    training is any pass that trains), after its first batch; log, after the epoch's row is written and before its checkpoint
    is; or save, after that (0:save: the first checkpoint).
    """

    moment, slow = "", False

    def at(self, epoch: int, *places: str) -> None:
        """The signal, if this is its moment."""
        wanted, _, rest = self.moment.partition(":")
        place, _, name = rest.partition(":")
        if wanted == str(epoch) and any(own.startswith(place) or own.endswith(place) for own in places):
            os.kill(os.getpid(), getattr(signal, name or "SIGKILL"))

    def resume(self, state: dict) -> None:
        self.at(0, "start")
        super().resume(state)

    def progress(
        self, batches: Iterable, description: str, training: bool = True, whole: bool = False
    ) -> Iterator:
        name = description.split(" ", 2)[-1]  # after the epoch and its number
        for number, batch in enumerate(super().progress(batches, description, training, whole)):
            yield batch
            if number == 0:
                self.at(len(self.rows) + 1, name, *(["training"] if training else []))

    def log(self, epoch: int, **values: float | int | None) -> None:
        super().log(epoch, **values)
        self.at(epoch, "log")

    def _save(self) -> None:
        if self.slow and processes.rank() == 0:
            time.sleep(0.5)
        super()._save()
        self.at(len(self.rows), "save")


def in_float64(script: str) -> None:
    """Compute in float64 throughout, with small networks for photographs."""
    scaled = augment.scaled
    augment.scaled = lambda *arguments: scaled(*arguments).double()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what is taken out of the autocast: scores, losses, embeddings
    if script in SMALL:
        setattr(*SMALL[script])
    if script.startswith("manifold_dividemix"):
        # of a few images as of many: sides of a split of whole batches, for several processes drop the rest; and passes over
        # all samples of several batches, which are dealt out
        divide, batches = train_semisup.divide, training.Batches
        train_semisup.divide = lambda *args: tuple(side[: len(side) // 8 * 8] for side in divide(*args))
        training.Batches = lambda images, size, **more: batches(images, min(size, 10), **more)


def run(job: Job) -> None:
    """Be a process that the script runs in."""
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        file = os.open(f"{job.log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream.fileno())
    script, status = importlib.import_module(job.script), 1
    sys.argv = [str(ROOT / f"{job.script.replace('.', '/')}.py"), *job.flags]
    sys.modules["__main__"].__spec__ = None  # as of a script run by its path
    MortalRun.moment, MortalRun.slow = job.moment, job.slow
    sys.modules[getattr(script, "start", script.main).__module__].Run = MortalRun
    try:
        if job.float64:
            in_float64(job.script)
        cli.exit_cleanly(script.main, job.flags)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def started(job: Job) -> list[int]:
    """Start the processes of a job with what torchrun gives them to know; their ids."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free in a moment
    children = []
    for rank in range(job.processes):
        children.append(os.fork())
        if children[-1] == 0:
            if job.processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
                names |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), job.processes)
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            run(job)
    return children


def ended(children: list[int]) -> list[int]:
    """Their exit statuses in the order in which they end; where one dies the others are killed, as by torchrun."""
    left, statuses = set(children), []
    while left:
        child, status = os.wait()
        left.remove(child)
        statuses.append(os.waitstatus_to_exitcode(status))
        if statuses[-1] not in (0, 2, 128 + signal.SIGTERM):
            for other in left:
                os.kill(other, signal.SIGKILL)
    return statuses


if __name__ == "__main__":
    jobs = [Job(**fields) for fields in json.loads(sys.argv[1])]
    for name in {*AT_FIRST_USE.split(), *(job.script for job in jobs)}:
        importlib.import_module(name)
    if any(job.script.startswith("manifold_dividemix") and "digits" in job.flags for job in jobs):
        made = pools.photographs()
        pools.photographs = lambda: made  # they take as long as the rest of a start
    for job in jobs:
        print("status", *ended(started(job)), flush=True)
