"""sfa/Train_webvision.py as processes run it: alone, a network in each of two, both in both; killed, stopped, and moved.

A process start costs seconds, so the processes that several tests look at are run once, two at a time.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sfa.networks import webvision_network
from tests.end_to_end.manifold_runs import (
    ROOT,
    TIMED,
    Ended,
    assert_same_run,
    content_of,
    differences,
    result,
    start,
    state,
    table,
)
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place
from tests.end_to_end.webvision_float64 import make_doubtful_webvision

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
FLOAT64 = ("-m", "tests.end_to_end.webvision_float64")

# 40 training images of four classes and 36 in each test set, two batches of either. Moments go on from epoch 3 on
SETTING = (
    "--num_class 4 --network resnet18 --image_size 64 --batch_size 4 --lr_drop 3 --workers 0 --device cpu"
)
FLAGS = (*SETTING.split(), "--num_epochs", "4")
EPOCHS = 4
# before the first checkpoint and after it; in the warm-up; in a selection; in co-divide, of both networks; between a row and its
# checkpoint; in a test; after the last checkpoint
MOMENTS = (
    *("0:start", "0:save", "1:warm-up of network 2", "1:selection of network 1", "2:training of network 1"),
    *("2:training of network 2", "2:log", "3:imagenet", "3:selection of network 2", "4:training", "4:save"),
)  # fmt: skip
GONE_ON = (0, 0, 0, 1, 1, 1, 2, 2, 3, 4)  # epochs that the starts after the second find finished
# of two processes either dies, or both
BY_TWO = (
    *("1:warm-up of network 1", "2:training of network 2", "2:log", "3:selection", "4:training of network 1"),
)  # fmt: skip
GONE_ON_BY_TWO = (0, 1, 1, 2, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("webvision")
    make_doubtful_webvision(folder / "data", classes=4, per_class=10, test_per_class=9)
    return folder


def jobs_of(base: Path, name: str, *words: str, moments: tuple[str, ...] = (), processes: int = 1) -> list:
    """A start of the script for every moment, and one to its end, in the run directory NAME/run; see webvision_float64."""
    (base / name).mkdir(exist_ok=True)
    flags = [*FLAGS, "--data_path", str(base / "data"), "--out", str(base / name / "run"), *words]
    job = {"flags": flags, "log": str(base / name / "log"), "processes": processes}
    return [*({**job, "moment": moment, "slow": processes > 1} for moment in moments), job]


def run_jobs(jobs: list[dict]) -> list[list[int]]:
    """The exit statuses of the processes of each job."""
    end = start(*FLOAT64, json.dumps(jobs))
    assert end.status == 0, end.err
    return [[int(word) for word in line.split()[1:]] for line in end.out.splitlines()]


def in_one(base: Path) -> dict[str, list[list[int]]]:
    """Runs by one process: undisturbed, killed, and stopped by SIGTERM; as released."""
    jobs = {"alone": jobs_of(base, "alone"), "killed": jobs_of(base, "killed", moments=MOMENTS)}
    jobs["stopped"] = jobs_of(base, "stopped", moments=("2:training:SIGTERM",))
    jobs["released"] = jobs_of(base, "released", "--fidelity", "released")
    return by_name(jobs)


def in_two(base: Path) -> dict[str, list[list[int]]]:
    """Runs by two processes with a network each: undisturbed, killed, stopped, and gone on with by one; and as released."""
    words, two = ("--parallel", "networks"), {"processes": 2}
    jobs = {"networks": jobs_of(base, "networks", *words, **two)}
    jobs["networks_killed"] = jobs_of(base, "networks_killed", *words, moments=BY_TWO, **two)
    jobs["networks_stopped"] = jobs_of(
        base, "networks_stopped", *words, moments=("3:training:SIGTERM",), **two
    )
    jobs["moved"] = jobs_of(base, "moved", *words, moments=("3:training",), **two)[:1] + jobs_of(
        base, "moved"
    )
    jobs["back"] = jobs_of(base, "back", moments=("3:log",))[:1] + jobs_of(base, "back", **two)
    for name, how in (("released_networks", words), ("released_data", ())):
        jobs[name] = jobs_of(base, name, "--fidelity", "released", *how, **two)
    return by_name(jobs)


def by_name(jobs: dict[str, list[dict]]) -> dict[str, list[list[int]]]:
    statuses = iter(run_jobs([job for own in jobs.values() for job in own]))
    return {name: [next(statuses) for _ in own] for name, own in jobs.items()}


def as_a_user(base: Path, name: str, *words: str) -> Ended:
    """By path from another folder, with the real network."""
    (base / name).mkdir()
    words = ("--data_path", "../data/", "--out", "run", "--limit_train", "14", "--num_epochs", "2", *words)
    return start(ROOT / "sfa" / "Train_webvision.py", *SETTING.split(), *words, cwd=base / name)


def by_torchrun(base: Path) -> Ended:
    """Both networks in both processes."""
    (base / "data_parallel").mkdir()
    words = ("--data_path", base / "data", "--out", base / "data_parallel" / "run")
    return start(*TORCHRUN, *FLOAT64, *FLAGS, *words)


@pytest.fixture(scope="module")
def ends(base) -> Iterator[dict]:
    """By name a future of how they ended. Run directories have the same last name: it is a column of the results."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "in_two": pool.submit(in_two, base),
            "in_one": pool.submit(in_one, base),
            "data_parallel": pool.submit(by_torchrun, base),
            "user": pool.submit(as_a_user, base, "user", "--workers", "2"),
            "user_networks": pool.submit(as_a_user, base, "user_networks", "--parallel", "networks"),
        }


