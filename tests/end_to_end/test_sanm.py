"""sanm/Train_cifar.py as a user starts it, killed and started again, and in its variants; who learns from whom.

A process start costs seconds, so the processes that several tests look at are run once, two at a time.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from common import datasets, noise
from common.gpu.device import Device
from common.gpu.loader import Images
from sanm import Train_cifar
from sanm.networks import make_network, simclr_resnet
from sanm.selection import clean_probability, divide
from sanm.training import sample_losses
from tests.end_to_end.outcome import log_without_seconds, result_without_time_and_place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300  # seconds a process may take, on a busy machine

# two epochs of warm-up and two on a split; of 520 images, so that the pass over the losses has a second batch
COMMON = ["--dataset", "digits", "--device", "cpu"]
FLAGS = [
    *COMMON,
    *split("--base dividemix --r 0.9 --num_epochs 3 --warm_up 2 --batch_size 64 --limit_train 520"),
]
EPOCHS = 4
MOMENTS = ("1:log", "2:training", "3:losses", "3:log", "4:losses", "4:training")

COLUMNS = [
    "epoch", "loss", "test_accuracy", "net1_selected", "net1_auc", "net1_precision", "net1_recall", "net2_selected",
    "net2_auc", "net2_precision", "net2_recall", "net1_accuracy", "net2_accuracy", "labelled_loss", "unlabelled_loss",
    "prior_loss", "reconstruction_loss", "right_selected_min", "classes_unselected", "lr", "seconds",
]  # fmt: skip
SPLIT_COLUMNS = [name for name in COLUMNS if name.startswith("net") and not name.endswith("accuracy")]
SPLIT_COLUMNS += ["right_selected_min", "classes_unselected"]
PARTS = ["labelled_loss", "unlabelled_loss", "prior_loss", "reconstruction_loss"]

# one epoch of warm-up and two on a split, in a few seconds
TINY = [*COMMON, *split("--num_epochs 2 --warm_up 1 --batch_size 32 --limit_train 160")]
VARIANTS = {
    "c2d": "--base c2d --pretrained {folder}/encoder.safetensors --lr_drop 2",
    "masking": "--base dividemix --masking none",
    "selection": "--base dividemix --selection none",
    "released": "--base c2d --pretrained none --fidelity released",
    "asym": "--base dividemix --noise_mode asym --r 0.4",
    "file": "--base dividemix --noise_file {folder}/labels.npy",
    "flags": "--base dividemix --ref-views weak --mask-anchor corner --clamp-targets --precision bf16",
}


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in table(run) if row[name] != ""]


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def state(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


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


def forked(*jobs: tuple[str | None, list[str]]) -> Ended:
    return start("-m", "tests.end_to_end.forked", json.dumps(jobs))


def statuses(end: Ended) -> list[int]:
    return [int(line.split()[1]) for line in end.out.splitlines() if line.startswith("status")]


def whole(folder: Path) -> dict:
    """By path from another folder, to the end."""
    (folder / "elsewhere").mkdir(parents=True)
    return {
        "end": start(ROOT / "sanm" / "Train_cifar.py", *FLAGS, "--out", "../run", cwd=folder / "elsewhere")
    }


def killed(folder: Path) -> dict:
    """Killed again and again, then left alone, and once more when it is finished."""
    flags = [*FLAGS, "--out", str(folder / "run")]
    return {"end": forked(*((moment, flags) for moment in (*MOMENTS, None, None)))}


def variants(folder: Path) -> dict:
    """Every variant once."""
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    safetensors.torch.save_file(simclr_resnet(1, 8).state_dict(), folder / "encoder.safetensors")
    np.save(folder / "labels.npy", given_labels())
    words = {name: text.format(folder=folder).split() for name, text in VARIANTS.items()}
    return {
        "end": forked(*((None, [*TINY, *own, "--out", str(folder / name)]) for name, own in words.items()))
    }


def given_labels() -> np.ndarray:
    labels = datasets.load("digits", ".").train.labels
    return np.where(np.arange(len(labels)) % 3 == 0, (labels + 1) % 10, labels)


class Scenario(NamedTuple):
    folder: Path
    future: Future

    @property
    def ends(self) -> dict:
        return self.future.result()

    @property
    def run(self) -> Path:
        """The run directory, once the run has ended well."""
        assert self.ends["end"].status == 0, self.ends["end"].err
        return self.folder / "run"


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """name -> Scenario. The run directories of the same command have the same last name: it is a column of the results."""
    base = tmp_path_factory.mktemp("sanm")
    with ThreadPoolExecutor(2) as pool:
        made = (variants, whole, killed)
        yield {
            make.__name__: Scenario(base / make.__name__, pool.submit(make, base / make.__name__))
            for make in made
        }


@pytest.fixture
def variant(scenarios):
    """name -> the run directory of a variant that ended well."""
    scenario = scenarios["variants"]
    ended = statuses(scenario.ends["end"])
    assert len(ended) == len(VARIANTS), scenario.ends["end"].err
    found = dict(zip(VARIANTS, ended, strict=True))

    def run(name: str) -> Path:
        assert found[name] == 0, scenario.ends["end"].err
        return scenario.folder / name

    return run


class Digits(NamedTuple):
    """The data of a run, put together without the script."""

    images: Images
    clean: np.ndarray  # true labels of the training images
    index: np.ndarray  # where they stand in the training set
    test: Tensor  # normalised test images
    test_labels: np.ndarray


def digits(limit: int, seed: int = 123) -> Digits:
    data = datasets.load("digits", ".")
    index = datasets.limited(np.arange(1437), limit, seed)
    device = torch.device("cpu")
    train, test = (
        Images(images, data.mean, data.std, device) for images in (data.train.images[index], data.test.images)
    )
    return Digits(train, data.train.labels[index], index, test.view(torch.arange(360)), data.test.labels)


def scores_of(run: Path, images: Tensor, base: str, softmax: bool = False) -> list[Tensor]:
    """The scores of both networks of a run's last checkpoint."""
    found = []
    for weights in state(run)["nets"]:
        network = make_network(base, 10, 1, 8, softmax).eval()
        network.load_state_dict(weights)
        with torch.no_grad():
            found.append(network(images).scores)
    return found


