"""Published figures beside ours: what is known of their source is said, and nothing is said where nothing is published."""

import csv

import pytest

from benchmarks import published
from benchmarks.cells import PAPERS, PROFILES, ROOT, cells
from benchmarks.published import beside, read_published
from common.runs.cli import read_presets

COLUMNS = (
    *(
        "paper",
        "table",
        "dataset",
        "noise_type",
        "noise_rate",
        "imbalance",
        "method",
        "metric",
        "value",
        "std",
    ),
    *("status", "source"),
)
STATUSES = {"confirmed", "unconfirmed", "secondary"}
WITH_FIGURES = [paper for paper in PAPERS if read_published(paper)]


def row(method: str = "AFM (K=2)", metric: str = "best", value: float = 80.0, **changed) -> dict:
    """What beside() looks at of a result row."""
    usual = {"table": "food101n", "cell": "food101n", "profile": "short", "fidelity": "paper", "epochs": 10}
    return {**usual, "method": method, "metric": metric, "value": str(value), **changed}


def food(profile: str = "paper") -> list:
    return cells("afm", profile, ["food101n/food101n/afm"])


# the files ------------------------------------------------------------------------------------------------------------


def test_there_are_figures_for_afm():
    assert "afm" in WITH_FIGURES


@pytest.mark.parametrize("paper", WITH_FIGURES)
def test_every_figure_says_where_it_is_from_and_how_far_to_trust_it(paper):
    with (published.FOLDER / f"{paper}.csv").open(newline="", encoding="utf-8") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    for figure in read_published(paper):
        assert figure["paper"] == paper or figure["status"] == "secondary"
        assert figure["status"] in STATUSES and figure["source"]
        assert 0 < float(figure["value"]) < 100
        assert (figure["status"] == "unconfirmed") == figure["source"].startswith("recollection")


@pytest.mark.parametrize("paper", PAPERS)
def test_every_setting_and_preset_that_cells_name_is_there(paper):
    names = ("dataset", "noise_type", "noise_rate")
    figures = [tuple(figure[name] for name in names) for figure in read_published(paper)]
    presets = read_presets(ROOT / paper / "presets.toml")
    for preset, setting in PAPERS[paper].published.items():
        assert preset in presets
        assert any(figure[: len(setting)] == setting for figure in figures)


def test_every_preset_of_afms_protocol_has_its_published_setting():
    assert set(PAPERS["afm"].published) == {cell.preset for cell in cells("afm", "paper")}


def test_every_cell_of_me_momentum_but_mnists_has_its_published_setting():
    presets = {cell.preset for cell in cells("me_momentum", "paper")}
    without = presets - set(PAPERS["me_momentum"].published)
    assert without and all(preset.startswith("mnist/") for preset in without)


def test_a_noise_rate_keeps_settings_apart():
    lines = beside(cells("me_momentum", "paper", ["cifar10/cifar10-sym0.4/me-momentum"]), [])
    assert lines[:3] == [
        "",
        "cifar10, symmetric, 0.4: accuracy in percent",
        "  88.39 ± 0.34  Me-Momentum, published [unconfirmed: recollection]",
    ]
    assert not any("91.44" in line for line in lines), "of rate 0.2"


def test_the_figures_of_mini_webvision_are_all_of_other_methods_and_secondary():
    lines = beside(cells("sfa", "paper", ["webvision/webvision/sfa"]), [])
    assert lines[1] == "webvision, real-world: accuracy in percent"
    assert len(lines) == 2 + 12
    assert all("published [secondary: " in line and "SFA, published" not in line for line in lines[2:])


def test_the_one_cifar_cell_of_sanm_is_quoted_by_a_reader_and_secondary():
    lines = beside(cells("sanm", "paper", ["cifar10/cifar10-sym0.5/sanm-c2d"]), [])
    own = [line.strip() for line in lines if "  SANM" in line]
    assert own == ["96.4  SANM(C2D), published [secondary: issue 5 of the SANM release]"]
    assert not any(
        "  SANM" in line for line in beside(cells("sanm", "paper", ["cifar10/cifar10-sym0.8/sanm-c2d"]), [])
    )


