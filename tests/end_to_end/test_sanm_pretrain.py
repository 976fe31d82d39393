"""sanm/pretrain.py as a user starts it, killed and started again; and, within this process, on small colour images.

A process start costs seconds, so the processes that several tests look at are run once, two at a time.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common import datasets
from common.gpu import device as gpu
from common.gpu.encoders import load_encoder
from common.gpu.loader import Batches, Images
from common.pretraining.simclr import knn_accuracy, pooled_features
from sanm import pretrain
from sanm.networks import make_simclr, simclr_resnet
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 400  # seconds a process may take, on a busy machine
EPOCHS = 3
FLAGS = (
    f"--dataset digits --epochs {EPOCHS} --batch_size 64 --lr 0.01 --temp 0.15 --seed 1 --device cpu".split()
)
# EPOCH:WHERE as in tests.end_to_end.killed
MOMENTS = ("1:training", "1:log", "3:features", "9:never")
KILLED = """
import os, sys
import torch._dynamo  # what an optimiser imports when it is made, for seconds: here once for all
from sanm import pretrain
from tests.end_to_end.killed import MortalRun

pretrain.Run = MortalRun
end = sys.argv.index("--")
for word in sys.argv[1:end]:
    epoch, where = word.split(":")
    child = os.fork()
    if child == 0:
        MortalRun.moment = (int(epoch), where)
        pretrain.main(sys.argv[end + 1 :])
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def whole(folder: Path) -> dict:
    """By path from another folder; then the finished run once more, as a module."""
    (folder / "elsewhere").mkdir(parents=True)
    first = start(ROOT / "sanm" / "pretrain.py", *FLAGS, "--out", "../run", cwd=folder / "elsewhere")
    before = content_of(folder / "run")
    again = start("-m", "sanm.pretrain", *FLAGS, "--out", folder / "run")
    return {"first": first, "before": before, "again": again, "after": content_of(folder / "run")}


def killed(folder: Path) -> dict:
    """Killed again and again, then left alone."""
    return {"starts": start("-c", KILLED, *MOMENTS, "--", *FLAGS, "--out", folder / "run")}


class Scenario(NamedTuple):
    run: Path
    future: Future

    @property
    def ends(self) -> dict:
        return self.future.result()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """name -> Scenario. All run directories have the same last name: it is a column of the results."""
    base = tmp_path_factory.mktemp("sanm_pretrain")
    with ThreadPoolExecutor(2) as pool:
        yield {
            make.__name__: Scenario(base / make.__name__ / "run", pool.submit(make, base / make.__name__))
            for make in (whole, killed)
        }


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def knn_of(encoder: torch.nn.Module) -> float:
    """kNN accuracy of an encoder on the digits."""
    data, device = datasets.load("digits"), torch.device("cpu")
    network = make_simclr(1, 8)
    network.encoder = encoder
    features = [
        pooled_features(
            network,
            Batches(Images(split.images, data.mean, data.std, device), 128),
            gpu.Device(device, "fp32", ""),
        )
        for split in (data.train, data.test)
    ]
    labels = [torch.from_numpy(split.labels) for split in (data.train, data.test)]
    return knn_accuracy(features[0], labels[0], features[1], labels[1], data.num_classes)


# on digits --------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_log_result_and_an_encoder_that_is_better_than_an_untrained_one(scenarios):
    run, ends = scenarios["whole"].run, scenarios["whole"].ends
    assert ends["first"].status == 0, ends["first"].err
    assert ends["first"].err == ""
    rows = table(run)
    assert list(rows[0]) == ["epoch", "loss", "knn_accuracy", "lr", "seconds"]
    assert len(rows) == EPOCHS and float(rows[-1]["loss"]) < float(rows[0]["loss"])

    result = json.loads((run / "result.json").read_text())
    expected = {"paper": "sanm", "method": "SimCLR", "dataset": "digits", "noise_type": "none"}
    expected |= {"noise_rate": None, "profile": "embedded", "metric": "knn_accuracy", "epochs": EPOCHS}
    assert {name: result[name] for name in expected} == expected
    assert result["noise"]["realised_rate"] == 0 and result["images"] == 1437 * EPOCHS
    assert result["metrics"]["last"] == float(rows[-1]["knn_accuracy"])

    torch.manual_seed(1)
    encoder = simclr_resnet(1, 8)
    untrained = knn_of(encoder)
    assert load_encoder(encoder, run / "encoder.safetensors") == (len(encoder.state_dict()), 0)
    assert knn_of(encoder) == pytest.approx(result["metrics"]["last"], abs=0.3)
    assert result["metrics"]["last"] > untrained + 5
    with safe_open(run / "encoder.safetensors", "pt") as file:
        assert file.metadata() == {"dataset": "digits", "epochs": str(EPOCHS), "seed": "1"}


def test_the_finished_run_started_again_changes_nothing(scenarios):
    ends = scenarios["whole"].ends
    assert ends["again"].status == 0, ends["again"].err
    assert "\nepoch " not in ends["again"].out
    assert {"encoder.safetensors", "result.json", "log.csv", "checkpoint.pt"} <= set(ends["before"])
    assert ends["after"] == ends["before"]


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(scenarios):
    reference, found = scenarios["whole"], scenarios["killed"]
    starts = found.ends["starts"]
    status = [line for line in starts.out.splitlines() if line.startswith("status ")]
    assert status == [f"status {-signal.SIGKILL}"] * 3 + ["status 0"], starts.err
    assert starts.out.count("going on after epoch 2") == 1
    assert reference.ends["first"].status == 0
    assert log_without_seconds(found.run) == log_without_seconds(reference.run)
    assert result_without_time_and_place(found.run) == result_without_time_and_place(reference.run)
    one, other = (load_file(of.run / "encoder.safetensors") for of in (found, reference))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# in this process --------------------------------------------------------------------------------------------------------


def test_small_colour_images_without_cosine_a_last_batch_of_one_and_knn_at_the_end_alone(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(9) % 3, "test": np.arange(4) % 3}
    arrays = {f"{part}_labels": of for part, of in labels.items()}
    arrays |= {
        f"{part}_images": rng.integers(0, 256, (len(of), 8, 8, 3), dtype=np.uint8)
        for part, of in labels.items()
    }
    np.savez(tmp_path / "cifar100.npz", **arrays)
    data = f"--dataset cifar100 --data_path {tmp_path} --device cpu --out {tmp_path / 'run'}"
    schedule = "--epochs 3 --batch_size 4 --no-cosine --lr 0.01 --lr_decay_epochs 2 --knn_every 2"
    pretrain.main([*data.split(), *schedule.split(), "--limit_test", "4", "--full_test_at_end"])
    rows = table(tmp_path / "run")
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.01, 0.001])
    assert [bool(row["knn_accuracy"]) for row in rows] == [False, True, True]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["profile"] == "short+limit_test=4" and result["images"] == 27
    assert set(result["metrics"]) == {"best", "last", "last10", "last_loss", "full_test", "full_test_images"}
    assert result["metrics"]["full_test"] == result["metrics"]["last"], "all four test images are in both"
    encoder = simclr_resnet(3, 8)
    load_encoder(encoder, tmp_path / "run" / "encoder.safetensors")
    assert "0 others left" in capsys.readouterr().out
