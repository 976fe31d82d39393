"""manifold_dividemix/train_semisup_miniimagenet.py as processes run it: alone, killed, two together; and variants."""

import json
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch

from manifold_dividemix import train_semisup_miniimagenet
from tests.common.small_file_data import make_mini_imagenet
from tests.end_to_end import runs
from tests.lines import refused

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

# 48 training images of three classes and 24 to test on, in the narrow network; an epoch of warm-up, splits at the second and the
# third epoch
SETTING = (
    "--device cpu --pretrained none --img-size 12 --workers 0 --noise-type blue --noise-ratio 0.4 --batch-size 8 "
    "--lr-head 0.005 --lr-backbone 0.005"
)
FLAGS = split(f"{SETTING} --epochs 4 --warmup-epoch 1 --interval 2 --clustering --p-threshold 0.5")
EPOCHS = 4
# before the first checkpoint; in the warm-up; between a row and its checkpoint; in the embeddings of a split; in MixEMatch on a
# new split, and on that of the epoch before; in the test
MOMENTS = ("0:start", "1:warm-up", "1:log", "2:embeddings", "3:training", "4:training", "4:test")
GONE_ON = (0, 0, 1, 2, 3, 3)  # epochs that the starts after the second find finished
WORDS = """epoch loss test_accuracy test_top5 ood_auroc removed removal_precision removal_recall labelled unlabelled
labelled_precision labelled_ood clean_auc right_selected_min classes_unselected labelled_loss unlabelled_loss
labelled_embedding_loss unlabelled_embedding_loss contrastive_loss penalty_loss lr_head"""
COLUMNS = [*WORDS.split(), *(f"removed_class_{k}" for k in range(100)), "seconds"]
UNKNOWN = {"ood_auroc", "removal_precision", "removal_recall", "clean_auc", "right_selected_min"}
UNKNOWN |= {"labelled_precision", "labelled_ood"}
PARTS = tuple(name for name in COLUMNS if name.endswith("_loss"))

TINY = split(f"{SETTING} --epochs 2 --warmup-epoch 1")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifold_miniimagenet")
    make_mini_imagenet(folder / "data", classes=3, per_class=16, test_per_class=8)
    return folder


@pytest.fixture(scope="module")
def statuses(base) -> dict[str, list[list[int]]]:
    """Alone, killed again and again, and by two processes; as released; and what two processes cannot share."""
    flags = [*FLAGS, "--data-dir", str(base / "data")]
    released = [*flags, "--fidelity", "released", "--epochs", "2"]
    few = [*TINY, "--data-dir", str(base / "data"), "--limit_train", "16"]
    script, jobs = "manifold_dividemix.train_semisup_miniimagenet", {}

    def add(name: str, flags: list[str], *moments: str, **more: int | bool) -> None:
        jobs[name] = runs.jobs_of(script, base / name, flags, *moments, **more)

    add("alone", flags, float64=True)
    add("killed", flags, *MOMENTS, float64=True)
    add("by_two", flags, float64=True, processes=2)
    add("released", released, float64=True)
    add("released_by_two", released, float64=True, processes=2)
    add("one_sided", [*few, "--p-threshold", "1", "--warmup-epoch", "0"], processes=2)
    add("too_few", [*few, "--batch-size", "18"], processes=2)
    add("odd", [*few, "--batch-size", "3"], processes=2)
    found = iter(runs.run_jobs([job for own in jobs.values() for job in own]))
    return {name: [next(found) for _ in own] for name, own in jobs.items()}


@pytest.fixture
def alone(base, statuses) -> Path:
    """The directory of the run by one process that nothing disturbed."""
    assert statuses["alone"] == [[0]], runs.printed(base / "alone")
    return base / "alone" / "run"


