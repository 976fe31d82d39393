"""The claims: what is listed, what is run once, what a verdict follows from, and the table, the figure and the files."""

import math
import re
import sys
from functools import partial

import numpy as np
import pytest

import sfa.Train_cifar
from benchmarks import claims, forest, tables, verdicts
from benchmarks.cells import PAPERS
from benchmarks.claims import main, missing, read_prepared, runs_of
from benchmarks.results import read_results
from benchmarks.verdicts import Claim, ClaimTest, chosen, outcomes, preset_of, read_claims, verdict
from common.runs.cli import UserError
from tests.benchmarks.files import frame, read, status, write

EVERY, PREPARED = read_claims(), read_prepared()
TESTS = [(claim, test) for claim in EVERY for test in claim.tests]
# the flags that make one method of a comparison another
OF_THE_METHOD = {
    *("lam", "mix-at", "weights", "selection", "ema_mode", "masking", "recon_weight", "remove-ood"),
    *("lambda_xe", "lambda_ue", "n_epoch", "max_inner_loop", "max_outer_loop"),
}
TINY = """
seeds = [1, 2]
[settings]
[claims.rare]
paper = "sfa"
claim = "It finds them."
source = "abstract"
metric = "last_net1_recall"
tests = [
    { data = "digits", cell = "sfa/claims/digits-x/sfa", than = "sfa/claims/digits-x/gmm" },
    { data = "digits, a bound", cell = "sfa/claims/digits-x/sfa", value = 0.01 },
    { data = "CIFAR-10", metric = "full_test", cell = "sfa/claims/cifar10-x/sfa", than = "sfa/claims/cifar10-x/gmm" },
]
"""
PRESET = """
["claims/{data}-x/{selection}"]
dataset = "{data}"
imb_factor = 0.5
arch = "narrow"
limit_train = 120
num_epochs = 2
warm_up = 1
selection = "{selection}"
"""


# the list -------------------------------------------------------------------------------------------------------------


def test_every_paper_has_claims_and_most_are_tested_on_digits_and_on_real_images():
    assert {claim.paper for claim in EVERY} == {*PAPERS, verdicts.ALL}
    for claim in EVERY:
        kinds = {test.embedded for test in claim.tests}
        assert kinds == ({False} if claim.paper == verdicts.ALL else {True, False}), claim.name
        assert claim.sentence.endswith(".") and claim.source and not claim.source.endswith(".")


@pytest.mark.parametrize(("claim", "test"), TESTS, ids=lambda x: getattr(x, "data", None) or x.name)
def test_two_methods_of_a_setting_differ_in_the_flags_of_the_method_alone(claim, test):
    """Real ones test on a subset by epoch and on all images at the end."""
    presets = [preset_of(cell) for cell in test.cells]
    if test.than is not None and claim.paper != verdicts.ALL:
        one, other = presets
        assert test.cell.split("/")[2] == test.than.split("/")[2]
        assert {key for key in {**one, **other} if one.get(key) != other.get(key)} <= OF_THE_METHOD
    for preset in presets:
        tested = (None, None) if preset["dataset"] == "digits" else (2000, True)
        assert (preset.get("limit_test"), preset.get("full_test_at_end")) == tested
    if not test.embedded:
        assert test.metric not in ("best", "last", "last10", "at_best_validation"), "of the subset"


