"""Encoders from files: every format there is, and everything that can be wrong with a file."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from common.gpu.encoders import load_encoder
from sanm.networks import MapOf, make_network, make_simclr, simclr_resnet
from tests.common.payload import Payload
from tests.lines import message


def network(seed: int = 1):
    """A small SimCLR network whose every tensor, statistics included, has values of its own."""
    torch.manual_seed(seed)
    made = make_simclr(1, 8)
    for name, value in made.state_dict().items():
        value.copy_(torch.full_like(value, 7) if name.endswith("tracked") else torch.rand_like(value))
    return made


def fresh():
    torch.manual_seed(0)
    return simclr_resnet(1, 8)


def published(model: dict) -> dict:
    """What SupContrast saves."""
    options = argparse.Namespace(model="resnet18", temp=0.5, lr_decay_epochs=[700, 800, 900], cosine=True)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1).state_dict()
    return {"opt": options, "model": model, "optimizer": optimizer, "epoch": 1000}


def renamed(weights: dict, old: str, new: str) -> dict:
    return {name.replace(old, new): value for name, value in weights.items()}


def assert_same(encoder, source) -> None:
    own, other = encoder.state_dict(), source.state_dict()
    assert list(own) == list(other)
    assert all(torch.equal(own[name], other[name]) for name in own)


FULL = network().state_dict()  # encoder.* and head.*
BARE = network().encoder.state_dict()
ENCODER, HEAD = len(BARE), 4

FILES = {
    "plain": (BARE, 0),
    "safetensors": (BARE, 0),
    "plain, with the head": (FULL, HEAD),
    "published": (published(FULL), HEAD),
    "published, parallel": (published({f"module.{n}": v for n, v in FULL.items()}), HEAD),
    "published, parallel encoder": (published(renamed(FULL, "encoder.", "encoder.module.")), HEAD),
    "torchvision's shortcuts": (renamed(FULL, "shortcut", "downsample"), HEAD),
    "with a classifier": (BARE | {"classifier.weight": torch.ones(10, 64), "fc.bias": torch.ones(10)}, 2),
    "double": ({name: value.double() for name, value in BARE.items()}, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind(name, tmp_path, capsys):
    content, left = FILES[name]
    if name == "safetensors":
        path = tmp_path / "encoder.safetensors"
        save_file(content, path, {"dataset": "digits"})
    else:
        path = tmp_path / "encoder.pth"
        torch.save(content, path)
    encoder = fresh()
    assert load_encoder(encoder, path) == (ENCODER, left)
    assert_same(encoder, network().encoder)
    assert f"{ENCODER} tensors taken, {left} others left" in capsys.readouterr().out


def test_the_encoder_within_a_network_and_torchvisions_own(tmp_path):
    path = tmp_path / "encoder.pth"
    torch.save(published(FULL), path)
    whole = make_network("c2d", 10, 1, 8)
    before = {n: value.clone() for n, value in whole.state_dict().items() if not n.startswith("encoder.")}
    load_encoder(whole.encoder, path)
    assert_same(whole.encoder, network().encoder)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in before.items())

    source, encoder = resnet18(), MapOf(resnet18())
    torch.save(published(renamed(source.state_dict(), "downsample", "shortcut")), path)
    assert load_encoder(encoder, path).left == 2  # fc
    assert_same(encoder, MapOf(source))


def test_num_batches_tracked_may_be_missing(tmp_path):
    content = {n: v for n, v in BARE.items() if not n.endswith("tracked")}
    torch.save(content, tmp_path / "encoder.pth")
    encoder = fresh()
    assert load_encoder(encoder, tmp_path / "encoder.pth").taken == len(content) < len(BARE)
    assert torch.equal(encoder.bn1.running_mean, network().encoder.bn1.running_mean)
    assert encoder.bn1.num_batches_tracked == 0


def without(*names: str) -> dict:
    return {name: value for name, value in BARE.items() if name not in names}


def refused(path, *words: str) -> None:
    """The file is refused in one line that names it, and the encoder is as it was."""
    encoder = fresh()
    text = message(load_encoder, encoder, path)
    assert [word for word in (str(path), *words) if word not in text] == []
    assert_same(encoder, fresh())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (without("layer2.0.bn1.bias", "layer3.0.conv1.weight"), ["has no layer2.0.bn1.bias", "expected with shape [32]"]),
        ({}, ["has no conv1.weight", "[16, 1, 3, 3]", "0 tensors"]),
        (published(simclr_resnet(3, 8).state_dict()), ["conv1.weight has shape [16, 3, 3, 3]", "expected [16, 1, 3, 3]"]),
        (BARE | {"bn1.bias": torch.ones(3)}, ["bn1.bias has shape [3]", "expected [16]"]),
        (FULL | {"encoder.layer2.1.conv1.weight": torch.ones(32, 32, 3, 3)},
         ["has layer2.1.conv1.weight, which this encoder has not: another architecture"]),
        (BARE | FULL, ["conv1.weight twice"]),
        *((data, ["no state dict"]) for data in ([1, 2], torch.ones(3), {"model": {"conv1.weight": "a word"}},
                                                 {"epoch": 3, "model": None}, {0: torch.ones(1)})),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_first_tensor(content, words, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", *words)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files(name, tmp_path):
    whole = tmp_path / f"whole-{name}"
    save_file(BARE, whole) if name.endswith("safetensors") else torch.save(BARE, whole)
    for content in (whole.read_bytes()[:-500], b"", b"<html>404</html>"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "damaged")
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth")
    refused(tmp_path / f"nosuch-{name}", "no such file")


@pytest.mark.parametrize("place", ["top", "model", "opt"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(place, tmp_path):
    trapped, path = tmp_path / "trapped", tmp_path / "a.pth"
    trap, content = Payload(os.mkdir, str(trapped)), published(FULL)
    if place == "top":
        content["more"] = trap
    elif place == "model":
        content["model"] = FULL | {"conv9": trap}
    else:
        content["opt"].more = trap
    torch.save(content, path)
    refused(path, "holds more than tensors")
    path.write_bytes(pickle.dumps(trap, protocol=2))
    refused(path)
    assert not trapped.exists()
    pickle.loads(path.read_bytes())  # it would have
    assert trapped.exists()
