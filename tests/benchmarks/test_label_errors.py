"""benchmarks.label_errors on made-up files: the metrics, the rows, the table, the errors; images out of fold for cleanlab."""

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from afm.flags import parse_args as afm_args
from benchmarks import baseline, cross_validation, label_errors
from benchmarks.label_errors import main
from benchmarks.results import read_results
from common import datasets
from common.runs.label_quality import COLUMNS, NAME, Estimate
from tests.benchmarks.files import read, write
from tests.lines import refused

OWN = {"paper": "sfa", "method": "SFA", "cell": "c", "epochs": "4", "seconds": "2.5"}
OWN |= {"command": "python a.py"}
# three wrong labels, of classes 0, 0 and 1; the last image is of no class
GIVEN, TRUE = [0, 0, 0, 1, 1, 0], [1, 0, 0, 1, -1, 1]
SCORE = [0.1, 0.3, 0.9, 0.8, 0.3, 0.5]


def make_run(folder: Path, seed: int = 1, score=SCORE, true=TRUE, given=GIVEN) -> Path:
    folder.mkdir()
    images = zip(given, true, score, strict=True)
    rows = [{"index": i, "given_label": g, "true_label": t, "score": s} for i, (g, t, s) in enumerate(images)]
    write(folder / NAME, rows, COLUMNS)
    write(folder / "result.csv", [{**OWN, "seed": seed, "metric": "last", "value": 90}])
    return folder


def test_metrics_of_a_ranking_with_equal_scores_by_hand():
    found = label_errors.measure(np.array(GIVEN), np.not_equal(GIVEN, TRUE), np.array(SCORE))
    expected = {
        "rate": 1 / 2,
        # the three lowest are 0.1, and 0.3 twice: two of them are wrong
        "recall_class_0": 1 / 2,
        "recall_class_1": 1,
        "precision_at_k": 2 / 3,
        # of nine pairs seven are in order, and one is equal
        "auroc": 7.5 / 9,
        # precision 1 up to the first wrong label, 2/3 up to the second, 3/4 up to the third
        "average_precision": (1 + 2 / 3 + 3 / 4) / 3,
        # alone in their bins but for 0.3 and 0.3, of which one is right
        "calibration": (0.1 + 0.4 + 0.1 + 0.2 + 0.5) / 6,
    }
    assert found == pytest.approx({f"label_error_{name}": value for name, value in expected.items()})
    # at the border equal scores share the places
    shared = label_errors.among_lowest(np.array([0.5, 0.1, 0.5, 0.5, 0.9]), 3)
    assert shared.tolist() == pytest.approx([2 / 3, 1, 2 / 3, 2 / 3, 0])
    assert label_errors.calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


def test_the_rows_are_those_of_the_runs_and_the_table_is_over_seeds(tmp_path, capsys):
    better = [0.1, 0.6, 0.9, 0.8, 0.3, 0.5]
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 2, better)]
    out = tmp_path / "out.csv", tmp_path / "out.md"
    main([*map(str, runs), "--csv", str(out[0]), "--markdown", str(out[1])])
    rows = read(out[0])
    assert len(rows) == len(read_results(out[0])) == 2 * 7
    assert all({name: row[name] for name in OWN} == OWN for row in rows)
    perfect = {row["metric"]: float(row["value"]) for row in rows if row["seed"] == "2"}
    assert perfect["label_error_auroc"] == perfect["label_error_precision_at_k"] == 1
    printed, table = capsys.readouterr().out, out[1].read_text()
    assert printed.endswith(table) and table.count("\n") == 3
    assert "| sfa | SFA | c | 2 | 50.00 ± 0.00 | 91.67 ± 11.79 |" in table and "| 2.50 ± 0.00 |" in table


def test_columns_come_from_the_results_that_have_the_command(tmp_path, capsys):
    run, results, out = make_run(tmp_path / "a"), tmp_path / "cross.csv", tmp_path / "out.csv"
    described = {**OWN, "cell": "digits-sym0.5", "seconds": "9", "seed": "1", "metric": "last", "value": "1"}
    write(results, [described])
    main([str(run), "--results", str(results), "--csv", str(out)])
    assert {(row["cell"], row["seconds"]) for row in read(out)} == {("digits-sym0.5", "9")}
    write(results, [described | {"command": "python b.py"}])
    capsys.readouterr()
    line = refused(capsys, main, run, "--results", results)
    assert f"--results: no row has the command of {run}: give" in line


def test_what_cannot_be_measured_ends_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert f"{tmp_path}: no {NAME} in it: give run" in refused(capsys, main, tmp_path)
    unknown, right = (make_run(tmp_path / str(t), true=t) for t in ([""] * 6, GIVEN))
    assert "the true labels are unknown: give runs" in refused(capsys, main, run, unknown)
    assert f"{right}: 0 of 6 labels are wrong: give a run" in refused(capsys, main, right)
    assert "seed 1 stands twice" in refused(capsys, main, run, run)
    (run / "result.csv").unlink()
    assert "no result.csv in it: let the run come" in refused(capsys, main, run)
    (run / NAME).write_text("index,score\n1,2\n")
    assert "its columns are not index, path, " in refused(capsys, main, run)
    (run / NAME).write_text("")
    assert f"{NAME} cannot be read (No columns" in refused(capsys, main, run)


