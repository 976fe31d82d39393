"""The figure of SANM's runs: curves by setting, the split, and some samples with their masks; refusals in one line."""

import shutil

import numpy as np
import pytest
import torch

from common import datasets
from common.gpu.augment import normalise
from sanm import Train_cifar, visualize
from sanm.choices import MaskRule
from sanm.masking import draw_masks, mask, quantised_activation
from sanm.networks import make_network
from sanm.visualize import figures, read_run
from tests.figures import assert_refused, change_json, write_run
from tests.lines import refused

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


def test_the_first_run_with_masks_is_shown_else_the_first_with_a_split(run, tmp_path):
    folders = [write_run(tmp_path / "pretraining", "sanm", "SimCLR", [50], "knn_accuracy", dataset="digits")]
    folders.append(write_run(tmp_path / "clothing", "sanm", "SANM(DivideMix)", [50], masking="adversarial"))
    folders += [shutil.copytree(run, tmp_path / name) for name in ("unfinished", "plain", "weightless")]
    (tmp_path / "unfinished" / "clean_probability.npz").unlink()
    change_json(tmp_path / "plain" / "args.json", masking="none")
    for path in (tmp_path / "weightless").glob("checkpoint*"):
        path.unlink()
    runs = [read_run(folder) for folder in (*folders, run)]
    assert visualize.run_to_show(runs) is runs[-1] and visualize.has_masks(runs[-1])
    assert not visualize.has_masks(runs[3]) and not visualize.has_masks(runs[4])
    assert visualize.run_to_show(runs[:-1]) is runs[3] and visualize.run_to_show(runs[:3]) is None


