"""afm/train.py alone, killed, under torchrun; on digits and on small Food-101N and Clothing1M."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from afm import train, visualize
from common import datasets
from tests.common.small_file_data import make_clothing1m, make_food101n
from tests.end_to_end import runs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")]

EPOCHS = {"digits": 4, "food": 2}
FILES = "--network resnet18 --pretrained none --train-batch 4 --test-batch 4"
WORDS = {
    "digits": "--preset embedded/digits-sym0.5/afm-k3 --group-rounds 2 --epochs 4 --limit_train 400",
    "food": f"--dataset food {FILES} --epochs 2 --lr 0.0001 --data-root DATA/food --workers WORKERS",
}
MOMENTS = ("1:training", "2:log", "3:test")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("afm")
    make_food101n(folder / "food")
    return folder


def words_of(data: str, base: Path, workers: int = 1) -> list[str]:
    return WORDS[data].replace("DATA", str(base)).replace("WORKERS", str(workers)).split()


@pytest.fixture(scope="module")
def statuses(base):
    """statuses(data): of the runs alone and by two processes, in float64; made at the first call.

    On digits also killed at several moments, on food with the real network.
    """
    made = {}

    def of(data: str) -> dict[str, list[list[int]]]:
        if data not in made:
            words, script = words_of(data, base), "afm.train"
            jobs = {
                "alone": runs.jobs_of(script, base / f"{data}_alone", words, float64=True),
                "by_two": runs.jobs_of(script, base / f"{data}_by_two", words, float64=True, processes=2),
            }
            if data == "digits":
                killed = runs.jobs_of(script, base / "digits_killed", words, *MOMENTS, float64=True)
                jobs["killed"] = [*killed, killed[-1]]
            else:
                jobs["real"] = runs.jobs_of(script, base / "food_real", words)
            found = iter(runs.run_jobs([job for own in jobs.values() for job in own]))
            made[data] = {name: [next(found) for _ in own] for name, own in jobs.items()}
        return made[data]

    return of


@pytest.fixture
def alone(base, statuses):
    def run(data: str) -> Path:
        assert statuses(data)["alone"] == [[0]], runs.printed(base / f"{data}_alone")
        return base / f"{data}_alone" / "run"

    return run


def alive(process: int) -> bool:
    """Whether a process still runs; one that nobody has asked for its status since it ended does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


