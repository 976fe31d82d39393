"""benchmarks.report: what is matched with what, what is coloured, and a page that loads nothing and runs nothing of its data."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.cells import PAPERS, cells
from benchmarks.pages import render
from benchmarks.report import collect, main, metric_of, same_method
from benchmarks.results import read_results
from tests.benchmarks.files import mistake, rows, run_directory, write

HOSTILE = '</script><img src=x onerror="document.title=1">'


def of_file(folder, content, **wanted):
    """What is collected of a file with these rows, and the only measured row with the wanted fields."""
    data = collect([write(folder / "a.csv", content)], None)
    return data, one_of(data, **{"method": "Me-Momentum"} | wanted)


def measured(data, **wanted):
    """The measured rows with these fields."""
    return [r for r in data["rows"] if r["runs"] and wanted.items() <= r.items()]


def one_of(data, **wanted):
    """The only measured row with these fields."""
    (row,) = measured(data, **wanted)
    return row


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working directory and an empty folder of reference files."""
    reference = tmp_path / "reference"
    reference.mkdir()
    monkeypatch.setattr(report, "REFERENCE", reference)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_results(tmp_path, monkeypatch):
    """The reference files, and no results of this machine."""
    monkeypatch.chdir(tmp_path)


# means and differences ------------------------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds_and_the_difference_to_cross_entropy(alone):
    _, row = of_file(alone, rows(90, 92, 94) + rows(80, 82, 84, method="CE", fidelity=""))
    values = {"1": 90, "2": 92, "3": 94}
    assert row["metrics"]["last"] == {"n": 3, "mean": 92, "std": 2, "values": values}
    against = row["against"]["metrics"]["last"]
    # two samples of three, deviation 2 each: 10 -+ 2.776 * sqrt(4/3 + 4/3)
    assert [round(against[name], 2) for name in ("difference", "low", "high")] == [10, 5.47, 14.53]


def test_the_difference_is_to_cross_entropy_of_the_same_condition_and_first_of_the_same_file(alone):
    for changed in ({"profile": "short"}, {"epochs": "10"}, {"noise_rate": "0.4"}):
        assert of_file(alone, rows(90) + rows(80, method="CE", **changed))[1]["against"] is None
    a = write(alone / "a.csv", rows(80, method="CE"))
    b = write(alone / "b.csv", rows(90) + rows(70, method="CE"))
    row = one_of(collect([a, b], None), method="Me-Momentum")
    assert row["against"]["metrics"]["last"]["difference"] == 20


# claims ---------------------------------------------------------------------------------------------------------------


def test_the_claims_are_the_first_section_and_their_shared_rows_are_not_shown_twice(alone):
    command = "python me_momentum/main.py --preset {} --seed 1"
    shared, own = "embedded/digits-sym0.4/me-momentum", "claims/mnist-sym0.4/me-momentum"
    content = rows(90, table="embedded", cell="digits-sym0.4", command=command.format(shared))
    content += rows(80, table="claims", cell="mnist-sym0.4", command=command.format(own))
    content += [content[0] | {"metric": "confident_growth", "value": "0.25"}]
    data = collect([write(alone / "claims.csv", content)], None)
    assert one_of(data)["table"] == "claims"
    (file,) = data["claims"]
    (growth,) = [claim for claim in file["claims"] if claim["lines"][0][0].startswith("The set of confident")]
    assert growth["lines"][0][1:] == (
        *("digits, symmetric 40 %", "confident_growth", "above 0", "25.00 (1)", "+25.00", "", "undecided"),
    )
    assert len(data["claims_heading"]) == len(growth["lines"][0])
    text = render("report", data)
    assert text.index('id="claims"') < text.index('id="glance"') < text.index('id="results"')
    assert collect([write(alone / "a.csv", rows(90))], None)["claims"] == []


# published figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "comparable"), [("paper", True), ("short", False), ("paper+limit_train=100", False)]
)
def test_a_published_figure_is_comparable_with_the_published_protocol_alone(alone, profile, comparable):
    data, row = of_file(alone, rows(90.0, 91.0, profile=profile))
    found, figure = row["published"], data["figures"][row["published"]["shown"]]
    assert (figure["method"], figure["status"]) == ("Me-Momentum", "secondary")
    assert found["difference"] == pytest.approx(90.5 - float(figure["value"]))
    assert found["comparable"] == comparable and (profile in found["why"]) != comparable