# a whole run ------------------------------------------------------------------------------------------------------------


def test_by_path_from_another_folder_it_runs_to_the_end(scenarios):
    end = scenarios["whole"].ends["end"]
    assert end.status == 0, end.err
    assert end.err == ""
    assert (
        "note: the learning rate never drops, --lr_drop 150, --num_epochs 3\n90 % rule on, --r 0.9: "
        in end.out
    )
    assert f"epoch {EPOCHS}/{EPOCHS}  " in end.out and "\nfinished: test_accuracy best " in end.out


def test_the_log_has_a_row_per_epoch_and_no_split_in_warm_up(scenarios):
    rows = table(scenarios["whole"].run)
    assert list(rows[0]) == COLUMNS
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert all(row[name] == "" for row in rows[:2] for name in SPLIT_COLUMNS + PARTS)
    assert all(row[name] != "" for row in rows[2:] for name in SPLIT_COLUMNS + PARTS)
    assert {row["lr"] for row in rows} == {"0.02"}
    for row in rows[2:]:
        x, prior, rec = (float(row[name]) for name in ("labelled_loss", "prior_loss", "reconstruction_loss"))
        rest = float(row["loss"]) - x - prior - 0.02 * rec
        assert (
            0 <= rest <= 25 * 2 / 16 * float(row["unlabelled_loss"]) + 1e-6
        )  # the ramp has not come further


def test_labels_are_those_of_inclusive_symmetric_noise_by_the_seed(scenarios):
    run, data = scenarios["whole"].run, datasets.load("digits", ".")
    index = digits(520).index
    observed = noise.symmetric_inclusive(data.train.labels, 0.9, 10, 123)
    assert np.load(run / "train_index.npy").tolist() == index.tolist()
    assert np.load(run / "noisy_labels.npy").tolist() == observed[index].tolist()
    arrays = np.load(run / "clean_probability.npz")
    assert sorted(arrays.files) == ["clean", "net1", "net2", "observed"]
    assert np.array_equal(arrays["observed"], observed[index])
    assert np.array_equal(arrays["clean"], data.train.labels[index])
    assert result(run)["noise"]["realised_rate"] == pytest.approx(
        (observed != data.train.labels)[index].mean()
    )


