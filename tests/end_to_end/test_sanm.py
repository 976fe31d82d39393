"""sanm/Train_cifar.py: a whole run, killed and started again, and its variants; who learns from whom."""

from pathlib import Path
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from common import datasets, noise
from common.gpu.device import Device
from common.gpu.loader import Images
from sanm import Train_cifar
from sanm.networks import make_network, simclr_resnet
from sanm.selection import clean_probability, divide, split_statistics
from sanm.training import sample_losses
from tests.end_to_end import runs

# two epochs of warm-up and two on a split; of 520 images, so that the pass over the losses has a second batch
COMMON = ["--dataset", "digits", "--device", "cpu"]
FLAGS = COMMON + split(
    "--base dividemix --r 0.9 --num_epochs 3 --warm_up 2 --batch_size 64 --limit_train 520"
)
EPOCHS = 4
MOMENTS = ("1:log", "2:training", "3:losses", "3:log", "4:losses", "4:training")
PARTS = ["labelled_loss", "unlabelled_loss", "prior_loss", "reconstruction_loss"]
WORDS = f"""epoch loss test_accuracy net1_selected net1_auc net1_precision net1_recall net2_selected net2_auc
net2_precision net2_recall net1_accuracy net2_accuracy {" ".join(PARTS)} right_selected_min classes_unselected lr seconds"""
COLUMNS = WORDS.split()
SPLIT_COLUMNS = [name for name in COLUMNS if name.startswith("net") and not name.endswith("accuracy")]
SPLIT_COLUMNS += ["right_selected_min", "classes_unselected"]

# one epoch of warm-up and two on a split, in a second
TINY = COMMON + split("--num_epochs 2 --warm_up 1 --batch_size 32 --limit_train 160")
VARIANTS = {
    "c2d": "--base c2d --pretrained {folder}/encoder.safetensors --lr_drop 2",
    "masking": "--base dividemix --masking none",
    "selection": "--base dividemix --selection none",
    "released": "--base c2d --pretrained none --fidelity released",
    "asym": "--base dividemix --noise_mode asym --r 0.4",
    "file": "--base dividemix --noise_file {folder}/labels.npy",
    "flags": "--base dividemix --ref-views weak --mask-anchor corner --clamp-targets --precision bf16",
}


def digits(limit: int, seed: int = 123) -> SimpleNamespace:
    """The data of a run, put together without the script. index: the positions of the training images."""
    data = datasets.load("digits", ".")
    index = datasets.limited(np.arange(1437), limit, seed)
    both = data.train.images[index], data.test.images
    train, test = (Images(images, data.mean, data.std, torch.device("cpu")) for images in both)
    found = {"images": train, "index": index, "clean": data.train.labels[index]}
    return SimpleNamespace(**found, test=test.view(torch.arange(360)), test_labels=data.test.labels)


def scores_of(run: Path, images: Tensor, base: str, softmax: bool = False) -> list[Tensor]:
    """The scores of both networks of a run's last checkpoint."""
    found = []
    for weights in runs.state(run)["nets"]:
        network = make_network(base, 10, 1, 8, softmax).eval()
        network.load_state_dict(weights)
        with torch.no_grad():
            found.append(network(images).scores)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sanm_run")


@pytest.fixture(scope="module")
def statuses(base) -> list[list[int]]:
    return runs.run_jobs(runs.whole_and_killed("sanm.Train_cifar", base, FLAGS, *MOMENTS))


@pytest.fixture
def run(base, statuses) -> Path:
    out, err = runs.printed(base / "whole")
    assert statuses[0] == [0] and err == "", err
    note = "note: the learning rate never drops, --lr_drop 150, --num_epochs 3\n90 % rule on, --r 0.9: "
    assert note in out and f"epoch {EPOCHS}/{EPOCHS}  " in out
    return base / "whole" / "run"


