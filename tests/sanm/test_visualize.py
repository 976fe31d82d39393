"""The figure of SANM's runs: curves by setting, the split, and some samples with their masks; refusals in one line."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.gpu.augment import normalise
from common.runs import cli
from common.runs.cli import UserError
from sanm import Train_cifar, visualize
from sanm.masking import MaskRule, draw_masks, mask, quantised_activation
from sanm.networks import make_network
from sanm.visualize import figures, read_run

SMALL = "--base dividemix --dataset digits --limit_train 64 --batch_size 16 --num_epochs 2 --warm_up 1 --seed 1 --device cpu"


@pytest.fixture(scope="module")
def sanm_run(tmp_path_factory):
    """A finished run with masks that stand with their centres at the extrema."""
    folder = tmp_path_factory.mktemp("visualize") / "sanm"
    Train_cifar.main([*SMALL.split(), "--mask-anchor", "centre", "--out", str(folder)])
    return folder


@pytest.fixture
def run(sanm_run, tmp_path):
    """A copy of it to be changed."""
    return shutil.copytree(sanm_run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))


def describe(folder, method=None, **arguments):
    """Change what args.json says."""
    description = json.loads((folder / "args.json").read_text())
    description["method"] = method or description["method"]
    description["arguments"] |= arguments
    (folder / "args.json").write_text(json.dumps(description))
    return folder


def write_run(folder, method, values, column="test_accuracy", **arguments):
    """A run directory as far as curves are read of it."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"method": method, "arguments": arguments}))
    rows = [f"{epoch},{value}" for epoch, value in enumerate(values, start=1)]
    (folder / "log.csv").write_text("\n".join([f"epoch,{column}", *rows]) + "\n")
    return folder


def write_pretraining(folder, values, dataset="digits", **arguments):
    return write_run(folder, "SimCLR", values, "knn_accuracy", dataset=dataset, **arguments)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    written = []
    monkeypatch.setattr(visualize.figures, "write", lambda figure, out: written.append(figure))
    yield written
    figures.plt.close("all")


