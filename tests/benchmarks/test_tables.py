"""benchmarks/README.md: generated from the files it names, and up to date."""

from itertools import product

from benchmarks import tables
from benchmarks.cells import PAPERS, cells
from benchmarks.results import CROSS, figure
from benchmarks.tables import main, page
from benchmarks.verdicts import CLAIMS_CSV
from tests.benchmarks.files import frame, read, status, write


def test_the_page_is_what_the_files_say_and_has_every_preset_and_row():
    text = page()
    assert tables.PAGE.read_text(encoding="utf-8") == text, "run make tables"
    assert tables.FRONT.read_text(encoding="utf-8") == tables.front(), "run make tables"
    lines = text.splitlines()
    for paper, profile in product(PAPERS, ("embedded", "short", "paper")):
        for cell in cells(paper, profile):
            line = f"    python {cell.script.path} --preset {cell.preset}"
            assert lines.count(line) == 1, line
    for path in tables.REFERENCE.glob("*.csv"):
        rows = [r for r in read(path) if r["metric"] in tables.METRICS and r["table"] != CROSS]
        shown = {tuple(r[name] for name in tables.ROW[:-1]) for r in rows}
        assert text.count(f"(reference/{path.name}) |") == len(shown) * (path.name != CLAIMS_CSV), path.name


def test_a_figure_is_a_mean_with_the_deviation_of_several_seeds():
    found = [figure(values) for values in ([], [70.0], [70, 72, 74], [1 / 3, 1 / 3])]
    assert found == ["", "70.00", "72.00 ± 2.00", "0.33 ± 0.00"]


ROW = {
    **{"paper": "sfa", "table": "grid", "cell": "cifar10-if0.1-imb0.2", "method": "SFA", "metric": "last"},
    **{"profile": "paper", "fidelity": "paper", "device": "cpu", "noise_type": "imb", "noise_rate": "0.2"},
    **{"epochs": "200", "seed": "1", "value": "90.5"},
}


def test_a_run_by_the_published_protocol_fills_its_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REFERENCE", tmp_path)
    baseline = ROW | {"cell": "cifar10-if0.1-imb0.5", "method": "CE"}  # fills no setting
    write(tmp_path / "x.csv", [ROW, ROW | {"metric": "loss"}, ROW | {"seed": "2", "value": "91.5"}, baseline])
    text = page()
    assert "- sfa, grid: 11 of 12 settings" in text and "Nothing has been measured on a GPU yet." in text
    cells_of_row = "| cifar10-if0.1-imb0.2 | imb 0.2 | SFA | paper | 200 | 2 | 91.00 ± 0.71 |"
    assert f"{cells_of_row} [`x.csv`](reference/x.csv) |\n" in text
    assert text.count("Not measured yet.\n") == 3, "neither claims nor label errors nor speeds"
    write(tmp_path / "x.csv", [ROW | {"profile": "short", "fidelity": "released", "device": "H200"}])
    text = page()
    assert "- sfa, grid: 12 of 12 settings" in text and "on a GPU yet" not in text
    assert "| SFA, as released | short |" in text


def cross_row(method, seed, value, cell="digits-sym0.5", metric="last", profile="embedded") -> dict:
    row = {"method": method, "seed": seed, "value": value, "cell": cell, "metric": metric, "seconds": "90"}
    return row | {"table": "cross", "profile": profile, "epochs": "32", "device": "cpu"}


def test_the_table_of_all_methods_has_settings_down_and_methods_across():
    rows = [cross_row("CE", "1", 90), cross_row("CE", "2", 92), cross_row("SFA", "1", 95)]
    rows += [cross_row("SFA", "1", 7, metric="best"), cross_row("SFA", "1", 80, cell="digits-inst0.4")]
    assert tables.cross_table(frame(rows)) == [
        "| setting | profile | epochs | seeds | CE | SFA |",
        "|---|---|---|---|---|---|",
        "| digits-sym0.5 | embedded | 32 | 1 to 2 | 91.00 ± 1.41 | 95.00 |",
        "| digits-inst0.4 | embedded | 32 | 1 |  | 80.00 |",
    ]
    minutes = tables.cross_table(frame(rows[:1]), column="seconds", scale=1 / 60)
    assert minutes[2].endswith("| 1 | 1.50 |")


