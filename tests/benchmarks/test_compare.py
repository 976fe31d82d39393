"""benchmarks.compare: the statistics, what is paired with what, and every mistake in one line."""

import math
import os

import numpy as np
import pytest
from scipy.stats import ttest_ind

from benchmarks import compare as script
from benchmarks.compare import COMPARED, format_table, main
from benchmarks.results import read_results
from common.runs.cli import UserError
from common.runs.results import COLUMNS
from tests.benchmarks.files import frame, mistake, read, status, write

CELL = {
    **{"paper": "sfa", "table": "1", "cell": "digits-sym-0.5", "method": "sfa", "dataset": "digits"},
    **{"noise_type": "sym", "noise_rate": "0.5", "profile": "embedded", "fidelity": "paper", "epochs": "3"},
    **{"metric": "best", "command": "python -m sfa.Train_cifar --num_epochs 3, and a comma"},
}


def runs(*values, **fields):
    """One row per value, seeds 1, 2, ..., of one key."""
    blank = dict.fromkeys(COLUMNS, "")
    return [blank | CELL | {"seed": str(i), "value": v} | fields for i, v in enumerate(values, start=1)]


def compare(a, b, metrics=None):
    return script.compare(frame(a), frame(b), metrics)


def against(rows, baseline, metrics=None):
    return script.against(frame(rows), baseline, metrics)


def lines(found):
    return list(found[found["status"] == COMPARED].itertuples())


def text(a, b):
    return format_table(compare(a, b), "a.csv", "b.csv").splitlines()


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, on a sample without variance
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([71.2, 70.4, 73.9], [74.1, 75.0]),
        ([90.0, 90.0], [91.0, 94.0, 92.5, 93.0]),
        ([1e-90, 3e-90], [0, 1e-90]),
    ],
)
def test_interval_agrees_with_scipy(a, b):
    (line,) = lines(compare(runs(*a), runs(*b)))
    for x, found in ((a, (line.n_a, line.mean_a, line.std_a)), (b, (line.n_b, line.mean_b, line.std_b))):
        assert found == pytest.approx((len(x), np.mean(x), np.std(x, ddof=1)))
    assert line.difference == pytest.approx(np.mean(b) - np.mean(a))
    expected = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (line.low, line.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_leaves_deviation_and_interval_blank_and_without_variance_the_interval_is_the_difference():
    (line,) = lines(compare(runs(70), runs(72, 74)))
    assert all(math.isnan(x) for x in (line.std_a, line.low, line.high))
    last = text(runs(70), runs(72, 74))[-1]
    assert last.split() == ["best", "1", "70.00", "2", "73.00", "1.41", "+3.00"]
    (line,) = lines(compare(runs(70.1, 70.1, 70.1), runs(70.3, 70.3)))
    assert line.low == line.high == line.difference == pytest.approx(0.2)


def test_numbers_written_differently_are_the_same_key():
    assert lines(compare(runs(70, noise_rate="0.5", epochs="3"), runs(71, noise_rate="0.50", epochs="3.0")))
    assert lines(compare(runs(70, noise_rate=0.5, epochs=3), runs(71)))
    assert not lines(compare(runs(70, noise_rate="low"), runs(71, noise_rate="high")))
    assert lines(compare(runs(70, noise_rate="nan"), runs(71, noise_rate="nan")))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"profile": "short"}, "profile embedded against short"),
        ({"epochs": "10"}, "epochs 3 against 10"),
        ({"profile": "", "epochs": "10"}, "profile embedded against (blank), epochs 3 against 10"),
    ],
)
def test_another_profile_or_schedule_is_listed_and_never_compared(changed, reason):
    found = text(runs(70, 71), runs(80, 81, **changed))
    assert "no line to compare" in found
    assert found[-2] == f"not compared: {reason}" and "cell digits-sym-0.5" in found[-1]
    assert "only in" not in " ".join(found) and "80" not in " ".join(found)


