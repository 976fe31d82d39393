"""benchmarks.label_errors on made-up files: the metrics, the rows, the table, the errors."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import label_errors
from benchmarks.results import read_results
from common.runs import cli
from common.runs.label_quality import COLUMNS, NAME
from tests.benchmarks.files import read, write

OWN = {
    "paper": "sfa",
    "method": "SFA",
    "cell": "c",
    "epochs": "4",
    "seconds": "2.5",
    "command": "python a.py",
}
# three wrong labels, of classes 0, 0 and 1; the last image is of no class
GIVEN, TRUE = [0, 0, 0, 1, 1, 0], [1, 0, 0, 1, -1, 1]
SCORE = [0.1, 0.3, 0.9, 0.8, 0.3, 0.5]


def make_run(folder: Path, seed: int = 1, score=SCORE, true=TRUE) -> Path:
    folder.mkdir()
    images = zip(GIVEN, true, score, strict=True)
    rows = [{"index": i, "given_label": g, "true_label": t, "score": s} for i, (g, t, s) in enumerate(images)]
    write(folder / NAME, rows, COLUMNS)
    write(folder / "result.csv", [{**OWN, "seed": seed, "metric": "last", "value": 90}])
    return folder


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(label_errors.main, list(words))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def test_metrics_of_a_ranking_with_equal_scores_by_hand():
    wrong = np.array([g != t for g, t in zip(GIVEN, TRUE, strict=True)])
    found = label_errors.measure(np.array(GIVEN), wrong, np.array(SCORE))
    # the three lowest are 0.1, and 0.3 twice: two of them are wrong
    assert found.pop("label_error_recall_class_0") == pytest.approx(1 / 2)
    assert found.pop("label_error_recall_class_1") == 1
    # of nine pairs seven are in order, and one is equal
    assert found.pop("label_error_auroc") == pytest.approx(7.5 / 9)
    # precision 1 up to the first wrong label, 2/3 up to the second, 3/4 up to the third
    assert found.pop("label_error_average_precision") == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found.pop("label_error_precision_at_k") == pytest.approx(2 / 3)
    # alone in their bins but for 0.3 and 0.3, of which one is right
    assert found.pop("label_error_calibration") == pytest.approx((0.1 + 0.4 + 0.1 + 0.2 + 0.5) / 6)
    assert found == {"label_error_rate": 0.5}


def test_at_the_border_equal_scores_share_the_places():
    shared = label_errors.among_lowest(np.array([0.5, 0.1, 0.5, 0.5, 0.9]), 3)
    assert shared.tolist() == pytest.approx([2 / 3, 1, 2 / 3, 2 / 3, 0])
    assert label_errors.calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


def test_the_rows_are_those_of_the_runs_and_the_table_is_over_seeds(tmp_path, capsys):
    better = [0.1, 0.6, 0.9, 0.8, 0.3, 0.5]
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 2, better)]
    out = tmp_path / "out.csv", tmp_path / "out.md"
    label_errors.main([*map(str, runs), "--csv", str(out[0]), "--markdown", str(out[1])])
    rows = read(out[0])
    assert len(rows) == 2 * 7 and len(read_results(out[0])) == 14
    assert all({name: row[name] for name in OWN} == OWN for row in rows)
    perfect = {row["metric"]: float(row["value"]) for row in rows if row["seed"] == "2"}
    assert perfect["label_error_auroc"] == perfect["label_error_precision_at_k"] == 1
    printed, table = capsys.readouterr().out, out[1].read_text()
    assert printed.endswith(table) and table.count("\n") == 3
    assert "| sfa | SFA | c | 2 | 50.00 ± 0.00 | 91.67 ± 11.79 |" in table and "| 2.50 ± 0.00 |" in table


def test_what_cannot_be_measured_ends_in_one_line(tmp_path, capsys):
    run = str(make_run(tmp_path / "run"))
    assert f"{tmp_path}: no {NAME} in it: give run" in refused(capsys, str(tmp_path))
    unknown, right = (str(make_run(tmp_path / str(t), true=t)) for t in ([""] * 6, GIVEN))
    assert "the true labels are unknown: give runs" in refused(capsys, run, unknown)
    assert f"{right}: 0 of 6 labels are wrong: give a run" in refused(capsys, right)
    assert "seed 1 stands twice" in refused(capsys, run, run)
    (tmp_path / "run" / "result.csv").unlink()
    assert "no result.csv in it: let the run come" in refused(capsys, run)
    (tmp_path / "run" / NAME).write_text("index,score\n1,2\n")
    assert "its columns are not index, path, " in refused(capsys, run)
    (tmp_path / "run" / NAME).write_text("")
    assert f"{NAME} cannot be read (No columns" in refused(capsys, run)