def log_of(base: Path, name: str) -> tuple[str, str]:
    return tuple((base / name / f"log.{stream}").read_text() for stream in ("out", "err"))


@pytest.fixture
def alone(base, ends) -> Path:
    """The directory of the run by one process that nothing disturbed."""
    assert ends["in_one"].result()["alone"] == [[0]], log_of(base, "alone")[1]
    return base / "alone" / "run"


def gone_on(out: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"going on after epoch (\d+)\n", out))


def assert_same_training(found: Path, wanted: Path) -> None:
    """As assert_same_run, for other numbers of processes."""
    assert log_without_seconds(found) == log_without_seconds(wanted)
    assert differences(state(found), state(wanted)) == []
    ours, theirs = (
        {name: content for name, content in content_of(of).items() if name not in TIMED}
        for of in (found, wanted)
    )
    assert {"clean_probability.npz", "centroids.npz", "noisy_labels.npy"} <= theirs.keys() and ours == theirs
    results = [result_without_time_and_place(run) for run in (found, wanted)]
    for of in results:
        del of["environment"]["processes"]
    assert results[0] == results[1]


# a whole run ----------------------------------------------------------------------------------------------------------


def test_a_run_by_one_process(base, alone):
    assert log_of(base, "alone")[1] == ""
    rows = table(alone)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.01, 0.001, 0.001], rel=1e-12)
    # both sides of a split have a batch at least, the networks disagree, and selections change
    numbers = [[int(row[f"net{i}_selected"]) for row in rows] for i in (1, 2)]
    assert all(4 <= count <= 36 for own in numbers for count in own) and numbers[0] != numbers[1]
    assert all(len(set(own)) > 1 for own in numbers)
    # it learns: four classes that chance would get right in a quarter of the cases
    assert float(rows[-1]["test_accuracy"]) > 50 and float(rows[-1]["loss"]) < float(rows[1]["loss"])
    steps = sum(int(row[f"net{i}_selected"]) // 4 * 4 for row in rows[:-1] for i in (1, 2))
    assert result(alone)["images"] == 2 * 40 + steps
    assert result(alone)["environment"]["processes"] == 1
    for learner in state(alone)["learners"]:
        assert sorted(learner) == ["draws", "images", "network", "optimizer", "partners"]
        assert len(learner["optimizer"]["state"]) == 12  # momentum


def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, alone, ends):
    out, err = log_of(base, "killed")
    assert ends["in_one"].result()["killed"] == [[-9]] * len(MOMENTS) + [[0]] and err == "", err
    assert gone_on(out) == GONE_ON
    assert_same_run(base / "killed" / "run", alone)


def test_a_run_that_is_stopped_goes_on(base, alone, ends):
    assert ends["in_one"].result()["stopped"] == [[143], [0]]
    out, err = log_of(base, "stopped")
    assert err == "SIGTERM: stopped; the same command resumes after epoch 1\n" and gone_on(out) == (1,)
    assert_same_run(base / "stopped" / "run", alone)


# a network in each of two processes -----------------------------------------------------------------------------------


def test_a_network_in_each_process_is_the_very_same_run(base, alone, ends):
    assert ends["in_two"].result()["networks"] == [[0, 0]], log_of(base, "networks")[1]
    out, err = log_of(base, "networks")
    assert err == "" and "2 processes" in out
    assert all(out.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))
    run = base / "networks" / "run"
    assert_same_training(run, alone)
    assert result(run)["environment"]["processes"] == 2
    assert json.loads((run / "args.json").read_text())["arguments"]["parallel"] == "networks"


def test_two_processes_of_which_one_is_killed_end_as_if_nothing_had_happened(base, ends):
    statuses = ends["in_two"].result()["networks_killed"]
    out, err = log_of(base, "networks_killed")
    # the survivor may meet the closed connection before it is killed too
    assert all(first == -9 and second in (-9, 1) for first, second in statuses[:-1]), (statuses, err)
    assert len(statuses) == len(BY_TWO) + 1 and statuses[-1] == [0, 0], err
    assert gone_on(out) == GONE_ON_BY_TWO
    assert_same_run(base / "networks_killed" / "run", base / "networks" / "run")


def test_two_processes_that_are_stopped_go_on(base, ends):
    assert ends["in_two"].result()["networks_stopped"] == [[143, 143], [0, 0]]
    out, err = log_of(base, "networks_stopped")
    assert err.count("SIGTERM: stopped; the same command resumes after epoch 2\n") == 1
    assert gone_on(out) == (2,)
    assert_same_run(base / "networks_stopped" / "run", base / "networks" / "run")


