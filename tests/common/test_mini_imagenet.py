"""mini-ImageNet with controlled noisy web labels: what its lists say, and all its images in one array, decoded once."""

import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import decoded, load_mini_imagenet, mini_imagenet
from common.datasets.__main__ import main
from common.datasets.file_lists import FileSplit
from common.datasets.mini_imagenet import TEST_IMAGE, TRAIN_IMAGE, is_official, list_lines, train_list
from common.gpu import processes
from common.runs.locks import Lock
from tests.common.small_file_data import labelled, make_mini_imagenet, plant, read_lines, write_lines
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
RED, BLUE, TEST = "split/red_noise_nl_0.2", "split/blue_noise_nl_0.4", "split/clean_validation"


@pytest.fixture
def root(tmp_path) -> Path:
    """12 training images of 4 classes in each of two lists, 16 in all, and 4 test images."""
    make_mini_imagenet(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> FileSplit:
    """The 12 training images of the red list; no test changes them."""
    folder = tmp_path_factory.mktemp("mini_imagenet")
    make_mini_imagenet(folder)
    return load_mini_imagenet(folder, "red", 0.2).train


def test_images_and_labels_are_those_of_the_released_listing(golden, tmp_path):
    for number, case in enumerate(golden("manifold_dividemix", "miniimagenet_listing")):
        root = tmp_path / str(number)
        for file, of in ((RED, ""), (TEST, "val_")):
            listed = zip(case[f"{of}file_names"], case[f"{of}labels"], strict=True)
            write_lines(root / file, [f"{name} {label}" for name, label in listed])
        for path in (*case["all_paths"], *case["val_paths"]):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(root / path)
        data = load_mini_imagenet(root, "red", 0.2)
        assert labelled(data.train) == list(zip(case["all_paths"], case["labels"], strict=True))
        assert labelled(data.test) == list(zip(case["val_paths"], case["val_labels"], strict=True))
        assert data.train.folder == data.test.folder == root


def test_each_list_has_its_images_and_labels(root, capsys):
    red, blue = load_mini_imagenet(root, "red", 0.2), load_mini_imagenet(root, "blue", 0.4)
    assert (red.name, red.num_classes, red.classes) == ("mini_imagenet", 100, tuple(map(str, range(100))))
    assert red.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert blue.train.labels.tolist() == [1, 0, 0, 2, 1, 1, 3, 2, 2, 0, 3, 3]
    assert (red.train.labels.dtype, red.train.paths.dtype.kind) == (np.int64, "S")
    assert [image for image in labelled(red.train) if image in labelled(blue.train)] == [
        (f"all_images/n{label:08}_{number}.JPEG", label) for label in range(4) for number in (1, 2)
    ]
    assert labelled(red.test) == [(f"validation/{k}/n{k:08}_1000.JPEG", k) for k in range(4)]
    assert all(split.path(i).is_file() for split in red.splits() for i in range(len(split.paths)))
    assert (red.positions.tolist(), red.listed, red.skipped) == (list(range(12)), 12, ())
    assert (red.mean, red.std) == ((0.4728, 0.4487, 0.4031), (0.2744, 0.2663, 0.2806))
    assert "note: the train list names 12 images, the official one 50000" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "printed"), [(0.2, "0.2"), (0.20, "0.2"), (0, "0.0"), (np.float64(0.8), "0.8")])  # fmt: skip
def test_a_rate_is_printed_as_a_float(rate, printed):
    assert train_list("red", rate) == f"red_noise_nl_{printed}"
    with pytest.raises(ValueError, match="color must be one of red, blue, got green"):
        train_list("green", rate)


def test_the_lists_may_be_of_another_system_and_the_root_end_in_a_slash(root):
    before = load_mini_imagenet(root, "red", 0.2)
    for file in (RED, TEST):
        text = "\r\n".join([*read_lines(root / file), "", ""])
        (root / file).write_bytes(b"\xef\xbb\xbf" + text.encode())
    after = load_mini_imagenet(f"{root}/", "red", 0.2)
    assert [*map(labelled, after.splits())] == [*map(labelled, before.splits())]


