"""benchmarks.compare: the statistics, what is paired with what, and every mistake in one line."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import ttest_ind

from benchmarks.compare import COLUMNS, against, compare, format_table, main, read_results
from common.runs.cli import UserError

ROOT = Path(__file__).resolve().parents[2]
CELL = {
    **{"paper": "sfa", "table": "1", "cell": "digits-sym-0.5", "method": "sfa", "dataset": "digits"},
    **{"noise_type": "sym", "noise_rate": "0.5", "profile": "embedded", "fidelity": "paper", "epochs": "3"},
    **{"metric": "best", "command": "python -m sfa.Train_cifar --num_epochs 3, and a comma"},
}


def runs(*values, **fields):
    """One row per value, seeds 1, 2, ..., of one key."""
    blank = dict.fromkeys(COLUMNS, "")
    return [
        {**blank, **CELL, "seed": str(seed), "value": v, **fields} for seed, v in enumerate(values, start=1)
    ]


def metrics_of(comparison):
    return [line.key_a.metric for line in comparison.lines]


def write(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(*words, folder):
    command = [sys.executable, "-m", "benchmarks.compare", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def mistake(capsys, *words):
    """The text of the UserError that the command line ends in; nothing may have been printed before it."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    assert capsys.readouterr().out == ""
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_mean_deviation_and_interval_by_hand():
    # variances 4 and 1: standard error sqrt(4/3 + 1/3),
    # degrees of freedom (5/3)^2 / ((4/3)^2 / 2 + (1/3)^2 / 2) = 50/17
    (line,) = compare(runs(70, 72, 74), runs(75, 76, 77)).lines
    assert (line.a.n, line.a.mean, line.a.std) == (3, 72, 2)
    assert (line.b.n, line.b.mean, line.b.std) == (3, 76, 1)
    assert line.difference == 4
    assert (line.high + line.low) / 2 == pytest.approx(4)
    quantile = (line.high - line.low) / 2 / math.sqrt(5 / 3)
    assert 3.182 < quantile < 4.303  # tabulated t(0.975) at 3 and at 2 degrees of freedom; 50/17 is 2.94
    assert quantile == pytest.approx(3.216, abs=0.01)


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
    (line,) = compare(runs(*a), runs(*b)).lines
    expected = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (line.low, line.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_leaves_deviation_and_interval_blank():
    (line,) = compare(runs(70), runs(72, 74)).lines
    assert line.a.std is None
    assert line.b.std == pytest.approx(math.sqrt(2))
    assert (line.difference, line.low, line.high) == (3, None, None)
    last = format_table(compare(runs(70), runs(72, 74)), "a.csv", "b.csv").splitlines()[-1]
    assert last.split() == ["best", "1", "70.00", "2", "73.00", "1.41", "+3.00"]


def test_without_variance_the_interval_is_the_difference():
    (line,) = compare(runs(70.1, 70.1, 70.1), runs(70.3, 70.3)).lines
    assert line.low == line.high == line.difference == pytest.approx(0.2)


def test_numbers_written_differently_are_the_same_key():
    comparison = compare(runs(70, noise_rate="0.5", epochs="3"), runs(71, noise_rate="0.50", epochs="3.0"))
    assert len(comparison.lines) == 1
    assert compare(runs(70, noise_rate=0.5, epochs=3), runs(71)).lines == comparison.lines
    assert not compare(runs(70, noise_rate="low"), runs(71, noise_rate="high")).lines
    assert len(compare(runs(70, noise_rate="nan"), runs(71, noise_rate="nan")).lines) == 1


@pytest.mark.parametrize(
    ("column", "other", "reason"),
    [("profile", "short", "profile embedded against short"), ("epochs", "10", "epochs 3 against 10")],
)
def test_another_profile_or_schedule_is_listed_and_never_compared(column, other, reason):
    comparison = compare(runs(70, 71), runs(80, 81, **{column: other}))
    assert not comparison.lines
    assert not comparison.only_a + comparison.only_b
    text = format_table(comparison, "a.csv", "b.csv")
    assert "no line to compare" in text
    heading, key = text.splitlines()[-2:]
    assert heading == f"not compared: {reason}"
    assert "cell digits-sym-0.5" in key
    assert "80" not in text


def test_a_profile_beside_a_shared_one_is_listed_with_its_file():
    comparison = compare(runs(70), runs(71) + runs(90, profile="short", epochs="10"))
    assert len(comparison.lines) == 1
    assert comparison.lines[0].b.mean == 71
    text = format_table(comparison, "a.csv", "b.csv")
    assert text.splitlines()[-1] == "only in b.csv: metric best, profile short, epochs 10"


def test_both_conditions_differ():
    text = format_table(compare(runs(70), runs(71, profile="", epochs="10")), "a.csv", "b.csv")
    assert "not compared: profile embedded against (blank), epochs 3 against 10" in text


def test_keys_of_one_file_are_listed_last():
    a = runs(70, 71) + runs(60, cell="digits-asym-0.4", noise_type="asym")
    b = runs(70, 72) + runs(50, fidelity="released")
    text = format_table(compare(a, b), "a.csv", "b.csv").splitlines()
    assert text[-2] == "only in a.csv: cell digits-asym-0.4, noise_type asym, metric best"
    assert text[-1] == "only in b.csv: fidelity released, metric best"


def test_table_is_aligned_and_states_constants_once():
    a = runs(70, 71) + runs(9.5, 8, cell="digits-sym-0.8", noise_rate="0.8")
    b = runs(71, 72) + runs(10, 10.5, cell="digits-sym-0.8", noise_rate="0.8")
    text = format_table(compare(a, b), "a.csv", "b.csv").splitlines()
    assert text[:2] == ["a: a.csv", "b: b.csv"]
    assert "profile embedded, epochs 3" in " ".join(text[2:4])
    heading, first, second = text[-3:]
    assert heading.split()[:3] == ["cell", "noise_rate", "metric"]
    assert heading.index("metric") == first.index("best") == second.index("best")
    assert len(heading) == len(first) == len(second) <= 110


def test_metrics_default_to_file_order_and_follow_the_request():
    rows = runs(70, metric="last") + runs(72, metric="best") + runs(71, metric="last10")
    assert metrics_of(compare(rows, rows)) == ["last", "best", "last10"]
    assert metrics_of(compare(rows, rows, ["last10", "last", "last10"])) == ["last10", "last"]
    with pytest.raises(UserError, match=r"no metric 'lst'.*last, best, last10"):
        compare(rows, rows, ["lst"])


def test_same_seed_twice_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"seed 1 stands twice for .*cell digits-sym-0.5.*metric best"):
        compare(runs(70) + runs(71, seed="1.0"), runs(70))
    with pytest.raises(UserError, match=r"seed \(blank\) stands twice"):
        compare(runs(70), runs(70, 71, seed=""))


