"""benchmarks/README.md: generated from the files it names, and up to date."""

import csv
import subprocess
import sys

import pytest

from benchmarks import tables
from benchmarks.cells import PAPERS, ROOT, cells
from benchmarks.tables import figure, main, measured, page
from common.results import COLUMNS


def test_the_page_is_what_the_files_say():
    assert tables.PAGE.read_text(encoding="utf-8") == page(), "run make tables"


def test_every_preset_of_every_paper_is_there_with_the_script_that_runs_it():
    lines = page().splitlines()
    for paper in PAPERS:
        for profile in ("embedded", "short", "paper"):
            for cell in cells(paper, profile):
                line = f"    python {cell.script.path} --preset {cell.preset}"
                assert lines.count(line) == 1, line


def test_every_row_of_accuracy_is_counted_once_and_no_other():
    found = 0
    for path in tables.REFERENCE.glob("*.csv"):
        with path.open(newline="") as file:
            found += sum(row["metric"] in tables.METRICS for row in csv.DictReader(file))
    counted = [len(v) for rows in measured().values() for metrics in rows.values() for v in metrics.values()]
    assert sum(counted) == found > 0


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([70.0], "70.00"), ([70, 72, 74], "72.00 ± 2.00"), ([1 / 3, 1 / 3], "0.33 ± 0.00")],
)
def test_a_figure_is_a_mean_with_the_deviation_of_several_seeds(values, text):
    assert figure(values) == text


def write(folder, **changed):
    usual = dict.fromkeys(COLUMNS, "") | {"paper": "sfa", "table": "grid", "cell": "cifar10-if0.1-imb0.2"}
    usual |= {"method": "SFA", "metric": "last", "profile": "paper", "fidelity": "paper", "device": "cpu"}
    usual |= {
        "noise_type": "imb",
        "noise_rate": "0.2",
        "epochs": "200",
        "seed": "1",
        "value": "90.5",
    } | changed
    with (folder / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerow(usual)


def test_a_run_by_the_published_protocol_fills_its_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REFERENCE", tmp_path)
    write(tmp_path)
    rows = measured()["sfa"]
    assert "- sfa, grid: 11 of 12 settings" in tables.not_measured("sfa", rows)
    assert tables.table(rows)[2:] == [
        "| cifar10-if0.1-imb0.2 | imb 0.2 | SFA | paper | 200 | 1 | 90.50 | [`x.csv`](reference/x.csv) |"
    ]
    write(tmp_path, profile="short", fidelity="released")
    rows = measured()["sfa"]
    assert "- sfa, grid: 12 of 12 settings" in tables.not_measured("sfa", rows)
    assert "| SFA, as released | short |" in tables.table(rows)[2]


def test_a_page_that_is_out_of_date_is_said_so_and_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "README.md")
    for content in (None, "older"):
        if content is not None:
            tables.PAGE.write_text(content)
        with pytest.raises(SystemExit) as stop:
            main(["--check"])
        assert stop.value.code == 1
        assert capsys.readouterr().err == "README.md is out of date: run make tables\n"
    assert tables.PAGE.read_text() == "older"
    main([])
    main(["--check"])
    assert tables.PAGE.read_text(encoding="utf-8") == page()


def test_the_command_line():
    words = [sys.executable, "-m", "benchmarks.tables", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
