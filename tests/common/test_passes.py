"""Weights cast once and gradients added at once: bit for bit what autocast and autograd do weight by weight."""

import pytest
import torch
from torch import nn

from common.gpu import passes, processes
from common.gpu.device import Device
from tests.card_steps import STEPS, Bench

CPU = Device(torch.device("cpu"), "bf16", "tests")


class Small(nn.Module):
    """A frozen convolution, a trained one, a norm, and one that no pass uses."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained, self.unused = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)
        self.frozen.requires_grad_(False)

    def forward(self, images):
        return self.norm(self.trained(self.frozen(images).relu())).float()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def views():
    return list(torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def gradients(network, outputs):
    """Of a loss of all outputs."""
    network.zero_grad()
    torch.stack(outputs).pow(3).mean().backward()
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_change_by_a_bit(name, monkeypatch):
    found = STEPS[name](Bench(CPU))
    monkeypatch.setattr(passes, "_places", lambda network: [])
    assert torch.equal(found, STEPS[name](Bench(CPU)))


def test_separate_passes_have_the_gradients_of_autograd_in_float32(network, views):
    with CPU.autocast():
        outputs = [network(view) for view in views]
        separate = [network(view) for view in passes.separate(network, views)]
    with CPU.autocast(network):
        together = [network(view) for view in views]
    wanted, found, rounded = (gradients(network, own) for own in (outputs, separate, together))
    assert [g is None for g in found] == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2
    for own, plain in zip(found, wanted, strict=True):
        assert own is plain is None or (own.dtype == torch.float32 and torch.equal(own, plain))
    assert not torch.equal(rounded[2], wanted[2])  # here the gradients of three passes were added in bfloat16
    # the rounding is of the summands, which may cancel
    torch.testing.assert_close(rounded[2], wanted[2], rtol=0, atol=0.01 * float(wanted[2].abs().max()))


def test_weights_are_cast_once_and_are_back_after_an_error(network, views):
    parameters = list(network.parameters())
    with pytest.raises(ZeroDivisionError), CPU.autocast(network):
        cast = network.trained.weight
        assert cast.dtype == torch.bfloat16 and network.norm.weight.dtype == torch.float32
        with torch.no_grad():
            network(views[0])
        assert network(views[0]).requires_grad and network.trained.weight is cast
        1 / 0  # noqa: B018
    assert all(own is before for own, before in zip(network.parameters(), parameters, strict=True))


def test_compiled_networks_and_several_processes_are_left_alone(network, monkeypatch):
    def dtype():
        with CPU.autocast(network):
            return network.trained.weight.dtype

    assert dtype() == torch.bfloat16
    network.trained._compiled_call_impl = network.trained.forward  # as compile() leaves a part of it
    assert dtype() == torch.float32
    network.trained._compiled_call_impl = None
    monkeypatch.setattr(processes, "world", lambda: 2)
    assert dtype() == torch.float32
