"""me_momentum/Clothing.py as processes run it: alone, killed again and again, and two under torchrun; and what stops it.

A process start costs seconds, so the processes that several tests look at are run once, two at a time.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.common.small_file_data import make_clothing1m, plant
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 150  # seconds a process may take, on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# 18 images in batches of 6; of the last set 15, and the smaller last batch is dropped
LOOPS = "--n_epoch 2 --max_inner_loop 6 --max_outer_loop 2"
FLAGS = (
    f"--network resnet18 --no_pretrain --image_size 64 --batch_size 6 --lr 0.02 {LOOPS} --device cpu --workers 0"
).split()
EPOCHS = 24
# inside an inner loop; in a selection; between a row and its checkpoint; the fresh network's first epoch; a validation
MOMENTS = ("2:training", "5:selection", "8:log", "13:training", "18:validation")


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
    words = [*moments, *FLAGS, "--data_root", base / "data", "--out", base / name / "run"]
    return start(*starter, "-m", "tests.end_to_end.clothing_float64", *words)


def damaged(base: Path) -> Ended:
    """As a module, on a data set with an image that is cut short."""
    make_clothing1m(base / "damaged")
    key = (base / "damaged" / "noisy_train_key_list.txt").read_text().split()[5]
    plant(base / "damaged" / key, "truncated")
    where = ["--data_root", base / "damaged", "--out", base / "stopped"]
    return start("-m", "me_momentum.Clothing", *FLAGS, "--workers", "1", *where)


def missing(base: Path) -> Ended:
    """By path from another folder, where no data are."""
    (base / "empty").mkdir()
    return start(ROOT / "me_momentum" / "Clothing.py", *FLAGS, cwd=base / "empty")


def index(base: Path) -> Ended:
    """The index of a data set in its default place, by path from another folder."""
    make_clothing1m(base / "index" / "data" / "Clothing1M_Official")
    return start(ROOT / "me_momentum" / "ClothingData.py", cwd=base / "index")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clothing")
    make_clothing1m(folder / "data", per_class=6, clean_per_class=3)
    return folder


@pytest.fixture(scope="module")
def ends(base):
    """By name a future of how the process ended. Run directories have the same last name: it is a column of the results."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "by_two": pool.submit(in_float64, base, "by_two", starter=TORCHRUN),
            "killed": pool.submit(in_float64, base, "killed", *MOMENTS),
            "alone": pool.submit(in_float64, base, "alone"),
            **{made.__name__: pool.submit(made, base) for made in (damaged, missing, index)},
        }


# a whole run ------------------------------------------------------------------------------------------------------------


def test_the_loops_and_what_is_logged_of_them(base, ends):
    alone = ends["alone"].result()
    assert alone.status == 0, alone.err
    rows = table(base / "alone" / "run")
    assert [(row["outer"], row["inner"]) for row in rows] == [
        (outer, inner) for outer in "12" for inner in "123456" for _ in range(2)
    ]
    outer_loop = [0.02] * 10 + [0.002] * 2
    assert [float(row["lr"]) for row in rows] == pytest.approx(2 * outer_loop, rel=1e-12)
    sizes = [row["confident_size"] for row in rows]
    assert sizes[:2] == ["", ""]  # all noisy images
    assert sizes[2::2] == sizes[3::2] and len(set(sizes[2:])) >= 3  # extracted anew for each inner loop
    assert {row["smallest_class"] for row in rows[:2]} == {"6"}
    for row in rows[2:]:
        assert float(row["confident_share"]) == int(row["confident_size"]) / 18
    lost = [row["classes_unselected"] for row in rows]
    assert lost[:2] == ["", ""] and lost[-1] == "0" and {row["right_selected_min"] for row in rows} == {""}
    assert {row["class_models"] for row in rows} == {"1", "2"}
    # network and optimiser go on from inner loop to inner loop, and begin anew in an outer loop
    losses = [float(row["loss"]) for row in rows]
    assert losses[2] < losses[1] < losses[0]
    assert losses[12] > 2 * losses[11]


def test_the_confident_examples_are_the_rightly_labelled_ones(base, ends):
    """The first noisy image of each class has the label of the next one."""
    assert ends["alone"].result().status == 0
    run = base / "alone" / "run"
    memory = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["memory"]
    order = np.arange(18)
    np.random.RandomState(1).shuffle(order)
    assert sorted(order[memory["confident"]]) == [i for i in range(18) if i % 6]


def test_a_set_too_small_to_train_on_is_not_taken(base, ends):
    alone = ends["alone"].result()
    (line,) = alone.err.splitlines()
    assert line.startswith("warning: outer loop 2, inner loop 2: ") and "the set before is kept" in line
    rows = table(base / "alone" / "run")
    assert rows[14]["confident_size"] == rows[13]["confident_size"]


