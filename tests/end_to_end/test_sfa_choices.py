"""sfa/Train_cifar.py with every selection and every loss of the standard head; who learns from whom; killed and started again.

This file is also the script that the killed runs are started by, in a process of its own each, with one import for all.
"""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.runs import selection_report
from common.runs.run import Run
from sfa import Train_cifar
from sfa.evaluation import SELECTION_STATISTICS, selection_statistics
from sfa.small_loss import SmallLoss
from tests.end_to_end.killed import MortalRun
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
FLAGS = split("--dataset digits --imb_factor 0.1 --num_epochs 4 --warm_up 2 --device cpu")
SAMPLES, CLASSES = 581, 10

# name -> what is asked for, and what a result row calls it
RUNS = {
    "sfa": ("", "SFA"),
    "sfa-gce": ("--loss gce", "SFA + GCE"),
    "sfa-balanced_softmax": ("--loss balanced_softmax", "SFA + balanced softmax"),
    "gmm-ldam": ("--selection gmm --loss ldam", "GMM + LDAM"),
    "gmm-logit_adjusted": ("--selection gmm --loss logit_adjusted", "GMM + logit adjustment"),
    "none": ("--selection none", "no selection"),
    "none-sce": ("--selection none --loss sce", "no selection + SCE"),
}
# name -> where it is killed, one time after the other, before it is left to end
KILLED = {"gmm-ldam": ("3:selection", "4:training"), "sfa": ("3:log", "4:selection")}
STATISTICS = [f"net{i}_{name}" for i in (1, 2) for name in (*SELECTION_STATISTICS, "drawn_classes")]
STATISTICS += selection_report.COLUMNS


