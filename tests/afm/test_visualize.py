"""The figure of runs with and without attention, and the weights of all pairs of some images."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from afm import train, visualize
from afm.flags import method, parse_args
from afm.networks import make_network
from common.datasets.images import read_image
from common.gpu.augment import normalise, resize_and_center_crop
from common.runs import cli
from tests.common.small_file_data import image_files, make_food101n

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def write_run(folder, *flags: str, samples: int = 40, attentive: bool = True, known=(1, 0), seed: int = 0):
    """A run directory on digits as afm/train.py leaves it, as far as it is read."""
    args, rng = parse_args(["--dataset", "digits", *flags]), np.random.default_rng(seed)
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"method": method(args), "arguments": vars(args)}))
    accuracy = 50 + 10 * rng.random(5)
    rows = [f"{epoch},{value},0.5" for epoch, value in enumerate(accuracy, start=1)]
    (folder / "log.csv").write_text("\n".join(["epoch,test_accuracy,seconds", *rows]) + "\n")
    np.save(folder / "train_index.npy", 10 + np.arange(samples))
    if attentive:
        arrays = {"position": np.arange(samples), "weight": rng.random(samples).astype(np.float32)}
        arrays |= {
            "known": rng.choice(known, samples).astype(np.int8),
            "observed": rng.integers(0, 10, samples),
        }
        np.savez(folder / "attention.npz", **arrays)
    return folder


def refused(capsys, *words) -> str:
    """The one line that a call ends in, with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(visualize.main, list(map(str, words)))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", line)
    return line


# what is read and drawn -------------------------------------------------------------------------------------------------


def test_a_run_is_read(tmp_path):
    plain, attentive = (
        visualize.read_run(write_run(tmp_path / name, *flags, attentive=name == "b"))
        for name, flags in (("a", ["--lam", "0"]), ("b", ["--fidelity", "released"]))
    )
    assert (plain.method, attentive.method) == ("CE", "AFM (K=2) (released)")
    assert plain.attention is None
    assert set(attentive.attention) == {"position", "weight", "known", "observed"}
    assert len(plain.accuracy) == 5
    assert ((plain.accuracy >= 50) & (plain.accuracy <= 60)).all()


def test_the_images_are_those_with_the_highest_and_the_lowest_weights(tmp_path, monkeypatch):
    run = visualize.read_run(write_run(tmp_path / "run"))
    run.attention["weight"][[3, 4]] = [np.nan, 2.0]
    asked = []
    images = visualize.images_at
    monkeypatch.setattr(visualize, "images_at", lambda args, at: asked.append(at) or images(args, at))
    figure = visualize.figures.plt.figure()
    visualize.draw_images(figure, run)
    order = np.argsort(np.nan_to_num(run.attention["weight"], nan=0.5))
    expected = [*order[::-1][:8], *order[:8]]
    assert asked[0].tolist() == [10 + sample for sample in expected]  # by their place in the data set
    titles = [axes.get_title() for axes in figure.axes]
    known = {1: "right", 0: "wrong"}
    assert titles == [
        f"{run.attention['weight'][i]:.3f}\nlabel {run.attention['observed'][i]}, {known[run.attention['known'][i]]}"
        for i in expected
    ]
    visualize.figures.plt.close(figure)


def test_fewer_images_than_places_stay_in_their_rows(tmp_path):
    run = visualize.read_run(write_run(tmp_path / "run", samples=5))
    figure = visualize.figures.plt.figure()
    visualize.draw_images(figure, run)
    titles = [axes.get_title() for axes in figure.axes]
    visualize.figures.plt.close(figure)
    assert [bool(title) for title in titles] == [*[True] * 5, *[False] * 3] * 2


