"""Recorded CUDA graphs of a network's training step, checked against the eager step before they are trusted."""

import sys

import torch
from torch import Tensor, nn

from common.gpu import processes

CHECKED = 20  # steps that are also made eagerly
TOLERANCE = 0.02  # largest difference of outputs and gradients, relative to their largest value


def replay(network: nn.Module, batch_shape: tuple[int, ...], device: torch.device) -> None:
    """Let training on float32 batches of this shape replay a recorded forward and backward pass.

    Other batches and evaluation do not change. The first CHECKED steps are also made eagerly from the same state.
    If an output or a gradient differs by more than TOLERANCE, or recording fails, the graph is dropped with a warning. A
    gradient is compared at the next step, so the caller must clear gradients after the forward pass.
    """
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain, was_training = network.forward, network.training
    network.train()
    example = torch.zeros(batch_shape, device=device).contiguous(memory_format=torch.channels_last)
    try:
        torch.cuda.make_graphed_callables(network, (example,))
    except RuntimeError as error:
        network.forward = plain
        _warn(f"recording failed ({str(error).partition(chr(10))[0]})")
    recorded = network.forward
    network.load_state_dict(before)  # recording changes the running statistics
    network.train(was_training)
    if recorded == plain:
        return
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    wanted: list[Tensor] = []  # eager gradients of the last step
    left = CHECKED

    def forward(images: Tensor) -> Tensor:
        if not (network.training and torch.is_grad_enabled() and images.shape == example.shape):
            return plain(images)
        return recorded(images) if left == 0 and not wanted else checked(images)

    def checked(images: Tensor) -> Tensor:
        nonlocal left
        good = all(_close(p.grad, own) for p, own in zip(parameters, wanted, strict=True)) if wanted else True
        wanted.clear()
        if left == 0 and good:
            return recorded(images)
        if not good:
            network.forward = plain
            _warn("its gradients differ from the eager ones")
            return plain(images)
        network.forward = plain
        statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
        eager = torch.func.functional_call(network, statistics, (images,))
        replayed = recorded(images)
        if not _close(replayed, eager):
            _warn("its outputs differ from the eager ones")
            return eager
        network.forward = forward
        replayed.register_hook(
            lambda gradient: wanted.extend(torch.autograd.grad(eager, parameters, gradient))
        )
        left -= 1
        return replayed

    network.forward = forward


def _close(found: Tensor | None, wanted: Tensor) -> bool:
    """Whether tensors agree to TOLERANCE of the largest value; waits for the device."""
    if found is None:
        return False
    difference = (found.detach().float() - wanted.detach().float()).abs().max()
    return bool(difference <= TOLERANCE * wanted.detach().float().abs().max())


def _warn(why: str) -> None:
    if processes.rank() == 0:
        print(f"warning: the CUDA graph is not used: {why}; training continues without it", file=sys.stderr)
