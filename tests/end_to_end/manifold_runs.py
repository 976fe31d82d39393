"""What the end-to-end tests of manifold_dividemix share: process starts, and what a run directory says."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300  # seconds a process may take, on a busy machine
# files that say when and where, or hold tensors in any order
TIMED = (
    "args.json",
    "log.csv",
    "result.csv",
    "result.json",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "encoder.safetensors",
)


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def start(*words: str | Path, cwd: Path = ROOT, **environment: str) -> Ended:
    """Start Python and wait for its end; one that hangs is killed with all processes that it started."""
    # one thread: side by side the processes do not slow each other down, and sums are always made in the same order
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=cwd, env={**variables, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return Ended(process.returncode, out, err)


def forked(script: str, log: Path, flags: list[str], *moments: str, **more: int | bool) -> list[dict]:
    """Jobs of `manifold_forked` that log to LOG.out and LOG.err: one that is killed at each moment, and one to the end."""
    job = {"script": script, "log": str(log), "flags": [*flags, "--out", str(log / "run")], **more}
    return [*({**job, "moment": moment} for moment in moments), job]


def run_jobs(jobs: list[dict]) -> list[int]:
    """The exit statuses of jobs of `manifold_forked`."""
    end = start("-m", "tests.end_to_end.manifold_forked", json.dumps(jobs))
    assert end.status == 0, end.err
    return [int(line.split()[1]) for line in end.out.splitlines() if line.startswith("status ")]


def wrong_copies(folder: Path) -> dict[str, str]:
    """An environment in which other copies of the packages are installed, which no script by path may take."""
    for package in ("manifold_dividemix", "common"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise SystemExit('the wrong copy')")
    return {"PYTHONPATH": str(folder)}


# run directories --------------------------------------------------------------------------------------------------------


def table(run: Path) -> list[dict[str, str]]:
    """The rows of the log."""
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> list[float]:
    """A column of the log, without empty cells."""
    return [float(row[name]) for row in table(run) if row[name] != ""]


def result(run: Path) -> dict:
    """What result.json says."""
    return json.loads((run / "result.json").read_text())


def state(run: Path) -> dict:
    """The state in the last checkpoint."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a run directory, but for its lock and the event file."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def differences(found: object, wanted: object, place: str = "") -> list[str]:
    """Where two states, as they are in checkpoints, are not the same to the last bit."""
    if isinstance(wanted, Tensor):
        same = isinstance(found, Tensor) and found.dtype == wanted.dtype and torch.equal(found, wanted)
        return [] if same else [place]
    if isinstance(wanted, dict | list) and type(found) is type(wanted) and len(found) == len(wanted):
        names = wanted if isinstance(wanted, dict) else range(len(wanted))
        if isinstance(wanted, dict) and found.keys() != wanted.keys():
            return [place]
        return [d for name in names for d in differences(found[name], wanted[name], f"{place}/{name}")]
    return [] if found == wanted else [place]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Log, result, weights, generators and what is known of the samples, in two runs of the same command."""
    assert log_without_seconds(found) == log_without_seconds(wanted)
    assert result_without_time_and_place(found) == result_without_time_and_place(wanted)
    assert differences(state(found), state(wanted)) == []
    ours, theirs = (
        {name: text for name, text in content_of(of).items() if name not in TIMED} for of in (found, wanted)
    )
    assert ours == theirs
