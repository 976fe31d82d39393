"""The PreAct ResNet-18 that all methods can have is one architecture, though each directory has its own; and so is the narrow
network that all have at any size where they are asked for it."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import afm.networks
import manifold_dividemix.networks
import me_momentum.networks
import sanm.networks
import sfa.Train_cifar
from benchmarks import baseline

CLASSES = 10


# each: an encoder with its pooling, images [B, C, H, W] -> features [B, D], without classifiers, projections and decoders;
# by name the narrow one, or the PreAct ResNet-18


def of_sfa(channels: int, size: int, narrow: bool = False) -> nn.Module:
    images = np.zeros((1, size, size, channels), np.uint8)
    data = SimpleNamespace(train=SimpleNamespace(images=images), num_classes=CLASSES)
    args = sfa.Train_cifar.parse_args(["--arch", "narrow"] if narrow else [])
    network = sfa.Train_cifar.make_network(data, args)
    network.heads = nn.Identity()
    return network


def of_afm(channels: int, size: int, narrow: bool = False) -> nn.Module:
    return afm.networks.make_backbone("preact_narrow" if narrow else "preact_resnet18", size, channels)[0]


def of_me_momentum(channels: int, size: int, narrow: bool = False) -> nn.Module:
    name = "preact_narrow" if narrow else "preact_resnet18"
    network = me_momentum.networks.make_network(name, CLASSES, channels, size)
    network.classifier = nn.Identity()
    return network


def of_the_baseline(channels: int, size: int) -> nn.Module:
    network = baseline.Network(CLASSES, channels, size)
    network[-1] = nn.Identity()
    return network


def of_manifold_dividemix(channels: int, size: int, narrow: bool = False) -> nn.Module:
    encoder = manifold_dividemix.networks.make_encoder("narrow" if narrow else "resnet18", channels, size)
    network = manifold_dividemix.networks.Network(encoder, encoder.width, CLASSES)
    network.classifier = network.projection = network.projection_bn = nn.Identity()
    return network


class Features(nn.Module):
    """The features in a network of SANM, which gives them to its classifier."""

    def __init__(self, network: nn.Module):
        super().__init__()
        network.classifier = network.decoder = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).scores


def of_sanm(channels: int, size: int, narrow: bool = False) -> nn.Module:
    arch = "narrow" if narrow else "auto"
    return Features(sanm.networks.make_network("dividemix", CLASSES, channels, size, arch=arch))


# below 16 pixels SANM and Manifold DivideMix have by themselves narrow networks whose last map of 8 pixels is 4x4, not 2x2
ALL = (of_afm, of_me_momentum, of_manifold_dividemix, of_sanm)
CASES = [(make, *shape, False) for make in (*ALL, of_the_baseline) for shape in ((3, 32), (1, 28))]
CASES += [
    (make, channels, 8, False) for make in (of_afm, of_me_momentum, of_the_baseline) for channels in (1, 3)
]
CASES += [(make, *shape, True) for make in ALL for shape in ((3, 32), (1, 28), (1, 8), (3, 8))]
cases = pytest.mark.parametrize(("make", "channels", "size", "narrow"), CASES)


def made(make, channels: int, size: int, narrow: bool) -> nn.Module:
    """The baseline has no narrow one by name."""
    return make(channels, size, narrow) if narrow else make(channels, size)


def seeded(make, *what) -> nn.Module:
    torch.manual_seed(0)
    return made(make, *what)


def state(encoder: nn.Module) -> list[Tensor]:
    """Weights and running statistics of the convolutions in their order, then those of the norms, whatever their names."""
    layers = [[m for m in encoder.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d)]
    return [tensor for layer in chain(*layers) for tensor in layer.state_dict().values()]


@torch.no_grad()
def copied(make, *what) -> tuple[nn.Module, nn.Module]:
    """SFA's encoder with random weights and statistics, and another with the same."""
    ours, theirs = seeded(of_sfa, *what), made(make, *what)
    for tensor in state(ours):
        if tensor.dim() == 1:  # what a norm begins with, zeros and ones, would not tell one norm from another
            tensor.uniform_(0.5, 1.5)
    for to, value in zip(state(theirs), state(ours), strict=True):
        to.copy_(value)
    return ours, theirs


@pytest.mark.parametrize(
    ("channels", "size", "narrow", "count"),
    [(3, 32, False, 11_166_144), (1, 8, False, 76_816), (1, 8, True, 76_816), (1, 28, True, 76_816)],
)
def test_the_number_of_parameters(channels, size, narrow, count):
    for make in (of_sfa, *(case[0] for case in CASES if case[1:] == (channels, size, narrow))):
        found = sum(p.numel() for p in made(make, channels, size, narrow).parameters())
        assert found == count, make.__name__


@cases
def test_parameters_have_the_same_shapes_and_a_seed_gives_the_same_initial_values(
    make, channels, size, narrow
):
    ours, theirs = seeded(of_sfa, channels, size, narrow), seeded(make, channels, size, narrow)
    assert len([*theirs.parameters()]) == len([*ours.parameters()])
    assert [tensor.shape for tensor in state(theirs)] == [tensor.shape for tensor in state(ours)]
    for found, expected in zip(state(theirs), state(ours), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [of_afm, of_me_momentum])
@pytest.mark.parametrize(("channels", "size", "narrow"), [(3, 32, False), (1, 8, False), (3, 32, True)])
def test_afms_and_me_momentums_parameters_stand_in_sfas_order(make, channels, size, narrow):
    ours, theirs = (encoder(channels, size, narrow).state_dict().values() for encoder in (of_sfa, make))
    assert [value.shape for value in theirs] == [value.shape for value in ours]


@cases
def test_with_the_same_weights_the_features_are_the_same(make, channels, size, narrow):
    ours, theirs = copied(make, channels, size, narrow)
    images = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        with torch.no_grad():
            expected, found = ours.train(training)(images), theirs.train(training)(images)
        assert expected.std() > 0.01 and expected.shape == (3, 64 if narrow or size < 16 else 512)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # the running statistics that training has left
    for one, other in zip(state(theirs), state(ours), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [28, 32])
def test_without_its_name_nothing_is_narrow_from_16_pixels_up(size):
    for make in (of_sfa, *ALL):
        assert make(1, size)(torch.zeros(2, 1, size, size)).shape == (2, 512), make.__name__
