"""benchmarks/README.md: generated from the files it names, and up to date."""

import csv
import subprocess
import sys

import pytest

from benchmarks import tables
from benchmarks.cells import PAPERS, ROOT, cells
from benchmarks.tables import figure, main, measured, page
from common.runs.results import COLUMNS


def test_the_page_is_what_the_files_say():
    assert tables.PAGE.read_text(encoding="utf-8") == page(), "run make tables"
    assert tables.FRONT.read_text(encoding="utf-8") == tables.front(), "run make tables"


def test_every_preset_of_every_paper_is_there_with_the_script_that_runs_it():
    lines = page().splitlines()
    for paper in PAPERS:
        for profile in ("embedded", "short", "paper"):
            for cell in cells(paper, profile):
                line = f"    python {cell.script.path} --preset {cell.preset}"
                assert lines.count(line) == 1, line


def test_every_row_of_accuracy_is_counted_once_and_no_other():
    found = 0
    for path in tables.result_files():
        with path.open(newline="") as file:
            found += sum(
                row["metric"] in tables.METRICS and row["table"] != "cross" for row in csv.DictReader(file)
            )
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


def cross_row(
    method: str, seed: str, value: float, cell: str = "digits-sym0.5", metric: str = "last"
) -> dict:
    row = {"method": method, "seed": seed, "value": value, "cell": cell, "metric": metric, "seconds": "90"}
    return row | {"table": "cross", "profile": "embedded", "epochs": "32"}


def test_the_table_of_all_methods_has_settings_down_and_methods_across():
    rows = [cross_row("CE", "1", 90), cross_row("CE", "2", 92), cross_row("SFA", "1", 95)]
    rows += [cross_row("SFA", "1", 7, metric="best"), cross_row("SFA", "1", 80, cell="digits-inst0.4")]
    assert tables.cross_table(rows) == [
        "| setting | profile | epochs | seeds | CE | SFA |",
        "|---|---|---|---|---|---|",
        "| digits-sym0.5 | embedded | 32 | 2 | 91.00 ± 1.41 | 95.00 |",
        "| digits-inst0.4 | embedded | 32 | 1 |  | 80.00 |",
    ]
    assert tables.cross_table(rows[:1], column="seconds", scale=1 / 60)[2].endswith("| 1 | 1.50 |")


def test_the_table_of_all_methods_is_apart_and_says_what_is_missing():
    rows = [
        cross_row("CE", "1", 90),
        cross_row("CE", "1", 1, "cifar10-sym0.2") | {"profile": "short+limit_train=9"},
    ]
    last = tables.cross_section({"x.csv": rows})[-2]
    assert last.startswith("Not measured yet in full: digits-sym0.2, digits-inst0.4,")
    assert "cifar10-sym0.2, " in last and "digits-sym0.5" not in last and "cifar10-human-worst" in last
    assert tables.cross_section({})[1].startswith("Not measured yet in full: digits-sym0.2, digits-sym0.5")


def test_speeds_of_both_paths_are_shown_with_their_ratio_whatever_it_is(tmp_path):
    assert tables.speed_section(tmp_path / "none.csv")[1:] == ["Not measured yet.", ""]
    shared = {f"{part}_ms": "2" for part in ("augment", "forward", "backward", "optimiser", "rest")}
    shared |= {"method": "ce", "step_ms": "10", "q1": "4", "q3": "6", "one_selection_seconds": "0"}
    shared |= {"seconds_per_epoch": "3.5", "peak_memory_mb": "900.4", "share_of_matmul": "0.25"}
    shared |= {"images_trained_per_epoch": "70", "timed_steps": "9"}
    shared |= {"device": "cpu", "cpu_count": "2", "torch": "2.14", "git": "abc", "command": "python -m x"}
    ours = {"path": "ours", "median_images_per_second": "5", "pairs": "3"}
    ours |= {"ours_over_plain_median": "0.8", "ours_over_plain_min": "0.7", "ours_over_plain_max": "0.9"}
    plain = {"path": "plain", "median_images_per_second": "6.25"} | {name: "" for name in list(ours)[2:]}
    with (tmp_path / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*shared, *ours])
        writer.writeheader()
        writer.writerows([shared | ours, shared | plain])
    lines = tables.speed_section(tmp_path / "steps.csv")
    assert lines[-5] == (
        "| ce | ours | 5.00 | 4.00 to 6.00 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 0.00 | 3.50 | 70 | 9 | 900 | 25.0 | 0.80 "
        "| 0.70 to 0.90, 3 pairs |"
    )
    assert lines[-4].startswith("| ce | plain | 6.25 ") and lines[-4].endswith("| 900 | 25.0 |  |  |")
    assert "`python -m x` on cpu with 2 cores, torch 2.14, commit abc" in lines[-2] + lines[-1]


def test_a_page_that_is_out_of_date_is_said_so_and_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "PAGE.md")
    monkeypatch.setattr(tables, "FRONT", tmp_path / "README.md")
    tables.FRONT.write_text("\n".join([tables.MARKS[0], "older", tables.MARKS[1]]))
    for content in (None, "older"):
        if content is not None:
            tables.PAGE.write_text(content)
        assert status("--check") == 1
        lines = [f"{name}.md is out of date: run make tables\n" for name in ("PAGE", "README")]
        assert capsys.readouterr().err == "".join(lines)
    assert tables.PAGE.read_text() == "older" and "older" in tables.FRONT.read_text()
    assert (status(), status("--check")) == (0, 0)
    assert tables.PAGE.read_text(encoding="utf-8") == page() and "older" not in tables.FRONT.read_text()


def status(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code


def test_the_command_line():
    words = [sys.executable, "-m", "benchmarks.tables", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