def refused(capsys, *words) -> str:
    """The one line that a call ends in, with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(visualize.main, list(map(str, words)))
    assert stop.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines(keepends=True) if not line.startswith("warning")
    ]
    assert len(lines) == 1
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", lines[0])
    return lines[0]


# what is read -----------------------------------------------------------------------------------------------------------


def test_a_run_is_read(sanm_run):
    run = read_run(sanm_run)
    assert (run.curve.method, run.pretraining) == ("SANM(DivideMix)", False)
    assert run.epochs.tolist() == [1, 2, 3]
    assert ((run.curve.accuracy >= 0) & (run.curve.accuracy <= 100)).all()


def test_of_a_pretraining_run_the_epochs_with_a_measurement_are_read(tmp_path):
    run = read_run(write_pretraining(tmp_path / "run", ["", 50, "", 60.5]))
    assert (run.curve.method, run.pretraining) == ("SimCLR on digits", True)
    assert run.epochs.tolist() == [2, 4]
    assert run.curve.accuracy.tolist() == [50, 60.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": "cifar10", "noise_mode": "sym", "r": 0.8}, "cifar10, symmetric noise, r = 0.8"),
        ({"dataset": "cifar100", "noise_mode": "asym", "r": 0.4}, "cifar100, asymmetric noise, r = 0.4"),
        ({"dataset": "own", "noise_mode": "given", "r": 0.5}, "own, given labels"),
        ({"num_batches": 15625}, "Clothing1M"),
    ],
)
def test_a_setting_is_named_by_data_and_noise(arguments, words, tmp_path):
    assert visualize.setting(read_run(write_run(tmp_path / "run", "CE", [50], **arguments))) == words


def test_the_first_run_with_masks_is_shown_else_the_first_with_a_split(run, tmp_path):
    plain = describe(shutil.copytree(run, tmp_path / "plain"), "DivideMix", masking="none")
    weightless = shutil.copytree(run, tmp_path / "weightless")
    for path in weightless.glob("checkpoint*"):
        path.unlink()
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "clean_probability.npz").unlink()
    pretraining = write_pretraining(tmp_path / "pretraining", [50])
    clothing = write_run(tmp_path / "clothing", "SANM(DivideMix)", [50], masking="adversarial")
    runs = {
        folder.name: read_run(folder)
        for folder in (pretraining, clothing, unfinished, plain, weightless, run)
    }
    assert visualize.run_to_show(list(runs.values())) is runs.pop("run")
    assert visualize.run_to_show(list(runs.values())) is runs["plain"]
    assert not visualize.has_masks(runs.pop("plain"))
    assert visualize.run_to_show(list(runs.values())) is runs.pop("weightless")
    assert visualize.run_to_show(list(runs.values())) is None


# the samples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong", "count", "expected"),
    [
        (50, 50, 6, (3, 3)),
        (50, 50, 5, (3, 2)),
        (50, 1, 6, (5, 1)),
        (2, 50, 6, (2, 4)),
        (50, 0, 4, (4, 0)),
        (0, 50, 1, (0, 1)),
        (2, 2, 4, (2, 2)),
    ],
)
def test_half_of_the_samples_are_rightly_labelled_as_far_as_there_are_such(right, wrong, count, expected):
    is_right = np.random.default_rng(5).permutation(np.arange(right + wrong) < right)
    chosen = visualize.choose(is_right, count)
    assert len(set(chosen.tolist())) == count
    assert is_right[chosen].tolist() == [True] * expected[0] + [False] * expected[1]
    parts = chosen[: expected[0]], chosen[expected[0] :]
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(chosen, visualize.choose(is_right, count)), "the same at every call"


def test_the_masks_are_those_of_the_method_on_the_plain_training_images(sanm_run):
    """Rebuilt from the files of the run: weights, labels, the peer's clean probabilities, and the flags of the masks."""
    run, split = read_run(sanm_run), visualize.read_split(sanm_run)
    shown = visualize.read_samples(run, split, 6, None)

    data, index, observed = (
        datasets.load("digits"),
        *(np.load(sanm_run / f"{name}.npy") for name in ("train_index", "noisy_labels")),
    )
    chosen = visualize.choose(observed == split["clean"], 6)
    assert shown.observed.tolist() == observed[chosen].tolist()
    assert shown.clean.tolist() == data.train.labels[index[chosen]].tolist()
    assert shown.probability.tolist() == split["net2"][chosen].tolist()
    assert (shown.observed == shown.clean).tolist() == [True] * 3 + [False] * 3

    pixels = torch.from_numpy(data.train.images[index[chosen]]).permute(0, 3, 1, 2)
    images = normalise(pixels, torch.tensor(data.mean), torch.tensor(data.std))
    network = make_network("dividemix", 10, channels=1, size=8)
    state = torch.load(sanm_run / "checkpoint.pt", weights_only=True)["state"]
    network.load_state_dict(state["nets"][0])
    network.eval()
    rule = MaskRule(0.02, 0.07, 0.03, "centre", False)
    draws = draw_masks(6, 1, rule, torch.Generator().manual_seed(visualize.SEED))
    clean = torch.from_numpy(shown.probability)
    targets = torch.nn.functional.one_hot(torch.from_numpy(shown.observed), 10)
    with torch.no_grad():
        maps = network.encoder(images)
        masked = mask(images, maps, clean, targets.double(), draws, rule)
        reconstruction = network(images, masked.at_max).reconstruction
    views = shown.views
    assert torch.equal(views.image, images)
    assert torch.equal(views.activation, quantised_activation(maps, 8, 8))
    assert torch.equal(views.at_max, masked.at_max)
    assert torch.equal(views.at_min, masked.at_min)
    assert torch.allclose(views.reconstruction, reconstruction, atol=1e-6)
    assert torch.allclose(views.ratio, draws[:, 0] + 0.03 * (1 - clean))


def test_a_picture_is_denormalised_and_clipped():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    pixels = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    normalised = (pixels - mean[:, None, None]) / std[:, None, None]
    drawn = visualize.picture(normalised, mean, std)
    assert drawn.shape == (4, 5, 3)
    assert np.allclose(drawn, pixels.permute(1, 2, 0), atol=1e-6)
    grey = visualize.picture(torch.tensor([[[-9.0, 9.0]]]), mean[:1], std[:1])
    assert grey.tolist() == [[0, 1]]


def test_the_frame_is_around_what_was_painted_over():
    axes = figures.plt.figure().subplots()
    before = torch.zeros(3, 8, 8)
    after = before.clone()
    after[:, 2:5, 6:8] = 1
    visualize.outline(axes, before, before, "red")
    assert not axes.patches
    visualize.outline(axes, before, after, "red")
    (frame,) = axes.patches
    figures.plt.close("all")
    assert tuple(map(float, (*frame.get_xy(), frame.get_width(), frame.get_height()))) == (5.5, 1.5, 2, 3)


