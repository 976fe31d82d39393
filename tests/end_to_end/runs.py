"""What the end-to-end tests share: starts of processes, what a run directory says, and what two runs must have in common."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from common.runs.label_quality import COLUMNS, NAME

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 3600  # seconds until a process counts as hanging; on a busy machine they take long
# files that say when and where, or hold tensors in any order
TIMED = {"args.json", "log.csv", "result.csv", "result.json", "checkpoint.pt", "checkpoint.previous.pt"}
TIMED |= {"encoder.safetensors"}


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def start(*words: str | Path, cwd: Path = ROOT, **environment: str) -> Ended:
    """Start Python and wait for its end; one that hangs is killed with all processes that it started."""
    # one thread: side by side the processes do not slow each other down, and sums are always made in the same order
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**variables, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return Ended(process.returncode, out, err)


def jobs_of(script: str, folder: Path, flags: list[str], *moments: str, **more: int | bool) -> list[dict]:
    """Jobs of `forked` that log to FOLDER/log and run in FOLDER/run: one to each moment, and one to the end.

    Run directories have the same last name: it is a column of the results.
    """
    folder.mkdir(exist_ok=True)
    flags = [*flags, "--out", str(folder / "run")]
    job = {"script": script, "log": str(folder / "log"), "flags": flags, **more}
    return [{**job, "moment": moment} for moment in (*moments, "")]


def whole_and_killed(script: str, base: Path, flags: list[str], *moments: str) -> list[dict]:
    """Jobs to the end, in BASE/whole; in BASE/killed killed at each moment and resumed, also when finished."""
    killed = jobs_of(script, base / "killed", flags, *moments)
    return [*jobs_of(script, base / "whole", flags), *killed, killed[-1]]


def run_jobs(jobs: list[dict]) -> list[list[int]]:
    """The exit statuses of the processes of each job."""
    end = start("-m", "tests.end_to_end.forked", json.dumps(jobs))
    assert end.status == 0, end.err
    found = [line.split()[1:] for line in end.out.splitlines() if line.startswith("status ")]
    return [[int(word) for word in words] for words in found]


def printed(folder: Path) -> tuple[str, str]:
    """What the jobs of a folder printed: standard output, standard error."""
    return (folder / "log.out").read_text(), (folder / "log.err").read_text()


def resumed(out: str) -> list[int]:
    """The epochs that the starts of a run found finished."""
    return [int(epoch) for epoch in re.findall(r"resuming after epoch (\d+)\n", out)]


def table(run: Path, name: str = "log.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> list[float]:
    """A column of the log, without empty cells."""
    return [float(row[name]) for row in table(run) if row[name] != ""]


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def state(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def arrays(run: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(run / f"{name}.npz", allow_pickle=False))


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a run directory, but for its lock and the event file."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def label_quality(folder: Path) -> pd.DataFrame:
    """label_quality.csv of a run, with the checks that hold for every method."""
    found = pd.read_csv(folder / NAME)
    assert tuple(found) == COLUMNS
    assert found["index"].tolist() == np.load(folder / "train_index.npy").tolist()
    assert found.given_label.tolist() == np.load(folder / "noisy_labels.npy").tolist()
    for name in ("score", "predicted_probability"):
        assert found[name].between(0, 1).all(), name
    assert found.selected.dropna().isin((0, 1)).all() and found.ood_score.dropna().between(0, 1).all()
    if found.path.notna().any():
        assert all(Path(path).is_file() for path in found.path) and found.path.is_unique
        assert found.given_class.notna().all()
    return found


def auroc(found: pd.DataFrame) -> float:
    return roc_auc_score(found.given_label == found.true_label, found.score)


def log_without_seconds(folder: Path) -> list[str]:
    """The lines of log.csv but for their last column."""
    lines = (folder / "log.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds")
    return [line.rpartition(",")[0] for line in lines]


def result_without_time_and_place(folder: Path) -> dict:
    """result.json but for timing, command and commit."""
    found = result(folder)
    del found["timing"], found["command"]
    del found["environment"]["git"]  # a commit may come between two runs
    return found


def differences(found: object, wanted: object, place: str = "") -> list[str]:
    """Where two states, as they are in checkpoints, are not the same to the last bit."""
    if isinstance(wanted, Tensor):
        same = isinstance(found, Tensor) and found.dtype == wanted.dtype and torch.equal(found, wanted)
        return [] if same else [place]
    kind = dict if isinstance(wanted, dict) else list
    if isinstance(wanted, kind) and isinstance(found, kind) and len(found) == len(wanted):
        names = wanted if isinstance(wanted, dict) else range(len(wanted))
        if isinstance(wanted, dict) and found.keys() != wanted.keys():
            return [place]
        return [d for name in names for d in differences(found[name], wanted[name], f"{place}/{name}")]
    return [] if found == wanted else [place]


def same_files(found: Path, wanted: Path) -> bool:
    """Whether the files are the same, but for those that say when and where."""
    ours, theirs = ({n: c for n, c in content_of(of).items() if n not in TIMED} for of in (found, wanted))
    for name in [name for name in theirs if name.endswith(".pt")]:  # whose bytes may differ
        assert differences(*(torch.load(of / name, weights_only=True) for of in (found, wanted))) == [], name
        del ours[name], theirs[name]
    return ours == theirs


def assert_same_run(found: Path, wanted: Path) -> None:
    """Log, result, weights, generators and what is known of the samples, in two runs of the same command."""
    assert log_without_seconds(found) == log_without_seconds(wanted)
    assert result_without_time_and_place(found) == result_without_time_and_place(wanted)
    assert differences(state(found), state(wanted)) == []
    assert same_files(found, wanted)


def assert_survived(
    folder: Path, wanted: Path, statuses: list[list[int]], moments: tuple, gone_on: tuple
) -> None:
    """The run in FOLDER/run, killed at each moment and left alone at last, ended as if nothing had happened.

    gone_on: the epochs that the starts found finished; a start more than moments and one is that of the finished run.
    """
    out, err = printed(folder)
    again = len(statuses) - len(moments)
    assert statuses == [[-9]] * len(moments) + [[0]] * again, err
    assert all(line.startswith("warning: ") for line in err.splitlines()), err
    assert resumed(out) == list(gone_on)
    if again == 2:  # the last start had nothing to do
        assert "\nepoch " not in out.rpartition("resuming after epoch")[2]
    assert_same_run(folder / "run", wanted)


def assert_close_logs(found: Path, wanted: Path, loss: float, rest: float = 0) -> None:
    """The logs agree: losses within a relative tolerance, everything else within `rest`."""
    for row, other in zip(table(found), table(wanted), strict=True):
        assert row.keys() == other.keys()
        for name in other.keys() - {"seconds"}:
            ours, theirs = (float(of[name] or "nan") for of in (row, other))
            tolerance = loss if name.endswith("loss") else rest
            assert ours == pytest.approx(theirs, rel=tolerance, abs=0, nan_ok=True), (name, other["epoch"])