def test_which_metric_and_which_method_of_ours_a_published_one_is():
    metrics = {"test top-1 best": "best", "peak test accuracy (%)": "best", "final test accuracy (%)": "last"}
    metrics |= {"mean of last 10 epochs (%)": "last10", "test_acc": "", "top-5 accuracy (%)": None}
    assert {text: metric_of(text) for text in metrics} == metrics
    for ours, theirs in (
        *(("CE", "Cross-Entropy"), ("AFM (K=2)", "AFM")),
        ("sanm-dividemix", "SANM(DivideMix)"),
    ):
        assert same_method(ours, theirs), ours
    for ours, theirs in (("AFM (K=3)", "AFM"), ("CE", "Cross-entropy (SimCLR init.)"), ("SFA", "SANM")):
        assert not same_method(ours, theirs), ours


def test_a_figure_that_says_its_epoch_is_set_against_that_metric_and_an_unconfirmed_one_against_none(alone):
    cell = {"paper": "sanm", "cell": "cifar10-sym0.5", "method": "DivideMix", "noise_rate": "0.5"}
    found = of_file(alone, rows(94.0, **cell), method="DivideMix")[1]["published"]
    # peak test accuracy 94.6 in C2D's table, beside our best of 95
    assert (found["ours"], found["difference"]) == ("best", pytest.approx(0.4))
    data, row = of_file(alone, rows(60.0, table="cifar100", cell="cifar100-sym0.2", dataset="cifar100"))
    found = row["published"]
    assert data["figures"][found["shown"]]["status"] == "unconfirmed"
    assert found["difference"] is None and not found["comparable"]


# not measured ---------------------------------------------------------------------------------------------------------


def test_every_cell_of_the_published_protocols_is_measured_or_listed_as_not(alone):
    preset = "cifar10/cifar10-sym0.2/me-momentum"
    command = f"x --preset {preset} --seed 1"
    contents = (rows(90.0), rows(90.0, profile="short", command=command), rows(90.0, command=command))
    found = [of_file(alone, content)[0]["rows"] for content in contents]
    total = sum(len(cells(paper, "paper")) for paper in PAPERS)
    assert [sum(not row["runs"] for row in own) for own in found] == [total, total, total - 1]
    command = next(row["command"] for row in found[0] if not row["runs"] and row["paper"] == "me_momentum")
    assert command.startswith("python -m benchmarks.run me_momentum --profile paper --cells ")


# run directories ------------------------------------------------------------------------------------------------------


def test_a_run_directory_goes_to_the_row_with_its_seed_and_figures(alone):
    both = rows(90.0, 92.0)
    file = write(alone / "a.csv", both)
    run_directory(alone / "runs" / "two", both[2:], [80, 93, 92])
    data = collect([file], alone / "runs")
    one, two = one_of(data, method="Me-Momentum")["runs"]
    assert one["log"] is None and one["folder"] is None
    assert two["folder"] == "runs/two" and two["realised_rate"] == 0.19
    log = data["logs"][two["log"]]
    assert log["columns"] == ["epoch", "test_accuracy", "confident_precision"]
    assert log["rows"] == [[1, 80, 0.123457], [2, 93, 0.123457], [3, 92, 0.123457]]


def test_a_rows_run_has_its_figures_and_is_first_the_one_of_its_command(alone):
    file, others = write(alone / "a.csv", rows(90.0)), [{"metrics": {"best": 94, "last": 92}}]
    others += [{"command": "another"} | own for own in ({"method": "CE"}, {"epochs": "9"}, {"seed": "3"})]
    for number, changed in enumerate(others):
        runs = alone / str(number)
        run_directory(runs / "x", rows(90.0), [91, 90], **changed)
        assert one_of(collect([file], runs), method="Me-Momentum")["runs"][0]["folder"] is None, changed
    run_directory(alone / "runs" / "a", rows(90.0), [91, 90], command="another")
    run_directory(alone / "runs" / "b", rows(90.0), [91, 90])
    assert one_of(collect([file], alone / "runs"), origin="this machine")["runs"][0]["folder"] == "runs/b"


def test_a_row_of_the_table_cross_finds_its_run_by_the_command_and_the_runs_in_it_are_no_rows(alone):
    write(alone / "reference" / "a.csv", rows(90.0, table="cross", cell="cifar10-sym0.2", epochs="32"))
    run = rows(90.0, table="", cell="seed1", epochs="31")
    run_directory(alone / "runs" / "x", run, [91, 90])
    run_directory(alone / "runs" / "x" / "pretrain", rows(50.0, method="SimCLR", command="pre"), [51, 50])
    assert one_of(collect([], alone / "runs"))["runs"][0]["folder"] == "runs/x"


