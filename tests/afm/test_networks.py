"""Backbones for small and large images, the forward pass, and weights from files of every kind."""

import re
import urllib.error

import pytest
import torch
from torch import nn

from afm.flags import parse_args
from afm.grouping import groups_by_halves
from afm.networks import load_weights, make_backbone, make_network
from common.gpu.device import Device
from common.runs.cli import UserError
from tests.common.payload import Payload
from tests.lines import message


def network_of(words: str = "", size: int = 8, channels: int = 1, classes: int = 10, seed: int = 0):
    """The network of the flags, by default the narrow one for digits."""
    torch.manual_seed(seed)
    return make_network(parse_args(["--pretrained", "none", *words.split()]), classes, size, channels)


def images_of(count: int, size: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "size", "channels", "width", "last"),
    [
        ("resnet18", 28, 1, 512, 4),
        ("resnet152", 8, 1, 64, 2),
        ("preact_resnet18", 8, 3, 64, 2),
        ("preact_resnet18", 64, 2, 512, 8),
        ("preact_narrow", 28, 1, 64, 7),
    ],
)
def test_small_images_keep_their_size_through_the_stem(name, size, channels, width, last):
    torch.manual_seed(0)
    backbone, found = make_backbone(name, size, channels)
    maps = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_hook(lambda _module, _input, output: maps.append(output.shape[2]))
    with torch.no_grad():
        features = backbone.eval()(images_of(2, size, channels))
    assert (found, features.shape, maps[0], maps[-1]) == (width, (2, width), size, last)
    stem = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    assert stem.weight.shape == (16 if width == 64 else 64, channels, 3, 3)
    if name.startswith("preact"):
        assert (features < 0).any()  # no activation after the last block
    else:
        assert stem.weight.std().item() == pytest.approx((2 / (9 * len(stem.weight))) ** 0.5, rel=0.2)


def test_images_of_64_pixels_and_more_have_torchvisions_network():
    with torch.device("meta"):
        backbone, width = make_backbone("resnet18", 64)
    assert (width, backbone.conv1.weight.shape) == (512, (64, 3, 7, 7))
    assert isinstance(backbone.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize("name", ["preact_narrow", "resnet18"])
def test_the_network_trains_under_the_attention(name):
    network = network_of(f"--network {name}")
    outputs = network.train()(images_of(4), groups_by_halves(4, 2))
    (outputs.mixed.sum() + outputs.plain.square().sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.backbone.parameters())


@pytest.mark.parametrize("size", [8, 224])
def test_there_are_no_imagenet_weights_for_the_preact_network(size):
    with pytest.raises(UserError, match=r"--pretrained imagenet: .* preact_resnet18; use a path or none"):
        make_backbone("preact_resnet18", size, 3, "imagenet")


def test_the_flags_shape_the_attention():
    for words in ("--lam 0", "--weights uniform"):
        assert network_of(words).attention is None
    words = "--group-size 3 --interaction concat --attention softmax --attn-hidden 7"
    attention = network_of(words).attention
    assert (attention.interaction, attention.attention) == ("concat", "softmax")
    shapes = {name: list(p.shape) for name, p in attention.named_parameters() if name.endswith("weight")}
    projections = {f"projections.{k}.weight": [12, 64] for k in range(3)}
    assert shapes == {**projections, "score.0.weight": [7, 36], "score.2.weight": [3, 7]}


def test_given_weights_take_the_place_of_the_attentions():
    network, weights = network_of("--weights uniform"), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    outputs = network.train()(images_of(6), groups_by_halves(6, 2), weights)
    assert torch.equal(outputs.weights, weights) and outputs.scores is None
    plain = outputs.plain
    torch.testing.assert_close(outputs.mixed, torch.stack([plain[0], plain[4], (plain[2] + plain[5]) / 2]))


def test_two_classifiers_are_one_for_mixtures_and_one_for_evaluation():
    shared, two = network_of(), network_of("--no-shared-classifier").eval()
    count, more = (sum(p.numel() for p in network.parameters()) for network in (shared, two))
    assert shared.mixed_classifier is shared.classifier and more - count == 64 * 10 + 10
    with torch.no_grad():
        features = two.backbone(images_of(5))
        assert torch.equal(two(images_of(5)), two.classifier(features))
        assert not torch.allclose(two.classifier(features), two.mixed_classifier(features))


def test_mixing_is_not_seen_by_batch_normalisation():
    mixing, plain = network_of(), network_of("--lam 0")
    plain.backbone.load_state_dict(mixing.backbone.state_dict())
    mixing.train()(images_of(6), groups_by_halves(6, 2))
    plain.train()(images_of(6))
    assert same_state(mixing.backbone, plain.backbone)


def test_attention_mixtures_and_classifiers_stay_in_float32_under_autocast():
    network = network_of()
    with Device(torch.device("cpu"), "bf16", "tests").autocast():
        outputs = network.train()(images_of(6), groups_by_halves(6, 2))
        assert network.eval()(images_of(6)).dtype == torch.float32
    assert [output.dtype for output in outputs] == [torch.float32] * 4
    assert (outputs.weights.sum(dim=1) - 1).abs().max() < 1e-6


def same_state(a: nn.Module, b: nn.Module, *without: str) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    names = [name for name in ours if not name.startswith(without)]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in names)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model_best.pt"


