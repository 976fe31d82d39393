"""afm/train.py as a user starts it: alone, killed, under torchrun; on digits and on small Food-101N and Clothing1M.

A process start costs seconds, so the runs that several tests look at are made once, two at a time.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from common import datasets
from common.datasets.image_cache import build_caches
from tests.common.small_file_data import make_clothing1m, make_food101n, plant
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "afm" / "train.py"
DEADLINE = 150  # seconds a process may take, on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# Rates so low that rounding, which differs between one process and two, does not grow: in float64 the losses agree to 15
# digits at any rate, but in float32 the gradients of ResNet-18 on smooth images agree to one to three.
EPOCHS = {"digits": 4, "food": 2}
DIGITS = (
    f"--preset embedded/digits-sym0.5/afm-k3 --group-rounds 2 --epochs {EPOCHS['digits']} --lr 0.0005".split()
)
FILES = ["--network", "resnet18", "--pretrained", "none", "--train-batch", "4", "--test-batch", "4"]
FOOD = ["--dataset", "food", *FILES, *f"--epochs {EPOCHS['food']} --lr 0.00001".split()]
SETTINGS = {
    "noisy": "--epochs 1",
    "noisy+verified": "--epochs 1",
    "noisy+clean": "--epochs 2 --finetune-epochs 1 --finetune-lr 0.002",
}


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def start(*words: str | Path, cwd: Path = ROOT) -> subprocess.Popen:
    # one thread: side by side the processes do not slow each other down, and sums are always made in the same order
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=cwd, env={**variables, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> Ended:
    """Wait for the end of a process; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def train(*words: str | Path, cwd: Path = ROOT) -> Ended:
    return finish(start("afm/train.py", *words, cwd=cwd))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def epochs_logged(folder: Path) -> int:
    log = folder / "log.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def alive(process: int) -> bool:
    """Whether a process still runs; one that nobody has asked for its status since it ended does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


# the runs, each from its own folder -------------------------------------------------------------------------------------


def digits_alone(folder: Path) -> Ended:
    return train(*DIGITS, "--out", folder / "run")


def digits_by_two(folder: Path) -> Ended:
    return finish(start(*TORCHRUN, "afm/train.py", *DIGITS, "--out", folder / "run"))


def food_alone(folder: Path) -> Ended:
    return train(*FOOD, "--workers", "1", "--data-root", folder.parent / "food", "--out", folder / "run")


def food_by_two(folder: Path) -> Ended:
    where = ["--data-root", folder.parent / "food", "--out", folder / "run"]
    return finish(start(*TORCHRUN, "afm/train.py", *FOOD, "--workers", "1", *where))


def kill_and_start_again(folder: Path, epochs: int, *words: str | Path) -> dict:
    """Killed in the epoch after `epochs` have their checkpoint, and started again at once."""
    process = start("afm/train.py", *words, "--out", folder / "run")
    deadline = time.monotonic() + DEADLINE
    while (
        (epochs_logged(folder / "run") < epochs or not (folder / "run" / "checkpoint.previous.pt").exists())
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    workers = children(process.pid)
    process.kill()
    logged, killed = epochs_logged(folder / "run"), finish(process)
    again = start("afm/train.py", *words, "--out", folder / "run")
    began = time.monotonic()
    while any(map(alive, workers)) and time.monotonic() < began + 60:
        time.sleep(0.1)
    ends = {"killed": killed, "logged": logged, "workers": len(workers), "outlived": time.monotonic() - began}
    return ends | {"again": finish(again)}


def digits_killed(folder: Path) -> dict:
    return kill_and_start_again(folder, 2, *DIGITS)


def food_killed(folder: Path) -> dict:
    words = [*FOOD, "--workers", "2", "--data-root", folder.parent / "food"]
    return kill_and_start_again(folder, 1, *words)


def clothing(folder: Path, setting: str) -> Ended:
    words = [
        "--dataset",
        "clothing1m",
        *FILES,
        "--train-on",
        setting,
        *SETTINGS[setting].split(),
        "--workers",
        "1",
    ]
    return train(*words, "--data-root", folder.parent / "clothing1m", "--out", folder / "run")


def clothing_noisy(folder: Path) -> Ended:
    return clothing(folder, "noisy")


def clothing_verified(folder: Path) -> Ended:
    return clothing(folder, "noisy+verified")


def clothing_clean(folder: Path) -> Ended:
    return clothing(folder, "noisy+clean")


def bad_images(folder: Path) -> dict[str, Ended]:
    """A truncated image first alone, then with one that is missing too."""
    make_food101n(folder / "food")
    paths = food_images(folder)
    plant(paths[7], "truncated")
    words = [*FOOD, "--epochs", "1", "--workers", "1", "--data-root", folder / "food"]
    ends = {"error": train(*words, "--out", folder / "stopped")}
    plant(paths[2], "missing")
    return ends | {"skip": train(*words, "--on_bad_image", "skip", "--out", folder / "run")}


def food_images(folder: Path) -> list[Path]:
    """The training images of the data set below folder, in the order of their list."""
    release = folder / "food" / "Food-101N_release"
    lines = (release / "meta" / "imagelist.tsv").read_text().splitlines()[1:]
    return [release / "images" / line for line in lines]


def part_of_a_cache(folder: Path) -> Ended:
    """Eight of twelve images, out of a cache, with labels of the user's own."""
    make_food101n(folder / "food")
    build_caches(folder / "cache", datasets.load_food101n(folder / "food"))
    (folder / "labels.json").write_text(json.dumps([2, 1, 0] * 4))
    words = [*FOOD, "--epochs", "1", "--workers", "0", "--data-root", folder / "food", "--limit_train", "8"]
    return train(
        *words,
        *("--limit_test", "2", "--full_test_at_end"),
        "--image-cache",
        folder / "cache",
        "--noise_file",
        folder / "labels.json",
        "--out",
        folder / "run",
    )