def test_what_is_on_one_side_alone_is_listed_last():
    left, right = runs(70), runs(71) + runs(90, profile="short", epochs="10")
    assert [line.mean_b for line in lines(compare(left, right))] == [71]
    assert text(left, right)[-1] == "only in b.csv: metric best, profile short, epochs 10"
    a = runs(70, 71) + runs(60, cell="digits-asym-0.4", noise_type="asym")
    found = text(a, runs(70, 72) + runs(50, fidelity="released"))
    assert found[-2:] == [
        "only in a.csv: cell digits-asym-0.4, noise_type asym, metric best",
        "only in b.csv: fidelity released, metric best",
    ]
    # what all lines share stands above them, not in the reasons
    a, b = (runs(70, profile="short") + runs(70, cell="x", epochs=epochs) for epochs in (3, 9))
    assert text(a, b)[-1] == "  cell x, metric best"


def test_table_is_aligned_and_states_constants_once():
    other = {"cell": "digits-sym-0.8", "noise_rate": "0.8"}
    found = text(runs(70, 71) + runs(9.5, 8, **other), runs(71, 72) + runs(10, 10.5, **other))
    assert found[:2] == ["a: a.csv", "b: b.csv"]
    assert "profile embedded, epochs 3" in " ".join(found[2:4])
    heading, first, second = found[-3:]
    assert heading.split()[:3] == ["cell", "noise_rate", "metric"]
    assert heading.index("metric") == first.index("best") == second.index("best")
    assert len(heading) == len(first) == len(second) <= 110


def test_metrics_default_to_file_order_and_follow_the_request():
    rows = runs(70, metric="last") + runs(72, metric="best") + runs(71, metric="last10")
    assert [line.metric for line in lines(compare(rows, rows))] == ["last", "best", "last10"]
    chosen = lines(compare(rows, rows, ["last10", "last", "last10"]))
    assert [line.metric for line in chosen] == ["last10", "last"]
    with pytest.raises(UserError, match=r"no metric 'lst'.*last, best, last10"):
        compare(rows, rows, ["lst"])


def test_same_seed_twice_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"seed 1 stands twice for .*cell digits-sym-0.5.*metric best"):
        compare(runs(70) + runs(71, seed="1.0"), runs(70))
    with pytest.raises(UserError, match=r"seed \(blank\) stands twice"):
        compare(runs(70), runs(70, 71, seed=""))


def test_against_pairs_methods_with_the_baseline_of_their_cell():
    rows = runs(60, 62, method="ce", fidelity="") + runs(70, 72) + runs(66, 67, fidelity="released")
    found = against(rows + runs(65, 66, method="co-teaching"), "ce")
    assert [(x.method, x.fidelity, x.mean_a, x.baseline, x.difference) for x in lines(found)] == [
        ("sfa", "paper", 61, "ce", 10),
        ("sfa", "released", 61, "ce", 5.5),
        ("co-teaching", "paper", 61, "ce", 4.5),
    ]
    assert "baseline ce" in format_table(found, "ce", "the other methods")


def test_against_lists_what_has_no_partner():
    rows = runs(60, method="ce", fidelity="") + runs(61, method="ce", fidelity="", cell="digits-clean")
    rows += runs(80, profile="short") + runs(75, cell="digits-asym-0.4", metric="last")
    found = format_table(against(rows, "ce"), "ce", "the other methods").splitlines()
    assert "no line to compare" in found and "not compared: profile embedded against short" in found
    assert found[-2].startswith("only in ce: ") and "digits-clean" in found[-2]
    assert found[-1].startswith("only in the other methods: ") and "digits-asym-0.4" in found[-1]
    with pytest.raises(UserError, match=r"no method 'cee'.*ce, sfa"):
        against(rows, "cee")