def test_against_pairs_methods_with_the_baseline_of_their_cell():
    baseline = runs(60, 62, method="ce", fidelity="")
    rows = baseline + runs(70, 72) + runs(66, 67, fidelity="released") + runs(65, 66, method="co-teaching")
    comparison = against(rows, "ce")
    assert [(line.key_b.method, line.key_b.fidelity) for line in comparison.lines] == [
        ("sfa", "paper"),
        ("sfa", "released"),
        ("co-teaching", "paper"),
    ]
    assert {(line.key_a.method, line.a.mean) for line in comparison.lines} == {("ce", 61)}
    assert [line.difference for line in comparison.lines] == [10, 5.5, 4.5]
    assert "baseline ce" in format_table(comparison, "ce", "the other methods")


def test_against_lists_what_has_no_partner():
    rows = runs(60, method="ce", fidelity="") + runs(61, method="ce", fidelity="", cell="digits-clean")
    rows += runs(80, profile="short") + runs(75, cell="digits-asym-0.4", metric="last")
    comparison = against(rows, "ce")
    assert not comparison.lines
    text = format_table(comparison, "ce", "the other methods")
    assert "not compared: profile embedded against short" in text
    assert [line.split(":")[0] for line in text.splitlines()[-2:]] == [
        "only in ce",
        "only in the other methods",
    ]
    assert "digits-clean" in text.splitlines()[-2]
    assert "digits-asym-0.4" in text.splitlines()[-1]
    with pytest.raises(UserError, match=r"no method 'cee'.*ce, sfa"):
        against(rows, "cee")


def test_read_results_keeps_the_text_and_gives_value_as_a_number(tmp_path):
    (row,) = read_results(write(tmp_path / "a.csv", runs("71.25", noise_rate="0.50")))
    assert list(row) == list(COLUMNS)
    assert (row["value"], row["noise_rate"], row["reported"]) == (71.25, "0.50", "")
    assert row["command"] == CELL["command"]


