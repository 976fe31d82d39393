"""Device and precision of a run: chosen once and printed with the reason."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from common.gpu import graphs, passes, processes
from common.runs.cli import UserError

Network = TypeVar("Network", bound=nn.Module)
BF16_SINCE = (8, 0)  # compute capability
SLOW_BF16 = "warning: --precision bf16 is many times slower on a CPU without AVX-512: use --precision fp32"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. MPS does not."""
    return device.type != "mps"


def home(device: torch.device) -> torch.device:
    """Where the draws, the augmentation and the float64 arithmetic of a device are done: there, or on the CPU without float64."""
    return device if has_float64(device) else torch.device("cpu")


def wide(values: Tensor) -> Tensor:
    """Values in float64, at the `home` of their device."""
    return values.to(home(values.device)).double()


def put(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device, float64 as float32 if the device has no float64."""
    if values.dtype == torch.float64 and not has_float64(device):
        values = values.float()
    return values.to(device)


class Device(NamedTuple):
    """Device and precision of a run."""

    device: torch.device
    precision: str  # fp32 or bf16
    reason: str

    def on_cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @contextmanager
    def autocast(self, *networks: nn.Module) -> Iterator[None]:
        """Autocast of the forward passes inside it: to bfloat16 if the precision is bf16, else none.

        networks: the weights of their convolutions are cast once for all passes, see `passes.cast_once`. Autocast's own cache of
        casts is off: older versions of torch would reuse those of a pass without gradients in the training pass after it.
        """
        if self.precision != "bf16":
            yield
            return
        with (
            torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False),
            passes.cast_once(networks),
        ):
            yield

    def prepare(self, network: Network, compiled: bool = False) -> Network:
        """The network on the device, channels-last, its forward compiled in place if asked (names of state unchanged)."""
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            from torch._dynamo import config  # noqa: PLC0415 (seconds to import)

            # Modes, autocast, gradients and batch sizes make variants, of which torch compiles 8 by default. A backward pass
            # through uncompiled forward passes with a compiled one after them fails: it has changed the batch norms.
            config.recompile_limit = 64
            network.compile()
        if not passes.compiled(network.modules()) and not processes.launched():
            _count_on(network, torch.device("cpu"))
        return network

    def replay(self, network: nn.Module, *shapes: tuple[int, ...]) -> None:
        """On a GPU, let training on batches of these shapes replay a recorded CUDA graph: see `graphs.replay`.

        This saves the start of each kernel of a small network. Call it after the network is on the device.
        """
        if self.on_cuda():
            _count_on(network, self.device)  # a replay does nothing on the host
            with self.autocast():  # without its cache of casts, which a recorded graph must not hold
                graphs.replay(network, shapes, self.device)

    def generator(self, seed: int) -> torch.Generator:
        """A random generator at the `home` of the device."""
        return torch.Generator(home(self.device)).manual_seed(seed)

    def permutation(self, rows: int, generator: torch.Generator) -> Tensor:
        """A random order of rows, int64 [rows] on the device; generator: of `generator`."""
        return torch.randperm(rows, generator=generator, device=generator.device).to(self.device)

    def peak_memory_mb(self) -> float | None:
        """Peak memory of tensors on the GPU, in MiB; None without CUDA."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None


def sgd(*arguments: Any, fused: bool, **options: Any) -> SGD:
    """torch's SGD, for networks with parameters that get their first gradient steps after others.

    Fused SGD raises TypeError if some parameters have a momentum buffer and others none (seen with torch 2.15). So each parameter
    gets a buffer of zeros before its first step: its first momentum is its gradient, as in plain SGD.
    """

    def fill(optimizer: Optimizer, *_: Any) -> None:
        fused_groups = (group for group in optimizer.param_groups if group["fused"])
        for parameter in (p for group in fused_groups for p in group["params"]):
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)

    optimizer = SGD(*arguments, fused=fused, **options)
    optimizer.register_step_pre_hook(fill)  # a run resumed from a GPU's checkpoint is fused too
    return optimizer


