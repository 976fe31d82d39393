"""manifold_dividemix/pretrain.py: a whole run, killed and resumed; and in its variants."""

import json
from pathlib import Path
from shlex import split

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from common.pretraining import simclr
from common.pretraining.simclr import knn_accuracy
from manifold_dividemix import pretrain, train_semisup, train_semisup_miniimagenet
from manifold_dividemix.dataset import load_mini_imagenet, load_open_set
from manifold_dividemix.outliers import knn_scores
from tests.common.small_file_data import make_mini_imagenet
from tests.end_to_end import runs

pytestmark = [
    pytest.mark.usefixtures("photographs"),
    pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
]

EPOCHS = 4
DATA = split("--dataset digits --device cpu --limit_train 300")
FLAGS = [*DATA, *split(f"--epochs {EPOCHS} --batch_size 64 --lr 0.05 --temp 0.15 --knn_every 2 --seed 1")]
COLUMNS = ["epoch", "loss", "knn_accuracy", "ood_auroc", "lr", "seconds"]
# before the first checkpoint; in training; between a row and its checkpoint; in the kNN pass
MOMENTS = ("0:start", "1:training", "2:log", "3:training", "4:features")
GONE_ON = (0, 1, 2, 3, 4)  # epochs that the starts after the second find finished

# an epoch in a fraction of a second
TINY = split(
    "--dataset digits --device cpu --limit_train 130 --epochs 1 --batch_size 64 --lr 0.05 --temp 0.15"
)
MINI = split("--dataset mini_imagenet --device cpu --img-size 12 --workers 0 --epochs 2 --batch_size 16")
MINI += split("--lr 0.01 --knn_every 1")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("manifold_pretrain")


@pytest.fixture(scope="module")
def statuses(base) -> list[list[int]]:
    script = "manifold_dividemix.pretrain"
    by_two = runs.jobs_of(script, base / "by_two", TINY, processes=2)
    return runs.run_jobs([*runs.whole_and_killed(script, base, FLAGS, *MOMENTS), *by_two])


@pytest.fixture
def run(base, statuses) -> Path:
    assert statuses[0] == [0] and runs.printed(base / "whole")[1] == "", runs.printed(base / "whole")
    return base / "whole" / "run"


