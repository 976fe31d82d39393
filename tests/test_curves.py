"""The figures of all papers: a panel of curves per setting, the end of the warm-up, pre-training; runs of other papers."""

import pytest

from manifold_dividemix import visualize as manifold_dividemix
from sanm import visualize as sanm
from sfa import visualize as sfa
from tests.figures import write_run
from tests.lines import refused

CELL = {"dataset": "digits", "noise_type": "imb", "noise_rate": 0.5, "imb_factor": 0.1, "profile": "embedded"}
LONG_TAIL = {"dataset": "digits", "imb_type": "exp", "num_class": 10, "p_threshold": 0.5}
OPEN_SET = {"dataset": "digits", "corruption": "photographs", "ood_ratio": 0.2, "noise_type": "sym"}
OPEN_SET |= {"noise_ratio": 0.25}
SYMMETRIC = {"dataset": "cifar10", "noise_mode": "sym", "r": 0.4}
# paper: its figure; the flags of a setting and the flag of the warm-up; those of another setting
PAPERS = {
    "sfa": (sfa, {"cell": CELL, **LONG_TAIL}, "warm_up", {"cell": CELL | {"imb_factor": 0.01}, **LONG_TAIL}),
    "sanm": (sanm, SYMMETRIC, "warm_up", SYMMETRIC | {"noise_mode": "asym"}),
    "manifold_dividemix": (manifold_dividemix, OPEN_SET, "warmup_epoch", OPEN_SET | {"noise_ratio": 0.5}),
}
# and the titles of both
TITLES = {
    "sfa": ("digits, imbalance {}\n50 % noise by class size", "10", "100"),
    "sanm": ("cifar10, {} noise, r = 0.4", "symmetric", "asymmetric"),
    "manifold_dividemix": ("digits with 20 % photographs\n{} % symmetric noise", "25", "50"),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_the_curves_have_a_panel_per_setting_and_one_for_pre_training(paper, tmp_path, drawn):
    (visualize, usual, warm_up, other), (title, *settings) = PAPERS[paper], TITLES[paper]
    trained = {**usual, "selection": paper if paper == "sfa" else "gmm", warm_up: 1}
    without = {**usual, "selection": "none", warm_up: 10}
    runs = [
        write_run(tmp_path / "a", paper, "CE", [10, 20], **without),
        write_run(tmp_path / "b", paper, "Ours", [30, 40], **trained),
        write_run(tmp_path / "c", paper, "Ours", [50, 80], **trained),
        write_run(tmp_path / "d", paper, "Ours", [1, 2], **other),
    ]
    if paper != "sfa":
        for name, values, of in (("e", ["", 50, "", 60], usual), ("f", ["", 70, 75, 90], other)):
            runs.append(write_run(tmp_path / name, paper, "SimCLR", values, "knn_accuracy", **of))
    visualize.main([*map(str, runs), "--out", str(tmp_path / "figure.png")])
    first, second, *knn = [axes for axes in drawn[0].axes if axes.get_title()]
    for axes, setting in zip((first, second), settings, strict=True):
        assert axes.get_title() == f"Test accuracy: {title.format(setting)}"
    lines = {line.get_label(): line for line in first.get_lines()}
    assert lines["CE, 1 run(s)"].get_ydata().tolist() == [10, 20]
    assert lines["Ours, 2 run(s)"].get_ydata().tolist() == [40, 60]
    assert lines["end of the warm-up"].get_xdata()[0] == 1.5, "that of the runs with a selection"
    assert second.get_lines()[0].get_color() == lines["Ours, 2 run(s)"].get_color()
    assert len(knn) == (paper != "sfa")
    for axes in knn:
        (measured,) = axes.get_lines()
        assert measured.get_label().endswith(", 2 run(s)")
        assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([2, 4], [60, 75])


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_no_run_of_the_paper_is_refused(paper, tmp_path, capsys):
    visualize = PAPERS[paper][0]
    assert "is no run directory: args.json is missing" in refused(capsys, visualize.main, tmp_path / "nosuch")
    if paper != "sanm":  # whose figure takes runs of any paper
        other = write_run(tmp_path / "other", "another", "CE", [50], cell=CELL)
        assert f"other is a run of another, not of {paper}" in refused(capsys, visualize.main, other)
    line = refused(capsys, visualize.main, tmp_path / "nosuch", "--out", "figure.gif")
    assert "--out" in line, "before anything is read"
