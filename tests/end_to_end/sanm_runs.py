"""Starting SANM's scripts, and reading what they leave."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 400  # seconds a process may take, on a busy machine


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def start(*words: str | Path, cwd: Path = ROOT) -> Ended:
    """Run Python with these words. One thread, so that sums are always made in the same order."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    return Ended(process.returncode, process.stdout, process.stderr)


def table(run: Path, name: str = "log.csv") -> list[dict[str, str]]:
    """The rows of a CSV of a run."""
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def result(run: Path) -> dict:
    """result.json."""
    return json.loads((run / "result.json").read_text())


def state(run: Path) -> dict:
    """The state in the last checkpoint."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def same_state(one: dict, other: dict) -> bool:
    """Whether two dictionaries of tensors are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