@pytest.fixture(scope="module")
def killed(base) -> SimpleNamespace:
    """A run on image files with two workers, killed in the epoch after the first that has its checkpoint; started again at once.

    workers: how many the killed process had. outlived: seconds until they ended.
    """
    run = base / "food_killed" / "run"
    command = [sys.executable, "afm/train.py", *words_of("food", base, workers=2), "--out", str(run)]
    options = {"cwd": runs.ROOT, "stdout": subprocess.PIPE, "text": True}
    process, deadline = subprocess.Popen(command, **options), time.monotonic() + runs.DEADLINE
    while not (run / "checkpoint.previous.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    again, began = subprocess.Popen(command, **options), time.monotonic()
    while any(map(alive, workers)) and time.monotonic() < began + 60:
        time.sleep(0.1)
    outlived = time.monotonic() - began
    try:
        out, _ = again.communicate(timeout=runs.DEADLINE)
    finally:
        again.kill()
    seen = {"run": run, "statuses": (process.returncode, again.returncode), "out": out}
    return SimpleNamespace(**seen, workers=len(workers), outlived=outlived)


@pytest.fixture(params=WORDS)
def one_and_two(request, base, statuses) -> tuple[str, Path, Path]:
    data, found = request.param, statuses(request.param)
    assert (found["alone"], found["by_two"]) == ([[0]], [[0, 0]]), runs.printed(base / f"{data}_by_two")
    return data, base / f"{data}_alone" / "run", base / f"{data}_by_two" / "run"


def test_two_processes_log_what_one_does_with_the_same_global_batch(one_and_two):
    data, *both = one_and_two
    runs.assert_close_logs(both[1], both[0], loss=1e-9, rest=1e-9)
    one = runs.table(both[0])
    assert len(one) == EPOCHS[data]
    # what is compared moves by more than it may differ
    assert float(one[0]["loss"]) > 1.005 * float(one[-1]["loss"])


def test_two_processes_end_with_the_weights_and_the_attention_of_one(one_and_two):
    _, *both = one_and_two
    one, two = map(runs.state, both)
    torch.testing.assert_close(two["network"], one["network"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(two["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-6, atol=1e-8)
    for generator in ("loader", "groups"):
        assert torch.equal(one[generator], two[generator])
    one, two = (runs.arrays(run, "attention") for run in both)
    for name in ("position", "known", "observed"):
        assert np.array_equal(one[name], two[name])
    np.testing.assert_allclose(two["weight"], one["weight"], rtol=1e-6)
    for run, weight in zip(both, (one["weight"], two["weight"]), strict=True):
        quality = runs.label_quality(run)
        assert quality.score.to_numpy() == pytest.approx((rankdata(weight) - 1) / (len(weight) - 1), abs=1e-5)


def test_only_the_first_process_writes_and_prints_and_their_number_is_recorded(one_and_two):
    _, *both = one_and_two
    names = [[str(path.relative_to(run)).split("events.out")[0] for path in run.rglob("*")] for run in both]
    files = list(map(sorted, names))
    assert files[0] == files[1] and files[1].count("tensorboard/") == 1
    # line by line what one process prints, but for digits that rounding changes
    texts = [runs.printed(run.parent)[0].replace(str(run), "").replace(", 2 processes", "") for run in both]
    assert len({re.sub(r"[\d.e-]+", "#", text) for text in texts}) == 1
    one, two = map(runs.result, both)
    assert one["command"].startswith("python afm/train.py ")
    assert two["command"].startswith("torchrun --nproc_per_node=2 afm/train.py ")
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert (one["images"], one["noise"]) == (two["images"], two["noise"])


def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, alone, statuses):
    killed = statuses("digits")["killed"]
    runs.assert_survived(base / "digits_killed", alone("digits"), killed, MOMENTS, (0, 1, 2, 4))


def test_a_killed_run_on_image_files_ends_as_if_nothing_had_happened_and_its_workers_end_soon(
    killed, base, statuses
):
    """The killed run has two workers, the other one: neither does their number make a difference."""
    assert killed.statuses == (-signal.SIGKILL, 0) and runs.resumed(killed.out) == [1]
    assert statuses("food")["real"] == [[0]], runs.printed(base / "food_real")
    runs.assert_same_run(killed.run, base / "food_real" / "run")
    assert not Path("/proc/self/task").is_dir() or (killed.workers >= 2 and killed.outlived < 30)


def test_food101n_is_measured_on_test_images_and_its_verified_labels_are_used(alone, tmp_path):
    run = alone("food")
    assert "12 training samples, true labels unknown" in runs.printed(run.parent)[0]
    rows = runs.table(run, "result.csv")
    assert {"best", "last", "last10", "attention_auc"} <= {row["metric"] for row in rows}
    assert "at_best_validation" not in {row["metric"] for row in rows}
    for row in rows:
        assert (row["dataset"], row["noise_type"], row["noise_rate"]) == ("food101n", "web", "")
        assert (row["method"], row["profile"]) == ("AFM (K=2)", "short")
    attention = runs.arrays(run, "attention")
    # of each class's four images the first is verified right, the second wrong
    assert attention["known"].tolist() == [1, 0, -1, -1] * 3
    assert attention["position"].tolist() == list(range(12))
    quality = runs.label_quality(run)
    assert [Path(path).parent.name for path in quality.path] == quality.given_class.tolist()
    assert quality.true_label.isna().all() and len(set(quality.given_class)) == 3
    assert attention["observed"].tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert runs.result(run)["noise"]["realised_rate"] is None
    assert {row["validation_accuracy"] for row in runs.table(run)} == {""}
    assert not (run / "skipped_images.csv").exists()
    visualize.main([str(run), "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_clothing1m_fine_tunes_on_the_clean_images(tmp_path):
    make_clothing1m(tmp_path / "data")
    run = tmp_path / "run"
    words = f"--dataset clothing1m {FILES} --train-on noisy+clean --workers 0 --device cpu --epochs 2 "
    words += f"--finetune-epochs 1 --finetune-lr 0.002 --data-root {tmp_path / 'data'} --out {run}"
    train.main(words.split())
    mixing, tuning = log = runs.table(run)
    best = max(log, key=lambda row: float(row["validation_accuracy"]))
    assert runs.result(run)["metrics"]["at_best_validation"] == float(best["test_accuracy"])
    assert (runs.result(run)["dataset"], runs.result(run)["noise_type"]) == ("clothing1m", "noisy+clean")
    assert runs.arrays(run, "attention")["known"].tolist() == [-1] * 12
    assert np.load(run / "train_index.npy").tolist() == list(range(12))
    # fine-tuning is cross-entropy on the clean images at a rate of its own
    assert (mixing["lr"], tuning["lr"]) == ("0.01", "0.002")
    assert float(mixing["mixed_loss"]) > 0 and float(mixing["attention_peak"]) >= 0.5
    assert [tuning[f"attention_{name}"] for name in ("peak", "dead", "right")] == [""] * 3
    assert float(tuning["loss"]) == pytest.approx(float(tuning["plain_loss"]))
    # three batches of the noisy ones, and one batch of the six clean images
    assert runs.result(run)["images"] == 12 + 4


def test_as_released_on_a_subset_in_the_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--preset embedded/digits-sym0.5/afm-k2 --fidelity released --epochs 2 --limit_train 200 --seed 5"
    train.main(words.split())
    (run,) = (tmp_path / "results" / "runs" / "afm").iterdir()
    for part in ("digits", "symmetric", "noise_rate_0.5", "seed_5", "fidelity_released", "limit_train_200"):
        assert part in run.name
    for row in runs.table(run, "result.csv"):
        assert (row["profile"], row["fidelity"]) == ("embedded+limit_train=200", "released")
        assert (row["table"], row["cell"], row["method"]) == ("embedded", "digits-sym0.5", "AFM (K=2)")
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert len(index) == len(observed) == 200 and (np.diff(index) > 0).all()
    clean = datasets.load("digits", ".").train.labels[index]
    rate = runs.result(run)["noise"]["realised_rate"]
    assert rate == pytest.approx((observed != clean).mean()) and 0.35 < rate < 0.55
    # three batches of 64 in each epoch; the rest is dropped
    assert runs.result(run)["images"] == 2 * 192