def test_csv_holds_the_unrounded_numbers(tmp_path, capsys):
    a = write(tmp_path / "a.csv", runs(70.123, 71.456) + runs(69, metric="last"))
    b = write(tmp_path / "b.csv", runs(72.5, 73.9) + runs(70, metric="last"))
    out = tmp_path / "out.csv"
    out.write_text("an older file")
    main([str(a), str(b), "--csv", str(out)])
    assert "best" in capsys.readouterr().out
    with open(out, newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    (line,) = compare(read_results(a), read_results(b), ["best"]).lines
    numbers = [line.a.mean, line.a.std, line.b.mean, line.b.std, line.difference, line.low, line.high]
    names = ["mean_a", "std_a", "mean_b", "std_b", "difference", "low", "high"]
    assert [float(first[name]) for name in names] == numbers
    assert (first["n_a"], first["profile"], first["epochs"], first["baseline"]) == ("2", "embedded", "3", "")
    assert (second["metric"], second["std_a"], second["low"]) == ("last", "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "out.csv"]


def test_in_the_table_of_all_methods_the_baseline_is_of_another_paper(tmp_path):
    rows = runs(60, 61, method="CE", paper="afm", table="cross") + runs(70, 72, method="SFA", table="cross")
    (line,) = against(read_results(write(tmp_path / "a.csv", rows)), "CE").lines
    assert (line.key_a.paper, line.key_b.paper, line.difference) == ("afm", "sfa", 10.5)
    rows = runs(60, method="CE", paper="afm") + runs(70, method="SFA")
    assert against(read_results(write(tmp_path / "b.csv", rows)), "CE").lines == []


def test_csv_says_what_was_not_compared_and_what_is_on_one_side_alone(tmp_path, capsys):
    a = write(tmp_path / "a.csv", runs(70) + runs(60, metric="last", profile="paper"))
    b = write(tmp_path / "b.csv", runs(71) + runs(61, metric="last") + runs(5, cell="new"))
    out = tmp_path / "out.csv"
    main([str(a), str(b), "--csv", str(out)])
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["status"]) for row in rows] == [
        ("best", "compared"),
        ("last", "not compared: profile paper against embedded"),
        ("best", "only in b"),
    ]
    assert rows[1]["difference"] == rows[2]["mean_b"] == "" and rows[2]["cell"] == "new"
    main([str(b), str(a), "--csv", str(out)])
    with open(out, newline="", encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(file)][-1] == "only in a"
    capsys.readouterr()


def test_csv_that_cannot_be_written(tmp_path, capsys):
    a = write(tmp_path / "a.csv", runs(70))
    assert "none/out.csv" in mistake(capsys, a, a, "--csv", tmp_path / "none" / "out.csv")
    assert "cannot be written" in mistake(capsys, a, a, "--csv", tmp_path)
    before = a.read_bytes()
    assert "is one of the result files" in mistake(capsys, a, a, "--csv", tmp_path / "." / "a.csv")
    assert "--markdown" in mistake(capsys, a, a, "--markdown", a)
    assert "--markdown the name of a file" in mistake(capsys, a, a, "--markdown", tmp_path)
    assert a.read_bytes() == before


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    a, out = write(tmp_path / "a.csv", runs(70)), tmp_path / "out.csv"
    out.write_text("an older file")
    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in mistake(capsys, a, a, "--csv", out)
    assert out.read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


@pytest.mark.parametrize("value", ["nan", "inf", "", "76.7 ± 0.8"])
def test_value_must_be_a_finite_number(tmp_path, capsys, value):
    path = write(tmp_path / "a.csv", runs(70, 71) + runs(value, metric="last"))
    text = mistake(capsys, path, path)
    assert text.startswith(f"{path}, line 4: value is {value!r}")


def test_files_that_are_no_results(tmp_path, capsys):
    good, bad = write(tmp_path / "a.csv", runs(70)), tmp_path / "bad.csv"
    assert "does not exist" in mistake(capsys, good, bad)
    assert "cannot be read" in mistake(capsys, good, tmp_path)
    bad.write_text("")
    assert f"{bad} is empty" in mistake(capsys, good, bad)
    write(bad, [])
    assert "no results" in mistake(capsys, good, bad)
    write(bad, runs(70), [name for name in COLUMNS if name not in ("epochs", "git")])
    assert f"{bad} lacks the columns epochs, git" in mistake(capsys, good, bad)
    bad.write_bytes(b"\x89PNG\xff\xfe\x00")
    assert "is not a CSV" in mistake(capsys, good, bad)
    bad.write_text(good.read_text().rstrip()[:-1])  # cut within the quoted command
    assert "is not a CSV" in mistake(capsys, good, bad)
    bad.write_text(good.read_text().splitlines()[0] + "\nsfa,1,digits-sym-0.5\n")
    assert f"{bad}, line 2: not as many fields" in mistake(capsys, good, bad)
    write(bad, runs(70) + runs(71))
    assert f"{bad}: seed 1 stands twice" in mistake(capsys, good, bad)


