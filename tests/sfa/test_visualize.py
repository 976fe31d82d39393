"""The figure of SFA's runs: curves by setting, one run's selection, accuracy by class; refusals in one line."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from common.runs import cli
from sfa import Train_cifar, visualize
from sfa.flags import cifar_cell
from sfa.visualize import figures, read_run

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, WARM_UP = 6, 2
DIGITS = {"dataset": "digits", "imb_type": "exp", "num_class": 10, "selection": "sfa", "warm_up": WARM_UP}
CELL = {"dataset": "digits", "noise_type": "imb", "noise_rate": 0.5, "imb_factor": 0.1, "profile": "embedded"}
WEBVISION = {"dataset": "webvision", "noise_type": "real", "noise_rate": None, "imb_factor": None}
COUNTS = [60, 30, 20, 12, 9, 7, 25, 4, 3, 1]  # not in the order of the classes


def write_log(folder, columns):
    """log.csv with the columns given, as lists by epoch."""
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(map(str, row)) for row in [columns, *rows]]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


def write_run(folder, method="SFA", values=(50, 60), paper="sfa", cell=CELL, **arguments):
    """A run directory as far as curves are read of it, which is all there is of a baseline."""
    folder.mkdir(parents=True)
    content = {"paper": paper, "method": method, "cell": cell, "arguments": {"p_threshold": 0.5, **arguments}}
    (folder / "args.json").write_text(json.dumps(content))
    write_log(folder, {"epoch": range(1, 1 + len(values)), "test_accuracy": values})
    return folder


def log_of(counts, epochs, selecting, seed):
    """Columns of a run's log: accuracy of every class, and what is known of the selection in the epochs that make one."""
    rng = np.random.default_rng(seed)
    columns = {"epoch": range(1, 1 + epochs), "test_accuracy": rng.uniform(10, 90, epochs).round(3)}
    known = np.arange(1, 1 + epochs) > (WARM_UP if selecting else epochs)
    for name, values in (("selected", rng.integers(50, 99, epochs)), ("auc", rng.uniform(0.5, 1, epochs))):
        columns[f"net1_{name}"] = [value if there else "" for value, there in zip(values, known, strict=True)]
    return columns | {f"class_{k}": rng.uniform(0, 100, epochs).round(3) for k in range(len(counts))}


def write_finished(folder, method="SFA", counts=COUNTS, seed=1, epochs=EPOCHS, **arguments):
    """A finished run of Train_cifar.py."""
    arguments = {**DIGITS, "num_class": len(counts), "seed": seed, **arguments}
    write_run(folder, method, **arguments)
    write_log(folder, log_of(counts, epochs, arguments["selection"] != "none", seed))
    (folder / "noise.json").write_text(json.dumps({"observed_counts": list(counts)}))
    rng = np.random.default_rng(seed)
    observed = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    clean = np.where(rng.random(len(observed)) < 0.6, observed, rng.integers(0, len(counts), len(observed)))
    if arguments["selection"] != "none":
        split = {"net1": rng.random(len(observed)), "net2": rng.random(len(observed))}
        np.savez(folder / "clean_probability.npz", **split, observed=observed, clean=clean)
    if arguments["selection"] == "sfa":
        drawn = rng.normal(size=(epochs - WARM_UP, len(counts), 16)).astype(np.float16)
        np.savez(folder / "centroids.npz", net1=drawn)
    (folder / "result.json").write_text("{}")
    return folder


def write_webvision(folder, seed=1, epochs=3):
    """A finished run of Train_webvision.py, which knows no truth and selects after every epoch."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(15, 130, 50).tolist()
    write_finished(folder, counts=counts, seed=seed, epochs=epochs)
    arguments = {"num_class": 50, "p_threshold": 0.5, "seed": seed, "network": "inception_resnet_v2"}
    content = {"paper": "sfa", "method": "SFA", "cell": WEBVISION | {"profile": "paper"}}
    (folder / "args.json").write_text(json.dumps({**content, "arguments": arguments}))
    columns = log_of(counts, epochs, True, seed)
    del columns["net1_auc"]
    write_log(folder, columns | {"net1_selected": rng.integers(500, 900, epochs)})
    change(folder / "clean_probability.npz", clean=None)
    np.savez(folder / "centroids.npz", net1=rng.normal(size=(epochs, 50, 16)).astype(np.float16))
    return folder


def change(path, **arrays):
    """Replace arrays of an .npz file; None takes one out."""
    with np.load(path) as file:
        content = {name: value for name, value in {**file, **arrays}.items() if value is not None}
    np.savez(path, **content)


def change_json(path, **values):
    """Replace what a JSON file says, arguments of a run among it; None takes one out."""
    content = json.loads(path.read_text())
    part = content["arguments"] if values.keys() <= content.get("arguments", {}).keys() else content
    part |= values
    for name in [name for name, value in values.items() if value is None]:
        del part[name]
    path.write_text(json.dumps(content))


def log(folder):
    """Columns of log.csv, float [E]; NaN where a cell is empty."""
    return np.genfromtxt(folder / "log.csv", delimiter=",", names=True)


@pytest.fixture
def run(tmp_path):
    return write_finished(tmp_path / "run")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    written = []
    monkeypatch.setattr(visualize.figures, "write", lambda figure, out: written.append(figure))
    yield written
    figures.plt.close("all")


def draw(drawn, *runs):
    """The panels that were drawn, by the first line of their titles."""
    visualize.main([*map(str, runs), "--out", "figure.png"])
    return {axes.get_title().split("\n")[0]: axes for axes in drawn[-1].axes if axes.axison}


def lines_of(axes):
    """x and y of each line by its label."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}