def test_a_prepared_setting_has_as_many_images_as_its_presets_say():
    used = {cell for _, test in TESTS for cell in test.cells if cell.split("/")[2] in PREPARED}
    assert {cell.split("/")[2] for cell in used} == set(PREPARED)
    for cell in used:
        preset = preset_of(cell)
        assert preset["limit_train"] == PREPARED[cell.split("/")[2]].limit
        assert "given" in [preset.get(flag) for flag in ("noise-type", "noise_mode", "noise_type")], cell


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('source = "abstract"', "", "rare: paper, claim and source are needed"),
        ('paper = "sfa"', 'paper = "sfb"', "rare: paper, claim and source are needed"),
        ('metric = "last_net1_recall"', "", "rare: a test needs data, metric,"),
        ("value = 0.01", "bound = 0.01", "rare: a test needs data, metric,"),
        ("value = 0.01", 'direction = "up"', "rare: a test needs data, metric,"),
        ('digits-x/gmm" }', 'digits-x/gm" }', "sfa/claims/digits-x/gm is no"),
    ],
)
def test_a_misspelt_entry_is_refused(old, new, line, tiny, tmp_path):
    path = tmp_path / "other.toml"
    path.write_text(TINY.replace(old, new, 1))
    with pytest.raises(ValueError, match=line):
        read_claims(path)


def test_claims_are_chosen_by_name_and_by_kind():
    (one,) = chosen(EVERY, ["sfa-rare-classes"], "embedded")
    assert {test.data.split(",")[0] for test in one.tests} == {"digits"} and len(one.tests) == 2
    assert {c.name for c in chosen(EVERY, None, "real")} == {c.name for c in EVERY}
    assert "across-above-ce" not in {c.name for c in chosen(EVERY, None, "embedded")}
    with pytest.raises(UserError, match="no claim nosuch: choose from afm-attention, "):
        chosen(EVERY, ["nosuch"], None)


# verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 2, ["holds", "contradicted", "holds"]),
        (-2, -0.1, ["contradicted", "holds", "holds"]),
        *((low, high, ["undecided"] * 3) for low, high in ((-1, 1), (0, 1), (math.nan, math.nan))),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, expected):
    assert [verdict(low, high, direction) for direction in ("above", "below", "differs")] == expected


def row(preset: str, seed: int, metric: str, value: float) -> dict:
    command = f"python sfa/Train_cifar.py --preset {preset} --seed {seed}"
    return {
        **{"paper": "sfa", "table": "claims", "cell": "x", "method": preset.rpartition("/")[2]},
        **{"seed": str(seed), "metric": metric, "value": value, "command": command},
    }


def outcome_of(test: ClaimTest, *rows: dict) -> verdicts.Outcome:
    claim = Claim("name", "sfa", "A sentence.", "abstract", (test,))
    return outcomes([claim], frame(rows) if rows else frame([row("a/b/x", 1, "none", 0)]))["name"][0]


def test_of_two_methods_the_interval_is_welchs_in_points():
    test = ClaimTest("digits", "recall", "above", 0.0, "sfa/a/b/m", "sfa/a/b/base", (1, 2, 3))
    values = {"a/b/m": (0.90, 0.92, 0.94), "a/b/base": (0.80, 0.82, 0.84)}
    rows = [row(p, s, "recall", v) for p, own in values.items() for s, v in enumerate(own, 1)]
    found = outcome_of(test, *rows, row("a/b/other", 1, "recall", 0), row("a/b/m", 1, "last", 0))
    assert found.values == pytest.approx([90, 92, 94]) and found.than == pytest.approx([80, 82, 84])
    # two samples of three, deviation 2 each: 10 -+ 2.776 * sqrt(4/3 + 4/3)
    assert (found.difference, found.low, found.high) == pytest.approx((10, 5.467, 14.533), abs=1e-3)
    assert found.verdict == "holds"
    assert outcome_of(test, *rows, row("a/b/m", 4, "recall", 0)) == found, "of its seeds alone"
    assert outcome_of(test._replace(value=0.2), *rows).verdict == "contradicted"
    assert outcome_of(test._replace(value=0.12), *rows).verdict == "undecided"


