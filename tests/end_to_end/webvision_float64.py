"""sfa/Train_webvision.py with a small network in float64, where two processes differ from one by the last digits.

In float32 a selection can tip over. Takes a list as JSON, each the fields of `Job`: starts that are processes of their own but
share one import. Prints the exit statuses of each.
"""

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

import numpy as np
import torch
import torch._dynamo  # what an optimiser imports when it is made, for seconds: here once for all
from PIL import Image
from torch import nn

from common.gpu import augment, processes
from common.runs import cli
from common.runs.run import Run
from sfa import Train_webvision, learners
from sfa.networks import TwoHeads
from tests.common.small_file_data import SIZE, image_files, make_webvision


class Job(NamedTuple):
    """One start of the script, by as many processes as torchrun would start."""

    flags: list[str]
    log: str  # what it prints is appended to LOG.out and LOG.err
    moment: str = "0:never"
    processes: int = 1
    slow: bool = False  # checkpoints take the first process half a second: do the others wait?


class MortalRun(Run):
    """A run that gets a signal in one epoch: EPOCH:WHERE or EPOCH:WHERE:SIGNAL, by default SIGKILL.

    WHERE is a pass by the beginning of its name (warm-up of network 1, test, selection, ...), after its first batch; log, after
    the epoch's row is written and before its checkpoint is; or save, after that (0:save: the first checkpoint).
    """

    moment, slow = "0:never", False

    def at(self, epoch: int, where: str) -> None:
        """The signal, if this is its moment."""
        wanted, place, *name = self.moment.split(":")
        if int(wanted) == epoch and where.startswith(place):
            os.kill(os.getpid(), getattr(signal, *(name or ["SIGKILL"])))

    def progress(self, batches: Iterable, description: str, *how: bool, **more: bool) -> Iterator:
        """As ever, but the first batch may be the last."""
        where = description.split(" ", 2)[-1]  # after the epoch and its number
        for number, batch in enumerate(super().progress(batches, description, *how, **more)):
            yield batch
            if number == 0:
                self.at(len(self.rows) + 1, where)

    def log(self, epoch: int, **values: float | int | None) -> None:
        """As ever, but it may be the last."""
        super().log(epoch, **values)
        self.at(epoch, "log")

    def _save(self) -> None:
        if self.slow and processes.rank() == 0:
            time.sleep(0.5)
        super()._save()
        self.at(len(self.rows), "save")


class SmallNetwork(nn.Module):
    """In place of webvision_network: 16 features."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        assert name == "resnet18"
        layers = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
        self.layers, self.heads = nn.Sequential(*layers), TwoHeads(16, num_classes)

    def forward(self, images):
        return self.heads(self.layers(images).mean(dim=(2, 3)))


def make_doubtful_webvision(root: Path, classes: int, per_class: int, test_per_class: int = 2) -> None:
    """make_webvision's with training images whose colours overlap: networks disagree, and selections change with the epochs."""
    make_webvision(root, classes, per_class, test_per_class)
    rng = np.random.default_rng(1)
    for path in image_files(root / "google"):
        colour = np.asarray(Image.open(path)).mean(axis=(0, 1))
        pattern = rng.normal(0, 30, size=3) + rng.normal(0, 60, size=(5, 6, 3))
        coarse = np.clip(128 + (colour - 128) / 2 + pattern, 0, 255).astype(np.uint8)
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)


def run(job: Job) -> None:
    """Be a process that the script runs in."""
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        file = os.open(f"{job.log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream.fileno())
    MortalRun.moment, MortalRun.slow, status = job.moment, job.slow, 1
    try:
        cli.exit_cleanly(Train_webvision.main, job.flags)
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
    """Their exit statuses in the order in which they end; where one fails the others are killed, as by torchrun."""
    left, statuses = set(children), []
    while left:
        child, status = os.wait()
        left.remove(child)
        statuses.append(os.waitstatus_to_exitcode(status))
        if statuses[-1] not in (0, 128 + signal.SIGTERM):
            for other in left:
                os.kill(other, signal.SIGKILL)
    return statuses


if __name__ == "__main__":
    normalise = augment.normalise
    augment.normalise = lambda *arguments: normalise(*arguments).double()
    learners.webvision_network, Train_webvision.Run = SmallNetwork, MortalRun
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # what the heads take out of the autocast
    for fields in json.loads(sys.argv[1]):
        print("status", *ended(started(Job(**fields))), flush=True)
