"""manifold_dividemix/train_semisup.py: a whole run, killed and resumed; and in its variants."""

import json
import math
import re
import shutil
from pathlib import Path
from shlex import split
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score

from common import datasets, noise
from common.gpu.loader import Images
from manifold_dividemix import pretrain, report, train_semisup
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.outliers import kept_samples
from manifold_dividemix.selection import divide
from tests.end_to_end import runs
from tests.lines import refused

pytestmark = pytest.mark.usefixtures("photographs")

# two epochs of warm-up, splits at the third and the fifth; of 520 images, so that passes over all have a second batch
FLAGS = split(
    "--dataset digits --device cpu --pretrained none --epochs 6 --warmup-epoch 2 --interval 2 --clustering "
    "--limit_train 520 --lr-head 0.1 --lr-backbone 0.02 --eval-train"
)
EPOCHS = 6
# before the first checkpoint; in the first embeddings; in the warm-up; between a row and its checkpoint; in the embeddings of a
# split; in MixEMatch on a split of the epoch before; in MixEMatch on a new one; in the last test, and in the pass after it
MOMENTS = (
    *("0:start", "1:embeddings", "1:warm-up", "2:log", "3:embeddings", "4:training", "5:training"),
    *("6:test", "6:training accuracy"),
)
GONE_ON = (0, 0, 1, 2, 3, 4, 5, 5, 6)  # epochs that the starts after the second find finished
COLUMNS = [
    "epoch", "loss", "test_accuracy", "test_top5", "ood_auroc", "removed", "removal_precision", "removal_recall", "labelled",
    "unlabelled", "labelled_precision", "labelled_ood", "clean_auc", "right_selected_min", "classes_unselected",
    "labelled_loss", "unlabelled_loss", "labelled_embedding_loss", "unlabelled_embedding_loss",
    "contrastive_loss", "penalty_loss", "train_accuracy", "lr_head",
    *(f"removed_class_{k}" for k in range(10)), "seconds",
]  # fmt: skip
OF_SPLIT = COLUMNS[8:21]
REMOVED = [52, 52, 58, 58, 64, 64]  # a tenth, and a hundredth more at each split