@pytest.mark.slow
def test_the_log_has_a_row_per_epoch_and_no_split_in_warm_up(run):
    rows = runs.table(run)
    assert list(rows[0]) == COLUMNS and len(rows) == EPOCHS
    assert all((row[name] == "") is (i < 2) for i, row in enumerate(rows) for name in SPLIT_COLUMNS + PARTS)
    for row in rows[2:]:
        x, prior, rec = (float(row[name]) for name in ("labelled_loss", "prior_loss", "reconstruction_loss"))
        rest = float(row["loss"]) - x - prior - 0.02 * rec
        # the ramp has not come further
        assert 0 <= rest <= 25 * 2 / 16 * float(row["unlabelled_loss"]) + 1e-6


@pytest.mark.slow
def test_labels_statistics_and_accuracies_are_those_of_the_files_of_the_run(run):
    data, labels, last = digits(520), datasets.load("digits", ".").train.labels, runs.table(run)[-1]
    observed = noise.symmetric_inclusive(labels, 0.9, 10, 123)[data.index]
    assert np.load(run / "train_index.npy").tolist() == data.index.tolist()
    assert np.load(run / "noisy_labels.npy").tolist() == observed.tolist()
    arrays, right = np.load(run / "clean_probability.npz"), observed == data.clean
    assert sorted(arrays.files) == ["clean", "net1", "net2", "observed"]
    assert np.array_equal(arrays["observed"], observed) and np.array_equal(arrays["clean"], data.clean)
    quality, both = runs.label_quality(run), [torch.from_numpy(arrays[net]) for net in ("net1", "net2")]
    assert quality.score.to_numpy() == pytest.approx(torch.stack(both).mean(dim=0).numpy(), abs=1e-5)
    assert quality.selected.tolist() == (divide(both[0], 0.5) & divide(both[1], 0.5)).tolist()
    assert quality.true_label.tolist() == data.clean.tolist() and runs.auroc(quality) > 0.5
    selected, of_class = [divide(own, 0.5) for own in both], [right & (observed == c) for c in range(10)]
    chosen = [own.numpy() for own in selected]
    expected = {
        "right_selected_min": min(net[own].mean() for net in chosen for own in of_class if own.any()),
        "classes_unselected": max(len({*observed} - {*observed[net]}) for net in chosen),
        **split_statistics(both, selected, torch.from_numpy(right)),
    }
    assert {name: float(last[name]) for name in expected} == pytest.approx(expected, rel=1e-9)
    scores = scores_of(run, data.test, "dividemix")
    for name, own in zip(("test", "net1", "net2"), (sum(scores), *scores), strict=True):
        hits = (own.argmax(dim=1).numpy() == data.test_labels).mean()
        # one image may be at a tie
        assert float(last[f"{name}_accuracy"]) == pytest.approx(100 * hits, abs=0.3)


@pytest.mark.slow
def test_the_result_says_how_the_last_epochs_went(run):
    found, curve, last = runs.result(run), runs.column(run, "test_accuracy"), runs.table(run)[-1]
    metrics = found["metrics"]
    assert (metrics["best"], metrics["last"]) == (max(curve), curve[-1])
    assert metrics["last10"] == pytest.approx(np.mean(curve)) and metrics["map_auc"] is not None
    for name in ("selected", "auc", "precision", "recall"):
        assert metrics[f"last_net1_{name}"] == float(last[f"net1_{name}"])
    assert (found["method"], found["profile"]) == ("SANM(DivideMix)", "embedded+limit_train=520")


@pytest.mark.slow
def test_a_run_killed_at_several_moments_ends_as_if_nothing_had_happened(base, run, statuses):
    runs.assert_survived(base / "killed", run, statuses[1:], MOMENTS, (0, 1, 2, 2, 3, 3, 4))
    # the losses of both epochs on a split, of both networks, that the 90 % rule averages
    for losses in runs.state(base / "killed" / "run")["memory"]["history"]:
        assert len(losses) == 2 and all(own.min() == 0 and own.max() == 1 for own in losses)


