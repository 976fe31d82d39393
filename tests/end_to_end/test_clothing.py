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

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.runs.cli import UserError
from me_momentum import Clothing
from tests.common.small_file_data import make_clothing1m, plant
from tests.end_to_end.outcome import label_quality, log_without_seconds, result_without_time_and_place

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 150  # seconds a process may take, on a busy machine
# one thread: side by side the processes do not slow each other down, and sums are always made in the same order
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1"
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# 18 images in batches of 6; of the last set 15, and the smaller last batch is dropped
LOOPS = "--n_epoch 2 --max_inner_loop 6 --max_outer_loop 2 --lr 0.02"
FLAGS = f"--network resnet18 --no_pretrain --image_size 64 --batch_size 6 {LOOPS} --device cpu --workers 0"
EPOCHS = 24
# inside an inner loop; in a selection; between a row and its checkpoint; the fresh network's first epoch; a validation
MOMENTS = ("2:training", "5:selection", "8:log", "13:training", "18:validation")


def start(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    options = {"capture_output": True, "text": True, "timeout": DEADLINE}
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, check=False, **options)


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def state(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clothing")
    make_clothing1m(folder / "data", per_class=6, clean_per_class=3)
    return folder


@pytest.fixture(scope="module")
def ends(base):
    """By name a future of how the process ended. Run directories have the same last name: it is a column of the results."""

    def in_float64(name: str, *moments: str, starter: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        (base / name).mkdir()
        words = [*moments, *FLAGS.split(), "--data_root", base / "data", "--out", base / name / "run"]
        return start(*starter, "-m", "tests.end_to_end.clothing_float64", *words)

    with ThreadPoolExecutor(2) as pool:
        yield {
            "by_two": pool.submit(in_float64, "by_two", starter=TORCHRUN),
            "killed": pool.submit(in_float64, "killed", *MOMENTS),
            "alone": pool.submit(in_float64, "alone"),
        }


@pytest.fixture
def alone(base, ends) -> Path:
    """The run directory of one process."""
    end = ends["alone"].result()
    assert end.returncode == 0, end.stderr
    return base / "alone" / "run"


# a whole run ------------------------------------------------------------------------------------------------------------


def test_the_loops_and_what_is_logged_of_them(alone):
    rows = table(alone)
    loops = [(outer, inner) for outer in "12" for inner in "123456" for _ in range(2)]
    assert [(row["outer"], row["inner"]) for row in rows] == loops
    outer_loop = [0.02] * 10 + [0.002] * 2
    assert [float(row["lr"]) for row in rows] == pytest.approx(2 * outer_loop, rel=1e-12)
    sizes = [row["confident_size"] for row in rows]
    assert sizes[:2] == ["", ""]  # all noisy images
    assert sizes[2::2] == sizes[3::2] and len(set(sizes[2:])) >= 3  # each inner loop extracts its own
    assert {row["smallest_class"] for row in rows[:2]} == {"6"}
    for row in rows[2:]:
        assert float(row["confident_share"]) == int(row["confident_size"]) / 18
    lost = [row["classes_unselected"] for row in rows]
    assert lost[:2] == ["", ""] and lost[-1] == "0" and {row["right_selected_min"] for row in rows} == {""}
    assert {row["class_models"] for row in rows} == {"1", "2"}
    # inner loops keep network and optimiser, an outer loop has new ones
    losses = [float(row["loss"]) for row in rows]
    assert losses[2] < losses[1] < losses[0] and losses[12] > 2 * losses[11]


def test_the_confident_examples_are_the_rightly_labelled_ones_and_checkpoints_in_use_are_kept(alone):
    """The first noisy image of each class has the label of the next one."""
    memory, order = state(alone)["memory"], np.arange(18)
    np.random.RandomState(1).shuffle(order)
    assert sorted(order[memory["confident"]]) == [i for i in range(18) if i % 6]
    assert len(memory["weights"]) == int(table(alone)[-1]["class_models"])
    used = memory["models"]["epoch"][memory["models"]["epoch"] > 0].tolist()
    assert set(used) <= set(memory["weights"]) <= set(range(1, 13))
    names = state(alone)["network"].keys()
    assert all(weights.keys() == names for weights in memory["weights"].values())
    assert torch.load(alone / "model_best.pt", weights_only=True).keys() == names


def test_the_result_is_that_of_the_best_validation_accuracy(alone):
    rows, result = table(alone), json.loads((alone / "result.json").read_text())
    validation = [float(row["validation_accuracy"]) for row in rows]
    best = rows[int(np.argmax(validation))]
    assert result["metrics"]["at_best_validation"] == float(best["test_accuracy"])
    assert result["metrics"]["best_validation"] == max(validation)
    new_best = [value > max(validation[:i], default=0.0) for i, value in enumerate(validation)]
    assert [row["new_best"] == "1" for row in rows] == new_best
    with (alone / "result.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert (row["paper"], row["method"]) == ("me_momentum", "Me-Momentum")
            assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("clothing1m", "real", "")
            assert (row["profile"], row["seed"], row["epochs"]) == ("short", "1", str(EPOCHS))
    # the smaller last batches are dropped
    assert result["images"] == sum(int(row["confident_size"] or 18) // 6 * 6 for row in rows)
    assert json.loads((alone / "noise.json").read_text())["realised_rate"] is None
    assert np.load(alone / "train_index.npy").tolist() == list(range(18))
    quality, confident = label_quality(alone), state(alone)["memory"]["confident"]
    order = np.random.RandomState(1).permutation(18)  # the same draws as a shuffle
    assert sorted(order[confident]) == np.flatnonzero(quality.selected).tolist()
    # the first noisy image of each class has the label of the next one
    assert roc_auc_score(np.arange(18) % 6 > 0, quality.score) > 0.8
    assert all(Path(path).is_file() for path in quality.path) and quality.path.is_unique


# killed, and by two processes ------------------------------------------------------------------------------------------------


def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, ends, alone):
    killed, run = ends["killed"].result(), base / "killed" / "run"
    assert killed.returncode == 0, killed.stderr
    assert killed.stdout.count("status -9\n") == len(MOMENTS)
    assert [f"resuming after epoch {epoch}\n" in killed.stdout for epoch in (1, 4, 7, 12, 17)] == [True] * 5
    assert log_without_seconds(run) == log_without_seconds(alone)
    assert result_without_time_and_place(run) == result_without_time_and_place(alone)
    assert (run / "label_quality.csv").read_bytes() == (alone / "label_quality.csv").read_bytes()
    first, second = (torch.load(of / "model_best.pt", weights_only=True) for of in (run, alone))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_two_processes_train_as_one(base, ends, alone):
    by_two, run = ends["by_two"].result(), base / "by_two" / "run"
    assert by_two.returncode == 0, by_two.stderr
    for row, wanted in zip(table(run), table(alone), strict=True):
        for name in set(wanted) - {"seconds"}:
            found, value = (float(of[name] or "nan") for of in (row, wanted))
            assert found == pytest.approx(value, rel=1e-5, nan_ok=True), (name, wanted["epoch"])
    one, two = state(alone), state(run)
    for name, values in one["network"].items():
        torch.testing.assert_close(two["network"][name], values, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(two["memory"]["confident"], one["memory"]["confident"])
    assert torch.equal(two["generator"], one["generator"])
    assert "2 processes" in by_two.stdout
    assert all(by_two.stdout.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))


# what stops it ------------------------------------------------------------------------------------------------------------


def test_a_damaged_image_stops_the_run_in_one_line(tmp_path):
    make_clothing1m(tmp_path / "data")
    key = (tmp_path / "data" / "noisy_train_key_list.txt").read_text().split()[5]
    plant(tmp_path / "data" / key, "truncated")
    words = [*FLAGS.split(), "--workers", "1", "--data_root", tmp_path / "data", "--out", tmp_path / "run"]
    with pytest.raises(UserError, match=r"^image \d+ of the train list.*is damaged \(.*--on_bad_image skip"):
        Clothing.main([*map(str, words)])
    assert not (tmp_path / "run" / "result.json").exists()


def test_by_path_from_another_folder_missing_data_leave_nothing_and_the_index_has_its_default_place(tmp_path):
    end = start(ROOT / "me_momentum" / "Clothing.py", *FLAGS.split(), cwd=tmp_path)
    assert end.returncode == 2
    (line,) = end.stderr.strip().splitlines()
    assert line.startswith("Clothing.py: error: clothing1m not found in ")
    assert "Clothing1M_Official" in line and "noisy_train_key_list.txt" in line
    assert list(tmp_path.iterdir()) == []
    make_clothing1m(tmp_path / "data" / "Clothing1M_Official")
    end = start(ROOT / "me_momentum" / "ClothingData.py", cwd=tmp_path)
    assert end.returncode == 0, end.stderr
    assert "train: 12 images\nclean_val: 6 images\ntest: 6 images\n" in end.stdout
    assert (tmp_path / "data" / "Clothing1M_Official" / "Clothing1m-data.npz").is_file()
