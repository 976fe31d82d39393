"""Checkpoints: what is saved comes back, damaged files fall back to their predecessor, nothing in them is run."""

import errno
import io
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from common.runs import checkpoint
from common.runs.cli import UserError
from common.runs.files import write_atomic
from tests.common.payload import Payload


def training_state(seed: int) -> dict:
    """A small training in the middle: every kind of object a state may hold."""
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), 0.1 + seed, momentum=0.9) for net in nets]
    generators = {"loader": torch.Generator().manual_seed(seed), "draws": np.random.default_rng(seed)}
    memory = {"moments": [None, None], "nested": {"mean": torch.full((2,), float(seed)), "epoch": seed}}
    state = {"nets": nets, "optimizers": optimizers, "memory": memory, "nothing": {}, **generators}
    step(state)
    return state


def step(state: dict) -> list[torch.Tensor]:
    """One step of both networks on drawn inputs. Returns their parameters and buffers after it."""
    for net, optimizer in zip(state["nets"], state["optimizers"], strict=True):
        inputs = torch.randn(8, 4, generator=state["loader"]) * float(state["draws"].random())
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    return [value.clone() for net in state["nets"] for value in net.state_dict().values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def folder(tmp_path):
    """A folder with the checkpoints of epoch 1 and, before it, epoch 0."""
    for epoch in (0, 1):
        checkpoint.save(tmp_path, {"epoch": epoch, "weights": torch.arange(1000.0) + epoch})
    return tmp_path


def test_a_restored_training_goes_on_exactly_as_the_saved_one(tmp_path):
    saved = training_state(seed=1)
    saved["memory"]["moments"] = [[torch.eye(2), torch.ones(3)], None]
    checkpoint.save(tmp_path, checkpoint.collect(saved))
    expected = [step(saved) for _ in range(3)]

    state = training_state(seed=2)
    before = [value.clone() for net in state["nets"] for value in net.state_dict().values()]
    checkpoint.restore(state, checkpoint.load(tmp_path))
    assert not equal(before, expected[0])
    assert all(equal(step(state), after) for after in expected)  # needs the momentum and both generators too
    assert state["optimizers"][0].param_groups[0]["lr"] == 1.1
    assert torch.equal(state["memory"]["moments"][0][0], torch.eye(2))
    assert state["memory"]["moments"][1] is None
    assert torch.equal(state["memory"]["nested"]["mean"], torch.ones(2))
    assert state["memory"]["nested"]["epoch"] == 1


def test_dictionaries_are_restored_in_place_with_exactly_the_saved_entries(tmp_path, capsys):
    assert checkpoint.load(tmp_path) is None and capsys.readouterr().err == "", "there is nothing to load"
    checkpoint.save(tmp_path, checkpoint.collect({"memory": {"kept": 1, "added": [2.5, None, "text"]}}))
    memory = {"kept": 0, "surplus": torch.ones(1)}
    checkpoint.restore({"memory": memory}, checkpoint.load(tmp_path))
    assert memory == {"kept": 1, "added": [2.5, None, "text"]}


@pytest.mark.parametrize("way", [KeyboardInterrupt, SystemExit, OSError])
def test_what_ends_a_script_while_it_saves_is_what_is_raised(way):
    class Interrupted(io.BytesIO):
        def write(self, content):
            raise way

    with pytest.raises(way):
        checkpoint.write({"weights": torch.zeros(1000)}, Interrupted())


def test_a_checkpoint_on_a_failing_disk_is_not_taken_for_a_damaged_one(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


TWO = checkpoint.collect([nn.Linear(2, 2), nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("state", "saved", "error", "reason"),
    [
        ([nn.Linear(2, 2)], TWO, ValueError, r"\b2\b.*\b1\b"),
        ([nn.Linear(2, 2) for _ in range(3)], TWO, ValueError, r"\b2\b.*\b3\b"),
        ({"peer": nn.Linear(2, 2)}, {}, ValueError, "peer"),
        ([3], [4], TypeError, "int"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, saved, error, reason):
    with pytest.raises(error, match=reason):
        checkpoint.restore(state, saved)


DAMAGES = {
    "empty": lambda content: b"",
    "head": lambda content: content[:64],
    "half": lambda content: content[: len(content) // 2],
    "all but one byte": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
}


def damage(path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_its_predecessor_and_without_one_is_refused(how, folder, capsys):
    damage(folder / "checkpoint.pt", how)
    found = checkpoint.load(folder)
    assert found["epoch"] == 0 and torch.equal(found["weights"], torch.arange(1000.0))
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {folder / 'checkpoint.pt'} ") and warning.count("\n") == 1
    for path in folder.iterdir():
        damage(path, how)
    for _ in ("the predecessor is damaged", "there is none"):
        with pytest.raises(UserError, match="no readable checkpoint") as refusal:
            checkpoint.load(folder)
        assert str(folder) in str(refusal.value)
        for path in folder.iterdir():
            path.unlink()
        checkpoint.save(folder, {"epoch": 1})
        damage(folder / "checkpoint.pt", how)


@pytest.mark.parametrize("form", ["archive", "old archive", "pickle"])
@pytest.mark.parametrize("call", [(os.system, "touch marker"), (open, "marker", "w")], ids=["system", "open"])
def test_a_checkpoint_with_code_in_it_is_reported_and_not_run(call, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    marker, path, payload = tmp_path / "marker", tmp_path / "checkpoint.pt", Payload(*call)
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save({"state": payload}, path, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(UserError, match="no readable checkpoint"):
        checkpoint.load(tmp_path)
    assert not marker.exists()
    assert str(path) in capsys.readouterr().err
    pickle.loads(pickle.dumps(payload))  # it would have been run
    assert marker.exists()


def failing(function, on_call: int = 1):
    """`function`, but its nth call raises OSError."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == on_call:
            raise OSError("no space left on device")
        return function(*arguments)

    return call


def half_saved(content, file):
    file.write(b"half a checkpoint")
    raise OSError("no space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_leaves_the_old_content_where_writing_fails(step, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, step, failing(getattr(os, step)))
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (torch, "save", half_saved),
        (os, "fsync", failing(os.fsync)),
        (os, "replace", failing(os.replace)),
        (os, "replace", failing(os.replace, on_call=2)),
    ],
    ids=["writing", "fsync", "first replace", "second replace"],
)
def test_a_save_that_fails_midway_leaves_the_old_checkpoint(module, name, broken, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(folder, {"epoch": 2})
    assert checkpoint.load(folder)["epoch"] == 1
    checkpoint.save(folder, {"epoch": 2})
    assert checkpoint.load(folder)["epoch"] == 2
    (folder / "checkpoint.pt").unlink()
    assert checkpoint.load(folder)["epoch"] == 1, "the checkpoint before"


def test_a_predecessor_that_stepped_in_survives_a_save_that_is_cut_short(folder, monkeypatch, capsys):
    (folder / checkpoint.CURRENT).write_bytes(b"")
    assert checkpoint.load(folder)["epoch"] == 0
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, "replace", failing(os.replace))
        checkpoint.save(folder, {"epoch": 2})
    assert checkpoint.load(folder)["epoch"] == 0
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "item", [np.float64(1), np.arange(2), np.random.RandomState(0), (1, 2), object()], ids=type
)
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(item):
    with pytest.raises(TypeError, match=type(item).__name__):
        checkpoint.collect({"state": [item]})


def test_the_warning_gives_a_reason_and_no_advice_to_load_unsafely(folder, capsys):
    torch.save({"x": object}, folder / checkpoint.CURRENT)
    checkpoint.load(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "more than tensors and plain data" in line and "weights_only" not in line
