"""me_momentum/main.py as a user starts it, killed and started again; and, within this process, what a run does step by step.

A process start costs seconds, so the processes that several tests look at are run once, two at a time.
"""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from common import datasets, noise
from me_momentum import main
from me_momentum.confident import confident_examples
from me_momentum.networks import SmallNet
from me_momentum.training import train_epoch
from me_momentum.validation import split
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 150  # seconds a process may take, on a busy machine

# 4 epochs of early stopping and 2 rounds of 4 in each of 2 outer loops
SHORT = "--n_epoch 4 --max_outer_loop 2 --max_inner_loop 3 --batch_size 64 --lr 0.1"
FLAGS = [*f"--dataset digits --noise_rate 0.4 --device cpu {SHORT}".split()]
EPOCHS = 24
PHASES = [(outer, number) for outer in (1, 2) for number in (0, 1, 2) for _ in range(4)]
# early stopping; in a round; the fresh network of the second outer loop; its selection; a round of it
MOMENTS = ("3:training", "7:log", "13:training", "17:selection", "22:validation")

COLUMNS = [
    "epoch", "outer", "round", "loss", "validation_accuracy", "test_accuracy", "confident_size", "confident_share",
    "confident_precision", "confident_recall", "hard_share", "hard_precision", "right_selected_min",
    "classes_unselected", "train_accuracy", "lr",
    "test_accuracy_batchmean", "kept", "new_best", "seconds",
]  # fmt: skip
SET_COLUMNS = [name for name in COLUMNS if name.startswith(("confident", "hard", "right", "classes"))]


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def weights(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "model_best.pt", weights_only=True)


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


# processes --------------------------------------------------------------------------------------------------------------


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


def whole(folder: Path) -> dict:
    """By path from another folder; then the finished run once more, as a module."""
    (folder / "elsewhere").mkdir(parents=True)
    first = start(ROOT / "me_momentum" / "main.py", *FLAGS, "--out", "../run", cwd=folder / "elsewhere")
    before = content_of(folder / "run")
    again = start("-m", "me_momentum.main", *FLAGS, "--out", folder / "run")
    return {"first": first, "before": before, "again": again, "after": content_of(folder / "run")}


def killed(folder: Path) -> dict:
    """Killed again and again, then left alone."""
    words = [*FLAGS, "--out", folder / "run"]
    deaths = start("-m", "tests.end_to_end.killed", *MOMENTS, "--", *words)
    rows = len(table(folder / "run"))
    return {"deaths": deaths, "rows": rows, "last": start("me_momentum/main.py", *words)}


class Scenario(NamedTuple):
    run: Path
    future: Future

    @property
    def ends(self) -> dict:
        return self.future.result()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """name -> Scenario. All run directories have the same last name: it is a column of the results."""
    base = tmp_path_factory.mktemp("me_momentum")
    with ThreadPoolExecutor(2) as pool:
        yield {
            make.__name__: Scenario(base / make.__name__ / "run", pool.submit(make, base / make.__name__))
            for make in (whole, killed)
        }


# within this process ----------------------------------------------------------------------------------------------------


class Epoch(NamedTuple):
    """What went into an epoch of training and what came out."""

    before: dict[str, Tensor]  # weights
    after: dict[str, Tensor]
    trained: Tensor  # positions in the training part, in the order in which they came
    momentum: bool  # whether the optimiser remembered anything
    lr: float


class Recorder:
    """Runs the script in this process and keeps what its epochs did."""

    def __init__(self, folder: Path, *words: str | Path, flags: list[str] = FLAGS):
        self.run, self.epochs = folder / "run", []
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "train_epoch", self.train_epoch)
            torch.set_num_threads(1)
            try:
                main.main([*flags, *map(str, words), "--out", str(self.run)])
            finally:
                torch.set_num_threads(threads)

    def train_epoch(self, network, optimizer, batches, labels, device):
        trained, momentum, before = [], bool(optimizer.state), copied(network)

        def followed():
            for views, index in batches:
                trained.append(index)
                yield views, index

        found = train_epoch(network, optimizer, followed(), labels, device)
        lr = optimizer.param_groups[0]["lr"]
        self.epochs.append(Epoch(before, copied(network), torch.cat(trained), momentum, lr))
        return found