def test_every_setting_has_curves_and_every_method_of_it_its_weights(tmp_path, monkeypatch):
    """Runs of one method under two kinds of noise are not averaged; the images are of the run with the highest AUC."""
    hard = ["--noise-type", "hard", "--noise-rate", "0.4"]
    folders = [
        write_run(tmp_path / name, *flags, attentive=attentive, seed=seed)
        for name, flags, attentive, seed in (
            ("a", [], True, 1),
            ("b", [], True, 2),
            ("c", ["--lam", "0"], False, 3),
            ("d", hard, True, 4),
        )
    ]
    runs = [visualize.read_run(folder) for folder in folders]
    runs[3].attention["weight"][:] = runs[3].attention["known"]  # AUC 1
    seen = {"curves": [], "weights": [], "images": []}
    curves, draw_weights = visualize.figures.draw_curves, visualize.draw_weights

    def record(axes, members):
        seen["curves"].append([method for method, _ in members])
        curves(axes, members)

    monkeypatch.setattr(visualize.figures, "draw_curves", record)
    monkeypatch.setattr(
        visualize, "draw_weights", lambda axes, run: seen["weights"].append(run) or draw_weights(axes, run)
    )
    monkeypatch.setattr(visualize, "draw_images", lambda _, run: seen["images"].append(run))
    visualize.draw(runs, tmp_path / "figure.png")
    assert seen["curves"] == [["AFM (K=2)", "AFM (K=2)", "CE"], ["AFM (K=2)"]]
    assert [run.folder.name for run in seen["weights"]] == ["a", "d"]
    assert [run.folder.name for run in seen["images"]] == ["d"]


def test_equal_weights_of_all_samples_are_drawn(tmp_path, recwarn):
    """A dead ReLU leaves every weight at 1/K."""
    run = visualize.read_run(write_run(tmp_path / "run"))
    run.attention["weight"][:] = 0.5
    visualize.draw([run], tmp_path / "figure.png")
    assert is_figure(tmp_path / "figure.png")
    assert [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning] == []


def is_figure(path) -> bool:
    """A picture that is not one colour."""
    with Image.open(path) as image:
        return image.width > 500 and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100


@pytest.mark.parametrize(
    ("runs", "panels"),
    [
        ([(["--lam", "0"], False, (1,))], 0),
        ([(["--lam", "0"], False, (1,)), ([], True, (1, 0)), (["--group-size", "3"], True, (-1,))], 2),
    ],
)
def test_a_figure_with_and_without_attention(runs, panels, tmp_path, monkeypatch, capsys):
    folders = [
        write_run(tmp_path / f"run{number}", *flags, attentive=attentive, known=known)
        for number, (flags, attentive, known) in enumerate(runs)
    ]
    drawn = []
    draw_weights = visualize.draw_weights
    monkeypatch.setattr(
        visualize, "draw_weights", lambda axes, run: drawn.append(axes) or draw_weights(axes, run)
    )
    visualize.main([*map(str, folders), "--out", str(tmp_path / "figure.png")])
    assert is_figure(tmp_path / "figure.png")
    assert "figure.png" in capsys.readouterr().out
    titles = [axes.get_title() for axes in drawn]
    assert len(titles) == panels
    if panels:
        assert re.search(r"AUC 0\.\d{3}$", titles[0])
        assert titles[1].endswith("true labels unknown")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["figure.png"]


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_other_kinds_of_figure(suffix, tmp_path):
    out = tmp_path / f"figure.{suffix}"
    visualize.main([str(write_run(tmp_path / "run", attentive=False)), "--out", str(out)])
    assert out.read_bytes().startswith({"pdf": b"%PDF", "svg": b"<?xml"}[suffix])


def test_the_figure_of_a_run_of_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "digits", "--limit_train", "64", "--train-batch", "32", "--epochs", "2"]
    train.main([*words, "--device", "cpu", "--out", "run"])
    visualize.main(["run"])
    assert is_figure(tmp_path / "afm.png")


