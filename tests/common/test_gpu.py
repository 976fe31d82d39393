"""Device and precision on a machine without a card (a card that is there is hidden)."""

import pytest
import torch
from torch import nn

from common.gpu.device import Device, exact_products, pick
from common.runs.cli import UserError


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("device", "reason"), [("cpu", "asked for"), ("auto", "no CUDA device 0 found")])
@pytest.mark.parametrize(
    ("precision", "fidelity", "chosen", "why"),
    [
        ("auto", "paper", "fp32", "the default on CPU"),
        ("auto", "released", "fp32", "as released"),
        ("bf16", "paper", "bf16", "asked for"),
    ],
)
def test_without_a_card_cpu_is_picked_and_the_reason_printed(
    no_card, capsys, device, reason, precision, fidelity, chosen, why
):
    picked = pick(device, precision, fidelity=fidelity)
    assert (picked.device, picked.precision) == (torch.device("cpu"), chosen)
    assert capsys.readouterr().out == f"device cpu ({reason}), precision {chosen} ({why})\n"
    assert picked.peak_memory_mb() is None


@pytest.fixture
def a_card(monkeypatch):
    """A card as far as `pick` looks; what it switches in torch is put back afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    usual = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(usual)


@pytest.mark.parametrize(
    ("fidelity", "precision", "chosen", "why"),
    [
        ("paper", "auto", "bf16", "the default on CUDA"),
        ("released", "auto", "fp32", "as released"),
        ("released", "bf16", "bf16", "asked for"),
        ("released", "fp32", "fp32", "asked for"),
        ("paper", "fp32", "fp32", "asked for"),
    ],
)
def test_on_a_card_the_released_precision_is_float32_without_tf32_unless_another_is_typed(
    a_card, capsys, fidelity, precision, chosen, why
):
    torch.backends.cudnn.allow_tf32 = chosen != "bf16"
    picked = pick("auto", precision, fidelity=fidelity)
    assert picked.device == torch.device("cuda", 0) and picked.precision == chosen
    line = f"device cuda:0 (a card, found), precision {chosen} ({why})\n"
    assert capsys.readouterr().out == line
    assert torch.backends.cudnn.allow_tf32 == (chosen == "bf16")
    assert torch.get_float32_matmul_precision() == ("high" if chosen == "bf16" else "highest")


@pytest.mark.parametrize("index", [0, 3])
def test_asking_for_a_card_that_is_not_there_is_an_error(no_card, capsys, index):
    with pytest.raises(UserError, match=rf"--device cuda: there is no CUDA device {index} \(found 0\)"):
        pick("cuda", index=index)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_multiplies_in_the_picked_precision(precision, dtype):
    picked, a = pick("cpu", precision), torch.eye(3)
    with picked.autocast():
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prepare_keeps_the_names_and_values_of_the_state(compiled):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    prepared = Device(torch.device("cpu"), "fp32", "test").prepare(network, compiled)
    state = prepared.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert state["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_exact_products_end_with_what_was_before_them_also_after_an_error():
    usual = torch.get_float32_matmul_precision()
    try:
        for before in ("high", "highest"):
            torch.set_float32_matmul_precision(before)
            with exact_products():
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == before
            with pytest.raises(RuntimeError), exact_products():
                raise RuntimeError
            assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(usual)
