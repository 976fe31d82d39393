"""Food-101N and Clothing1M: what the lists say, what is on the disk, and what becomes of missing and damaged images."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.datasets import clothing1m
from common.datasets.__main__ import main
from common.datasets.clothing1m import label_lines
from common.datasets.file_lists import read_list
from common.datasets.food101n import class_lines, food101_test_lines, food101n_lines, verified_lines
from common.datasets.images import DamagedImage, read_image
from tests.common.small_file_data import (
    DISHES,
    image_files,
    labelled,
    make_clothing1m,
    make_food101n,
    plant,
    read_lines,
    write_lines,
)
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST = "Food-101N_release", "food-101"


@pytest.fixture
def food(tmp_path) -> Path:
    """A small Food-101N and Food-101: 12 and 6 images of 3 classes."""
    make_food101n(tmp_path)
    return tmp_path


@pytest.fixture
def clothes(tmp_path) -> Path:
    """A small Clothing1M: 12 noisy images of 3 classes, 6 in each clean list."""
    make_clothing1m(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["list_food101n", "list_food101_test"])
def test_the_list_readers_agree_with_the_released_ones_where_lines_are_grouped(golden, kind):
    reader = {"list_food101n": food101n_lines, "list_food101_test": food101_test_lines}[kind]
    for case in golden("afm", kind):
        lines = case["lines"].tolist()
        classes = sorted({line.split("/")[0] for line in lines if not line.startswith("class_name")})
        paths, labels = reader(lines, classes)
        assert paths == case["rel_paths"].tolist(), case.name
        assert labels.dtype == np.int64
        if "QUIRK" in case.description["note"]:  # the release gives a class seen before the latest id
            assert labels.tolist() == [1, 0, 1, 2, 0]
        else:
            assert np.array_equal(labels, case["labels"]), case.name


@pytest.mark.parametrize(
    ("reader", "lines", "offending"),
    [
        (food101n_lines, ["class_name/key", "a/1.jpg", "b/2.jpg", "a/1.jpg"], "line 4: a/1.jpg is there already, in line 2"),
        (food101n_lines, ["a/1.jpg", "c/2.jpg"], r"line 2: class c is not among the 2 of classes\.txt"),
        (food101n_lines, ["a/1.jpg", "", "just words"], "line 3: 'just words' is not CLASS/FILE"),
        (food101n_lines, ["a/../1.jpg"], "line 1: 'a/../1.jpg' is not CLASS/FILE"),
        (food101n_lines, ["class_name/key"], "no image in it"),
        (food101_test_lines, ["a/"], "line 1: 'a/' is not CLASS/FILE"),
        *((lambda lines, _: verified_lines(lines), ["class_name/key\tverification_label", line], "line 2: ")
          for line in ("a/1.jpg", "a/1.jpg\t2", "a/1.jpg\t", "1.jpg\t1")),
        *((lambda lines, _: label_lines(lines, 14), [f"images/1/a.jpg{end}"], "line 1: ") for end in ("", " x", " 14", " -1")),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_with_its_number(reader, lines, offending):
    with pytest.raises(ValueError, match=offending):
        reader(lines, ["a", "b"])


def test_class_ids_are_alphabetical_whatever_the_order_and_a_header_is_no_class(tmp_path):
    assert class_lines(["class_name", "waffles", "apple_pie"]) == ("apple_pie", "waffles")
    with pytest.raises(ValueError, match="line 2: pie is there already"):
        class_lines(["pie", "pie"])
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xfa")
    text = message(read_list, tmp_path / "list.txt", class_lines)
    assert text == f"{tmp_path / 'list.txt'}: not UTF-8 text"


def test_food101n_has_the_images_labels_and_verification_of_its_lists(food, capsys):
    data = datasets.load_food101n(food)
    assert (data.name, data.num_classes, data.classes) == ("food101n", 3, DISHES[:3])
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.verified.tolist() == [1, 0, -1, -1] * 3
    assert (data.positions.tolist(), data.skipped) == (list(range(12)), ())
    for split in (data.train, data.test):
        assert (split.paths.dtype.kind, split.labels.dtype) == ("S", np.int64)
        paths = [split.path(i) for i in range(len(split.paths))]
        assert all(path.is_file() for path in paths)
        assert [path.parent.name for path in paths] == [DISHES[k] for k in split.labels]
    printed = capsys.readouterr().out
    assert "food101n train: 12 images of 3 classes" in printed
    assert "note: the train list names 12 images, the official one 310009" in printed
    assert "6 training labels verified, 3 of them right; 0 verified rows of no listed image" in printed


def test_verified_rows_are_joined_by_class_and_file(food, capsys):
    """One file of the release stands under another class in verified_train.tsv."""
    path = food / TRAIN / "meta/verified_train.tsv"
    head, first, *rest = read_lines(path)
    write_lines(path, [head, f"waffles/{first.split('/')[1]}", *rest])
    data = datasets.load_food101n(food)
    assert data.verified.tolist() == [-1, 0, -1, -1] + [1, 0, -1, -1] * 2
    assert "1 verified rows of no listed image" in capsys.readouterr().out


def test_missing_and_wrong_lists_are_named_with_their_source_and_the_command(food):
    path = food / TEST / "meta/test.txt"
    write_lines(path, [*read_lines(path), "unheard_of/1"])
    text = message(datasets.load_food101n, food)
    assert f"{path}: line 7: class unheard_of is not among the 3" in text
    (food / TRAIN / "meta/imagelist.tsv").unlink()
    text = message(datasets.load_food101n, food)
    source = "get it from http://data.vision.ee.ethz.ch"
    assert f"looked in {food} for {TRAIN}/meta/imagelist.tsv; {source}" in text
    assert f"python -m common.datasets check food101n --data_path {food}" in text


def test_clothing1m_trains_on_the_noisy_list_and_tests_on_the_clean_ones(clothes, capsys):
    data = datasets.load_clothing1m(clothes)
    assert (data.name, data.num_classes, data.classes[8]) == ("clothing1m", 14, "Down Coat")
    assert data.train.labels.tolist() == [1, 0, 0, 0, 2, 1, 1, 1, 0, 2, 2, 2]
    assert data.test.labels.tolist() == data.validation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert set(data.verified.tolist()) == {-1}
    assert data.clean_train is None
    assert all(split.path(i).is_file() for split in data.splits() for i in range(len(split.paths)))
    files = {"noisy_train": data.train, "clean_test": data.test, "clean_val": data.validation}
    for file, split in files.items():
        assert [path for path, _ in labelled(split)] == read_lines(clothes / f"{file}_key_list.txt")
    assert "note: the validation list names 6 images, the official one 14313" in capsys.readouterr().out


def test_verified_images_are_those_whose_two_labels_agree(clothes, capsys):
    data = datasets.load_clothing1m(clothes, "noisy+verified")
    keys = read_lines(clothes / "clean_train_key_list.txt")
    assert labelled(data.train)[12:] == list(zip(keys[1::2], (0, 1, 2), strict=True))
    assert data.positions.tolist() == [*range(12), 13, 15, 17]
    assert data.verified.tolist() == [-1] * 12 + [1] * 3
    printed = capsys.readouterr().out
    assert "clothing1m train: 15 images" in printed
    assert "note: the train list names 12 images, the official one 1000000" in printed
    path = clothes / "noisy_train_key_list.txt"
    write_lines(path, [*read_lines(path), keys[1]])  # an image that is there already
    data = datasets.load_clothing1m(clothes, "noisy+verified")
    assert data.train.paths.tolist().count(keys[1].encode()) == 1
    assert data.positions.tolist() == [*range(13), 16, 18]


def test_clean_training_images_come_apart(clothes):
    data = datasets.load_clothing1m(clothes, "noisy+clean")
    assert len(data.train.labels) == 12
    assert data.clean_train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="train_on must be one of noisy, noisy"):
        datasets.load_clothing1m(clothes, "all")
    (clothes / "clean_train_key_list.txt").unlink()
    datasets.load_clothing1m(clothes)  # the noisy list alone does not need it
    text = message(datasets.load_clothing1m, clothes, "noisy+clean")
    assert "clean_train_key_list.txt; get it from its authors" in text
    assert f"check clothing1m --data_path {clothes}" in text


def test_lists_may_be_in_annotations_and_images_without_their_folder(clothes):
    before = datasets.load_clothing1m(clothes)
    (clothes / "annotations").mkdir()
    for file in (*clothes.glob("*_kv.txt"), *clothes.glob("*_key_list.txt")):
        file.rename(clothes / "annotations" / file.name)
    for folder in sorted((clothes / "images").iterdir())[::2]:  # some of the ten folders only
        folder.rename(clothes / folder.name)
    after = datasets.load_clothing1m(clothes)
    shorter = [(path.removeprefix("images/"), label) for path, label in labelled(after.train)]
    assert shorter == [(path.removeprefix("images/"), label) for path, label in labelled(before.train)]
    assert len({p.startswith(b"images/") for p in after.train.paths}) == 2
    assert all(after.train.path(i).is_file() for i in range(12))
    path = clothes / "annotations/noisy_train_key_list.txt"
    write_lines(path, [*read_lines(path), "images/0/0/new.jpg"])
    text = message(datasets.load_clothing1m, clothes)
    assert text == f"{path}: line 13: images/0/0/new.jpg has no label in noisy_label_kv.txt"


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_one_list_of_keys_and_labels_per_part_serves_too(clothes, separator):
    expected = datasets.load_clothing1m(clothes, "noisy+clean")
    folder = clothing1m.folder_of_lists(clothes)
    names = ("noisy_train", "clean_test", "clean_val", "clean_train")
    for split, name in zip(expected.splits(), names, strict=True):
        lines = [f"{path}{separator}{label}" for path, label in labelled(split)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    for file in clothing1m.FILES:
        (folder / file).unlink()
    found = datasets.load_clothing1m(clothes, "noisy+clean")
    assert [*map(labelled, found.splits())] == [*map(labelled, expected.splits())]
    text = message(datasets.load_clothing1m, clothes, "noisy+verified")
    assert "noisy+verified needs noisy_label_kv.txt" in text


def test_a_missing_image_is_an_error_that_names_the_first_and_counts_them(food):
    split = datasets.load_food101n(food).train
    for i in (5, 7):
        plant(split.path(i), "missing")
    text = message(datasets.load_food101n, food)
    assert f"image 5 of the train list, {split.path(5)}, is missing (2 of 12 are)" in text
    assert "--on_bad_image skip" in text
    assert f"python -m common.datasets check food101n --data_path {food}" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_missing_and_damaged_images_of_every_split(food, capsys, workers):
    data = datasets.load_food101n(food)
    kinds = {0: "empty", 5: "truncated", 6: "grey", 7: "cmyk", 8: "palette", 11: "missing"}
    for i, kind in kinds.items():
        plant(data.train.path(i), kind)
    plant(data.test.path(3), "text")
    found, kept = datasets.load_food101n(food, "skip", workers), [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert found.positions.tolist() == kept
    assert np.array_equal(found.verified, data.verified[kept])
    assert labelled(found.train) == [labelled(data.train)[i] for i in kept]
    assert labelled(found.test) == [labelled(data.test)[i] for i in (0, 1, 2, 4, 5)]
    paths = [str(data.train.path(i)) for i in (0, 5, 11)] + [str(data.test.path(3))]
    assert [skipped[:2] for skipped in found.skipped] == list(zip(paths, (0, 5, 11, 3), strict=True))
    assert [reason for *_, reason in found.skipped][::2] == ["empty file", "missing"]
    printed = capsys.readouterr().out
    assert "food101n train: 1 missing and 2 damaged images left out, 9 kept" in printed
    assert "food101n test: 0 missing and 1 damaged images left out, 5 kept" in printed


def test_the_search_for_damaged_images_is_done_once(food, monkeypatch, capsys):
    def kept() -> list[int]:
        return datasets.load_food101n(food, "skip").positions.tolist()

    train = datasets.load_food101n(food).train
    plant(train.path(3), "truncated")
    plant(train.path(4), "missing")
    content = train.path(5).read_bytes()
    first = datasets.load_food101n(food, "skip")
    records = sorted(food.glob("damaged_images.food101n_*.json"))
    assert len(records) == 2
    assert json.loads(records[1].read_text())["list_sha256"] == train.sha256()
    with monkeypatch.context() as patch:
        patch.setattr("common.datasets.file_lists.read_image", lambda path: pytest.fail(f"{path} was read"))
        again = datasets.load_food101n(food, "skip")
        assert again.skipped == first.skipped
        assert np.array_equal(again.train.paths, first.train.paths)
        plant(train.path(6), "missing")  # every run looks again for missing images
        assert kept() == [0, 1, 2, 5, 7, 8, 9, 10, 11]
    # an image that came back was never looked at
    train.path(4).write_bytes(content[:100])
    train.path(6).write_bytes(content)
    assert kept() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    # one that was damaged and is now gone is missing, not both
    plant(train.path(3), "missing")
    assert datasets.load_food101n(food, "skip").skipped[0][1:] == (3, "missing")
    # a record that is damaged itself, or of another list, is none
    for spoilt in ("damaged itself", records[1].read_text().replace(train.sha256(), "0" * 64)):
        train.path(4).write_bytes(content[:100])
        kept()
        train.path(4).write_bytes(content)
        records[1].write_text(spoilt)
        capsys.readouterr()
        assert kept() == [0, 1, 2, *range(4, 12)]
        told = f"note: {records[1]} cannot be read (JSONDecodeError): every image is read again"
        assert (told in capsys.readouterr().out) == (spoilt == "damaged itself")


def test_a_root_that_cannot_be_written_is_looked_through_at_every_run(food, monkeypatch, capsys):
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("common.datasets.file_lists.write_atomic", refuse)
    plant(datasets.load_food101n(food).train.path(3), "truncated")
    assert len(datasets.load_food101n(food, "skip").train.labels) == 11
    assert re.search(r"note: .* cannot be written \(Permission denied\)", capsys.readouterr().out)
    assert not list(food.glob("damaged_images*"))


def test_nothing_left_and_an_unreadable_image_are_errors(food):
    path = datasets.load_food101n(food).train.path(2)
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be read (Is a directory)" in message(datasets.load_food101n, food, "skip")
    path.rmdir()
    path.write_bytes(content)
    for image in image_files(food / TEST):
        plant(image, "missing")
    assert "food101n test: no image left" in message(datasets.load_food101n, food, "skip")


@pytest.fixture(params=["torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """Both ways of decoding: a torchvision without decoders leaves all to Pillow."""
    if request.param == "Pillow":
        monkeypatch.delattr("torchvision.io.decode_image")


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["grey", "cmyk", "palette", "bmp", "gif", "webp", "tiff"])
def test_any_kind_of_image_and_an_animation_is_read_as_pillow_converts_it(food, kind):
    path = image_files(food)[0]
    modes = {"grey": "L", "cmyk": "CMYK", "palette": "P"}
    if kind in modes:
        plant(path, kind)
        assert Image.open(path).mode == modes[kind]
    else:
        picture = Image.open(path)
        more = {} if kind == "bmp" else {"save_all": True, "append_images": [picture.rotate(180)]}
        path = food / f"a.{kind}"
        picture.save(path, **more)
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(path).convert("RGB")))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("factor", [257, 256])
def test_sixteen_bits_become_eight(tmp_path, factor):
    values = np.arange(240, dtype=np.uint16).reshape(12, 20)
    Image.fromarray(values * factor).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.stack([values] * 3))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["empty", "truncated", "text"])
def test_damage_has_a_path_and_a_short_reason(food, kind):
    path = image_files(food)[0]
    plant(path, kind)
    with pytest.raises(DamagedImage) as error:
        read_image(path)
    assert error.value.path == path
    assert 0 < len(error.value.reason) < 80
    assert "\n" not in error.value.reason


def test_check_names_every_missing_and_damaged_file(food, capsys):
    data = datasets.load_food101n(food)
    for i in (0, 4, 5, 6, 7):
        plant(data.train.path(i), "missing")
    plant(data.test.path(1), "truncated")
    capsys.readouterr()
    text = message(datasets.check, "food101n", food, True)
    assert "5 images missing, 1 damaged" in text
    printed = capsys.readouterr().out.splitlines()
    folder = food / TRAIN / "images" / DISHES[1]
    assert [line for line in printed if line.startswith(("missing", "damaged"))] == [
        f"missing: {folder} (4 train images)",
        f"missing: {data.train.path(0)}",
        next(line for line in printed if line.startswith(f"damaged: {data.test.path(1)} (")),
    ]


def test_the_command_checks_by_the_released_name_too(food, capsys):
    (food / TEST / "meta/test.txt").unlink()
    assert "1 of 5 list files missing" in message(main, ["check", "food", "--data_path", str(food)])
    assert capsys.readouterr().out.splitlines() == [f"missing: {food / TEST / 'meta/test.txt'}"]
