"""The figure of SFA's runs: curves by setting, one run's selection, accuracy by class; refusals in one line."""

import json
import shutil

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from sfa import visualize
from sfa.visualize import read_run
from tests import figures
from tests.figures import assert_refused, change, change_json
from tests.lines import refused

EPOCHS, WARM_UP = 6, 2
DIGITS = {"dataset": "digits", "imb_type": "exp", "num_class": 10, "selection": "sfa", "warm_up": WARM_UP}
CELL = {"dataset": "digits", "noise_type": "imb", "noise_rate": 0.5, "imb_factor": 0.1, "profile": "embedded"}
WEBVISION = {"dataset": "webvision", "noise_type": "real", "noise_rate": None, "imb_factor": None}
BALANCED = {"imb_factor": 1.0, "noise_rate": None}
COUNTS = [60, 30, 20, 12, 9, 7, 25, 4, 3, 1]  # not in the order of the classes


def write_log(folder, columns):
    """log.csv with the columns given, as lists by epoch."""
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(map(str, row)) for row in [columns, *rows]]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


def write_run(folder, method="SFA", values=(50, 60), cell=CELL, **arguments):
    """A run directory as far as curves are read of it, which is all there is of a baseline."""
    arguments = {"p_threshold": 0.5, **arguments}
    return figures.write_run(folder, "sfa", method, values, cell=cell, **arguments)


def log_of(counts, epochs, selecting, seed):
    """Columns of a run's log: accuracy of every class, and the selection in the epochs that make one."""
    rng = np.random.default_rng(seed)
    columns = {"epoch": range(1, 1 + epochs), "test_accuracy": rng.uniform(10, 90, epochs).round(3)}
    without = WARM_UP if selecting else epochs
    for name, values in (("selected", rng.integers(50, 99, epochs)), ("auc", rng.uniform(0.5, 1, epochs))):
        columns[f"net1_{name}"] = [""] * without + values[without:].tolist()
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
    """A finished run of Train_webvision.py: no true labels, a selection after every epoch."""
    rng, counts = np.random.default_rng(seed), [9, 8, 7, 5, 4, 3, 2]
    write_finished(folder, counts=counts, seed=seed, epochs=epochs)
    arguments = {"num_class": 7, "p_threshold": 0.5, "seed": seed}
    content = {"paper": "sfa", "method": "SFA", "cell": WEBVISION | {"profile": "paper"}}
    (folder / "args.json").write_text(json.dumps({**content, "arguments": arguments}))
    columns = log_of(counts, epochs, True, seed)
    del columns["net1_auc"]
    write_log(folder, columns | {"net1_selected": rng.integers(500, 900, epochs)})
    change(folder / "clean_probability.npz", clean=None)
    np.savez(folder / "centroids.npz", net1=rng.normal(size=(epochs, 7, 16)).astype(np.float16))
    return folder


def log(folder):
    """Columns of log.csv, float [E]; NaN where a cell is empty."""
    return np.genfromtxt(folder / "log.csv", delimiter=",", names=True)


@pytest.fixture
def run(tmp_path):
    return write_finished(tmp_path / "run")


def draw(drawn, *runs):
    """The panels that were drawn, by the first line of their titles."""
    visualize.main([*map(str, runs), "--out", "figure.png"])
    return {axes.get_title().split("\n")[0]: axes for axes in drawn[-1].axes if axes.axison}


