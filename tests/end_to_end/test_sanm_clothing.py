"""sanm/Train_clothing1M.py as processes run it: alone, killed again and again, and two under torchrun; as released."""

import re
from pathlib import Path

import pytest
import torch

from common.runs import cli
from sanm import Train_clothing1M
from sanm.networks import clothing_network
from tests.common.small_file_data import make_clothing1m
from tests.end_to_end import runs
from tests.end_to_end.small_networks import masked_network

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

# 42 training images of three classes, all in the warm-up, 36 of them in a division; 33 to validate and 33 to test on,
# all of them in two batches
SETTING = (
    "--network resnet18 --pretrained none --image_size 64 --batch_size 4 --num_batches 42 --num_epochs 2 --lr_drop 2 "
    "--lr 0.02 --device cpu --workers 0"
)
FLAGS = SETTING.split()
# before the first checkpoint; in the warm-up; in a label quality; in co-divide; between a row and its checkpoint; in a
# validation; in the test of the best weights, after the last checkpoint
MOMENTS = ("0:start", "1:training", "1:losses", "2:training", "2:log", "3:validation", "4:weights")
GONE_ON = (0, 0, 1, 1, 2, 3)  # epochs that the starts after the second find finished
COLUMNS = """epoch loss net1_selected net2_selected net1_validation net2_validation test_accuracy labelled_loss prior_loss
reconstruction_loss right_selected_min classes_unselected lr seconds"""
OF_CO_DIVIDE = ["net1_selected", "net2_selected", "labelled_loss", "prior_loss", "reconstruction_loss"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanm_clothing")
    make_clothing1m(folder / "data", per_class=14, clean_per_class=11)
    return folder


@pytest.fixture(scope="module")
def statuses(base) -> list[list[int]]:
    flags, script = [*FLAGS, "--data_path", str(base / "data")], "sanm.Train_clothing1M"
    jobs = runs.jobs_of(script, base / "alone", flags, float64=True)
    jobs += runs.jobs_of(script, base / "killed", flags, *MOMENTS, float64=True)
    return runs.run_jobs([*jobs, *runs.jobs_of(script, base / "by_two", flags, float64=True, processes=2)])


@pytest.fixture
def alone(base, statuses) -> Path:
    assert statuses[0] == [0] and runs.printed(base / "alone")[1] == "", runs.printed(base / "alone")
    return base / "alone" / "run"


@pytest.mark.slow
def test_the_log_and_the_result_of_warm_up_co_divide_and_best_weights(alone):
    rows, found = runs.table(alone), runs.result(alone)
    assert list(rows[0]) == COLUMNS.split() and [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.02, 0.02, 0.002], rel=1e-12)
    assert {rows[0][name] for name in (*OF_CO_DIVIDE, "classes_unselected")} == {""}
    assert {row["right_selected_min"] for row in rows} == {""}, "the true labels are unknown"
    for row in rows[1:]:
        loss, x, prior, rec = (float(row[name]) for name in ("loss", *OF_CO_DIVIDE[2:]))
        assert loss == pytest.approx(x + prior + 0.3 * rec, rel=1e-12) and x > 0 and prior > 0
        # both sides of the split have a batch at least
        assert all(4 <= int(row[name]) <= 32 for name in OF_CO_DIVIDE[:2])
    assert float(rows[-1]["reconstruction_loss"]) < float(rows[1]["reconstruction_loss"])
    # it learns: three classes that chance would get right in a third of the cases
    assert float(rows[-1]["test_accuracy"]) > 80
    for name in ("net1", "net2"):
        best = max(float(row[f"{name}_validation"]) for row in rows)
        assert found["metrics"][f"best_validation_{name}"] == best
    # warm-up: 40 of 42 images in batches of 8; co-divide: whole batches of labelled images alone
    steps = [int(row[name]) // 4 * 4 for row in rows[1:] for name in OF_CO_DIVIDE[:2]]
    assert found["images"] == 2 * 40 + sum(steps)
    assert (found["method"], found["profile"]) == ("SANM(DivideMix)", "short")
    assert found["noise"]["realised_rate"] is None
    quality = runs.label_quality(alone)
    # the first noisy image of each class has the label of the next one
    assert {0, 14, 28} <= {*quality.score.nsmallest(6).index} and quality.selected.notna().all()


@pytest.mark.slow
def test_the_real_network_with_workers(base):
    words = "--workers 2 --num_batches 14 --num_epochs 1 --lr 0.002"
    run = small_run(base, words, clothing_network)
    rows, memory = runs.table(run), runs.state(run)["memory"]
    assert runs.result(run)["metrics"]["at_best_validation"] >= 0
    # 14 batches of 4 are 56, 4 of each class: a division of 12 images
    assert [len(positions) for positions, _ in memory["divisions"]] == [12, 12]
    for i, best in enumerate(memory["best"]):
        assert best["accuracy"] == max(float(row[f"net{i + 1}_validation"]) for row in rows)
        kept = torch.load(run / f"net{i + 1}_best.pt", weights_only=True)
        clothing_network("resnet18", 14).load_state_dict(kept)  # strict: all names and shapes
        assert runs.differences(best["weights"], kept) == []


@pytest.mark.slow
def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, statuses, alone):
    runs.assert_survived(base / "killed", alone, statuses[1:-1], MOMENTS, GONE_ON)