def missing(folder: Path) -> Ended:
    """The default: Food-101N below ./data/food of the folder it is started in."""
    (folder / "here").mkdir()
    return finish(start(SCRIPT, cwd=folder / "here"))


def released_from_elsewhere(folder: Path) -> Ended:
    words = [
        "--preset",
        "embedded/digits-sym0.5/afm-k2",
        "--fidelity",
        "released",
        "--epochs",
        "2",
        "--limit_train",
        "200",
    ]
    return finish(start(SCRIPT, *words, "--seed", "5", cwd=folder))


def help_of_the_module(_: Path) -> Ended:
    return finish(start("-m", "afm.train", "--help"))


SCENARIOS: tuple[Callable, ...] = (  # the long ones first
    food_by_two, food_killed, food_alone, bad_images, digits_killed, clothing_clean, clothing_noisy, digits_by_two,
    clothing_verified, digits_alone, part_of_a_cache, released_from_elsewhere, missing, help_of_the_module,
)  # fmt: skip


class Scenario(NamedTuple):
    folder: Path
    future: Future

    @property
    def run(self) -> Path:
        """The run directory. All have the same last name: it is a column of the results."""
        return self.folder / "run"

    @property
    def ends(self):
        return self.future.result()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Scenarios by the name of the function that makes them; the files, near 2 GB, are removed in the end."""
    base = tmp_path_factory.mktemp("afm")
    make_food101n(base / "food")
    make_clothing1m(base / "clothing1m")
    with ThreadPoolExecutor(2) as pool:
        made = {}
        for make in SCENARIOS:
            (base / make.__name__).mkdir()
            made[make.__name__] = Scenario(base / make.__name__, pool.submit(make, base / make.__name__))
        yield made
        pool.shutdown(cancel_futures=True)
    shutil.rmtree(base)


# two processes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["digits", "food"])
def alone_and_by_two(request, scenarios) -> tuple[str, Scenario, Scenario]:
    alone, by_two = (scenarios[f"{request.param}_{how}"] for how in ("alone", "by_two"))
    for scenario in (alone, by_two):
        assert scenario.ends.status == 0, scenario.ends.err
    return request.param, alone, by_two


def test_two_processes_log_what_one_does_with_the_same_global_batch(alone_and_by_two):
    data, *both = alone_and_by_two
    alone, by_two = (table(scenario.run / "log.csv") for scenario in both)
    assert len(alone) == len(by_two) == EPOCHS[data]
    assert list(alone[0]) == list(by_two[0])
    # a sample or two may stand so near the border between two classes that rounding decides
    trained, tested = {"digits": (1437 // 64 * 64, 360), "food": (12, 6)}[data]
    near_border = {"digits": 2.5, "food": 0.5}[data]
    for one, two in zip(alone, by_two, strict=True):
        for column in ("loss", "mixed_loss", "plain_loss", "test_loss", "test_loss_batchmean"):
            assert float(two[column]) == pytest.approx(float(one[column]), rel=2e-4), column
        for column, samples in (("train_accuracy", trained), ("test_accuracy", tested)):
            assert abs(float(two[column]) - float(one[column])) <= near_border * 100 / samples, column
        for column in ("attention_right", "attention_wrong", "attention_peak"):
            assert float(two[column]) == pytest.approx(float(one[column]), rel=1e-3), column
        # a score or two may be so near 0 that rounding decides its sign
        assert float(two["attention_dead"]) == pytest.approx(float(one["attention_dead"]), abs=0.01)
        assert two["lr"] == one["lr"]
    # what is compared moves by more than it may differ
    assert float(alone[0]["loss"]) > 1.005 * float(alone[-1]["loss"])


def test_two_processes_end_with_the_weights_and_the_attention_of_one(alone_and_by_two):
    _, *both = alone_and_by_two
    one, two = (torch.load(scenario.run / "checkpoint.pt", weights_only=True)["state"] for scenario in both)
    assert list(one["network"]) == list(two["network"])
    for name, tensor in one["network"].items():
        if "running" in name:
            assert (two["network"][name] - tensor).norm() < 0.01 * tensor.norm() + 1e-3, name
        elif not tensor.is_floating_point():
            assert torch.equal(two["network"][name], tensor), name
    # what SGD has gathered of the gradients, of which rounding leaves a digit: a wrong factor would show
    gathered = [
        torch.cat([s["momentum_buffer"].flatten() for s in state["optimizer"]["state"].values()])
        for state in (one, two)
    ]
    assert (gathered[1] - gathered[0]).norm() < 0.25 * gathered[0].norm()
    for generator in ("loader", "groups"):
        assert torch.equal(one[generator], two[generator])
    one, two = (np.load(scenario.run / "attention.npz") for scenario in both)
    for name in ("position", "known", "observed"):
        assert np.array_equal(one[name], two[name])
    np.testing.assert_allclose(two["weight"], one["weight"], rtol=0.02)


def test_only_the_first_process_writes_and_prints(alone_and_by_two):
    data, alone, by_two = alone_and_by_two
    files = [
        sorted(str(path.relative_to(s.run)).split("events.out")[0] for path in s.run.rglob("*"))
        for s in (alone, by_two)
    ]
    assert files[0] == files[1]
    assert [file for file in files[1] if file.startswith("tensorboard")] == ["tensorboard", "tensorboard/"]
    lines = by_two.ends.out.splitlines()
    for epoch in range(1, EPOCHS[data] + 1):
        assert sum(line.startswith(f"epoch {epoch}/") for line in lines) == 1
    assert [row["epoch"] for row in table(by_two.run / "log.csv")] == [
        str(e + 1) for e in range(EPOCHS[data])
    ]
    # line by line what one process prints, but for digits that rounding changes
    shape = [
        re.sub(r"[\d.e-]+", "#", s.ends.out.replace(str(s.folder), "").replace(", 2 processes", ""))
        for s in (alone, by_two)
    ]
    assert shape[0] == shape[1]


def test_how_many_processes_there_were_is_recorded(alone_and_by_two):
    _, alone, by_two = alone_and_by_two
    one, two = (json.loads((s.run / "args.json").read_text()) for s in (alone, by_two))
    assert one["arguments"].keys() == two["arguments"].keys()
    places = {"data_root": None, "out": None}
    assert one["arguments"] | places == two["arguments"] | places
    assert one["command"].startswith("python afm/train.py --")
    assert two["command"] == one["command"].replace("python", "torchrun --nproc_per_node=2", 1).replace(
        str(alone.folder), str(by_two.folder)
    )
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    results = [json.loads((s.run / "result.json").read_text()) for s in (alone, by_two)]
    assert results[0]["images"] == results[1]["images"]
    assert results[0]["noise"] == results[1]["noise"]
    assert "2 processes" in by_two.ends.out and "processes" not in alone.ends.out


# killed -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["digits", "food"])
def test_a_killed_run_ends_as_if_nothing_had_happened(data, scenarios):
    """The killed run on Food-101N has two workers, the other one: neither does their number make a difference."""
    killed, reference = scenarios[f"{data}_killed"], scenarios[f"{data}_alone"]
    assert reference.ends.status == 0, reference.ends.err
    ends = killed.ends
    assert ends["killed"].status == -signal.SIGKILL, ends["killed"].err
    assert 1 <= ends["logged"] < EPOCHS[data]
    assert ends["again"].status == 0 and ends["again"].err == ""
    assert "going on after epoch " in ends["again"].out
    assert log_without_seconds(killed.run) == log_without_seconds(reference.run)
    assert len(log_without_seconds(killed.run)) == 1 + EPOCHS[data]
    assert result_without_time_and_place(killed.run) == result_without_time_and_place(reference.run)
    for name in ("noisy_labels.npy", "train_index.npy"):
        assert (killed.run / name).read_bytes() == (reference.run / name).read_bytes()
    found, wanted = (np.load(run / "attention.npz") for run in (killed.run, reference.run))
    assert sorted(found.files) == sorted(wanted.files) == ["known", "observed", "position", "weight"]
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted.files)
    found, wanted = (
        torch.load(run / "model_best.pt", weights_only=True) for run in (killed.run, reference.run)
    )
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's children"
)
def test_the_workers_of_a_killed_run_end_soon(scenarios):
    ends = scenarios["food_killed"].ends
    assert ends["workers"] >= 2
    assert ends["outlived"] < 30


# Food-101N --------------------------------------------------------------------------------------------------------------


def test_food101n_is_measured_on_test_images_and_its_verified_labels_are_used(scenarios):
    run = scenarios["food_alone"].run
    assert scenarios["food_alone"].ends.status == 0, scenarios["food_alone"].ends.err
    rows = table(run / "result.csv")
    assert {"best", "last", "last10", "attention_auc"} <= {row["metric"] for row in rows}
    assert "at_best_validation" not in {row["metric"] for row in rows}
    for row in rows:
        assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("food101n", "web", "")
        assert (row["method"], row["profile"]) == ("AFM (K=2)", "short")
    attention = np.load(run / "attention.npz")
    # of each class's four images the first is verified right, the second wrong
    assert attention["known"].tolist() == [1, 0, -1, -1] * 3
    assert attention["position"].tolist() == list(range(12))
    assert attention["observed"].tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert json.loads((run / "noise.json").read_text())["realised_rate"] is None
    assert "12 training samples, true labels unknown" in scenarios["food_alone"].ends.out
    assert {row["validation_accuracy"] for row in table(run / "log.csv")} == {""}


def test_part_of_the_images_from_a_cache_with_labels_of_a_file(scenarios):
    scenario = scenarios["part_of_a_cache"]
    assert scenario.ends.status == 0, scenario.ends.err
    index, observed = (np.load(scenario.run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert len(set(index.tolist())) == 8 and (np.diff(index) > 0).all()
    assert observed.tolist() == [[2, 1, 0][i % 3] for i in index]
    # what was verified is the label of the list: it says nothing of another one
    verified = [[1, 0, -1, -1][i % 4] if i // 4 == [2, 1, 0][i % 3] else -1 for i in index]
    assert np.load(scenario.run / "attention.npz")["known"].tolist() == verified
    for row in table(scenario.run / "result.csv"):
        assert (row["noise_type"], row["profile"]) == ("labels.json", "short+limit_train=8+limit_test=2")
    metrics = json.loads((scenario.run / "result.json").read_text())["metrics"]
    assert metrics["last"] in (0, 50, 100) and metrics["full_test_images"] > 2
    assert round(metrics["full_test"] * metrics["full_test_images"] / 100, 3) % 1 == 0


# Clothing1M -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "samples"),
    [
        ("clothing_noisy", "noisy", 12),
        ("clothing_verified", "noisy+verified", 12 + 3),
        ("clothing_clean", "noisy+clean", 12),
    ],
)
def test_clothing1m_runs_to_the_end_in_each_setting(name, setting, samples, scenarios):
    scenario = scenarios[name]
    assert scenario.ends.status == 0, scenario.ends.err
    assert scenario.ends.err == ""
    log = table(scenario.run / "log.csv")
    assert len(log) == int(SETTINGS[setting].split()[1])
    assert all(0 <= float(row["validation_accuracy"]) <= 100 for row in log)
    rows = {row["metric"]: row for row in table(scenario.run / "result.csv")}
    best = max(log, key=lambda row: float(row["validation_accuracy"]))
    assert float(rows["at_best_validation"]["value"]) == float(best["test_accuracy"])
    for row in rows.values():
        assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("clothing1m", setting, "")
    assert json.loads((scenario.run / "noise.json").read_text())["samples"] == samples
    index, known = (
        np.load(scenario.run / "train_index.npy"), np.load(scenario.run / "attention.npz")["known"]
    )  # fmt: skip
    # the images that were verified right stand behind the noisy ones
    assert known.tolist() == [-1] * 12 + [1] * (samples - 12)
    assert index[:12].tolist() == list(range(12)) and (index[12:] >= 12).all()


def test_fine_tuning_is_cross_entropy_on_the_clean_images_at_a_rate_of_its_own(scenarios):
    scenario = scenarios["clothing_clean"]
    assert scenario.ends.status == 0, scenario.ends.err
    mixing, tuning = table(scenario.run / "log.csv")
    assert (mixing["lr"], tuning["lr"]) == ("0.01", "0.002")
    assert float(mixing["mixed_loss"]) > 0 and float(mixing["attention_peak"]) >= 0.5
    assert [tuning[f"attention_{name}"] for name in ("peak", "dead", "right")] == [""] * 3
    assert float(tuning["loss"]) == pytest.approx(float(tuning["plain_loss"]))
    # three batches of the noisy ones, and one batch of the six clean images
    assert json.loads((scenario.run / "result.json").read_text())["images"] == 12 + 4


# what goes wrong --------------------------------------------------------------------------------------------------------


def test_a_damaged_image_stops_the_run_in_one_line(scenarios):
    scenario = scenarios["bad_images"]
    end = scenario.ends["error"]
    assert end.status == 2
    (line,) = end.err.strip().splitlines()
    path = food_images(scenario.folder)[7]
    assert line.startswith(f"train.py: error: image 7 of the train list, {path}, is damaged (")
    assert "--on_bad_image skip" in line
    assert not (scenario.folder / "stopped" / "result.json").exists()


def test_skipped_images_are_counted_left_out_and_recorded(scenarios):
    scenario = scenarios["bad_images"]
    end = scenario.ends["skip"]
    assert end.status == 0, end.err
    assert "food101n train: 1 missing and 1 damaged images left out, 10 kept" in end.out
    assert "10 training samples" in end.out
    assert np.load(scenario.run / "train_index.npy").tolist() == [i for i in range(12) if i not in (2, 7)]
    paths = food_images(scenario.folder)
    rows = table(scenario.run / "skipped_images.csv")
    assert [list(row) for row in rows] == [["path", "position", "reason"]] * 2
    assert [(row["path"], row["position"]) for row in rows] == [(str(paths[2]), "2"), (str(paths[7]), "7")]
    assert rows[0]["reason"] == "missing" and rows[1]["reason"] not in ("", "missing")


def test_nothing_is_recorded_where_nothing_was_skipped(scenarios):
    assert scenarios["food_alone"].ends.status == 0
    assert not (scenarios["food_alone"].run / "skipped_images.csv").exists()


def test_missing_data_end_in_one_line_and_leave_nothing(scenarios):
    scenario = scenarios["missing"]
    assert scenario.ends.status == 2
    (line,) = scenario.ends.err.strip().splitlines()
    assert line.startswith("train.py: error: food101n not found in ")
    assert str(Path("data", "food")) in line and "imagelist.tsv" in line
    assert "python -m common.datasets check food101n --data_path data/food" in line
    assert list((scenario.folder / "here").iterdir()) == []


# ways to start it -------------------------------------------------------------------------------------------------------


def test_as_a_module_it_shows_its_flags(scenarios):
    end = scenarios["help_of_the_module"].ends
    assert end.status == 0 and end.err == ""
    for flag in ("--group-size", "--train-on", "--on_bad_image", "--fidelity", "--limit_train"):
        assert flag in end.out


def test_by_path_from_another_folder_as_released_on_a_subset(scenarios):
    scenario = scenarios["released_from_elsewhere"]
    assert scenario.ends.status == 0, scenario.ends.err
    assert scenario.ends.err == ""
    (run,) = (scenario.folder / "results" / "runs" / "afm").iterdir()
    for part in ("digits", "symmetric", "noise_rate_0.5", "seed_5", "fidelity_released", "limit_train_200"):
        assert part in run.name
    kept = json.loads((run / "args.json").read_text())
    arguments = kept["arguments"]
    assert (arguments["attention"], arguments["mix_target"]) == ("complement", "both")
    assert (arguments["group_order"], arguments["group_rounds"]) == ("halves", 1)
    assert (arguments["pair_chunks"], arguments["sync_bn"]) == (1, False)
    assert kept["command"].startswith("python afm/train.py --preset ")
    for row in table(run / "result.csv"):
        assert (row["profile"], row["fidelity"]) == ("embedded+limit_train=200", "released")
        assert (row["table"], row["cell"], row["method"]) == ("embedded", "digits-sym0.5", "AFM (K=2)")
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert len(index) == len(observed) == 200 and (np.diff(index) > 0).all()
    clean = datasets.load("digits", ".").train.labels[index]
    rate = json.loads((run / "result.json").read_text())["noise"]["realised_rate"]
    assert rate == pytest.approx((observed != clean).mean()) and 0.35 < rate < 0.55
    assert [row["epoch"] for row in table(run / "log.csv")] == ["1", "2"]
    # three batches of 64 in each epoch; the rest is dropped
    assert json.loads((run / "result.json").read_text())["images"] == 2 * 192