def test_runs_without_a_result_file_are_rows_apart_by_their_commands(alone):
    write(alone / "reference" / "a.csv", rows(50.0))
    for name, seed, value, flags in (
        ("a", 1, 90.0, ""),
        ("b", 1, 91.0, " --lr 1"),
        ("c", 2, 92.0, " --lr 1"),
    ):
        run = rows(value, seed=str(seed), command=f"python x.py --seed {seed} --out runs/{name}{flags}")
        run_directory(alone / "runs" / name, run, [value + 1, value])
    own = measured(collect([], alone / "runs"), origin="this machine")
    assert [r["metrics"]["last"]["values"] for r in own] == [{"1": 90.0}, {"1": 91.0, "2": 92.0}]
    assert all(run["log"] is not None for r in own for run in r["runs"])


def test_a_damaged_run_is_named_and_an_unfinished_one_listed(alone):
    file = write(alone / "a.csv", rows(90.0))
    (alone / "runs" / "bad").mkdir(parents=True)
    (alone / "runs" / "bad" / "args.json").write_text("{")
    run_directory(alone / "runs" / "open", rows(90.0), [91, 90])
    (alone / "runs" / "open" / "result.json").unlink()
    data = collect([file], alone / "runs")
    assert [(run["folder"], run["epochs"]) for run in data["unfinished"]] == [("runs/open", 2)]
    (note,) = data["notes"]
    assert "bad/args.json is damaged" in note


def test_runs_that_no_preset_names_are_not_compared_and_have_panels_of_their_own(alone):
    for place, (method, value) in enumerate((("CE", 96.0), ("AFM", 50.0), ("CE", 60.0))):
        words = {"method": method, "command": f"python x.py --lr {place} --seed 1"}
        run = rows(value, table="", cell="seed1", **words)
        run_directory(alone / "runs" / str(place), run, [value])
    found = measured(collect([], alone / "runs"))
    assert len(found) == 3 and all(row["against"] is None for row in found)
    assert len({row["panel"] for row in found}) == 3


def test_runs_without_a_file_share_a_row_over_seeds_and_no_other_difference(alone):
    """In paths with blanks too; the second one with the same seed begins from another encoder."""
    for seed, encoder in ((1, "a b/seed1"), (2, "a b/seed2"), (2, "c/seed2")):
        command = f"python x.py --seed {seed} --pretrained '{encoder}/e' --out 'r s/{encoder}'"
        one = rows(80.0 + seed, seed=str(seed), command=command)
        run_directory(alone / "runs" / encoder, one, [81.0])
    found = measured(collect([], alone / "runs"))
    assert sorted([run["seed"] for run in row["runs"]] for row in found) == [["1", "2"], ["2"]]


def test_a_reference_log_goes_to_the_run_whose_figures_it_has(no_results):
    data = collect([], None)
    assert data["notes"] == []
    kept = sorted(path.name for path in (report.REFERENCE / "logs").rglob("*.csv"))
    with_log = [(r, run) for r in data["rows"] for run in r["runs"] if run["log"] is not None]
    found = {Path(run["folder"]).name: (r["method"], r["cell"], r["fidelity"]) for r, run in with_log}
    assert sorted(found) == kept
    assert found["me_momentum_mnist_sym0.2.csv"] == ("Me-Momentum", "mnist-sym0.2", "paper")


def test_a_log_of_six_digits_goes_to_the_run_of_more(alone):
    write(alone / "reference" / "a.csv", rows(100 / 3))
    (alone / "reference" / "logs").mkdir()
    log = alone / "reference" / "logs" / "me_momentum_x.csv"
    log.write_text("epoch,test_accuracy\n1,34.3333\n2,33.3333\n")
    data = collect([], None)
    assert data["notes"] == [] and one_of(data)["runs"][0]["folder"] == "reference/logs/me_momentum_x.csv"


# side by side ---------------------------------------------------------------------------------------------------------


def cross(*values, **changed):
    return rows(*values, table="cross", cell="sym0.5", **changed)


def test_methods_of_all_papers_stand_in_one_line_of_the_table_cross(alone):
    content = cross(90.0, 91.0) + cross(92.0, 93.0, paper="sfa", method="SFA")
    content += cross(50.0, 51.0, paper="afm", method="CE") + rows(10.0)
    content += cross(92.0, paper="sfa", method="SFA", epochs="10")
    data, row = of_file(alone, content, method="SFA", epochs="200")
    assert [len(line["cells"]) for line in data["cross"]["lines"]] == [3, 1], "other epochs, another line"
    assert len(data["cross"]["columns"]) == 3
    # cross-entropy is the baseline of all of them, whatever paper it is listed under
    assert row["against"]["metrics"]["last"]["difference"] == 42
    assert len({r["panel"] for r in data["rows"] if r["table"] == "cross"}) == 2