def test_the_last_rows_statistics_are_those_of_the_probabilities_that_are_kept(scenarios):
    run = scenarios["whole"].run
    arrays, last = np.load(run / "clean_probability.npz"), table(run)[-1]
    observed, right = arrays["observed"], arrays["observed"] == arrays["clean"]
    lowest, without = [], []
    for net in ("net1", "net2"):
        chosen = divide(torch.from_numpy(arrays[net]), 0.5).numpy()
        lowest += [
            chosen[right & (observed == c)].mean() for c in range(10) if (right & (observed == c)).any()
        ]
        without.append(len({*observed} - {*observed[chosen]}))
        expected = [
            chosen.sum(),
            roc_auc_score(right, arrays[net]),
            right[chosen].mean(),
            chosen[right].mean(),
        ]
        found = [float(last[f"{net}_{name}"]) for name in ("selected", "auc", "precision", "recall")]
        assert found == pytest.approx(expected, rel=1e-9)
    assert float(last["right_selected_min"]) == pytest.approx(min(lowest), rel=1e-9)
    assert int(last["classes_unselected"]) == max(without)


def test_the_accuracy_is_that_of_the_sum_of_both_networks_scores(scenarios):
    run, data = scenarios["whole"].run, digits(520)
    scores = scores_of(run, data.test, "dividemix")
    last = table(run)[-1]
    for name, own in (
        ("test_accuracy", sum(scores)),
        ("net1_accuracy", scores[0]),
        ("net2_accuracy", scores[1]),
    ):
        hits = (own.argmax(dim=1).numpy() == data.test_labels).mean()
        assert float(last[name]) == pytest.approx(100 * hits, abs=0.3)  # one image of 360 may be at a tie
    metrics, curve = result(run)["metrics"], column(run, "test_accuracy")
    assert (metrics["best"], metrics["last"]) == (max(curve), curve[-1])
    assert metrics["last10"] == pytest.approx(np.mean(curve))
    for name in ("selected", "auc", "precision", "recall"):
        assert metrics[f"last_net1_{name}"] == float(last[f"net1_{name}"])


def test_the_rows_of_the_result_say_what_was_run(scenarios):
    with (scenarios["whole"].run / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"best", "last", "last10", "last_net1_auc"} <= {row["metric"] for row in rows}
    for row in rows:
        assert (row["paper"], row["method"], row["dataset"]) == ("sanm", "SANM(DivideMix)", "digits")
        assert (row["noise_type"], row["noise_rate"], row["profile"]) == (
            "sym",
            "0.9",
            "embedded+limit_train=520",
        )
        assert (row["fidelity"], row["seed"], row["epochs"]) == ("paper", "123", "3")
        assert row["command"].startswith("python sanm/Train_cifar.py --dataset digits ")


def test_a_run_killed_at_several_moments_ends_as_if_nothing_had_happened(scenarios):
    end, run, reference = scenarios["killed"].ends["end"], scenarios["killed"].run, scenarios["whole"].run
    assert statuses(end) == [-9] * len(MOMENTS) + [0, 0], end.err
    went_on = [
        int(line.split()[-1]) for line in end.out.splitlines() if line.startswith("going on after epoch")
    ]
    assert went_on == [0, 1, 2, 2, 3, 3, 4]
    assert (
        "\nepoch " not in end.out.rpartition("going on after epoch 4")[2]
    )  # the last start had nothing to do
    assert log_without_seconds(run) == log_without_seconds(reference)
    assert result_without_time_and_place(run) == result_without_time_and_place(reference)
    for name in ("noisy_labels.npy", "train_index.npy", "noise.json"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    found, wanted = (np.load(folder / "clean_probability.npz") for folder in (run, reference))
    assert found.files == wanted.files
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted.files)
    # the losses of both epochs on a split, of both networks, that the 90 % rule averages
    found, wanted = (state(folder) for folder in (run, reference))
    for own, other in zip(found["memory"]["history"], wanted["memory"]["history"], strict=True):
        assert len(own) == len(other) == 2
        assert all(
            torch.equal(a, b) and a.min() == 0 and a.max() == 1 for a, b in zip(own, other, strict=True)
        )
    for own, other in zip(found["nets"], wanted["nets"], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in own.items())
    assert torch.equal(found["loader"], wanted["loader"]) and found["draws"] == wanted["draws"]