def copied(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorder:
    return Recorder(tmp_path_factory.mktemp("recorded"))


class Digits(NamedTuple):
    """The data of these runs, put together without the script."""

    train: Tensor  # images of the training part, normalised
    validation: Tensor
    test: Tensor
    labels: np.ndarray  # observed, of the training part
    validation_labels: np.ndarray
    test_labels: np.ndarray  # true
    right: np.ndarray  # whether an observed label of the training part is the true one


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = datasets.load("digits", ".")
    observed = noise.add_noise("symmetric", data.train.labels, 0.4, 10, 1)
    train, validation = split(1437, 0.9, 1)

    def normalised(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        return (pixels - data.mean[0]) / data.std[0]

    images = [data.train.images[train], data.train.images[validation], data.test.images]
    labels = [observed[train], observed[validation], data.test.labels]
    return Digits(*map(normalised, images), *labels, (observed == data.train.labels)[train])


def predicted(state: dict[str, Tensor], images: Tensor) -> np.ndarray:
    network = SmallNet(10, 1).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(images).argmax(dim=1).numpy()


# what a run leaves ------------------------------------------------------------------------------------------------------


def test_by_path_from_another_folder_it_runs_to_the_end(scenarios):
    first = scenarios["whole"].ends["first"]
    assert first.status == 0, first.err
    assert first.err == ""
    assert f"epoch {EPOCHS}  " in first.out and "\nfinished: test_accuracy best " in first.out


def test_the_log_has_a_row_per_epoch_of_every_phase(scenarios):
    assert scenarios["whole"].ends["first"].status == 0
    rows = table(scenarios["whole"].run)
    assert list(rows[0]) == COLUMNS
    assert [(int(row["outer"]), int(row["round"])) for row in rows] == PHASES
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert {row["lr"] for row in rows} == {"0.1"}
    # before the first selection there is no confident set, and in the first one nothing is hard
    assert all(row[name] == "" for row in rows[:4] for name in SET_COLUMNS)
    assert all(row["hard_precision"] == "" and float(row["hard_share"]) == 0 for row in rows[4:8])
    assert all(row[name] != "" for row in rows[8:] for name in SET_COLUMNS)


def test_what_is_reported_is_the_test_accuracy_of_the_last_new_best(scenarios, digits):
    assert scenarios["whole"].ends["first"].status == 0
    run = scenarios["whole"].run
    rows, metrics = table(run), result(run)["metrics"]
    tuned = [row for row in rows if row["round"] != "0"]
    new_bests = [row for row in tuned if row["new_best"] == "1"]
    assert len(new_bests) > 1 and all(row["new_best"] == "0" for row in rows if row["round"] == "0")
    best = max(tuned, key=lambda row: float(row["validation_accuracy"]))  # the first of equals
    assert best is new_bests[-1]
    assert metrics["at_best_validation"] == float(best["test_accuracy"])
    assert metrics["best_validation"] == float(best["validation_accuracy"])
    assert metrics["best"] == max(float(row["test_accuracy"]) for row in rows)
    assert metrics["last"] == float(rows[-1]["test_accuracy"])
    assert (metrics["epochs_trained"], metrics["rounds"]) == (EPOCHS, 4)
    assert all(metrics[name] == float(rows[-1][name]) for name in main.SET_COLUMNS)
    # and the weights that are kept are those of that epoch
    hits = predicted(weights(run), digits.test) == digits.test_labels
    assert 100 * hits.mean() == pytest.approx(metrics["at_best_validation"], rel=1e-12)


def test_labels_and_split_of_the_whole_training_set_are_kept(scenarios):
    assert scenarios["whole"].ends["first"].status == 0
    run = scenarios["whole"].run
    clean = datasets.load("digits", ".").train.labels
    observed = np.load(run / "noisy_labels.npy")
    assert observed.tolist() == noise.add_noise("symmetric", clean, 0.4, 10, 1).tolist()
    assert np.load(run / "train_index.npy").tolist() == list(range(1437))
    kept, parts = np.load(run / "split.npz"), split(1437, 0.9, 1)
    assert sorted(kept.files) == ["train", "validation"]
    assert np.array_equal(kept["train"], parts.train) and np.array_equal(kept["validation"], parts.validation)
    assert result(run)["noise"]["realised_rate"] == pytest.approx((observed != clean).mean())


def test_the_rows_of_the_result_say_what_was_run(scenarios):
    assert scenarios["whole"].ends["first"].status == 0
    with (scenarios["whole"].run / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = {row["metric"] for row in rows}
    assert {"best", "last", "last10", "at_best_validation", "rounds", "hard_share"} <= metrics
    for row in rows:
        assert (row["paper"], row["method"], row["dataset"]) == ("me_momentum", "Me-Momentum", "digits")
        assert (row["noise_type"], row["noise_rate"], row["profile"]) == ("symmetric", "0.4", "embedded")
        assert (row["fidelity"], row["seed"], row["epochs"]) == ("paper", "1", "4")
        assert row["command"].startswith("python me_momentum/main.py --dataset digits ")


def test_a_finished_run_started_again_as_a_module_changes_nothing(scenarios):
    ends = scenarios["whole"].ends
    assert ends["again"].status == 0, ends["again"].err
    assert ends["again"].err == ""
    assert f"going on after epoch {EPOCHS}" in ends["again"].out and "\nepoch " not in ends["again"].out
    assert {"log.csv", "result.json", "result.csv", "model_best.pt", "split.npz"} <= set(ends["before"])
    assert ends["after"] == ends["before"]


def test_a_run_killed_in_every_phase_ends_as_if_nothing_had_happened(scenarios):
    ends, run, reference = scenarios["killed"].ends, scenarios["killed"].run, scenarios["whole"].run
    assert scenarios["whole"].ends["first"].status == 0
    lines = ends["deaths"].out.splitlines()
    deaths = [line for line in lines if line.startswith("status")]
    assert deaths == ["status -9"] * len(MOMENTS), ends["deaths"].err
    went_on = [int(line.split()[-1]) for line in lines if line.startswith("going on after epoch")]
    assert went_on == [2, 6, 12, 16]
    assert ends["rows"] == 21
    assert ends["last"].status == 0 and ends["last"].err == "", ends["last"]
    assert "going on after epoch 21" in ends["last"].out
    assert log_without_seconds(run) == log_without_seconds(reference)
    assert result_without_time_and_place(run) == result_without_time_and_place(reference)
    assert same(weights(run), weights(reference))
    for name in ("noisy_labels.npy", "train_index.npy", "split.npz"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    found, wanted = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in (run, reference)
    )
    for name in ("set", "first"):
        assert torch.equal(found["memory"][name], wanted["memory"][name])
    assert same(found["memory"]["latest"], wanted["memory"]["latest"])
    assert torch.equal(found["generator"], wanted["generator"])


# what a run does --------------------------------------------------------------------------------------------------------


def selections(recorder: Recorder) -> dict[int, dict[str, Tensor]]:
    """Index of the first epoch of every round -> the best weights of its outer loop up to there."""
    found, latest = {}, None
    rows = table(recorder.run)
    for i, row in enumerate(rows):
        if row["outer"] != rows[i - 1]["outer"]:
            latest = None
        elif row["round"] != rows[i - 1]["round"]:
            found[i] = latest
        if row["kept"] == "1":
            latest = recorder.epochs[i].after
    return found


def test_every_round_starts_from_the_best_weights_of_its_outer_loop(recorded):
    begun = selections(recorded)
    assert list(begun) == [4, 8, 16, 20]
    for i, latest in begun.items():
        assert same(recorded.epochs[i].before, latest)
    # which are not always those of the epoch before
    assert any(not same(recorded.epochs[i - 1].after, latest) for i, latest in begun.items())


def test_within_a_phase_an_epoch_goes_on_where_the_last_one_ended(recorded):
    for i, (one, two) in enumerate(pairwise(recorded.epochs), start=1):
        if PHASES[i] == PHASES[i - 1]:
            assert same(one.after, two.before)


def test_an_outer_loop_begins_with_a_fresh_network_of_the_seed(recorded):
    torch.manual_seed(1)
    first, second = SmallNet(10, 1).state_dict(), SmallNet(10, 1).state_dict()
    assert same(recorded.epochs[0].before, first)
    assert same(recorded.epochs[12].before, second)
    assert not same(first, second)


def test_the_optimiser_forgets_between_phases_and_only_there(recorded):
    assert [epoch.momentum for epoch in recorded.epochs] == [i % 4 > 0 for i in range(EPOCHS)]


def test_every_round_trains_on_what_the_best_weights_predict_as_observed(recorded, digits):
    expected, sets = np.arange(len(digits.labels)), []
    begun = selections(recorded)
    for i, epoch in enumerate(recorded.epochs):
        if i in begun:
            expected = np.flatnonzero(predicted(begun[i], digits.train) == digits.labels)
            sets.append(expected)
        # each once, and not in their order; the second outer loop begins with the last set of the first
        assert np.array_equal(epoch.trained.sort().values, expected), i
        assert not np.array_equal(epoch.trained, expected)
    assert len({tuple(s) for s in sets}) == 4
    assert recorded.epochs[12].trained.sort().values.tolist() == sets[1].tolist()


def test_every_epoch_has_an_order_of_its_own(recorded):
    for one, two in pairwise(recorded.epochs):
        assert one.trained.tolist() != two.trained.tolist()


def test_the_columns_of_the_set_are_those_of_a_recount(recorded):
    rows = table(recorded.run)
    data = datasets.load("digits", ".")
    observed, kept = np.load(recorded.run / "noisy_labels.npy"), np.load(recorded.run / "split.npz")
    right, given = (observed == data.train.labels)[kept["train"]], observed[kept["train"]]
    classes = [set(np.flatnonzero(right & (given == c))) for c in range(10)]
    first = set(recorded.epochs[4].trained.tolist())
    for i in range(4, EPOCHS):
        confident = recorded.epochs[i].trained.tolist()
        hard = [p for p in confident if p not in first]
        expected = {
            "confident_size": len(confident),
            "confident_share": len(confident) / 1293,
            "confident_precision": right[confident].mean(),
            "confident_recall": right[confident].sum() / right.sum(),
            "hard_share": len(hard) / len(confident),
            "hard_precision": right[hard].mean() if hard else None,
            "right_selected_min": min(len(own & {*confident}) / len(own) for own in classes),
            "classes_unselected": 10 - len({*given[confident]}),
        }
        found = {name: float(rows[i][name]) if rows[i][name] else None for name in SET_COLUMNS}
        assert found == {n: v if v is None else pytest.approx(v, rel=1e-12) for n, v in expected.items()}
    assert 0 < float(rows[-1]["hard_share"]) < 1


def test_the_accuracies_of_the_log_are_those_of_the_epochs_weights(recorded, digits):
    for row, epoch in zip(table(recorded.run), recorded.epochs, strict=True):
        hits = predicted(epoch.after, digits.validation) == digits.validation_labels
        by_class = [hits[digits.validation_labels == c].mean() for c in range(10)]
        assert float(row["validation_accuracy"]) == pytest.approx(100 * np.mean(by_class), abs=0.0051)
        hits = predicted(epoch.after, digits.test) == digits.test_labels
        assert float(row["test_accuracy"]) == pytest.approx(100 * hits.mean(), rel=1e-12)
        batches = [hits[:128].mean(), hits[128:256].mean(), hits[256:].mean()]
        assert float(row["test_accuracy_batchmean"]) == pytest.approx(100 * np.mean(batches), rel=1e-12)


# other flags ------------------------------------------------------------------------------------------------------------


def test_as_released_grey_images_train_the_same_and_the_mean_over_batches_is_reported(recorded, tmp_path):
    released = Recorder(tmp_path, "--fidelity", "released").run
    assert log_without_seconds(released) == log_without_seconds(recorded.run)
    assert same(weights(released), weights(recorded.run))
    found, rows = result(released), table(released)
    best = [row for row in rows if row["new_best"] == "1"][-1]
    assert best["test_accuracy"] != best["test_accuracy_batchmean"]
    assert (found["metric"], found["fidelity"]) == ("test_accuracy_batchmean", "released")
    assert found["metrics"]["at_best_validation"] == float(best["test_accuracy_batchmean"])
    assert found["metrics"]["last"] == float(rows[-1]["test_accuracy_batchmean"])
    same_metrics = {"best_validation", "epochs_trained", "rounds", *main.SET_COLUMNS}
    paper = result(recorded.run)["metrics"]
    assert {n for n, value in found["metrics"].items() if value == paper[n]} >= same_metrics


def test_without_selection_it_is_cross_entropy_in_one_phase(recorded, tmp_path):
    plain = Recorder(tmp_path, "--selection", "none")
    rows, found = table(plain.run), result(plain.run)
    # the epochs before the first selection are the same
    assert [line.rpartition(",")[0] for line in log_without_seconds(plain.run)[1:]] == [
        line.rpartition(",")[0] for line in log_without_seconds(recorded.run)[1:5]
    ]
    assert [row["round"] for row in rows] == ["0"] * 4
    assert all(len(epoch.trained) == 1293 for epoch in plain.epochs)
    assert found["method"] == "CE"
    assert (found["metrics"]["rounds"], found["metrics"]["confident_size"]) == (0, None)
    best = max(rows, key=lambda row: float(row["validation_accuracy"]))  # the first of equals
    assert found["metrics"]["at_best_validation"] == float(best["test_accuracy"])
    assert same(weights(plain.run), plain.epochs[int(best["epoch"]) - 1].after)


def test_without_selection_failures_neither_end_the_training_nor_raise_a_hurdle(tmp_path):
    words = "--selection none --n_epoch 12 --es_step 50 --es_limit 0 --limit_train 400"
    rows = table(Recorder(tmp_path, *words.split()).run)
    assert len(rows) == 12
    best, won = 0.0, []
    for row in rows:
        won.append(float(row["validation_accuracy"]) > best)
        best = max(best, float(row["validation_accuracy"]))
    assert [row["kept"] == "1" for row in rows] == won
    # at least one came after a failure
    assert True in won[won.index(False) :]


def test_the_learning_rate_falls_in_rounds_alone(tmp_path):
    words = "--limit_train 400 --n_epoch 81 --max_outer_loop 1 --max_inner_loop 2 --es_limit 0"
    found = Recorder(tmp_path, *words.split())
    rows = table(found.run)
    tuning = [row["round"] for row in rows].index("1")
    assert 1 <= tuning <= 81 and len(rows) == tuning + 81
    expected = [0.1] * tuning + [0.1] * 40 + [0.01] * 40 + [0.001]
    assert [epoch.lr for epoch in found.epochs] == pytest.approx(expected)
    assert [float(row["lr"]) for row in rows] == [epoch.lr for epoch in found.epochs]


def test_an_empty_confident_set_leaves_the_one_before(monkeypatch, tmp_path, capsys):
    """Before the first set that is all of the training part."""
    calls = []

    def sometimes_empty(guesses: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        # in the first and the third selection every prediction is wrong
        return confident_examples((labels + 1) % 10 if len(calls) % 2 else guesses, labels)

    monkeypatch.setattr(main, "confident_examples", sometimes_empty)
    found = Recorder(tmp_path, "--n_epoch", "1")
    assert calls == [1293] * 4
    text = "round 1: no confident example, the set before is kept"
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [f"warning: outer loop {outer}, {text}" for outer in (1, 2)]
    one, empty, two, again, still, last = (epoch.trained.sort().values.tolist() for epoch in found.epochs)
    assert one == empty == list(range(1293))
    assert 0 < len(two) < 1293 and again == still == two != last
    rows = table(found.run)
    assert rows[1]["confident_size"] == "" and rows[2]["confident_size"] == str(len(two))
    assert [rows[4][name] for name in SET_COLUMNS] == [rows[2][name] for name in SET_COLUMNS]


def test_weights_that_never_won_are_still_there_for_the_selection(monkeypatch, tmp_path):
    """Where no epoch of early stopping beats an accuracy of zero, its last one selects."""
    monkeypatch.setattr(main, "balanced_accuracy", lambda *_: 0.0)
    found = Recorder(tmp_path, "--n_epoch", "2")
    # a round that leaves zero is no progress, so each outer loop has one
    rows = table(found.run)
    assert [(row["outer"], row["round"]) for row in rows] == [(o, r) for o in "12" for r in "0011"]
    assert {row["kept"] for row in rows} == {"0"}
    for tuning in (2, 6):
        assert same(found.epochs[tuning].before, found.epochs[tuning - 1].after)
    metrics = result(found.run)["metrics"]
    assert metrics["at_best_validation"] == float(rows[0]["test_accuracy"])


@pytest.mark.parametrize(
    ("fidelity", "improved", "expected"),
    [
        ("paper", True, {"at_best_validation": 30.0, "best_validation": 13.0}),
        ("released", True, {"at_best_validation": 30.0, "best_validation": 13.0}),
        ("paper", False, {"at_best_validation": 20.0, "best_validation": 14.0}),
        ("released", False, {"at_best_validation": 0.0, "best_validation": 0.0}),
    ],
)
def test_where_fine_tuning_never_won_the_best_of_early_stopping_is_reported(fidelity, improved, expected):
    """The release says 0 then."""
    nothing = dict.fromkeys(SET_COLUMNS)
    columns = ("outer", "round", "validation_accuracy", "test_accuracy", "kept", "new_best")
    rows = [
        dict(zip(columns, row, strict=True)) | nothing
        for row in (
            (1, 0, 12.0, 10.0, 1, 0),
            (1, 0, 14.0, 20.0, 1, 0),
            (1, 0, 14.1, 25.0, 0, 0),  # above the best, not above the hurdle
            (1, 1, 13.0, 30.0, 0, int(improved)),
            (2, 0, 14.0, 40.0, 1, 0),
        )
    ]
    args = Namespace(fidelity=fidelity, selection="confident")
    found = main.summary(rows, "test_accuracy", args)
    assert {name: found[name] for name in expected} == expected
    assert (found["epochs_trained"], found["rounds"]) == (5, 1)


def test_the_kept_weights_are_the_reported_ones_even_where_fine_tuning_never_won(digits, tmp_path):
    run = Recorder(tmp_path, "--lr", "0.01").run
    if any(row["new_best"] == "1" for row in table(run)):
        pytest.fail("in this run it won")
    hits = predicted(weights(run), digits.test) == digits.test_labels
    assert 100 * hits.mean() == pytest.approx(result(run)["metrics"]["at_best_validation"], rel=1e-12)


def test_a_subset_is_marked_and_split_like_a_training_set(tmp_path):
    run = Recorder(tmp_path, "--limit_train", "500", "--n_epoch", "1").run
    index, observed, parts = (
        np.load(run / name) for name in ("train_index.npy", "noisy_labels.npy", "split.npz")
    )
    assert len(index) == len(observed) == 500 and (np.diff(index) > 0).all()
    # the labels are those that a run on everything has
    clean = datasets.load("digits", ".").train.labels
    assert np.array_equal(observed, noise.add_noise("symmetric", clean, 0.4, 10, 1)[index])
    assert (len(parts["train"]), len(parts["validation"])) == (450, 50)
    assert sorted([*parts["train"], *parts["validation"]]) == index.tolist()
    assert result(run)["profile"] == "embedded+limit_train=500"
    words = ("--limit_train", "500", "--n_epoch", "1", "--noise_file", run / "noisy_labels.npy")
    again = Recorder(tmp_path / "again", *words).run
    assert log_without_seconds(again) == log_without_seconds(run)
    assert result(run)["noise"]["samples"] == 500


@pytest.mark.parametrize(("words", "recorded_shapes"), [([], [(64, 1, 8, 8)]), (["--no-cuda_graphs"], [])])
def test_training_is_recorded_for_replay_unless_told_not_to(words, recorded_shapes, tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(main.gpu.Device, "replay", lambda self, network, shape: shapes.append(tuple(shape)))
    Recorder(tmp_path, "--n_epoch", "1", "--max_outer_loop", "1", *words)
    assert shapes == recorded_shapes


def test_the_labels_of_a_run_given_to_another_make_it_the_same(recorded, tmp_path):
    run = Recorder(tmp_path, "--noise_file", recorded.run / "noisy_labels.npy").run
    assert result(run)["noise"] == result(recorded.run)["noise"]
    assert (result(run)["noise_type"], result(run)["noise_rate"]) == ("noisy_labels.npy", None)
    assert log_without_seconds(run) == log_without_seconds(recorded.run)


@pytest.mark.parametrize("noise_type", ["pairflip", "instance"])
def test_other_noise_of_the_release(noise_type, tmp_path):
    run = Recorder(tmp_path, "--noise_type", noise_type, "--n_epoch", "1").run
    train = datasets.load("digits", ".").train
    expected = noise.add_noise(noise_type, train.labels, 0.4, 10, 1, train.images)
    assert np.load(run / "noisy_labels.npy").tolist() == expected.tolist()
    assert result(run)["noise_type"] == noise_type


# colour images ----------------------------------------------------------------------------------------------------------


def colours(folder: Path) -> list[str]:
    """A data set of 32-pixel images of three colours; returns flags that train on it for two epochs of two rounds."""
    rng = np.random.default_rng(0)
    shade = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    arrays = {}
    for part, count in (("train", 200), ("test", 30)):
        labels = np.arange(count) % 3
        images = shade[labels][:, None, None] + rng.integers(-40, 41, (count, 32, 32, 3))
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(folder / "colours.npz", **arrays, noisy_labels=(np.arange(200) // 7) % 3)
    short = "--n_epoch 1 --max_outer_loop 1 --max_inner_loop 2 --batch_size 32"
    words = f"--dataset colours --network small --device cpu {short}".split()
    return [*words, "--data_path", str(folder)]


def watched_batches(passes: list[tuple[str, bool]]) -> Callable:
    """Batches that note for each pass what it goes through, and whether its images are other than the plain ones."""
    names = {180: "train", 20: "validation", 30: "test"}

    class Watched(main.Batches):
        def __iter__(self):
            what = "training" if self.shuffle else names[len(self.images)]
            changed = []
            for (view,), index in super().__iter__():
                changed.append(not torch.equal(view, self.images.view(index)))
                yield (view,), index
            passes.append((what, any(changed)))

    return Watched


@pytest.mark.parametrize(
    ("words", "augmented"),
    [
        ("", {"training", "train", "validation"}),
        ("--select_view test --val_view test", {"training"}),
        ("--val_view test", {"training", "train"}),
        ("--fidelity released --select_view test", {"training", "validation"}),
    ],
)
def test_colour_images_are_augmented_in_training_selection_and_validation_unless_plain_views_are_asked_for(
    words, augmented, monkeypatch, tmp_path
):
    passes = []
    monkeypatch.setattr(main, "Batches", watched_batches(passes))
    run = Recorder(tmp_path, *words.split(), flags=colours(tmp_path)).run
    epoch = ["training", "validation", "test"]
    assert [what for what, _ in passes] == [*epoch, "train", *epoch]
    assert {what for what, changed in passes if changed} == augmented
    assert all(changed == (what in augmented) for what, changed in passes)
    assert (result(run)["profile"], result(run)["dataset"]) == ("short", "colours")


def test_labels_that_come_with_the_data_can_be_trained_on(tmp_path):
    run = Recorder(tmp_path, "--noise_type", "given", flags=colours(tmp_path)).run
    assert np.load(run / "noisy_labels.npy").tolist() == [(i // 7) % 3 for i in range(200)]
    assert (result(run)["noise_type"], result(run)["noise_rate"]) == ("given", None)
