"""me_momentum/Clothing.py as processes run it: alone, killed again and again, and two under torchrun."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.common.small_file_data import make_clothing1m
from tests.end_to_end import runs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")]

# 18 images in batches of 6; of the last set 15, and the smaller last batch is dropped
LOOPS = "--n_epoch 2 --max_inner_loop 6 --max_outer_loop 2 --lr 0.02"
FLAGS = f"--network resnet18 --no_pretrain --image_size 64 --batch_size 6 {LOOPS} --device cpu --workers 0"
EPOCHS = 24
# inside an inner loop; in a selection; between a row and its checkpoint; the fresh network's first epoch; a validation
MOMENTS = ("2:training", "5:selection", "8:log", "13:training", "18:validation")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clothing")
    make_clothing1m(folder / "data", per_class=6, clean_per_class=3)
    return folder


@pytest.fixture(scope="module")
def statuses(base) -> list[list[int]]:
    flags, script = [*FLAGS.split(), "--data_root", str(base / "data")], "me_momentum.Clothing"
    jobs = runs.jobs_of(script, base / "alone", flags, float64=True)
    jobs += runs.jobs_of(script, base / "killed", flags, *MOMENTS, float64=True)
    return runs.run_jobs([*jobs, *runs.jobs_of(script, base / "by_two", flags, float64=True, processes=2)])


@pytest.fixture
def alone(base, statuses) -> Path:
    assert statuses[0] == [0], runs.printed(base / "alone")
    return base / "alone" / "run"


def test_the_loops_and_what_is_logged_of_them(alone):
    rows = runs.table(alone)
    loops = [(outer, inner) for outer in "12" for inner in "123456" for _ in range(2)]
    assert [(row["outer"], row["inner"]) for row in rows] == loops
    outer_loop = [0.02] * 10 + [0.002] * 2
    assert [float(row["lr"]) for row in rows] == pytest.approx(2 * outer_loop, rel=1e-12)
    sizes = [row["confident_size"] for row in rows]
    assert sizes[:2] == ["", ""]  # all noisy images
    assert sizes[2::2] == sizes[3::2] and len(set(sizes[2:])) >= 3  # each inner loop extracts its own
    assert {row["smallest_class"] for row in rows[:2]} == {"6"}
    for row in rows[2:]:
        assert float(row["confident_share"]) == int(row["confident_size"]) / 18
    lost = [row["classes_unselected"] for row in rows]
    assert lost[:2] == ["", ""] and lost[-1] == "0" and {row["right_selected_min"] for row in rows} == {""}
    assert {row["class_models"] for row in rows} == {"1", "2"}
    # inner loops keep network and optimiser, an outer loop has new ones
    losses = [float(row["loss"]) for row in rows]
    assert losses[2] < losses[1] < losses[0] and losses[12] > 2 * losses[11]


def test_the_confident_examples_are_the_rightly_labelled_ones_and_checkpoints_in_use_are_kept(alone):
    """The first noisy image of each class has the label of the next one."""
    memory, order = runs.state(alone)["memory"], np.arange(18)
    np.random.RandomState(1).shuffle(order)
    assert sorted(order[memory["confident"]]) == [i for i in range(18) if i % 6]
    assert len(memory["weights"]) == int(runs.table(alone)[-1]["class_models"])
    used = memory["models"]["epoch"][memory["models"]["epoch"] > 0].tolist()
    assert set(used) <= set(memory["weights"]) <= set(range(1, 13))
    names = runs.state(alone)["network"].keys()
    assert all(weights.keys() == names for weights in memory["weights"].values())
    assert torch.load(alone / "model_best.pt", weights_only=True).keys() == names


def test_the_result_is_that_of_the_best_validation_accuracy(alone):
    rows, found = runs.table(alone), runs.result(alone)
    validation = [float(row["validation_accuracy"]) for row in rows]
    best = rows[int(np.argmax(validation))]
    assert found["metrics"]["at_best_validation"] == float(best["test_accuracy"])
    assert found["metrics"]["best_validation"] == max(validation)
    new_best = [value > max(validation[:i], default=0.0) for i, value in enumerate(validation)]
    assert [row["new_best"] == "1" for row in rows] == new_best
    # the smaller last batches are dropped
    assert found["images"] == sum(int(row["confident_size"] or 18) // 6 * 6 for row in rows)
    assert found["noise"]["realised_rate"] is None and found["profile"] == "short"
    assert np.load(alone / "train_index.npy").tolist() == list(range(18))
    quality, confident = runs.label_quality(alone), runs.state(alone)["memory"]["confident"]
    order = np.random.RandomState(1).permutation(18)  # the same draws as a shuffle
    assert sorted(order[confident]) == np.flatnonzero(quality.selected).tolist()
    # the first noisy image of each class has the label of the next one
    assert roc_auc_score(np.arange(18) % 6 > 0, quality.score) > 0.8


def test_a_run_killed_in_every_kind_of_place_ends_as_if_nothing_had_happened(base, statuses, alone):
    runs.assert_survived(base / "killed", alone, statuses[1:-1], MOMENTS, (1, 4, 7, 12, 17))


def test_two_processes_train_as_one(base, statuses, alone):
    run, (out, err) = base / "by_two" / "run", runs.printed(base / "by_two")
    assert statuses[-1] == [0, 0], err
    runs.assert_close_logs(run, alone, loss=1e-9, rest=1e-9)
    one, two = runs.state(alone), runs.state(run)
    torch.testing.assert_close(two["network"], one["network"], rtol=1e-7, atol=1e-9)
    assert torch.equal(two["memory"]["confident"], one["memory"]["confident"])
    assert torch.equal(two["generator"], one["generator"])
    assert "2 processes" in out
    assert all(out.count(f"epoch {epoch}/{EPOCHS} ") == 1 for epoch in range(1, EPOCHS + 1))


def test_the_index_is_made_by_path_in_its_default_place(tmp_path):
    make_clothing1m(tmp_path / "data" / "Clothing1M_Official")
    end = runs.start(runs.ROOT / "me_momentum" / "ClothingData.py", cwd=tmp_path)
    assert end.status == 0, end.err
    assert "train: 12 images\nclean_val: 6 images\ntest: 6 images\n" in end.out
    assert (tmp_path / "data" / "Clothing1M_Official" / "Clothing1m-data.npz").is_file()
