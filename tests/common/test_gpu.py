"""Device and precision on a machine without a card (a card that is there is hidden)."""

import ctypes
import itertools
import os
import platform
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from afm import train as afm
from common.gpu.device import SLOW_BF16, Device, exact_products, home, keep_freed_memory, pick, put, sgd, wide
from common.runs.cli import UserError
from tests.lines import refused


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
    no_card, monkeypatch, capsys, device, reason, precision, fidelity, chosen, why
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", Mock(side_effect=["AVX2", "AVX512"]))
    picked = pick(device, precision, fidelity=fidelity)
    assert (picked.device, picked.precision) == (torch.device("cpu"), chosen)
    warned = f"{SLOW_BF16}\n" if chosen == "bf16" else ""
    assert capsys.readouterr() == (f"device cpu ({reason}), precision {chosen} ({why})\n", warned)
    pick(device, precision, fidelity=fidelity)
    assert not capsys.readouterr().err
    assert picked.peak_memory_mb() is None


@pytest.fixture
def cards(monkeypatch):
    """Two cards as far as `pick` looks; what it switches in torch is put back afterwards."""
    answers = {"is_available": True, "device_count": 2, "get_device_name": "a card", "set_device": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=answer))
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    usual = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(usual)


@pytest.mark.parametrize(
    ("capability", "fidelity", "precision", "chosen", "why"),
    [
        ((8, 0), "paper", "auto", "bf16", "the default on CUDA"),
        ((9, 0), "paper", "auto", "bf16", "the default on CUDA"),
        ((7, 5), "paper", "auto", "fp32", "compute capability 7.5 has no fast bfloat16"),
        ((7, 5), "paper", "bf16", "bf16", "asked for"),
        ((8, 0), "released", "auto", "fp32", "as released"),
        ((8, 0), "released", "bf16", "bf16", "asked for"),
        ((8, 0), "released", "fp32", "fp32", "asked for"),
        ((8, 0), "paper", "fp32", "fp32", "asked for"),
    ],
)
def test_older_cards_and_the_releases_train_in_float32_without_tf32_unless_another_is_typed(
    cards, monkeypatch, capsys, capability, fidelity, precision, chosen, why
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    torch.backends.cudnn.allow_tf32 = chosen != "bf16"
    picked = pick("auto", precision, 1, fidelity=fidelity)
    torch.cuda.set_device.assert_called_once_with(1)
    assert picked.device == torch.device("cuda", 1) and picked.precision == chosen
    assert capsys.readouterr().out == f"device cuda:1 (a card, found), precision {chosen} ({why})\n"
    assert torch.backends.cudnn.allow_tf32 == (chosen == "bf16")
    assert torch.get_float32_matmul_precision() == ("high" if chosen == "bf16" else "highest")


@pytest.mark.parametrize("index", [0, 3])
def test_asking_for_a_card_that_is_not_there_is_an_error(no_card, capsys, index):
    with pytest.raises(UserError, match=rf"--device cuda: there is no CUDA device {index} \(found 0\)"):
        pick("cuda", index=index)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("precision", "line"),
    [
        ("auto", "--device mps: this torch has no MPS device; use --device cpu"),
        ("bf16", "--precision bf16: --device mps has fp32 alone; use --precision fp32, or --device cpu"),
    ],
)
def test_what_mps_cannot_do_is_one_line(precision, line, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: precision == "bf16")
    monkeypatch.chdir(tmp_path)
    words = ["--preset", "embedded/digits-sym0.5/afm-k2", "--device", "mps", "--precision", precision]
    assert refused(capsys, afm.main, *words).endswith(f": error: {line}\n")
    assert not [*tmp_path.iterdir()]


def test_mps_is_picked_if_asked_for_and_keeps_draws_and_float64_on_the_cpu(no_card, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick("auto").device == torch.device("cpu")
    picked = pick("mps")
    assert (picked.device, picked.precision, picked.on_cuda()) == (torch.device("mps"), "fp32", False)
    assert "never run on an Apple machine" in capsys.readouterr().out
    assert home(picked.device) == picked.generator(1).device == torch.device("cpu")
    cpu = torch.device("cpu")
    assert put(wide(torch.ones(2)), cpu).dtype == torch.float64
    monkeypatch.setattr(torch.Tensor, "to", lambda values, device: (values.dtype, device))
    assert put(torch.ones(2, dtype=torch.float64), picked.device) == (torch.float32, picked.device)


def test_fused_sgd_takes_parameters_that_get_their_first_gradient_later():
    def trained(fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        first, later = nn.Linear(2, 2), nn.Linear(2, 2)
        parameters = [*first.parameters(), *later.parameters()]
        optimizer = sgd(parameters, 0.1, 0.9, weight_decay=1e-3, fused=fused)
        for step in range(5):
            optimizer.zero_grad(set_to_none=True)
            outputs = [layer(torch.ones(1, 2)).square().sum() for layer in (first, later)]
            (sum(outputs) if step > 1 else outputs[0]).backward()
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    torch.testing.assert_close(trained(True), trained(False))


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
    state = Device(torch.device("cpu"), "fp32", "test").prepare(network, compiled).state_dict()
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    assert list(state) == list(before)
    assert state["0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_compiled_network_trains_on_several_passes_after_more_variants_than_torch_compiles_by_default():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    network.compile = partial(network.compile, backend="aot_eager")
    Device(torch.device("cpu"), "fp32", "test").prepare(network, compiled=True)
    for mode, gradients, casts in itertools.product((True, False), repeat=3):
        network.train(mode)
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=casts):
            network(torch.randn(16, 1, 8, 8))
    network.train()
    sum(network(torch.randn(rows, 1, 8, 8)).sum() for rows in (4, 16)).backward()
    assert all(weight.grad is not None for weight in network.parameters())


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_memory_that_a_run_on_the_cpu_frees_stays_with_the_process(no_card, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    pick("cpu")
    values = torch.ones(2**25)  # 128 MiB
    before = resident_pages()
    del values
    assert before - resident_pages() < 2**10  # of 2^15


def test_settings_of_glibc_in_the_environment_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(ctypes, "CDLL", Mock())
    keep_freed_memory()
    assert ctypes.CDLL.call_count == 0
