"""Published figures beside ours: each with the status of its source, none where nothing is published."""

import pytest

from benchmarks import published
from benchmarks.cells import PAPERS, PROFILES, cells
from benchmarks.published import SETTING, beside, read_published
from tests.benchmarks.files import frame

COLUMNS = ["paper", "table", *SETTING, "imbalance", "method", "metric", "value", "std", "status", "source"]
AFM = {"table": "food101n", "cell": "food101n", "profile": "short", "fidelity": "paper", "epochs": "10"}


def row(value: float, method: str = "AFM (K=2)", metric: str = "best", **changed) -> dict:
    return AFM | {"method": method, "metric": metric, "value": value} | changed


def lines_of(paper: str, *presets: str, rows=(), profile: str = "paper") -> list[str]:
    """Without the first, blank line."""
    return beside(cells(paper, profile, list(presets) or None), frame(rows) if rows else None)[1:]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_figure_has_its_source_and_status_and_every_published_setting_has_a_figure(paper):
    figures = read_published(paper)
    assert figures and all(list(figure) == COLUMNS for figure in figures)
    for figure in figures:
        assert figure["paper"] == paper or figure["status"] == "secondary"
        assert figure["status"] in {"confirmed", "unconfirmed", "secondary"} and figure["source"]
        assert 0 < float(figure["value"]) < 100
        assert (figure["status"] == "unconfirmed") == figure["source"].startswith("recollection")
    own = {"/".join(cell.preset.split("/")[:2]) for cell in cells(paper, "paper")}
    assert own >= set(PAPERS[paper].published)
    for setting in PAPERS[paper].published.values():
        assert any(tuple(figure[n] for n in SETTING)[: len(setting)] == setting for figure in figures)


def test_which_presets_have_published_settings():
    without = {p: [c.preset for c in cells(p, "paper") if not c.published] for p in PAPERS}
    assert without["afm"] == []
    assert without["me_momentum"] and all(name.startswith("mnist/") for name in without["me_momentum"])
    for profile in PROFILES:
        others = [cell for cell in cells("sfa", profile) if not cell.preset.startswith("webvision/")]
        assert beside(others, None) == []
    assert beside(cells("afm", "embedded"), frame([row(80, table="embedded", cell="digits-sym0.5")])) == []


@pytest.mark.parametrize(
    ("paper", "preset", "heading", "line", "absent"),
    [
        ("afm", "food101n/food101n/afm", "Food-101N, real web noise", "87.23  AFM, [unconfirmed: recollection]", "69.54"),
        ("afm", "clothing1m/noisy/ce", "Clothing1M, real: 1M noisy only",
         "69.54  Cross entropy, [secondary: DeepSelf ICCV 2019 Table 1]", "82.09"),
        ("me_momentum", "cifar10/cifar10-sym0.4/me-momentum", "cifar10, symmetric, 0.4",
         "88.39 ± 0.34  Me-Momentum, [unconfirmed: recollection]", "91.44"),
        ("sanm", "cifar10/cifar10-sym0.5/sanm-c2d", "CIFAR-10, sym, 0.5",
         "96.4  SANM(C2D), [secondary: issue 5 of the SANM release]", "SANM(DivideMix)"),
        ("sanm", "cifar10/cifar10-sym0.8/sanm-c2d", "CIFAR-10, sym, 0.8", "", "  SANM"),
        ("sfa", "webvision/webvision/sfa", "webvision, real-world", "", "SFA, published"),
    ],
)  # fmt: skip
def test_the_figures_of_a_setting_are_shown_with_their_sources(paper, preset, heading, line, absent):
    found = lines_of(paper, preset)
    assert found[0] == f"{heading}: accuracy in percent"
    assert not line or line.replace("[", "published [") in map(str.strip, found[1:])
    assert all("published [" in x and absent not in x for x in found[1:])
    setting = cells(paper, "paper", [preset])[-1].published
    figures = [tuple(figure[n] for n in SETTING)[: len(setting)] for figure in read_published(paper)]
    assert len(found) == 1 + figures.count(setting)


def test_a_setting_is_shown_once_however_many_of_its_presets_are_run():
    one = lines_of("afm", "food101n/food101n/afm")
    assert lines_of("afm", "food101n/food101n/afm", "food101n/food101n/ce") == one
    settings = [line for line in lines_of("afm") if line.endswith(": accuracy in percent")]
    assert len(settings) == len(set(settings)) == 4


def test_our_figures_are_means_with_the_deviation_over_seeds_above_the_published_ones(monkeypatch):
    rows = [row(80), row(82), row(84), row(70.5, "CE"), row(60, metric="last"), row(1, metric="last10")]
    rows += [row(99, table="clothing1m", cell="noisy"), row(98, cell="other"), row(0.5, metric="auc")]
    rows += [row(71, metric="at_best_validation")]
    condition = "(profile short, paper, 10 epochs)"
    expected = [
        f"   82.00 ± 2.00  AFM (K=2), ours, best {condition}",
        f"   70.50  CE, ours, best {condition}",
        f"   60.00  AFM (K=2), ours, last {condition}",
        f"   71.00  AFM (K=2), ours, at_best_validation {condition}",
    ]
    for profile in ("short", "paper"):
        found = lines_of("afm", "food101n/food101n/afm", rows=rows, profile=profile)
        assert found[1:5] == expected and not any("ours" in line for line in found[5:])
    monkeypatch.setattr(published, "read_published", lambda _: [])
    assert lines_of("afm", "food101n/food101n/afm", rows=rows)[1:] == expected


@pytest.mark.parametrize("changed", [{"profile": "paper"}, {"fidelity": "released"}, {"epochs": "30"}])
def test_runs_under_other_conditions_are_not_averaged(changed):
    rows = [row(80), row(84, **changed)]
    found = [line for line in lines_of("afm", "food101n/food101n/afm", rows=rows) if "ours" in line]
    assert [line.split()[0] for line in found] == ["80.00", "84.00"]
    assert len({line.rpartition("(")[2] for line in found}) == 2


def test_a_paper_without_a_file_has_no_figures(tmp_path):
    assert read_published("afm", tmp_path) == read_published("nosuch") == []
