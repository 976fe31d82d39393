"""Recorded CUDA graphs of a network's training step, checked against the eager step before they are trusted."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from common.gpu import processes

CHECKED = 20  # steps that are also made eagerly
TOLERANCE = 0.02  # largest difference of outputs and gradients, relative to their largest value


def unrecorded(network: nn.Module) -> list[nn.Module]:
    """The network, or nothing if it replays a recording, which has its own casts of weights."""
    return [] if "forward" in vars(network) else [network]


def replay(network: nn.Module, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
    """Let training on float32 batches of these shapes, one per argument, replay a recorded forward and backward pass.

    For one pass with gradients per step: a second would overwrite what the first keeps for its backward pass. Other batches,
    passes without gradients and evaluation do not change. The network returns a tensor, or a tuple of tensors and None. The
    first CHECKED steps are also made eagerly from the same state. If an output or a gradient differs by more than TOLERANCE, or
    recording fails, the graph is dropped with a warning. A gradient is compared at the next step, so the caller must clear
    gradients after the forward pass.
    """
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain, was_training = network.forward, network.training
    flat = _Flat(network).train()
    examples = [torch.zeros(s, device=device).contiguous(memory_format=torch.channels_last) for s in shapes]
    recorded = True
    try:
        torch.cuda.make_graphed_callables(flat, tuple(examples))
    except RuntimeError as error:
        recorded = False
        _warn(f"recording failed ({str(error).partition(chr(10))[0]})")
    network.load_state_dict(before)  # recording changes the running statistics
    network.train(was_training)
    if not recorded:
        return
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    wanted: list[Tensor] = []  # eager gradients of the last step
    left = CHECKED

    def forward(*images: Tensor | None) -> Any:
        if not (network.training and torch.is_grad_enabled()):
            return plain(*images)
        given = [batch for batch in images if batch is not None]
        if [batch.shape for batch in given] != [example.shape for example in examples]:
            wanted.clear()  # gradients will be those of this batch
            return plain(*images)
        return flat.outputs(flat(*given)) if left == 0 and not wanted else checked(given)

    def checked(images: list[Tensor]) -> Any:
        nonlocal left
        good = all(_close(p.grad, own) for p, own in zip(parameters, wanted, strict=True)) if wanted else True
        wanted.clear()
        if left == 0 and good:
            return flat.outputs(flat(*images))
        del network.forward  # the class has the eager one
        if not good:
            _warn("its gradients differ from the eager ones")
            return plain(*images)
        statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
        eager = _tensors(torch.func.functional_call(network, statistics, tuple(images)))
        replayed = flat(*images)
        if not all(_close(found, own) for found, own in zip(replayed, eager, strict=True)):
            _warn("its outputs differ from the eager ones")
            return flat.outputs(eager)
        network.forward = forward

        def differentiate(gradients: Sequence[Tensor | None]) -> None:
            used = [i for i, gradient in enumerate(gradients) if gradient is not None]
            of_used = [gradients[i] for i in used]
            wanted.extend(torch.autograd.grad([eager[i] for i in used], parameters, of_used))

        register_multi_grad_hook(replayed, differentiate)
        left -= 1
        return flat.outputs(replayed)

    network.forward = forward


class _Flat(nn.Module):
    """A network that returns the tensors of its outputs as a tuple, as recording wants them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.plain = network, network.forward
        self.kind: Any = Tensor
        self.absent: list[bool] = []

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """What the network returns, without None."""
        outputs = self.plain(*images)
        self.kind = type(outputs)
        if isinstance(outputs, tuple):
            self.absent = [part is None for part in outputs]
        return _tensors(outputs)

    def outputs(self, tensors: Sequence[Tensor]) -> Any:
        """The tensors as the network returns them."""
        if not issubclass(self.kind, tuple):
            return tensors[0]
        rest = iter(tensors)
        parts = [None if absent else next(rest) for absent in self.absent]
        return self.kind(*parts) if hasattr(self.kind, "_fields") else tuple(parts)


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of a tensor, or of a tuple of tensors and None."""
    return tuple(part for part in outputs if part is not None) if isinstance(outputs, tuple) else (outputs,)


def _close(found: Tensor | None, wanted: Tensor) -> bool:
    """Whether tensors agree to TOLERANCE of the largest value; waits for the device."""
    if found is None:
        return False
    difference = (found.detach().float() - wanted.detach().float()).abs().max()
    return bool(difference <= TOLERANCE * wanted.detach().float().abs().max())


def _warn(why: str) -> None:
    if processes.rank() == 0:
        print(f"warning: the CUDA graph is not used: {why}; training continues without it", file=sys.stderr)
