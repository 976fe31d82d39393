"""Run scripts of manifold_dividemix as `python -m` does, several times, a process of its own each, but with one import for all.

Takes a list of jobs as JSON, each the fields of `Job`; prints the exit status of each, of two processes the larger one.
"""

import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch._dynamo  # what an optimiser imports when it is made, for seconds: here once for all

import common.runs.run
from common.datasets import pools
from common.gpu import augment
from tests.end_to_end import killed
from tests.end_to_end.killed import die


class Job(NamedTuple):
    """One start of a script."""

    script: str
    flags: list[str]
    log: str  # what it prints is appended to LOG.out and LOG.err
    moment: str = "0:never"  # EPOCH:WHERE, where it is killed, see MortalRun
    processes: int = 1
    float64: bool = False  # two processes differ from one by the last digits then, not by the last but three


class MortalRun(killed.MortalRun):
    """A run that ends in one epoch: in a pass by its name, after its first batch; in its log; or 0:start, before it begins."""

    def resume(self, state: dict) -> None:
        """As ever, but for a run that is to end before its first checkpoint."""
        if self.moment == (0, "start"):
            die()
        super().resume(state)

    def progress(self, batches: Iterable, description: str, *how: bool, **more: bool) -> Iterator:
        """As ever, up to the end of the first batch of the moment. The names: warm-up, training, embeddings, test, ..."""
        what = " ".join(description.split()[2:]) or "training"  # after the epoch and its number
        for batch in super().progress(batches, description, *how, **more):
            yield batch
            if self.moment == (len(self.rows) + 1, what):
                die()


common.runs.run.Run = MortalRun
# after the class is replaced, which the scripts import by its name
from manifold_dividemix import (  # noqa: E402
    pretrain,  # noqa: F401
    train_semisup,
    train_semisup_miniimagenet,  # noqa: F401
    training,
)


def in_float64() -> None:
    """Compute in float64 throughout; and of a few images as of many: sides of a split of whole batches, for several processes
    drop the rest; and passes over all samples of several batches, which are dealt out."""
    normalise, divide, batches = augment.normalise, train_semisup.divide, training.Batches
    augment.normalise = lambda *arguments: normalise(*arguments).double()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what is taken out of the autocast, embeddings among them
    train_semisup.divide = lambda *arguments: tuple(side[: len(side) // 8 * 8] for side in divide(*arguments))
    training.Batches = lambda images, size, **more: batches(images, min(size, 10), **more)


def run(job: Job) -> None:
    """Be the process that the script runs in."""
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        file = os.open(f"{job.log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream.fileno())
    if job.float64:
        in_float64()
    epoch, where = job.moment.split(":")
    MortalRun.moment = (int(epoch), where)
    status = 0
    try:
        sys.argv = [job.script, *job.flags]
        sys.modules.pop(f"manifold_dividemix.{job.script}")  # or run_module warns of it
        runpy.run_module(f"manifold_dividemix.{job.script}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def started(job: Job) -> Iterator[int]:
    """Start the processes of a job with what torchrun gives them to know; their ids."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free in a moment
    for rank in range(job.processes):
        child = os.fork()
        if child == 0:
            if job.processes > 1:
                of_torchrun = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": port,
                }
                of_torchrun |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), job.processes)
                os.environ |= {name: str(value) for name, value in of_torchrun.items()}
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            run(job)
        yield child


if __name__ == "__main__":
    made = pools.photographs()
    pools.photographs = lambda: made  # they take as long as the rest of a start
    for fields in json.loads(sys.argv[1]):
        children = list(started(Job(**fields)))
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print("status", max(ends, key=abs), flush=True)