def test_of_one_method_the_interval_is_students_against_the_bound():
    test = ClaimTest("digits", "auc", "above", 0.5, "sfa/a/b/m", None, (1, 2, 3))
    rows = [row("a/b/m", seed, "auc", value) for seed, value in enumerate((0.6, 0.62, 0.64), 1)]
    found = outcome_of(test, *rows)
    # 62 - 50 -+ 4.303 * 2 / sqrt(3)
    assert (found.difference, found.low, found.high) == pytest.approx((12, 7.032, 16.968), abs=1e-3)
    assert found.verdict == "holds" and verdicts._line(found)[2] == "above 50"


def test_one_seed_is_undecided_and_no_row_is_not_run():
    test = ClaimTest("digits", "last", "above", 0.0, "sfa/a/b/m", "sfa/a/b/base", (1,))
    one, other = row("a/b/m", 1, "last", 90.0), row("a/b/base", 1, "last", 80.0)
    found = outcome_of(test, one, other)
    assert (found.difference, found.verdict) == (10, "undecided") and math.isnan(found.low)
    assert verdicts._line(found)[2:] == ("80.00 (1)", "90.00 (1)", "+10.00", "", "undecided")
    for rows in ([], [one], [other]):
        found = outcome_of(test, *rows)
        assert found.verdict == "not run" and math.isnan(found.difference)
    assert verdicts._line(outcome_of(test, other))[2:] == ("80.00 (1)", "", "", "", "not run")


def test_the_short_table_counts_verdicts():
    test = ClaimTest("data", "last", "above", 0.0, "sfa/grid/cifar10-if0.1-imb0.5/sfa", None, (1, 2))
    digits = test._replace(cell="sfa/embedded/digits-if0.1-imb0.5/sfa")
    claim = Claim("name", "sfa", "A sentence.", "abstract", (digits, test, test))
    rows = [row("embedded/digits-if0.1-imb0.5/sfa", seed, "last", 90.0 + seed) for seed in (1, 2)]
    found = outcomes([claim], frame(rows))
    assert verdicts.short_table([claim], found)[2:] == ["| sfa | A sentence. | holds | not run 2 of 2 |"]
    assert len(verdicts.plain_table([claim], found)) == 1 + 2 + 3


# runs -----------------------------------------------------------------------------------------------------------------


def dry_run(capsys, *words: str) -> tuple[list[str], list[int]]:
    """The presets and the seeds of the commands."""
    main([*words, "--dry-run"])
    commands = capsys.readouterr().out.splitlines()
    assert len(set(commands)) == len(commands)
    seeds = [int(re.search(r"--seed (\d+)", command)[1]) for command in commands]
    return [re.search(r"--preset (\S+)", command)[1] for command in commands], seeds


def test_without_data_the_cells_on_digits_are_run_once_per_seed_and_encoders_with_them(tmp_path, capsys):
    presets, seeds = dry_run(capsys, "--data_path", str(tmp_path))
    assert all("/digits" in preset for preset in presets)
    named = {cell for _, test in TESTS if test.embedded for cell in test.cells}
    assert set(presets) == {name.partition("/")[2] for name in named}
    assert all(presets.count(preset) == 3 for preset in presets)
    # all cells with the first seed before any with the second
    assert seeds == sorted([1, 2, 3] * len(set(presets)))
    assert dry_run(capsys, "--data_path", str(tmp_path), "--seeds", "7")[1] == [7] * len(set(presets))


def test_undecided_tests_are_run_again_with_other_seeds_only_if_asked(tmp_path, capsys):
    words = ("--data_path", str(tmp_path), "--claims", "sfa-moments")
    assert dry_run(capsys, *words)[1] == [1, 1, 2, 2, 3, 3]
    _, seeds = dry_run(capsys, *words, "--second", "--seeds", "1")
    assert sorted(seeds) == sorted([1, 4, 5, 6, 7, 8, 9, 10] * 2)