# mistakes ---------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert "args.json is missing" in refused(capsys, tmp_path)
    run = write_run(tmp_path / "run")
    (run / "log.csv").unlink()
    assert "log.csv is missing" in refused(capsys, run)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "damage",
    [
        ("args.json", '{"method": "AFM'),
        ("args.json", "[]"),
        ("log.csv", "epoch,loss\n1,0.5\n"),
        ("attention.npz", "half"),
        ("attention.npz", None),
    ],
    ids=lambda damage: "-".join(map(str, damage))[:30],
)
def test_a_damaged_run_is_refused_in_one_line(damage, tmp_path, capsys):
    run, (name, content) = write_run(tmp_path / "run"), damage
    if content is None:
        np.savez(run / name, weight=np.zeros(3))
    else:
        (run / name).write_text(content)
    assert str(run) in refused(capsys, run, "--out", tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("out", ["figure.gif", "figure", "nosuch/figure.png"])
def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_drawn(out, tmp_path, capsys):
    assert f"--out {tmp_path / out}" in refused(capsys, write_run(tmp_path / "run"), "--out", tmp_path / out)


# the release's vis.py ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def food_run(tmp_path_factory):
    """A folder with food/, small Food-101N, and run/, a run on it of one epoch."""
    root = tmp_path_factory.mktemp("visualize")
    make_food101n(root / "food", classes=2, per_class=4, test_per_class=2)
    words = "--network resnet18 --pretrained none --train-batch 4 --epochs 1 --workers 0 --device cpu --fidelity released"
    train.main([*words.split(), "--data-root", str(root / "food"), "--out", str(root / "run")])
    return root


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes a second, and is seen to elsewhere."""
    monkeypatch.setattr(visualize, "draw", lambda runs, out: None)


def write_list(path, root, columns: int = 2):
    """The first five training images in a list as the release's; their paths."""
    images = root / "food" / "Food-101N_release" / "images"
    files = [str(file.relative_to(images)) for file in image_files(images)[:5]]
    path.write_text(
        "".join(f"{number} {file} x\n" if columns > 1 else f"{file}\n" for number, file in enumerate(files))
    )
    return images, files


@pytest.mark.parametrize("columns", [2, 1])
def test_the_weights_of_all_ordered_pairs_are_written(columns, food_run, tmp_path):
    images, files = write_list(tmp_path / "list.txt", food_run, columns)
    flags = ["--list", tmp_path / "list.txt", "--images-root", images, "--out", tmp_path / "figure.png"]
    visualize.main(list(map(str, [food_run / "run", *flags])))
    assert is_figure(tmp_path / "figure.png")
    features, weights = (
        np.load(tmp_path / name, allow_pickle=False) for name in ("features.npy", "weight.npy")
    )
    assert (features.shape, features.dtype) == ((5, 512), np.float32)
    assert (weights.shape, weights.dtype) == ((5, 5, 2), np.float32)
    assert np.allclose(weights.sum(axis=2), 1)

    arguments = ["--network", "resnet18", "--pretrained", "none", "--fidelity", "released"]
    network = make_network(parse_args(arguments), 2, 224)
    network.load_state_dict(torch.load(food_run / "run" / "model_best.pt", weights_only=True))
    network.eval()
    constants = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = resize_and_center_crop()(read_image(images / files[3]))[None]
    with torch.no_grad():
        expected = network.features(normalise(image, *constants))
        pair = network.attention(torch.from_numpy(features[[3, 1]])[None])
    assert np.allclose(features[3], expected[0], rtol=1e-4, atol=1e-5)
    assert np.allclose(weights[3, 1], pair[0], rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.npy",
        "figure.png",
        "list.txt",
        "weight.npy",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "list.txt: cannot be read"),
        ("", "list.txt: names no image"),
        ("\n \n", "list.txt: names no image"),
        ("1 nosuch.jpg\n", "nosuch.jpg cannot be read"),
        ("1 damaged.jpg\n", "damaged.jpg .*damaged"),
        (b"\xff\xfe\n", "list.txt"),
    ],
)
def test_a_list_that_does_not_serve_is_refused(content, line, food_run, tmp_path, capsys, no_figure):
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--list", tmp_path / "list.txt", "--images-root", tmp_path, "--out", tmp_path / "figure.png"]
    assert re.search(line, refused(capsys, food_run / "run", *flags))
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize(
    "flags", [["--group-size", "3"], [], ["--lam", "0"]], ids=["three", "digits", "no attention"]
)
def test_pairs_are_of_a_run_of_pairs_on_image_files(flags, food_run, tmp_path, capsys, no_figure):
    run = write_run(tmp_path / "run", *flags, attentive="--lam" not in flags)
    write_list(tmp_path / "list.txt", food_run)
    words = ["--list", tmp_path / "list.txt", "--out", tmp_path / "figure.png"]
    assert "--list needs a finished run of AFM on image files" in refused(capsys, run, *words)


@pytest.mark.parametrize("content", [None, b"half of a file"])
def test_a_run_that_never_was_right_or_lost_its_weights_is_refused(
    content, food_run, tmp_path, capsys, no_figure
):
    """model_best.pt is not written while the accuracy is 0."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("args.json", "log.csv", "attention.npz", "train_index.npy"):
        shutil.copy(food_run / "run" / name, run)
    if content is not None:
        (run / "model_best.pt").write_bytes(content)
    images, _ = write_list(tmp_path / "list.txt", food_run)
    flags = ["--list", tmp_path / "list.txt", "--images-root", images, "--out", tmp_path / "figure.png"]
    assert "model_best.pt" in refused(capsys, run, *flags)
