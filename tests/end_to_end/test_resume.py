"""Train_cifar.py killed, stopped or damaged, and started again with the same command: nothing is lost and nothing differs.

A process start costs seconds, so the runs that several tests look at are made once, two at a time.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 7  # two of warm-up, so the first selection is in epoch 3
FLAGS = f"--dataset digits --imb_factor 0.1 --num_epochs {EPOCHS} --warm_up 2 --batch_size 64".split()
DEADLINE = 120  # seconds a process may take, on a busy machine


class Ended(NamedTuple):
    """How a process ended, and how many epochs the log had when it was sent its signal."""

    status: int
    out: str
    err: str
    logged: int | None = None


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "sfa/Train_cifar.py", *FLAGS, "--out", str(folder), *more]
    # one thread: side by side the processes do not slow each other down, and sums are always made in the same order
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, logged: int | None = None) -> Ended:
    """Wait for the end of a process; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return Ended(process.returncode, out, err, logged)


def epochs_logged(folder: Path) -> int:
    log = folder / "log.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def signalled(folder: Path, number: signal.Signals, epochs: int) -> Ended:
    """Start the command, and send the signal as soon as the log has that many epochs."""
    process = start(folder)
    deadline = time.monotonic() + DEADLINE
    while epochs_logged(folder) < epochs and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    logged = epochs_logged(folder)
    process.send_signal(number)
    return finish(process, logged)


# the runs ---------------------------------------------------------------------------------------------------------------


def kill_again_and_again(folder: Path) -> dict:
    """Killed in warm-up, at the first selection epoch and later; then finished, and finished from a damaged copy too."""
    killed = [signalled(folder, signal.SIGKILL, epochs) for epochs in (1, 3, 5)]
    copy = folder.parent / "damaged" / folder.name
    shutil.copytree(folder, copy)
    content = (copy / "checkpoint.pt").read_bytes()
    (copy / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    both = start(folder), start(copy)
    return {"killed": killed, "last": finish(both[0]), "damaged": finish(both[1]), "copy": copy}


def stop_and_stop(folder: Path) -> dict:
    """Stopped by SIGTERM, later by Ctrl-C, then finished."""
    ends = {}
    for number, epochs in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):
        ends[number] = signalled(folder, number, epochs)
        ends[number, "checkpoint"] = (folder / "checkpoint.pt").exists()
    return {**ends, "last": finish(start(folder))}


def start_again(folder: Path) -> dict:
    """Run to the end without interruption, then started again as it was, and a copy of it with another learning rate."""
    first = finish(start(folder))
    copy = folder.parent / "copy" / folder.name
    shutil.copytree(folder, copy)
    before = content_of(folder)
    again, other = start(folder), start(copy, "--lr", "0.01")
    ends = {"first": first, "again": finish(again), "other": finish(other)}
    return ends | {"before": before, "after": content_of(folder), "copy": content_of(copy)}


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Scenario(NamedTuple):
    folder: Path
    future: Future

    @property
    def ends(self) -> dict:
        return self.future.result()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """name -> Scenario. All directories have the same last name: it is a column of the results."""
    base = tmp_path_factory.mktemp("resume")
    with ThreadPoolExecutor(2) as pool:
        yield {
            make.__name__: Scenario(base / make.__name__ / "run", pool.submit(make, base / make.__name__ / "run"))
            for make in (kill_again_and_again, stop_and_stop, start_again)
        }  # fmt: skip


@pytest.fixture(scope="module")
def killed(scenarios):
    return scenarios["kill_again_and_again"]


@pytest.fixture(scope="module")
def stopped(scenarios):
    return scenarios["stop_and_stop"]


@pytest.fixture(scope="module")
def reference(scenarios):
    return scenarios["start_again"]


# what they leave --------------------------------------------------------------------------------------------------------


def assert_same_outcome(folder: Path, reference: Scenario) -> None:
    assert reference.ends["first"].status == 0, reference.ends["first"].err
    expected = log_without_seconds(reference.folder)
    assert len(expected) == 1 + EPOCHS
    assert log_without_seconds(folder) == expected
    assert result_without_time_and_place(folder) == result_without_time_and_place(reference.folder)
    for name in ("noisy_labels.npy", "train_index.npy"):
        assert (folder / name).read_bytes() == (reference.folder / name).read_bytes()
    found, wanted = (np.load(f / "clean_probability.npz") for f in (folder, reference.folder))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted.files)


def test_a_run_killed_at_several_moments_ends_as_if_nothing_had_happened(killed, reference):
    ends = killed.ends
    for end, epochs in zip(ends["killed"], (1, 3, 5), strict=True):
        assert end.status == -signal.SIGKILL, end.err
        assert epochs <= end.logged < EPOCHS
    for end, before in zip([*ends["killed"][1:], ends["last"]], ends["killed"], strict=True):
        went_on = "going on after epoch " in end.out
        assert went_on or before.logged == 1  # killed before the first checkpoint, it may start again
    assert ends["last"].status == 0, ends["last"].err
    assert ends["last"].err == ""
    assert_same_outcome(killed.folder, reference)


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_ends_the_same(killed, reference):
    end, copy = killed.ends["damaged"], killed.ends["copy"]
    assert end.status == 0, end.err
    assert end.err.startswith(f"warning: {copy / 'checkpoint.pt'} ") and end.err.count("\n") == 1
    assert "going on after epoch " in end.out
    assert_same_outcome(copy, reference)


@pytest.mark.parametrize(("number", "status", "epochs"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 3)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_one_line(number, status, epochs, stopped):
    end = stopped.ends[number]
    assert end.status == status, end.err
    assert end.err.count("\n") == 1 and end.err.startswith(f"{number.name}: stopped")
    assert epochs <= end.logged < EPOCHS
    assert stopped.ends[number, "checkpoint"]


def test_a_run_stopped_by_signals_ends_as_if_nothing_had_happened(stopped, reference):
    assert stopped.ends["last"].status == 0, stopped.ends["last"].err
    assert "going on after epoch " in stopped.ends["last"].out
    assert_same_outcome(stopped.folder, reference)


def test_a_finished_run_started_again_changes_nothing(reference):
    ends = reference.ends
    assert ends["again"].status == 0, ends["again"].err
    assert f"going on after epoch {EPOCHS}" in ends["again"].out
    assert "\nepoch " not in ends["again"].out
    for name in ("log.csv", "result.json", "result.csv", "noise.json", "noisy_labels.npy", "checkpoint.pt"):
        assert ends["after"][name] == ends["before"][name]


def test_another_learning_rate_in_the_same_directory_is_refused_and_changes_nothing(reference):
    ends = reference.ends
    assert ends["other"].status == 2
    assert ends["other"].err.count("\n") == 1
    assert "lr was 0.02, now 0.01" in ends["other"].err
    assert ends["copy"] == ends["before"]
