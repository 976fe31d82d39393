"""sanm/Train_clothing1M.py as processes run it: alone, killed again and again, and two under torchrun; with workers; as released.

A process start costs seconds, so the processes that several tests look at are run once, two at a time.
"""

import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from common.runs import cli
from sanm import Train_clothing1M
from sanm.networks import clothing_network
from tests.common.small_file_data import make_clothing1m
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place
from tests.end_to_end.sanm_clothing_float64 import small_network

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300  # seconds a process may take, on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# 42 training images of three classes, all in the warm-up, 36 of them in a division; 33 to validate and 33 to test on,
# all of them in two batches
SETTING = (
    "--network resnet18 --pretrained none --image_size 64 --batch_size 4 --num_batches 42 --num_epochs 2 --lr_drop 2 "
    "--lr 0.02 --device cpu --workers 0"
)
FLAGS = SETTING.split()
EPOCHS = 3
# before the first checkpoint; in the warm-up; in a label quality; in co-divide; between a row and its checkpoint; in a
# validation; in the test of the best weights, after the last checkpoint
MOMENTS = ("0:start", "1:training", "1:losses", "2:training", "2:log", "3:validation", "4:weights")
GONE_ON = (0, 0, 1, 1, 2, 3)  # epochs that the starts after the second find finished
COLUMNS = (
    *("epoch", "loss", "net1_selected", "net2_selected", "net1_validation", "net2_validation", "test_accuracy"),
    *("labelled_loss", "prior_loss", "reconstruction_loss", "right_selected_min", "classes_unselected", "lr", "seconds"),
)  # fmt: skip
LOSSES = ("loss", "labelled_loss", "prior_loss", "reconstruction_loss")


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def start(*words: str | Path, cwd: Path = ROOT) -> Ended:
    # one thread: side by side the processes do not slow each other down, and sums are always made in the same order
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env={**variables, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    return Ended(process.returncode, process.stdout, process.stderr)


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def in_float64(base: Path, name: str, *moments: str, starter: tuple[str, ...] = ()) -> Ended:
    (base / name).mkdir()
    words = [*moments, *FLAGS, "--data_path", base / "data", "--out", base / name / "run"]
    return start(*starter, "-m", "tests.end_to_end.sanm_clothing_float64", *words)


def as_a_user(base: Path) -> Ended:
    """By path from another folder, with the real network and two workers."""
    (base / "user").mkdir()
    words = [*FLAGS, "--data_path", "../data", "--out", "run", "--workers", "2"]
    words += ["--num_batches", "14", "--num_epochs", "1", "--lr", "0.002"]
    return start(ROOT / "sanm" / "Train_clothing1M.py", *words, cwd=base / "user")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanm_clothing")
    make_clothing1m(folder / "data", per_class=14, clean_per_class=11)
    return folder


@pytest.fixture(scope="module")
def ends(base):
    """By name a future of how the process ended. Run directories have the same last name: it is a column of the results."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "by_two": pool.submit(in_float64, base, "by_two", starter=TORCHRUN),
            "killed": pool.submit(in_float64, base, "killed", *MOMENTS),
            "alone": pool.submit(in_float64, base, "alone"),
            "user": pool.submit(as_a_user, base),
        }


# a whole run ------------------------------------------------------------------------------------------------------------


def test_what_is_logged_of_warm_up_and_co_divide(base, ends):
    alone = ends["alone"].result()
    assert alone.status == 0 and alone.err == "", alone.err
    rows = table(base / "alone" / "run")
    assert tuple(rows[0]) == COLUMNS and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.02, 0.02, 0.002], rel=1e-12)
    of_co_divide = ("net1_selected", "net2_selected", "labelled_loss", "prior_loss", "reconstruction_loss")
    assert {rows[0][name] for name in (*of_co_divide, "classes_unselected")} == {""}
    assert {row["right_selected_min"] for row in rows} == {""}, "nobody knows the true labels"
    for row in rows[1:]:
        values = {name: float(row[name]) for name in COLUMNS if name != "right_selected_min"}
        assert values["classes_unselected"] in (0, 1, 2), "of three"
        expected = values["labelled_loss"] + values["prior_loss"] + 0.3 * values["reconstruction_loss"]
        assert values["loss"] == pytest.approx(expected, rel=1e-12)
        # both sides of the split have a batch at least
        assert all(4 <= values[name] <= 32 for name in ("net1_selected", "net2_selected"))
        assert values["labelled_loss"] > 0 and values["prior_loss"] > 0
    assert float(rows[-1]["reconstruction_loss"]) < float(rows[1]["reconstruction_loss"])
    # it learns: three classes that chance would get right in a third of the cases
    assert float(rows[-1]["test_accuracy"]) > 80


def test_the_result_is_that_of_the_best_weights_of_either_network(base, ends):
    assert ends["alone"].result().status == 0
    run = base / "alone" / "run"
    rows, result = table(run), json.loads((run / "result.json").read_text())
    for name in ("net1", "net2"):
        best = max(float(row[f"{name}_validation"]) for row in rows)
        assert result["metrics"][f"best_validation_{name}"] == best
    assert {"best", "last", "last10", "at_best_validation"} <= result["metrics"].keys()
    # warm-up: 40 of 42 images in batches of 8; co-divide: whole batches of labelled images alone
    steps = [int(row[name]) // 4 * 4 for row in rows[1:] for name in ("net1_selected", "net2_selected")]
    assert result["images"] == 2 * 40 + sum(steps)
    with (run / "result.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert (row["paper"], row["method"]) == ("sanm", "SANM(DivideMix)")
            assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("clothing1m", "real", "")
            assert (row["profile"], row["seed"], row["epochs"]) == ("short", "123", "2")
    assert json.loads((run / "noise.json").read_text())["realised_rate"] is None
    assert np.load(run / "train_index.npy").tolist() == list(range(42))


def test_the_real_network_by_path_with_workers(base, ends):
    end = ends["user"].result()
    assert end.status == 0 and end.err == "", end.err
    run = base / "user" / "run"
    rows = table(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert json.loads((run / "result.json").read_text())["metrics"]["at_best_validation"] >= 0
    memory = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["memory"]
    # 14 batches of 4 are 56, 4 of each class: a division of 12 images
    assert [len(positions) for positions, _ in memory["divisions"]] == [12, 12]
    for i, best in enumerate(memory["best"]):
        assert best["accuracy"] == max(float(row[f"net{i + 1}_validation"]) for row in rows)
        kept = torch.load(run / f"net{i + 1}_best.pt", weights_only=True)
        clothing_network("resnet18", 14).load_state_dict(kept)  # strict: all names and shapes
        assert all(torch.equal(value, kept[key]) for key, value in best["weights"].items())


# killed, and by two processes ------------------------------------------------------------------------------------------------


def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, ends):
    killed = ends["killed"].result()
    assert killed.status == 0, killed.err
    assert killed.out.count("status -9\n") == len(MOMENTS)
    assert tuple(int(n) for n in re.findall(r"going on after epoch (\d+)\n", killed.out)) == GONE_ON
    runs = [base / name / "run" for name in ("killed", "alone")]
    assert ends["alone"].result().status == 0
    assert log_without_seconds(runs[0]) == log_without_seconds(runs[1])
    assert len(log_without_seconds(runs[0])) == 1 + EPOCHS
    first, second = (result_without_time_and_place(run) for run in runs)
    assert first == second
    for name in ("net1_best.pt", "net2_best.pt"):
        first, second = (torch.load(run / name, weights_only=True) for run in runs)
        assert all(torch.equal(first[key], second[key]) for key in second)


def test_two_processes_train_as_one(base, ends):
    """Losses to 1e-9, accuracies and selected counts alike, weights to 1e-7: sums in another order, in float64."""
    by_two, alone = ends["by_two"].result(), ends["alone"].result()
    assert by_two.status == 0, by_two.err
    assert alone.status == 0
    rows, expected = (table(base / name / "run") for name in ("by_two", "alone"))
    for row, wanted in zip(rows, expected, strict=True):
        for name in set(wanted) - {"seconds"}:
            found, value = (float(of[name] or "nan") for of in (row, wanted))
            tolerance = 1e-9 if name in LOSSES else 0
            assert found == pytest.approx(value, rel=tolerance, nan_ok=True), (name, wanted["epoch"])
    one, two = (
        torch.load(base / name / "run" / "checkpoint.pt", weights_only=True)["state"]
        for name in ("alone", "by_two")
    )
    for ours, theirs in zip(two["nets"], one["nets"], strict=True):
        for name, values in theirs.items():
            torch.testing.assert_close(ours[name], values, rtol=1e-7, atol=1e-9, msg=name)
    for ours, theirs in zip(two["memory"]["divisions"], one["memory"]["divisions"], strict=True):
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    for name in ("masks", "images"):
        assert torch.equal(two[name], one[name])
    assert two["draws"] == one["draws"]
    assert "2 processes" in by_two.out
    assert all(by_two.out.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))
    results = [json.loads((base / name / "run" / "result.json").read_text()) for name in ("by_two", "alone")]
    assert results[0]["images"] == results[1]["images"]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-12)


# other settings, in this process ---------------------------------------------------------------------------------------------


def small_run(base: Path, monkeypatch, *words: str) -> Path:
    """With the small network, in float32."""
    monkeypatch.setattr(Train_clothing1M, "clothing_network", small_network)
    folder = base / f"run{'_'.join(words)}"
    Train_clothing1M.main([*FLAGS, "--data_path", str(base / "data"), "--out", str(folder), *words])
    return folder


def test_without_masks_it_is_dividemix_and_workers_change_nothing(base, monkeypatch):
    words = ("--masking", "none", "--num_epochs", "1")
    runs = [small_run(base, monkeypatch, *words, "--workers", workers) for workers in "02"]
    row = table(runs[0])[1]
    assert float(row["reconstruction_loss"]) == 0
    # the last digits of sums in float32
    assert float(row["loss"]) == pytest.approx(
        float(row["labelled_loss"]) + float(row["prior_loss"]), rel=1e-6
    )
    assert json.loads((runs[0] / "result.json").read_text())["method"] == "DivideMix"
    for optimizer in torch.load(runs[0] / "checkpoint.pt", weights_only=True)["state"]["optimizers"]:
        assert len(optimizer["state"]) == 10  # of 12 parameters: nothing trains the decoder's two
    assert log_without_seconds(runs[0]) == log_without_seconds(runs[1])


def test_the_released_targets_drive_the_loss_without_bound(base, monkeypatch):
    """With targets that lose hundreds to their top class; at the release's learning rate it takes longer than this to NaN."""
    run = small_run(base, monkeypatch, "--fidelity", "released", "--lr", "0.0009")
    losses = [float(row["labelled_loss"]) for row in table(run)[1:]]
    assert losses[-1] < losses[0] < -20  # no cross-entropy of a distribution is below 0
    assert (run / "result.json").exists()


def test_a_released_run_that_is_no_longer_finite_ends_in_one_line(base, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(lambda _: small_run(base, monkeypatch, "--fidelity", "released", "--lr", "5"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"error: (loss is|losses of training samples are) .*: lower --lr", line)
    assert not list(base.glob("run--fidelity_released_--lr_5/result.json"))