# variants ---------------------------------------------------------------------------------------------------------------


def test_c2d_begins_from_the_file_and_drops_the_learning_rate(scenarios, variant):
    run = variant("c2d")
    assert result(run)["method"] == "SANM(C2D)"
    assert column(run, "lr") == pytest.approx([0.02, 0.02, 0.002])
    # 3 stages of a block, one with a shortcut, and the stem: 8 convolutions, 8 norms of 5 tensors
    line = f"encoder from {scenarios['variants'].folder}/encoder.safetensors: 48 tensors taken, 0 others left"
    assert scenarios["variants"].ends["end"].out.count(line) == 2


def test_both_networks_begin_from_the_same_encoder_and_from_other_classifiers(tmp_path):
    weights = {name: value.clone() for name, value in simclr_resnet(1, 8).state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "encoder.safetensors")
    words = ["--dataset", "digits", "--pretrained", str(tmp_path / "encoder.safetensors")]
    args, data = Train_cifar.parse_args(words), datasets.load("digits", ".")
    first, second = (Train_cifar.initial_network(data, args) for _ in range(2))
    for network in (first, second):
        found = network.encoder.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.decoder[0].weight, second.decoder[0].weight)


def test_without_masks_nothing_is_reconstructed_and_the_decoder_stays_as_it_was(variant):
    run = variant("masking")
    assert result(run)["method"] == "DivideMix"
    assert column(run, "reconstruction_loss") == [0, 0]
    assert min(column(run, "labelled_loss") + column(run, "unlabelled_loss")) > 0
    torch.manual_seed(123)
    for weights in state(run)["nets"]:
        network = make_network("dividemix", 10, 1, 8)
        for name, value in network.decoder.state_dict().items():
            assert torch.equal(weights[f"decoder.{name}"], value)
        assert not torch.equal(weights["classifier.weight"], network.classifier.weight)


def test_without_a_split_there_is_cross_entropy_to_the_end(variant):
    run = variant("selection")
    assert result(run)["method"] == "CE"
    rows = table(run)
    assert list(rows[0]) == COLUMNS and len(rows) == 3
    assert all(row[name] == "" for row in rows for name in SPLIT_COLUMNS + PARTS)
    assert not (run / "clean_probability.npz").exists()
    metrics = result(run)["metrics"]
    assert metrics["last"] == column(run, "test_accuracy")[-1] and metrics["last_net1_auc"] is None


def test_the_release_trains_probabilities_within_the_bounds_of_a_second_softmax(variant):
    run = variant("released")
    assert result(run)["fidelity"] == "released"
    scores = scores_of(run, digits(160).test, "c2d", softmax=True)
    assert state(run)["nets"][0].keys() == make_network("c2d", 10, 1, 8).state_dict().keys()
    logits = scores_of(run, digits(160).test, "c2d")
    for own, raw in zip(scores, logits, strict=True):
        torch.testing.assert_close(own, raw.softmax(dim=1))
    # what the test takes is the sum of probabilities
    hits = (sum(scores).argmax(dim=1).numpy() == digits(160).test_labels).mean()
    assert column(run, "test_accuracy")[-1] == pytest.approx(100 * hits, abs=0.3)
    # of 10 classes: softmax of probabilities is at most e / (e + 9), so cross-entropy lies within an interval of length 1;
    # targets are on the simplex, for modulation takes at most 0.1 of an entry of at least 0.1
    for loss in (column(run, "loss")[0], *column(run, "labelled_loss")):
        assert 1.461 <= loss <= 2.462


def test_asymmetric_noise_follows_the_map_and_its_warm_up_penalises_confidence(variant):
    run, data = variant("asym"), datasets.load("digits", ".")
    index = digits(160).index
    expected = noise.asymmetric(data.train.labels, 0.4, 10, 123)[index]
    assert np.load(run / "noisy_labels.npy").tolist() == expected.tolist()
    assert (result(run)["noise_type"], result(run)["noise_rate"]) == ("asym", 0.4)
    # cross-entropy alone begins at about ln 10 = 2.3, and the negative entropy at about -2.3
    assert column(run, "loss")[0] < 1
    assert column(variant("masking"), "loss")[0] > 2