def test_in_the_table_of_all_methods_the_baseline_is_of_another_paper():
    rows = runs(60, 61, method="CE", paper="afm", table="cross") + runs(70, 72, method="SFA", table="cross")
    (line,) = lines(against(rows, "CE"))
    assert (line.paper_a, line.paper_b, line.difference) == ("afm", "sfa", 10.5)
    assert not lines(against(runs(60, method="CE", paper="afm") + runs(70, method="SFA"), "CE"))


def test_read_results_keeps_the_text_and_gives_value_as_a_number(tmp_path):
    (row,) = runs("71.25", noise_rate="0.50")
    assert read_results(write(tmp_path / "a.csv", [row])).to_dict("records") == [row | {"value": 71.25}]


def test_csv_has_the_unrounded_numbers_and_says_what_was_not_compared(tmp_path, capsys):
    a = write(tmp_path / "a.csv", runs(70.123, 71.456) + runs(60, metric="last", profile="paper"))
    b = write(tmp_path / "b.csv", runs(72.5, 73.9) + runs(61, metric="last") + runs(5, cell="new"))
    out = tmp_path / "out.csv"
    out.write_text("an older file")
    main([str(a), str(b), "--csv", str(out)])
    assert "best" in capsys.readouterr().out
    (line,) = lines(script.compare(read_results(a), read_results(b), ["best"]))
    first, other, new = read(out)
    for name in ("mean_a", "std_a", "mean_b", "std_b", "difference", "low", "high"):
        assert float(first[name]) == getattr(line, name)
    assert (first["n_a"], first["profile"], first["epochs"], first["baseline"]) == ("2", "embedded", "3", "")
    assert (first["metric"], first["status"]) == ("best", "compared")
    assert (other["metric"], other["difference"]) == ("last", "")
    assert other["status"] == "not compared: profile paper against embedded"
    assert [new[name] for name in ("metric", "status", "mean_b", "cell")] == ["best", "only in b", "", "new"]
    main([str(b), str(a), "--csv", str(out)])
    assert read(out)[-1]["status"] == "only in a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "out.csv"]


def test_csv_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    a, out = write(tmp_path / "a.csv", runs(70)), tmp_path / "out.csv"
    before = a.read_bytes()
    assert "none/out.csv" in mistake(capsys, main, a, a, "--csv", tmp_path / "none" / "out.csv")
    assert "cannot be written" in mistake(capsys, main, a, a, "--csv", tmp_path)
    assert "is one of the result files" in mistake(capsys, main, a, a, "--csv", tmp_path / "." / "a.csv")
    assert "--markdown" in mistake(capsys, main, a, a, "--markdown", a)
    assert "--markdown the name of a file" in mistake(capsys, main, a, a, "--markdown", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    out.write_text("an older file")
    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in mistake(capsys, main, a, a, "--csv", out)
    assert (a.read_bytes(), out.read_text()) == (before, "an older file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


def test_files_that_are_no_results(tmp_path, capsys):
    good, bad = write(tmp_path / "a.csv", runs(70)), tmp_path / "bad.csv"
    heading = good.read_text().splitlines()[0]
    assert "does not exist" in mistake(capsys, main, good, bad)
    assert "cannot be read" in mistake(capsys, main, good, tmp_path)
    for value in ("nan", "inf", "", "76.7 ± 0.8"):
        write(bad, runs(70, 71) + runs(value, metric="last"))
        assert mistake(capsys, main, good, bad).startswith(f"{bad}, line 4: value is {value!r}")
    for content, said in (
        ("", f"{bad} is empty"),
        (heading, "no results"),
        (good.read_text().rstrip()[:-1], "is not a CSV"),  # cut within the quoted command
        (f"{heading}\nsfa,1,digits-sym-0.5\n", f"{bad}, line 2: not as many fields"),
    ):
        bad.write_text(content)
        assert said in mistake(capsys, main, good, bad)
    write(bad, runs(70), [name for name in COLUMNS if name not in ("epochs", "git")])
    assert f"{bad} lacks the columns epochs, git" in mistake(capsys, main, good, bad)
    bad.write_bytes(b"\x89PNG\xff\xfe\x00")
    assert "is not a CSV" in mistake(capsys, main, good, bad)
    write(bad, runs(70) + runs(71))
    assert f"{bad}: seed 1 stands twice" in mistake(capsys, main, good, bad)
    for words, number in (((), 1), ((good, "--against", "ce"), 2), ((good, good, "--against", "ce"), 3)):
        assert f"{number} result file" in mistake(capsys, main, good, *words)


def test_each_further_file_is_compared_with_the_first(tmp_path, capsys):
    a, b, c = (write(tmp_path / f"{n}.csv", runs(v, v + 2)) for n, v in (("a", 70), ("b", 71), ("c", 68)))
    main([str(a), str(b), str(c), "--csv", str(tmp_path / "out.csv")])
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("a: ", "b: "))]
    assert named == [f"a: {a}", f"b: {b}", f"a: {a}", f"b: {c}"]
    rows = [(row["file"], float(row["difference"])) for row in read(tmp_path / "out.csv")]
    assert rows == [(str(b), 1), (str(c), -2)]


