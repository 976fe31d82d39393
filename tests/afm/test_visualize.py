"""The figure of runs with and without attention, and the weights of all pairs of some images."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from afm import visualize
from afm.flags import method, parse_args
from afm.networks import make_network
from common.datasets.images import read_image
from common.gpu.augment import normalise, resize_and_center_crop
from tests.common.small_file_data import image_files, make_food101n
from tests.figures import assert_refused
from tests.lines import refused

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
DIGITS = "--dataset digits"


def write_run(folder, words: str = DIGITS, samples=40, attentive: bool = True, known=(1, 0), seed: int = 0):
    """A run directory as afm/train.py leaves it, as far as it is read."""
    args, rng = parse_args(words.split()), np.random.default_rng(seed)
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"method": method(args), "arguments": vars(args)}))
    rows = [f"{epoch},{50 + epoch},0.5" for epoch in range(1, 6)]
    (folder / "log.csv").write_text("\n".join(["epoch,test_accuracy,seconds", *rows]) + "\n")
    np.save(folder / "train_index.npy", 10 + np.arange(samples))
    if attentive:
        arrays = {"position": np.arange(samples), "weight": rng.random(samples).astype(np.float32)}
        arrays |= {"known": rng.choice(known, samples), "observed": rng.integers(0, 10, samples)}
        np.savez(folder / "attention.npz", **arrays)
    return folder


def test_the_images_are_those_with_the_highest_and_the_lowest_weights(tmp_path, monkeypatch):
    run, few = (visualize.read_run(write_run(tmp_path / f"{n}", samples=n)) for n in (40, 5))
    run.attention["weight"][[3, 4]] = [np.nan, 2.0]
    asked, real = [], visualize.images_at
    monkeypatch.setattr(visualize, "images_at", lambda args, at: asked.append(at.tolist()) or real(args, at))
    figures = [visualize.figures.plt.figure() for _ in range(2)]
    for figure, of in zip(figures, (run, few), strict=True):
        visualize.draw_images(figure, of)
    titles, of_few = ([axes.get_title() for axes in figure.axes] for figure in figures)
    visualize.figures.plt.close("all")
    order = np.argsort(np.nan_to_num(run.attention["weight"], nan=0.5))
    expected = [*order[::-1][:8], *order[:8]]
    assert asked[0] == [10 + sample for sample in expected]  # by their place in the data set
    weight, observed, known = (run.attention[name] for name in ("weight", "observed", "known"))
    truth = {1: "right", 0: "wrong"}
    assert titles == [f"{weight[i]:.3f}\nlabel {observed[i]}, {truth[known[i]]}" for i in expected]
    assert [bool(title) for title in of_few] == [*[True] * 5, *[False] * 3] * 2


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_setting_has_curves_and_every_method_of_it_its_weights(tmp_path, monkeypatch, capsys):
    """Runs of one method under two kinds of noise are not averaged; the images are of the run with the highest AUC."""
    hard = f"{DIGITS} --noise-type hard --noise-rate 0.4"
    folders = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)]
    folders += [write_run(tmp_path / "c", f"{DIGITS} --lam 0", attentive=False)]
    folders += [write_run(tmp_path / "d", hard)]
    folders += [write_run(tmp_path / "e", f"{DIGITS} --group-size 3", known=(-1,))]
    for name, weight in (("d", "known"), ("e", None)):  # AUC 1, and a dead ReLU
        arrays = dict(np.load(tmp_path / name / "attention.npz"))
        arrays["weight"] = arrays[weight].astype(np.float32) if weight else np.full(40, 1 / 3, np.float32)
        np.savez(tmp_path / name / "attention.npz", **arrays)
    seen = {"curves": [], "titles": [], "images": []}
    curves, weights, images = visualize.figures.draw_curves, visualize.draw_weights, visualize.draw_images

    def draw_curves(axes, members):
        seen["curves"].append([method for method, _ in members])
        curves(axes, members)

    def draw_weights(axes, run):
        weights(axes, run)
        seen["titles"].append(axes.get_title())

    monkeypatch.setattr(visualize.figures, "draw_curves", draw_curves)
    monkeypatch.setattr(visualize, "draw_weights", draw_weights)
    monkeypatch.setattr(visualize, "draw_images", lambda *of: seen["images"].append(of[1]) or images(*of))
    visualize.main([*map(str, folders), "--out", str(tmp_path / "figure.png")])
    assert "figure.png" in capsys.readouterr().out
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert seen["curves"] == [["AFM (K=2)", "AFM (K=2)", "CE", "AFM (K=3)"], ["AFM (K=2)"]]
    ends = [r"K=2\), a: AUC 0\.\d{3}", r"K=2\), d: AUC 1\.000", r"K=3\), e: true labels unknown"]
    assert all(re.search(f"{end}$", title) for end, title in zip(ends, seen["titles"], strict=True))
    assert [run.folder.name for run in seen["images"]] == ["d"]


def test_a_run_without_attention_has_curves_alone(tmp_path):
    visualize.main([str(write_run(tmp_path / "run", attentive=False)), "--out", str(tmp_path / "figure.svg")])
    assert (tmp_path / "figure.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", None),
        ("log.csv", b"epoch,loss\n1,0.5\n"),
        ("attention.npz", b"half"),
        ("attention.npz", {"position": None, "known": None, "observed": None}),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(name, content, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert_refused(visualize, run, name, content, "", tmp_path, capsys)
    assert "--out " in refused(capsys, visualize.main, run, "--out", tmp_path / "figure.gif")


FOOD = "--network resnet18 --pretrained none --fidelity released"


@pytest.fixture(scope="module")
def food_run(tmp_path_factory):
    """A folder with food/, small Food-101N, run/, a finished run on it, and list.txt with the first five images."""
    root = tmp_path_factory.mktemp("visualize")
    make_food101n(root / "food", classes=2, per_class=4, test_per_class=2)
    network = make_network(parse_args(FOOD.split()), 2, 224)
    torch.save(network.state_dict(), write_run(root / "run", FOOD) / "model_best.pt")
    images = root / "food" / "Food-101N_release" / "images"
    lines = [f"{n} {file.relative_to(images)} x\n" for n, file in enumerate(image_files(images)[:5])]
    (root / "list.txt").write_text("".join(lines))
    return root


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes a second, and is tested above."""
    monkeypatch.setattr(visualize, "draw", lambda runs, out: None)