def test_a_second_row_of_a_method_in_a_setting_has_a_line_of_its_own(alone):
    files = [write(alone / f"{name}.csv", cross(90.0) + cross(80.0, method="CE")) for name in "ab"]
    found = collect(files, None)["cross"]["lines"]
    assert [(line["file"], len(line["cells"])) for line in found] == [("", 2), ("b.csv", 2)]


@pytest.mark.parametrize(
    ("other", "winner"), [([95.0, 95.1, 95.2], "SFA"), ([90.0, 91.0, 95.0], None), ([99.0], None)]
)
def test_the_best_of_a_line_is_marked_if_its_lead_is_certain(alone, other, winner):
    data, _ = of_file(alone, cross(90.0, 90.1, 90.2) + cross(*other, paper="sfa", method="SFA"))
    place = data["cross"]["lines"][0]["best"]["last"]
    assert place == next((i for i, c in enumerate(data["cross"]["columns"]) if c["method"] == winner), None)


# the page -------------------------------------------------------------------------------------------------------------


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_data_survive_and_no_text_of_them_is_markup(alone):
    data, _ = of_file(alone, rows(90.0, method=HOSTILE, cell="{{ script }} <!-- \u2028 &"), method=HOSTILE)
    html = render("report", data)
    assert "<img" not in html and html.count("</script>") == 2 and "<!-- " not in html
    found = embedded(html)
    assert found == json.loads(json.dumps(data))
    assert one_of(found, method=HOSTILE)["cell"] == "{{ script }} <!-- &"


def test_the_page_loads_nothing(alone):
    html = render("report", collect([write(alone / "a.csv", rows(90.0))], None))
    shell = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    # the address that makes an element one of SVG is a name, not a load
    assert re.findall(r"https?://[^\"' ]*", shell) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"(?:\bsrc|@import|url\()", shell.replace("img-src", "").replace("-src", ""))
    assert "default-src 'none'" in shell


def test_every_reference_row_and_speed_file_is_on_the_page(no_results):
    data = embedded(render("report", collect([], None)))
    reference = [row for row in data["rows"] if row["origin"] == "reference"]
    counted = sum(len(metric["values"]) for row in reference for metric in row["metrics"].values())
    files = {path: read_results(path) for path in report.REFERENCE.glob("*.csv")}
    repeated = sum(files[report.REFERENCE / "claims.csv"]["table"] != "claims")  # also in their papers' files
    assert counted == sum(map(len, files.values())) - repeated > 0
    speed = {table["name"] for table in data["speed"]}
    assert {f"benchmarks/reference/speed/{name}.csv" for name in ("images", "views")} <= speed


# the command ----------------------------------------------------------------------------------------------------------


def test_the_users_own_results_are_found_and_marked(alone, capsys):
    write(alone / "reference" / "a.csv", rows(90.0))
    (alone / "results").mkdir()
    write(alone / "results" / "b.csv", rows(91.0))
    (alone / "results" / "speed_images.csv").write_text("what,median\nimages,5\n")
    (alone / "results" / "other.csv").write_text("x,y\n1,2\n")
    main([])
    captured = capsys.readouterr()
    assert "2 rows of 2 files" in captured.out
    assert "results/other.csv is left out" in captured.err
    data = embedded((alone / "results" / "report.html").read_text(encoding="utf-8"))
    assert [(f["name"], f["origin"]) for f in data["files"]] == [
        ("reference/a.csv", "reference"),
        ("results/b.csv", "this machine"),
    ]
    assert data["speed"] == [
        {"name": "results/speed_images.csv", "columns": ["what", "median"], "rows": [["images", 5]]}
    ]


def test_mistakes_end_in_one_line_and_write_nothing(alone, capsys):
    out, file, empty = alone / "page.html", write(alone / "a.csv", rows(90.0)), write(alone / "empty.csv", [])
    for line, words in {
        "missing.csv does not exist": ("missing.csv", "--out", out),
        "no results": (empty, "--out", out),
        "there are no results": ("--out", out),
        "--runs nowhere is no folder": (file, "--runs", "nowhere", "--out", out),
        "cannot be written": (file, "--out", alone / "nowhere" / "page.html"),
        "give the page a name that ends in .html": (file, "--out", file),
    }.items():
        assert line in mistake(capsys, main, *words)
    (alone / "results").mkdir()
    own = write(alone / "results" / "afm.csv", rows(90.0))
    assert "give the page a name that ends in .html" in mistake(capsys, main, "--out", own)
    assert sorted(path.name for path in alone.iterdir()) == ["a.csv", "empty.csv", "reference", "results"]
