"""benchmarks.gallery: which images it shows, in which order, from where; and what it refuses."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import gallery
from benchmarks.gallery import collect, data_uri, main
from common import datasets, noise
from tests.benchmarks.gallery_files import make_run, row
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
ROWS = [
    row(7, 1, 0.5, 1, 0.9),
    row(3, 1, 0.25, 1, 0.8),
    row(5, 0, 0.25, 1, 0.7),
    row(4, 0, 0.25, 1, 0.9, ood_score=0.125),
    row(6, 0, 0.0, 0, 0.1),
    row(2, 1, "", "", ""),
]


def pixels(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def shown(data) -> list[int]:
    return [data["images"][card["place"]] for card in data["cards"]]


def test_the_lowest_score_comes_first_and_of_equal_ones_the_surest_other_prediction(tmp_path):
    data, notes = collect(make_run(tmp_path, ROWS), 200, False, None)
    assert shown(data) == [6, 4, 5, 3, 7, 2] and notes == []
    assert data["images"] == [7, 3, 5, 4, 6, 2] and data["given"] == [1, 1, 0, 0, 0, 1]
    assert data["cards"][1] | {"image": 0} == {
        **{"place": 3, "image": 0, "predicted": 1, "probability": 0.9, "score": 0.25, "ood": 0.125}
    }
    assert [data["cards"][-1][name] for name in ("predicted", "probability", "score", "ood")] == [None] * 4
    assert data["pairs"] == [[0, 0, 1], [0, 1, 2], [1, 1, 2]]
    assert data["paths"] is None and data["names"] == [str(i) for i in range(10)]


def test_the_number_is_of_all_or_of_each_given_class_and_thumbnails_are_the_images_at_the_index(tmp_path):
    run, images = make_run(tmp_path, ROWS), datasets.load("digits").train.images
    assert shown(collect(run, 2, True, None)[0]) == [6, 4, 3, 7]
    data, _ = collect(run, 2, False, None)
    for card, index in zip(data["cards"], (6, 4), strict=True):
        assert data["images"][card["place"]] == index and card["image"].startswith("data:image/png")
        assert np.array_equal(pixels(card["image"]), images[index, ..., 0])


def test_large_images_become_small_jpegs(tmp_path):
    assert pixels(data_uri(np.zeros((96, 40, 3), np.uint8))).shape == (96, 40, 3)
    uri = data_uri(np.full((400, 200, 3), 90, np.uint8))
    assert uri.startswith("data:image/jpeg") and pixels(uri).shape == (96, 48, 3)
    assert abs(pixels(uri).astype(int) - 90).max() <= 2


def test_image_files_are_read_from_their_paths_and_bad_ones_named(tmp_path):
    blue = np.zeros((5, 7, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    Image.fromarray(blue).save(tmp_path / "a,b.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = (str(tmp_path / "a,b.png"), "a,b.png", "bad.png", "gone.png")
    rows = [row(i, 0, i / 10, path=path) for i, path in enumerate(paths)]
    run = make_run(tmp_path / "run", rows, dataset="food", data_path=str(tmp_path))
    data, notes = collect(run, 9, False, None)
    uris = [card["image"] for card in data["cards"]]
    assert all(np.array_equal(pixels(uri), blue) for uri in uris[:2]) and uris[2:] == [None, None]
    assert "bad.png is not shown: " in notes[0]
    assert notes[1].endswith("gone.png is not shown: No such file or directory")
    assert data["paths"] == list(paths)


def test_an_ood_image_is_the_one_that_the_run_trained_on(tmp_path):
    more = {"corruption": "mnist", "ood_ratio": 0.5, "noise_ratio": 0.2, "noise_type": "sym", "seed": 1}
    more |= {"noise_seed": 0, "label_rng": "python", "open_set_cache": "none"}
    more |= {"ood_dir": None, "limit_test": None, "dataset": "own", "data_path": str(tmp_path)}
    for name, value in (("own", 0), ("mnist", 255)):
        arrays = {f"{part}_images": np.full((20, 8, 8), value, np.uint8) for part in ("train", "test")}
        arrays |= {f"{part}_labels": np.arange(20) % 2 for part in ("train", "test")}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    rows = [row(i, 0, score) for i, score in enumerate(np.random.RandomState(0).rand(20))]
    data, _ = collect(make_run(tmp_path / "run", rows, paper="manifold_dividemix", **more), 20, False, None)
    white = {data["images"][card["place"]] for card in data["cards"] if pixels(card["image"]).max() == 255}
    assert white == set(noise.open_set(20, 0.5, 20, np.random.RandomState(noise.OPEN_SET_SEED)).positions)


def test_a_run_of_the_baseline_has_the_data_of_the_run_that_it_is_like(tmp_path):
    run = make_run(tmp_path / "run", ROWS)
    like = make_run(run / "baseline", ROWS)
    record = {"paper": "sfa", "method": "CE", "command": "x"}
    record |= {"arguments": {"like": str(run), "data_path": None}}
    (like / "args.json").write_text(json.dumps(record))
    data, _ = collect(like, 1, False, None)
    assert (data["method"], data["dataset"]) == ("CE", "digits")


def test_marks_are_of_the_images_and_labels_whatever_the_page_shows(tmp_path):
    run = make_run(tmp_path / "run", ROWS)
    first = collect(run, 2, False, None)[0]["id"]
    assert collect(run, 5, True, None)[0]["id"] == first
    other = [ROWS[0] | {"given_label": 0}, *ROWS[1:]]
    assert collect(make_run(tmp_path / "other", other), 2, False, None)[0]["id"] != first


def test_the_page_loads_nothing_and_no_name_becomes_a_tag(tmp_path, capsys):
    hostile = "</script><img src=x onerror=alert(1)>"
    run = make_run(tmp_path, ROWS, names=[hostile, "b"])
    main([str(run), "--top", "3"])
    assert capsys.readouterr().out == f"{run}/gallery.html: 3 of 6 training images, the most suspect first\n"
    html = (run / "gallery.html").read_text(encoding="utf-8")
    assert hostile not in html and "onerror" in html
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html) and html.count("<script") == 2
    main([str(run), "--top", "3"])
    assert (run / "gallery.html").read_text(encoding="utf-8") == html


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda run: (run / "label_quality.csv").unlink(), "no label_quality.csv in .*: name the directory of a fin"),
        (lambda run: (run / "args.json").unlink(), "no args.json in"),
        (lambda run: (run / "args.json").write_text("{"), "args.json is damaged"),
        (lambda run: (run / "label_quality.csv").write_text("index\n1\n"), "label_quality.csv is damaged"),
        (lambda run: make_run(run, []), "label_quality.csv has no row"),
        (lambda run: make_run(run, [row(1, 0, "x")]), "label_quality.csv is damaged .*x"),
        (lambda run: make_run(run, [row(1, 0, 0), row(1, 0, 0)]), "label_quality.csv is damaged .*each image once"),
        (lambda run: make_run(run, [row(1437, 0, 0)]), "digits in ./data has 1437 training images, .* image 1437"),
        (lambda run: make_run(run, ROWS, dataset="nosuch"), "unknown data set nosuch"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_ends_in_a_line_and_writes_nothing(tmp_path, damage, line):
    run = make_run(tmp_path / "run", ROWS)
    damage(run)
    assert re.search(line, message(main, [str(run)]))
    assert not (run / "gallery.html").exists()


def test_the_name_of_the_page_is_checked(tmp_path):
    run = make_run(tmp_path / "run", ROWS)
    own = run / "label_quality.csv"
    said = message(main, [str(run), "--out", str(own)])
    assert f"--out {own}: give the page a name that ends in .html" in said
    assert own.read_text().startswith("index,")
    assert gallery.make_parser().parse_args([str(run)]).top == 200