# cleanlab -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits_run(tmp_path) -> Path:
    """What a run on 120 digits leaves, with 10 wrong labels."""
    truth = datasets.load("digits").train.labels[:120]
    given = np.where(np.arange(120) < 10, (truth + 1) % 10, truth)
    folder = make_run(tmp_path / "run", 1, [0.5] * 120, truth, given)
    np.save(folder / "train_index.npy", np.arange(120))
    np.save(folder / "noisy_labels.npy", given)
    arguments = {"dataset": "digits", "seed": 1, "num_epochs": 4, "precision": "bf16"}
    (folder / "args.json").write_text(json.dumps({"paper": "sfa", "arguments": arguments, "cell": {}}))
    return folder


@pytest.fixture
def watched(monkeypatch) -> list:
    """A cleanlab that takes the probability of the given label, and what each epoch and each test of a fold went through."""
    seen = []

    def train_epoch(network, optimizer, batches, labels, device):
        positions = torch.cat([index for _, index in batches])
        seen.append((id(network), round(optimizer.param_groups[0]["lr"], 6), sorted(positions.tolist())))
        return 0.0

    def estimate(network, plain, device):
        held = torch.cat([index for _, index in plain])
        seen.append((id(network), sorted(held.tolist())))
        return Estimate(torch.nn.functional.one_hot(held % 10, 10).float())

    monkeypatch.setattr(baseline, "train_epoch", train_epoch)
    monkeypatch.setattr(baseline, "estimate_label_quality", estimate)
    rank = SimpleNamespace(get_label_quality_scores=lambda given, p: p[np.arange(len(given)), given])
    issues = SimpleNamespace(find_label_issues=lambda given, p, n_jobs: p.argmax(axis=1) != given)
    for name, module in (("", SimpleNamespace()), (".rank", rank), (".filter", issues)):
        monkeypatch.setitem(sys.modules, f"cleanlab{name}", module)
    return seen


def test_cleanlab_ranks_images_by_networks_that_were_trained_without_them(
    digits_run, watched, tmp_path, capsys
):
    words = [str(digits_run), "--cleanlab", "--device", "cpu", "--csv", str(tmp_path / "out.csv")]
    main(words)
    held = []
    for fold in range(5):
        *epochs, (tested, out) = watched[5 * fold : 5 * fold + 5]
        assert [rate for _, rate, _ in epochs] == [0.02] * 3 + [0.002]
        for network, _, positions in epochs:
            assert network == tested and sorted([*positions, *out]) == list(range(120))
        held += out
    assert sorted(held) == list(range(120)) and len(watched) == 5 * 5
    # rows of probabilities are by position: the class of the largest is the last digit of the position
    found = read(digits_run / "cleanlab" / NAME)
    assert [int(row["predicted_label"]) for row in found] == [i % 10 for i in range(120)]
    assert all((row["score"] == "1") == (row["selected"] == "1") for row in found)
    precision = {row["method"]: row["precision"] for row in read(tmp_path / "out.csv")}
    assert precision == {"SFA": "", "CE, 5 folds, cleanlab": "bf16"}
    assert "| CE, 5 folds, cleanlab | c | 1 |" in capsys.readouterr().out
    # what was trained is not trained again, nor for another method's run on the same labels
    main(words)
    shutil.copytree(digits_run, tmp_path / "other", ignore=shutil.ignore_patterns("cleanlab"))
    write(tmp_path / "other/result.csv", [{**OWN, "method": "M", "seed": 1, "metric": "last", "value": 90}])
    main([words[0], str(tmp_path / "other"), *words[1:]])
    assert len(watched) == 5 * 5 and not (tmp_path / "other/cleanlab").exists()
    assert {row["method"] for row in read(tmp_path / "out.csv")} == {"SFA", "M", "CE, 5 folds, cleanlab"}


def test_cleanlabs_networks_have_the_schedule_of_a_run_of_cross_entropy():
    words = "--dataset digits --network preact_narrow --lam 0 --lr 0.05 --schedule 2 3 --weight-decay 5e-4 --train-batch 64"
    own = afm_args(words.split())
    recipe = cross_validation.recipe_of({"paper": "afm", "arguments": vars(own)}, 10, 1, 8)
    assert [round(recipe.learning_rate(epoch), 6) for epoch in (1, 2, 3, 4)] == [0.1, 0.1, 0.01, 0.001]
    assert (recipe.batch_size, recipe.drop_last, recipe.momentum) == (64, True, 0.9)
    # as afm/train.py trains: its loss is twice the cross-entropy
    torch.manual_seed(0)
    first, images, labels, weights = recipe.network(), torch.rand(8, 1, 8, 8), torch.arange(8), []
    for rate, decay, factor in ((0.1, recipe.weight_decay, 1), (0.05, 5e-4, 2)):
        network = copy.deepcopy(first)
        optimizer = torch.optim.SGD(network.parameters(), rate, 0.9, weight_decay=decay)
        for _ in range(2):
            optimizer.zero_grad()
            (factor * torch.nn.functional.cross_entropy(network(images), labels)).backward()
            optimizer.step()
        weights.append(network.classifier.weight)
    assert torch.allclose(*weights, atol=1e-6)


def test_without_cleanlab_or_with_other_images_one_line_says_so(digits_run, watched, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    assert "cleanlab is not installed (" in refused(capsys, main, digits_run, "--cleanlab")
    monkeypatch.setitem(sys.modules, "cleanlab.rank", SimpleNamespace(get_label_quality_scores=None))
    rows = read(digits_run / NAME)
    for changed in ({"path": "a.jpg"}, {"true_label": "-1"}, {"true_label": ""}):
        write(digits_run / NAME, [rows[0] | changed, *rows[1:]], COLUMNS)
        assert "is on image files, OOD images or" in refused(capsys, main, digits_run, "--cleanlab")
    assert not (digits_run / cross_validation.FOLDER).exists() and not watched