def test_labels_of_a_file_are_taken_as_they_are(variant):
    run = variant("file")
    index = digits(160).index
    assert np.load(run / "noisy_labels.npy").tolist() == given_labels()[index].tolist()
    assert (result(run)["noise_type"], result(run)["noise_rate"]) == ("labels.npy", None)
    assert result(run)["noise"]["realised_rate"] == pytest.approx((index % 3 == 0).mean())
    assert column(run, "loss")[0] > 1  # no penalty in the warm-up


def test_other_views_anchors_targets_and_bfloat16_go_to_the_end(variant):
    run = variant("flags")
    assert result(run)["environment"]["precision"] == "bf16"
    assert len(column(run, "reconstruction_loss")) == 2 and min(column(run, "reconstruction_loss")) > 0


# who learns from whom ---------------------------------------------------------------------------------------------------


def test_each_network_is_trained_on_the_division_of_the_other_made_before_any_is_trained(
    tmp_path, monkeypatch
):
    events, nets = [], {}

    def numbered(network) -> int:
        return nets.setdefault(id(network), len(nets) + 1)

    def label_quality(network, history, epoch, s):
        events.append(("judged", epoch, numbered(network)))
        return torch.linspace(0, 1, len(s.labels), dtype=torch.float64) ** numbered(network)

    def co_divide(network, peer, optimizer, clean, selected, epoch, s):
        assert optimizer.param_groups[0]["params"][0] is next(network.parameters())
        power = round(
            float(clean[len(clean) // 2].log() / (len(clean) // 2 / (len(clean) - 1) * torch.ones(())).log())
        )
        assert torch.equal(selected, clean > 0.5)
        events.append(("trained", epoch, numbered(network), numbered(peer), power))
        return torch.zeros(1, 5)

    monkeypatch.setattr(Train_cifar, "label_quality", label_quality)
    monkeypatch.setattr(Train_cifar, "co_divide", co_divide)
    Train_cifar.main([*TINY, "--base", "dividemix", "--out", str(tmp_path / "run")])
    for epoch in (1, 2):
        expected = [
            ("judged", epoch, 1),
            ("judged", epoch, 2),
            ("trained", epoch, 1, 2, 2),
            ("trained", epoch, 2, 1, 1),
        ]
        assert [event for event in events if event[1] == epoch] == expected
    assert len(events) == 8


@pytest.mark.parametrize(
    ("rate", "fidelity", "averaged"),
    [("0.5", "paper", False), ("0.9", "paper", True), ("0.95", "paper", True), ("0.95", "released", False)],
)
def test_quality_is_judged_by_the_mean_of_the_last_losses_under_the_90_percent_rule(rate, fidelity, averaged):
    words = ["--dataset", "digits", "--base", "dividemix", "--r", rate, "--fidelity", fidelity]
    data, device = digits(60), Device(torch.device("cpu"), "fp32", "tests")
    labels = torch.from_numpy(data.clean)
    setting = Train_cifar.Setting(
        Train_cifar.parse_args(words), device, SimpleNamespace(progress=lambda batches, *_, **__: batches),
        data.images, labels, torch.Generator(), np.random.default_rng(3),
    )  # fmt: skip
    torch.manual_seed(0)
    network = make_network("dividemix", 10, 1, 8)
    earlier = list(torch.rand(5, 60, generator=torch.Generator().manual_seed(1)))
    history = list(earlier)
    found = Train_cifar.label_quality(network, history, 3, setting)
    everything = torch.arange(60)
    losses = sample_losses(network, [((data.images.view(everything),), everything)], labels, 60, device)
    losses = (losses - losses.min()) / (losses.max() - losses.min())
    assert len(history) == 5 and all(a is b for a, b in zip(history, earlier[1:], strict=False))
    torch.testing.assert_close(history[-1], losses)
    values = sum([*earlier[1:], losses]) / 5 if averaged else losses
    seed = int(np.random.default_rng(3).integers(2**31))
    torch.testing.assert_close(found, clean_probability(values, seed), rtol=1e-3, atol=1e-4)