def refused(capsys, *words) -> str:
    """The one line that a call ends in, with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(visualize.main, list(map(str, words)))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", line)
    return line


# what is read -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "arguments", "words"),
    [
        ({}, DIGITS, "digits, imbalance 10\n50 % noise by class size"),
        ({}, {}, "digits, imbalance 10\n50 % noise by class size"),
        ({"noise_type": "sym", "noise_rate": 0.125, "imb_factor": 0.02}, DIGITS, "digits, imbalance 50\n12.5 % symmetric noise"),
        ({"imb_factor": 0.01}, {**DIGITS, "imb_type": "step"}, "digits, imbalance 100 in steps\n50 % noise by class size"),
        ({"imb_factor": 1.0, "noise_type": "given", "noise_rate": None}, DIGITS, "digits\ngiven labels"),
        ({"imb_factor": 1.0, "noise_type": "worse_{1}.npy", "noise_rate": None}, DIGITS, "digits\nlabels of worse_{1}.npy"),
        ({"profile": "embedded+limit_train=64+limit_test=30"}, {}, "digits, 64 images, imbalance 10\n50 % noise by class size"),
        (WEBVISION, {"num_class": 7}, "webvision, 7 classes\nlabels of the search"),
    ],
)  # fmt: skip
def test_a_setting_is_named_by_data_long_tail_and_noise(cell, arguments, words, tmp_path):
    run = read_run(write_run(tmp_path / "run", "CE", cell={**CELL, **cell}, **arguments))
    assert run.curve.arguments["setting"] == words


def test_a_run_of_the_script_and_its_baseline_are_of_one_setting(tmp_path):
    """What Train_cifar.py says of itself, from the cell that a baseline takes over."""
    args = Train_cifar.parse_args(["--dataset", "digits", "--imb_factor", "0.05", "--noise_mode", "sym"])

    class Digits:
        name = "digits"

    cell = cifar_cell(args, Digits)
    own = read_run(write_run(tmp_path / "run", "SFA", cell=cell, **vars(args)))
    baseline = read_run(write_run(tmp_path / "baseline", "CE", cell=cell, like="run", num_epochs=2))
    assert own.curve.arguments["setting"] == baseline.curve.arguments["setting"]
    assert "selection" not in baseline.curve.arguments


def test_the_first_finished_run_of_sfa_is_shown_else_the_first_with_a_split(run, tmp_path):
    unfinished = write_finished(tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    warm_up_only = write_finished(tmp_path / "warm_up_only")
    (warm_up_only / "clean_probability.npz").unlink()
    baseline = write_run(tmp_path / "ce", "CE")
    none = write_finished(tmp_path / "none", "no selection", selection="none")
    for folder in (baseline, none):  # files that are not theirs
        for name in ("result.json", "clean_probability.npz"):
            shutil.copy(run / name, folder)
    folders = [
        unfinished,
        warm_up_only,
        baseline,
        none,
        write_finished(tmp_path / "gmm", "GMM", selection="gmm"),
        run,
        write_finished(tmp_path / "second"),
    ]
    runs, order = [read_run(folder) for folder in folders], []
    while (shown := visualize.run_to_show(runs)) is not None:
        order.append(shown.folder.name)
        runs = [other for other in runs if other is not shown]
    assert order == ["run", "second", "gmm"]


def test_at_most_ten_classes_are_shown_evenly_spaced_by_rank_the_most_frequent_first():
    assert visualize.classes_to_show(np.array([5, 0, 9, 5, 1])).tolist() == [2, 0, 3, 4]
    assert visualize.classes_to_show(np.arange(1, 101)).tolist() == [99, 88, 77, 66, 55, 44, 33, 22, 11, 0]
    assert len(visualize.classes_to_show(np.arange(1, 12))) == 10
    assert visualize.classes_to_show(np.array([0, 3])).tolist() == [1]


# curves -----------------------------------------------------------------------------------------------------------------


def test_the_curves_have_a_panel_per_setting_and_a_method_one_colour(tmp_path, drawn):
    other = {**CELL, "imb_factor": 0.01}
    runs = [
        write_run(tmp_path / "a", "CE", [10, 20]),
        write_run(tmp_path / "b", "SFA", [30, 40], **DIGITS),
        write_run(tmp_path / "c", "SFA", [50, 80], **DIGITS),
        write_run(tmp_path / "d", "no selection", [5, 6], **{**DIGITS, "selection": "none", "warm_up": 30}),
        write_run(tmp_path / "e", "SFA", [1, 2], cell=other, **DIGITS),
        write_run(tmp_path / "f", "GMM", [1, 2], cell=other, **{**DIGITS, "selection": "gmm", "warm_up": 1}),
    ]
    visualize.main([*map(str, runs), "--out", str(tmp_path / "figure.png")])
    first, second = drawn[0].axes
    assert first.get_title() == "Test accuracy: digits, imbalance 10\n50 % noise by class size"
    assert second.get_title() == "Test accuracy: digits, imbalance 100\n50 % noise by class size"
    lines = lines_of(first)
    assert lines["CE, 1 run(s)"] == [[1, 2], [10, 20]]
    assert lines["SFA, 2 run(s)"] == [[1, 2], [40, 60]]
    assert lines["end of the warm-up"][0] == [WARM_UP + 0.5] * 2, "that of the runs with a selection"
    assert "end of the warm-up" not in lines_of(second), "at two epochs"
    colors = {line.get_label(): line.get_color() for axes in (first, second) for line in axes.get_lines()}
    assert colors["SFA, 1 run(s)"] == colors["SFA, 2 run(s)"] != colors["CE, 1 run(s)"]


def test_more_methods_than_colours_differ_in_their_lines(tmp_path, drawn):
    runs = [write_run(tmp_path / str(k), f"method {k}") for k in range(12)]
    (axes,) = draw(drawn, *runs).values()
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 12
    assert {style for _, style in looks} == {"-", "--"}


def test_a_single_epoch_is_a_point(tmp_path, drawn):
    runs = write_run(tmp_path / "a", "CE", [10]), write_run(tmp_path / "b", "SFA", [10, 20], **DIGITS)
    (axes,) = draw(drawn, *runs).values()
    assert [line.get_marker() for line in axes.get_lines()][:2] == [".", "None"]


# the selection of one run -----------------------------------------------------------------------------------------------


def bars(axes):
    """Heights of the bars of each colour of a stacked histogram."""
    return {
        to_rgb(group.patches[0].get_facecolor()): [bar.get_height() for bar in group] for group in axes.containers
    }  # fmt: skip


def histograms(panels):
    return {title: axes for title, axes in panels.items() if title.startswith("class ")}


def test_clean_probabilities_are_drawn_by_class_clean_against_mislabelled(run, drawn):
    change_json(run / "args.json", p_threshold=0.7)
    shown = histograms(draw(drawn, run))
    ranked = sorted(range(10), key=lambda k: -COUNTS[k])
    assert list(shown) == [f"class {k}: {COUNTS[k]} samples" for k in ranked]
    with np.load(run / "clean_probability.npz") as file:
        probability, observed, clean = file["net1"], file["observed"], file["clean"]
    for k, axes in zip(ranked, shown.values(), strict=True):
        groups = {"tab:blue": clean == k, "tab:orange": clean != k}
        if k != 9:  # which may have no bars of a colour
            assert bars(axes) == {
                to_rgb(color): np.histogram(probability[(observed == k) & kind], 20, (0, 1))[0].tolist()
                for color, kind in groups.items()
            }
        assert axes.get_lines()[0].get_xdata()[0] == 0.7
        tops = [bar.get_y() for bar in axes.containers[1]]
        assert tops == [bar.get_height() for bar in axes.containers[0]], "mislabelled ones stand on the clean"
    part = drawn[0].subfigs[1]
    assert "(SFA, digits, imbalance 10, 50 % noise by class size)" in part.get_suptitle()
    assert "seed 1" in part.get_suptitle()
    labels = [text.get_text() for text in part.legends[0].get_texts()]
    assert labels == ["clean", "mislabelled", "selected above 0.7"]


def test_of_many_classes_ten_are_shown(tmp_path, drawn):
    counts = np.arange(1, 101)[::-1]
    panels = draw(drawn, write_finished(tmp_path / "run", counts=counts.tolist()))
    chosen = [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert list(histograms(panels)) == [f"class {k}: {counts[k]} samples" for k in chosen]
    named = [text.get_text() for text in panels["Directions of the drawn centroids"].texts]
    assert named == list(map(str, chosen))
    assert len(panels["Accuracy by class after epoch 6"].collections) == 3
    assert (
        sum(len(marks.get_offsets()) for marks in panels["Accuracy by class after epoch 6"].collections)
        == 100
    )


def test_few_classes_have_one_row_and_no_empty_panel(tmp_path, drawn):
    panels = draw(drawn, write_finished(tmp_path / "run", counts=[9, 5, 3]))
    assert len(histograms(panels)) == 3
    drawn[0].canvas.draw()
    places = [axes.get_position() for axes in histograms(panels).values()]
    assert len({round(place.y0, 3) for place in places}) == 1
    assert places[2].x1 > 0.9, "over the whole width"
    seven = draw(drawn, write_finished(tmp_path / "seven", counts=[9, 5, 3, 3, 3, 3, 3]))
    assert len(histograms(seven)) == 7


# its centroids ----------------------------------------------------------------------------------------------------------


def test_the_projection_is_that_of_directions_onto_principal_components():
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(5, 4, 8)) + 3 * rng.normal(size=(4, 8))
    present = np.array([True, True, False, True])
    points, shares = visualize.project(centroids, present)
    directions = centroids / np.sqrt((centroids**2).sum(axis=2))[:, :, None]
    rows = directions[:, present].reshape(-1, 8)
    _, values, axes = np.linalg.svd(rows - rows.mean(axis=0))
    expected = (directions - rows.mean(axis=0)) @ axes[:2].T
    assert points.shape == (5, 4, 2)
    for i in (0, 1):  # up to the sign of an axis
        assert np.allclose(points[..., i], expected[..., i]) or np.allclose(points[..., i], -expected[..., i])
    assert np.allclose(shares, (values**2 / (values**2).sum())[:2])
    longer = visualize.project(centroids * rng.uniform(0.1, 9, (5, 4, 1)), present)[0]
    assert np.allclose(longer, points)
    centroids[:, 2] = 0  # of a class without samples
    assert np.isfinite(visualize.project(centroids, present)[0]).all()


def test_the_way_of_each_centroid_goes_from_faint_to_strong_and_ends_in_a_mark(run, drawn):
    panels = draw(drawn, run)
    axes = panels["Directions of the drawn centroids"]
    assert list(panels)[-3:-1] == ["Directions of the drawn centroids", "Accuracy by class after epoch 6"]
    with np.load(run / "centroids.npz") as file:
        points, shares = visualize.project(file["net1"].astype(float), np.ones(10, bool))
    ways, marks = axes.collections[::2], axes.collections[1::2]
    ranked = sorted(range(10), key=lambda k: -COUNTS[k])
    for k, way, mark, text in zip(ranked, ways, marks, axes.texts, strict=True):
        steps = np.array(way.get_segments())
        assert np.allclose(steps[:, 0], points[:-1, k])
        assert np.allclose(steps[:, 1], points[1:, k])
        alphas = way.get_colors()[:, 3]
        assert (np.diff(alphas) > 0).all()
        assert alphas[-1] == 1
        assert np.allclose(mark.get_offsets(), points[-1, k])
        assert text.get_text() == str(k)
        assert np.allclose(way.get_colors()[-1], mark.get_facecolors()[0])
        title = next(a.title for a in drawn[0].axes if a.get_title().startswith(f"class {k}:"))
        assert np.allclose(title.get_color(), mark.get_facecolors()[0]), "the colour of the class above"
    assert axes.get_title() == "Directions of the drawn centroids\nepochs 3 to 6"
    assert axes.get_xlabel() == f"principal component 1 ({100 * shares[0]:.0f} % of variance)"
    assert axes.get_ylabel() == f"principal component 2 ({100 * shares[1]:.0f} % of variance)"
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert np.isclose(right - left, top - bottom)
    assert left < points[..., 0].min() < points[..., 0].max() < right
    assert bottom < points[..., 1].min() < points[..., 1].max() < top


def test_classes_without_samples_do_not_decide_on_the_plane(tmp_path, drawn):
    run = write_finished(tmp_path / "run", counts=[9, 5, 0, 3])
    with np.load(run / "centroids.npz") as file:
        centroids = file["net1"].astype(float)
    axes = draw(drawn, run)["Directions of the drawn centroids"]
    points, _ = visualize.project(centroids, np.array([True, True, False, True]))
    ends = np.concatenate([marks.get_offsets() for marks in axes.collections[1::2]])
    assert np.allclose(ends, points[-1, [0, 1, 3]])


def test_a_single_selection_has_marks_alone(tmp_path, drawn):
    axes = draw(drawn, write_finished(tmp_path / "run", epochs=WARM_UP + 1))[
        "Directions of the drawn centroids"
    ]
    assert axes.get_title().endswith("\nepoch 3")
    assert [len(way.get_segments()) for way in axes.collections[::2]] == [0] * 10
    one_class = write_finished(tmp_path / "one", counts=[5], epochs=WARM_UP + 1)
    assert "Directions of the drawn centroids" not in draw(drawn, one_class), "a point is no projection"


def test_without_drawn_centroids_there_is_no_such_panel(run, tmp_path, drawn):
    gmm = write_finished(tmp_path / "gmm", "GMM", selection="gmm")
    panels = draw(drawn, gmm)
    assert len(histograms(panels)) == 10
    assert list(panels)[-2:] == ["Accuracy by class after epoch 6", "Selection by network 1"]
    (run / "centroids.npz").unlink()  # of a run that kept none
    assert "Directions of the drawn centroids" not in draw(drawn, run)


# all runs of its setting ------------------------------------------------------------------------------------------------


def marks_of(axes):
    """Points of each colour and shape."""
    marks = {}
    for group in axes.collections:
        if len(group.get_offsets()):
            key = to_rgb(group.get_facecolors()[0][:3]), len(group.get_paths()[0].vertices)
            marks[key] = group.get_offsets().tolist()
    return marks


def test_accuracy_by_class_is_the_mean_of_a_methods_runs_by_shot(run, tmp_path, drawn):
    more = np.array(COUNTS) + 2
    second = write_finished(tmp_path / "second", counts=more.tolist(), seed=2)
    gmm = write_finished(tmp_path / "gmm", "GMM", seed=3, selection="gmm")
    baseline = write_run(tmp_path / "ce", "CE", [10, 20])
    other = write_finished(tmp_path / "other", "elsewhere", seed=4)
    change_json(other / "args.json", cell={**CELL, "imb_factor": 0.01})
    axes = draw(drawn, baseline, run, second, gmm, other)["Accuracy by class after epoch 6"]
    blue, orange = (to_rgb(line.get_color()) for line in drawn[0].axes[0].get_lines()[1:3])
    last = np.array([[log(folder)[f"class_{k}"][-1] for k in range(10)] for folder in (run, second, gmm)])
    expected = {blue: (np.array(COUNTS) + 1, last[:2].mean(axis=0)), orange: (np.array(COUNTS), last[2])}
    found, shots = marks_of(axes), {"many": [0, 1], "medium": [2, 3, 4, 5, 6], "few": [7, 8, 9]}
    shapes = {}
    for color, (x, y) in expected.items():
        points = [(shape, values) for (own, shape), values in found.items() if own == color]
        assert len(points) == 3
        for (shape, values), (shot, classes) in zip(points, shots.items(), strict=True):
            assert np.allclose(values, np.stack([x[classes], y[classes]], axis=1))
            assert shapes.setdefault(shot, shape) == shape
        means = [line.get_xydata() for line in axes.get_lines() if to_rgb(line.get_color()) == color]
        for line, classes in zip(means, shots.values(), strict=True):
            assert np.allclose(line[:, 0], [x[classes].min(), x[classes].max()])
            assert np.allclose(line[:, 1], y[classes].mean())
    assert len(set(shapes.values())) == 3
    assert set(found) == {(color, shape) for color in expected for shape in shapes.values()}
    assert axes.get_xscale() == "log"
    labels = [text.get_text() for text in drawn[0].subfigs[-1].legends[0].get_texts()]
    assert labels == ["SFA", "GMM", "many shot", "medium shot", "few shot"]


def test_other_numbers_of_classes_have_their_shots_by_samples(tmp_path, drawn):
    axes = draw(drawn, write_finished(tmp_path / "run", counts=[150, 101, 100, 20, 19, 2]))
    sizes = [len(marks.get_offsets()) for marks in axes["Accuracy by class after epoch 6"].collections]
    assert sizes == [2, 2, 2]


def test_classes_without_samples_or_test_samples_have_no_mark(tmp_path, drawn):
    run = write_finished(tmp_path / "run", counts=[9, 5, 0, 3])
    columns = log_of([9, 5, 0, 3], EPOCHS, True, seed=1)
    write_log(run, columns | {"class_1": [""] * EPOCHS})
    axes = draw(drawn, run)["Accuracy by class after epoch 6"]
    assert [x for points in marks_of(axes).values() for x, _ in points] == [9, 3]
    write_log(run, columns | {f"class_{k}": [""] * EPOCHS for k in range(4)})
    assert not marks_of(draw(drawn, run)["Accuracy by class after epoch 6"])


def test_a_method_ends_where_its_shortest_run_does(run, tmp_path, drawn):
    short = write_finished(tmp_path / "short", seed=2, epochs=4)
    (short / "result.json").unlink()
    gmm = write_finished(tmp_path / "gmm", "GMM", selection="gmm", seed=3)
    panels = draw(drawn, run, short, gmm)
    axes = panels["Accuracy by class after epochs 4 to 6"]
    expected = np.mean([log(folder)["class_0"][3] for folder in (run, short)])
    assert np.isclose(axes.collections[0].get_offsets()[0][1], expected)
    assert np.isclose(axes.collections[3].get_offsets()[0][1], log(gmm)["class_0"][5])


def test_the_auc_of_the_selection_is_drawn_by_epoch_for_each_method(run, tmp_path, drawn):
    second = write_finished(tmp_path / "second", seed=2)
    gmm = write_finished(tmp_path / "gmm", "GMM", seed=3, selection="gmm")
    none = write_finished(tmp_path / "none", "no selection", seed=4, selection="none")
    baseline = write_run(tmp_path / "ce", "CE", [10, 20])
    panels = draw(drawn, none, baseline, run, second, gmm)
    axes = panels["Selection by network 1"]
    lines = lines_of(axes)
    assert list(lines) == ["SFA, 2 run(s)", "GMM, 1 run(s)"]
    auc = [log(folder)["net1_auc"] for folder in (run, second, gmm)]
    assert lines["SFA, 2 run(s)"][0] == [*range(1, 7)]
    assert np.allclose(lines["SFA, 2 run(s)"][1], (auc[0] + auc[1]) / 2, equal_nan=True)
    assert np.allclose(lines["GMM, 1 run(s)"][1], auc[2], equal_nan=True)
    assert axes.get_ylabel() == "AUC of the clean probabilities"
    assert axes.get_xlim() == (0, 7)
    above = {line.get_label(): line.get_color() for line in drawn[0].axes[0].get_lines()}
    assert all(line.get_color() == above[line.get_label()] for line in axes.get_lines())
    marks = panels["Accuracy by class after epoch 6"].collections
    assert len(marks) == 9, "the run without a selection too"


def test_without_wrong_labels_the_number_selected_is_drawn(run, drawn):
    columns = log_of(COUNTS, EPOCHS, True, seed=1)
    write_log(run, columns | {"net1_auc": [""] * EPOCHS})
    axes = draw(drawn, run)["Selection by network 1"]
    ((_, values),) = lines_of(axes).values()
    assert np.allclose(values, log(run)["net1_selected"], equal_nan=True)
    assert axes.get_ylabel() == "samples selected"


def test_webvision_has_no_truth_and_selects_after_every_epoch(tmp_path, drawn):
    runs = write_webvision(tmp_path / "a"), write_webvision(tmp_path / "b", seed=2)
    panels = draw(drawn, *runs)
    assert lines_of(panels["Test accuracy: webvision, 50 classes"])["end of the warm-up"][0] == [1.5] * 2
    grey = histograms(panels)
    assert len(grey) == 10
    for title, axes in grey.items():
        (heights,) = bars(axes).values()
        assert sum(heights) == int(title.split()[2])
        assert list(bars(axes)) == [to_rgb("tab:gray")]
    labels = [text.get_text() for text in drawn[0].subfigs[1].legends[0].get_texts()]
    assert labels == ["truth unknown", "selected above 0.5"]
    assert panels["Directions of the drawn centroids"].get_title().endswith("\nepochs 1 to 3")
    ((epochs, values),) = lines_of(panels["Selection by network 1"]).values()
    assert epochs == [1, 2, 3]
    assert np.allclose(values, np.mean([log(folder)["net1_selected"] for folder in runs], axis=0))
    assert "Accuracy by class after epoch 3" in panels


def test_runs_that_are_not_finished_give_what_the_log_knows(run, tmp_path, drawn):
    for name in ("result.json", "clean_probability.npz", "centroids.npz"):
        (run / name).unlink()
    elsewhere = write_run(tmp_path / "ce", "CE", cell={**CELL, "noise_rate": 0.2})
    names = ["Accuracy by class after epoch 6", "Selection by network 1"]
    assert list(draw(drawn, elsewhere, run))[-2:] == names, "of the first run that is no baseline"


def test_runs_without_a_selection_or_without_classes_give_what_they_have(tmp_path, drawn):
    none = write_finished(tmp_path / "none", "no selection", selection="none")
    assert list(draw(drawn, none))[1:] == ["Accuracy by class after epoch 6"]
    baseline = write_run(tmp_path / "ce", "CE")
    assert list(draw(drawn, baseline)) == ["Test accuracy: digits, imbalance 10"]


# the figure -------------------------------------------------------------------------------------------------------------


def test_the_figure_is_written_whole(run, tmp_path, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    monkeypatch.chdir(tmp_path)
    visualize.main([str(run)])
    with Image.open(tmp_path / "sfa.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert capsys.readouterr().out == "figure in sfa.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "sfa.png"]
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}, "the run is left as it is"


def test_nothing_overlaps_where_many_methods_are_named(run, tmp_path, drawn):
    losses = ("balanced softmax", "LDAM", "GCE", "SCE")
    names = [f"{kind} + {loss}" for kind in ("SFA", "no selection") for loss in losses]
    runs = [write_finished(tmp_path / f"{k}", name, seed=k) for k, name in enumerate(names)]
    draw(drawn, run, *runs)
    (figure,) = drawn
    figure.canvas.draw()
    upper, middle, lower = (part.get_tightbbox() for part in figure.subfigs)
    assert upper.y0 >= middle.y1 - 0.05
    assert middle.y0 >= lower.y1 - 0.05
    for row in (figure.subfigs[1].axes[:5], figure.subfigs[1].axes[5:], figure.subfigs[2].axes):
        boxes = [axes.get_tightbbox() for axes in row]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        assert all(0 <= box.x0 < box.x1 <= figure.bbox.width for box in boxes)
    legend = figure.subfigs[2].legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    assert legend.y1 <= min(axes.get_tightbbox().y0 for axes in figure.subfigs[2].axes)
    assert all(axes.bbox.height > 2 * figure.dpi for axes in figure.subfigs[2].axes)
    box = figure.subfigs[2].axes[0].bbox
    assert np.isclose(box.width, box.height), "lengths in the plane of the centroids compare"


# mistakes ---------------------------------------------------------------------------------------------------------------


def test_by_path_too_what_is_no_run_directory_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sfa" / "visualize.py", "nosuch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "visualize.py: error: nosuch is no run directory: args.json is missing\n"


def test_a_run_of_another_paper_is_refused(tmp_path, capsys):
    assert "run is a run of sanm, not of sfa" in refused(capsys, write_run(tmp_path / "run", paper="sanm"))
    assert "an unknown paper" in refused(capsys, write_run(tmp_path / "older", paper=None))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("args.json", b"{", "run is damaged"),
        ("args.json", b'{"paper": "sfa", "method": "CE", "arguments": {}}', "it has no cell"),
        ("args.json", b'{"paper": "sfa", "method": "CE", "arguments": {}, "cell": {}}', "it has no noise_type"),
        ("log.csv", None, "run is no run directory: log.csv is missing"),
        ("log.csv", b"", "log.csv has no epoch yet"),
        ("log.csv", b"epoch,test_accuracy\n", "log.csv has no epoch yet"),
        ("log.csv", b"epoch,loss\n1,0.5\n", "run is damaged"),
        ("log.csv", b"epoch,test_accuracy,class_0,class_2\n1,50,1,2\n", "log.csv is damaged: it has no class_1"),
        ("log.csv", b"epoch,test_accuracy,class_0\n1,50,much\n", "log.csv is damaged (could not convert"),
        ("log.csv", b"epoch,test_accuracy,net1_auc\n1,50,much\n", "log.csv is damaged (could not convert"),
        ("noise.json", None, "noise.json is damaged ([Errno 2]"),
        ("noise.json", b"{", "noise.json is damaged"),
        ("noise.json", b"{}", "noise.json is damaged: it has no observed_counts"),
        ("noise.json", b'{"observed_counts": ["many"]}', "noise.json is damaged"),
        ("noise.json", b'{"observed_counts": [1, 2]}', "are not of the 10 classes in log.csv"),
        ("clean_probability.npz", b"half", "clean_probability.npz is damaged"),
        ("centroids.npz", b"half", "centroids.npz is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_refused_in_one_line(name, content, line, run, tmp_path, capsys):
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"older")
    message = refused(capsys, run, "--out", figure)
    assert line in message
    assert str(run) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "run"]
    assert figure.read_bytes() == b"older"


SAMPLES = sum(COUNTS)


@pytest.mark.parametrize(
    ("name", "arrays", "line"),
    [
        ("clean_probability", {"net1": None}, "it has no net1"),
        ("clean_probability", {"observed": None}, "it has no observed"),
        ("clean_probability", {"net1": np.ones(3)}, f"not of the {SAMPLES} samples in noise.json"),
        ("clean_probability", {"clean": np.ones(3, int)}, f"not of the {SAMPLES} samples"),
        ("clean_probability", {"net1": np.full(SAMPLES, np.nan)}, "net1 is not probabilities"),
        ("clean_probability", {"net1": np.full(SAMPLES, 1.5)}, "net1 is not probabilities"),
        ("clean_probability", {"net1": np.full(SAMPLES, -0.5)}, "net1 is not probabilities"),
        ("clean_probability", {"net1": np.full(SAMPLES, "a")}, "net1 is not probabilities"),
        ("clean_probability", {"observed": np.zeros(SAMPLES)}, "observed or clean is not labels"),
        ("clean_probability", {"observed": np.full(SAMPLES, -1)}, "observed or clean is not labels"),
        ("clean_probability", {"clean": np.full(SAMPLES, 10)}, "observed or clean is not labels"),
        ("clean_probability", {"observed": np.zeros(SAMPLES, int)}, "not of the labels that noise.json counts"),
        ("centroids", {"net1": None, "net3": np.ones(1)}, "it has no net1"),
        ("centroids", {"net1": np.ones((4, 10))}, "of shape (4, 10) is not centroids of the 10 classes"),
        ("centroids", {"net1": np.ones((4, 9, 16))}, "of shape (4, 9, 16) is not centroids"),
        ("centroids", {"net1": np.ones((4, 10, 1))}, "of shape (4, 10, 1) is not centroids"),
        ("centroids", {"net1": np.ones((7, 10, 16))}, "7 selections in 6 epochs"),
        ("centroids", {"net1": np.ones((0, 10, 16))}, "0 selections in 6 epochs"),
        ("centroids", {"net1": np.full((4, 10, 16), np.inf)}, "net1 is not finite numbers"),
        ("centroids", {"net1": np.ones((4, 10, 16), int)}, "net1 is not finite numbers"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(name, arrays, line, run, capsys):
    change(run / f"{name}.npz", **arrays)
    message = refused(capsys, run)
    assert f"{run / name}.npz is damaged" in message
    assert line in message


def test_a_damaged_log_of_a_run_that_is_not_shown_is_refused_too(run, tmp_path, capsys):
    second = write_finished(tmp_path / "second", "GMM", selection="gmm")
    (second / "noise.json").unlink()
    assert str(second / "noise.json") in refused(capsys, run, second)


def test_runs_of_one_setting_have_the_same_classes(run, tmp_path, capsys):
    baseline = write_run(tmp_path / "ce", "CE")
    three = write_finished(tmp_path / "three", counts=[3, 2, 1])
    line = refused(capsys, run, baseline, three)
    assert f"{three} has 3 classes, the runs before it have 10: other data" in line


@pytest.mark.parametrize("flag", ["p_threshold", "warm_up"])
def test_a_flag_that_is_damaged_is_named(flag, run, capsys):
    change_json(run / "args.json", **{flag: "much"})
    assert "args.json is damaged (could not convert" in refused(capsys, run)


def test_a_threshold_that_is_missing_is_named(run, capsys):
    change_json(run / "args.json", p_threshold=None)
    assert "args.json is damaged: it has no p_threshold" in refused(capsys, run)


def test_directories_in_the_place_of_files_are_refused(run, tmp_path, capsys):
    (run / "log.csv").unlink()
    (run / "log.csv").mkdir()
    assert f"{run} is damaged" in refused(capsys, run)
    baseline = write_run(tmp_path / "ce", "CE")
    (tmp_path / "figure.png").mkdir()
    line = refused(capsys, baseline, "--out", tmp_path / "figure.png")
    assert "figure.png cannot be written (Is a directory)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ce", "figure.png", "run"]


def test_a_figure_of_no_known_kind_is_refused_before_anything_is_read(tmp_path, capsys):
    assert "--out" in refused(capsys, tmp_path / "nosuch", "--out", "figure.gif")