@pytest.mark.parametrize("words", ["", "--no-shared-classifier", "--lam 0", "--network preact_resnet18"])
def test_weights_of_an_earlier_run(words, file):
    earlier, network = network_of(words, seed=1), network_of(words)
    torch.save(earlier.state_dict(), file)
    assert not same_state(network, earlier)
    assert load_weights(network, file) == []
    assert same_state(network, earlier)


@pytest.mark.parametrize(("theirs", "size"), [("preact_resnet18", 8), ("resnet34", 16)])
def test_the_weights_of_another_resnet_are_refused_and_change_nothing(theirs, size, file):
    network, fresh = (network_of("--network resnet18", size) for _ in range(2))
    torch.save(network_of(f"--network {theirs}", size).state_dict(), file)
    with pytest.raises(UserError, match="does not fit the backbone; name the --network it is of"):
        load_weights(network, file)
    assert same_state(network, fresh)


def test_a_file_for_other_classes_gives_all_but_the_classifier(file):
    earlier, network, fresh = network_of(classes=101, seed=1), network_of(), network_of()
    torch.save(earlier.state_dict(), file)
    assert {name.split(".")[0] for name in load_weights(network, file)} == {"classifier"}
    assert same_state(network.classifier, fresh.classifier)
    assert same_state(network.backbone, earlier.backbone) and same_state(network.attention, earlier.attention)


def test_of_two_classifiers_a_network_with_one_takes_the_plain(file):
    earlier, network = network_of("--no-shared-classifier", seed=1), network_of()
    torch.save(earlier.state_dict(), file)
    assert load_weights(network, file) == []
    assert torch.equal(network.classifier.weight, earlier.classifier.weight)


def test_weights_of_the_release(file):
    """As its model_best.pkl has them."""
    theirs, network = (network_of("--fidelity released", seed=seed) for seed in (1, 0))
    names = {"fc_a": theirs.attention.projections[0], "fc_b": theirs.attention.projections[1]}
    names |= {"fc_weight": theirs.attention.score[0], "fc_classifier": theirs.classifier}
    state = {f"module.{name}": value for name, value in theirs.backbone.state_dict().items()}
    for name, layer in names.items():
        state |= {f"module.{name}.weight": layer.weight.data, f"module.{name}.bias": layer.bias.data}
    torch.save(state, file)
    assert load_weights(network, file) == []
    assert same_state(network, theirs)


def test_weights_of_torchvision_leave_attention_and_classifier_as_they_were(file):
    from torchvision import models  # noqa: PLC0415

    theirs = models.resnet18()
    torch.save(theirs.state_dict(), file)
    network, fresh = (network_of("--network resnet18", size=64, channels=3) for _ in range(2))
    assert {name.split(".")[0] for name in load_weights(network, file)} == {"attention", "classifier"}
    assert same_state(network, fresh, "backbone.")
    theirs.fc = nn.Identity()
    assert same_state(network.backbone, theirs)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"<html>gone</html>", "damaged"),
        ({"classifier.weight": Payload(open, "ran", "w")}, "more than tensors"),
        (torch.zeros(3), "not a state dict"),
        ({"state_dict": {"classifier.weight": torch.zeros(10, 64)}}, "not a state dict"),
        ({"classifier.weight": torch.zeros(7, 7), "other": torch.zeros(2)}, "does not fit the backbone"),
        ({}, "no tensor in it fits the backbone"),
    ],
)
def test_a_file_that_does_not_serve_is_refused_in_one_line(content, reason, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    network = network_of()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    line = message(load_weights, network, file)
    assert reason in line and str(file) in line
    assert same_state(network, network_of()) and not file.with_name("ran").exists()


FETCH = "torchvision.models._api.load_state_dict_from_url"


def test_imagenet_weights_are_torchvisions_first(monkeypatch):
    from torchvision import models  # noqa: PLC0415

    theirs, asked = models.resnet18(), []
    monkeypatch.setattr(FETCH, lambda url, *_, **__: asked.append(url) or theirs.state_dict())
    backbone, _ = make_backbone("resnet18", 224, 3, "imagenet")
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    theirs.fc = nn.Identity()
    assert same_state(backbone, theirs)


@pytest.mark.parametrize("content", [None, b"", b"<html>blocked by the proxy</html>"])
def test_weights_that_cannot_be_fetched_or_read_are_told_with_the_remedy(content, tmp_path, monkeypatch):
    """None: fetching fails; else the file is in torchvision's cache, and damaged."""

    def fails(*_, **__):
        raise urllib.error.URLError("[Errno -2] Name or service\nnot known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", fails)
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    if content is not None:
        place.parent.mkdir(parents=True)
        place.write_bytes(content)
    line = message(make_network, parse_args(["--network", "resnet18"]), 101, 224)
    assert re.search("--pretrained imagenet.*--pretrained PATH or none", line)
    assert str(place) in line and ("not known" in line) == (content is None)
