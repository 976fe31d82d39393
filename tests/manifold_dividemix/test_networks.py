"""Shapes, sizes, names and precision of the networks, and the encoders they begin from."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.encoders import Taken, load_encoder
from common.pretraining.simclr import SimCLR, encoder_file
from common.runs.cli import UserError
from manifold_dividemix.networks import (
    ARCHITECTURES,
    PROJECTION,
    Encoder,
    Network,
    PreActBlock,
    PreActBottleneck,
    make_encoder,
)


def size_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def made(arch: str = "resnet18", channels: int = 3, size: int = 32, num_classes: int = 7) -> Network:
    torch.manual_seed(0)
    encoder = make_encoder(arch, channels, size)
    return Network(encoder, encoder.width, num_classes)


def images(count: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


# shapes and sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "width", "parameters"),
    [("resnet18", 512, 11_283_364), ("resnet34", 512, 21_391_524), ("resnet50", 2048, None), ("resnet101", 2048, None)],
)  # fmt: skip
def test_networks_have_the_published_number_of_parameters_and_width(arch, width, parameters):
    with torch.device("meta"):
        network = made(arch, num_classes=100)
    assert network.encoder.width == network.classifier.in_features == network.projection.in_features == width
    if parameters:
        assert size_of(network) == parameters
    assert network.projection.out_features == network.projection_bn.num_features == PROJECTION == 128
    assert all(linear.bias is not None for linear in (network.classifier, network.projection))


@pytest.mark.parametrize(("arch", "blocks"), [(arch, blocks) for arch, (blocks, _) in ARCHITECTURES.items()])
def test_stages_have_the_blocks_of_the_architecture_and_halve_the_map_from_the_second_on(arch, blocks):
    with torch.device("meta"):
        encoder = make_encoder(arch)
        x, sizes = torch.empty(1, 3, 32, 32), []
        x = encoder.conv1(x)
        for stage in range(1, 5):
            layer = encoder.get_submodule(f"layer{stage}")
            x = layer(x)
            sizes.append(x.shape[2])
            assert len(layer) == blocks[stage - 1]
    assert sizes == [32, 16, 8, 4]
    kind = PreActBottleneck if arch in ("resnet50", "resnet101") else PreActBlock
    assert sum(isinstance(module, kind) for module in encoder.modules()) == sum(blocks)
    # besides stem and shortcuts: two or three convolutions a block, as the architecture's number says
    convolutions = sum(isinstance(module, nn.Conv2d) for module in encoder.modules())
    shortcuts = 4 if kind is PreActBottleneck else 3
    per_block = 3 if kind is PreActBottleneck else 2
    assert convolutions == 1 + per_block * sum(blocks) + shortcuts
    assert 2 + per_block * sum(blocks) == int(arch.removeprefix("resnet"))


@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet101"])
def test_larger_architectures_go_forward_and_backward(arch):
    network = made(arch, size=16).train()
    h = network(images(2, size=16))
    assert h.shape == (2, network.encoder.width)
    (network.classify(h).square().sum() + network.project(h)[0].square().sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert network.encoder.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("channels", "size", "maps"),
    [
        (1, 8, (64, 4, 4)),
        (3, 8, (64, 4, 4)),
        (1, 15, (64, 8, 8)),
        (3, 16, (512, 2, 2)),
        (1, 28, (512, 4, 4)),
        (3, 32, (512, 4, 4)),
        (3, 84, (512, 11, 11)),
    ],
)
def test_embeddings_are_the_mean_over_the_last_map_at_any_size(channels, size, maps):
    network = made(channels=channels, size=size).eval()
    with torch.no_grad():
        found, x = network(images(2, channels, size)), network.encoder(images(2, channels, size))
    assert x.shape == (2, *maps)
    torch.testing.assert_close(found, x.flatten(2).double().mean(dim=2).float(), rtol=1e-5, atol=1e-6)
    if size == 32:  # equal to the released pool there
        torch.testing.assert_close(found, F.avg_pool2d(x, 4, 4).flatten(1), rtol=1e-5, atol=1e-6)


def test_maps_of_224_pixels_are_of_28():
    with torch.device("meta"):
        encoder = make_encoder()
        assert encoder(torch.empty(1, 3, 224, 224)).shape == (1, 512, 28, 28)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_below_16_pixels_there_is_a_narrow_encoder_whatever_the_architecture(arch):
    encoder = make_encoder(arch, 1, 8)
    assert encoder.width == 64 and encoder.stages == 3
    widths = [module.out_channels for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [16, 16, 16, 32, 32, 32, 64, 64, 64]
    assert size_of(encoder) < 80_000


def test_an_architecture_that_is_not_there():
    with pytest.raises(KeyError):
        make_encoder("resnet20")


@pytest.mark.parametrize(("channels", "size", "maps"), [(1, 8, 2), (1, 28, 7), (3, 32, 8), (3, 84, 21)])
def test_the_narrow_encoder_that_is_asked_for_is_the_same_at_any_size(channels, size, maps):
    network = made("narrow", channels, size).eval()
    with torch.no_grad():
        assert network.encoder(images(2, channels, size)).shape == (2, 64, maps, maps)
        assert network(images(2, channels, size)).shape == (2, network.encoder.width) == (2, 64)


# blocks -----------------------------------------------------------------------------------------------------------------


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
    for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
        assert conv.bias is None
    strides = [block.get_submodule(f"conv{n}").stride[0] for n in range(1, convolutions + 1)]
    assert strides == ([stride, 1] if kind is PreActBlock else [1, stride, 1])


@pytest.mark.parametrize("size", [8, 32])
def test_nothing_follows_the_last_stage_so_that_embeddings_can_be_negative(size):
    network = made(size=size).eval()
    assert (network(images(4, size=size)) < 0).any()


def test_the_stem_is_normalised_and_activated():
    encoder = made(size=8).eval().encoder
    with torch.no_grad():
        for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.bias.normal_()  # behind a fresh norm a second activation changes nothing
        x = F.relu(encoder.bn1(encoder.conv1(images(2, size=8))))
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3):
            x = stage(x)
    torch.testing.assert_close(encoder(images(2, size=8)), x)


# names and groups -------------------------------------------------------------------------------------------------------


def names_of_block(prefix: str, shortcut: bool) -> list[str]:
    names = ["bn1.weight", "bn1.bias", "conv1.weight", "bn2.weight", "bn2.bias", "conv2.weight"]
    return [f"{prefix}.{name}" for name in [*names, *["shortcut.0.weight"] * shortcut]]


def test_layers_have_the_names_of_checkpoints():
    stem = ["conv1.weight", "bn1.weight", "bn1.bias"]
    with torch.device("meta"):
        names = [name for name, _ in make_encoder().named_parameters()]
        narrow = [name for name, _ in make_encoder(size=8).named_parameters()]
    expected = list(stem)
    for stage in range(1, 5):
        expected += names_of_block(f"layer{stage}.0", stage > 1) + names_of_block(f"layer{stage}.1", False)
    assert names == expected
    stages = [names_of_block(f"layer{stage}.0", stage > 1) for stage in (1, 2, 3)]
    assert narrow == [*stem, *stages[0], *stages[1], *stages[2]]
    by_name = [name for name, _ in make_encoder("narrow", size=8).named_parameters()]
    assert by_name == [name.replace("layer", "narrow") for name in narrow]


def test_the_head_is_all_but_the_encoder():
    network = made(size=8)
    head = [name for p in network.head() for name, own in network.named_parameters() if own is p]
    assert head == [
        "classifier.weight",
        "classifier.bias",
        "projection.weight",
        "projection.bias",
        "projection_bn.weight",
        "projection_bn.bias",
    ]
    assert len(network.head()) + len(list(network.encoder.parameters())) == len(list(network.parameters()))


def test_the_projection_is_linear_and_normalised_by_batch_alone():
    network = made(size=8).train()
    h = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    z = network.project(h)
    assert z.shape == (9, 128)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(128), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(dim=0, correction=0), torch.ones(128), rtol=1e-2, atol=1e-2)
    expected = F.batch_norm(
        F.linear(h, network.projection.weight, network.projection.bias), None, None, training=True
    )
    torch.testing.assert_close(z, expected)
    assert not torch.allclose(z.norm(dim=1), torch.ones(9), atol=0.1)
    torch.testing.assert_close(
        network.classify(h), F.linear(h, network.classifier.weight, network.classifier.bias)
    )


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


# encoders to begin from -------------------------------------------------------------------------------------------------


def pre_trained(size: int = 8) -> SimCLR:
    torch.manual_seed(5)
    encoder = make_encoder("resnet18", 1, size)
    network = SimCLR(encoder, encoder.width, 128)
    network.train()(images(6, 1, size))  # statistics of its own
    return network


def same(encoder: Encoder, other: Encoder) -> bool:
    pairs = zip(encoder.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == its and torch.equal(value, wanted) for (name, value), (its, wanted) in pairs)


def test_the_encoder_of_pre_training_is_loaded_and_the_rest_stays_random(tmp_path):
    simclr, network = pre_trained(), made(channels=1, size=8)
    before = [p.clone() for p in network.head()]
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(encoder_file(simclr, {"dataset": "digits"}))
    tensors = len(network.encoder.state_dict())
    assert load_encoder(network.encoder, path) == Taken(tensors, 0)
    assert same(network.encoder, simclr.encoder)
    assert all(torch.equal(p, b) for p, b in zip(network.head(), before, strict=True))
    torch.testing.assert_close(network.eval()(images(3, 1, 8)), simclr.eval().features(images(3, 1, 8)))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_in_the_format_of_supcontrast_is_loaded_and_its_head_dropped(prefix, tmp_path):
    simclr, network = pre_trained(), made(channels=1, size=8)
    state = simclr.state_dict()
    # its DataParallel is around the encoder alone
    renamed = {name.replace("encoder.", f"encoder.{prefix}"): value for name, value in state.items()}
    torch.save({"model": renamed, "epoch": 1000}, tmp_path / "last.pth")
    taken = load_encoder(network.encoder, tmp_path / "last.pth")
    assert taken == Taken(len(network.encoder.state_dict()), 4)
    assert same(network.encoder, simclr.encoder)


@pytest.mark.parametrize(
    ("encoder", "line"),
    [
        (lambda: make_encoder("resnet18", 3, 8), "conv1.weight has shape"),
        (lambda: make_encoder("resnet18", 1, 32), "conv1.weight has shape"),
    ],
)
def test_an_encoder_of_other_images_is_refused_and_nothing_is_taken(encoder, line, tmp_path):
    network = made(channels=1, size=8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(encoder().state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=line):
        load_encoder(network.encoder, tmp_path / "encoder.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_encoder_of_another_architecture_is_refused(tmp_path):
    safetensors.torch.save_file(make_encoder("resnet18").state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"has no layer1\.2"):
        load_encoder(make_encoder("resnet34"), tmp_path / "encoder.safetensors")


@pytest.mark.parametrize(
    ("size", "of", "to"), [(8, "resnet18", "narrow"), (8, "narrow", "resnet18"), (32, "narrow", "resnet18")]
)
def test_an_encoder_is_refused_where_a_stride_alone_is_another(size, of, to, tmp_path):
    """Below 16 pixels the shapes of all layers are alike."""
    safetensors.torch.save_file(make_encoder(of, 1, size).state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"not an encoder of this kind|conv1\.weight has shape"):
        load_encoder(make_encoder(to, 1, size), tmp_path / "encoder.safetensors")
