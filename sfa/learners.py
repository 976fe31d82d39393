"""The two networks of Train_webvision.py, and how two processes train one each (README, section 7)."""

import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu import processes
from common.gpu.device import Device
from common.runs import checkpoint
from common.runs.run import Run
from sfa.networks import webvision_network

SCRIPT = Path(__file__).resolve().with_name("Train_webvision.py")


class Learner(NamedTuple):
    """A network with its optimiser and its generators: either process can train it."""

    network: nn.Module
    parallel: nn.Module  # around it, averages gradients over processes
    optimizer: SGD
    images: torch.Generator  # orders, crops and flips; on the CPU
    partners: torch.Generator  # of the mixture; on the device
    draws: np.random.Generator  # centroids and mixture weights

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {name: value for name, value in self._asdict().items() if name != "parallel"}


def make_learner(number: int, args: Namespace, device: Device) -> Learner:
    """Network 0 or 1. Its generators are its own, so the draws do not depend on the process that trains it."""
    network = device.prepare(webvision_network(args.network, args.num_class), args.compile)
    parallel = network
    if args.parallel == "data":
        network = processes.synchronised(network)
        parallel = processes.parallel(network, device.device)
    optimizer = SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, fused=device.on_cuda())
    images, partners, draws = np.random.SeedSequence((args.seed, number)).spawn(3)
    seeds = [int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in (images, partners)]
    return Learner(
        network,
        parallel,
        optimizer,
        torch.Generator().manual_seed(seeds[0]),
        device.generator(seeds[1]),
        np.random.default_rng(draws),
    )


def start_two_processes(args: Namespace, argv: list[str]) -> None:
    """Replace this process by two with a network each, on both cards: the same command under torchrun, with --parallel typed.

    The children cannot tell by themselves: under torchrun the default is data.
    """
    cards = [str(i) for i in (args.gpuid1, args.gpuid2)]
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # what is hidden stays hidden
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        cards = [visible[i] for i in (args.gpuid1, args.gpuid2) if i < len(visible)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    sys.stdout.flush()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(cards)}
    os.execve(sys.executable, [*launcher, str(SCRIPT), *argv, "--parallel", "networks"], environment)


def train_one_each(
    learners: list[Learner], train: Callable[[int], Tensor], run: Run, device: Device
) -> Tensor:
    """Train the learner of this process's number, train(i), and exchange them: the losses of both.

    Afterwards either process has both learners as they are trained, and `run` counts the images of both.
    """
    before = run.images
    with processes.alone():
        losses = train(processes.rank())
    trained = torch.tensor(run.images - before, device=device.device)
    run.images = before + int(processes.total(trained))
    return exchange(learners, losses)


def exchange(learners: list[Learner], losses: Tensor) -> Tensor:
    """Bring both learners up to date in both processes, each of which trained that of its number: the losses of both."""
    losses_of_all = []
    for i, learner in enumerate(learners):
        content = processes.from_first(partial(packed, learner, losses), source=i)
        received = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if processes.rank() != i:
            checkpoint.restore(learner.state(), received["state"])
        losses_of_all.append(received["losses"])
    return torch.cat(losses_of_all)


def packed(learner: Learner, losses: Tensor) -> bytes:
    """A learner and the losses of its last epoch, to be sent to another process."""
    content = io.BytesIO()
    checkpoint.write({"state": checkpoint.collect(learner.state()), "losses": losses}, content)
    return content.getvalue()
