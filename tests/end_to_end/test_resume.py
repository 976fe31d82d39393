"""Train_cifar.py killed, stopped or damaged, and started again with the same command: nothing is lost and nothing differs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 5  # two of warm-up, so the first selection is in epoch 3
FLAGS = f"--dataset digits --imb_factor 0.1 --num_epochs {EPOCHS} --warm_up 2 --batch_size 64 --device cpu".split()
KILLS = ("1:training", "3:log", "5:training")
STOPS = ("1:log:SIGTERM", "3:training:SIGINT")


class Ended(NamedTuple):
    """The exit status of a process, and what it printed on both streams."""

    status: int
    text: str


def run_all(*jobs: tuple[str | None, Path, *tuple[str, ...]]) -> list[Ended]:
    """The script for each (moment of a signal or None, run directory, more flags): see `forked`."""
    words = json.dumps([(moment, [*FLAGS, "--out", str(folder), *more]) for moment, folder, *more in jobs])
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.forked", words, "sfa.Train_cifar"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=True,
    )  # fmt: skip
    texts = re.split(r"^status (-?\d+)\n", done.stdout, flags=re.MULTILINE)
    return [Ended(int(status), text) for text, status in zip(texts[::2], texts[1::2], strict=False)]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """NAME/run are run directories: all have the same last name, which is a column of the results."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ends(base) -> dict[str, list[Ended]]:
    """How the processes ended, by name: signalled ones first, and then all that start again."""
    killed, damaged, stopped, whole, other = (
        base / name / "run" for name in ("killed", "damaged", "stopped", "whole", "other")
    )
    first = run_all(
        (None, whole), *((moment, killed) for moment in KILLS), *((moment, stopped) for moment in STOPS)
    )
    shutil.copytree(killed, damaged)
    content = (damaged / "checkpoint.pt").read_bytes()
    (damaged / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    for folder in (other, base / "before" / "run"):
        shutil.copytree(whole, folder)
    again = run_all(
        *((None, folder) for folder in (killed, damaged, stopped, whole)), (None, other, "--lr", "0.01")
    )
    names = ("killed", "damaged", "stopped", "whole", "other")
    signalled = {"whole": first[:1], "killed": first[1:4], "stopped": first[4:]}
    return {name: [*signalled.get(name, []), end] for name, end in zip(names, again, strict=True)}


def assert_same_outcome(found: Path, wanted: Path) -> None:
    assert log_without_seconds(found) == log_without_seconds(wanted)
    assert len(log_without_seconds(found)) == 1 + EPOCHS
    assert result_without_time_and_place(found) == result_without_time_and_place(wanted)
    for name in ("noisy_labels.npy", "train_index.npy", "label_quality.csv"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    ours, theirs = (np.load(run / "clean_probability.npz") for run in (found, wanted))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.files)


def resumed(end: Ended) -> list[int]:
    return [int(epoch) for epoch in re.findall(r"resuming after epoch (\d+)\n", end.text)]


def test_a_run_killed_at_several_moments_ends_as_if_nothing_had_happened(base, ends):
    assert [end.status for end in ends["killed"]] == [-9, -9, -9, 0], ends["killed"]
    assert [resumed(end) for end in ends["killed"]] == [[], [0], [2], [4]]
    assert_same_outcome(base / "killed" / "run", base / "whole" / "run")


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_ends_the_same(base, ends):
    [end] = ends["damaged"]
    assert end.status == 0 and resumed(end) == [3], end.text
    assert end.text.count("warning: ") == 1 and f"warning: {base / 'damaged/run/checkpoint.pt'} " in end.text
    assert_same_outcome(base / "damaged" / "run", base / "whole" / "run")


def test_signals_end_a_run_with_one_line_and_it_resumes_to_the_same_end(base, ends):
    *stops, last = ends["stopped"]
    assert [end.status for end in (*stops, last)] == [143, 130, 0], ends["stopped"]
    for end, line in zip(stops, ("SIGTERM: stopped; {} 1\n", "SIGINT: stopped; {} 2\n"), strict=True):
        assert end.text.endswith(line.format("the same command resumes after epoch"))
    assert [resumed(end) for end in (*stops, last)] == [[], [1], [2]]
    assert_same_outcome(base / "stopped" / "run", base / "whole" / "run")


def test_a_finished_run_started_again_changes_nothing(base, ends):
    first, again = ends["whole"]
    assert first.status == again.status == 0 and resumed(again) == [EPOCHS] and "\nepoch " not in again.text
    after, before = (content_of(base / name / "run") for name in ("whole", "before"))
    for name in (
        "log.csv",
        "result.json",
        "result.csv",
        "noise.json",
        "noisy_labels.npy",
        "checkpoint.pt",
        "label_quality.csv",
    ):
        assert after[name] == before[name]


def test_another_learning_rate_in_the_same_directory_is_refused_and_changes_nothing(base, ends):
    [end] = ends["other"]
    assert end.status == 2 and "lr was 0.02, now 0.01" in end.text.splitlines()[-1]
    assert content_of(base / "other" / "run") == content_of(base / "before" / "run")