@pytest.mark.slow
def test_two_processes_train_as_one(base, statuses, alone):
    """Losses to 1e-9, accuracies and selected counts alike, weights to 1e-7: sums in another order, in float64."""
    by_two, (out, err) = base / "by_two" / "run", runs.printed(base / "by_two")
    assert statuses[-1] == [0, 0], err
    assert "2 processes" in out and all(out.count(f"epoch {epoch}/3 ") == 1 for epoch in (1, 2, 3))
    runs.assert_close_logs(by_two, alone, loss=1e-9)
    one, two = runs.state(alone), runs.state(by_two)
    torch.testing.assert_close(two["nets"], one["nets"], rtol=1e-7, atol=1e-9)
    divisions = [of["memory"]["divisions"] for of in (two, one)]
    torch.testing.assert_close(*divisions, rtol=1e-5, atol=1e-7)  # positions are whole numbers: the same
    exact = [[of[name] for name in ("masks", "images", "draws")] for of in (two, one)]
    assert runs.differences(*exact) == []
    assert runs.result(by_two)["images"] == runs.result(alone)["images"]
    assert runs.result(by_two)["metrics"] == pytest.approx(runs.result(alone)["metrics"], rel=1e-12)


def small_run(base: Path, words: str, network=masked_network) -> Path:
    """In float32."""
    folder = base / f"run{words.replace(' ', '_')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Train_clothing1M, "clothing_network", network)
        words = f"--data_path {base / 'data'} --out {folder} {words}"
        Train_clothing1M.main([*FLAGS, *words.split()])
    return folder


@pytest.mark.slow
def test_without_masks_it_is_dividemix_and_workers_change_nothing(base):
    both = [small_run(base, f"--masking none --num_epochs 1 --workers {n}") for n in (0, 2)]
    loss, x, prior, rec = (float(runs.table(both[0])[1][name]) for name in ("loss", *OF_CO_DIVIDE[2:]))
    assert loss == pytest.approx(x + prior, rel=1e-6) and rec == 0  # the last digits of sums in float32
    assert runs.result(both[0])["method"] == "DivideMix"
    for optimizer in runs.state(both[0])["optimizers"]:
        assert len(optimizer["state"]) == 10  # of 12 parameters: nothing trains the decoder's two
    assert runs.log_without_seconds(both[0]) == runs.log_without_seconds(both[1])


def test_the_released_targets_drive_the_loss_without_bound(base):
    """With targets that lose hundreds to their top class; at the release's learning rate it takes longer than this to NaN."""
    run = small_run(base, "--fidelity released --lr 0.0009")
    losses = [float(row["labelled_loss"]) for row in runs.table(run)[1:]]
    assert losses[-1] < losses[0] < -20  # no cross-entropy of a distribution is below 0
    assert (run / "result.json").exists()


def test_a_released_run_that_is_no_longer_finite_ends_in_one_line(base, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(lambda _: small_run(base, "--fidelity released --lr 5"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"error: (loss is|losses of training samples are) .*: lower --lr", line)
    assert not list(base.glob("run--fidelity_released_--lr_5/result.json"))
