"""Recorded training steps: which batches they serve, and that wrong ones are dropped. A stand-in records; no card is needed."""

from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from common.gpu import graphs
from common.gpu.device import Device
from common.pretraining.simclr import SimCLR
from sanm import Train_cifar as sanm_script
from sanm import pretrain as simclr_script
from sanm.networks import MaskedNetwork
from sfa import Train_cifar as sfa_script
from sfa.networks import PreActResNet

SHAPE = (4, 1, 8, 8)
UNUSED = "warning: the CUDA graph is not used"


class Spoiled(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.5 * gradient


@pytest.fixture
def network(monkeypatch):
    """A small network; `calls` lists the batches that its recorded forward was given, `spoil` changes what that returns."""
    monkeypatch.setattr(Device, "on_cuda", lambda self: True)
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    made.calls, made.spoil = [], lambda out: out

    def record(module, sample_args):
        plain = module.forward
        assert made.training and sample_args[0].shape == SHAPE
        plain(*sample_args)  # changes the running statistics

        def recorded(*images):
            made.calls.append(tuple(images[0].shape))
            return tuple(made.spoil(out.clone()) for out in plain(*images))  # none depends on another

        module.forward = recorded

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


def replay(network) -> None:
    Device(torch.device("cpu"), "fp32", "tests").replay(network, SHAPE)


def step(network, images=None) -> None:
    """A training step that clears gradients after the forward pass."""
    out = network(torch.rand(SHAPE) if images is None else images)
    network.zero_grad()
    out.square().mean().backward()


def test_training_batches_of_the_shape_alone_are_replayed(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    replay(network)
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network(torch.zeros(SHAPE))  # evaluation
    network.train()
    with torch.no_grad():
        network(torch.zeros(SHAPE))
    network(torch.zeros(3, 1, 8, 8))  # a last, smaller batch
    assert not network.calls
    step(network)
    assert network.calls == [SHAPE]


def test_checked_steps_change_the_network_as_plain_ones_do(network, capsys):
    replay(network.train())
    twin = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    twin.load_state_dict(network.state_dict())
    smaller = (3, 1, 8, 8)  # between checked steps
    for shape in (SHAPE, smaller, *[SHAPE] * (graphs.CHECKED + 2)):
        images = torch.rand(shape)
        step(network, images)
        step(twin, images)
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert network.calls == (graphs.CHECKED + 3) * [SHAPE]
    assert all(torch.equal(p, q) for p, q in zip(network.buffers(), twin.buffers(), strict=True))
    assert capsys.readouterr().err == ""


class Outputs(NamedTuple):
    maps: Tensor
    scores: Tensor
    rebuilt: Tensor | None


def test_networks_of_several_arguments_and_outputs_are_replayed(network, capsys, monkeypatch):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network

        def forward(self, images, others=None):
            maps = self.body(images)
            return Outputs(maps, maps.mean(dim=(2, 3)), None if others is None else self.body(others).mean())

    monkeypatch.setattr(graphs, "CHECKED", 1)
    made, twin = Several().train(), Several().train()  # of the same body
    for arguments in (1, 2):
        batches = [torch.rand(SHAPE) for _ in range(arguments)]
        graphs.replay(made, [SHAPE] * arguments, torch.device("cpu"))
        for number in range(3):
            wanted = torch.autograd.grad(twin(*batches).scores.square().sum(), list(network.parameters()))
            out = made(*batches, *[None] * (2 - arguments))
            assert isinstance(out, Outputs) and (out.rebuilt is None) == (arguments == 1)
            assert len(network.calls) == number + 1
            network.zero_grad()
            out.scores.square().sum().backward()  # the maps are not used
            assert all(torch.equal(p.grad, own) for p, own in zip(network.parameters(), wanted, strict=True))
        network.calls.clear()
        del made.forward
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("spoil", "why", "steps"), [(lambda out: 1.1 * out, "outputs", 1), (Spoiled.apply, "gradients", 2)]
)
@pytest.mark.parametrize("good", [0, graphs.CHECKED - 1])
def test_a_wrong_graph_is_dropped(network, capsys, spoil, why, steps, good):
    replay(network.train())
    for _ in range(good):
        step(network)
    network.spoil = spoil
    for _ in range(steps):
        step(network)
    assert f"{UNUSED}: its {why} differ from the eager ones" in capsys.readouterr().err
    calls = len(network.calls)
    step(network)
    assert len(network.calls) == calls


def test_without_a_recording_training_goes_on(network, capsys, monkeypatch):
    fail = Mock(side_effect=RuntimeError("capture failed\nadvice"))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    replay(network.train())
    step(network)
    assert not network.calls
    assert f"{UNUSED}: recording failed (capture failed); " in capsys.readouterr().err


SFA = "--imb_type none --noise_mode sym --noise_ratio 0"
SANM = "--base dividemix --r 0.2 --num_epochs 1 --warm_up 1"


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (sfa_script, PreActResNet, f"{SFA} --num_epochs 2 --warm_up 1"),
        (sanm_script, MaskedNetwork, SANM),
        (sanm_script, MaskedNetwork, f"{SANM} --masking none"),
        (simclr_script, SimCLR, "--epochs 1"),
    ],
)
def test_scripts_record_batches_that_they_train_on(script, kind, words, tmp_path, monkeypatch):
    recorded, trained = set(), set()
    monkeypatch.setattr(Device, "replay", lambda self, network, *shapes: recorded.add(shapes))

    def look(module, arguments):
        if isinstance(module, kind) and module.training and torch.is_grad_enabled():
            trained.add(tuple(tuple(batch.shape) for batch in arguments if batch is not None))

    handle = register_module_forward_pre_hook(look)
    shared = "--dataset digits --limit_train 40 --limit_test 8 --batch_size 4 --device cpu --cuda_graphs"
    script.main([*words.split(), *shared.split(), "--out", str(tmp_path / "run")])
    handle.remove()
    assert len(recorded) == 1 and recorded <= trained