@pytest.mark.parametrize(
    ("line", "offending"),
    [
        *((f"b.jpg{end}", f"'b.jpg{end}' is not an image name, a blank and a class id 0..99")
          for end in ("", " x", " 100", " -1", " 1.0", " 1 0")),
        ("a.jpg 99", "all_images/a.jpg is there already, in line 1"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_with_its_number(line, offending):
    with pytest.raises(ValueError, match=f"line 3: {offending}"):
        list_lines(["a.jpg 0", "", line], TRAIN_IMAGE)


def test_test_images_of_two_classes_may_have_one_name():
    found = list_lines(["a.jpg 0", "a.jpg 99"], TEST_IMAGE)
    assert found == {"validation/0/a.jpg": 0, "validation/99/a.jpg": 99}
    with pytest.raises(ValueError, match=r"line 2: validation/0/a\.jpg is there already, in line 1"):
        list_lines(["a.jpg 0", "a.jpg 0"], TEST_IMAGE)


def test_a_rate_without_list_is_told_which_lists_there_are(root):
    (root / "split/red_noise_nl_0.2.bak").touch()
    line = f"{root}/split/red_noise_nl_0.3: there are blue_noise_nl_0.4, red_noise_nl_0.2"
    assert message(load_mini_imagenet, root, "red", 0.3) == f"mini_imagenet has no {line}"


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_missing_and_damaged_images(root, workers):
    data = load_mini_imagenet(root, "red", 0.2)
    bad = ((data.train, 0, "truncated"), (data.train, 5, "missing"), (data.test, 1, "text"))
    for split, i, kind in bad:
        plant(split.path(i), kind)
    found, kept = load_mini_imagenet(root, "red", 0.2, "skip", workers), np.delete(np.arange(12), [0, 5])
    assert (found.positions.tolist(), found.listed, found.verified.tolist()) == (kept.tolist(), 12, [-1] * 10)
    assert labelled(found.train) == [labelled(data.train)[i] for i in kept]
    assert found.test.labels.tolist() == [0, 2, 3]
    assert [skipped[:2] for skipped in found.skipped] == [(str(split.path(i)), i) for split, i, _ in bad]
    assert decoded(found.train, 8, workers, None).shape == (10, 8, 8, 3)


def check(root: Path, *words: str) -> None:
    main(["check", "mini_imagenet", "--data_path", str(root), "--workers", "0", *words])


def test_check_tells_what_every_list_holds(root, capsys):
    check(root, "--images")
    assert capsys.readouterr().out.splitlines() == [
        "mini_imagenet blue_noise_nl_0.4: 12 images of 100 classes",
        "note: the blue_noise_nl_0.4 list names 12 images, the official one 50000",
        "mini_imagenet red_noise_nl_0.2: 12 images of 100 classes",
        "note: the red_noise_nl_0.2 list names 12 images, the official one 50000",
        "mini_imagenet test: 4 images of 100 classes",
        "note: the test list names 4 images, the official one 5000",
        f"mini_imagenet in {root}: every image is there and whole",
    ]


def test_the_official_lists_are_known_by_how_many_images_they_name():
    for name, counts in (
        ("red_noise_nl_0.3", {49_985: True, 50_000: False}),
        ("red_noise_nl_0.0", {50_000: True}),
        ("blue_noise_nl_0.2", {49_950: True, 45_000: False}),
    ):
        assert {count: is_official(name, count) for count in counts} == counts


def test_check_names_each_missing_and_damaged_image_of_any_list_once(root, capsys):
    red, blue = (load_mini_imagenet(root, *which).train for which in (("red", 0.2), ("blue", 0.4)))
    paths = [red.path(0), red.path(1), blue.path(3), root / "validation/2/n00000002_1000.JPEG"]
    assert paths[1] == blue.path(1)
    for path, kind in zip(paths, ("missing", "missing", "truncated", "empty"), strict=True):
        plant(path, kind)
    capsys.readouterr()
    assert "2 images missing, 2 damaged; get them from the project page" in message(check, root, "--images")
    printed = capsys.readouterr().out.splitlines()
    told = [line for line in printed if line.startswith(("missing:", "damaged:"))]
    assert sorted(told[:2]) == sorted(f"missing: {path}" for path in paths[:2])
    assert told[2].startswith(f"damaged: {paths[2]} (")
    assert told[3:] == [f"damaged: {paths[3]} (empty file)"]


def test_check_names_missing_lists_and_finds_a_wrong_line_in_any(root, capsys):
    write_lines(root / RED, ["a.jpg 5", "b.jpg"])
    line = "line 2: 'b.jpg' is not an image name, a blank and a class id 0..99"
    assert message(check, root) == f"{root / RED}: {line}"
    for file in (RED, BLUE, TEST):
        (root / file).unlink()
    capsys.readouterr()
    assert "2 of 2 list files missing; get them from the project page" in message(check, root)
    places = "split/<color>_noise_nl_<rate>", TEST
    assert capsys.readouterr().out.splitlines() == [f"missing: {root}/{place}" for place in places]


def test_what_lies_in_files_is_not_fetched_and_this_is_not_cached(root):
    words = ["--data_path", str(root), "--out", str(root / "cache")]
    text = message(main, ["download", "mini_imagenet", *words])
    assert "cannot be fetched by a script: get it from the project page" in text
    text = message(main, ["download", "webvision", "--data_path", str(root)])
    line = "cannot be fetched by a script: get it from WebVision 1.0.* imagenet/val,.* image-net.org"
    assert re.search(line, text)
    assert "mini_imagenet needs no cache" in message(main, ["cache", "mini_imagenet", *words])
    assert not (root / "cache").exists()


@pytest.mark.parametrize("size", [32, 84, 7])
def test_images_are_resized_as_pillow_does_and_no_random_number_is_drawn(split, size):
    before = torch.get_rng_state()
    images = decoded(split, size, 0, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert (images.shape, images.dtype) == ((12, size, size, 3), np.uint8)
    pictures = (Image.open(split.path(i)).convert("RGB") for i in range(12))
    expected = [np.array(picture.resize((size, size), Image.BILINEAR), dtype=int) for picture in pictures]
    apart = abs(images - np.stack(expected))
    assert apart.max() <= 1  # measured: one value in a hundred is 1 off
    assert (apart > 0).mean() < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_many_images_stay_in_their_order(split, workers):
    order = np.arange(150) * 7 % 12
    images = decoded(split, 16, 0, None)
    assert len(np.unique(images, axis=0)) == 12
    assert np.array_equal(decoded(split.only(order), 16, workers, None), images[order])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_nothing_kept(root, tmp_path, workers):
    train = load_mini_imagenet(root, "red", 0.2).train
    plant(train.path(5), "truncated")
    text = message(decoded, train, 16, workers, tmp_path / "kept")
    assert text.startswith(f"image 5 of the train list, {train.path(5)}, is damaged (")
    assert not (tmp_path / "kept").exists()


def test_what_was_kept_is_read_without_the_images(root, tmp_path, capsys):
    data = load_mini_imagenet(root, "red", 0.2)
    folder = tmp_path / "new" / "kept"
    expected = [decoded(split, 16, 0, folder) for split in data.splits()]
    assert np.array_equal(expected[0], decoded(data.train, 16, 0, None))
    for split in data.splits():
        for i in range(len(split.paths)):
            split.path(i).unlink()
    capsys.readouterr()
    for split, images in zip(data.splits(), expected, strict=True):
        again = decoded(split, 16, 0, folder)
        assert again.dtype == np.uint8
        assert np.array_equal(again, images)
        again[:] = 0  # an array of one's own: nothing reaches the file
        assert np.array_equal(decoded(split, 16, 0, folder), images)
    assert capsys.readouterr().out == ""


def kept(folder: Path) -> list[Path]:
    """The files of images in a folder; nothing half-written lies there."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".lock"]
    assert {path.suffix for path in files} <= {".npz"}
    return files


def test_other_images_another_size_and_another_decoder_make_another_file(split, tmp_path, monkeypatch):
    for _ in range(2):
        decoded(split, 16, 0, tmp_path)
        (path,) = kept(tmp_path)
        assert path.name.startswith("decoded.train_16x16_")
    assert decoded(split, 8, 0, tmp_path).shape == (12, 8, 8, 3)
    assert len(kept(tmp_path)) == 2
    turned = split.only(np.arange(12)[::-1])
    assert np.array_equal(decoded(turned, 16, 0, tmp_path), decoded(split, 16, 0, tmp_path)[::-1])
    assert len(kept(tmp_path)) == 3
    monkeypatch.setattr(mini_imagenet, "version", lambda package: f"{package} of tomorrow")
    decoded(split, 16, 0, tmp_path)
    assert len(kept(tmp_path)) == 4


def test_a_damaged_file_is_told_and_made_anew(split, tmp_path, capsys):
    expected = decoded(split, 16, 0, tmp_path)
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    bit = bytearray(content)
    bit[len(content) // 2] ^= 1
    with np.load(path) as file:
        parameters = file["parameters"]
    for spoilt in (
        content[:-100],
        bytes(bit),
        {"images": expected ^ 1, "parameters": np.array("{}")},  # of another list
        {"images": expected[1:], "parameters": parameters},  # of another shape
        {"pictures": np.zeros(3)},
    ):
        path.write_bytes(spoilt) if isinstance(spoilt, bytes) else np.savez(path, **spoilt)
        capsys.readouterr()
        assert np.array_equal(decoded(split, 16, 0, tmp_path), expected)
        (note,) = capsys.readouterr().out.splitlines()
        assert note.startswith(f"note: {path} ") and note.endswith("; every image is decoded again")
        with np.load(path) as file:
            assert np.array_equal(file["images"], expected)
    decoded(split, 16, 0, tmp_path)
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_told_and_gone_round(split, tmp_path, monkeypatch, capsys):
    expected = decoded(split, 16, 0, None)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert np.array_equal(decoded(split, 16, 0, folder), expected)
        told = capsys.readouterr().out
        assert told.startswith(f"note: {folder}/decoded.train_16x16_")
        assert "cannot be written (" in told
    monkeypatch.setattr(np, "savez", Mock(side_effect=OSError(28, "No space left on device")))
    assert np.array_equal(decoded(split, 16, 0, tmp_path / "full"), expected)
    assert "cannot be written (No space left on device)" in capsys.readouterr().out
    assert kept(tmp_path / "full") == []


def test_two_runs_do_not_write_one_file_at_a_time(split, tmp_path, capsys):
    expected = decoded(split, 16, 0, tmp_path)
    (path,) = kept(tmp_path)
    path.unlink()
    with Lock(path.with_suffix(".lock"), "wait"):
        assert np.array_equal(decoded(split, 16, 0, tmp_path), expected)
    assert capsys.readouterr().out == f"note: {path} is being written by another process\n"
    assert kept(tmp_path) == []
    decoded(split, 16, 0, tmp_path)
    assert kept(tmp_path) == [path]


def test_of_several_processes_the_first_decodes_for_all_with_a_folder(split, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "first_alone", lambda make: calls.append(make) or make())
    expected = decoded(split, 16, 0, None)
    assert calls == []
    assert np.array_equal(decoded(split, 16, 0, tmp_path), expected) and len(calls) == 1