def lines_of(axes):
    """x and y of each line by its label."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}


def bars(axes):
    """Heights of the bars of each colour of a stacked histogram."""
    groups = axes.containers
    return {to_rgb(bars.patches[0].get_facecolor()): [bar.get_height() for bar in bars] for bars in groups}


def histograms(panels):
    return {title: axes for title, axes in panels.items() if title.startswith("class ")}


def marks_of(axes):
    """Points of each colour and shape."""
    marks = {}
    for group in axes.collections:
        if len(group.get_offsets()):
            key = to_rgb(group.get_facecolors()[0][:3]), len(group.get_paths()[0].vertices)
            marks[key] = group.get_offsets().tolist()
    return marks


CLASSES, PATHS = "Accuracy by class after epoch 6", "Directions of the drawn centroids"
SELECTION = "Selection by network 1"
RANKED = sorted(range(10), key=lambda k: -COUNTS[k])


@pytest.mark.parametrize(
    ("cell", "arguments", "words"),
    [
        ({}, DIGITS, "digits, imbalance 10\n50 % noise by class size"),
        ({}, {}, "digits, imbalance 10\n50 % noise by class size"),
        ({"noise_type": "sym", "noise_rate": 0.125}, DIGITS, "digits, imbalance 10\n12.5 % symmetric noise"),
        ({"imb_factor": 0.01}, {**DIGITS, "imb_type": "step"}, "digits, imbalance 100 in steps\n50 % noise"),
        ({**BALANCED, "noise_type": "given"}, DIGITS, "digits\ngiven labels"),
        ({**BALANCED, "noise_type": "w_{1}.npy"}, {}, "digits\nlabels of w_{1}.npy"),
        ({"profile": "embedded+limit_train=64+limit_test=30"}, {}, "digits, 64 images, imbalance 10\n50 %"),
        (WEBVISION, {"num_class": 7}, "webvision, 7 classes\nlabels of the search"),
    ],
)
def test_a_setting_is_named_by_data_long_tail_and_noise(cell, arguments, words, tmp_path):
    run = read_run(write_run(tmp_path / "run", "CE", cell={**CELL, **cell}, **arguments))
    assert run.curve.arguments["setting"].startswith(words)


def test_the_first_finished_run_of_sfa_is_shown_else_the_first_with_a_split(run, tmp_path):
    unfinished, warm_up_only = (write_finished(tmp_path / name) for name in ("unfinished", "warm_up_only"))
    (unfinished / "result.json").unlink()
    (warm_up_only / "clean_probability.npz").unlink()
    baseline = write_run(tmp_path / "ce", "CE")
    none = write_finished(tmp_path / "none", "no selection", selection="none")
    for folder in (baseline, none):  # files that are not theirs
        for name in ("result.json", "clean_probability.npz"):
            shutil.copy(run / name, folder)
    gmm = write_finished(tmp_path / "gmm", "GMM", selection="gmm")
    folders = [unfinished, warm_up_only, baseline, none, gmm, run, write_finished(tmp_path / "second")]
    runs, order = [read_run(folder) for folder in folders], []
    while (shown := visualize.run_to_show(runs)) is not None:
        order.append(shown.folder.name)
        runs = [other for other in runs if other is not shown]
    assert order == ["run", "second", "gmm"]


def test_at_most_ten_classes_are_shown_evenly_spaced_by_rank_the_most_frequent_first():
    assert visualize.classes_to_show(np.array([5, 0, 9, 5, 1])).tolist() == [2, 0, 3, 4]
    assert visualize.classes_to_show(np.arange(1, 101)).tolist() == [*range(99, -1, -11)]
    assert len(visualize.classes_to_show(np.arange(1, 12))) == 10


def test_clean_probabilities_and_paths_of_centroids_are_drawn_by_class(run, drawn):
    change_json(run / "args.json", p_threshold=0.7)
    panels = draw(drawn, run)
    shown = histograms(panels)
    assert list(panels)[1:] == [*shown, PATHS, CLASSES, SELECTION]
    assert list(shown) == [f"class {k}: {COUNTS[k]} samples" for k in RANKED]
    with np.load(run / "clean_probability.npz") as file:
        probability, observed, clean = file["net1"], file["observed"], file["clean"]
    for k, axes in zip(RANKED, shown.values(), strict=True):
        values = {"tab:blue": probability[(observed == k) & (clean == k)]}
        values["tab:orange"] = probability[(observed == k) & (clean != k)]
        heights = {to_rgb(color): np.histogram(own, 20, (0, 1))[0].tolist() for color, own in values.items()}
        assert k == 9 or bars(axes) == heights  # class 9 may have no bars of a colour
        assert axes.get_lines()[0].get_xdata()[0] == 0.7
        tops = [bar.get_y() for bar in axes.containers[1]]
        assert tops == [bar.get_height() for bar in axes.containers[0]], "mislabelled ones stand on the clean"
    part = drawn[0].subfigs[1]
    assert "seed 1 (SFA, digits, imbalance 10, 50 % noise by class size)" in part.get_suptitle()
    labels = [text.get_text() for text in part.legends[0].get_texts()]
    assert labels == ["clean", "mislabelled", "selected above 0.7"]

    axes = panels[PATHS]
    with np.load(run / "centroids.npz") as file:
        points, explained = visualize.project(file["net1"].astype(float), np.ones(10, bool))
    drawn_classes = zip(RANKED, axes.collections[::2], axes.collections[1::2], axes.texts, strict=True)
    for k, path, mark, text in drawn_classes:
        steps, colors = np.array(path.get_segments()), path.get_colors()
        assert np.allclose(steps[:, 0], points[:-1, k]) and np.allclose(steps[:, 1], points[1:, k])
        assert (np.diff(colors[:, 3]) > 0).all() and colors[-1, 3] == 1
        assert np.allclose(mark.get_offsets(), points[-1, k]) and text.get_text() == str(k)
        title = shown[f"class {k}: {COUNTS[k]} samples"].title
        for color in (colors[-1], title.get_color()):
            assert np.allclose(color, mark.get_facecolors()[0])
    assert axes.get_title() == f"{PATHS}\nepochs 3 to 6"
    assert axes.get_xlabel() == f"principal component 1 ({100 * explained[0]:.0f} % of variance)"
    assert axes.get_ylabel() == f"principal component 2 ({100 * explained[1]:.0f} % of variance)"
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert np.isclose(right - left, top - bottom), "lengths compare"
    assert left < points[..., 0].min() < points[..., 0].max() < right
    assert bottom < points[..., 1].min() < points[..., 1].max() < top


def test_of_many_classes_ten_are_shown_and_shots_go_by_samples(tmp_path, drawn):
    counts = np.arange(2, 202, 2)[::-1]
    panels = draw(drawn, write_finished(tmp_path / "run", counts=counts.tolist()))
    chosen = range(0, 100, 11)
    assert list(histograms(panels)) == [f"class {k}: {counts[k]} samples" for k in chosen]
    assert [text.get_text() for text in panels[PATHS].texts] == list(map(str, chosen))
    sizes = [len(marks.get_offsets()) for marks in panels[CLASSES].collections]
    assert sizes == [50, 41, 9]


def test_few_classes_have_one_row_and_a_class_without_samples_no_mark(tmp_path, drawn):
    run = write_finished(tmp_path / "run", counts=[9, 5, 0, 3])
    with np.load(run / "centroids.npz") as file:
        points, _ = visualize.project(file["net1"].astype(float), np.array([True, True, False, True]))
    columns = log_of([9, 5, 0, 3], EPOCHS, True, seed=1)
    write_log(run, columns | {"class_1": [""] * EPOCHS})  # no test sample
    panels = draw(drawn, run)
    ends = np.concatenate([marks.get_offsets() for marks in panels[PATHS].collections[1::2]])
    assert np.allclose(ends, points[-1, [0, 1, 3]]), "class 2 does not decide on the plane"
    assert [x for points in marks_of(panels[CLASSES]).values() for x, _ in points] == [9, 3]
    drawn[0].canvas.draw()
    places = [axes.get_position() for axes in histograms(panels).values()]
    assert len(places) == 3 and len({round(place.y0, 3) for place in places}) == 1
    assert places[2].x1 > 0.9, "over the whole width"


def test_the_projection_is_that_of_directions_onto_principal_components():
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(5, 4, 8)) + 3 * rng.normal(size=(4, 8))
    present = np.array([True, True, False, True])
    points, explained = visualize.project(centroids, present)
    directions = centroids / np.sqrt((centroids**2).sum(axis=2))[:, :, None]
    rows = directions[:, present].reshape(-1, 8)
    _, values, axes = np.linalg.svd(rows - rows.mean(axis=0))
    expected = (directions - rows.mean(axis=0)) @ axes[:2].T
    for i in (0, 1):  # up to the sign of an axis
        assert np.allclose(points[..., i], expected[..., i]) or np.allclose(points[..., i], -expected[..., i])
    assert np.allclose(explained, (values**2 / (values**2).sum())[:2])
    longer = visualize.project(centroids * rng.uniform(0.1, 9, (5, 4, 1)), present)[0]
    assert np.allclose(longer, points)
    centroids[:, 2] = 0  # of a class without samples
    assert np.isfinite(visualize.project(centroids, present)[0]).all()


def test_a_single_selection_has_marks_alone_and_a_single_point_is_no_projection(tmp_path, drawn):
    few = write_finished(tmp_path / "run", counts=[3, 2], epochs=WARM_UP + 1)
    axes = draw(drawn, few)[PATHS]
    assert axes.get_title().endswith("\nepoch 3")
    assert [len(path.get_segments()) for path in axes.collections[::2]] == [0, 0]
    assert PATHS not in draw(drawn, write_finished(tmp_path / "one", counts=[5], epochs=WARM_UP + 1))


def test_classes_and_selections_of_a_setting_are_drawn_by_method(run, tmp_path, drawn):
    more = np.array(COUNTS) + 2
    second = write_finished(tmp_path / "second", counts=more.tolist(), seed=2)
    gmm = write_finished(tmp_path / "gmm", "GMM", seed=3, selection="gmm")
    none = write_finished(tmp_path / "none", "no selection", seed=5, selection="none")
    baseline = write_run(tmp_path / "ce", "CE", [10, 20])
    other = write_finished(tmp_path / "other", "elsewhere", seed=4)
    change_json(other / "args.json", cell={**CELL, "imb_factor": 0.01})
    panels = draw(drawn, baseline, run, second, gmm, none, other)
    axes = panels[CLASSES]
    above = {line.get_label(): to_rgb(line.get_color()) for line in drawn[0].axes[0].get_lines()}
    last = np.array([[log(of)[f"class_{k}"][-1] for k in range(10)] for of in (run, second, gmm, none)])
    expected = {
        above["SFA, 2 run(s)"]: (np.array(COUNTS) + 1, last[:2].mean(axis=0)),
        above["GMM, 1 run(s)"]: (np.array(COUNTS), last[2]),
        above["no selection, 1 run(s)"]: (np.array(COUNTS), last[3]),
    }
    marks, shots = marks_of(axes), {"many": [0, 1], "medium": [2, 3, 4, 5, 6], "few": [7, 8, 9]}
    shapes = {}
    for color, (x, y) in expected.items():
        points = [(shape, values) for (own, shape), values in marks.items() if own == color]
        for (shape, values), (shot, classes) in zip(points, shots.items(), strict=True):
            assert np.allclose(values, np.stack([x[classes], y[classes]], axis=1))
            assert shapes.setdefault(shot, shape) == shape
        means = [line.get_xydata() for line in axes.get_lines() if to_rgb(line.get_color()) == color]
        for line, classes in zip(means, shots.values(), strict=True):
            assert np.allclose(line[:, 0], [x[classes].min(), x[classes].max()])
            assert np.allclose(line[:, 1], y[classes].mean())
    assert len(set(shapes.values())) == 3 and len(marks) == 9 and axes.get_xscale() == "log"
    labels = [text.get_text() for text in drawn[0].subfigs[-1].legends[0].get_texts()]
    assert labels == ["SFA", "GMM", "no selection", "many shot", "medium shot", "few shot"]

    axes = panels[SELECTION]
    lines, auc = lines_of(axes), [log(folder)["net1_auc"] for folder in (run, second, gmm)]
    assert list(lines) == ["SFA, 2 run(s)", "GMM, 1 run(s)"]
    assert lines["SFA, 2 run(s)"][0] == [*range(1, 7)]
    assert np.allclose(lines["SFA, 2 run(s)"][1], (auc[0] + auc[1]) / 2, equal_nan=True)
    assert np.allclose(lines["GMM, 1 run(s)"][1], auc[2], equal_nan=True)
    assert axes.get_ylabel() == "AUC of the clean probabilities" and axes.get_xlim() == (0, 7)
    assert all(to_rgb(line.get_color()) == above[line.get_label()] for line in axes.get_lines())


def test_a_method_ends_where_its_shortest_run_does(tmp_path, drawn):
    run, gmm = write_finished(tmp_path / "run", counts=[9, 5]), tmp_path / "gmm"
    short = write_finished(tmp_path / "short", counts=[9, 5], seed=2, epochs=4)
    write_finished(gmm, "GMM", counts=[9, 5], selection="gmm", seed=3)
    marks = draw(drawn, run, short, gmm)["Accuracy by class after epochs 4 to 6"].collections
    expected = np.mean([log(folder)["class_0"][3] for folder in (run, short)])
    heights = [points.get_offsets()[0][1] for points in marks if len(points.get_offsets())]
    assert np.allclose(heights, [expected, log(gmm)["class_0"][5]])


def test_webvision_has_no_true_labels_and_selects_after_every_epoch(tmp_path, drawn):
    run = write_webvision(tmp_path / "a")
    panels = draw(drawn, run)
    assert lines_of(panels["Test accuracy: webvision, 7 classes"])["end of the warm-up"][0] == [1.5] * 2
    for title, axes in histograms(panels).items():
        ((color, heights),) = bars(axes).items()
        assert sum(heights) == int(title.split()[2]) and color == to_rgb("tab:gray")
    labels = [text.get_text() for text in drawn[0].subfigs[1].legends[0].get_texts()]
    assert labels == ["truth unknown", "selected above 0.5"]
    assert panels[PATHS].get_title().endswith("\nepochs 1 to 3")
    ((epochs, values),) = lines_of(panels[SELECTION]).values()
    assert epochs == [1, 2, 3] and panels[SELECTION].get_ylabel() == "samples selected"
    assert np.allclose(values, log(run)["net1_selected"])


def test_runs_give_the_panels_that_they_have(run, tmp_path, drawn):
    gmm = write_finished(tmp_path / "gmm", "GMM", counts=[4, 2], selection="gmm")
    assert list(draw(drawn, gmm))[-3:] == ["class 1: 2 samples", CLASSES, SELECTION]
    none = write_finished(tmp_path / "none", "no selection", selection="none")
    assert list(draw(drawn, none))[1:] == [CLASSES]
    baseline = write_run(tmp_path / "ce", "CE")
    assert list(draw(drawn, baseline)) == ["Test accuracy: digits, imbalance 10"]
    for name in ("result.json", "clean_probability.npz", "centroids.npz"):
        (run / name).unlink()
    other = write_run(tmp_path / "other", "CE", cell={**CELL, "noise_rate": 0.2})
    assert list(draw(drawn, other, run))[-2:] == [CLASSES, SELECTION], "of the first run that is no baseline"


def test_the_figure_is_written_whole_and_the_run_left_as_it_is(tmp_path, monkeypatch, capsys):
    run = write_finished(tmp_path / "run", counts=[4, 2])
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    monkeypatch.chdir(tmp_path)
    visualize.main([str(run)])
    with Image.open(tmp_path / "sfa.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert capsys.readouterr().out == "figure in sfa.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "sfa.png"]
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_runs_that_do_not_belong_together_are_refused(run, tmp_path, capsys):
    three = write_finished(tmp_path / "three", counts=[3, 2, 1])
    line = refused(capsys, visualize.main, run, write_run(tmp_path / "ce", "CE"), three)
    assert f"{three} has 3 classes, the runs before it have 10: other data" in line
    second = write_finished(tmp_path / "second", "GMM", selection="gmm")  # a run that is not shown
    (second / "noise.json").unlink()
    assert str(second / "noise.json") in refused(capsys, visualize.main, run, second)


SAMPLES = sum(COUNTS)
BASELINE, HEAD = b'{"paper": "sfa", "method": "CE", "arguments": {}', b"epoch,test_accuracy"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("args.json", BASELINE + b"}", "it has no cell"),
        ("args.json", BASELINE + b', "cell": {}}', "it has no noise_type"),
        ("log.csv", None, "run is no run directory: log.csv is missing"),
        ("log.csv", HEAD + b"\n", "log.csv has no epoch yet"),
        ("log.csv", HEAD + b",class_0,class_2\n1,50,1,2\n", "log.csv is damaged: it has no class_1"),
        ("log.csv", HEAD + b",class_0\n1,50,much\n", "log.csv is damaged (could not convert"),
        ("noise.json", None, "noise.json is damaged ([Errno 2]"),
        ("noise.json", b"{}", "noise.json is damaged: it has no observed_counts"),
        ("noise.json", b'{"observed_counts": [1, 2]}', "are not of the 10 classes in log.csv"),
        ("clean_probability.npz", b"half", "clean_probability.npz is damaged"),
        ("centroids.npz", b"half", "centroids.npz is damaged"),
        ("clean_probability.npz", {"observed": None}, "it has no observed"),
        ("clean_probability.npz", {"net1": np.ones(3)}, f"not of the {SAMPLES} samples in noise.json"),
        ("clean_probability.npz", {"clean": np.ones(3, int)}, f"not of the {SAMPLES} samples"),
        ("clean_probability.npz", {"net1": np.full(SAMPLES, 1.5)}, "net1 is not probabilities"),
        ("clean_probability.npz", {"net1": np.full(SAMPLES, -0.5)}, "net1 is not probabilities"),
        ("clean_probability.npz", {"observed": np.zeros(SAMPLES)}, "observed or clean is not labels"),
        ("clean_probability.npz", {"observed": np.full(SAMPLES, -1)}, "observed or clean is not labels"),
        ("clean_probability.npz", {"clean": np.full(SAMPLES, 10)}, "observed or clean is not labels"),
        ("clean_probability.npz", {"observed": np.zeros(SAMPLES, int)}, "not of the labels that noise.json"),
        ("centroids.npz", {"net1": None, "net3": np.ones(1)}, "it has no net1"),
        ("centroids.npz", {"net1": np.ones((4, 9, 16))}, "of shape (4, 9, 16) is not centroids"),
        ("centroids.npz", {"net1": np.ones((4, 10, 1))}, "of shape (4, 10, 1) is not centroids"),
        ("centroids.npz", {"net1": np.ones((7, 10, 16))}, "7 selections in 6 epochs"),
        ("centroids.npz", {"net1": np.ones((0, 10, 16))}, "0 selections in 6 epochs"),
        ("centroids.npz", {"net1": np.full((4, 10, 16), np.inf)}, "net1 is not finite numbers"),
        ("args.json", {"p_threshold": "much"}, "args.json is damaged (could not convert"),
        ("args.json", {"warm_up": "much"}, "args.json is damaged (could not convert"),
        ("args.json", {"p_threshold": None}, "args.json is damaged: it has no p_threshold"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(name, content, line, run, tmp_path, capsys):
    assert_refused(visualize, run, name, content, line, tmp_path, capsys)


def test_a_figure_that_cannot_be_written_leaves_nothing_behind(tmp_path, capsys):
    baseline = write_run(tmp_path / "ce", "CE")
    (tmp_path / "figure.png").mkdir()
    line = refused(capsys, visualize.main, baseline, "--out", tmp_path / "figure.png")
    assert "figure.png cannot be written (Is a directory)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ce", "figure.png"]
