"""Shapes, sizes, names and precision of the networks, and the encoders that they refuse."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.encoders import load_encoder
from common.runs.cli import UserError
from manifold_dividemix.networks import ARCHITECTURES, Network, PreActBlock, PreActBottleneck, make_encoder


def made(arch: str = "resnet18", channels: int = 3, size: int = 32, num_classes: int = 7) -> Network:
    torch.manual_seed(0)
    encoder = make_encoder(arch, channels, size)
    return Network(encoder, encoder.width, num_classes)


def images(count: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("arch", "blocks"), [(arch, blocks) for arch, (blocks, _) in ARCHITECTURES.items()])
def test_stages_have_the_blocks_of_the_architecture_and_halve_the_map_from_the_second_on(arch, blocks):
    with torch.device("meta"):
        network, x, sizes = made(arch, num_classes=100), torch.empty(1, 3, 32, 32), []
        encoder = network.encoder
        x = encoder.conv1(x)
        for stage in range(1, 5):
            layer = encoder.get_submodule(f"layer{stage}")
            x = layer(x)
            sizes.append(x.shape[2])
            assert len(layer) == blocks[stage - 1]
    assert sizes == [32, 16, 8, 4]
    bottleneck = arch in ("resnet50", "resnet101")
    kind, width = (PreActBottleneck, 2048) if bottleneck else (PreActBlock, 512)
    assert sum(isinstance(module, kind) for module in encoder.modules()) == sum(blocks)
    # stem, classifier, and two or three convolutions a block
    assert 2 + (2 + bottleneck) * sum(blocks) == int(arch.removeprefix("resnet"))
    assert network.encoder.width == network.classifier.in_features == network.projection.in_features == width
    assert network.projection.out_features == network.projection_bn.num_features == 128


@pytest.mark.parametrize(
    ("arch", "channels", "size", "maps"),
    [
        # below 16 pixels a narrow one, whatever the architecture
        *((arch, 1, 8, (64, 4, 4)) for arch in ARCHITECTURES),
        ("resnet18", 1, 15, (64, 8, 8)),
        ("resnet18", 3, 16, (512, 2, 2)),
        ("resnet18", 3, 32, (512, 4, 4)),
        ("resnet18", 3, 40, (512, 5, 5)),
        # the narrow one by name is the same at any size
        ("narrow", 1, 8, (64, 2, 2)),
        ("narrow", 3, 32, (64, 8, 8)),
    ],
)
def test_embeddings_are_the_mean_over_the_last_map_at_any_size(arch, channels, size, maps):
    network = made(arch, channels, size).eval()
    with torch.no_grad():
        found, x = network(images(2, channels, size)), network.encoder(images(2, channels, size))
    assert x.shape == (2, *maps) and network.encoder.width == maps[0]
    torch.testing.assert_close(found, x.flatten(2).double().mean(dim=2).float(), rtol=1e-5, atol=1e-6)
    if maps[0] == 64:
        widths = [m.out_channels for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
        assert widths == [16, 16, 16, 32, 32, 32, 64, 64, 64]


@pytest.mark.parametrize(("kind", "convolutions"), [(PreActBlock, 2), (PreActBottleneck, 3)])
@pytest.mark.parametrize(("width", "stride"), [(4, 1), (4, 2), (8, 1), (8, 2)])
def test_the_shortcut_of_a_block_begins_at_the_activated_tensor(kind, convolutions, width, stride):
    torch.manual_seed(0)
    width_in = 4 * kind.expansion
    block = kind(width_in, width, stride).eval()
    x = torch.randn(2, width_in, 6, 6)
    activated = F.relu(block.bn1(x))
    out = block.conv1(activated)
    for number in range(2, convolutions + 1):
        out = block.get_submodule(f"conv{number}")(F.relu(block.get_submodule(f"bn{number}")(out)))
    changes = (width, stride) != (4, 1)
    torch.testing.assert_close(block(x), out + (block.shortcut(activated) if changes else activated))
    assert out.shape == (2, width * kind.expansion, 6 // stride, 6 // stride)
    # a convolution alone: neither norm nor bias
    assert [type(layer) for layer in block.shortcut] == ([nn.Conv2d] if changes else [])
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))
    strides = [block.get_submodule(f"conv{n}").stride[0] for n in range(1, convolutions + 1)]
    assert strides == ([stride, 1] if kind is PreActBlock else [1, stride, 1])


def names_of_block(prefix: str, shortcut: bool) -> list[str]:
    names = ["bn1.weight", "bn1.bias", "conv1.weight", "bn2.weight", "bn2.bias", "conv2.weight"]
    return [f"{prefix}.{name}" for name in [*names, *["shortcut.0.weight"] * shortcut]]


def test_layers_have_the_names_of_checkpoints():
    stem = ["conv1.weight", "bn1.weight", "bn1.bias"]
    with torch.device("meta"):
        names = [name for name, _ in make_encoder().named_parameters()]
        narrow = [name for name, _ in make_encoder(size=8).named_parameters()]
        by_name = [name for name, _ in make_encoder("narrow", size=8).named_parameters()]
    blocks = [(stage, block) for stage in range(1, 5) for block in (0, 1)]
    expected = [names_of_block(f"layer{stage}.{block}", stage > 1 and not block) for stage, block in blocks]
    assert names == sum(expected, stem)
    assert narrow == sum((names_of_block(f"layer{stage}.0", stage > 1) for stage in (1, 2, 3)), stem)
    assert by_name == [name.replace("layer", "narrow") for name in narrow]


def test_the_head_is_all_but_the_encoder():
    network = made(size=8)
    head = [name for p in network.head() for name, own in network.named_parameters() if own is p]
    layers = ("classifier", "projection", "projection_bn")
    assert head == [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    assert len(head) + len(list(network.encoder.parameters())) == len(list(network.parameters()))


def test_embeddings_logits_and_projections_are_float32_under_autocast():
    network = made(size=8).eval()
    exact = network(images(4, size=8))
    with torch.autocast("cpu", torch.bfloat16):
        assert network.encoder(images(4, size=8)).dtype == torch.bfloat16
        h = network(images(4, size=8))
        logits, z = network.classify(h), network.project(h)
    assert h.dtype == logits.dtype == z.dtype == torch.float32
    # not rounded after the encoder
    torch.testing.assert_close(logits, network.classify(h), rtol=0, atol=0)
    torch.testing.assert_close(z, network.project(h), rtol=0, atol=0)
    assert (h.bfloat16().float() != h).any()
    assert (h - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("resnet18", 3, 8), "conv1.weight has shape"),
        (("resnet18", 1, 32), "conv1.weight has shape"),
        # below 16 pixels the shapes of all layers are alike
        (("narrow", 1, 8), "not an encoder of this kind"),
    ],
)
def test_an_encoder_of_other_images_or_of_another_architecture_is_refused(given, line, tmp_path):
    network = made(channels=1, size=8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(make_encoder(*given).state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=line):
        load_encoder(network.encoder, tmp_path / "encoder.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