def small(folder: Path, *words: str) -> Path:
    pretrain.main([*words, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tiny(base) -> Path:
    """A small run, and what others are compared with."""
    return small(base / "tiny" / "run", *TINY)


@pytest.fixture(scope="module")
def mini(base) -> Path:
    """36 training images of three classes."""
    make_mini_imagenet(base / "mini", classes=3, per_class=12, test_per_class=4)
    return base / "mini"


@pytest.mark.slow
def test_a_run_leaves_its_log_result_and_encoder(run):
    assert runs.content_of(run).keys() == {
        "args.json", "checkpoint.pt", "checkpoint.previous.pt", "encoder.safetensors", "images.json", "log.csv", "noise.json",
        "noisy_labels.npy", "noisy_labels.npz", "result.csv", "result.json", "samples.npz", "train_index.npy",
    }  # fmt: skip
    rows = runs.table(run)
    assert list(rows[0]) == COLUMNS and len(rows) == EPOCHS
    assert [row["knn_accuracy"] != "" for row in rows] == [False, True] * 2
    assert [row["ood_auroc"] != "" for row in rows] == [False, True] * 2
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.3
    expected = {
        "paper": "manifold_dividemix", "method": "SimCLR", "dataset": "digits", "noise_type": "photographs", "noise_rate": None,
        "ood_ratio": 0.2, "profile": "embedded+limit_train=300", "metric": "knn_accuracy", "epochs": EPOCHS, "seed": 1,
        "images": 300 * EPOCHS,
    }  # fmt: skip
    found = runs.result(run)
    assert {name: found[name] for name in expected} == expected
    assert found["metrics"]["last_ood_auroc"] == float(rows[-1]["ood_auroc"])
    assert found["metrics"]["last_loss"] == float(rows[-1]["loss"])
    with safe_open(run / "encoder.safetensors", "pt") as file:
        assert file.metadata() == {"dataset": "digits", "epochs": str(EPOCHS), "seed": "1"}


def test_neighbours_are_sought_among_images_of_the_data_set_and_outliers_among_all(tmp_path, monkeypatch):
    scores, banks = [], []

    def noted(features, labels, *rest):
        banks.append((len(features), labels.tolist()))
        return knn_accuracy(features, labels, *rest)

    monkeypatch.setattr(simclr, "knn_accuracy", noted)
    monkeypatch.setattr(pretrain, "knn_scores", lambda *rest: scores.append(knn_scores(*rest)) or scores[-1])
    run = small(tmp_path / "run", *TINY, "--knn-k", "3")
    samples = np.load(run / "samples.npz")
    own = samples["clean"][~samples["ood"]].tolist()
    assert 80 < len(own) < 130 and banks == [(len(own), own)]
    assert [of.shape for of in scores] == [(130,)]
    assert runs.column(run, "ood_auroc") == [pytest.approx(roc_auc_score(samples["ood"], -scores[0]))]


@pytest.mark.slow
def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, run, statuses):
    runs.assert_survived(base / "killed", run, statuses[1:-1], MOMENTS, GONE_ON)
    encoders = [load_file(base / name / "run" / "encoder.safetensors") for name in ("killed", "whole")]
    assert runs.differences(*encoders) == []


@pytest.mark.slow
def test_under_torchrun_it_says_that_it_is_one_process(base, statuses):
    lines = runs.printed(base / "by_two")[1].splitlines()
    assert statuses[-1] == [2, 2] and len(lines) == 2  # one of each process
    assert all("runs as one process: start it with python, not with torchrun" in line for line in lines)
    assert not (base / "by_two" / "run").exists()


def test_labels_change_nothing_and_another_seed_does(tmp_path, tiny):
    words = split("--noise-type asym --noise-ratio 0.4 --noise-seed 3 --label-rng numpy")
    run = small(tmp_path / "run", *TINY, *words)
    assert (run / "noisy_labels.npy").read_bytes() != (tiny / "noisy_labels.npy").read_bytes()
    assert runs.log_without_seconds(run) == runs.log_without_seconds(tiny)
    assert runs.differences(*(load_file(of / "encoder.safetensors") for of in (run, tiny))) == []
    other = small(tmp_path / "other", *TINY, "--seed", "4")
    assert runs.log_without_seconds(other)[1:] != runs.log_without_seconds(tiny)[1:]
    assert (other / "images.json").read_bytes() == (tiny / "images.json").read_bytes()


def test_without_ood_images_and_with_a_last_batch_of_one(tmp_path):
    run = small(tmp_path / "run", *TINY, "--ood-ratio", "0", "--limit_train", "129")
    assert runs.column(run, "ood_auroc") == [] and len(runs.column(run, "knn_accuracy")) == 1
    found = runs.result(run)
    assert (found["noise_type"], found["ood_ratio"], found["images"]) == ("none", 0, 129)
    assert json.loads((run / "images.json").read_text())["replaced"] == 0
    # 128 of 129 images where the last batch is left out
    words = ("--limit_train", "129", "--drop_last", "--limit_test", "40", "--full_test_at_end")
    less = runs.result(small(tmp_path / "less", *TINY, *words))
    assert (less["images"], less["profile"]) == (128, "embedded+limit_train=129+limit_test=40")
    assert less["metrics"]["full_test"] != less["metrics"]["last"]
    assert less["metrics"]["last"] % 2.5 == pytest.approx(0)


def test_train_semisup_begins_from_the_encoder(tiny, capsys):
    file = tiny / "encoder.safetensors"
    args = train_semisup.parse_args(["--dataset", "digits", "--pretrained", str(file)])
    network = train_semisup.initial_network(load_open_set(args), args)
    assert "encoder.safetensors: 44 tensors taken, 0 others left" in capsys.readouterr().out
    assert runs.differences(dict(network.encoder.state_dict()), load_file(file)) == []


@pytest.mark.slow
def test_mini_imagenet_by_the_list_and_its_script_begins_from_the_encoder(tmp_path, mini):
    red = small(tmp_path / "red", *MINI, "--data-dir", str(mini))
    found = runs.result(red)
    assert (found["dataset"], found["noise_type"], found["noise_rate"]) == ("mini_imagenet", "red", 0.2)
    assert (found["ood_ratio"], found["profile"], found["noise"]["realised_rate"]) == (None, "short", None)
    assert runs.column(red, "ood_auroc") == [] and len(runs.column(red, "knn_accuracy")) == 2
    assert len(list((mini / "decoded").glob("*.npz"))) == 2  # training and test
    words = split("--noise-type blue --noise-ratio 0.4 --decoded none")
    blue = small(tmp_path / "blue", *MINI, "--data-dir", str(mini), *words)
    assert len(list((mini / "decoded").glob("*.npz"))) == 2
    assert (red / "images.json").read_bytes() != (blue / "images.json").read_bytes()
    assert runs.column(red, "loss") != runs.column(blue, "loss")
    words = ["--data-dir", str(mini), "--pretrained", str(red / "encoder.safetensors"), "--img-size", "12"]
    args = train_semisup_miniimagenet.parse_args(words)
    network = train_semisup.initial_network(load_mini_imagenet(args), args)
    assert runs.differences(dict(network.encoder.state_dict()), load_file(red / "encoder.safetensors")) == []
