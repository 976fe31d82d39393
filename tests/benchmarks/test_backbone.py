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


def encoder_of(name: str, channels: int, size: int, narrow: bool = False) -> nn.Module:
    """A method's PreAct ResNet-18, or its narrow network, up to the pooling: [B, C, H, W] -> [B, D]."""
    preact = "preact_narrow" if narrow else "preact_resnet18"
    if name == "afm":
        return afm.networks.make_backbone(preact, size, channels)[0]
    if name == "sfa":
        images = np.zeros((1, size, size, channels), np.uint8)
        data = SimpleNamespace(train=SimpleNamespace(images=images), num_classes=CLASSES)
        args = sfa.Train_cifar.parse_args(["--arch", "narrow"] if narrow else [])
        network = sfa.Train_cifar.make_network(data, args)
        network.heads = nn.Identity()
    elif name == "me_momentum":
        network = me_momentum.networks.make_network(preact, CLASSES, channels, size)
        network.classifier = nn.Identity()
    elif name == "manifold_dividemix":
        encoder = manifold_dividemix.networks.make_encoder("narrow" if narrow else "resnet18", channels, size)
        network = manifold_dividemix.networks.Network(encoder, encoder.width, CLASSES)
        network.classifier = network.projection = network.projection_bn = nn.Identity()
    elif name == "sanm":
        arch = "narrow" if narrow else "auto"
        network = sanm.networks.make_network("dividemix", CLASSES, channels, size, arch=arch)
        network.classifier = network.decoder = nn.Identity()
        network.register_forward_hook(lambda module, images, output: output.scores)  # of no classifier
    else:  # which has no narrow one by name
        network = baseline.Network(CLASSES, channels, size)
        network[-1] = nn.Identity()
    return network


# below 16 pixels SANM and Manifold DivideMix have by themselves narrow networks whose last map of 8 pixels is 4x4, not 2x2
ALL = ("afm", "me_momentum", "manifold_dividemix", "sanm")
CASES = [(name, *shape, False) for name in (*ALL, "baseline") for shape in ((3, 32), (1, 28))]
CASES += [(name, *shape, False) for name in ("afm", "me_momentum", "baseline") for shape in ((1, 8), (3, 8))]
CASES += [(name, *shape, True) for name in ALL for shape in ((3, 32), (1, 28), (1, 8), (3, 8))]
cases = pytest.mark.parametrize(("name", "channels", "size", "narrow"), CASES)


def seeded(*what) -> nn.Module:
    torch.manual_seed(0)
    return encoder_of(*what)


def state(encoder: nn.Module) -> list[Tensor]:
    """Weights and running statistics of the convolutions in their order, then those of the norms, whatever their names."""
    layers = [[m for m in encoder.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d)]
    return [tensor for layer in chain(*layers) for tensor in layer.state_dict().values()]


@pytest.mark.parametrize(
    ("channels", "size", "narrow", "count"),
    [(3, 32, False, 11_166_144), (1, 8, False, 76_816), (1, 8, True, 76_816), (1, 28, True, 76_816)],
)
def test_the_number_of_parameters_of_sfas_which_is_compared_with_all_others(channels, size, narrow, count):
    assert sum(p.numel() for p in encoder_of("sfa", channels, size, narrow).parameters()) == count


@cases
def test_parameters_have_the_same_shapes_and_a_seed_gives_the_same_initial_values(
    name, channels, size, narrow
):
    ours, theirs = (seeded(which, channels, size, narrow) for which in ("sfa", name))
    assert len([*theirs.parameters()]) == len([*ours.parameters()])
    assert [tensor.shape for tensor in state(theirs)] == [tensor.shape for tensor in state(ours)]
    for found, expected in zip(state(theirs), state(ours), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["afm", "me_momentum"])
@pytest.mark.parametrize(("channels", "size", "narrow"), [(3, 32, False), (1, 8, False), (3, 32, True)])
def test_afms_and_me_momentums_parameters_stand_in_sfas_order(name, channels, size, narrow):
    ours, theirs = (encoder_of(of, channels, size, narrow).state_dict().values() for of in ("sfa", name))
    assert [value.shape for value in theirs] == [value.shape for value in ours]


@cases
@torch.no_grad()
def test_with_the_same_weights_the_features_are_the_same(name, channels, size, narrow):
    ours, theirs = seeded("sfa", channels, size, narrow), encoder_of(name, channels, size, narrow)
    for to, value in zip(state(theirs), state(ours), strict=True):
        if value.dim() == 1:  # what a norm begins with, zeros and ones, would not tell one norm from another
            value.uniform_(0.5, 1.5)
        to.copy_(value)
    images = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        expected, found = ours.train(training)(images), theirs.train(training)(images)
        assert expected.std() > 0.01 and expected.shape == (3, 64 if narrow or size < 16 else 512)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # the running statistics that training has left
    torch.testing.assert_close(state(theirs), state(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sfa", *ALL])
def test_without_its_name_nothing_is_narrow_from_16_pixels_up(name):
    for size in (28, 32):
        assert encoder_of(name, 1, size)(torch.zeros(2, 1, size, size)).shape == (2, 512)