def test_samples_of_one_kind_fill_both_blocks(sanm_run):
    shown = visualize.read_samples(read_run(sanm_run), visualize.read_split(sanm_run), 5, None)
    titles = [(text, samples.tolist()) for text, _, samples in visualize.sample_blocks(shown)]
    assert titles == [("rightly labelled", [0, 1, 2]), ("wrongly labelled", [3, 4])]
    alike = shown._replace(observed=shown.clean)
    titles = [(text, samples.tolist()) for text, _, samples in visualize.sample_blocks(alike)]
    assert titles == [("rightly labelled", [0, 1, 2]), ("rightly labelled", [3, 4])]


# the figure -------------------------------------------------------------------------------------------------------------


def test_the_curves_have_a_panel_per_setting_and_a_method_one_colour(tmp_path, drawn):
    sym, asym = ({"dataset": "cifar10", "noise_mode": mode, "r": 0.4} for mode in ("sym", "asym"))
    runs = [
        write_run(tmp_path / "a", "CE", [10, 20], **sym, selection="none", warm_up=10),
        write_run(tmp_path / "b", "SANM(C2D)", [30, 40], **sym, selection="gmm", warm_up=1),
        write_run(tmp_path / "c", "SANM(C2D)", [50, 80], **sym, selection="gmm", warm_up=1),
        write_run(tmp_path / "d", "SANM(C2D)", [1, 2], **asym, selection="gmm"),
        write_pretraining(tmp_path / "e", ["", 50, "", 60]),
        write_pretraining(tmp_path / "f", ["", 70, 75, 90]),
        write_pretraining(tmp_path / "g", [20], dataset="cifar100"),
    ]
    visualize.main([*map(str, runs), "--out", str(tmp_path / "figure.png")])
    first, second, knn = drawn[0].axes
    assert first.get_title() == "Test accuracy: cifar10, symmetric noise, r = 0.4"
    assert second.get_title() == "Test accuracy: cifar10, asymmetric noise, r = 0.4"
    lines = {line.get_label(): line for line in first.get_lines()}
    assert lines["CE, 1 run(s)"].get_ydata().tolist() == [10, 20]
    assert lines["SANM(C2D), 2 run(s)"].get_ydata().tolist() == [40, 60]
    assert lines["end of the warm-up"].get_xdata()[0] == 1.5
    (alone,) = second.get_lines()
    assert alone.get_color() == lines["SANM(C2D), 2 run(s)"].get_color() != lines["CE, 1 run(s)"].get_color()
    measured = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in knn.get_lines()
    }
    assert measured == {
        "SimCLR on digits, 2 run(s)": ([2, 4], [60, 75]),
        "SimCLR on cifar100, 1 run(s)": ([1], [20]),
    }


def test_a_run_without_masks_gives_curves_and_histograms(run, tmp_path, drawn):
    describe(run, "DivideMix", masking="none")
    visualize.main([str(run), "--out", str(tmp_path / "figure.png")])
    curves, *histograms = drawn[0].axes
    assert curves.get_title().startswith("Test accuracy")
    split = visualize.read_split(run)
    right = split["observed"] == split["clean"]
    for number, axes in enumerate(histograms, start=1):
        report = (run / "log.csv").read_text().splitlines()
        last = dict(zip(report[0].split(","), report[-1].split(","), strict=True))
        assert f"AUC {float(last[f'net{number}_auc']):.3f}" in axes.get_title()
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert {f"truly clean: {right.sum()} images", "threshold 0.5"} <= set(labels)
    assert len(histograms) == 2