def test_markdown_has_what_the_text_has(tmp_path, capsys):
    left = runs(70, 72) + runs(60, metric="last") + runs(50, method="other|one")
    a = write(tmp_path / "a.csv", left + runs(1, cell="gone") + runs(1, cell="longer"))
    b = write(tmp_path / "b.csv", left + runs(2, cell="longer", epochs="9"))
    main([str(a), str(b), "--markdown", str(tmp_path / "out.md")])
    found = (tmp_path / "out.md").read_text()
    table = [line for line in found.splitlines() if line.startswith("|")]
    assert table[:2] == [
        "| method | metric | n a | mean a | std a | n b | mean b | std b | b - a | 95% interval |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert "| sfa | best | 2 | 71.00 | 1.41 | 2 | 71.00 | 1.41 | +0.00 | [-6.08, +6.08] |" in table
    assert "| other&#124;one | best | 1 | 50.00 |  | 1 | 50.00 |  | +0.00 |  |" in table
    assert len(table) == 2 + 3
    assert "\nnot compared: epochs 3 against 9\n- cell longer" in found
    assert f"\n- only in {a}: cell gone" in found


def fail_below(capsys, *words):
    """Exit status and lines of standard error."""
    return status(main, *words), capsys.readouterr().err.splitlines()


def test_fail_below_names_every_mean_that_is_lower_by_more_and_every_missing_cell(tmp_path, capsys):
    a = write(tmp_path / "a.csv", runs(70, 72) + runs(60, 60, metric="last"))
    b = write(tmp_path / "b.csv", runs(69, 71) + runs(58.9, 58.9, metric="last") + runs(1, cell="new"))
    status, (line,) = fail_below(capsys, a, b, "--fail-below", "1")
    assert status == 1 and "metric last" in line
    assert line.startswith(f"worse in {b}: ") and line.endswith(": 60.00 to 58.90 (-1.10)")
    for words in ((a, b, "--fail-below", 1.2), (a, b, "--fail-below", 1, "--metric", "best")):
        assert fail_below(capsys, *words) == (0, [])
    assert fail_below(capsys, b, b, "--fail-below", 0) == (0, [])
    methods = runs(60, 61, method="ce") + runs(59, 61, method="better") + runs(50, method="worse")
    words = (write(tmp_path / "c.csv", methods), "--against", "ce", "--fail-below", 2)
    status, (line,) = fail_below(capsys, *words)
    assert status == 1 and line.startswith("worse in the other methods: ") and "method worse" in line
    missing = {": missing": {"cell": "other"}, "epochs 3: missing under this condition": {"epochs": "9"}}
    a = write(tmp_path / "a.csv", runs(70) + runs(70, cell="common"))
    for said, other in missing.items():
        write(b, runs(70, **other) + runs(70, cell="common"))
        status, (line,) = fail_below(capsys, a, b, "--fail-below", 5)
        assert status == 1 and line.endswith(said)
