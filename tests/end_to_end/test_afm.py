"""afm/train.py as a user starts it: alone, killed, under torchrun; on digits and on small Food-101N and Clothing1M.

A process start costs seconds, so the runs that several tests look at are made once, two at a time.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from afm import train, visualize
from common import datasets
from common.runs.cli import UserError
from tests.common.small_file_data import make_clothing1m, make_food101n, plant
from tests.end_to_end.outcome import label_quality, log_without_seconds, result_without_time_and_place

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[2]
# one thread: side by side the processes do not slow each other down, and sums are always made in the same order
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1"
}
DEADLINE = 150  # seconds a process may take, on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# Rates so low that rounding, which differs between one process and two, does not grow: in float64 the losses agree to 15
# digits at any rate, but in float32 the gradients of ResNet-18 on smooth images agree to one to three.
EPOCHS = {"digits": 4, "food": 2}
FILES = "--network resnet18 --pretrained none --train-batch 4 --test-batch 4"
WORDS = {
    "digits": "--preset embedded/digits-sym0.5/afm-k3 --group-rounds 2 --epochs 4 --lr 0.0005",
    "food": f"--dataset food {FILES} --epochs 2 --lr 0.00001 --data-root DATA/food --workers WORKERS",
}
SETTINGS = {
    "noisy": "--epochs 1",
    "noisy+verified": "--epochs 1",
    "noisy+clean": "--epochs 2 --finetune-epochs 1 --finetune-lr 0.002",
}


class Ended(NamedTuple):
    """How a process ended, and what was seen on the way."""

    status: int
    out: str
    err: str
    logged: int = 0
    workers: int = 0
    outlived: float = 0.0


def start(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, *seen) -> Ended:
    """Wait for the end of a process; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return Ended(process.returncode, out, err, *seen)


def words_of(data: str, folder: Path, workers: int = 1) -> list[str]:
    words = WORDS[data].replace("DATA", str(folder.parent)).replace("WORKERS", str(workers))
    return [*words.split(), "--out", str(folder / "run")]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


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


# the runs, each in its own folder ---------------------------------------------------------------------------------------


def alone(data: str, folder: Path) -> Ended:
    return finish(start("afm/train.py", *words_of(data, folder)))


def by_two(data: str, folder: Path) -> Ended:
    return finish(start(*TORCHRUN, "afm/train.py", *words_of(data, folder)))


def killed(data: str, folder: Path) -> tuple[Ended, Ended]:
    """Killed in the epoch after the first that has its checkpoint, and started again at once; with two workers."""
    words = words_of(data, folder, workers=2)
    process, deadline = start("afm/train.py", *words), time.monotonic() + DEADLINE
    checkpoint = folder / "run" / "checkpoint.previous.pt"
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = children(process.pid)
    process.kill()
    logged, first = epochs_logged(folder / "run"), finish(process)
    again, began = start("afm/train.py", *words), time.monotonic()
    while any(map(alive, workers)) and time.monotonic() < began + 60:
        time.sleep(0.1)
    outlived = time.monotonic() - began
    return first, finish(again, logged, len(workers), outlived)


