"""What the figures of all papers share: curves by method, refusals in one line, files written whole."""

import json

import numpy as np
import pytest

from common import figures
from common.cli import UserError


def write_run(folder, method="SFA", accuracies=(10.0, 20.0), fidelity="paper"):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"method": method, "arguments": {"fidelity": fidelity}}))
    lines = [f"{i},{accuracy}" for i, accuracy in enumerate(accuracies, start=1)]
    (folder / "log.csv").write_text("\n".join(["epoch,test_accuracy", *lines]) + "\n")
    return folder


def test_a_curve_says_which_method_with_which_fidelity(tmp_path):
    curve = figures.read_curve(write_run(tmp_path / "run", fidelity="released"))
    assert curve.method == "SFA (released)"
    assert curve.accuracy.tolist() == [10.0, 20.0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", "{"),
        ("args.json", "[]"),
        ("args.json", "{}"),
        ("log.csv", "epoch\n1\n"),
        ("log.csv", None),
    ],
)
def test_a_damaged_run_directory_is_refused_by_name(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match="run"):
        figures.read_curve(folder)


def test_a_method_is_the_mean_of_its_runs_with_the_range_over_them():
    figure, axes = figures.plt.subplots()
    figures.draw_curves(
        axes, [("CE", np.array([10.0, 20, 30])), ("CE", np.array([20.0, 40])), ("AFM", np.ones(1))]
    )
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert lines == {"CE, 2 run(s)": [15.0, 30.0], "AFM, 1 run(s)": [1.0]}
    (shade, _) = axes.collections
    assert set(shade.get_paths()[0].vertices[:, 1]) == {10.0, 20.0, 40.0}
    figures.plt.close(figure)


@pytest.mark.parametrize("out", ["figure.txt", "figure", "nosuch/figure.png"])
def test_a_figure_goes_into_a_folder_that_is_there_as_a_kind_that_is_known(tmp_path, out):
    with pytest.raises(UserError, match="--out"):
        figures.checked_path(str(tmp_path / out))


def test_a_figure_is_written_and_nothing_beside_it(tmp_path):
    figures.write(figures.plt.figure(), figures.checked_path(str(tmp_path / "figure.png")))
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