# one epoch of warm-up and one on a split, in a fraction of a second
TINY = split(
    "--dataset digits --device cpu --pretrained none --epochs 2 --warmup-epoch 1 --batch-size 32 --limit_train 160 "
    "--lr-head 0.05 --lr-backbone 0.02"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("manifold_dividemix")


@pytest.fixture(scope="module")
def statuses(base) -> list[list[int]]:
    script = "manifold_dividemix.train_semisup"
    return runs.run_jobs(runs.whole_and_killed(script, base, FLAGS, *MOMENTS))


@pytest.fixture
def run(base, statuses) -> Path:
    assert statuses[0] == [0], runs.printed(base / "whole")
    return base / "whole" / "run"


def small(folder: Path, *words: str) -> Path:
    train_semisup.main([*TINY, *words, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tiny(base) -> Path:
    """A small run, and what others are compared with."""
    return small(base / "tiny" / "run")


@pytest.fixture(scope="module")
def encoder(base) -> Path:
    """An encoder for digits whose batch norms have seen something."""
    torch.manual_seed(5)
    made = make_encoder("resnet18", 1, 8)
    for _ in range(3):
        made(torch.randn(16, 1, 8, 8))
    safetensors.torch.save_file(made.state_dict(), base / "encoder.safetensors")
    return base / "encoder.safetensors"


def write_npz(path: Path, count: int, side: int, seed: int) -> None:
    """A data set of colour images in three classes, each in a colour of its own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 120
    test = {"test_images": images[:6], "test_labels": labels[:6]}
    np.savez(path, train_images=images, train_labels=labels, **test)


@pytest.mark.slow
def test_it_leaves_its_files_and_the_log_has_no_split_in_the_warm_up(base, run):
    out, _ = runs.printed(base / "whole")
    assert f"epoch {EPOCHS}/{EPOCHS}  " in out and "\nfinished: test_accuracy best " in out
    assert runs.content_of(run).keys() == {
        "args.json", "checkpoint.pt", "checkpoint.previous.pt", "images.json", "label_quality.csv", "log.csv", "noise.json",
        "noisy_labels.npy", "noisy_labels.npz", "outliers_first.npz", "outliers_last.npz", "result.csv", "result.json",
        "samples.npz", "train_index.npy",
    }  # fmt: skip
    assert list((run / "tensorboard").iterdir())
    rows = runs.table(run)
    assert list(rows[0]) == COLUMNS
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert all((row[name] == "") == (row in rows[:2]) for row in rows for name in OF_SPLIT)
    assert [row["ood_auroc"] != "" for row in rows] == [True, False, True, False, True, False]
    assert runs.column(run, "removed") == REMOVED
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / EPOCHS)) for epoch in range(EPOCHS)]
    assert runs.column(run, "lr_head") == pytest.approx(cosine)
    for before, row in ((rows[2], rows[3]), (rows[4], rows[5])):
        assert all(row[name] == before[name] for name in COLUMNS[5:15])  # between splits nothing changes
    for row in rows[2:]:
        assert int(row["labelled"]) + int(row["unlabelled"]) + int(row["removed"]) == 520
        part = {name.removesuffix("_loss"): float(row[name]) for name in COLUMNS[15:21]}
        labelled = part["labelled"] + part["labelled_embedding"]
        ramped = 100 * (part["unlabelled"] + part["unlabelled_embedding"])
        factor = (float(row["loss"]) - labelled - part["contrastive"] - part["penalty"]) / ramped
        since = int(row["epoch"]) - 3  # epochs since the warm-up: the ramp takes sixteen
        assert since / 16 - 1e-3 <= factor <= (since + 1) / 16 + 1e-3
    found = runs.result(run)
    expected = {
        "paper": "manifold_dividemix", "method": "Manifold DivideMix", "dataset": "digits", "noise_type": "sym + photographs",
        "noise_rate": 0.2, "ood_ratio": 0.2, "profile": "embedded+limit_train=520", "fidelity": "paper", "seed": 123,
        "epochs": EPOCHS,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    # labelled samples alone count as trained on, of an epoch on a split
    assert found["images"] == 2 * 520 + sum(runs.column(run, "labelled"))


@pytest.mark.slow
def test_the_statistics_of_the_last_split_are_those_of_what_is_kept_of_it(run):
    arrays, samples = np.load(run / "outliers_last.npz"), np.load(run / "samples.npz")
    ood, right = samples["ood"], (samples["observed"] == samples["clean"]) & ~samples["ood"]
    kept, clean = torch.from_numpy(arrays["kept"]), torch.from_numpy(arrays["clean_probability"])
    assert torch.equal(kept, kept_samples(torch.from_numpy(arrays["score"]), REMOVED[-1]))
    labelled, observed = (arrays["clean_probability"] > 0.3) & arrays["kept"], samples["observed"]
    quality = runs.label_quality(run)
    assert quality.score.to_numpy() == pytest.approx(arrays["clean_probability"], abs=1e-5)
    assert quality.selected.tolist() == labelled.tolist()
    assert 1 - quality.ood_score.to_numpy() == pytest.approx(arrays["score"], abs=1e-5)
    assert quality.true_label.tolist() == np.where(ood, -1, samples["clean"]).tolist()
    dataset = SimpleNamespace(**samples, num_classes=10)
    expected = {
        "right_selected_min": min(labelled[right & (observed == c)].mean() for c in range(10)),
        "classes_unselected": 10 - len({*observed[labelled]}),
        "ood_auroc": roc_auc_score(ood, -arrays["score"]),
        **report.removal_columns(kept, ood),
        **report.removed_by_class(kept, dataset),
        **report.split_columns(divide(clean, kept, 0.3), clean, dataset),
    }
    last = runs.table(run)[-2]
    assert {name: float(last[name]) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert arrays["embedding"].shape == (520, 64) and arrays["shown"].tolist() == list(range(520))
    memory = runs.state(run)["memory"]
    assert torch.equal(memory["kept"], kept) and torch.equal(memory["clean"], clean)
    first = np.load(run / "outliers_first.npz")
    assert "clean_probability" not in first.files and (~first["kept"]).sum() == REMOVED[0]
    assert float(runs.table(run)[0]["ood_auroc"]) == pytest.approx(roc_auc_score(ood, -first["score"]))


@pytest.mark.slow
def test_images_and_labels_are_the_benchmarks(run):
    data, rng = datasets.load("digits", "."), np.random.RandomState(2718)
    replaced = np.flatnonzero(rng.random_sample(1437) < 0.2)
    index, samples = datasets.limited(np.arange(1437), 520, 123), np.load(run / "samples.npz")
    assert np.array_equal(np.load(run / "train_index.npy"), index)
    assert np.array_equal(samples["ood"], np.isin(index, replaced))
    assert np.array_equal(samples["clean"], data.train.labels[index])
    assert np.array_equal(samples["observed"], np.load(run / "noisy_labels.npy"))
    wrong, own = samples["observed"] != samples["clean"], ~samples["ood"]
    assert not wrong[~own].any() and wrong[own].mean() == pytest.approx(0.25 * 0.9, abs=0.06)
    assert json.loads((run / "images.json").read_text())["replaced"] == len(replaced)


@pytest.mark.slow
def test_accuracies_are_those_of_the_last_checkpoints_network(run):
    data, index = datasets.load("digits", "."), np.load(run / "train_index.npy")
    network = Network(make_encoder("resnet18", 1, 8), 64, 10).eval()
    network.load_state_dict(runs.state(run)["network"])
    test = Images(data.test.images, data.mean, data.std, torch.device("cpu"))
    with torch.no_grad():
        best = network.classify(network(test.view(torch.arange(360)))).topk(5).indices.numpy()
    hits, last = best == data.test.labels[:, None], runs.table(run)[-1]
    assert float(last["test_accuracy"]) == pytest.approx(100 * hits[:, 0].mean(), abs=0.3)  # a tie of 360
    assert float(last["test_top5"]) == pytest.approx(100 * hits.any(axis=1).mean(), abs=0.3)
    # the images in distribution, which are as they are in the data set
    samples = np.load(run / "samples.npz")
    train = Images(data.train.images[index][~samples["ood"]], data.mean, data.std, torch.device("cpu"))
    with torch.no_grad():
        guess = network.classify(network(train.view(torch.arange(len(train))))).argmax(dim=1).numpy()
    least = (guess == samples["observed"][~samples["ood"]]).sum()
    assert least - 1 <= float(last["train_accuracy"]) * 5.2 <= least + 1 + samples["ood"].sum()
    metrics, curve = runs.result(run)["metrics"], runs.column(run, "test_accuracy")
    assert (metrics["best"], metrics["last"]) == (max(curve), curve[-1])
    aurocs = runs.column(run, "ood_auroc")
    assert (metrics["first_ood_auroc"], metrics["last_ood_auroc"]) == (aurocs[0], aurocs[-1])
    for name in ("test_top5", "removed", "removal_recall", "labelled", "labelled_precision", "clean_auc"):
        assert metrics[f"last_{name}"] == float(last[name])


@pytest.mark.slow
def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, run, statuses):
    runs.assert_survived(base / "killed", run, statuses[1:], MOMENTS, GONE_ON)


@pytest.mark.slow
def test_pre_trained_it_learns_digits(tmp_path):
    """Seeds 1, 2, 3 ended at 71, 76 and 75 percent."""
    data = split("--dataset digits --device cpu --limit_train 500 --seed 1")
    recipe = split("--epochs 6 --batch_size 64 --lr 0.05 --temp 0.15 --knn_every 6")
    pretrain.main([*data, *recipe, "--out", str(tmp_path / "encoder")])
    file = tmp_path / "encoder" / "encoder.safetensors"
    words = split("--epochs 8 --warmup-epoch 5 --interval 2 --clustering --lr-head 0.1 --lr-backbone 0.02")
    files = ["--pretrained", str(file), "--out", str(tmp_path / "run")]
    train_semisup.main([*data, *words, "--batch-size", "32", *files])
    assert runs.column(tmp_path / "run", "test_accuracy")[-1] > 50


def test_the_oracle_of_the_readme_removes_ood_images_only(tmp_path, monkeypatch):
    text = (runs.ROOT / "manifold_dividemix" / "README.md").read_text()
    (code,) = re.findall(r"^    import sys, torch\n(?:    .*\n)+", text, re.MULTILINE)
    for name in ("select", "knn_scores"):  # what the code replaces is put back
        monkeypatch.setattr(train_semisup, name, getattr(train_semisup, name))
    monkeypatch.setattr("sys.argv", ["oracle.py", *TINY, "--out", str(tmp_path / "run")])
    exec(dedent(code), {})
    assert runs.column(tmp_path / "run", "removal_precision") == [1, 1]
    assert runs.column(tmp_path / "run", "removed") == [16, 18]


def test_the_seed_of_the_noise_changes_labels_alone_and_that_of_the_run_neither_images(tmp_path, tiny):
    seeded = small(tmp_path / "seeded", "--seed", "4", "--epochs", "1")
    assert runs.log_without_seconds(seeded)[1] != runs.log_without_seconds(tiny)[1]
    assert (seeded / "images.json").read_bytes() == (tiny / "images.json").read_bytes()
    other = small(tmp_path / "run", "--noise-seed", "1", "--epochs", "1")
    found, wanted = (np.load(of / "samples.npz") for of in (other, tiny))
    assert np.array_equal(found["ood"], wanted["ood"]) and np.array_equal(found["clean"], wanted["clean"])
    changed = found["observed"] != wanted["observed"]
    assert changed.sum() > 5 and not changed[wanted["ood"]].any()
    # which labels are wrong is drawn elsewhere: only what they become differs
    assert not changed[(wanted["observed"] == wanted["clean"]) & (found["observed"] == found["clean"])].any()
    assert (other / "images.json").read_bytes() == (tiny / "images.json").read_bytes()


@pytest.mark.slow
def test_scores_of_the_encoder_before_training_are_kept_and_survive_a_kill(
    tmp_path, tiny, encoder, monkeypatch
):
    """Splits at epochs 2 and 3; killed in the third, after the second was saved."""
    flags = "--knn-encoder pretrained --epochs 3 --interval 1 --clustering --pretrained"
    words = (*flags.split(), str(encoder))
    run = small(tmp_path / "whole" / "run", *words)
    first, last = (np.load(run / f"outliers_{name}.npz") for name in ("first", "last"))
    assert np.array_equal(first["score"], last["score"])
    assert not np.array_equal(first["embedding"], last["embedding"])  # the encoder has moved on
    assert runs.column(run, "removed") == [16, 18, 20]
    assert not first["kept"][~last["kept"]].all() and not last["kept"][~first["kept"]].any()
    assert len(set(runs.column(run, "ood_auroc"))) == 1
    # of other runs there is nothing to keep
    assert np.array_equal(runs.state(run)["memory"]["scores"].numpy(), first["score"])
    last = np.load(tiny / "outliers_last.npz")["score"]
    assert np.array_equal(runs.state(tiny)["memory"]["scores"].numpy(), last)
    assert runs.result(run)["method"] == "Manifold DivideMix, scored by the pre-trained encoder"

    own, calls = train_semisup.train_divided, []

    def killed(*arguments, **more):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_semisup, "train_divided", killed)
        small(tmp_path / "killed" / "run", *words)
    assert len(runs.table(tmp_path / "killed" / "run")) == 2
    # the lock of a killed run is freed with its process
    shutil.copytree(tmp_path / "killed" / "run", tmp_path / "resumed" / "run")
    runs.assert_same_run(small(tmp_path / "resumed" / "run", *words), run)


def test_without_a_split_there_is_cross_entropy_to_the_end(tmp_path):
    run = small(tmp_path / "run", "--selection", "none", "--warmup-loss", "CE", "--remove-ood", "0")
    assert runs.result(run)["method"] == "CE"
    rows = runs.table(run)
    assert list(rows[0]) == [name for name in COLUMNS if name != "train_accuracy"] and len(rows) == 2
    assert all(row[name] == "" for row in rows for name in OF_SPLIT)
    assert 2 < runs.column(run, "loss")[0] < 3.5  # ln 10 = 2.3 without the reverse part, which adds up to 9.2
    assert not (run / "outliers_last.npz").exists()


@pytest.mark.parametrize(("threshold", "side"), [("1", "labelled"), ("0", "unlabelled")])
def test_a_split_without_one_side_falls_back_to_the_warm_up(tmp_path, tiny, capsys, threshold, side):
    # split before any training: no probability is so small that it is zero
    run = small(tmp_path / "run", "--p-threshold", threshold, "--warmup-epoch", "0")
    assert runs.column(run, side) == [0, 0] and runs.column(run, "removed") == [18, 18]
    sizes = "0 labelled and 142" if side == "labelled" else "142 labelled and 0"
    note = f"note: warm-up in place of MixEMatch, the split is {sizes} unlabelled"
    assert capsys.readouterr().out.count(note) == 2
    assert runs.column(run, "contrastive_loss") == []
    assert len(runs.column(run, "labelled_precision")) == (0 if side == "labelled" else 2)
    # symmetric cross-entropy, CE + 9.2 (1 - p)
    assert all(7 < loss < 14 for loss in runs.column(run, "loss"))


def test_last_batches_of_one_are_trained_on_but_for_unlabelled_ones(tmp_path, monkeypatch):
    """97 labelled and 33 unlabelled samples in batches of 32, after a warm-up of 161."""
    sizes = {"warm-up": [], "labelled": [], "unlabelled": []}

    def noted(name, batches):
        for batch in batches:
            sizes[name].append(len(batch[1]))
            yield batch

    own, own_warm_up = train_semisup.train_divided, train_semisup.warm_up

    def train_divided(network, optimizer, labelled, unlabelled, *rest, **more):
        sides = noted("labelled", labelled), noted("unlabelled", unlabelled)
        return own(network, optimizer, *sides, *rest, **more)

    def warm_up(network, optimizer, batches, *rest, **more):
        return own_warm_up(network, optimizer, noted("warm-up", batches), *rest, **more)

    monkeypatch.setattr(train_semisup, "train_divided", train_divided)
    monkeypatch.setattr(train_semisup, "warm_up", warm_up)
    monkeypatch.setattr(train_semisup, "divide", lambda *_: (torch.arange(97), torch.arange(97, 130)))
    run = small(tmp_path / "run", "--limit_train", "161")
    assert sizes == {"warm-up": [32] * 5 + [1], "labelled": [32, 32, 32, 1], "unlabelled": [32] * 4}
    assert len(runs.column(run, "contrastive_loss")) == 1


def test_without_noise_and_without_removal(tmp_path, tiny):
    run = small(tmp_path / "run", "--noise-type", "no", "--remove-ood", "0")
    samples, found = np.load(run / "samples.npz"), runs.result(run)
    assert np.array_equal(samples["observed"], samples["clean"])
    assert (found["noise_type"], found["noise_rate"]) == ("no + photographs", 0)
    assert found["noise"]["realised_rate"] == 0 and found["method"].endswith("without OOD removal")
    assert runs.column(run, "clean_auc") == []  # none is wrong
    assert runs.column(run, "removed") == [0, 0] and runs.column(run, "removal_recall") == [0, 0]
    assert runs.column(run, "removal_precision") == [] and runs.state(run)["memory"]["kept"].all()
    assert runs.column(run, "labelled")[0] + runs.column(run, "unlabelled")[0] == 160
    assert (run / "images.json").read_bytes() == (tiny / "images.json").read_bytes()


def test_without_ood_images_there_is_asymmetric_label_noise_alone(tmp_path):
    words = split("--ood-ratio 0 --corruption nowhere --noise-type asym --noise-ratio 0.4")
    run = small(tmp_path / "run", *words)
    samples, found = np.load(run / "samples.npz"), runs.result(run)
    assert json.loads((run / "images.json").read_text())["replaced"] == 0 and not samples["ood"].any()
    wrong = samples["observed"] != samples["clean"]
    pairs = set(zip(samples["clean"][wrong].tolist(), samples["observed"][wrong].tolist(), strict=True))
    assert pairs == set(noise.CIFAR10_LOOK_ALIKES.items())
    assert (found["noise_type"], found["ood_ratio"]) == ("asym", 0)
    assert runs.column(run, "ood_auroc") == [] and runs.column(run, "removal_recall") == []
    assert runs.column(run, "removal_precision") == [0, 0] and runs.column(run, "labelled_ood") == [0]


def test_colour_images_of_an_npz_with_those_of_another_in_the_released_network(tmp_path):
    write_npz(tmp_path / "mine.npz", 24, 32, 0)
    write_npz(tmp_path / "other.npz", 40, 20, 1)
    words = split("--dataset mine --corruption other --epochs 1 --batch-size 5 --limit_train 10")
    run = small(tmp_path / "run", *words, "--data-dir", str(tmp_path))
    found, weights = runs.result(run), runs.state(run)["network"]
    assert (found["dataset"], found["noise_type"]) == ("mine", "sym + other")
    assert found["profile"] == "short+limit_train=10" and len(np.load(run / "train_index.npy")) == 10
    assert weights["encoder.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert weights["classifier.weight"].shape == (3, 512)
    replaced = json.loads((run / "images.json").read_text())["replaced"]
    assert replaced == (np.random.RandomState(2718).random_sample(24) < 0.2).sum()


def test_a_run_that_began_with_other_images_labels_or_arguments_is_refused(tmp_path, capsys):
    pool, file = tmp_path / "pool.npz", tmp_path / "labels.npy"
    labels = datasets.load("digits", ".").train.labels
    write_npz(pool, 400, 8, 0)
    np.save(file, np.roll(labels, 1))
    words = ["--data-dir", str(tmp_path), "--corruption", "pool", "--noise_file", str(file), "--epochs", "1"]
    run = small(tmp_path / "run", *words)
    before = runs.content_of(run)

    def refused_again(*more: str) -> str:
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"  # a process frees its locks at its end
        shutil.copytree(run, copy)
        line = refused(capsys, train_semisup.main, *TINY, *words, *more, "--out", str(copy))
        assert runs.content_of(copy) == before
        return line

    write_npz(pool, 400, 8, 1)
    assert "began with other images: the pool or the list changed" in refused_again()
    write_npz(pool, 400, 8, 0)
    np.save(file, np.roll(labels, 2))
    assert "began with other labels: the data, --noise_file or the posterior changed" in refused_again()
    np.save(file, np.roll(labels, 1))
    assert "alpha was 4, now 2.0" in refused_again("--alpha", "2")
    small(run, *words)  # with everything as it was, it is finished
    assert runs.content_of(run) == before