@pytest.mark.parametrize(
    ("right", "wrong", "count", "expected"),
    [(50, 50, 5, (3, 2)), (50, 1, 6, (5, 1)), (2, 50, 6, (2, 4)), (0, 50, 1, (0, 1))],
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
    data = datasets.load("digits")
    index, observed = (np.load(sanm_run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    chosen = visualize.choose(observed == split["clean"], 6)
    assert shown.observed.tolist() == observed[chosen].tolist()
    assert shown.clean.tolist() == data.train.labels[index[chosen]].tolist()
    assert shown.probability.tolist() == split["net2"][chosen].tolist()
    pixels = torch.from_numpy(data.train.images[index[chosen]]).permute(0, 3, 1, 2)
    images = normalise(pixels, torch.tensor(data.mean), torch.tensor(data.std))
    network = make_network("dividemix", 10, channels=1, size=8)
    network.load_state_dict(torch.load(sanm_run / "checkpoint.pt", weights_only=True)["state"]["nets"][0])
    network.eval()
    rule = MaskRule(0.02, 0.07, 0.03, "centre", False)
    draws = draw_masks(6, 1, rule, torch.Generator().manual_seed(visualize.SEED))
    clean = torch.from_numpy(shown.probability)
    targets = torch.nn.functional.one_hot(torch.from_numpy(shown.observed), 10)
    with torch.no_grad():
        maps = network.encoder(images)
        masked = mask(images, maps, clean, targets.double(), draws, rule)
        reconstruction = network(images, masked.at_max).reconstruction
    expected = images, quantised_activation(maps, 8, 8), *masked[:2], reconstruction
    for found, wanted in zip(shown.views, (*expected, draws[:, 0] + 0.03 * (1 - clean)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_picture_is_denormalised_and_clipped():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    pixels = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    drawn = visualize.picture((pixels - mean[:, None, None]) / std[:, None, None], mean, std)
    assert np.allclose(drawn, pixels.permute(1, 2, 0), atol=1e-6)
    assert visualize.picture(torch.tensor([[[-9.0, 9.0]]]), mean[:1], std[:1]).tolist() == [[0, 1]]


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
    for samples, second in (
        (shown, "wrongly labelled"),
        (shown._replace(observed=shown.clean), "rightly labelled"),
    ):
        titles = [(text, numbers.tolist()) for text, _, numbers in visualize.sample_blocks(samples)]
        assert titles == [("rightly labelled", [0, 1, 2]), (second, [3, 4])]


def test_a_setting_is_named_by_data_and_labels(tmp_path, drawn):
    given = {"dataset": "own", "noise_mode": "given", "r": 0.5, "selection": "none"}
    runs = [write_run(tmp_path / "e", "sanm", "CE", [1, 2], **given)]
    runs += [write_run(tmp_path / "f", "sanm", "DivideMix", [1, 2], num_batches=3)]
    visualize.main([*map(str, runs), "--out", str(tmp_path / "figure.png")])
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    assert titles == ["Test accuracy: own, given labels", "Test accuracy: Clothing1M"]


def test_a_run_without_masks_gives_curves_and_histograms(run, tmp_path, drawn):
    change_json(run / "args.json", masking="none")
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


def test_a_run_with_masks_has_its_samples_in_five_panels_and_is_left_as_it_is(
    sanm_run, tmp_path, drawn, capsys
):
    before = {path: path.stat().st_mtime_ns for path in sanm_run.iterdir()}
    visualize.main([str(sanm_run), "--samples", "1", "--out", str(tmp_path / "figure.png")])
    samples = drawn[0].axes[3:]
    assert [axes.get_title() for axes in samples] == list(visualize.COLUMNS)
    shown = visualize.read_samples(read_run(sanm_run), visualize.read_split(sanm_run), 1, None)
    assert samples[0].get_ylabel() == (
        f"label {shown.observed[0]}, true {shown.clean[0]}\nclean prob. {shown.probability[0]:.2f}\n"
        f"mask ratio {100 * shown.views.ratio[0]:.1f} %"
    )
    assert capsys.readouterr().out == f"figure in {tmp_path / 'figure.png'}\n"
    assert before == {path: path.stat().st_mtime_ns for path in sanm_run.iterdir()}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("clean_probability.npz", b"half", "clean_probability.npz is damaged"),
        ("noisy_labels.npy", b"half", "noisy_labels.npy cannot be read"),
        ("train_index.npy", None, "train_index.npy cannot be read"),
        ("checkpoint.pt", b"half", "no checkpoint in it can be read"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(name, content, line, run, tmp_path, capsys):
    (run / "checkpoint.previous.pt").unlink()
    assert_refused(visualize, run, name, content, line, tmp_path, capsys)


def test_files_that_do_not_fit_each_other_are_named(run, tmp_path, capsys):
    change_json(run / "args.json", base="c2d")
    assert "checkpoint.pt does not fit the network for digits" in refused(capsys, visualize.main, run)
    moved = {"dataset": "mnist", "data_path": str(tmp_path / "nosuch")}
    change_json(run / "args.json", base="dividemix", **moved)
    line = refused(capsys, visualize.main, run)
    assert "mnist not found in " in line
    assert f"or say where the training images of {run} are with --data_path DIR" in line
    change_json(run / "args.json", mask_anchor=None)
    assert "args.json is damaged: it has no mask_anchor" in refused(capsys, visualize.main, run)
    np.savez(run / "clean_probability.npz", net1=np.ones(3), net2=np.ones(2), observed=[1], clean=[1])
    line = refused(capsys, visualize.main, run)
    assert "clean_probability.npz is damaged: its arrays are of shapes" in line


def test_the_data_may_have_moved_but_must_be_the_same(run, tmp_path, capsys):
    digits = datasets.load("digits")
    arrays = {f"{part}_images": getattr(digits, part).images for part in ("train", "test")}
    arrays |= {f"{part}_labels": getattr(digits, part).labels.copy() for part in ("train", "test")}
    np.savez(tmp_path / "own.npz", **arrays)
    change_json(run / "args.json", dataset="own", data_path=str(tmp_path / "nosuch"))
    shown = visualize.read_samples(read_run(run), visualize.read_split(run), 4, str(tmp_path))
    assert len(shown.observed) == 4
    arrays["train_labels"][np.load(run / "train_index.npy")[0]] ^= 1
    np.savez(tmp_path / "own.npz", **arrays)
    line = refused(capsys, visualize.main, run, "--data_path", tmp_path)
    assert "was not trained on the own that is here" in line