def given_labels() -> np.ndarray:
    labels = datasets.load("digits", ".").train.labels
    return np.where(np.arange(len(labels)) % 3 == 0, (labels + 1) % 10, labels)


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """name -> the run directory of a variant."""
    folder = tmp_path_factory.mktemp("sanm")
    torch.manual_seed(5)
    safetensors.torch.save_file(simclr_resnet(1, 8).state_dict(), folder / "encoder.safetensors")
    np.save(folder / "labels.npy", given_labels())

    def run(name: str) -> Path:
        if not (folder / name).exists():
            words = VARIANTS[name].format(folder=folder).split()
            Train_cifar.main([*TINY, *words, "--out", str(folder / name)])
        return folder / name

    return run


def test_both_networks_of_c2d_start_from_the_same_encoder_and_from_other_classifiers(variant):
    run = variant("c2d")
    assert runs.result(run)["method"] == "SANM(C2D)"
    assert runs.column(run, "lr") == pytest.approx([0.02, 0.02, 0.002])
    file = run.parent / "encoder.safetensors"
    args = Train_cifar.parse_args(["--dataset", "digits", "--pretrained", str(file)])
    first, second = (Train_cifar.initial_network(datasets.load("digits"), args) for _ in range(2))
    weights = safetensors.torch.load_file(file)
    for network in (first, second):
        assert runs.differences(dict(network.encoder.state_dict()), weights) == []
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.decoder[0].weight, second.decoder[0].weight)


def test_without_masks_nothing_is_reconstructed_and_the_decoder_stays_as_it_was(variant):
    run = variant("masking")
    assert runs.result(run)["method"] == "DivideMix"
    assert runs.column(run, "reconstruction_loss") == [0, 0]
    assert min(runs.column(run, "labelled_loss") + runs.column(run, "unlabelled_loss")) > 0
    torch.manual_seed(123)
    for weights in runs.state(run)["nets"]:
        network = make_network("dividemix", 10, 1, 8)
        for name, value in network.decoder.state_dict().items():
            assert torch.equal(weights[f"decoder.{name}"], value)
        assert not torch.equal(weights["classifier.weight"], network.classifier.weight)


def test_without_a_split_there_is_cross_entropy_to_the_end(variant):
    run = variant("selection")
    rows, metrics = runs.table(run), runs.result(run)["metrics"]
    assert runs.result(run)["method"] == "CE" and list(rows[0]) == COLUMNS and len(rows) == 3
    assert all(row[name] == "" for row in rows for name in SPLIT_COLUMNS + PARTS)
    assert not (run / "clean_probability.npz").exists()
    assert metrics["last"] == runs.column(run, "test_accuracy")[-1] and metrics["last_net1_auc"] is None


def test_the_release_trains_probabilities_within_the_bounds_of_a_second_softmax(variant):
    run, data = variant("released"), digits(160)
    assert runs.result(run)["fidelity"] == "released"
    scores = scores_of(run, data.test, "c2d", softmax=True)
    for own, raw in zip(scores, scores_of(run, data.test, "c2d"), strict=True):
        torch.testing.assert_close(own, raw.softmax(dim=1))
    # the test takes the sum of probabilities
    hits = (sum(scores).argmax(dim=1).numpy() == data.test_labels).mean()
    assert runs.column(run, "test_accuracy")[-1] == pytest.approx(100 * hits, abs=0.3)
    # of 10 classes: softmax of probabilities is at most e / (e + 9), so cross-entropy lies within an interval of length 1;
    # targets are on the simplex, for modulation takes at most 0.1 of an entry of at least 0.1
    for loss in (runs.column(run, "loss")[0], *runs.column(run, "labelled_loss")):
        assert 1.461 <= loss <= 2.462


