"""What the figures of all papers share: curves by method, refusals in one line, files written whole."""

import json

import numpy as np
import pytest

from common.runs import figures
from common.runs.cli import UserError


def write_run(folder, method="SFA", accuracies=(10.0, 20.0), column="test_accuracy", **arguments):
    folder.mkdir()
    content = {"method": method, "arguments": {"fidelity": "paper"} | arguments}
    (folder / "args.json").write_text(json.dumps(content))
    lines = [f"{i},{accuracy}" for i, accuracy in enumerate(accuracies, start=1)]
    (folder / "log.csv").write_text("\n".join([f"epoch,{column}", *lines]) + "\n")
    return folder


def write_pretraining(folder, accuracies=(50,)):
    return write_run(folder, "SimCLR", accuracies, column="knn_accuracy", dataset="digits")


def test_a_run_is_read_where_something_was_measured_and_says_its_method_and_fidelity(tmp_path):
    run = figures.read_run(write_run(tmp_path / "training", fidelity="released"))
    assert (run.curve.method, run.epochs.tolist(), run.pretraining) == ("SFA (released)", [1, 2], False)
    assert run.curve.accuracy.tolist() == [10.0, 20.0]
    run = figures.read_run(write_run(tmp_path / "paper"))
    assert run.curve.method == "SFA"
    run = figures.read_run(write_pretraining(tmp_path / "pretraining", ["", 50, "", 60]))
    assert (run.curve.method, run.epochs.tolist(), run.pretraining) == ("SimCLR on digits", [2, 4], True)
    assert run.curve.accuracy.tolist() == [50, 60]


@pytest.mark.parametrize(
    ("write", "name", "content"),
    [
        *((write_run, "args.json", text) for text in ("{", "[]", "{}")),
        *((write_run, "log.csv", text) for text in ("epoch\n1\n", "x" * 200_000, None)),  # csv takes less for a field
        *((write_pretraining, "args.json", text) for text in ("{", '{"method": "SimCLR", "arguments": {}}', None)),
        *((write_pretraining, "log.csv", f"epoch,knn_accuracy\n1,{text}\n") for text in ("much", "x" * 200_000, "")),
    ],
)  # fmt: skip
def test_a_damaged_run_directory_is_refused_by_name(tmp_path, write, name, content):
    folder = write(tmp_path / "run")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    for read in (figures.read_curve, figures.read_run) if write is write_run else (figures.read_run,):
        with pytest.raises(UserError, match="run"):
            read(folder)


def test_runs_of_one_title_share_a_panel_and_pretraining_comes_last(tmp_path):
    knn = figures.read_run(write_pretraining(tmp_path / "knn", [50]))
    runs = [knn] + [figures.read_run(write_run(tmp_path / str(k), noise=k % 4)) for k in range(5)]
    by_title = figures.panels(runs, lambda run: f"noise {run.curve.arguments['noise']}")
    assert [(title, len(members)) for title, members in by_title.items()] == [
        *(("noise 0", 2), ("noise 1", 1), ("noise 2", 1), ("noise 3", 1)),
        ("Pre-training without labels: kNN accuracy", 1),
    ]
    assert figures.panel_grid(by_title)[:2] == (2, 3)
    assert figures.panel_grid({"noise 0": runs})[:2] == (1, 1)


@pytest.mark.parametrize(
    ("methods", "columns", "lines"),
    [
        (["CE", "AFM"], 3, 1),
        (["AFM", "SCE (pre-trained) with OOD removal"], 3, 2),
        (["Manifold DivideMix without OOD removal and manifold mixup", "CE", "AFM", "SFA"], 2, 4),
    ],
)
def test_panels_and_their_legends_have_room_for_long_names(methods, columns, lines, tmp_path):
    runs = [figures.read_run(write_run(tmp_path / name, name)) for name in methods]
    by_title = {str(k): runs for k in range(6)}
    grid = figures.panel_grid(by_title)
    assert (grid.rows, grid.columns) == (6 // columns, columns)
    figure = figures.plt.figure(figsize=(figures.WIDTH, grid.height), layout="constrained")
    figures.draw_panels(figure, by_title, warm_up="warm_up")
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        box, label = legend.get_window_extent(), axes.xaxis.label.get_window_extent()
        assert len({round(text.get_window_extent().y0) for text in legend.get_texts()}) == lines
        assert box.width < figure.bbox.width / columns
        assert 0 <= box.y0 < box.y1 <= label.y0 + 1
        assert axes.bbox.height > 2 * figure.dpi
    figures.plt.close(figure)


def test_a_method_is_the_mean_of_its_runs_with_the_range_over_them():
    figure, axes = figures.plt.subplots()
    curves = [("CE", np.array([10.0, 20, 30])), ("CE", np.array([20.0, 40])), ("AFM", np.ones(1))]
    figures.draw_curves(axes, curves)
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
