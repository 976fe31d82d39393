"""sfa/Train_webvision.py as processes run it: alone, a network in each of two, both in both; killed, stopped, and moved."""

from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch

from sfa.networks import webvision_network
from tests.common.small_file_data import make_doubtful_webvision
from tests.end_to_end import runs

pytestmark = pytest.mark.slow

# 40 training images of four classes and 36 in each test set, two batches of either. Moments carry over from epoch 3 on
SETTING = split(
    "--num_class 4 --network resnet18 --image_size 64 --batch_size 4 --lr_drop 3 --device cpu --workers 0"
)
EPOCHS = 4
NETWORKS, RELEASED = "--parallel networks", "--fidelity released"
# name -> flags; starts as (moment of the signal, processes), the last one to its end; how they end; epochs they find finished
RUNS = {
    "alone": ("", [("", 1)], [[0]], ()),
    # after the first checkpoint; in the warm-up; in co-divide; in a test; after a checkpoint
    "killed": (
        "",
        [(moment, 1) for moment in ("0:save", "1:warm-up of network 2", "2:training of network 2")]
        + [("3:imagenet", 1), ("4:save", 1), ("", 1)],
        [[-9]] * 5 + [[0]],
        (0, 0, 1, 2, 4),
    ),
    "stopped": ("", [("2:training:SIGTERM", 1), ("", 1)], [[143], [0]], (1,)),
    "networks": (NETWORKS, [("", 2)], [[0, 0]], ()),
    # either process dies, or both: between a row and its checkpoint, in a selection
    "networks_killed": (
        NETWORKS,
        [("2:log", 2), ("3:selection", 2), ("", 2)],
        [[-9, -9]] * 2 + [[0, 0]],
        (1, 2),
    ),
    "networks_stopped": (NETWORKS, [("3:training:SIGTERM", 2), ("", 2)], [[143, 143], [0, 0]], (2,)),
    "moved": (NETWORKS, [("3:training", 2), ("", 1)], [[-9, -9], [0]], (2,)),  # from two processes to one
    "moved_to_data": ("", [("3:log", 1), ("", 2)], [[-9], [0, 0]], (2,)),
    "data_parallel": ("", [("", 2)], [[0, 0]], ()),
    "released": (RELEASED, [("", 1)], [[0]], ()),
    "released_networks": (f"{RELEASED} {NETWORKS}", [("", 2)], [[0, 0]], ()),
    "released_data": (RELEASED, [("", 2)], [[0, 0]], ()),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("webvision")
    make_doubtful_webvision(folder / "data", classes=4, per_class=10, test_per_class=9)
    return folder


@pytest.fixture(scope="module")
def ends(base) -> dict[str, list[list[int]]]:
    """By name the exit statuses of the processes of each start, in the run directory NAME/run."""
    jobs = []
    for name, (words, starts, _, _) in RUNS.items():
        flags = [*SETTING, "--num_epochs", str(EPOCHS), "--data_path", str(base / "data")]
        for moment, processes in starts:
            # networks in one process is none; under torchrun that is the default, data
            typed = words.replace(NETWORKS, "") if processes == 1 else words
            slow = bool(moment) and processes > 1
            more = {"processes": processes, "slow": slow, "float64": True}
            job = runs.jobs_of("sfa.Train_webvision", base / name, [*flags, *typed.split()], **more)[0]
            jobs.append({**job, "moment": moment})
    found = iter(runs.run_jobs(jobs))
    return {name: [next(found) for _ in starts] for name, (_, starts, _, _) in RUNS.items()}


def assert_same_training(found: Path, wanted: Path) -> None:
    """Log, result, weights, generators and selections, whatever the number of processes."""
    assert runs.log_without_seconds(found) == runs.log_without_seconds(wanted)
    assert runs.differences(runs.state(found), runs.state(wanted)) == [] and runs.same_files(found, wanted)
    results = [runs.result_without_time_and_place(run) for run in (found, wanted)]
    for of in results:
        del of["environment"]["processes"]
    assert results[0] == results[1]


def assert_nearly_same(found: Path, wanted: Path) -> None:
    """Losses to 1e-9, accuracies and selections alike, weights to 1e-7: sums in another order, in float64."""
    runs.assert_close_logs(found, wanted, loss=1e-9)
    ours, theirs = (np.load(run / "clean_probability.npz") for run in (found, wanted))
    for name in ("net1", "net2"):
        assert ((ours[name] > 0.5) == (theirs[name] > 0.5)).all()
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    for own, other in zip(*(runs.state(run)["learners"] for run in (found, wanted)), strict=True):
        torch.testing.assert_close(own["network"], other["network"], rtol=1e-7, atol=1e-9)
        momenta = [of["optimizer"]["state"] for of in (own, other)]
        torch.testing.assert_close(*momenta, rtol=1e-6, atol=1e-8)
        drawn = ("images", "partners", "draws")
        assert runs.differences([own[name] for name in drawn], [other[name] for name in drawn]) == []
    results = [runs.result(run) for run in (found, wanted)]
    assert all(results[0][name] == results[1][name] for name in ("images", "metrics"))


def test_a_run_by_one_process_learns(base, ends):
    run = base / "alone" / "run"
    assert ends["alone"] == [[0]] and runs.printed(base / "alone")[1] == ""
    rows = runs.table(run)
    # both sides of a split have a batch at least, the networks disagree, and selections change
    numbers = [[int(row[f"net{i}_selected"]) for row in rows] for i in (1, 2)]
    assert all(4 <= count <= 36 for own in numbers for count in own) and numbers[0] != numbers[1]
    assert all(len(set(own)) > 1 for own in numbers)
    # four classes that chance would get right in a quarter of the cases
    assert float(rows[-1]["test_accuracy"]) > 50 and float(rows[-1]["loss"]) < float(rows[1]["loss"])
    quality, both = runs.label_quality(run), np.load(run / "clean_probability.npz")
    assert quality.score.to_numpy() == pytest.approx((both["net1"] + both["net2"]) / 2, abs=1e-5)
    assert quality.selected.tolist() == ((both["net1"] > 0.5) & (both["net2"] > 0.5)).tolist()
    steps = sum(int(row[f"net{i}_selected"]) // 4 * 4 for row in rows[:-1] for i in (1, 2))
    assert runs.result(run)["images"] == 2 * 40 + steps and runs.result(run)["environment"]["processes"] == 1


@pytest.mark.parametrize("name", [name for name in RUNS if name != "alone"])
def test_however_it_is_run_it_ends_as_the_run_that_nothing_disturbed(name, base, ends):
    _, starts, statuses, finished = RUNS[name]
    out, err = runs.printed(base / name)
    # beside a killed process the other one may end by the closed connection, before it is killed
    ended = [[-9 if -9 in start and status == 1 else status for status in start] for start in ends[name]]
    assert ended == statuses, err
    assert tuple(runs.resumed(out)) == finished
    if [-9, -9] not in statuses:
        stopped = "SIGTERM: stopped; the same command resumes after epoch"
        assert err.count(stopped) == err.count("\n") == name.count("stopped")
    run, wanted = base / name / "run", base / ("released" if "released" in name else "alone") / "run"
    counts = [count for _, count in starts]
    assert runs.result(run)["environment"]["processes"] == counts[-1]
    assert ("2 processes" in out) is (2 in counts)
    if name == "released_data":
        # with pieces of batches the smaller last ones are left out, of which the warm-up has none
        losses = [[float(row["loss"]) for row in runs.table(of)] for of in (run, wanted)]
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-9)
        assert losses[0][1] != pytest.approx(losses[1][1], rel=1e-4)
    elif name in ("data_parallel", "moved_to_data"):
        assert_nearly_same(run, wanted)
    else:
        assert_same_training(run, wanted)


def test_as_released_moments_and_momentum_differ(base, ends):
    ours, theirs = (runs.log_without_seconds(base / name / "run") for name in ("released", "alone"))
    assert ours[1].split(",")[1] == theirs[1].split(",")[1] and ours[2:] != theirs[2:]


def test_the_real_network_is_started_as_two_by_plain_python(base):
    """With worker processes; the command becomes two processes of its own accord."""
    (base / "user").mkdir()
    words = "--data_path ../data/ --out run --limit_train 14 --num_epochs 2 --parallel networks --workers 2"
    end = runs.start(runs.ROOT / "sfa" / "Train_webvision.py", *SETTING, *split(words), cwd=base / "user")
    assert end.status == 0, end.err
    run = base / "user" / "run"
    assert [row["epoch"] for row in runs.table(run)] == ["1", "2"]
    for learner in runs.state(run)["learners"]:
        webvision_network("resnet18", 4).load_state_dict(learner["network"])  # strict: all names and shapes
    assert "2 processes" in end.out and end.out.count("webvision train: 40 images") == 1
    command = "torchrun --nproc_per_node=2 sfa/Train_webvision.py --num_class 4 "
    assert runs.result(run)["command"].startswith(command)