def _count_on(network: nn.Module, device: torch.device) -> None:
    """Keep the numbers of batches that batch norms have seen on a device: on the CPU, no kernel adds to them."""
    for module in network.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked = module.num_batches_tracked.to(device)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that this process frees, for its next training step.

    By default it hands large pieces back to the system, which maps and clears their pages again in the next step. Does nothing
    with another C library, or if the environment has a variable of glibc's own (MALLOC_...).
    """
    if not any(name.startswith("MALLOC_") for name in os.environ) and sys.platform == "linux":
        if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
            mallopt(M_MMAP_THRESHOLD, 2**30)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 matrix products without TF32, which rounds to three digits: for scores that rank samples."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pick(
    device: str = "auto",
    precision: str = "auto",
    index: int = 0,
    *,
    several: bool = False,
    fidelity: str = "paper",
    fixed_shapes: bool = True,
) -> Device:
    """Choose device (auto, cpu, cuda, mps; index: of the GPU) and precision (auto, fp32, bf16), and print both with the reason.

    On a CPU the process keeps freed memory from now on: see `keep_freed_memory`.

    auto: the CUDA GPU if there is one, never MPS; from compute capability 8.0 on bfloat16 autocast, with TF32 for float32
    products; float32 on all other devices. fp32 on CUDA switches TF32 off. fidelity: with released, auto is fp32 everywhere.
    several: the script supports several processes under torchrun; each uses the GPU of its local rank, or a CPU. fixed_shapes:
    whether batches have the same shape in every step, so that cuDNN may time its algorithms once. UserError: a missing GPU;
    torchrun with a script for one process; MPS with bfloat16 or torchrun.
    """
    if device == "mps":
        return _pick_mps(precision)
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
        keep_freed_memory()
    if precision != "auto":
        chosen, why = precision, "asked for"
    elif fidelity == "released":
        chosen, why = "fp32", "as released"
    else:
        chosen, why = default_precision(index if on_cuda else None)
    if on_cuda:
        torch.cuda.set_device(index)
        torch.backends.cudnn.benchmark = fixed_shapes
        torch.set_float32_matmul_precision("high" if chosen == "bf16" else "highest")
        torch.backends.cudnn.allow_tf32 = chosen == "bf16"
    picked = torch.device("cuda", index) if on_cuda else torch.device("cpu")
    reason = f"device {picked} ({reason}), precision {chosen} ({why})"
    if processes.launched():
        processes.start(picked)
        reason += f", {processes.world()} processes"
    processes.say(reason)
    slow = not on_cuda and chosen == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if slow and processes.rank() == 0:
        print(SLOW_BF16, file=sys.stderr)
    return Device(picked, chosen, reason)


def _pick_mps(precision: str) -> Device:
    if precision == "bf16":
        raise UserError(
            "--precision bf16: --device mps has fp32 alone; use --precision fp32, or --device cpu"
        )
    if not torch.backends.mps.is_available():
        raise UserError("--device mps: this torch has no MPS device; use --device cpu")
    if processes.launched():
        raise UserError("--device mps: runs as one process; start it with python, not with torchrun")
    why = "asked for" if precision == "fp32" else "the default on MPS"
    reason = f"device mps (asked for; never run on an Apple machine, compare with --device cpu), precision fp32 ({why})"
    processes.say(reason)
    return Device(torch.device("mps"), "fp32", reason)


def default_precision(card: int | None) -> tuple[str, str]:
    """The precision of --precision auto on a CUDA device, None for the CPU, and why."""
    if card is None:
        return "fp32", "the default on CPU"
    capability = torch.cuda.get_device_capability(card)
    if capability < BF16_SINCE:
        return "fp32", f"compute capability {capability[0]}.{capability[1]} has no fast bfloat16"
    return "bf16", "the default on CUDA"
