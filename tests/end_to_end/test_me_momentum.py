"""me_momentum/main.py killed and started again; and, within this process, what a run does step by step."""

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from common import datasets, noise
from me_momentum import main
from me_momentum.confident import SET_COLUMNS, confident_examples, set_statistics
from me_momentum.networks import SmallNet
from me_momentum.report import summary
from me_momentum.training import train_epoch
from me_momentum.validation import split
from tests.end_to_end import runs

# 4 epochs of early stopping and 2 rounds of 4 in each of 2 outer loops
SHORT = "--n_epoch 4 --max_outer_loop 2 --max_inner_loop 3 --batch_size 64 --lr 0.1"
FLAGS = f"--dataset digits --noise_rate 0.4 --device cpu {SHORT}"
EPOCHS = 24
PHASES = [(outer, number) for outer in (1, 2) for number in (0, 1, 2) for _ in range(4)]
# early stopping; in a round; the fresh network of the second outer loop; its selection; a round of it
MOMENTS = ("3:training", "7:log", "13:training", "17:selection", "22:validation")

OF_SET = [*SET_COLUMNS, "right_selected_min", "classes_unselected"]
COLUMNS = ["epoch", "outer", "round", "loss", "validation_accuracy", "test_accuracy", *OF_SET]
COLUMNS += ["train_accuracy", "lr", "test_accuracy_batchmean", "kept", "new_best", "seconds"]


def weights(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "model_best.pt", weights_only=True)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return runs.differences(one, two) == []


