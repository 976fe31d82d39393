"""Weights that several forward passes share: cast to bfloat16 once for all passes, their gradients added at once.

Autocast casts every weight in every pass and every gradient back, and autograd adds the gradients of several passes weight by
weight: on a GPU a kernel each. Here one operator does so for all weights. The results are the same to the last bit.

Compiled networks are left alone, and so is training with several processes, which average gradients while the backward pass
goes on.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.gpu import processes

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)  # all stand under autocast; linear layers may be in float32
Place = tuple[dict[str, Any], str, bool]  # a module's own parameters, a name, whether of a convolution


def compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is compiled."""
    return any(module._compiled_call_impl is not None for module in modules)


@contextmanager
def cast_once(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it the convolutions of the networks have bfloat16 weights; gradients reach the float32 ones.

    For one pass with gradients of each network, and any number without. `separate` serves several.
    """
    places = [place for network in networks for place in _places(network) if place[2]]
    weights = _weights(places)
    try:
        _put(places, _Shared.apply(1, [torch.bfloat16] * len(places), *weights) if places else [])
        yield
    finally:
        _put(places, weights)


def separate(network: nn.Module, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The batches one by one, each for a forward pass of its own, which ends before the next is asked for.

    Gradients of the passes are added in float32, those of the last one first, as autograd adds them.
    """
    casts = torch.is_autocast_enabled(batches[0].device.type)
    sums = torch.is_grad_enabled() and len(batches) > 1 and (casts or batches[0].is_cuda)
    places = [place for place in _places(network) if sums or place[2]] if casts or sums else []
    return _with_shared(places, batches, casts) if places else iter(batches)


def _with_shared(places: Sequence[Place], batches: Sequence[Tensor], casts: bool) -> Iterator[Tensor]:
    weights = _weights(places)
    dtypes = [
        torch.bfloat16 if casts and of_convolution else weight.dtype
        for (*_, of_convolution), weight in zip(places, weights, strict=True)
    ]
    shared = _Shared.apply(len(batches), dtypes, *weights)
    try:
        for number, batch in enumerate(batches):
            _put(places, shared[number * len(places) : (number + 1) * len(places)])
            yield batch
    finally:
        _put(places, weights)


class _Shared(torch.autograd.Function):
    """Each weight as it enters each of the passes, and back: the sum of its gradients, in its own precision."""

    @staticmethod
    def forward(ctx: Any, passes: int, dtypes: Sequence[torch.dtype], *weights: Tensor) -> tuple[Tensor, ...]:
        """passes x weights tensors that share their values, of the dtypes [weights]."""
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        cast = _cast(weights, dtypes)
        shared = tuple(weight.detach() for _ in range(passes) for weight in cast)
        trained = passes * ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(part for part, own in zip(shared, trained, strict=True) if not own))
        return shared

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the weights; None of those that the passes do not use."""
        count = len(ctx.dtypes)
        parts = [gradients[start : start + count] for start in range(0, len(gradients), count)]
        used = [i for i in range(count) if parts[-1][i] is not None]
        dtypes = [ctx.dtypes[i] for i in used]
        total: list[Tensor] = []
        for part in reversed(parts):
            own = _cast([part[i] for i in used], dtypes)
            total = list(torch._foreach_add(total, own)) if total else own
        back = dict(zip(used, total, strict=True))
        return (None, None, *(back.get(i) for i in range(count)))


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors in the dtypes; those that change are cast by one operator."""
    cast = [
        old if old.dtype == dtype else torch.empty_like(old, dtype=dtype)
        for old, dtype in zip(tensors, dtypes, strict=True)
    ]
    changed = [i for i, old in enumerate(tensors) if cast[i] is not old]
    if changed:
        torch._foreach_copy_([cast[i] for i in changed], [tensors[i] for i in changed])
    return cast


def _places(network: nn.Module) -> list[Place]:
    """Where the weights of a network stand; none of a network that is left alone.

    `torch.func.functional_call` puts others there too, but looks each up by its name, in every pass.
    """
    modules = list(network.modules())
    if processes.world() > 1 or compiled(modules):
        return []
    return [
        (module._parameters, name, isinstance(module, CONVOLUTIONS))
        for module in modules
        for name, weight in module._parameters.items()
        if weight is not None
    ]


def _weights(places: Iterable[Place]) -> list[Tensor]:
    return [own[name] for own, name, _ in places]


def _put(places: Sequence[Place], weights: Sequence[Tensor]) -> None:
    for (own, name, _), weight in zip(places, weights, strict=True):
        own[name] = weight
