"""Backbones for small and large images, the forward pass, and weights from files of every kind."""

import urllib.error

import pytest
import torch
from torch import nn

from afm.flags import parse_args
from afm.grouping import groups_by_halves
from afm.networks import AttentiveFeatureMixup, load_weights, make_backbone, make_network
from common.gpu.device import Device
from common.runs.cli import UserError


def network_of(
    *flags: str, size: int = 8, channels: int = 1, classes: int = 10, seed: int = 0
) -> AttentiveFeatureMixup:
    """The network of the flags, by default the narrow one for digits."""
    torch.manual_seed(seed)
    return make_network(parse_args(["--pretrained", "none", *flags]), classes, size, channels)


def images_of(count: int, size: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


# backbones --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "channels", "width"),
    [("resnet18", 32, 3, 512), ("resnet34", 28, 1, 512), ("resnet50", 32, 3, 2048), ("resnet152", 8, 1, 64)],
)
def test_small_images_keep_their_size_through_the_stem(name, size, channels, width):
    torch.manual_seed(0)
    backbone, found = make_backbone(name, size, channels)
    maps = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _input, output: maps.append(output.shape[2]))
    with torch.no_grad():
        features = backbone.eval()(images_of(2, size, channels))
    assert found == width
    assert features.shape == (2, width)
    assert maps[0] == size
    assert maps[-1] == -(-size // (4 if size < 16 else 8))
    stem = backbone[0] if size < 16 else backbone.conv1
    assert stem.weight.shape == (16 if size < 16 else 64, channels, 3, 3)
    assert stem.weight.std().item() == pytest.approx((2 / (9 * len(stem.weight))) ** 0.5, rel=0.2)


def test_images_of_64_pixels_and_more_have_torchvisions_network():
    with torch.device("meta"):
        backbone, width = make_backbone("resnet18", 64)
    assert width == 512
    assert backbone.conv1.weight.shape == (64, 3, 7, 7)
    assert isinstance(backbone.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(
    ("size", "channels", "width", "maps"),
    [
        (8, 1, 64, [8, 2]),
        (8, 3, 64, [8, 2]),
        (28, 1, 512, [28, 4]),
        (32, 3, 512, [32, 4]),
        (64, 2, 512, [64, 8]),
    ],
)
def test_the_preact_network_takes_images_of_any_size_and_is_narrow_below_16_pixels(
    size, channels, width, maps
):
    backbone, found = make_backbone("preact_resnet18", size, channels)
    seen = []
    for module in (backbone.stem, backbone.blocks[-1]):
        module.register_forward_hook(lambda _module, _input, output: seen.append(output.shape[2]))
    with torch.no_grad():
        features = backbone.eval()(images_of(2, size, channels))
    assert (found, features.shape, seen) == (width, (2, width), maps)
    assert (features < 0).any()  # no activation after the last block


@pytest.mark.parametrize(("size", "channels", "maps"), [(8, 1, 2), (28, 1, 7), (32, 3, 8), (224, 3, 56)])
def test_the_narrow_preact_network_is_the_same_at_any_size(size, channels, maps):
    backbone, width = make_backbone("preact_narrow", size, channels)
    with torch.no_grad():
        x = backbone.eval().blocks(backbone.stem(images_of(2, size, channels)))
        assert backbone(images_of(2, size, channels)).shape == (2, width) == (2, 64)
    assert x.shape == (2, 64, maps, maps)


@pytest.mark.parametrize(
    ("name", "size"), [("preact_resnet18", 8), ("preact_resnet18", 32), ("preact_narrow", 32)]
)
def test_the_preact_network_trains_under_the_attention(name, size):
    network = network_of("--network", name, size=size)
    outputs = network.train()(images_of(4, size), groups_by_halves(4, 2))
    (outputs.mixed.sum() + outputs.plain.square().sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.backbone.parameters())


@pytest.mark.parametrize("size", [8, 32, 224])
def test_there_are_no_imagenet_weights_for_the_preact_network(size):
    with pytest.raises(UserError, match=r"--pretrained imagenet: .* preact_resnet18; use a path or none"):
        make_backbone("preact_resnet18", size, 3, "imagenet")


@pytest.mark.parametrize("blank", [["--lam", "0"], ["--weights", "uniform"], ["--weights", "random"]])
def test_there_is_no_attention_where_none_is_learnt(blank):
    assert network_of(*blank).attention is None


def test_the_flags_shape_the_attention():
    network = network_of(
        "--group-size", "3", "--interaction", "concat", "--attention", "softmax", "--attn-hidden", "7"
    )
    attention = network.attention
    assert (len(attention.projections), attention.interaction, attention.attention) == (
        3,
        "concat",
        "softmax",
    )
    assert [list(layer.weight.shape) for layer in attention.score if hasattr(layer, "weight")] == [
        [7, 36],
        [3, 7],
    ]


# the forward pass -------------------------------------------------------------------------------------------------------


def test_a_training_step_gives_mixed_and_plain_logits_and_weights_of_the_same_features():
    network, images, groups = network_of(), images_of(6), groups_by_halves(6, 2)
    outputs = network.train()(images, groups)
    features = network.features(images)
    weights = network.attention(features[groups])
    expected = network.classifier((weights[:, :, None] * features[groups]).sum(dim=1))
    torch.testing.assert_close(outputs.weights, weights)
    torch.testing.assert_close(outputs.scores, network.attention.scores(features[groups]))
    torch.testing.assert_close(outputs.mixed, expected)
    torch.testing.assert_close(outputs.plain, network.classifier(features))


def test_given_weights_take_the_place_of_the_attentions():
    network, images, groups = network_of("--weights", "uniform"), images_of(6), groups_by_halves(6, 2)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    outputs = network.train()(images, groups, weights)
    assert torch.equal(outputs.weights, weights)
    torch.testing.assert_close(outputs.mixed[0], outputs.plain[0])
    torch.testing.assert_close(outputs.mixed[1], outputs.plain[4])
    torch.testing.assert_close(outputs.mixed[2], (outputs.plain[2] + outputs.plain[5]) / 2)


def test_evaluation_is_the_backbone_and_the_plain_classifier():
    network, images = network_of("--no-shared-classifier").eval(), images_of(5)
    with torch.no_grad():
        logits = network(images)
        assert torch.equal(logits, network.classifier(network.backbone(images)))
        assert not torch.allclose(logits, network.mixed_classifier(network.backbone(images)))


def test_two_classifiers_have_parameters_of_their_own():
    shared, two = network_of(), network_of("--no-shared-classifier")
    count, more = (sum(p.numel() for p in network.parameters()) for network in (shared, two))
    assert shared.mixed_classifier is shared.classifier
    assert more - count == 64 * 10 + 10


def test_mixing_is_not_seen_by_batch_normalisation():
    mixing, plain, images = network_of(), network_of("--lam", "0"), images_of(6)
    plain.backbone.load_state_dict(mixing.backbone.state_dict())
    mixing.train()(images, groups_by_halves(6, 2))
    plain.train()(images)
    for (name, a), (_, b) in zip(
        mixing.backbone.named_buffers(), plain.backbone.named_buffers(), strict=True
    ):
        assert torch.equal(a, b), name


def test_attention_mixtures_and_classifiers_stay_in_float32_under_autocast():
    network = network_of()
    with Device(torch.device("cpu"), "bf16", "tests").autocast():
        outputs = network.train()(images_of(6), groups_by_halves(6, 2))
        assert network.eval()(images_of(6)).dtype == torch.float32
    assert [output.dtype for output in outputs] == [torch.float32] * 4
    assert (outputs.weights.sum(dim=1) - 1).abs().max() < 1e-6


# weights from a file ----------------------------------------------------------------------------------------------------


def same_state(a: nn.Module, b: nn.Module, *without: str) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith(without)
    )


@pytest.mark.parametrize("flags", [[], ["--no-shared-classifier"], ["--lam", "0"]])
def test_weights_of_an_earlier_run(flags, tmp_path):
    earlier, network = network_of(*flags, seed=1), network_of(*flags)
    torch.save(earlier.state_dict(), tmp_path / "model_best.pt")
    assert not same_state(network, earlier)
    assert load_weights(network, tmp_path / "model_best.pt") == []
    assert same_state(network, earlier)


def test_the_weights_of_another_resnet_are_refused_and_change_nothing(tmp_path):
    earlier = network_of("--network", "resnet34", size=32, channels=3)
    network = network_of("--network", "resnet18", size=32, channels=3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(earlier.state_dict(), tmp_path / "model_best.pt")
    with pytest.raises(UserError, match=r"layer1\.2\..* does not fit the backbone"):
        load_weights(network, tmp_path / "model_best.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_of_an_earlier_run_with_the_preact_network_and_of_no_other(tmp_path):
    preact = ["--network", "preact_resnet18"]
    earlier, network = network_of(*preact, seed=1), network_of(*preact)
    torch.save(earlier.state_dict(), tmp_path / "model_best.pt")
    assert load_weights(network, tmp_path / "model_best.pt") == []
    assert same_state(network, earlier)
    with pytest.raises(UserError, match="does not fit the backbone; name the --network it is of"):
        load_weights(network_of(), tmp_path / "model_best.pt")


def test_a_file_for_other_classes_gives_all_but_the_classifier(tmp_path):
    earlier, network = network_of(classes=101, seed=1), network_of()
    before = network.classifier.weight.clone()
    torch.save(earlier.state_dict(), tmp_path / "model_best.pt")
    left = load_weights(network, tmp_path / "model_best.pt")
    assert {name.split(".")[0] for name in left} == {"classifier"}
    assert torch.equal(network.classifier.weight, before)
    assert same_state(network.backbone, earlier.backbone)
    assert same_state(network.attention, earlier.attention)


RELEASED = ("--fidelity", "released", "--network", "resnet18")


def write_released(network: AttentiveFeatureMixup, path) -> None:
    """The state of a network as the release's model_best.pkl has it."""
    names = {"fc_a": network.attention.projections[0], "fc_b": network.attention.projections[1]}
    names |= {"fc_weight": network.attention.score[0], "fc_classifier": network.classifier}
    state = {f"module.{name}": value for name, value in network.backbone.state_dict().items()}
    for name, layer in names.items():
        state |= {f"module.{name}.weight": layer.weight.data, f"module.{name}.bias": layer.bias.data}
    torch.save(state, path)


def test_weights_of_the_release(tmp_path):
    theirs, network = (network_of(*RELEASED, size=32, channels=3, seed=seed) for seed in (1, 0))
    write_released(theirs, tmp_path / "model_best.pkl")
    load_weights(network, tmp_path / "model_best.pkl")
    assert same_state(network, theirs)


def test_of_the_releases_weights_none_is_left_at_random(tmp_path):
    network = network_of("--fidelity", "released")
    write_released(network, tmp_path / "model_best.pkl")
    assert load_weights(network, tmp_path / "model_best.pkl") == []


def test_of_two_classifiers_a_network_with_one_takes_the_plain(tmp_path):
    earlier, network = network_of("--no-shared-classifier", seed=1), network_of()
    torch.save(earlier.state_dict(), tmp_path / "model_best.pt")
    assert load_weights(network, tmp_path / "model_best.pt") == []
    assert torch.equal(network.classifier.weight, earlier.classifier.weight)


def test_weights_of_torchvision_leave_attention_and_classifier_as_they_were(tmp_path):
    from torchvision import models  # noqa: PLC0415

    torch.manual_seed(1)
    theirs = models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    network, fresh = (network_of(*RELEASED, size=64, channels=3) for _ in range(2))
    left = load_weights(network, tmp_path / "resnet18.pth")
    assert {name.split(".")[0] for name in left} == {"attention", "classifier"}
    assert same_state(network, fresh, "backbone.")
    theirs.fc = nn.Identity()
    assert same_state(network.backbone, theirs)


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    torch.save({"classifier.weight": Runs(tmp_path / "ran")}, tmp_path / "model_best.pkl")
    with pytest.raises(UserError, match=r"model_best.pkl: .*more than tensors"):
        load_weights(network_of(), tmp_path / "model_best.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "damaged"),
        (b"<html>gone</html>", "damaged"),
        ("truncated", "damaged"),
        (torch.zeros(3), "not a state dict"),
        ({"state_dict": {"classifier.weight": torch.zeros(10, 64)}}, "not a state dict"),
        ({"classifier.weight": torch.zeros(7, 7), "other": torch.zeros(2)}, "does not fit the backbone"),
        ({}, "no tensor in it fits the backbone"),
    ],
)
def test_a_file_that_does_not_serve_is_refused_in_one_line(content, reason, tmp_path):
    path, network = tmp_path / "weights.pt", network_of()
    if content == "truncated":
        torch.save(network.state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=reason) as refused:
        load_weights(network, path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert same_state(network, network_of())


# torchvision's weights --------------------------------------------------------------------------------------------------

FETCH = "torchvision.models._api.load_state_dict_from_url"


def test_imagenet_weights_are_torchvisions_first(monkeypatch):
    from torchvision import models  # noqa: PLC0415

    asked = []
    theirs = models.resnet50()
    monkeypatch.setattr(FETCH, lambda url, *_, **__: asked.append(url) or theirs.state_dict())
    backbone, width = make_backbone("resnet50", 224, 3, "imagenet")
    assert asked == ["https://download.pytorch.org/models/resnet50-0676ba61.pth"]
    assert width == 2048
    theirs.fc = nn.Identity()
    assert same_state(backbone, theirs)


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("[Errno -2] Name or service\nnot known"),
        TimeoutError("timed out"),
        PermissionError(13, "Permission denied", "/root/.cache"),
        RuntimeError('invalid hash value (expected "f37072fd", got "0000")'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_weights_that_cannot_be_fetched_end_in_one_line_with_the_remedy(error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(FETCH, fails)
    with pytest.raises(UserError) as refused:
        make_network(parse_args(["--network", "resnet18"]), 101, 224)
    line = str(refused.value)
    assert "\n" not in line
    for part in (
        "--pretrained imagenet",
        "resnet18-f37072fd.pth",
        "checkpoints",
        "--pretrained PATH or none",
    ):
        assert part in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>blocked by the proxy</html>",
        b"PK\x03\x04 half of a file",
    ],
)
def test_a_damaged_file_in_torchvisions_cache_ends_in_one_line(content, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    with pytest.raises(UserError) as refused:
        make_backbone("resnet18", 224, 3, "imagenet")
    assert str(place) in str(refused.value)
    assert "\n" not in str(refused.value)