def test_the_methods_of_a_prepared_setting_read_the_same_data_set(tmp_path):
    words = ["--out", str(tmp_path), "--data_path", str(tmp_path / "data"), "--precision", "fp32"]
    names = claims.make_parser().parse_args(words)
    (own,) = chosen(EVERY, ["across-above-ce"], None)
    runs = runs_of([claims.with_seeds(own, [5])], PREPARED, names)
    for labels in ("worst", "aggre"):
        same = [run for run in runs if f"human-{labels}" in run.cell.preset]
        assert len(same) == 7 and len({run.cell.paper for run in same}) == 5
        folder = str(tmp_path / "cross_data" / f"cifar10-human-{labels}-limit10000-seed5")
        for run in same:
            ((_, command),) = run.task.commands
            assert folder in command and command[-2:] == words[-2:], command


def test_what_is_missing_is_named(tmp_path):
    assert missing("afm/embedded/digits-margin1-0.4/afm-k2", PREPARED, tmp_path) == []
    human = "afm/claims/cifar10-human-worst/afm"
    assert missing(human, PREPARED, tmp_path) == ["cifar10", "cifar10n_worse_label.npy"]
    pool = "manifold_dividemix/claims/cifar10-cifar100-sym0.2-ood0.2/manifold-dividemix"
    assert missing(pool, PREPARED, tmp_path) == ["cifar10", "cifar100"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A claim with two tests on digits and one on CIFAR-10, of two presets of SFA of two epochs."""
    names = [(data, selection) for data in ("digits", "cifar10") for selection in ("sfa", "gmm")]
    presets, listed = tmp_path / "root" / "sfa" / "presets.toml", tmp_path / "claims.toml"
    presets.parent.mkdir(parents=True)
    presets.write_text("".join(PRESET.format(data=data, selection=name) for data, name in names))
    listed.write_text(TINY)
    for place, value in {
        "benchmarks.verdicts.ROOT": tmp_path / "root",
        "benchmarks.cells.ROOT": tmp_path / "root",
        "sfa.flags.PRESETS": presets,
        "benchmarks.claims.CLAIMS": listed,
        "benchmarks.claims.read_claims": partial(read_claims, listed),
        "benchmarks.claims.read_prepared": partial(read_prepared, listed),
    }.items():
        monkeypatch.setattr(place, value)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs are done by calling the script's main; the list of those that were."""
    started = []
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of a script run by its path

    def run_all(tasks, args, one_thread):
        assert one_thread and args.engine == "local"
        for task in tasks:
            for folder, command in task.commands:
                if not claims.is_finished(folder, command):
                    started.append(folder)
                    monkeypatch.setattr("sys.argv", command[1:])
                    sfa.Train_cifar.main(command[2:])
        return [folder for task in tasks for folder, _ in task.commands]

    monkeypatch.setattr(claims, "run_all", run_all)
    return started


@pytest.mark.slow
def test_claims_from_start_to_end(tiny, in_this_process, capsys):
    out = tiny / "results"
    words = ("--out", out, "--data_path", tiny / "none")
    assert status(main, *words) == 0
    printed = capsys.readouterr().out
    assert len(in_this_process) == 4, "two cells, two seeds; the one that both tests name is run once"
    assert "It finds them." in printed
    assert f"not run: 1 of 3 tests, for want of cifar10 in {tiny / 'none'}" in printed
    rows = read_results(out / "claims.csv")
    own = rows[["table", "cell", "profile", "method", "seed"]].drop_duplicates().values.tolist()
    cell = ["claims", "digits-x", "embedded+limit_train=120"]
    assert sorted(own) == [[*cell, method, seed] for method in ("GMM", "SFA") for seed in "12"]
    table = (out / "claims.md").read_text()
    recall = rows["value"][(rows["method"] == "SFA") & (rows["metric"] == "last_net1_recall")]
    mean = f"{100 * np.mean(recall):.2f} ± {100 * np.std(recall, ddof=1):.2f} (2)"
    assert f"| digits, a bound | last_net1_recall | above 1 | {mean} |" in table
    assert table.count("| not run |") == 1 and table.count("It finds them.") == 2
    assert (out / "claims.png").stat().st_size > 5000
    logs = sorted(path.name for path in (out / "claims_logs").iterdir())
    assert logs == [f"sfa_digits-x_{name}_seed{seed}.csv" for name in ("gmm", "sfa") for seed in (1, 2)]
    log = read(out / "claims_logs" / logs[2])
    assert len(log) == 2 and {"epoch", "test_accuracy", "net1_recall"} <= log[0].keys()
    assert not any(name.startswith("net2_") or name == "loss" for name in log[0])
    # again, with another choice: nothing is run, nothing is lost
    assert status(main, *words, "--seeds", "1", "--collect") == 0
    assert status(main, *words) == 0
    assert len(in_this_process) == 4 and read_results(out / "claims.csv").equals(rows)


def test_a_run_that_fails_does_not_keep_the_table_of_the_others(tiny, monkeypatch, capsys):
    def failing(tasks, args, one_thread):
        if tasks:
            raise SystemExit(ends)

    monkeypatch.setattr(claims, "run_all", failing)
    ends, words = 1, ("--out", tiny / "results", "--data_path", tiny)
    assert status(main, *words) == 1
    assert "no run of the claims" in capsys.readouterr().out and not (tiny / "results").exists()
    kept = tiny / "results" / "runs" / "sfa" / "claims" / "digits-x" / "sfa" / "seed1"
    kept.mkdir(parents=True)
    write(kept / "result.csv", [row("claims/digits-x/sfa", 1, "last_net1_recall", 0.5)])
    (kept / "log.csv").write_text("epoch,test_accuracy\n1,10\n")
    assert status(main, *words) == 1
    assert "50.00 (1)" in capsys.readouterr().out and (tiny / "results" / "claims.csv").is_file()
    ends = 143
    assert status(main, *words) == 143


# where it is shown ----------------------------------------------------------------------------------------------------


def two_methods(metric: str, *values: float) -> list[dict]:
    """SFA and a Gaussian mixture on digits, with two seeds each."""
    pairs = [(f"embedded/digits-if0.1-imb0.5/{n}", v) for n, v in zip(("sfa", "gmm"), values, strict=True)]
    return [row(preset, seed, metric, value + seed) for preset, value in pairs for seed in (1, 2)]


def test_the_pages_show_the_claims_of_the_reference_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REFERENCE", tmp_path)
    write(tmp_path / "claims.csv", two_methods("last_few_accuracy", 90, 10))
    text = tables.page()
    assert "| 11.50 ± 0.71 (2) | 91.50 ± 0.71 (2) | +80.00 | [+76.96, +83.04] | holds |" in text
    assert "(reference/claims.png)" in text and all(claim.sentence in text for claim in EVERY)
    assert "reference/claims.csv) |" not in text, "rows of claims are no rows of a table of a paper"
    monkeypatch.setattr(tables, "FRONT", tmp_path / "README.md")
    marks = tables.MARKS["claims"]
    lines = ["before", marks[0], "OUTDATED", marks[1], *tables.MARKS["label errors"], "after"]
    tables.FRONT.write_text("\n".join(lines))
    front = tables.front()
    assert front.startswith(f"before\n{marks[0]}\n| paper | claim |") and front.endswith("\nafter")
    assert "| holds 1 of 2, not run 1 of 2 | not run 2 of 2 |" in front and "OUTDATED" not in front
    tables.FRONT.write_text("before")
    with pytest.raises(UserError, match="must have each of these lines once"):
        tables.front()


def test_the_figure_is_of_the_tests_that_were_run(tmp_path):
    found = outcomes(EVERY, frame([row("a/b/x", 1, "none", 0)]))
    forest.draw(EVERY, found, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    rows = two_methods("last_net1_auc", 0.9, 0.7)
    forest.draw(EVERY, outcomes(EVERY, frame(rows)), tmp_path / "one.png")
    assert (tmp_path / "one.png").is_file()