def released(data: str, folder: Path) -> Ended:
    """By path from another folder, as released, on a subset."""
    words = "--preset embedded/digits-sym0.5/afm-k2 --fidelity released --epochs 2 --limit_train 200 --seed 5"
    process = subprocess.run(
        [sys.executable, ROOT / "afm" / "train.py", *words.split()],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    return Ended(process.returncode, process.stdout, process.stderr)


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
    """Scenarios by name, the long ones first."""
    base = tmp_path_factory.mktemp("afm")
    make_food101n(base / "food")
    runs = [(by_two, "food"), (killed, "food"), (alone, "food"), (killed, "digits"), (by_two, "digits")]
    with ThreadPoolExecutor(2) as pool:
        made = {}
        for make, data in (*runs, (alone, "digits"), (released, "digits")):
            folder = base / f"{data}_{make.__name__}"
            folder.mkdir()
            made[folder.name] = Scenario(folder, pool.submit(make, data, folder))
        yield made
        pool.shutdown(cancel_futures=True)


# two processes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["digits", "food"])
def one_and_two(request, scenarios) -> tuple[str, Scenario, Scenario]:
    both = [scenarios[f"{request.param}_{how}"] for how in ("alone", "by_two")]
    for scenario in both:
        assert scenario.ends.status == 0, scenario.ends.err
    return request.param, *both


def test_two_processes_log_what_one_does_with_the_same_global_batch(one_and_two):
    data, *both = one_and_two
    one, two = (table(scenario.run / "log.csv") for scenario in both)
    assert len(one) == len(two) == EPOCHS[data] and list(one[0]) == list(two[0])
    # a sample or two may stand so near the border between two classes that rounding decides
    trained, tested = {"digits": (1437 // 64 * 64, 360), "food": (12, 6)}[data]
    near_border = {"digits": 2.5, "food": 0.5}[data]
    for row, other in zip(one, two, strict=True):
        close = dict.fromkeys(("loss", "mixed_loss", "plain_loss", "test_loss", "test_loss_batchmean"), 2e-4)
        close |= dict.fromkeys(("attention_right", "attention_wrong", "attention_peak"), 1e-3)
        for column, rel in close.items():
            assert float(other[column]) == pytest.approx(float(row[column]), rel=rel), column
        for column, samples in (("train_accuracy", trained), ("test_accuracy", tested)):
            assert abs(float(other[column]) - float(row[column])) <= near_border * 100 / samples, column
        # a score or two may be so near 0 that rounding decides its sign
        assert float(other["attention_dead"]) == pytest.approx(float(row["attention_dead"]), abs=0.01)
        assert other["lr"] == row["lr"]
    # what is compared moves by more than it may differ
    assert float(one[0]["loss"]) > 1.005 * float(one[-1]["loss"])


def test_two_processes_end_with_the_weights_and_the_attention_of_one(one_and_two):
    _, *both = one_and_two
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
    for scenario, weight in zip(both, (one["weight"], two["weight"]), strict=True):
        quality = label_quality(scenario.run)
        assert quality.score.to_numpy() == pytest.approx((rankdata(weight) - 1) / (len(weight) - 1), abs=1e-5)


def test_only_the_first_process_writes_and_prints_and_their_number_is_recorded(one_and_two):
    _, *both = one_and_two
    files = [
        sorted(str(path.relative_to(s.run)).split("events.out")[0] for path in s.run.rglob("*")) for s in both
    ]
    assert files[0] == files[1] and files[1].count("tensorboard/") == 1
    # line by line what one process prints, but for digits that rounding changes
    texts = [s.ends.out.replace(str(s.folder), "").replace(", 2 processes", "") for s in both]
    assert len({re.sub(r"[\d.e-]+", "#", text) for text in texts}) == 1
    one, two = (json.loads((s.run / "args.json").read_text()) for s in both)
    places = {"data_root": None, "out": None}
    assert one["arguments"] | places == two["arguments"] | places
    command = one["command"].replace("python", "torchrun --nproc_per_node=2", 1)
    assert two["command"] == command.replace(str(both[0].folder), str(both[1].folder))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    one, two = (result(s.run) for s in both)
    assert (one["images"], one["noise"]) == (two["images"], two["noise"])


# killed -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["digits", "food"])
def test_a_killed_run_ends_as_if_nothing_had_happened(data, scenarios):
    """The killed run on Food-101N has two workers, the other one: neither does their number make a difference."""
    runs = [scenarios[f"{data}_{how}"].run for how in ("killed", "alone")]
    assert scenarios[f"{data}_alone"].ends.status == 0
    first, again = scenarios[f"{data}_killed"].ends
    assert first.status == -signal.SIGKILL, first.err
    assert 1 <= again.logged < EPOCHS[data]
    assert again.status == 0 and again.err == "" and "resuming after epoch " in again.out
    logs = [log_without_seconds(run) for run in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 1 + EPOCHS[data]
    assert result_without_time_and_place(runs[0]) == result_without_time_and_place(runs[1])
    for name in ("noisy_labels.npy", "train_index.npy", "label_quality.csv"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    found, wanted = (np.load(run / "attention.npz") for run in runs)
    assert sorted(found.files) == sorted(wanted.files) == ["known", "observed", "position", "weight"]
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted.files)
    found, wanted = (torch.load(run / "model_best.pt", weights_only=True) for run in runs)
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's children"
)
def test_the_workers_of_a_killed_run_end_soon(scenarios):
    _, again = scenarios["food_killed"].ends
    assert again.workers >= 2 and again.outlived < 30


# what a run leaves ------------------------------------------------------------------------------------------------------


def test_food101n_is_measured_on_test_images_and_its_verified_labels_are_used(scenarios, tmp_path):
    run, ends = scenarios["food_alone"].run, scenarios["food_alone"].ends
    assert ends.status == 0 and "12 training samples, true labels unknown" in ends.out
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
    quality = label_quality(run)
    assert all(Path(path).is_file() for path in quality.path) and quality.path.is_unique
    assert [Path(path).parent.name for path in quality.path] == quality.given_class.tolist()
    assert quality.true_label.isna().all() and len(set(quality.given_class)) == 3
    assert attention["observed"].tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert json.loads((run / "noise.json").read_text())["realised_rate"] is None
    assert {row["validation_accuracy"] for row in table(run / "log.csv")} == {""}
    assert not (run / "skipped_images.csv").exists()
    visualize.main([str(run), "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("setting", "samples"), [("noisy", 12), ("noisy+verified", 12 + 3), ("noisy+clean", 12)]
)
def test_clothing1m_runs_to_the_end_in_each_setting(setting, samples, tmp_path):
    make_clothing1m(tmp_path / "data")
    words = f"--dataset clothing1m {FILES} --train-on {setting} {SETTINGS[setting]} --workers 0 --device cpu"
    run = tmp_path / "run"
    train.main([*words.split(), "--data-root", str(tmp_path / "data"), "--out", str(run)])
    log = table(run / "log.csv")
    rows = {row["metric"]: row for row in table(run / "result.csv")}
    best = max(log, key=lambda row: float(row["validation_accuracy"]))
    assert float(rows["at_best_validation"]["value"]) == float(best["test_accuracy"])
    for row in rows.values():
        assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("clothing1m", setting, "")
    index, known = np.load(run / "train_index.npy"), np.load(run / "attention.npz")["known"]
    # the images that were verified right stand behind the noisy ones
    assert known.tolist() == [-1] * 12 + [1] * (samples - 12)
    assert index[:12].tolist() == list(range(12)) and (index[12:] >= 12).all()
    if setting != "noisy+clean":
        assert len(log) == 1
        return
    # fine-tuning is cross-entropy on the clean images at a rate of its own
    mixing, tuning = log
    assert (mixing["lr"], tuning["lr"]) == ("0.01", "0.002")
    assert float(mixing["mixed_loss"]) > 0 and float(mixing["attention_peak"]) >= 0.5
    assert [tuning[f"attention_{name}"] for name in ("peak", "dead", "right")] == [""] * 3
    assert float(tuning["loss"]) == pytest.approx(float(tuning["plain_loss"]))
    # three batches of the noisy ones, and one batch of the six clean images
    assert result(run)["images"] == 12 + 4


def test_by_path_from_another_folder_as_released_on_a_subset(scenarios):
    scenario = scenarios["digits_released"]
    assert scenario.ends.status == 0 and scenario.ends.err == "", scenario.ends.err
    (run,) = (scenario.folder / "results" / "runs" / "afm").iterdir()
    for part in ("digits", "symmetric", "noise_rate_0.5", "seed_5", "fidelity_released", "limit_train_200"):
        assert part in run.name
    for row in table(run / "result.csv"):
        assert (row["profile"], row["fidelity"]) == ("embedded+limit_train=200", "released")
        assert (row["table"], row["cell"], row["method"]) == ("embedded", "digits-sym0.5", "AFM (K=2)")
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert len(index) == len(observed) == 200 and (np.diff(index) > 0).all()
    clean = datasets.load("digits", ".").train.labels[index]
    rate = result(run)["noise"]["realised_rate"]
    assert rate == pytest.approx((observed != clean).mean()) and 0.35 < rate < 0.55
    # three batches of 64 in each epoch; the rest is dropped
    assert result(run)["images"] == 2 * 192


# what goes wrong --------------------------------------------------------------------------------------------------------


def test_damaged_images_stop_the_run_in_one_line_or_are_left_out_and_recorded(tmp_path, capsys):
    make_food101n(tmp_path / "food")
    release = tmp_path / "food" / "Food-101N_release"
    lines = (release / "meta" / "imagelist.tsv").read_text().splitlines()[1:]
    paths = [release / "images" / line for line in lines]
    plant(paths[7], "truncated")
    words = f"--dataset food {FILES} --epochs 1 --workers 1 --device cpu --data-root {tmp_path / 'food'}"
    with pytest.raises(
        UserError, match=f"image 7 of the train list, {paths[7]}, is damaged .*--on_bad_image skip"
    ):
        train.main([*words.split(), "--out", str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / "result.json").exists()
    plant(paths[2], "missing")
    run = tmp_path / "run"
    train.main([*words.split(), "--on_bad_image", "skip", "--out", str(run)])
    out = capsys.readouterr().out
    assert "food101n train: 1 missing and 1 damaged images left out, 10 kept" in out
    assert np.load(run / "train_index.npy").tolist() == [i for i in range(12) if i not in (2, 7)]
    rows = table(run / "skipped_images.csv")
    assert [list(row) for row in rows] == [["path", "position", "reason"]] * 2
    assert [(row["path"], row["position"]) for row in rows] == [(str(paths[2]), "2"), (str(paths[7]), "7")]
    assert rows[0]["reason"] == "missing" and rows[1]["reason"] not in ("", "missing")


def test_missing_data_end_in_one_line_and_leave_nothing(tmp_path, monkeypatch):
    """The default: Food-101N below ./data/food of the folder it is started in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^food101n not found in .*data/food.*imagelist\.tsv") as error:
        train.main(["--device", "cpu"])
    assert "python -m common.datasets check food101n --data_path data/food" in str(error.value)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
