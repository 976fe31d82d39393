"""Device and precision: chosen once, printed with the reason, and used by every script in the same way."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from common.gpu import processes
from common.runs.cli import UserError

Network = TypeVar("Network", bound=nn.Module)


class Device(NamedTuple):
    """Where a run computes, and how precisely."""

    device: torch.device
    precision: str  # fp32 or bf16
    reason: str

    def on_cuda(self) -> bool:
        """Whether it is a card."""
        return self.device.type == "cuda"

    def autocast(self) -> AbstractContextManager:
        """Mixed precision of the forward passes inside it: bfloat16 where the precision says so, else nothing.

        Without its cache of cast weights: casts of a pass without gradients would serve the training pass after it in the same
        context, which older versions of torch do not notice.
        """
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def prepare(self, network: Network, compiled: bool = False) -> Network:
        """The network on the device, channels-last, its forward compiled in place if asked (names of state unchanged)."""
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            network.compile()
        return network

    def replay(self, network: nn.Module, batch_shape: tuple[int, ...]) -> None:
        """On a card, let training on float32 batches of this shape replay one recorded CUDA graph, forward and backward each.

        A small network's time otherwise goes into starting its kernels one by one. Other batches, evaluation and the CPU
        go on as before. To be called once the network is on the device; weights and statistics stay as they are.
        """
        if not self.on_cuda():
            return
        before = {name: value.clone() for name, value in network.state_dict().items()}
        plain, was_training = network.forward, network.training
        network.train()
        example = torch.zeros(batch_shape, device=self.device).contiguous(memory_format=torch.channels_last)
        with self.autocast():  # it has no cache of casts, which a recorded graph must not hold
            torch.cuda.make_graphed_callables(network, (example,))
        recorded = network.forward

        def forward(images: torch.Tensor) -> torch.Tensor:
            fits = network.training and torch.is_grad_enabled() and images.shape == example.shape
            return (recorded if fits else plain)(images)

        network.forward = forward
        network.load_state_dict(before)  # recording runs the network, which moves running statistics
        network.train(was_training)

    def generator(self, seed: int) -> torch.Generator:
        """A random generator on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def peak_memory_mb(self) -> float | None:
        """Most memory that tensors took on the card so far, in MiB; None on CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 without TF32's rounding to three digits: for scores that samples are ranked by."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def pick(
    device: str = "auto",
    precision: str = "auto",
    index: int = 0,
    *,
    several: bool = False,
    fidelity: str = "paper",
) -> Device:
    """Choose device (auto, cpu, cuda; index: which card) and precision (auto, fp32, bf16), and print both with the reason.

    auto: the card if there is one; bfloat16 autocast on CUDA, with TF32 for what stays float32; float32 on CPU. fp32 on
    CUDA switches TF32 off. fidelity: with released, auto is fp32 everywhere. several: the script can run as several processes
    under torchrun; each takes the card of its local rank, or a CPU, and joins the others. UserError: a card that is not
    there; torchrun where one process is meant.
    """
    if processes.launched():
        if not several:
            raise UserError("this script runs as one process: start it with python, not with torchrun")
        index = int(os.environ["LOCAL_RANK"])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and index >= count:
        raise UserError(
            f"--device cuda: there is no CUDA device {index} (found {count}); use --device cpu or auto"
        )
    on_cuda = device == "cuda" or (device == "auto" and index < count)
    if on_cuda:
        name = torch.cuda.get_device_name(index)
        reason = f"{name}, {'asked for' if device == 'cuda' else 'found'}"
    else:
        reason = "asked for" if device == "cpu" else f"no CUDA device {index} found"
    if precision != "auto":
        chosen, why = precision, "asked for"
    elif fidelity == "released":
        chosen, why = "fp32", "as released"
    else:
        chosen, why = ("bf16", "the default on CUDA") if on_cuda else ("fp32", "the default on CPU")
    if on_cuda:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if chosen == "bf16" else "highest")
        torch.backends.cudnn.allow_tf32 = chosen == "bf16"
    picked = torch.device("cuda", index) if on_cuda else torch.device("cpu")
    reason = f"device {picked} ({reason}), precision {chosen} ({why})"
    if processes.launched():
        processes.start(picked)
        reason += f", {processes.world()} processes"
    processes.say(reason)
    return Device(picked, chosen, reason)
