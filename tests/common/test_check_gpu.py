"""`make check-gpu` on the pretend card: what agrees is ok, planted faults are found, and without a card it says so."""

import csv
from pathlib import Path

import pytest
import torch
from torchvision.io import decode_jpeg

from common.gpu import augment
from common.gpu.device import Device
from sfa import losses as sfa_losses
from tests import check_gpu
from tests.pretend_card import PretendCard, usable

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not usable(), reason="a card is there, or this torch has no CUDA in it")
CARD = Device(torch.device("cuda", 0), "bf16", "tests")


@pytest.fixture
def card():
    with PretendCard(ROOT) as pretend:
        yield pretend


@pytest.mark.slow
def test_all_that_agrees_is_ok(card):
    checks = [*check_gpu.steps(CARD, 8, 8), *check_gpu.views(CARD, 4)]
    checks += [check for check in check_gpu.recorded(CARD, 8, 8) if check.check != "--compile"]
    assert [check for check in checks if check.status != "ok"] == []
    assert len(checks) == 2 * 9 + 5 + len(check_gpu.RECORDED)
    rows = list(csv.DictReader(check_gpu.to_csv(checks, "pretended").decode().splitlines()))
    assert [row["what"] for row in rows] == [check.what for check in checks]
    assert {row["device"] for row in rows} == {"pretended"}


def test_a_wrong_view_differs(card, monkeypatch):
    def wrong(images, generator):
        return augment.crop_and_flip(images, generator).bitwise_xor(int(images.is_cuda))

    monkeypatch.setattr(check_gpu, "VIEWS", {"wrong": wrong})
    [check] = check_gpu.views(CARD, 4)
    assert (check.status, check.what) == ("differs", "wrong") and "12288 of 12288" in check.detail


def test_files_decoded_on_the_card_are_compared_with_the_cpus(card, monkeypatch, tmp_path):
    usual = decode_jpeg
    for more, status in ((0, "ok"), (5, "differs")):

        def as_nvjpeg(files, mode, device, more=more):
            return [usual(file, mode=mode).add(more).to(device) for file in files]

        monkeypatch.setattr("torchvision.io.decode_jpeg", as_nvjpeg)
        [check] = check_gpu.decoded(CARD, tmp_path / status)
        assert (check.status, check.what) == (status, "--decode gpu"), check.detail


def test_a_step_that_fails_does_not_hide_the_others(card, monkeypatch):
    steps = {name: check_gpu.STEPS[name] for name in ("SFA warm-up", "Me-Momentum")}
    monkeypatch.setattr(check_gpu, "STEPS", steps)
    usual = sfa_losses.warm_up_loss

    def mixed_up(standard, *rest):
        return usual(standard, *rest) + (standard.sum() * torch.ones(1) if standard.is_cuda else 0)

    monkeypatch.setattr("sfa.training.warm_up_loss", mixed_up)
    checks = list(check_gpu.steps(CARD, 8, 8))
    assert [(check.what, check.status) for check in checks] == [
        ("SFA warm-up", "failed"),
        ("SFA warm-up", "failed"),
        ("Me-Momentum", "ok"),
        ("Me-Momentum", "ok"),
    ]
    assert "Expected all tensors to be on the same device" in checks[0].detail


@pytest.mark.parametrize(
    ("found", "status"), [([1.0, 2.0], "ok"), ([1.0, 2.1], "differs"), ([1.0, float("nan")], "differs")]
)
def test_losses_are_compared_to_a_tolerance(found, status):
    assert check_gpu.compared("a", "b", torch.tensor(found), torch.tensor([1.0, 2.0]), 1e-3).status == status


def test_without_a_card_it_is_one_line(capsys):
    with pytest.raises(check_gpu.UserError, match="no CUDA device is here"):
        check_gpu.main([])