def test_a_run_may_go_on_with_another_number_of_processes(base, alone, ends):
    """From two with a network each to one: the very same run. From one to two that share all: the same to the last digits."""
    statuses = ends["in_two"].result()
    assert statuses["moved"] in ([[-9, -9], [0]], [[-9, 1], [0]]) and gone_on(log_of(base, "moved")[0]) == (
        2,
    )
    assert_same_training(base / "moved" / "run", alone)
    assert statuses["back"] == [[-9], [0, 0]] and gone_on(log_of(base, "back")[0]) == (2,)
    assert_nearly_same(base / "back" / "run", alone)


def test_the_real_network_by_path_alone_and_started_as_two(base, ends):
    """By plain python, with worker processes; the second command becomes two processes of its own accord."""
    one, two = ends["user"].result(), ends["user_networks"].result()
    assert one.status == 0 and one.err == "", one.err
    assert two.status == 0, two.err
    run = base / "user" / "run"
    assert [row["epoch"] for row in table(run)] == ["1", "2"]
    for learner in state(run)["learners"]:
        webvision_network("resnet18", 4).load_state_dict(learner["network"])  # strict: all names and shapes
    assert_same_training(base / "user_networks" / "run", run)
    assert "2 processes" in two.out and "processes" not in one.out
    assert two.out.count("webvision train: 40 images") == 1
    commands = [result(base / name / "run")["command"] for name in ("user", "user_networks")]
    assert commands[0].startswith("python sfa/Train_webvision.py --num_class 4 ")
    assert commands[1].startswith("torchrun --nproc_per_node=2 sfa/Train_webvision.py --num_class 4 ")


# both networks in both processes --------------------------------------------------------------------------------------


def assert_nearly_same(found: Path, wanted: Path) -> None:
    """Losses to 1e-9, accuracies and selections alike, weights to 1e-7: sums in another order, in float64."""
    rows, expected = table(found), table(wanted)
    assert len(rows) == len(expected) == EPOCHS
    for row, other in zip(rows, expected, strict=True):
        for name in set(other) - {"seconds"}:
            ours, theirs = (float(of[name] or "nan") for of in (row, other))
            tolerance = 1e-9 if name == "loss" else 0
            assert ours == pytest.approx(theirs, rel=tolerance, abs=0, nan_ok=True), (name, other["epoch"])
    ours, theirs = (np.load(run / "clean_probability.npz") for run in (found, wanted))
    for name in ("net1", "net2"):
        assert ((ours[name] > 0.5) == (theirs[name] > 0.5)).all()
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert (ours["observed"] == theirs["observed"]).all()
    ours, theirs = (state(run) for run in (found, wanted))
    for own, other in zip(ours["learners"], theirs["learners"], strict=True):
        assert own["network"].keys() == other["network"].keys()
        for name, values in other["network"].items():
            torch.testing.assert_close(own["network"][name], values, rtol=1e-7, atol=1e-9, msg=name)
        momenta = [
            [entry["momentum_buffer"] for entry in of["optimizer"]["state"].values()] for of in (own, other)
        ]
        for buffer, values in zip(*momenta, strict=True):
            torch.testing.assert_close(buffer, values, rtol=1e-6, atol=1e-8)
        drawn = ("images", "partners", "draws")
        assert differences([own[name] for name in drawn], [other[name] for name in drawn]) == []
    results = [result(run) for run in (found, wanted)]
    assert all(results[0][name] == results[1][name] for name in ("images", "metrics"))


def test_both_networks_in_both_processes_of_torchrun_train_as_in_one(base, alone, ends):
    end = ends["data_parallel"].result()
    assert end.status == 0, end.err
    assert "2 processes" in end.out
    assert all(end.out.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))
    assert_nearly_same(base / "data_parallel" / "run", alone)
    assert result(base / "data_parallel" / "run")["command"].startswith("torchrun --nproc_per_node=2 -m ")


# as released ----------------------------------------------------------------------------------------------------------


def test_as_released_a_network_in_each_process_makes_no_difference_either(base, alone, ends):
    one, two = ends["in_one"].result(), ends["in_two"].result()
    assert (one["released"], two["released_networks"], two["released_data"]) == ([[0]], [[0, 0]], [[0, 0]])
    run = base / "released" / "run"
    arguments = json.loads((run / "args.json").read_text())["arguments"]
    assert (arguments["ema_mode"], arguments["reset_momentum"]) == ("released", "yes")
    assert_same_training(base / "released_networks" / "run", run)
    # with pieces of batches the smaller last ones are left out, of which the warm-up has none
    (first, second, *_), (wanted, other, *_) = (table(r) for r in (base / "released_data" / "run", run))
    assert float(first["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-9)
    assert float(second["loss"]) != pytest.approx(float(other["loss"]), rel=1e-4)
    # the moments, and so the centroids, are others from epoch 3 on; the momentum from epoch 2 on
    assert log_without_seconds(run)[1].split(",")[1] == log_without_seconds(alone)[1].split(",")[1]
    assert log_without_seconds(run)[2:] != log_without_seconds(alone)[2:]