def small(folder: Path, data: Path, *words: str) -> Path:
    train_semisup_miniimagenet.main([*TINY, "--data-dir", str(data), *words, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tiny(base) -> Path:
    """A small run, and what others are compared with."""
    return small(base / "tiny" / "run", base / "data")


@pytest.mark.slow
def test_what_is_logged_of_warm_up_and_mixematch(base, alone):
    (line,) = runs.printed(base / "alone")[1].splitlines()
    assert line.startswith("warning: class 2 has had no selected sample for 2 selections in a row: try")
    rows = runs.table(alone)
    assert [row["classes_unselected"] for row in rows] == ["", "1", "2", "2"]
    assert list(rows[0]) == COLUMNS and [row["epoch"] for row in rows] == list("1234")
    assert {row[name] for row in rows for name in UNKNOWN} == {""}
    assert {rows[0][name] for name in (*PARTS, "labelled", "unlabelled")} == {""}
    assert runs.column(alone, "removed") == [1, 2, 3, 3]  # a hundredth at first, and at each split
    for row in rows[1:]:
        assert all(float(row[name]) > 0 for name in PARTS)
        assert min(int(row["labelled"]), int(row["unlabelled"])) >= 8
        assert 48 - 14 - int(row["removed"]) <= int(row["labelled"]) + int(row["unlabelled"])
    assert all(rows[3][name] == rows[2][name] for name in ("labelled", "unlabelled"))
    found = runs.result(alone)
    expected = {
        "paper": "manifold_dividemix", "method": "Manifold DivideMix", "dataset": "mini_imagenet", "noise_type": "blue",
        "noise_rate": 0.4, "ood_ratio": None, "profile": "short", "epochs": EPOCHS, "seed": 123,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["images"] == 48 + sum(runs.column(alone, "labelled"))
    assert found["metrics"]["last_ood_auroc"] is None and found["metrics"]["last_removed"] == 3
    assert sorted(np.load(alone / "samples.npz").files) == ["observed"]
    quality = runs.label_quality(alone)
    assert quality.ood_score.notna().all() and quality.true_label.isna().all()
    assert json.loads((alone / "images.json").read_text())["skipped"] == 0


@pytest.mark.slow
def test_the_released_network_with_a_worker(base, tmp_path):
    words = "--limit_train 16 --seed 1 --img-size 16 --workers 1 --fidelity released --limit_test 3"
    more = ["--full_test_at_end", "--decoded", str(tmp_path / "decoded")]
    run = small(tmp_path / "run", base / "data", *words.split(), *more)
    assert len(list((tmp_path / "decoded").glob("*16x16*.npz"))) == 2
    found, weights = runs.result(run), runs.state(run)["network"]
    assert (found["fidelity"], found["profile"]) == ("released", "short+limit_train=16+limit_test=3")
    assert found["metrics"]["full_test"] >= 0 and found["metrics"]["full_test_images"] > 3
    assert weights["encoder.conv1.weight"].shape == (64, 3, 3, 3)
    assert weights["classifier.weight"].shape == (100, 512)
    assert len(runs.column(run, "contrastive_loss")) == 1
    # in train mode in the warm-up alone: two batches of eight
    assert weights["encoder.layer4.1.bn2.num_batches_tracked"] == 2
    assert weights["projection_bn.num_batches_tracked"] == 2
    assert (weights["projection_bn.running_mean"] != 0).all()


@pytest.mark.slow
def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, alone, statuses):
    runs.assert_survived(base / "killed", alone, statuses["killed"], MOMENTS, GONE_ON)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two", "one", "epochs"), [("by_two", "alone", 4), ("released_by_two", "released", 2)]
)
def test_two_processes_train_as_one(base, statuses, two, one, epochs):
    """Losses to 1e-9, accuracies, splits and generators alike, weights to 1e-7: sums in another order, in float64.

    As released batch norms are frozen in MixEMatch, and all views go through the encoder at once.
    """
    assert (statuses[two], statuses[one]) == ([[0, 0]], [[0]]), runs.printed(base / two)
    expected = runs.table(base / one / "run")
    assert len(expected) == epochs and expected[-1]["contrastive_loss"] != ""
    runs.assert_close_logs(base / two / "run", base / one / "run", loss=1e-9)
    ours, theirs = (runs.state(base / name / "run") for name in (two, one))
    near = [[of["network"], of["memory"]["clean"]] for of in (ours, theirs)]
    torch.testing.assert_close(*near, rtol=1e-7, atol=1e-9)
    exact = [[of["memory"]["kept"], of["loader"], of["draws"]] for of in (ours, theirs)]
    assert runs.differences(*exact) == []
    out, _ = runs.printed(base / two)
    assert "2 processes" in out
    assert all(out.count(f"epoch {epoch}/{epochs} ") == 1 for epoch in range(1, epochs + 1))
    found, wanted = (runs.result(base / name / "run") for name in (two, one))
    assert (found["images"], found["metrics"]) == (wanted["images"], wanted["metrics"])


@pytest.mark.slow
def test_what_two_processes_cannot_share_falls_back_or_is_refused(base, statuses):
    out, err = runs.printed(base / "one_sided")
    assert statuses["one_sided"] == [[0, 0]], err
    note = "note: warm-up in place of MixEMatch, the split is 0 labelled and 14 unlabelled samples\n"
    assert out.count(note) == 2
    assert runs.column(base / "one_sided" / "run", "contrastive_loss") == []
    for name, words in {
        "too_few": "--batch-size 18: more than all 16 images, which 2 processes share",
        "odd": "--batch-size 3: cannot be cut into equal pieces for 2 processes",
    }.items():
        lines = runs.printed(base / name)[1].splitlines()
        assert statuses[name] == [[2, 2]] and lines, lines
        assert all(line.endswith(words) for line in lines)  # of each process
        assert not (base / name / "run").exists()


@pytest.mark.slow
def test_the_same_command_gives_the_same_run_whatever_decodes_and_another_seed_another(tmp_path, base, tiny):
    again = small(tmp_path / "again" / "run", base / "data", "--workers", "1", "--decoded", "none")
    runs.assert_same_run(again, tiny)
    other = small(tmp_path / "other", base / "data", "--seed", "4")
    assert runs.log_without_seconds(other)[1:] != runs.log_without_seconds(tiny)[1:]
    assert (other / "images.json").read_bytes() == (tiny / "images.json").read_bytes()


def test_lists_and_files_of_labels_are_of_their_own_images_and_labels(tmp_path, base, tiny):
    words = split("--noise-type red --noise-ratio 0.2 --epochs 1")
    red = small(tmp_path / "red", base / "data", *words)
    assert np.load(red / "noisy_labels.npy").tolist() == [0] * 16 + [1] * 16 + [2] * 16
    # the first image of each class has the label of the next
    assert np.load(tiny / "noisy_labels.npy").tolist() == [1, *[0] * 15, 2, *[1] * 15, 0, *[2] * 15]
    assert (red / "images.json").read_bytes() != (tiny / "images.json").read_bytes()
    given = np.arange(48) % 3
    np.save(tmp_path / "labels.npy", given)
    words = ["--noise_file", str(tmp_path / "labels.npy"), "--epochs", "1"]
    own = small(tmp_path / "own", base / "data", *words)
    assert np.load(own / "noisy_labels.npy").tolist() == given.tolist()
    assert (runs.result(own)["noise_type"], runs.result(own)["noise_rate"]) == ("labels.npy", None)
    assert (own / "images.json").read_bytes() == (tiny / "images.json").read_bytes()


def test_a_list_that_is_not_there_is_named_with_those_that_are(tmp_path, base, capsys):
    words = [*TINY, "--data-dir", base / "data", "--noise-ratio", "0.2", "--out", tmp_path / "run"]
    line = refused(capsys, train_semisup_miniimagenet.main, *words)
    assert "blue_noise_nl_0.2: there are blue_noise_nl_0.4, red_noise_nl_0.2" in line
    assert list(tmp_path.iterdir()) == []