def test_the_figure_is_written_whole(sanm_run, tmp_path, monkeypatch, capsys):
    pretraining = write_pretraining(tmp_path / "pretraining", ["", 50])
    before = {path: path.stat().st_mtime_ns for path in sanm_run.iterdir()}
    monkeypatch.chdir(tmp_path)
    visualize.main([str(pretraining), str(sanm_run), "--samples", "3"])
    with Image.open(tmp_path / "sanm.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert capsys.readouterr().out == "figure in sanm.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretraining", "sanm.png"]
    assert before == {path: path.stat().st_mtime_ns for path in sanm_run.iterdir()}, (
        "the run is left as it is"
    )


def test_a_sample_has_five_panels_and_says_what_is_known_of_it(sanm_run, tmp_path, drawn):
    visualize.main([str(sanm_run), "--samples", "1", "--out", str(tmp_path / "figure.png")])
    samples = drawn[0].axes[3:]
    assert [axes.get_title() for axes in samples] == list(visualize.COLUMNS)
    shown = visualize.read_samples(read_run(sanm_run), visualize.read_split(sanm_run), 1, None)
    assert samples[0].get_ylabel() == (
        f"label {shown.observed[0]}, true {shown.clean[0]}\nclean prob. {shown.probability[0]:.2f}\n"
        f"mask ratio {100 * shown.views.ratio[0]:.1f} %"
    )


# mistakes ---------------------------------------------------------------------------------------------------------------


def test_what_is_no_run_directory_is_refused(run, tmp_path, capsys):
    assert "is no run directory: args.json is missing" in refused(capsys, tmp_path / "nosuch")
    assert "is no run directory: args.json is missing" in refused(capsys, run / "log.csv")
    assert "args.json is missing" in refused(capsys, tmp_path)
    (run / "log.csv").unlink()
    assert "log.csv is missing" in refused(capsys, run)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("args.json", b"{", "is damaged"),
        ("log.csv", b"epoch,loss\n1,0.5\n", "is damaged"),
        ("log.csv", b"epoch,knn_accuracy\n1,much\n", "is damaged"),
        ("log.csv", b"epoch,knn_accuracy\n1,\n", "has measured no kNN accuracy yet"),
        ("clean_probability.npz", b"half", "clean_probability.npz is damaged"),
        ("noisy_labels.npy", b"half", "noisy_labels.npy cannot be read"),
        ("train_index.npy", None, "train_index.npy cannot be read"),
        ("checkpoint.pt", b"half", "no checkpoint in it can be read"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(name, content, line, run, tmp_path, capsys):
    (run / "checkpoint.previous.pt").unlink()
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    message = refused(capsys, run, "--out", tmp_path / "figure.png")
    assert line in message
    assert str(run) in message
    assert not list(tmp_path.glob("*figure*"))


def test_arrays_of_different_lengths_are_refused(run):
    np.savez(run / "clean_probability.npz", net1=np.ones(3), net2=np.ones(2), observed=[1], clean=[1])
    with pytest.raises(UserError, match=r"clean_probability\.npz is damaged: its arrays are of shapes"):
        visualize.read_split(run)


def test_a_checkpoint_of_another_network_is_refused(run, capsys):
    describe(run, base="c2d")
    assert "checkpoint.pt does not fit the network for digits" in refused(capsys, run)


def test_a_flag_that_is_missing_is_named(run, capsys):
    description = json.loads((run / "args.json").read_text())
    del description["arguments"]["mask_anchor"]
    (run / "args.json").write_text(json.dumps(description))
    assert "args.json is damaged: it has no mask_anchor" in refused(capsys, run)


def test_data_that_are_not_there_are_asked_for(run, tmp_path, capsys):
    describe(run, dataset="mnist", data_path=str(tmp_path / "nosuch"))
    line = refused(capsys, run)
    assert "mnist not found in " in line
    assert f"or say where the training images of {run} are with --data_path DIR" in line


def test_the_data_may_have_moved_but_must_be_the_same(run, tmp_path, capsys):
    digits = datasets.load("digits")
    arrays = {f"{part}_images": getattr(digits, part).images for part in ("train", "test")}
    arrays |= {f"{part}_labels": getattr(digits, part).labels.copy() for part in ("train", "test")}
    np.savez(tmp_path / "own.npz", **arrays)
    describe(run, dataset="own", data_path=str(tmp_path / "nosuch"))
    moved, split = read_run(run), visualize.read_split(run)
    shown = visualize.read_samples(moved, split, 4, str(tmp_path))
    assert len(shown.observed) == 4

    arrays["train_labels"][np.load(run / "train_index.npy")[0]] ^= 1
    np.savez(tmp_path / "own.npz", **arrays)
    assert "was not trained on the own that is here" in refused(capsys, run, "--data_path", tmp_path)


@pytest.mark.parametrize("flags", [["--out", "figure.gif"], ["--samples", "0"]])
def test_flags_that_make_no_sense_are_refused_before_anything_is_read(flags, tmp_path, capsys):
    assert flags[0] in refused(capsys, tmp_path / "nosuch", *flags)