def test_asymmetric_noise_follows_the_map_and_its_warm_up_penalises_confidence(variant):
    run, labels = variant("asym"), datasets.load("digits", ".").train.labels
    expected = noise.asymmetric(labels, 0.4, 10, 123)[digits(160).index]
    assert np.load(run / "noisy_labels.npy").tolist() == expected.tolist()
    assert (runs.result(run)["noise_type"], runs.result(run)["noise_rate"]) == ("asym", 0.4)
    # cross-entropy alone begins at about ln 10 = 2.3, and the negative entropy at about -2.3
    assert runs.column(run, "loss")[0] < 1 and runs.column(variant("masking"), "loss")[0] > 2


def test_labels_of_a_file_are_taken_as_they_are(variant):
    run, index = variant("file"), digits(160).index
    assert np.load(run / "noisy_labels.npy").tolist() == given_labels()[index].tolist()
    assert (runs.result(run)["noise_type"], runs.result(run)["noise_rate"]) == ("labels.npy", None)
    assert runs.result(run)["noise"]["realised_rate"] == pytest.approx((index % 3 == 0).mean())


def test_other_views_anchors_targets_and_bfloat16_go_to_the_end(variant):
    run = variant("flags")
    assert runs.result(run)["environment"]["precision"] == "bf16"
    losses = runs.column(run, "reconstruction_loss")
    assert len(losses) == 2 and min(losses) > 0


def test_each_network_is_trained_on_the_division_of_the_other_made_before_any_is_trained(
    tmp_path, monkeypatch
):
    events, nets, made = [], [], []

    def number(network) -> int:
        if not any(network is own for own in nets):
            nets.append(network)
        return next(i for i, own in enumerate(nets, start=1) if own is network)

    def label_quality(network, history, epoch, s):
        made.append(torch.rand(len(s.labels), dtype=torch.float64))
        events.append(("selected", epoch, number(network)))
        return made[-1]

    def co_divide(network, peer, optimizer, clean, selected, epoch, s):
        assert optimizer.param_groups[0]["params"][0] is next(network.parameters())
        assert clean is made[2 * epoch - 2 + number(peer) - 1] and torch.equal(selected, clean > 0.5)
        events.append(("trained", epoch, number(network), number(peer)))
        return torch.zeros(1, 5)

    monkeypatch.setattr(Train_cifar, "label_quality", label_quality)
    monkeypatch.setattr(Train_cifar, "co_divide", co_divide)
    Train_cifar.main([*TINY, "--base", "dividemix", "--out", str(tmp_path / "run")])
    assert events == [
        (what, epoch, *who)
        for epoch in (1, 2)
        for what, *who in (("selected", 1), ("selected", 2), ("trained", 1, 2), ("trained", 2, 1))
    ]


@pytest.mark.parametrize("averaged", [False, True])
def test_clean_probabilities_come_from_the_mean_of_the_last_losses_under_the_90_percent_rule(averaged):
    words = ["--dataset", "digits", "--base", "dividemix", "--r", "0.9" if averaged else "0.5"]
    data, device = digits(60), Device(torch.device("cpu"), "fp32", "tests")
    labels, run = torch.from_numpy(data.clean), SimpleNamespace(progress=lambda batches, *_, **__: batches)
    args, draws = Train_cifar.parse_args(words), np.random.default_rng(3)
    setting = Train_cifar.Setting(args, device, run, data.images, labels, torch.Generator(), draws)
    torch.manual_seed(0)
    network = make_network("dividemix", 10, 1, 8)
    earlier = list(torch.rand(5, 60, generator=torch.Generator().manual_seed(1)))
    history, everything = list(earlier), torch.arange(60)
    found = Train_cifar.label_quality(network, history, 3, setting)
    losses = sample_losses(network, [((data.images.view(everything),), everything)], labels, 60, device)
    losses = (losses - losses.min()) / (losses.max() - losses.min())
    assert len(history) == 5 and all(a is b for a, b in zip(history, earlier[1:], strict=False))
    torch.testing.assert_close(history[-1], losses)
    values = sum([*earlier[1:], losses]) / 5 if averaged else losses
    seed = int(np.random.default_rng(3).integers(2**31))
    torch.testing.assert_close(found, clean_probability(values, seed), rtol=1e-3, atol=1e-4)