class Recorder:
    """Runs the script in this process and keeps of each epoch what went in and what came out.

    before, after: weights. trained: positions in their order. momentum: whether the optimiser remembered anything.
    """

    def __init__(self, folder: Path, words: str = "", flags: str = FLAGS):
        self.run, self.epochs = folder / "run", []
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "train_epoch", self.train_epoch)
            torch.set_num_threads(1)  # sums are always made in the same order
            try:
                main.main([*flags.split(), *words.split(), "--out", str(self.run)])
            finally:
                torch.set_num_threads(threads)

    def train_epoch(self, network, optimizer, batches, labels, device):
        trained, momentum, before = [], bool(optimizer.state), main.copy_of(network)

        def followed():
            for views, index in batches:
                trained.append(index)
                yield views, index

        found = train_epoch(network, optimizer, followed(), labels, device)
        seen = {"before": before, "after": main.copy_of(network), "momentum": momentum}
        seen |= {"trained": torch.cat(trained), "lr": optimizer.param_groups[0]["lr"]}
        self.epochs.append(SimpleNamespace(**seen))
        return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorder:
    return Recorder(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def digits() -> SimpleNamespace:
    """The data of these runs, put together without the script. labels: observed, of the training part, as `right`."""
    data = datasets.load("digits", ".")
    observed = noise.add_noise("symmetric", data.train.labels, 0.4, 10, 1)
    train, validation = split(1437, 0.9, 1)

    def normalised(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        return (pixels - data.mean[0]) / data.std[0]

    return SimpleNamespace(
        train=normalised(data.train.images[train]),
        validation=normalised(data.train.images[validation]),
        test=normalised(data.test.images),
        labels=observed[train],
        validation_labels=observed[validation],
        test_labels=data.test.labels,
        right=(observed == data.train.labels)[train],
    )


def predicted(state: dict[str, Tensor], images: Tensor) -> np.ndarray:
    network = SmallNet(10, 1).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(images).argmax(dim=1).numpy()


@pytest.mark.slow
def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(recorded, tmp_path):
    jobs = runs.jobs_of("me_momentum.main", tmp_path, FLAGS.split(), *MOMENTS)
    statuses = runs.run_jobs([*jobs, jobs[-1]])
    runs.assert_survived(tmp_path, recorded.run, statuses, MOMENTS, (2, 6, 12, 16, 21, 24))


def test_the_log_has_a_row_per_epoch_of_every_phase(recorded):
    rows = runs.table(recorded.run)
    assert list(rows[0]) == COLUMNS
    assert [(int(row["outer"]), int(row["round"])) for row in rows] == PHASES
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert {row["lr"] for row in rows} == {"0.1"}
    # before the first selection there is no confident set, and in the first one nothing is hard
    assert all(row[name] == "" for row in rows[:4] for name in OF_SET)
    assert all(row["hard_precision"] == "" and float(row["hard_share"]) == 0 for row in rows[4:8])
    assert all(row[name] != "" for row in rows[8:] for name in OF_SET)


def test_what_is_reported_is_the_test_accuracy_of_the_last_new_best(recorded, digits):
    run = recorded.run
    rows, metrics = runs.table(run), runs.result(run)["metrics"]
    tuned = [row for row in rows if row["round"] != "0"]
    new_bests = [row for row in rows if row["new_best"] == "1"]
    assert len(new_bests) > 1 and all(row["round"] != "0" for row in new_bests)
    best = max(tuned, key=lambda row: float(row["validation_accuracy"]))  # the first of equals
    assert best is new_bests[-1]
    assert metrics["at_best_validation"] == float(best["test_accuracy"])
    assert metrics["best_validation"] == float(best["validation_accuracy"])
    assert metrics["best"] == max(float(row["test_accuracy"]) for row in rows)
    assert metrics["last"] == float(rows[-1]["test_accuracy"])
    assert (metrics["epochs_trained"], metrics["rounds"]) == (EPOCHS, 4)
    assert all(metrics[name] == float(rows[-1][name]) for name in SET_COLUMNS)
    # and the weights that are kept are those of that epoch
    hits = predicted(weights(run), digits.test) == digits.test_labels
    assert 100 * hits.mean() == pytest.approx(metrics["at_best_validation"], rel=1e-12)
    quality, (train, validation) = runs.label_quality(run), split(1437, 0.9, 1)
    assert quality.predicted_label[train].tolist() == predicted(weights(run), digits.train).tolist()
    assert quality.predicted_label[validation].tolist() == predicted(weights(run), digits.validation).tolist()
    confident = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["memory"]["confident"]
    assert np.flatnonzero(quality.selected[train] == 1).tolist() == confident.tolist()
    assert quality.selected[validation].isna().all() and runs.auroc(quality) > 0.5
    sure = quality.predicted_label == quality.given_label
    assert (quality.score[sure] == quality.predicted_probability[sure]).all() and 0 < sure.sum() < 1437


def test_labels_and_split_are_those_of_the_seed(recorded):
    run, clean = recorded.run, datasets.load("digits", ".").train.labels
    observed, kept, parts = np.load(run / "noisy_labels.npy"), np.load(run / "split.npz"), split(1437, 0.9, 1)
    assert observed.tolist() == noise.add_noise("symmetric", clean, 0.4, 10, 1).tolist()
    assert np.load(run / "train_index.npy").tolist() == list(range(1437))
    assert np.array_equal(kept["train"], parts.train) and np.array_equal(kept["validation"], parts.validation)
    assert runs.result(run)["noise"]["realised_rate"] == pytest.approx((observed != clean).mean())


def selections(recorder: Recorder) -> dict[int, dict[str, Tensor]]:
    """Index of the first epoch of every round -> the best weights of its outer loop up to there."""
    found, best = {}, None
    rows = runs.table(recorder.run)
    for i, row in enumerate(rows):
        if row["outer"] != rows[i - 1]["outer"]:
            best = None
        elif row["round"] != rows[i - 1]["round"]:
            found[i] = best
        if row["kept"] == "1":
            best = recorder.epochs[i].after
    return found


def test_phases_start_from_the_best_or_fresh_weights_and_epochs_where_the_last_one_ended(recorded):
    begun, epochs = selections(recorded), recorded.epochs
    assert list(begun) == [4, 8, 16, 20]
    torch.manual_seed(1)
    starts = {0: SmallNet(10, 1).state_dict(), 12: SmallNet(10, 1).state_dict(), **begun}
    for i, epoch in enumerate(epochs):
        assert same(epoch.before, starts.get(i, epochs[i - 1].after)), i
        assert epoch.momentum == (i not in starts)
    # the best weights are not always those of the epoch before
    assert any(not same(epochs[i - 1].after, best) for i, best in begun.items())


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
    for one, two in pairwise(recorded.epochs):
        assert one.trained.tolist() != two.trained.tolist()


def test_the_columns_of_the_log_are_those_of_a_recount(recorded, digits):
    classes = [set(np.flatnonzero(digits.right & (digits.labels == c))) for c in range(10)]
    first = recorded.epochs[4].trained
    for i, (row, epoch) in enumerate(zip(runs.table(recorded.run), recorded.epochs, strict=True)):
        hits = predicted(epoch.after, digits.validation) == digits.validation_labels
        by_class = [hits[digits.validation_labels == c].mean() for c in range(10)]
        assert float(row["validation_accuracy"]) == pytest.approx(100 * np.mean(by_class), abs=0.0051)
        hits = predicted(epoch.after, digits.test) == digits.test_labels
        assert float(row["test_accuracy"]) == pytest.approx(100 * hits.mean(), rel=1e-12)
        batches = [hits[:128].mean(), hits[128:256].mean(), hits[256:].mean()]
        assert float(row["test_accuracy_batchmean"]) == pytest.approx(100 * np.mean(batches), rel=1e-12)
        if i < 4:
            continue
        confident = epoch.trained.tolist()
        expected = {
            **set_statistics(epoch.trained, torch.from_numpy(digits.right), first, 1293),
            "right_selected_min": min(len(own & {*confident}) / len(own) for own in classes),
            "classes_unselected": 10 - len({*digits.labels[confident]}),
        }
        found = {name: float(row[name]) if row[name] else None for name in OF_SET}
        assert found == {n: v if v is None else pytest.approx(v, rel=1e-12) for n, v in expected.items()}
    assert 0 < float(row["hard_share"]) < 1


@pytest.mark.slow
def test_as_released_with_the_labels_of_a_file_grey_images_train_the_same(recorded, tmp_path):
    """And the mean over batches is reported."""
    run = Recorder(tmp_path, f"--fidelity released --noise_file {recorded.run / 'noisy_labels.npy'}").run
    assert runs.log_without_seconds(run) == runs.log_without_seconds(recorded.run)
    assert same(weights(run), weights(recorded.run))
    found, rows = runs.result(run), runs.table(run)
    best = [row for row in rows if row["new_best"] == "1"][-1]
    assert best["test_accuracy"] != best["test_accuracy_batchmean"]
    assert (found["metric"], found["fidelity"]) == ("test_accuracy_batchmean", "released")
    assert (found["noise_type"], found["noise_rate"]) == ("noisy_labels.npy", None)
    assert found["noise"] == runs.result(recorded.run)["noise"]
    assert found["metrics"]["at_best_validation"] == float(best["test_accuracy_batchmean"])
    assert found["metrics"]["last"] == float(rows[-1]["test_accuracy_batchmean"])


def test_without_selection_it_is_cross_entropy_in_one_phase(tmp_path):
    """Failures neither end the training nor raise a hurdle."""
    plain = Recorder(tmp_path, "--selection none --n_epoch 12 --es_step 50 --es_limit 0 --limit_train 400")
    rows, found = runs.table(plain.run), runs.result(plain.run)
    assert [row["round"] for row in rows] == ["0"] * 12
    assert all(len(epoch.trained) == 360 for epoch in plain.epochs)
    assert (found["method"], found["profile"]) == ("CE", "embedded+limit_train=400")
    assert (found["metrics"]["rounds"], found["metrics"]["confident_size"]) == (0, None)
    validation = [float(row["validation_accuracy"]) for row in rows]
    won = [value > max(validation[:i], default=0.0) for i, value in enumerate(validation)]
    assert [row["kept"] == "1" for row in rows] == won
    assert True in won[won.index(False) :], "at least one came after a failure"
    best = int(np.argmax(validation))  # the first of equals
    assert found["metrics"]["at_best_validation"] == float(rows[best]["test_accuracy"])
    assert same(weights(plain.run), plain.epochs[best].after)


def test_the_learning_rate_falls_in_rounds_alone(tmp_path):
    loops = "--n_epoch 81 --max_outer_loop 1 --max_inner_loop 2 --es_limit 0"
    found = Recorder(tmp_path, f"--limit_train 400 --batch_size 360 {loops}")
    rows = runs.table(found.run)
    tuning = [row["round"] for row in rows].index("1")
    assert 1 <= tuning <= 81 and len(rows) == tuning + 81
    assert [e.lr for e in found.epochs] == pytest.approx([0.1] * (tuning + 40) + [0.01] * 40 + [0.001])
    assert [float(row["lr"]) for row in rows] == [epoch.lr for epoch in found.epochs]


def test_an_empty_confident_set_leaves_the_one_before(monkeypatch, tmp_path, capsys):
    """Before the first set that is all of the training part."""
    calls = []

    def sometimes_empty(guesses: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        # in the first and the third selection every prediction is wrong
        return confident_examples((labels + 1) % 10 if len(calls) % 2 else guesses, labels)

    monkeypatch.setattr(main, "confident_examples", sometimes_empty)
    found = Recorder(tmp_path, "--n_epoch 1")
    assert calls == [1293] * 4
    text = "round 1: no confident example, the set before is kept"
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [f"warning: outer loop {outer}, {text}" for outer in (1, 2)]
    one, empty, two, again, still, last = (epoch.trained.sort().values.tolist() for epoch in found.epochs)
    assert one == empty == list(range(1293))
    assert 0 < len(two) < 1293 and again == still == two != last
    rows = runs.table(found.run)
    assert rows[1]["confident_size"] == "" and rows[2]["confident_size"] == str(len(two))
    assert [rows[4][name] for name in SET_COLUMNS] == [rows[2][name] for name in SET_COLUMNS]


def test_weights_that_never_won_are_still_there_for_the_selection(monkeypatch, tmp_path):
    """If no epoch of early stopping beats an accuracy of zero, its last one selects. Training is recorded for replay."""
    shapes = []
    monkeypatch.setattr(main.gpu.Device, "replay", lambda self, network, shape: shapes.append(tuple(shape)))
    monkeypatch.setattr(main, "balanced_accuracy", lambda *_: 0.0)
    found = Recorder(tmp_path, "--n_epoch 2 --noise_type pairflip --cuda_graphs")
    assert shapes == [(64, 1, 8, 8)] and runs.result(found.run)["noise_type"] == "pairflip"
    # a round that leaves zero is no progress, so each outer loop has one
    rows = runs.table(found.run)
    assert [(row["outer"], row["round"]) for row in rows] == [(o, r) for o in "12" for r in "0011"]
    assert {row["kept"] for row in rows} == {"0"}
    for tuning in (2, 6):
        assert same(found.epochs[tuning].before, found.epochs[tuning - 1].after)
    assert runs.result(found.run)["metrics"]["at_best_validation"] == float(rows[0]["test_accuracy"])


@pytest.mark.parametrize("fidelity", ["paper", "released"])
@pytest.mark.parametrize("improved", [True, False])
def test_if_fine_tuning_never_won_the_best_of_early_stopping_is_reported(fidelity, improved):
    """The release says 0 then."""
    columns = ("outer", "round", "validation_accuracy", "test_accuracy", "kept", "new_best")
    epochs = [(1, 0, 12.0, 10.0, 1, 0), (1, 0, 14.0, 20.0, 1, 0), (1, 0, 14.1, 25.0, 0, 0)]
    epochs += [(1, 1, 13.0, 30.0, 0, int(improved)), (2, 0, 14.0, 40.0, 1, 0)]
    rows = [dict(zip(columns, epoch, strict=True)) | dict.fromkeys(SET_COLUMNS) for epoch in epochs]
    found = summary(rows, "test_accuracy", Namespace(fidelity=fidelity, selection="confident"))
    expected = (30.0, 13.0) if improved else {"paper": (20.0, 14.0), "released": (0.0, 0.0)}[fidelity]
    assert (found["at_best_validation"], found["best_validation"]) == expected
    assert (found["epochs_trained"], found["rounds"]) == (5, 1)


@pytest.mark.slow
def test_the_kept_weights_are_the_reported_ones_even_where_fine_tuning_never_won(digits, tmp_path):
    run = Recorder(tmp_path, "--lr 0.01").run
    assert all(row["new_best"] == "0" for row in runs.table(run))
    hits = predicted(weights(run), digits.test) == digits.test_labels
    assert 100 * hits.mean() == pytest.approx(runs.result(run)["metrics"]["at_best_validation"], rel=1e-12)


def colours(folder: Path) -> str:
    """A data set of 32-pixel images of three colours; returns flags that train on it for two epochs of two rounds."""
    rng = np.random.default_rng(0)
    shade, arrays = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]]), {}
    for part, count in (("train", 200), ("test", 30)):
        labels = np.arange(count) % 3
        images = shade[labels][:, None, None] + rng.integers(-40, 41, (count, 32, 32, 3))
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(folder / "colours.npz", **arrays, noisy_labels=(np.arange(200) // 7) % 3)
    words = "--n_epoch 1 --max_outer_loop 1 --max_inner_loop 2 --batch_size 32 --network small --device cpu"
    return f"--dataset colours {words} --data_path {folder}"


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
        ("--noise_type given", {"training", "train", "validation"}),
        ("--val_view test", {"training", "train"}),
        ("--fidelity released --select_view test", {"training", "validation"}),
    ],
)
def test_colour_images_are_augmented_in_training_selection_and_validation_unless_plain_views_are_asked_for(
    words, augmented, monkeypatch, tmp_path
):
    passes = []
    monkeypatch.setattr(main, "Batches", watched_batches(passes))
    run = Recorder(tmp_path, words, flags=colours(tmp_path)).run
    epoch = ["training", "validation", "test"]
    # the given labels are judged on plain images
    assert [passes.pop(), passes.pop()] == [("validation", False), ("train", False)]
    assert [what for what, _ in passes] == [*epoch, "train", *epoch]
    assert all(changed == (what in augmented) for what, changed in passes)
    assert (runs.result(run)["profile"], runs.result(run)["dataset"]) == ("short", "colours")
    if "given" in words:
        assert np.load(run / "noisy_labels.npy").tolist() == [(i // 7) % 3 for i in range(200)]
        assert (runs.result(run)["noise_type"], runs.result(run)["noise_rate"]) == ("given", None)
