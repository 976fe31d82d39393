"""sfa/Train_cifar.py with selections and losses of the standard head; who learns from whom."""

from collections.abc import Callable
from pathlib import Path
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.runs import selection_report
from sfa import Train_cifar
from sfa.evaluation import SELECTION_STATISTICS, selection_statistics
from sfa.small_loss import SmallLoss
from tests.end_to_end.runs import arrays, auroc, label_quality, log_without_seconds, result, table

FLAGS = split("--dataset digits --imb_factor 0.1 --num_epochs 4 --warm_up 2 --device cpu")
SAMPLES, CLASSES = 581, 10
# name -> what is asked for, and what a result row calls it
RUNS = {
    "sfa": ("", "SFA"),
    "gmm-ldam": ("--selection gmm --loss ldam", "GMM + LDAM"),
    "none": ("--selection none", "no selection"),
}
STATISTICS = [f"net{i}_{name}" for i in (1, 2) for name in (*SELECTION_STATISTICS, "drawn_classes")]
STATISTICS += selection_report.COLUMNS


def words(name: str, folder: Path) -> list[str]:
    return [*FLAGS, *RUNS[name][0].split(), "--out", str(folder / name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], Path]:
    """run(name): the directory of that run, made in this process at the first call."""
    base = tmp_path_factory.mktemp("undisturbed")

    def made(name: str) -> Path:
        if not (base / name).exists():
            Train_cifar.main(words(name, base))
        return base / name

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_what_its_selection_found(name, run):
    folder, selection = run(name), name.partition("-")[0]
    rows, written = table(folder), result(folder)
    assert (written["method"], written["profile"]) == (RUNS[name][1], "embedded")
    curve = [float(row["test_accuracy"]) for row in rows]
    assert [written["metrics"][key] for key in ("last", "best")] == pytest.approx([curve[-1], max(curve)])
    assert len(curve) == 4 and all(float(row["loss"]) > 0 for row in rows)
    for part in ("precision", "recall", "auc"):
        assert (written["metrics"][f"last_net1_{part}"] is not None) is (selection != "none")
    logged = {
        "sfa": STATISTICS,
        "gmm": [c for c in STATISTICS if not c.endswith("drawn_classes")],
        "none": [],
    }
    for epoch, row in enumerate(rows, start=1):
        assert [c for c in STATISTICS if row[c] != ""] == (logged[selection] if epoch > 2 else [])
    assert (folder / "centroids.npz").exists() is (selection == "sfa")
    assert (folder / "clean_probability.npz").exists() is (selection != "none")
    quality = label_quality(folder)
    assert quality.selected.isna().all() == (selection == "none")
    if selection == "none":  # a warm-up to the end
        sure = quality.predicted_label == quality.given_label
        assert (quality.score[sure] == quality.predicted_probability[sure]).all() and sure.any()
        none, sfa = log_without_seconds(folder), log_without_seconds(run("sfa"))
        assert none[:3] == sfa[:3] and none[3] != sfa[3]
        assert written["images"] == 2 * 4 * SAMPLES
        return
    found, last = arrays(folder, "clean_probability"), rows[-1]
    assert sorted(found) == ["clean", "net1", "net2", "observed"]
    assert np.array_equal(found["observed"], np.load(folder / "noisy_labels.npy"))
    assert 0.49 < np.mean(found["observed"] != found["clean"]) < 0.5
    observed, right = found["observed"], found["observed"] == found["clean"]
    both = np.stack([found["net1"], found["net2"]])
    assert quality.score.to_numpy() == pytest.approx(both.mean(axis=0), abs=1e-5)
    assert quality.selected.tolist() == (both > 0.5).all(axis=0).tolist() and auroc(quality) > 0.5
    lowest, missing = [], []
    for i in (1, 2):
        clean = found[f"net{i}"]
        assert (
            clean.shape == (SAMPLES,) and clean.dtype == np.float64 and 0 <= clean.min() <= clean.max() <= 1
        )
        report = selection_statistics(clean, clean > 0.5, observed, found["clean"], CLASSES)
        for column, value in report.items():
            assert float(last[f"net{i}_{column}"]) == pytest.approx(value), column
        lowest += [(clean > 0.5)[right & (observed == c)].mean() for c in range(CLASSES)]
        missing.append(CLASSES - len({*observed[clean > 0.5]}))
    assert float(last["right_selected_min"]) == pytest.approx(min(lowest))
    assert int(last["classes_unselected"]) == max(missing)