def test_the_result_is_that_of_the_best_validation_accuracy(base, ends):
    assert ends["alone"].result().status == 0
    run = base / "alone" / "run"
    rows, result = table(run), json.loads((run / "result.json").read_text())
    validation = [float(row["validation_accuracy"]) for row in rows]
    best = rows[int(np.argmax(validation))]
    assert result["metrics"]["at_best_validation"] == float(best["test_accuracy"])
    assert result["metrics"]["best_validation"] == max(validation)
    assert {"best", "last", "last10"} <= result["metrics"].keys()
    highest = [0.0, *np.maximum.accumulate(validation)[:-1].tolist()]
    assert [row["new_best"] for row in rows] == [
        str(int(v > h)) for v, h in zip(validation, highest, strict=True)
    ]
    with (run / "result.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert (row["paper"], row["method"]) == ("me_momentum", "Me-Momentum")
            assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("clothing1m", "real", "")
            assert (row["profile"], row["seed"], row["epochs"]) == ("short", "1", str(EPOCHS))
    sizes = [int(row["confident_size"] or 18) // 6 * 6 for row in rows]
    assert result["images"] == sum(sizes)  # the smaller last batches are dropped
    assert json.loads((run / "noise.json").read_text())["realised_rate"] is None
    assert np.load(run / "train_index.npy").tolist() == list(range(18))


def test_only_checkpoints_in_use_are_kept(base, ends):
    assert ends["alone"].result().status == 0
    run = base / "alone" / "run"
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    network, memory = saved["network"], saved["memory"]
    assert len(memory["weights"]) == int(table(run)[-1]["class_models"])
    assert set(memory["weights"]) <= set(range(1, 13))
    used = memory["models"]["epoch"][memory["models"]["epoch"] > 0].tolist()
    assert set(used) <= set(memory["weights"])
    assert all(weights.keys() == network.keys() for weights in memory["weights"].values())
    best = torch.load(run / "model_best.pt", weights_only=True)
    assert best.keys() == network.keys()


# killed, and by two processes ------------------------------------------------------------------------------------------------


def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, ends):
    killed = ends["killed"].result()
    assert killed.status == 0, killed.err
    assert killed.out.count("status -9\n") == len(MOMENTS)
    assert [f"going on after epoch {epoch}\n" in killed.out for epoch in (1, 4, 7, 12, 17)] == [True] * 5
    runs = [base / name / "run" for name in ("killed", "alone")]
    assert ends["alone"].result().status == 0
    assert log_without_seconds(runs[0]) == log_without_seconds(runs[1])
    assert len(log_without_seconds(runs[0])) == 1 + EPOCHS
    first, second = (result_without_time_and_place(run) for run in runs)
    assert first == second
    first, second = (torch.load(run / "model_best.pt", weights_only=True) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_two_processes_train_as_one(base, ends):
    by_two, alone = ends["by_two"].result(), ends["alone"].result()
    assert by_two.status == 0, by_two.err
    assert alone.status == 0
    rows, expected = (table(base / name / "run") for name in ("by_two", "alone"))
    for row, wanted in zip(rows, expected, strict=True):
        for name in set(wanted) - {"seconds"}:
            found, value = (float(of[name] or "nan") for of in (row, wanted))
            assert found == pytest.approx(value, rel=1e-5, nan_ok=True), (name, wanted["epoch"])
    one, two = (
        torch.load(base / name / "run" / "checkpoint.pt", weights_only=True)["state"]
        for name in ("alone", "by_two")
    )
    for name, values in one["network"].items():
        torch.testing.assert_close(two["network"][name], values, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(two["memory"]["confident"], one["memory"]["confident"])
    assert torch.equal(two["generator"], one["generator"])
    assert "2 processes" in by_two.out
    assert all(by_two.out.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))
    results = [json.loads((base / name / "run" / "result.json").read_text()) for name in ("by_two", "alone")]
    assert results[0]["images"] == results[1]["images"]


# what stops it ------------------------------------------------------------------------------------------------------------


def test_a_damaged_image_stops_the_run_in_one_line(base, ends):
    end = ends["damaged"].result()
    assert end.status == 2, end.err
    (line,) = end.err.strip().splitlines()
    assert line.startswith("Clothing.py: error: image ")
    assert "of the train list" in line and "is damaged (" in line and "--on_bad_image skip" in line
    assert not (base / "stopped" / "result.json").exists()


def test_missing_data_end_in_one_line_and_leave_nothing(base, ends):
    end = ends["missing"].result()
    assert end.status == 2
    (line,) = end.err.strip().splitlines()
    assert line.startswith("Clothing.py: error: clothing1m not found in ")
    assert "Clothing1M_Official" in line and "noisy_train_key_list.txt" in line
    assert list((base / "empty").iterdir()) == []


def test_the_index_is_built_in_the_default_place(base, ends):
    end = ends["index"].result()
    assert end.status == 0, end.err
    assert "train: 12 images\nclean_val: 6 images\ntest: 6 images\n" in end.out
    assert (base / "index" / "data" / "Clothing1M_Official" / "Clothing1m-data.npz").is_file()