def words(name: str, folder: Path) -> list[str]:
    return [*FLAGS, *RUNS[name][0].split(), "--out", str(folder / name)]


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arrays(run: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(run / f"{name}.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], Path]:
    """run(name): the directory of that run, made in this process at the first call."""
    base = tmp_path_factory.mktemp("whole")

    def made(name: str) -> Path:
        if not (base / name).exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the killed ones have, so that sums are made in the same order
            try:
                Train_cifar.main(words(name, base))
            finally:
                torch.set_num_threads(threads)
        return base / name

    return made


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of the runs of KILLED."""
    base = tmp_path_factory.mktemp("killed")
    jobs = [[moment, words(name, base)] for name in KILLED for moment in (*KILLED[name], None)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.test_sfa_choices", json.dumps(jobs)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = [int(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("status")]
    assert found == [-9, -9, 0] * len(KILLED), ended.stderr
    return base


# what a run leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_result_names_the_method_and_measures_the_accuracy(name, run):
    method = RUNS[name][1]
    with (run(name) / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {method}
    values = {row["metric"]: float(row["value"]) for row in rows}
    curve = [float(row["test_accuracy"]) for row in table(run(name))]
    assert [values["last"], values["best"]] == pytest.approx([curve[-1], max(curve)])
    assert len(curve) == 4 and all(float(row["loss"]) > 0 for row in table(run(name)))
    selects = not name.startswith("none")
    assert [f"last_net1_{part}" in values for part in ("precision", "recall", "auc")] == [selects] * 3
    result = json.loads((run(name) / "result.json").read_text())
    assert result["method"] == method and result["profile"] == "embedded"


@pytest.mark.parametrize("name", RUNS)
def test_the_log_has_the_statistics_of_what_was_selected_and_no_others(name, run):
    rows = table(run(name))
    assert list(rows[0]) == list(table(run("sfa"))[0])
    for epoch, row in enumerate(rows, start=1):
        filled = [column for column in STATISTICS if row[column] != ""]
        if epoch <= 2 or name.startswith("none"):
            assert filled == []
        elif name.startswith("gmm"):
            assert filled == [column for column in STATISTICS if not column.endswith("drawn_classes")]
        else:
            assert filled == STATISTICS
            assert all(1 <= int(row[f"net{i}_drawn_classes"]) <= CLASSES for i in (1, 2))


@pytest.mark.parametrize("name", RUNS)
def test_the_clean_probabilities_are_those_of_the_last_selection(name, run):
    folder = run(name)
    if name.startswith("none"):
        assert not (folder / "clean_probability.npz").exists()
        return
    found, last = arrays(folder, "clean_probability"), table(folder)[-1]
    assert sorted(found) == ["clean", "net1", "net2", "observed"]
    assert np.array_equal(found["observed"], np.load(folder / "noisy_labels.npy"))
    assert 0.49 < np.mean(found["observed"] != found["clean"]) < 0.5
    assert not np.array_equal(found["net1"], found["net2"])
    for i in (1, 2):
        clean = found[f"net{i}"]
        assert clean.shape == (SAMPLES,) and clean.dtype == np.float64
        assert clean.min() >= 0 and clean.max() <= 1
        report = selection_statistics(clean, clean > 0.5, found["observed"], found["clean"], CLASSES)
        for column, value in report.items():
            assert float(last[f"net{i}_{column}"]) == pytest.approx(value), column
        assert 0 < report["selected"] < SAMPLES
    observed, right = found["observed"], found["observed"] == found["clean"]
    chosen = [found[f"net{i}"] > 0.5 for i in (1, 2)]
    shares = [own[right & (observed == c)].mean() for own in chosen for c in range(CLASSES)]
    assert float(last["right_selected_min"]) == pytest.approx(min(shares))
    assert int(last["classes_unselected"]) == max(CLASSES - len({*observed[own]}) for own in chosen)


@pytest.mark.parametrize("name", RUNS)
def test_centroids_are_kept_for_every_epoch_of_feature_averaging(name, run):
    folder = run(name)
    if not name.startswith("sfa"):
        assert not (folder / "centroids.npz").exists()
        return
    found = arrays(folder, "centroids")
    assert list(found) == ["net1"]
    assert found["net1"].shape == (2, CLASSES, 64) and found["net1"].dtype == np.float16
    assert np.isfinite(found["net1"]).all() and not np.array_equal(*found["net1"])
    # means of unit vectors, drawn close to them
    assert (np.linalg.norm(found["net1"].astype(float), axis=2) < 1.01).all()


def test_without_selection_a_run_is_a_warm_up_to_its_end(run):
    none, sfa = (log_without_seconds(run(name)) for name in ("none", "sfa"))
    assert none[:3] == sfa[:3], "the header and two epochs, bit for bit"
    assert none[3] != sfa[3]
    images = json.loads((run("none") / "result.json").read_text())["images"]
    assert images == 2 * 4 * SAMPLES


def test_each_loss_is_another(run):
    first = {name: table(run(name))[0]["loss"] for name in RUNS}
    same = [name for name in RUNS if first[name] == first["sfa"]]
    assert same == ["sfa", "none"]
    # with a weight of 1 logit adjustment is balanced softmax, but for the order of sums
    adjusted, balanced = float(first["gmm-logit_adjusted"]), float(first["sfa-balanced_softmax"])
    assert adjusted == pytest.approx(balanced, rel=1e-3)
    assert (
        len({first[name] for name in ("sfa", "sfa-gce", "sfa-balanced_softmax", "gmm-ldam", "none-sce")}) == 5
    )


# killed -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_ends_as_if_nothing_had_happened(name, run, killed):
    whole = run(name)
    assert len(log_without_seconds(whole)) == 5
    assert log_without_seconds(killed / name) == log_without_seconds(whole)
    assert result_without_time_and_place(killed / name) == result_without_time_and_place(whole)
    saved = [*(["centroids"] if name == "sfa" else []), "clean_probability"]
    assert sorted(path.stem for path in (killed / name).glob("*.npz")) == [*saved, "noisy_labels"]
    for file in saved:
        found, expected = arrays(killed / name, file), arrays(whole, file)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected), file


# who learns from whom -----------------------------------------------------------------------------------------------------


def test_where_nothing_is_selected_nothing_is_trained_and_that_is_said(tmp_path, capsys):
    flags = split("--selection gmm --p_threshold 1 --num_epochs 3 --warm_up 1 --limit_train 120")
    Train_cifar.main([*FLAGS, *flags, "--out", str(tmp_path / "run")])
    rows = table(tmp_path / "run")
    assert [row["loss"] == "" for row in rows] == [False, True, True]
    assert len({row["test_accuracy"] for row in rows}) == 1, "as the warm-up left it"
    assert [row["net1_selected"] for row in rows] == ["", "0", "0"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"warning: epoch {epoch}: no sample selected, one network is not trained" for epoch in (2, 2, 3, 3)
    ]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["images"] == 2 * 120


@pytest.fixture
def watched(monkeypatch, tmp_path) -> Callable[..., SimpleNamespace]:
    """watched(*flags): a short run whose selections and training passes are looked at."""
    seen = SimpleNamespace(selections=[], warm_ups=[], trainings=[], nets=[])
    real = {name: getattr(Train_cifar, name) for name in ("select", "warm_up", "train_semi", "make_network")}

    def make_network(*given):
        seen.nets.append(real["make_network"](*given))
        return seen.nets[-1]

    def select(network, moments, num_classes, epoch, s):
        standard = network.eval()(s.train.view(torch.arange(len(s.labels))))[1].detach()
        own = {"network": network, "moments": moments, "draws": s.draws.bit_generator.state}
        found = real["select"](network, moments, num_classes, epoch, s)
        seen.selections.append(SimpleNamespace(**own, found=found, standard=standard, labels=s.labels))
        return found

    def warm_up(network, optimizer, batches, labels, class_counts, device, loss):
        batches = list(batches)
        own = {"network": network, "optimizer": optimizer, "counts": class_counts, "loss": loss}
        seen.warm_ups.append(SimpleNamespace(**own, batches=batches))
        return real["warm_up"](network, optimizer, batches, labels, class_counts, device, loss)

    def train_semi(network, peer, optimizer, labelled, unlabelled, **options):
        labelled = list(labelled)
        own = {"network": network, "peer": peer, "optimizer": optimizer, "options": options}
        seen.trainings.append(SimpleNamespace(**own, labelled=labelled, doubtful=set()))

        def watched_batches():
            for views, index in unlabelled:
                seen.trainings[-1].doubtful.update(index.tolist())
                yield views, index

        return real["train_semi"](network, peer, optimizer, labelled, watched_batches(), **options)

    for function in (make_network, select, warm_up, train_semi):
        monkeypatch.setattr(Train_cifar, function.__name__, function)

    def go(*flags: str) -> SimpleNamespace:
        short = split("--num_epochs 3 --warm_up 1 --limit_train 150 --batch_size 32")
        Train_cifar.main([*FLAGS, *short, *flags, "--out", str(tmp_path / "run")])
        return seen

    return go


@pytest.mark.parametrize("selection", ["sfa", "gmm"])
def test_each_network_learns_from_the_selection_of_the_other_with_the_loss_asked_for(selection, watched):
    seen = watched("--selection", selection, "--loss", "gce", "--gce_q", "0.4")
    first, second = seen.nets
    assert [one.network for one in seen.selections] == [first, second] * 2
    assert [one.network for one in seen.trainings] == [first, second] * 2
    assert [one.peer for one in seen.trainings] == [second, first] * 2
    for number, training in enumerate(seen.trainings):
        judged = seen.selections[number ^ 1].found  # by the other network, in the same epoch
        assert isinstance(judged, SmallLoss) is (selection == "gmm")
        assert training.options["clean"] is judged.clean and training.options["class_counts"] is judged.counts
        index = torch.cat([index for _, index in training.labelled])
        assert index.sort().values.tolist() == judged.selected.nonzero()[:, 0].tolist()
        assert training.doubtful and training.doubtful <= set((~judged.selected).nonzero()[:, 0].tolist())
        assert training.options["loss"].keywords == {"q": 0.4}
        owned = {id(parameter) for group in training.optimizer.param_groups for parameter in group["params"]}
        assert owned == {id(parameter) for parameter in training.network.parameters()}


@pytest.mark.parametrize("selection", ["sfa", "none"])
def test_the_warm_up_has_the_loss_asked_for_and_the_counts_of_the_observed_labels(selection, watched):
    seen = watched("--selection", selection, "--loss", "ldam", "--ldam_margin", "0.1", "--ldam_scale", "9")
    assert [one.network for one in seen.warm_ups] == seen.nets * (1 if selection == "sfa" else 3)
    assert len(seen.selections) == (4 if selection == "sfa" else 0)
    for one in seen.warm_ups:
        assert one.loss.keywords == {"largest_margin": 0.1, "scale": 9}
        assert int(one.counts.sum()) == 150 and len(one.counts) == CLASSES
        assert [len(index) for _, index in one.batches] == [64, 64, 22]


def test_small_losses_are_those_of_the_plain_images_with_a_seed_of_each_selection(watched, monkeypatch):
    calls, clean_probability = [], Train_cifar.small_loss.clean_probability

    def recorded(losses, seed):
        calls.append((losses, seed))
        return clean_probability(losses, seed)

    monkeypatch.setattr(Train_cifar.small_loss, "clean_probability", recorded)
    seen = watched("--selection", "gmm", "--p_threshold", "0.4")
    for one, (losses, seed) in zip(seen.selections, calls, strict=True):
        expected = F.cross_entropy(one.standard, one.labels, reduction="none")
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        draws = np.random.default_rng()
        draws.bit_generator.state = one.draws
        assert seed == int(draws.integers(2**31))
        assert torch.equal(one.found.selected, one.found.clean > 0.4)
    assert len({seed for _, seed in calls}) == 4


@pytest.mark.parametrize("mode", ["persist", "released"])
def test_moments_are_those_of_the_same_network_one_epoch_before(mode, watched):
    seen = watched("--ema_mode", mode)
    assert [one.moments for one in seen.selections[:2]] == [None, None]
    for before, after in zip(seen.selections[:2], seen.selections[2:], strict=True):
        for kept, handed in zip(before.found.moments, after.moments, strict=True):
            assert torch.equal(handed, kept if mode == "persist" else torch.zeros_like(kept))


def test_the_centroids_kept_are_the_mean_draws_of_the_first_network(watched, tmp_path):
    seen = watched("--ema_mode", "released", "--sample_rate", "2", "--min_draw_count", "0")
    kept = arrays(tmp_path / "run", "centroids")["net1"]
    for found, one in zip(kept, seen.selections[::2], strict=True):
        first, second = one.found.centroids.numpy()
        assert np.allclose(found, (first + second) / 2, rtol=2e-3, atol=1e-6), "but for their 16 bits"
    assert not np.array_equal(first, second)


def test_the_stop_button_ends_a_notebooks_cell_and_the_same_cell_resumes(tmp_path, monkeypatch, capsys):
    flags = "--dataset digits --limit_train 120 --imb_factor 0.5 --num_epochs 2 --warm_up 2 --device cpu"
    monkeypatch.setattr("sys.argv", [Train_cifar.__file__, *split(flags), "--out", str(tmp_path / "run")])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    log = Run.log

    def log_and_stop(self, epoch, **values):
        log(self, epoch, **values)
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "log", log_and_stop)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(Train_cifar.__file__, run_name="__main__")  # as %run does
    assert stop.value.code == 130
    assert capsys.readouterr().err == "SIGINT: stopped; the same command resumes after epoch 1\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    for _ in range(2):  # the rest of the run, and a finished run once more
        runpy.run_path(Train_cifar.__file__, run_name="__main__")
        assert len(table(tmp_path / "run")) == 2
    assert "going on after epoch 2" in capsys.readouterr().out
    assert not (tmp_path / "run" / ".lock").exists()


if __name__ == "__main__":
    Train_cifar.Run = MortalRun
    for moment, flags in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            epoch, where = (moment or "0:never").split(":")
            MortalRun.moment = (int(epoch), where)
            Train_cifar.main(flags)
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
