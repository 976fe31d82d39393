"""Shapes, sizes, names and initial weights of the networks."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from common.runs.cli import UserError
from sanm import networks
from sanm.choices import BASES
from sanm.networks import MapOf, clothing_network, make_network, make_simclr, simclr_resnet


@pytest.mark.parametrize(
    ("base", "num_classes", "parameters", "of_decoder"),
    [
        ("c2d", 100, 14_503_463, 3_283_331),
        ("dividemix", 100, 14_500_775, 3_283_331),
        (None, 14, 42_544_081, 19_007_363),
    ],
)
def test_networks_have_the_published_number_of_parameters(base, num_classes, parameters, of_decoder):
    with torch.device("meta"):
        network = make_network(base, num_classes) if base else clothing_network("resnet50", num_classes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in network.decoder.parameters()) == of_decoder


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("channels", "size", "maps"),
    [(1, 8, (32, 4, 4)), (3, 8, (32, 4, 4)), (1, 28, (512, 4, 4)), (3, 16, (512, 2, 2))],
)
def test_maps_scores_and_reconstructions_fit_the_images(base, channels, size, maps):
    torch.manual_seed(0)
    network, images = make_network(base, 7, channels, size).eval(), torch.randn(3, channels, size, size)
    with torch.no_grad():
        out = network(images[:2], images)
    assert out.maps.shape == (2, *maps) and out.scores.shape == (2, 7)
    assert out.reconstruction.shape == images.shape
    # maps of the PreAct encoder are not activated, those of SimCLR's are
    assert bool((out.maps < 0).any()) is (base == "dividemix")
    if size < 16:
        assert network(images).reconstruction is None


@pytest.mark.parametrize(("channels", "size", "maps"), [(1, 8, 2), (3, 10, 3), (1, 28, 7), (1, 33, 9)])
def test_the_narrow_network_that_is_asked_for_has_a_map_of_a_quarter_at_any_size(channels, size, maps):
    torch.manual_seed(0)
    network = make_network("dividemix", 7, channels, size, arch="narrow")
    images = torch.randn(3, channels, size, size)
    out = network(images[:2], images)
    assert out.maps.shape == (2, 64, maps, maps)
    assert out.reconstruction.shape == images.shape
    (out.scores.sum() + (out.reconstruction - images).square().sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_decoders_make_images_of_their_size_without_resizing_and_with_nothing_between_their_layers():
    for made, maps, sizes in (
        (networks.decoder(512, 3, narrow=False), (512, 4, 4), [10, 15, 32]),
        (networks.decoder(64, 1, narrow=True), (64, 4, 4), [5, 7, 8]),
        (networks.quadrupling_decoder(64, 1), (64, 2, 2), [4, 8, 8]),
        (networks.quadrupling_decoder(64, 1), (64, 7, 7), [14, 28, 28]),
        (networks.quadrupling_decoder(64, 3), (64, 8, 8), [16, 32, 32]),
        (networks.clothing_decoder(64), (64, 7, 7), [25, 75, 224]),
    ):
        assert all(type(layer) is nn.ConvTranspose2d and layer.bias is not None for layer in made)
        x, found = torch.zeros(1, *maps), []
        for layer in made:
            x = layer(x)
            found.append(x.shape[2])
        assert found == sizes


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("asked", [False, True])
def test_scores_are_probabilities_where_the_release_has_them_so_and_always_float32(base, asked):
    torch.manual_seed(0)
    network, images = make_network(base, 5, 1, 8, softmax=asked).eval(), torch.randn(6, 1, 8, 8)
    out = network(images)
    logits = network.classifier(out.maps.mean(dim=(2, 3)))
    probabilities = base == "c2d" and asked
    torch.testing.assert_close(out.scores, F.softmax(logits, dim=1) if probabilities else logits)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(images, images)
    assert out.scores.dtype == out.reconstruction.dtype == torch.float32
    assert out.maps.dtype == torch.bfloat16


def test_images_to_be_reconstructed_are_a_batch_of_their_own_before_the_others():
    torch.manual_seed(0)
    network = make_network("c2d", 5, 1, 8).train()
    twin = copy.deepcopy(network)
    images, masked = torch.randn(6, 1, 8, 8), 3 + torch.randn(4, 1, 8, 8)
    out = network(images, masked)
    expected = twin.decoder(twin.encoder(masked))
    torch.testing.assert_close(out.reconstruction, expected)
    torch.testing.assert_close(out.maps, twin.encoder(images))
    for name, value in network.named_buffers():
        assert torch.equal(value, twin.get_buffer(name)), name


def test_the_network_of_pre_training_has_the_published_names_and_shapes():
    shapes = {name: list(value.shape) for name, value in make_simclr().state_dict().items()}
    assert {name.split(".")[0] for name in shapes} == {"encoder", "head"}
    assert [shapes[f"head.{i}.weight"] for i in (0, 2)] == [[512, 512], [128, 512]]
    assert sum(name.startswith("encoder.") for name in shapes) == len(simclr_resnet().state_dict())
    narrow = make_simclr(channels=1, size=8)
    assert [list(narrow.head[i].weight.shape) for i in (0, 2)] == [[32, 32], [64, 32]]
    assert isinstance(narrow.head[1], torch.nn.ReLU)


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_simclr_encoders_begin_from_kaiming_normal_by_fan_out(channels, size):
    torch.manual_seed(0)
    encoder = simclr_resnet(channels, size)
    assert len(convolutions(encoder)) == (20 if size == 32 else 8)
    for conv in convolutions(encoder):
        assert conv.bias is None
        weight, expected = conv.weight, math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
        error = 5 / math.sqrt(2 * weight.numel())  # five standard deviations of an estimate of the deviation
        assert float(weight.detach().std()) == pytest.approx(expected, rel=error)
        assert abs(float(weight.detach().mean())) < 5 * expected / math.sqrt(weight.numel())
        assert weight.abs().max() > 2.2 * expected  # a uniform distribution ends at 1.73


@pytest.mark.parametrize("base", BASES)
def test_norms_begin_as_the_identity_and_other_layers_from_pytorchs_uniform_default(base):
    torch.manual_seed(0)
    network = make_network(base, 10, 1, 8)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    fans = [(network.classifier.weight, 32)]
    fans += [(layer.weight, layer.out_channels * layer.kernel_size[0] ** 2) for layer in network.decoder]
    if base == "dividemix":
        fans += [(c.weight, c.in_channels * c.kernel_size[0] ** 2) for c in convolutions(network.encoder)]
    for weight, fan in fans:
        assert 0.9 / math.sqrt(fan) < weight.abs().max() <= 1 / math.sqrt(fan)


def names_of_block(prefix: str, shortcut: bool) -> list[str]:
    names = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]
    names += ["shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"] if shortcut else []
    return [f"{prefix}.{name}" for name in names]


def test_the_simclr_encoder_has_the_names_of_published_checkpoints():
    names = [name for name, _ in simclr_resnet(3, 32).named_parameters()]
    expected = ["conv1.weight", "bn1.weight", "bn1.bias"]
    for stage in range(1, 5):
        expected += names_of_block(f"layer{stage}.0", stage > 1) + names_of_block(f"layer{stage}.1", False)
    assert names == expected
    blocks = [names_of_block(f"layer{stage}.0", shortcut=stage == 2) for stage in (1, 2, 3)]
    assert [name for name, _ in simclr_resnet(1, 8).named_parameters()] == sum(blocks, expected[:3])


def test_the_encoder_of_clothing1m_is_torchvisions_up_to_its_last_map():
    torch.manual_seed(0)
    resnet = resnet18().eval()
    encoder, images = MapOf(resnet).eval(), torch.randn(2, 3, 64, 64)
    maps = encoder(images)
    assert maps.shape == (2, 512, 2, 2)
    torch.testing.assert_close(resnet.fc(maps.mean(dim=(2, 3))), resnet(images), rtol=1e-4, atol=1e-5)
    assert list(encoder.state_dict()) == [name for name in resnet.state_dict() if not name.startswith("fc")]


def test_the_network_of_clothing1m_starts_from_the_encoder_of_a_file(tmp_path):
    """Formats of files have tests of their own."""
    torch.manual_seed(1)
    weights = {name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}
    save_file({f"encoder.{name}": value for name, value in weights.items()}, tmp_path / "own.safetensors")
    first, second = (clothing_network("resnet18", 14, str(tmp_path / "own.safetensors")) for _ in range(2))
    for net in (first, second):
        assert all(torch.equal(value, weights[name]) for name, value in net.encoder.state_dict().items())
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.decoder[0].weight, second.decoder[0].weight)
    with pytest.raises(UserError, match=f"--pretrained .*{re.escape('own.safetensors')}: .*expected"):
        clothing_network("resnet50", 14, str(Path(tmp_path) / "own.safetensors"))


def test_imagenet_weights_are_those_of_torchvision(monkeypatch):
    fetched = resnet18()
    monkeypatch.setattr(networks, "imagenet_resnet", lambda name: {"resnet18": fetched}[name])
    network = clothing_network("resnet18", 14, "imagenet")
    assert torch.equal(network.encoder.conv1.weight, fetched.conv1.weight)
    assert network.classifier.weight.shape == (14, 512)