def test_where_nothing_is_selected_nothing_is_trained_and_a_warning_says_so(tmp_path, capsys):
    flags = split("--selection gmm --p_threshold 1 --num_epochs 3 --warm_up 1 --limit_train 120")
    Train_cifar.main([*FLAGS, *flags, "--out", str(tmp_path / "run")])
    rows = table(tmp_path / "run")
    assert [row["loss"] == "" for row in rows] == [False, True, True]
    assert len({row["test_accuracy"] for row in rows}) == 1, "as the warm-up left it"
    assert [row["net1_selected"] for row in rows] == ["", "0", "0"]
    warning = "warning: epoch {}: no sample selected, one network is not trained"
    assert capsys.readouterr().err.splitlines() == [warning.format(epoch) for epoch in (2, 2, 3, 3)]
    assert result(tmp_path / "run")["images"] == 2 * 120


@pytest.fixture
def watched(monkeypatch, tmp_path) -> Callable[..., SimpleNamespace]:
    """watched(*flags): a short run whose selections and training passes are recorded."""
    seen = SimpleNamespace(selections=[], warm_ups=[], trainings=[], nets=[])
    real = {name: getattr(Train_cifar, name) for name in ("select", "warm_up", "train_semi", "make_network")}

    def make_network(*given):
        seen.nets.append(real["make_network"](*given))
        return seen.nets[-1]

    def select(network, moments, num_classes, epoch, setting):
        standard = network.eval()(setting.train.view(torch.arange(len(setting.labels))))[1].detach()
        own = {"network": network, "moments": moments, "draws": setting.draws.bit_generator.state}
        found = real["select"](network, moments, num_classes, epoch, setting)
        own |= {"losses": F.cross_entropy(standard, setting.labels, reduction="none"), "found": found}
        seen.selections.append(SimpleNamespace(**own))
        return found

    def warm_up(network, optimizer, batches, labels, counts, device, loss):
        batches = list(batches)
        seen.warm_ups.append(SimpleNamespace(network=network, counts=counts, loss=loss, batches=batches))
        return real["warm_up"](network, optimizer, batches, labels, counts, device, loss)

    def train_semi(network, peer, optimizer, labelled, unlabelled, **options):
        labelled, own = list(labelled), {"network": network, "peer": peer, "optimizer": optimizer}
        own["lr"] = optimizer.param_groups[0]["lr"]
        training = SimpleNamespace(**own, options=options, labelled=labelled, unlabelled=set())
        seen.trainings.append(training)

        def recorded():
            for views, index in unlabelled:
                training.unlabelled.update(index.tolist())
                yield views, index

        return real["train_semi"](network, peer, optimizer, labelled, recorded(), **options)

    for function in (make_network, select, warm_up, train_semi):
        monkeypatch.setattr(Train_cifar, function.__name__, function)

    def go(*flags: str) -> SimpleNamespace:
        short = split("--num_epochs 3 --warm_up 1 --limit_train 150 --batch_size 32")
        Train_cifar.main([*FLAGS, *short, *flags, "--out", str(tmp_path / "run")])
        return seen

    return go