def words_of(root, listing, out, images=None) -> list[str]:
    images = images or root / "food" / "Food-101N_release" / "images"
    return [str(w) for w in ("--list", listing, "--images-root", images, "--out", out / "figure.png")]


def test_the_weights_of_all_ordered_pairs_are_written(food_run, tmp_path, no_figure):
    visualize.main([str(food_run / "run"), *words_of(food_run, food_run / "list.txt", tmp_path)])
    features, weights = (np.load(tmp_path / f"{name}.npy") for name in ("features", "weight"))
    assert (features.shape, weights.shape) == ((5, 512), (5, 5, 2))
    assert features.dtype == weights.dtype == np.float32
    network = make_network(parse_args(FOOD.split()), 2, 224).eval()
    network.load_state_dict(torch.load(food_run / "run" / "model_best.pt", weights_only=True))
    constants = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    file = image_files(food_run / "food" / "Food-101N_release" / "images")[3]
    with torch.no_grad():
        expected = network.features(normalise(resize_and_center_crop()(read_image(file))[None], *constants))
        pair = network.attention(torch.from_numpy(features[[3, 1]])[None])
    assert np.allclose(features[3], expected[0], rtol=1e-4, atol=1e-5)
    assert np.allclose(weights[3, 1], pair[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "list.txt: cannot be read"),
        (b"\n \n", "list.txt: names no image"),
        (b"nosuch.jpg\n", "nosuch.jpg cannot be read"),  # the path alone
        (b"1 damaged.jpg\n", "damaged.jpg .*damaged"),
        (b"\xff\xfe\n", "list.txt"),
    ],
)
def test_a_list_that_does_not_serve_is_refused(content, line, food_run, tmp_path, capsys, no_figure):
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    words = words_of(food_run, tmp_path / "list.txt", tmp_path, tmp_path)
    assert re.search(line, refused(capsys, visualize.main, food_run / "run", *words))
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--group-size 3", "--list needs a finished run of AFM on image files"),
        (DIGITS, "--list needs a finished run of AFM on image files"),
        (f"{FOOD} --lam 0", "--list needs a finished run of AFM on image files"),
        (FOOD, "model_best.pt"),  # not written while the accuracy is 0
    ],
)
def test_pairs_are_of_a_run_of_pairs_on_image_files_with_its_weights(flags, line, food_run, tmp_path, capsys):
    run = write_run(tmp_path / "run", flags, attentive="--lam" not in flags)
    assert line in refused(capsys, visualize.main, run, *words_of(food_run, food_run / "list.txt", tmp_path))
