"""Shapes and sizes of the networks."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from sfa import networks
from sfa.Train_cifar import make_network


def test_features_can_be_negative():
    features, _, _ = networks.preact_resnet18(10)(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 512) and (features < 0).any()


def test_heads_are_float32_under_autocast():
    heads, features = networks.TwoHeads(6, 4), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    for standard in (heads.standard, networks.CosineHead(6, 4, scale=30)):
        heads.standard = standard
        with torch.autocast("cpu", torch.bfloat16):
            outputs = heads(features)
        assert [t.dtype for t in outputs] == [torch.float32] * 3
        torch.testing.assert_close(outputs, heads(features), rtol=0, atol=0)


def test_the_narrow_network_keeps_a_map_of_two_by_two_and_both_heads_reach_it():
    network = networks.preact_resnet_narrow(10)
    assert network.blocks(network.stem(torch.zeros(1, 1, 8, 8))).shape == (1, 64, 2, 2)
    for head in (1, 2):
        network.zero_grad()
        network(torch.randn(4, 1, 8, 8))[head].sum().backward()
        assert network.stem.weight.grad.abs().sum() > 0


def test_a_cosine_head_gives_scale_times_the_cosines():
    head = networks.CosineHead(6, 4, scale=7)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    found = head(features).detach().numpy()
    for f, row in zip(features.numpy(), found, strict=True):
        for w, value in zip(head.weight.detach().numpy(), row, strict=True):
            assert value == pytest.approx(7 * (f @ w) / np.sqrt((f @ f) * (w @ w)), abs=1e-5)
    assert head.bias is None and [name for name, _ in head.named_parameters()] == ["weight"]


def test_a_feature_of_zeros_has_finite_logits_and_gradients():
    head, features = networks.CosineHead(6, 4, scale=30), torch.zeros(2, 6)
    features[1] = 1
    features.requires_grad_()
    logits = head(features)
    assert not logits[0].any() and logits[1].any()
    logits.logsumexp(dim=1).sum().backward()
    assert torch.isfinite(features.grad).all() and torch.isfinite(head.weight.grad).all()


def test_only_ldam_exchanges_the_standard_head_and_leaves_the_rest_of_the_initial_weights():
    size, images = 8, np.zeros((1, 8, 8, 1), np.uint8)
    data = SimpleNamespace(train=SimpleNamespace(images=images), num_classes=5)
    made = {}
    for loss in ("ce", "ldam", "gce"):
        torch.manual_seed(0)
        made[loss] = make_network(data, Namespace(arch="resnet18", loss=loss, ldam_scale=11.0))
    heads = made["ldam"].heads
    assert type(heads.standard) is networks.CosineHead and heads.standard.scale == 11
    assert heads.standard.weight.shape == (5, heads.feature_size)
    plain = made["ce"].state_dict()
    for loss in ("ldam", "gce"):
        state = made[loss].state_dict()
        differing = {name for name in plain if name not in state or not torch.equal(plain[name], state[name])}
        ldam = {"heads.standard.weight", "heads.standard.bias"}
        assert differing == (ldam if loss == "ldam" else set()) and set(state) <= set(plain)
    assert type(made["gce"].heads.standard) is nn.Linear and type(heads.balanced) is nn.Linear
    logits = made["ldam"](torch.randn(3, 1, size, size))[1]
    assert float(logits.detach().abs().max()) <= 11 * (1 + 1e-6)


HEADS = ["heads.standard.weight", "heads.standard.bias", "heads.balanced.weight", "heads.balanced.bias"]


@pytest.mark.parametrize(
    ("name", "size", "count"), [("resnet18", 512, 11_227_812), ("resnet50", 2048, 23_712_932)]
)
def test_a_resnet_is_torchvisions_without_its_last_layer_and_with_two_heads(name, size, count):
    with torch.device("meta"):
        network, plain = networks.ResNet(name, 50), models.get_model(name)
    assert network.heads.feature_size == size
    assert sum(p.numel() for p in network.parameters()) == count
    names = [f"encoder.{own}" for own in plain.state_dict() if not own.startswith("fc.")]
    assert list(network.state_dict()) == names + HEADS


def test_a_resnet_has_random_weights_and_gives_features_and_both_heads_logits_in_float32():
    network = networks.ResNet("resnet18", 7).eval()
    assert not torch.equal(networks.ResNet("resnet18", 7).encoder.conv1.weight, network.encoder.conv1.weight)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, standard, balanced = network(images)
        plain = models.get_model("resnet18").eval()
        plain.fc = nn.Identity()
        plain.load_state_dict(network.encoder.state_dict())
        torch.testing.assert_close(features, plain(images))
        torch.testing.assert_close(standard, network.heads.standard(features))
        torch.testing.assert_close(balanced, network.heads.balanced(features))
        with torch.autocast("cpu", torch.bfloat16):
            half = network(images)
    assert features.shape == (2, 512) and standard.shape == balanced.shape == (2, 7)
    assert [t.dtype for t in half] == [torch.float32] * 3


def test_the_webvision_network_is_chosen_by_its_name():
    kinds = {"inception_resnet_v2": networks.InceptionResNetV2, "resnet18": networks.ResNet}
    for name, kind in kinds.items():
        with torch.device("meta"):
            network = networks.webvision_network(name, 50)
        assert type(network) is kind and network.heads.standard.out_features == 50


@pytest.mark.parametrize(
    ("make", "size"), [(networks.preact_resnet18, 512), (networks.preact_resnet_narrow, 64)]
)
def test_the_names_in_a_checkpoint_stay(make, size):
    network = make(10)
    names = list(network.state_dict())
    assert names[0] == "stem.weight" and names[-4:] == HEADS
    assert network.heads.feature_size == size
