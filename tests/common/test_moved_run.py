"""Runs that move between kinds of devices."""

from argparse import Namespace

import pytest
import torch

from common.gpu.device import Device
from common.runs import checkpoint
from common.runs.cli import UserError
from common.runs.run import Run

CELL = {"dataset": "digits", "noise_type": "sym", "noise_rate": 0.5, "imb_factor": None, "ood_ratio": None}


def open_run(folder, device="cpu", resume="auto"):
    args = Namespace(out=str(folder), num_epochs=3, seed=1, fidelity="paper", preset=None)
    args.device, args.resume = device, resume
    cpu = Device(torch.device("cpu"), "fp32", "a test")
    return Run(args, cpu, paper="sfa", method="SFA", name="name", cell=CELL | {"profile": "short"})


def one_epoch(run, state):
    run.resume(state)
    for epoch in run.epochs(1):
        state["generator"].initial_seed()
        torch.rand(3, generator=state["generator"])
        run.log(epoch, test_accuracy=1.0)
    run.release()


@pytest.fixture
def trained_on_a_card(tmp_path):
    """The folder of a run of one epoch whose checkpoint says that it is of a card."""
    one_epoch(open_run(tmp_path), {"generator": torch.Generator().manual_seed(1), "step": 7})
    saved = checkpoint.load(tmp_path)
    saved["state"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # as long as a CUDA generator's state
    checkpoint.save(tmp_path, saved | {"device": "cuda", "cuda_generators": []})
    return tmp_path


def test_a_run_of_another_kind_of_device_is_refused_or_resumed_anyway_with_fresh_generators(
    trained_on_a_card, capsys
):
    run = open_run(trained_on_a_card)
    line = r"was trained on cuda, and this is cpu: .*--device cuda, or --resume anyway"
    with pytest.raises(UserError, match=line):
        run.resume({"generator": torch.Generator(), "step": 0})
    run.release()
    run = open_run(trained_on_a_card, resume="anyway")
    state = {"generator": torch.Generator().manual_seed(5), "step": 0}
    run.resume(state)
    assert state["step"] == 7 and len(run.rows) == 1
    assert torch.equal(state["generator"].get_state(), torch.Generator().manual_seed(5).get_state())
    assert "resumed on cpu after 1 epochs on cuda, with fresh random generators" in capsys.readouterr().out
    run.release()


def test_the_device_flag_may_change_between_starts(tmp_path):
    for device in ("auto", "cpu"):
        run = open_run(tmp_path, device)
        one_epoch(run, {"generator": torch.Generator().manual_seed(1)})
        assert [row["epoch"] for row in run.rows] == [1]  # the second start resumes the first one's run
