"""The figure of Manifold DivideMix's runs: curves by setting, what was removed, where it lies; refusals in one line."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from manifold_dividemix import visualize
from manifold_dividemix.visualize import read_run
from tests import figures
from tests.figures import assert_refused, change
from tests.lines import refused

DIGITS = {"dataset": "digits", "corruption": "photographs", "ood_ratio": 0.2}
DIGITS |= {"noise_type": "sym", "noise_ratio": 0.25}
MINI_IMAGENET = {"dataset": "mini_imagenet", "noise_type": "red", "noise_ratio": 0.4, "img_size": 32}
TRAINING = {"epochs": 8, "warmup_epoch": 3, "interval": 2, "clustering": True, "selection": "gmm"}
TRAINING |= {"remove_ood": 0.05, "p_threshold": 0.3, "seed": 1}
N, SHOWN = 60, 40
COLUMNS = "epoch,test_accuracy,removed,removal_precision,removal_recall"


def write_run(folder, method, values, column="test_accuracy", **arguments):
    """A run directory as far as curves are read of it."""
    return figures.write_run(folder, "manifold_dividemix", method, values, column, **DIGITS | arguments)


def outliers(seed, removed, split):
    """What train_semisup writes at one removal."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.5, 1, N).astype(np.float32)
    shown = np.sort(rng.permutation(N)[:SHOWN])
    arrays = {"score": score, "kept": score > np.sort(score)[removed - 1], "shown": shown}
    arrays |= {"embedding": rng.normal(size=(SHOWN, 8)).astype(np.float16), "loss": score}
    return arrays | ({"clean_probability": rng.uniform(size=N)} if split else {})