def test_the_table_of_all_methods_is_apart_and_says_what_is_missing(tmp_path, monkeypatch):
    subset = cross_row("CE", "1", 1, "cifar10-sym0.2", profile="short+limit_train=9")
    monkeypatch.setattr(tables, "REFERENCE", tmp_path)
    write(tmp_path / "x.csv", [cross_row("CE", "1", 90), subset])
    (last,) = (line for line in page().splitlines() if line.startswith("Not measured yet in full: "))
    assert last.startswith("Not measured yet in full: digits-sym0.2, digits-inst0.4,")
    assert "cifar10-sym0.2, " in last and "digits-sym0.5" not in last and "cifar10-human-worst" in last


def test_label_errors_are_on_both_pages_and_in_no_other_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REFERENCE", tmp_path)
    names = ("rate", "auroc", "average_precision")
    values = (("CE", "1", 0.5), ("CE", "2", 0.7), ("CE, cleanlab", "1", 0.9))
    rows = [cross_row(*value, metric=f"label_error_{name}") for value in values for name in names]
    write(tmp_path / tables.LABEL_ERRORS, rows)
    text = page()
    assert "|  | CE | digits-sym0.5 | 2 | 60.00 ± 14.14 | 60.00 ± 14.14 |" in text
    assert "in full: digits-sym0.2, digits-sym0.5" in text, "no row of the table of all methods"
    assert "| digits-sym0.5 | 1 to 2 | 60.00 ± 14.14 | 90.00 |" in tables.front()


def test_speeds_of_both_paths_are_shown_with_their_ratio_whatever_it_is():
    shared = {f"{part}_ms": "2" for part in ("augment", "forward", "backward", "optimiser", "rest")}
    shared |= {"method": "ce", "step_ms": "10", "q1": "4", "q3": "6", "one_selection_seconds": "0"}
    shared |= {"seconds_per_epoch": "3.5", "peak_memory_mb": "900.4", "share_of_matmul": "0.25"}
    shared |= {"images_trained_per_epoch": "70", "timed_steps": "9"}
    ours = {"path": "ours", "median_images_per_second": "5", "pairs": "3"}
    ours |= {"ours_over_plain_median": "0.8", "ours_over_plain_min": "0.7", "ours_over_plain_max": "0.9"}
    plain = dict.fromkeys(ours, "") | {"path": "plain", "median_images_per_second": "6.25"}
    first, second = tables.speed_table([shared | ours, shared | plain])[2:]
    assert first == (
        "| ce | ours | 5.00 | 4.00 to 6.00 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 | 0.00 | 3.50 | 70 | 9 | 900 | 25.0 | 0.80 "
        "| 0.70 to 0.90, 3 pairs |"
    )
    assert second.startswith("| ce | plain | 6.25 ") and second.endswith("| 900 | 25.0 |  |  |")


def test_a_page_that_is_out_of_date_is_named_and_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "PAGE.md")
    monkeypatch.setattr(tables, "page", lambda: "a page")
    monkeypatch.setattr(tables, "FRONT", tmp_path / "README.md")
    tables.FRONT.write_text("\n".join(f"{first}\nolder\n{last}" for first, last in tables.MARKS.values()))
    said = "".join(f"{name}.md is out of date: run make tables\n" for name in ("PAGE", "README"))
    assert (status(main, "--check"), capsys.readouterr().err) == (1, said)
    tables.PAGE.write_text("older")
    assert (status(main, "--check"), capsys.readouterr().err) == (1, said)
    assert tables.PAGE.read_text() == "older" and "older" in tables.FRONT.read_text()
    assert (status(main), status(main, "--check")) == (0, 0)
    assert tables.PAGE.read_text(encoding="utf-8") == "a page" and "older" not in tables.FRONT.read_text()
