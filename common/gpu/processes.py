"""Training with several processes under torchrun: one process per device, the same result as one process has.

Every process goes through its piece of each global batch. What a method does across a batch (groups, pairs, selections) it
does on the gathered rows, so that each process computes the same loss of the whole batch; DistributedDataParallel then
averages gradients, and batch normalisation takes its statistics from the whole batch. In a single process every
function here hands back what it was given.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.runs.cli import UserError

PATIENCE = timedelta(hours=2)  # a process may have to wait while another looks through a million images
_alone = ContextVar("_alone", default=False)


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return planned() > 1


def planned() -> int:
    """The number of processes that torchrun started, joined or not yet; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def start(device: torch.device) -> None:
    """Join the other processes: NCCL between cards, gloo between CPUs and for what is on the CPU anyway."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the other processes, once all are here."""
    if world() > 1:
        dist.barrier()
        dist.destroy_process_group()


def world() -> int:
    """The number of processes that share the work: 1 inside `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone.get() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside it this process works for itself, on something that no other does: nothing here waits for another.

    `rank` keeps its number. Networks made by `parallel` or `synchronised` outside still wait: it wants plain ones.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank() -> int:
    """This process's number; number 0 writes and prints."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def say(text: str) -> None:
    """Print, from the first process only."""
    if rank() == 0:
        print(text, flush=True)


def wait() -> None:
    """Go on when every process is here."""
    if world() > 1:
        dist.barrier()


def largest(number: int) -> int:
    """The largest of the numbers of all processes. On the CPU: no process waits for its card."""
    if world() == 1:
        return number
    everywhere = torch.tensor(number)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return int(everywhere)


def from_first(make: Callable[[], Any], source: int = 0) -> Any:
    """make() as the first process (or another, `source`) made it, in every process; tensors in it are to be on the CPU.

    A UserError ends them all; the process that made it tells it.
    """
    if world() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == source:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=source)
    if outcome[1] is not None:
        raise outcome[1] if rank() == source else SystemExit(2)
    return outcome[0]


def first_alone(make: Callable[[], Any]) -> Any:
    """make(), in the first process before it is called in the others: for what fetches or writes a file once.

    A UserError of the first ends them all; the first one tells it.
    """
    if world() == 1:
        return make()
    made = []
    from_first(lambda: made.append(make()))
    return made[0] if rank() == 0 else make()


# rows of a batch ------------------------------------------------------------------------------------------------------


def piece(rows: Tensor) -> Tensor:
    """This process's part of a global batch [world B, ...] that every process has: [B, ...]; `gather_rows` undoes it."""
    return rows if world() == 1 else rows.chunk(world())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """The pieces [B, ...] of all processes as one global batch [world B, ...], with the gradient of this process's piece.

    For a loss that every process computes on all rows. DistributedDataParallel divides by the number of processes what
    only one of them contributes, hence the factor on the piece's gradient; what every process has alike it leaves alone.
    """
    if world() == 1:
        return rows
    pieces = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(pieces, rows.detach().contiguous())
    if rows.requires_grad:
        own = rows.view_as(rows)
        own.register_hook(lambda gradient: gradient * world())
        pieces[rank()] = own
    return torch.cat(pieces)


def gather_parts(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all processes, part after part: [world n, ...] of parts [n_i, ...]; `piece_parts` undoes it.

    Gradients are those of `gather_rows`.
    """
    return torch.cat([gather_rows(part) for part in parts])


def piece_parts(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """This process's rows [n, ...] of the rows [world n, ...] of `gather_parts`. sizes: its rows of each part."""
    if world() == 1:
        return rows
    return torch.cat([piece(part) for part in rows.split([world() * size for size in sizes])])


def mean_loss(loss: Tensor) -> Tensor:
    """The mean over processes of a loss of this process's rows, with the gradient of the own one: those are averaged."""
    return loss if world() == 1 else loss + (total(loss) / world() - loss).detach()


def total(values: Tensor) -> Tensor:
    """The sum over processes of a tensor that each has of the same shape; without gradient."""
    if world() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


# networks -------------------------------------------------------------------------------------------------------------


def parallel(network: nn.Module, device: torch.device, unused_parameters: bool = False) -> nn.Module:
    """The network for training steps: itself in one process, else DistributedDataParallel around it.

    unused_parameters: some steps leave some parameters without gradient. State is saved and evaluated from `network`.
    """
    if world() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids, find_unused_parameters=unused_parameters)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over processes of all gradients, where DistributedDataParallel does not fit: several passes for one loss."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Give every process the buffers (running statistics) of the first."""
    if world() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def synchronised(network: nn.Module) -> nn.Module:
    """The network with batch statistics taken over all processes: torch's SyncBatchNorm on cards, ours on CPUs."""
    if world() == 1:
        return network
    if dist.get_backend() == "nccl":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in list(network.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, _CPUSyncBatchNorm.of(child))
        else:
            synchronised(child)
    return network


class _Sum(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return total(gradient)


class _CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes. torch's own SyncBatchNorm refuses tensors on the CPU."""

    # optional in the base class
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> "_CPUSyncBatchNorm":
        """The same layer, sharing parameters and buffers."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        made.weight, made.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            made.register_buffer(name, buffer)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], normalised per channel by the statistics of the global batch; in eval mode by the running ones."""
        if not self.training:
            return super().forward(x)
        dtype, x = (
            x.dtype,
            x.double() if x.dtype == torch.float64 else x.float(),
        )  # sums in bfloat16 lose too much
        count = x.numel() // x.shape[1] * world()
        mean = _Sum.apply(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)