def write_finished(folder, method="Manifold DivideMix", known=True, last=True, **arguments):
    """A finished run of eight epochs. known: whether true labels are; last: whether there was a second removal."""
    data = {} if known else MINI_IMAGENET
    write_run(folder, method, [50], **{**TRAINING, **data, **arguments})
    rng = np.random.default_rng(7)
    clean = rng.integers(0, 10, N)
    samples = {"observed": np.where(np.arange(N) % 4 == 0, (clean + 1) % 10, clean)}
    samples |= {"clean": clean, "ood": rng.permutation(N) < N // 5} if known else {}
    np.savez(folder / "samples.npz", **samples)
    np.savez(folder / "outliers_first.npz", **outliers(1, 6, split=False))
    rows = [f"{epoch},{50 + epoch},6,{'0.5,0.25' if known else ','}" for epoch in range(1, 9)]
    if last:
        np.savez(folder / "outliers_last.npz", **outliers(2, 12, split=True))
        rows[4:] = [f"{epoch},{50 + epoch},12,{',0.75' if known else ','}" for epoch in range(5, 9)]
    (folder / "log.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    (folder / "result.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    return write_finished(tmp_path / "run")


def draw(drawn, *words):
    """The panels that were drawn, by the first line of their titles."""
    visualize.main([*map(str, words), "--projection", "pca", "--out", "figure.png"])
    return {axes.get_title().split("\n")[0]: axes for axes in drawn[-1].axes if axes.axison}


@pytest.mark.parametrize(
    ("arguments", "images", "noise"),
    [
        (DIGITS, "digits with 20 % photographs", "25 % symmetric noise"),
        ({"noise_type": "asym", "noise_ratio": 0.125}, "digits with 20 % photographs", "12.5 % asymmetric noise"),
        ({"noise_type": "superclass", "ood_ratio": 0}, "digits", "25 % superclass noise"),
        ({"noise_type": "no"}, "digits with 20 % photographs", "no label noise"),
        ({"noise_ratio": 0}, "digits with 20 % photographs", "no label noise"),
        ({"noise_file": "own.npy"}, "digits with 20 % photographs", "given labels"),
        (MINI_IMAGENET, "mini_imagenet at 32 pixels", "40 % red noise"),
    ],
)  # fmt: skip
def test_a_setting_is_named_by_images_and_noise(arguments, images, noise, tmp_path):
    run = read_run(write_run(tmp_path / "run", "CE", [50], **arguments))
    assert (visualize.images(run), visualize.noise(run)) == (images, noise)


def test_pretraining_is_named_by_its_images_and_of_mini_imagenet_by_its_list(tmp_path):
    for name, arguments, method in (
        ("a", {}, "SimCLR on digits with 20 % photographs"),
        ("b", MINI_IMAGENET, "SimCLR on mini_imagenet at 32 pixels, 40 % red noise"),
    ):
        run = read_run(write_run(tmp_path / name, "SimCLR", ["", 50], "knn_accuracy", **arguments))
        assert (run.curve.method, run.pretraining, run.epochs.tolist()) == (method, True, [2])


def test_the_first_finished_run_with_two_removals_is_shown(run, tmp_path):
    unfinished = write_finished(tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    pretraining = write_run(tmp_path / "pretraining", "SimCLR", [50], "knn_accuracy")
    all_kept = write_finished(tmp_path / "all_kept", remove_ood=0)
    one_look, second = write_finished(tmp_path / "one_look", last=False), write_finished(tmp_path / "second")
    runs = list(map(read_run, (pretraining, unfinished, all_kept, one_look, run, second)))
    order = []
    while (shown := visualize.run_to_show(runs)) is not None:
        order.append(shown.folder.name)
        runs.remove(shown)
    assert order == ["run", "second", "one_look", "all_kept"]


@pytest.mark.parametrize(("clustering", "epoch"), [(True, 7), (False, 4)])
def test_a_removal_is_named_by_its_epoch(clustering, epoch, tmp_path):
    run = read_run(write_finished(tmp_path / "run", clustering=clustering))
    first, last = visualize.read_removals(run, N)
    assert (first.title, last.title) == ("first look (epoch 1)", f"last look (epoch {epoch})")
    assert (first.kept.sum(), last.kept.sum()) == (N - 6, N - 12)


def test_samples_are_of_three_kinds_without_empty_ones():
    samples = {"observed": np.array([0, 1, 2, 3]), "clean": np.array([0, 1, 1, 1])}
    for ood, wanted in (
        ([1, 3], {"clean": [0], "noisy label, in distribution": [2], "out of distribution": [1, 3]}),
        ([], {"clean": [0, 1], "noisy label, in distribution": [2, 3]}),
    ):
        samples["ood"] = np.isin(np.arange(4), ood)
        kinds = visualize.make_kinds(samples)
        assert {kind.name: np.flatnonzero(kind.members).tolist() for kind in kinds} == wanted
    (everything,) = visualize.make_kinds({"observed": samples["observed"]})
    assert everything.members.all()


@pytest.mark.parametrize("projection", ["tsne", "pca"])
def test_a_projection_is_the_same_each_time_and_keeps_neighbours(projection):
    """Two directions, at lengths that do not matter to the outlier score; few samples, and equal ones."""
    rng = np.random.default_rng(0)
    side = np.arange(40) % 2
    directions = np.eye(8)[side] + rng.normal(scale=0.05, size=(40, 8))
    embedding = (directions * rng.uniform(0.1, 10, (40, 1))).astype(np.float32)
    points = visualize.project(embedding, projection)
    assert np.array_equal(points, visualize.project(embedding, projection))
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag(np.full(40, np.inf))
    assert (side[distances.argmin(axis=1)] == side).all()
    for size in (2, 3, 5):
        points = visualize.project(embedding[:size], projection)
        assert points.shape == (size, 2) and np.isfinite(points).all()
        assert len(np.unique(points, axis=0)) == size
    assert visualize.project(np.full((20, 8), 3, np.float32), projection).tolist() == [[0, 0]] * 20


def filled(axes):
    """The counts of each filled histogram, by colour."""
    return {
        to_rgb(bars[0].get_facecolor()): sum(bar.get_height() for bar in bars) for bars in axes.containers
    }


@pytest.fixture
def truth(run):
    """Which samples are of each kind, by colour; which are OOD."""
    with np.load(run / "samples.npz") as file:
        right, ood = file["observed"] == file["clean"], file["ood"]
    members = right & ~ood, ~right & ~ood, ood
    colors = "tab:blue", "tab:orange", visualize.COLORS["out of distribution"]
    return dict(zip(map(to_rgb, colors), members, strict=True)), ood


def test_scores_and_clean_probabilities_are_drawn_by_kind(run, drawn, truth):
    kinds, ood = truth
    panels = draw(drawn, run)
    counts = {color: members.sum() for color, members in kinds.items()}
    for name, title in (("first", "first look (epoch 1)"), ("last", "last look (epoch 7)")):
        axes = panels[f"Outlier score, {title}"]
        with np.load(run / f"outliers_{name}.npz") as file:
            score, kept, clean = file["score"], file["kept"], file.get("clean_probability")
        assert filled(axes) == counts
        (line,) = axes.get_lines()
        assert line.get_xdata()[0] == score[~kept].max()
        assert line.get_label() == f"up to here {(~kept).sum()} removed"
        pairs = score[ood][:, None] < score[~ood]  # the area under the curve, by its definition
        assert axes.get_title().split("\n")[1] == f"AUROC against true OOD {pairs.mean():.3f}"
    axes = panels["Clean probability, last look (epoch 7)"]
    assert filled(axes) == counts and axes.get_lines()[0].get_xdata()[0] == 0.3
    right, wrong, _ = kinds.values()
    area = (clean[right][:, None] > clean[wrong]).mean()
    assert axes.get_title().split("\n")[1] == f"AUC {area:.3f} of clean against noisy labels"
    (legend,) = drawn[0].subfigs[1].legends
    names = ("clean", "noisy label, in distribution", "out of distribution")
    numbers = [f"{name}: {count}" for name, count in zip(names, counts.values(), strict=True)]
    assert [text.get_text() for text in legend.get_texts()] == [*numbers, "kept", "removed"]


def test_embeddings_are_coloured_by_kind_and_precision_stands_beside_chance(run, drawn, truth):
    kinds, _ = truth
    panels = draw(drawn, run)
    axes = panels["Embeddings, last look (epoch 7)"]
    assert axes.get_title().split("\n")[1] == f"{SHOWN} of {N} samples"
    with np.load(run / "outliers_last.npz") as file:
        kept, shown, embedding = file["kept"], file["shown"], file["embedding"].astype(np.float32)
    points = visualize.project(embedding, "pca")
    markers = [marks.get_paths()[0].vertices for marks in axes.collections]
    assert not np.array_equal(*markers)  # removed ones have another
    for marks, chosen in zip(axes.collections, (kept[shown], ~kept[shown]), strict=True):
        assert 0 < chosen.sum() == len(marks.get_offsets())
        assert np.allclose(marks.get_offsets(), points[chosen])
        shades = np.broadcast_to(marks.get_facecolors(), (chosen.sum(), 4))
        expected = [next(c for c, members in kinds.items() if members[i]) for i in shown[chosen]]
        assert np.allclose(shades[:, :3], expected)
    lines = {line.get_label(): line for line in panels["Removal against true OOD"].get_lines()}
    assert lines["precision"].get_xdata().tolist() == [*range(1, 9)]
    assert np.allclose(lines["precision"].get_ydata(), [50] * 4 + [np.nan] * 4, equal_nan=True)
    assert lines["recall"].get_ydata().tolist() == [25] * 4 + [75] * 4
    assert np.allclose(lines["precision at random: OOD ratio 20 %"].get_ydata(), 20)
    assert np.allclose(lines["recall at random"].get_ydata(), [100 * 6 / N] * 4 + [100 * 12 / N] * 4)


def test_if_true_labels_are_unknown_there_is_one_colour_and_no_precision(tmp_path, drawn):
    panels = draw(drawn, write_finished(tmp_path / "run", known=False))
    first, last = "first look (epoch 1)", "last look (epoch 7)"
    scores = [f"Outlier score, {first}", f"Outlier score, {last}", f"Clean probability, {last}"]
    assert list(panels)[1:] == [*scores, f"Embeddings, {first}", f"Embeddings, {last}"]
    for name in scores:
        assert filled(panels[name]) == {to_rgb("tab:blue"): N} and "AU" not in panels[name].get_title()
    for points in panels[f"Embeddings, {last}"].collections:
        assert np.allclose(points.get_facecolors()[:, :3], to_rgb("tab:blue"))


def test_a_run_without_splits_has_one_removal_and_a_split_without_warm_up_is_the_first(tmp_path, drawn):
    panels = draw(drawn, write_finished(tmp_path / "a", "SCE", last=False, selection="none"))
    names = ["Outlier score, first look (epoch 1)", "Embeddings, first look (epoch 1)"]
    assert list(panels)[1:] == [*names, "Removal against true OOD"]
    folder = write_finished(tmp_path / "b", last=False, warmup_epoch=0, clustering=False)
    np.savez(folder / "outliers_first.npz", **outliers(1, 6, split=True))
    assert "Clean probability, first look (epoch 1)" in draw(drawn, folder)


def test_without_ood_images_there_is_no_precision_and_without_removal_no_line(run, drawn):
    with np.load(run / "samples.npz") as file:
        change(run / "samples.npz", ood=np.zeros_like(file["ood"]))
    change(run / "outliers_first.npz", kept=np.ones(N, bool))
    panels = draw(drawn, run)
    assert "Removal against true OOD" not in panels
    first = panels["Outlier score, first look (epoch 1)"]
    assert first.get_title() == "Outlier score, first look (epoch 1)" and not first.get_lines()


def test_the_figure_is_written_whole_with_t_sne_by_default(run, tmp_path, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    monkeypatch.chdir(tmp_path)
    write, figures_ = visualize.figures.write, []
    monkeypatch.setattr(visualize.figures, "write", lambda *given: figures_.append(given[0]) or write(*given))
    visualize.main([str(run)])
    with Image.open(tmp_path / "manifold_dividemix.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert {axes.get_xlabel() for axes in figures_[0].axes if axes.get_title()[:3] == "Emb"} == {"t-SNE 1"}
    assert capsys.readouterr().out == "figure in manifold_dividemix.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifold_dividemix.png", "run"]
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}, "the run is left as it is"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("args.json", b'{"paper": "manifold_dividemix", "method": "CE", "arguments": {}}', "it has no dataset"),
        ("log.csv", b"epoch,test_accuracy\n1,50\n", "log.csv is damaged: it has no removed"),
        ("log.csv", f"{COLUMNS}\n1,50,6,much,0.5\n".encode(), "log.csv is damaged (could not convert"),
        ("samples.npz", None, "samples.npz is damaged"),
        ("outliers_first.npz", b"half", "outliers_first.npz is damaged"),
        ("outliers_last.npz", b"half", "outliers_last.npz is damaged"),
        ("samples.npz", {"observed": None}, "it has no observed"),
        ("samples.npz", {"ood": None}, "observed, clean of shapes"),
        ("samples.npz", {"clean": np.zeros(3, int)}, "of shapes"),
        ("samples.npz", {"ood": np.zeros(N, int)}, "ood is not boolean"),
        ("outliers_last.npz", {"score": None}, "it has no score"),
        ("outliers_last.npz", {"score": np.full(N, np.nan)}, "finite"),
        ("outliers_last.npz", {"score": np.full(N, "a")}, "finite numbers"),
        ("outliers_last.npz", {"clean_probability": np.full(N, np.inf)}, "finite"),
        ("outliers_last.npz", {"kept": np.ones(N - 1, bool)}, f"it is not of the {N} samples"),
        ("outliers_last.npz", {"kept": np.ones(N)}, "of another kind"),
        ("outliers_last.npz", {"shown": np.arange(SHOWN) * 1.0}, "of another kind"),
        ("outliers_last.npz", {"embedding": np.ones(SHOWN)}, "of another kind"),
        ("outliers_last.npz", {"shown": np.arange(SHOWN - 1)}, "not the positions"),
        ("outliers_last.npz", {"shown": np.arange(SHOWN) + N - SHOWN + 1}, "not the positions"),
        ("args.json", {"p_threshold": None}, "args.json is damaged: it has no p_threshold"),
        ("args.json", {"warmup_epoch": None}, "args.json is damaged: it has no warmup_epoch"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_refused_in_one_line(name, content, line, run, tmp_path, capsys):
    assert_refused(visualize, run, name, content, line, tmp_path, capsys)


def test_another_projection_is_refused_before_anything_is_read(tmp_path, capsys):
    words = tmp_path / "nosuch", "--projection", "umap"
    assert "--projection" in refused(capsys, visualize.main, *words)