def test_a_paper_without_a_file_has_no_figures(tmp_path):
    assert read_published("afm", tmp_path) == []
    assert read_published("nosuch") == []


# beside ---------------------------------------------------------------------------------------------------------------


def test_unconfirmed_figures_are_shown_as_such():
    lines = beside(food(), [])
    assert lines[:2] == ["", "Food-101N, real web noise: accuracy in percent"]
    (afm,) = (line for line in lines if line.split("  ")[-1].startswith("AFM, published"))
    assert afm.split() == ["87.23", "AFM,", "published", "[unconfirmed:", "recollection]"]
    assert len(lines) == 2 + sum(figure["dataset"] == "Food-101N" for figure in read_published("afm"))


def test_figures_of_other_publications_are_shown_with_their_source():
    lines = beside(cells("afm", "paper", ["clothing1m/noisy/ce"]), [])
    assert "69.54  Cross entropy, published [secondary: DeepSelf ICCV 2019 Table 1]" in map(str.strip, lines)
    assert not any("82.09" in line for line in lines), "of another setting"


def test_a_setting_is_shown_once_however_many_of_its_presets_are_run():
    both = beside(cells("afm", "paper", ["food101n/food101n/afm", "food101n/food101n/ce"]), [])
    assert both == beside(food(), [])
    every = beside(cells("afm", "paper"), [])
    settings = [line for line in every if line.endswith(": accuracy in percent")]
    assert len(settings) == len(set(settings)) == len(set(PAPERS["afm"].published.values())) == 4


def test_our_figures_are_means_with_the_deviation_over_seeds_above_the_published_ones():
    rows = [row(value=80), row(value=82), row(value=84), row("CE", value=70.5), row(metric="last", value=60)]
    rows += [row(metric="last10", value=1), row(metric="attention_auc", value=0.5)]
    rows += [row(value=99, table="clothing1m", cell="noisy"), row(value=98, cell="other")]
    condition = "(profile short, paper, 10 epochs)"
    ours = [line for line in beside(food("short"), rows) if "ours" in line]
    assert ours == [
        f"   82.00 ± 2.00  AFM (K=2), ours, best {condition}",
        f"   70.50  CE, ours, best {condition}",
        f"   60.00  AFM (K=2), ours, last {condition}",
    ]
    assert beside(food("short"), rows)[2:5] == ours


def test_the_epoch_chosen_on_validation_images_is_shown():
    rows = [
        row(metric="at_best_validation", value=value, table="clothing1m", cell="noisy") for value in (70, 71)
    ]
    lines = beside(cells("afm", "paper", ["clothing1m/noisy/afm"]), rows)
    assert any(line.split()[:3] == ["70.50", "±", "0.71"] and "at_best_validation" in line for line in lines)


@pytest.mark.parametrize("changed", [{"profile": "paper"}, {"fidelity": "released"}, {"epochs": 30}])
def test_runs_under_other_conditions_are_not_averaged(changed):
    ours = [line for line in beside(food(), [row(value=80), row(value=84, **changed)]) if "ours" in line]
    assert [line.split()[0] for line in ours] == ["80.00", "84.00"]
    assert len(set(line.rpartition("(")[2] for line in ours)) == 2


def test_nothing_is_shown_where_nothing_is_published(monkeypatch):
    for profile in PROFILES:
        synthetic = [cell for cell in cells("sfa", profile) if not cell.preset.startswith("webvision/")]
        assert beside(synthetic, [row()]) == []
    assert beside(cells("afm", "embedded"), [row(table="embedded", cell="digits-sym0.5")]) == []
    monkeypatch.setattr(published, "read_published", lambda _: [])
    assert [line for line in beside(food(), [row()]) if "published" in line] == []