def test_number_of_files(tmp_path, capsys):
    a = write(tmp_path / "a.csv", runs(70))
    assert "1 result file" in mistake(capsys, a)
    assert "2 result file" in mistake(capsys, a, a, "--against", "ce")
    assert "3 result file" in mistake(capsys, a, a, a, "--against", "ce")


@pytest.mark.parametrize("words", [["a.csv", "none.csv"], ["a.csv", "nan.csv"], ["a.csv", "--metri", "best"]])
def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, words):
    write(tmp_path / "a.csv", runs(70))
    write(tmp_path / "nan.csv", runs("nan"))
    done = run(*words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr


def test_command_line_against(tmp_path):
    write(tmp_path / "a.csv", runs(60, 61, method="ce", fidelity="") + runs(70, 72))
    done = run("a.csv", "--against", "ce", "--metric", "best", "--csv", "out.csv", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "+10.50" in done.stdout
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["method"], row["fidelity"], row["baseline"], row["difference"]) == (
        "sfa",
        "paper",
        "ce",
        "10.5",
    )


def test_each_further_file_is_compared_with_the_first(tmp_path):
    for name, value in (("a", 70), ("b", 71), ("c", 68)):
        write(tmp_path / f"{name}.csv", runs(value, value + 2))
    done = run("a.csv", "b.csv", "c.csv", "--csv", "out.csv", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith(("a: ", "b: "))] == [
        *("a: a.csv", "b: b.csv"),
        *("a: a.csv", "b: c.csv"),
    ]
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = [(row["file"], float(row["difference"])) for row in csv.DictReader(file)]
    assert rows == [("b.csv", 1), ("c.csv", -2)]


def test_markdown_holds_what_the_text_holds(tmp_path):
    left = runs(70, 72) + runs(60, metric="last") + runs(50, method="other|one")
    write(tmp_path / "a.csv", left + runs(1, cell="gone") + runs(1, cell="longer"))
    write(tmp_path / "b.csv", left + runs(2, cell="longer", epochs="9"))
    done = run("a.csv", "b.csv", "--markdown", "out.md", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[:2] == [
        "| method | metric | n a | mean a | std a | n b | mean b | std b | b - a | 95% interval |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert "| sfa | best | 2 | 71.00 | 1.41 | 2 | 71.00 | 1.41 | +0.00 | [-6.08, +6.08] |" in table
    assert "| other&#124;one | best | 1 | 50.00 |  | 1 | 50.00 |  | +0.00 |  |" in table
    assert len(table) == 2 + 3
    assert "\nnot compared: epochs 3 against 9\n- cell longer" in text
    assert "\n- only in a.csv: cell gone" in text


def test_fail_below_names_every_mean_that_is_lower_by_more(tmp_path):
    write(tmp_path / "a.csv", runs(70, 72) + runs(60, 60, metric="last"))
    write(tmp_path / "b.csv", runs(69, 71) + runs(58.9, 58.9, metric="last") + runs(1, cell="new"))
    done = run("a.csv", "b.csv", "--fail-below", "1", folder=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("worse in b.csv: ") and line.endswith(": 60.00 to 58.90 (-1.10)")
    assert "metric last" in line and "-1.10" in done.stdout
    assert run("a.csv", "b.csv", "--fail-below", "1.2", folder=tmp_path).returncode == 0
    assert run("a.csv", "b.csv", "--fail-below", "1", "--metric", "best", folder=tmp_path).returncode == 0
    assert run("b.csv", "b.csv", "--fail-below", "0", folder=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("other", "text"),
    [({"cell": "other"}, ": missing"), ({"epochs": "9"}, "epochs 3: missing under this condition")],
)
def test_fail_below_fails_where_a_cell_is_missing(tmp_path, capsys, other, text):
    a = write(tmp_path / "a.csv", runs(70) + runs(70, cell="common"))
    b = write(tmp_path / "b.csv", runs(70, **other) + runs(70, cell="common"))
    with pytest.raises(SystemExit) as stop:
        main([str(a), str(b), "--fail-below", "5"])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(text)


def test_fail_below_against_a_method(tmp_path):
    write(
        tmp_path / "a.csv",
        runs(60, 61, method="ce") + runs(59, 61, method="better") + runs(50, method="worse"),
    )
    done = run("a.csv", "--against", "ce", "--fail-below", "2", folder=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("worse in the other methods: ") and "method worse" in line


@pytest.mark.parametrize("points", ["-1", "nan", "few"])
def test_fail_below_wants_a_number(tmp_path, points):
    write(tmp_path / "a.csv", runs(70))
    done = run("a.csv", "a.csv", f"--fail-below={points}", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and points in done.stderr
