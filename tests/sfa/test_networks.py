"""Shapes and sizes of the networks."""

import pytest
import torch

from sfa.networks import preact_resnet18, preact_resnet_narrow


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 11_176_404), (100, 11_268_744)])
def test_preact_resnet18_has_the_published_number_of_parameters(num_classes, parameters):
    assert sum(p.numel() for p in preact_resnet18(num_classes).parameters()) == parameters


def test_features_can_be_negative_and_heads_are_float32_under_autocast():
    network = preact_resnet18(10)
    with torch.autocast("cpu", torch.bfloat16):
        features, standard, balanced = network(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 512) and (features < 0).any()
    assert {t.dtype for t in (features, standard, balanced)} == {torch.float32}


@pytest.mark.parametrize("size", [28, 32])
def test_grey_images_of_other_sizes_fit(size):
    assert preact_resnet18(10, in_channels=1).eval()(torch.zeros(1, 1, size, size))[1].shape == (1, 10)


def test_the_narrow_network_keeps_a_map_of_two_by_two():
    network = preact_resnet_narrow(10)
    assert network.blocks(network.stem(torch.zeros(1, 1, 8, 8))).shape == (1, 64, 2, 2)


def test_both_heads_reach_the_features():
    network = preact_resnet_narrow(10)
    for head in (1, 2):
        network.zero_grad()
        network(torch.randn(4, 1, 8, 8))[head].sum().backward()
        assert network.stem.weight.grad.abs().sum() > 0