@pytest.mark.parametrize("selection", ["sfa", "gmm"])
def test_each_network_learns_from_the_selection_of_the_other(selection, watched, monkeypatch):
    calls, clean_probability = [], Train_cifar.small_loss.clean_probability

    def recorded(losses, seed):
        calls.append((losses, seed))
        return clean_probability(losses, seed)

    monkeypatch.setattr(Train_cifar.small_loss, "clean_probability", recorded)
    flags = split("--loss gce --gce_q 0.4 --p_threshold 0.4 --lr_drop 2 --lambda_u 16")
    seen = watched("--selection", selection, *flags)
    first, second = seen.nets
    assert [one.network for one in seen.selections] == [first, second] * 2
    assert [(one.network, one.peer) for one in seen.trainings] == [(first, second), (second, first)] * 2
    for number, training in enumerate(seen.trainings):
        split_ = seen.selections[number ^ 1].found  # by the other network, in the same epoch
        assert isinstance(split_, SmallLoss) is (selection == "gmm")
        assert training.options["clean"] is split_.clean
        assert training.options["class_counts"] is split_.counts
        assert torch.equal(split_.selected, split_.clean > 0.4)
        index = torch.cat([index for _, index in training.labelled])
        assert index.sort().values.tolist() == split_.selected.nonzero()[:, 0].tolist()
        assert training.unlabelled and not split_.selected[list(training.unlabelled)].any()
        assert training.options["loss"].keywords == {"q": 0.4}
        epoch, steps = number // 2 + 2, len(index) // 32 + 1
        assert training.lr == pytest.approx(0.02 if epoch == 2 else 0.002)
        weights = [training.options["weight"](step) for step in (0, 1)]
        assert weights == pytest.approx([epoch - 1, epoch - 1 + 1 / steps])
        owned = {id(parameter) for group in training.optimizer.param_groups for parameter in group["params"]}
        assert owned == {id(parameter) for parameter in training.network.parameters()}
    # small losses are those of the plain images, with a seed of each selection
    for one, (losses, seed) in zip(seen.selections if selection == "gmm" else (), calls, strict=True):
        torch.testing.assert_close(losses, one.losses, rtol=1e-4, atol=1e-5)
        draws = np.random.default_rng()
        draws.bit_generator.state = one.draws
        assert seed == int(draws.integers(2**31))
    assert len({seed for _, seed in calls}) == (4 if selection == "gmm" else 0)


@pytest.mark.parametrize("selection", ["sfa", "none"])
def test_the_warm_up_has_the_loss_asked_for_and_the_counts_of_the_observed_labels(selection, watched):
    seen = watched("--selection", selection, *split("--loss ldam --ldam_margin 0.1 --ldam_scale 9"))
    assert [one.network for one in seen.warm_ups] == seen.nets * (1 if selection == "sfa" else 3)
    assert len(seen.selections) == (4 if selection == "sfa" else 0)
    for one in seen.warm_ups:
        assert one.loss.keywords == {"largest_margin": 0.1, "scale": 9}
        assert int(one.counts.sum()) == 150 and len(one.counts) == CLASSES
        assert [len(index) for _, index in one.batches] == [64, 64, 22]


@pytest.mark.parametrize("mode", ["persist", "released"])
def test_moments_are_those_of_the_same_network_one_epoch_before(mode, watched, tmp_path):
    seen = watched("--ema_mode", mode, *split("--sample_rate 2 --min_draw_count 0"))
    assert [one.moments for one in seen.selections[:2]] == [None, None]
    for before, after in zip(seen.selections[:2], seen.selections[2:], strict=True):
        for kept, handed in zip(before.found.moments, after.moments, strict=True):
            assert torch.equal(handed, kept if mode == "persist" else torch.zeros_like(kept))
    kept = arrays(tmp_path / "run", "centroids")
    assert list(kept) == ["net1"] and kept["net1"].shape == (2, CLASSES, 64)
    for centroids, one in zip(kept["net1"], seen.selections[::2], strict=True):
        mean = one.found.centroids.mean(dim=0).numpy()
        assert np.allclose(centroids, mean, rtol=2e-3, atol=1e-6), "the mean draws of network 1, in 16 bits"
