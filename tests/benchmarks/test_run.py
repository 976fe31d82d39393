"""The table runner: which cells there are, what it starts, and what it says when a run fails."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.cells import PAPERS, PROFILES, ROOT, cells
from common.cli import UserError, read_presets
from common.results import COLUMNS


@pytest.mark.parametrize("paper", PAPERS)
def test_every_preset_is_a_cell_of_one_profile_and_of_its_shortened_form(paper):
    names = {profile: [cell.preset for cell in cells(paper, profile)] for profile in PROFILES}
    assert sorted(names["embedded"] + names["paper"]) == sorted(read_presets(ROOT / paper / "presets.toml"))
    assert names["short"] == names["paper"]
    assert names["embedded"] and names["paper"]


def test_an_unknown_cell_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"nosuch.*digits"):
        cells("sfa", "embedded", ["nosuch"])


def test_commands_name_paths_relative_to_the_repository_where_they_lie_in_it(tmp_path):
    cell = cells("sfa", "embedded")[0]
    inside = run.make_task(
        cell, 1, ROOT / "results" / "runs", ROOT / "data", ["--device", "cpu", "--lr", "0.1"]
    )
    words = inside.commands[0][1]
    assert words[words.index("--out") + 1] == "results/runs/digits-if0.1-imb0.5/seed1-device-cpu-lr-0.1"
    assert words[-4:] == ["--device", "cpu", "--lr", "0.1"]
    assert inside.commands[1][1][-2:] == ["--device", "cpu"], "the baseline runs where the method runs"
    joined = run.make_task(cell, 1, ROOT / "results", ROOT, ["--device=cpu", "--lr=0.1"])
    assert joined.commands[1][1][-1] == "--device=cpu"
    outside = run.make_task(cell, 1, tmp_path, tmp_path, [])
    assert outside.commands[0][1][-1] == str(tmp_path)


def start(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.run", "sfa", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A whole table at the size of a test: one cell, one seed, three epochs."""
    out = tmp_path_factory.mktemp("results")
    return out, start("--out", str(out), "--seeds", "4", "--num_epochs", "3", "--warm_up", "1")


def test_a_table_is_a_csv_a_comparison_and_a_figure(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    with (out / "sfa.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {(r["method"], r["metric"]) for r in rows} >= {
        (m, n) for m in ("SFA", "CE") for n in ("best", "last", "last10")
    }
    assert {r["seed"] for r in rows} == {"4"} and {r["profile"] for r in rows} == {"embedded"}
    assert {r["epochs"] for r in rows} == {"3"}, "the baseline takes the method's epochs"
    assert (out / "sfa.png").read_bytes().startswith(b"\x89PNG")
    assert "every method against cross-entropy" in process.stdout


def test_the_baseline_trains_on_the_very_labels_of_the_method(finished):
    (folder,) = (finished[0] / "runs" / "sfa" / "embedded" / "digits-if0.1-imb0.5").iterdir()
    for name in ("noisy_labels.npy", "train_index.npy"):
        assert (folder / name).read_bytes() == (folder / "baseline" / name).read_bytes()


def test_a_failed_run_makes_the_command_fail_and_is_named(tmp_path):
    process = start("--out", str(tmp_path), "--seeds", "7", "--p_threshold", "2")
    assert process.returncode == 1
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("failed: embedded/digits-if0.1-imb0.5 seed 7: exit status 2")
    assert "--p_threshold" in line and "between 0 and 1" in line
    assert not (tmp_path / "sfa.csv").exists()
