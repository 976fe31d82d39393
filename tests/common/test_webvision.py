"""mini-WebVision: what its lists say, where ILSVRC12's validation images are, and what becomes of missing and damaged images."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from common import datasets
from common.datasets import load_webvision
from common.datasets.__main__ import main
from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD, FileData, FileSplit
from common.datasets.image_cache import build, open_cache, open_caches
from common.datasets.webvision import list_lines, read_webvision
from common.gpu import augment
from common.gpu.loader import FileBatches
from tests.common.small_file_data import make_webvision, plant, write_lines
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST, SYNSETS = "info/train_filelist_google.txt", "info/val_filelist.txt", "info/synsets.txt"
VAL = "imagenet/val"


@pytest.fixture
def root(tmp_path) -> Path:
    """24 training images of 4 classes, 8 of WebVision to test on and 8 of ILSVRC12, in folders named by class id."""
    make_webvision(tmp_path)
    return tmp_path


@pytest.fixture
def by_synset(tmp_path) -> Path:
    """The same images, those of ILSVRC12 in folders named by synset."""
    make_webvision(tmp_path, by_synset=True)
    return tmp_path


@pytest.fixture
def all_classes(tmp_path) -> Path:
    """All 50 classes, with an image of each in every split."""
    make_webvision(tmp_path, classes=50, per_class=1, test_per_class=1)
    return tmp_path


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def names(split: FileSplit) -> list[str]:
    return [path.decode() for path in split.paths.tolist()]


def files(split: FileSplit) -> list[Path]:
    return [split.path(i) for i in range(len(split.paths))]


def flatten(folder: Path) -> None:
    """Bring the images of all folders below one into it."""
    for below in list(folder.iterdir()):
        for path in below.iterdir():
            path.rename(folder / path.name)
        below.rmdir()


def assert_same(found: FileData, expected: FileData) -> None:
    """The same images with the same labels in all splits."""
    assert len(found.splits()) == len(expected.splits())
    for one, other in zip(found.splits(), expected.splits(), strict=True):
        assert files(one) == files(other)
        assert np.array_equal(one.labels, other.labels)


def test_images_and_labels_are_those_of_the_lists_in_their_order(root):
    data = load_webvision(root, 4)
    assert (data.name, data.num_classes, data.classes) == ("webvision", 4, ("0", "1", "2", "3"))
    for split, file, folder in ((data.train, TRAIN, root), (data.test, TEST, root / "val_images_256")):
        lines = [line.split() for line in lines_of(root / file) if int(line.split()[1]) < 4]
        assert files(split) == [folder / path for path, _ in lines]
        assert split.labels.tolist() == [int(label) for _, label in lines]
        assert (split.labels.dtype, split.paths.dtype.kind) == (np.int64, "S")
        assert all(path.is_file() for path in files(split))
    assert data.imagenet.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [split.part for split in data.splits()] == ["train", "test", "imagenet"]
    assert (data.positions.tolist(), data.listed, data.skipped) == (list(range(24)), 24, ())
    assert (data.verified.dtype, data.verified.tolist()) == (np.int8, [-1] * 24)
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("num_class", [2, 3])
def test_only_the_first_classes_are_there(root, num_class):
    data, whole = load_webvision(root, num_class), load_webvision(root, 4)
    assert (data.num_classes, len(data.classes)) == (num_class, num_class)
    for split, other in zip(data.splits(), whole.splits(), strict=True):
        kept = other.labels < num_class
        assert names(split) == [name for name, keep in zip(names(other), kept, strict=True) if keep]
        assert split.labels.tolist() == other.labels[kept].tolist()
    # positions count the images of these classes: other lines have none
    assert data.positions.tolist() == list(range(6 * num_class))
    assert (data.listed, len(data.verified)) == (6 * num_class, 6 * num_class)


def test_all_thousand_classes_can_be_asked_for_and_no_more(root):
    data = read_webvision(root, 1000, "none")  # the lists alone: the images of higher classes are not there
    assert len(data.train.labels) == len(lines_of(root / TRAIN)) == 31
    assert (data.train.labels.max(), data.test.labels[0], len(data.classes)) == (706, 999, 1000)
    for wrong in (1, 0, -3, 1001):
        with pytest.raises(ValueError, match=f"from 2 to 1000, got {wrong}"):
            load_webvision(root, wrong)


def test_a_wrong_line_is_named_with_its_number_and_blanks_are_understood():
    lines = [" a/b.jpg 1 ", "", "a b/c d.jpg 0", "e.jpg\t1"]
    assert list_lines(lines, 2) == (["a/b.jpg", "a b/c d.jpg", "e.jpg"], [1, 0, 1])
    for line in ("b.jpg", " 7", "b.jpg x", "b.jpg 1000", "b.jpg -1", "b.jpg 1.0"):
        with pytest.raises(ValueError, match=re.escape(f"line 3: {line.strip()!r} is not a path")):
            list_lines(["a.jpg 999", "", line], 1000)


@pytest.mark.parametrize("file", [TRAIN, TEST])
def test_a_list_without_images_of_the_classes_is_named(root, file):
    write_lines(root / file, [line for line in lines_of(root / file) if int(line.split()[1]) > 3])
    assert message(load_webvision, root, 4) == f"{root / file}: no image of the first 4 classes in it"


def test_folders_by_synset_have_the_labels_that_the_list_of_synsets_gives_them(by_synset, tmp_path_factory):
    by_id = tmp_path_factory.mktemp("by_id")
    make_webvision(by_id)
    found, expected = load_webvision(by_synset, 4), load_webvision(by_id, 4)
    synsets = [line.split()[0] for line in lines_of(by_synset / SYNSETS)]
    assert synsets[:4] != sorted(synsets[:4])
    assert found.classes == tuple(synsets[:4])
    assert [path.parent.name for path in files(found.imagenet)] == [synsets[k] for k in found.imagenet.labels]
    assert found.imagenet.labels.tolist() == expected.imagenet.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [path.read_bytes() for path in files(found.imagenet)] == [
        path.read_bytes() for path in files(expected.imagenet)
    ]


def test_folders_by_class_id_come_first(root):
    before = load_webvision(root, 4)
    make_webvision(root, by_synset=True)  # folders of the other kind beside them, and the list
    after = load_webvision(root, 4)
    assert_same(after, before)
    assert after.classes[:2] == ("n02000000", "n01999000")  # which names the classes all the same


def test_images_are_in_the_order_of_classes_and_names_and_hidden_files_are_none(root):
    first = sorted((root / VAL / "0").iterdir())
    for name in ("ILSVRC2012_val_00000000.JPEG", "A.JPEG", "z.JPEG"):
        (root / VAL / "0" / name).write_bytes(first[0].read_bytes())
    for name in (".DS_Store", "._ILSVRC2012_val_00000001.JPEG"):
        (root / VAL / "0" / name).touch()
    (root / VAL / "devkit.txt").touch()
    expected = ["A.JPEG", "ILSVRC2012_val_00000000.JPEG", *(path.name for path in first), "z.JPEG"]
    found = load_webvision(root, 2).imagenet
    assert names(found)[:5] == [f"0/{name}" for name in expected]
    assert found.labels.tolist() == [0] * 5 + [1] * 2
    assert found.folder == root / VAL


@pytest.mark.parametrize("kind", [str, Path])
def test_they_may_be_in_another_folder_or_not_there(root, tmp_path_factory, kind):
    data = load_webvision(root, 4, imagenet=kind("none"))
    assert data.imagenet is None and len(data.train.labels) == 24
    assert [split.part for split in data.splits()] == ["train", "test"]
    load_webvision(root, 40, imagenet="none")  # nothing is looked for
    other = tmp_path_factory.mktemp("elsewhere")
    (root / "imagenet/val").rename(other / "val")
    found = load_webvision(root, 4, imagenet=kind(other)).imagenet
    assert found.folder == other / "val"
    assert len(found.labels) == 8 and all(path.is_file() for path in files(found))
    text = message(load_webvision, root, 4)
    assert f"looked in {root / VAL} for a folder of each of 4 classes" in text


def test_a_missing_class_and_folders_without_the_list_of_synsets_are_told(by_synset):
    (by_synset / SYNSETS).unlink()
    text = message(load_webvision, by_synset, 4)
    for words in (
        f"{by_synset / VAL} has no folder 0, 1, ...",
        f"no {SYNSETS} to find",
        "use --imagenet none",
    ):
        assert words in text
    assert load_webvision(by_synset, 4, imagenet="none").imagenet is None
    make_webvision(by_synset)  # folders by class id beside them
    for k in (1, 3):
        (by_synset / VAL / str(k)).rename(by_synset / f"{k} is not there")
    text = message(load_webvision, by_synset, 4)
    for words in (
        f"looked in {by_synset / VAL} for",
        "4 classes",
        "1 is missing (2 are)",
        "use --imagenet none",
    ):
        assert words in text


def by_meta_mat(folder: Path, synsets: list[str], order: list[str]) -> str:
    """Ids of the development kit, which numbers the synsets in another order, and the meta.mat that says so."""
    kit = sorted(synsets)
    names = np.array(
        [(i + 1, wnid) for i, wnid in enumerate(kit)], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")]
    )
    savemat(folder / "meta.mat", {"synsets": names})
    return "".join(f"{kit.index(synset) + 1}\n" for synset in order)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("imagenet/val/val.txt", "id"),
        ("info/imagenet_val.txt", "synset"),
        ("imagenet/LOC_val_solution.csv", "kaggle"),
        ("imagenet/ILSVRC2012_validation_ground_truth.txt", "kit"),
    ],
)
def test_images_in_one_folder_are_labelled_by_the_list_of_their_classes(by_synset, file, kind):
    expected = load_webvision(by_synset, 3).imagenet
    every = load_webvision(by_synset, 4).imagenet
    class_of = {path.stem: int(label) for path, label in zip(files(every), every.labels, strict=True)}
    synsets = [line.split()[0] for line in lines_of(by_synset / SYNSETS)]
    flatten(by_synset / VAL)
    text = message(load_webvision, by_synset, 4)
    assert f"the images in {by_synset / VAL} are in no folder per class: put val.txt or " in text
    lines = {
        "id": "".join(f"{name}.JPEG {k}\n" for name, k in class_of.items()),
        "synset": "".join(f"{name}.JPEG\t{synsets[k]}\n" for name, k in class_of.items()),
        "kaggle": "ImageId,PredictionString\n"
        + "".join(f"{n},{synsets[k]} 1 2 3 4\n" for n, k in class_of.items()),
    }
    if kind == "kit":
        (by_synset / file).write_text("1\n" * 8)
        assert "put the development kit's meta.mat beside it" in message(load_webvision, by_synset, 4)
        lines["kit"] = by_meta_mat(
            (by_synset / file).parent, synsets, [synsets[class_of[n]] for n in sorted(class_of)]
        )
    (by_synset / file).write_text(lines[kind])
    found = load_webvision(by_synset, 3).imagenet
    labels = {path.stem: int(label) for path, label in zip(files(found), found.labels, strict=True)}
    assert labels == {
        path.stem: int(label) for path, label in zip(files(expected), expected.labels, strict=True)
    }
    lost = (by_synset / file).read_text().splitlines()[:-1]
    (by_synset / file).write_text("\n".join(lost))
    assert re.search("has no line for|holds 7 ids for 8 images", message(load_webvision, by_synset, 4))


def test_small_training_images_and_what_is_no_image_in_a_folder_of_a_class(by_synset):
    expected = load_webvision(by_synset, 4)
    (by_synset / "google").rename(by_synset / "google_resized_256")
    junk = next((by_synset / VAL).iterdir())
    for name in ("Thumbs.db", "val_annotations.txt", "._x.JPEG"):
        (junk / name).write_bytes(b"junk")
    found = load_webvision(by_synset, 4)
    assert [path.name for path in files(found.train)] == [path.name for path in files(expected.train)]
    assert all(path.is_file() for path in files(found.train))
    assert names(found.imagenet) == names(expected.imagenet)


def test_folders_without_images_are_told_and_a_single_one_is_counted(root, capsys):
    for path in (root / VAL / "2").iterdir():
        path.unlink()
    assert load_webvision(root, 4).imagenet.labels.tolist() == [0, 0, 1, 1, 3, 3]
    assert "note: the imagenet list names 6 images, the official one 200" in capsys.readouterr().out
    for path in (root / VAL).glob("*/*"):
        path.unlink()
        (path.parent / ".gitkeep").touch()
    text = message(load_webvision, root, 4)
    assert f"webvision: no image below {root / VAL}: get them from" in text and "use --imagenet none" in text


def test_a_folder_that_cannot_be_listed_is_told(root, monkeypatch):
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith("/2"):
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert message(load_webvision, root, 4) == f"{root / VAL / '2'} cannot be listed (Permission denied)"


def test_a_damaged_list_of_synsets_is_told(by_synset):
    lines = lines_of(by_synset / SYNSETS)
    for damaged in (lines[:-1], [*lines[:-1], lines[0]], [*lines, lines[0]]):
        write_lines(by_synset / SYNSETS, damaged)
        counts = f"{len({*damaged})} synsets in {len(damaged)} lines, not 1000"
        assert message(load_webvision, by_synset, 4).startswith(f"{by_synset / SYNSETS}: {counts}")


def test_the_counts_are_printed_and_where_they_are_not_the_official_ones(all_classes, capsys):
    load_webvision(all_classes)
    assert capsys.readouterr().out.splitlines() == [
        "webvision train: 50 images of 50 classes",
        "note: the train list names 50 images, the official one 65944",
        "webvision test: 50 images of 50 classes",
        "note: the test list names 50 images, the official one 2500",
        "webvision imagenet: 50 images of 50 classes",
        "note: the imagenet list names 50 images, the official one 2500",
    ]


def test_skip_leaves_out_missing_and_damaged_images_of_every_split(root):
    data = load_webvision(root, 4)
    for split, i, kind in (
        *((data.train, 0, "empty"), (data.train, 11, "missing"), (data.test, 3, "text")),
        *((data.imagenet, 6, "truncated"), (data.imagenet, 0, "missing")),  # the last one is on no list
    ):
        plant(split.path(i), kind)
    found = load_webvision(root, 4, "skip")
    train = np.delete(np.arange(24), [0, 11])
    assert (found.positions.tolist(), found.listed) == (train.tolist(), 24)
    assert found.verified.tolist() == [-1] * 22
    kept = {"train": train, "test": np.delete(np.arange(8), 3), "imagenet": np.array([1, 2, 3, 4, 5, 7])}
    for part, positions in kept.items():
        split, whole = getattr(found, part), getattr(data, part)
        assert split.paths.tolist() == whole.paths[positions].tolist()
        assert np.array_equal(split.labels, whole.labels[positions])
    bad = ((data.train, 0, 0), (data.train, 11, 11), (data.test, 3, 3), (data.imagenet, 6, 5))
    assert [skipped[:2] for skipped in found.skipped] == [(str(split.path(i)), at) for split, i, at in bad]
    with pytest.raises(ValueError, match="on_bad_image must be error or skip, got guess"):
        load_webvision(root, 4, "guess")


def test_damaged_images_of_one_folder_are_not_those_of_another(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    make_webvision(other)  # the same names
    damaged = load_webvision(root, 4).imagenet.path(2)
    plant(damaged, "truncated")
    for _ in range(2):
        assert [path for path, *_ in load_webvision(root, 4, "skip").skipped] == [str(damaged)]
        assert load_webvision(root, 4, "skip", imagenet=other / "imagenet").skipped == ()


def test_check_of_a_whole_data_set_says_so(all_classes, capsys):
    words = ["check", "webvision", "--data_path", str(all_classes), "--workers", "0"]
    main([*words, "--images"])
    lines = capsys.readouterr().out.splitlines()
    assert "webvision imagenet: 50 images of 50 classes" in lines
    assert "note: the train list names 50 images, the official one 65944" in lines
    assert lines[-1] == f"webvision in {all_classes}: every image is there and whole"
    main([*words, "--imagenet", "none"])
    printed = capsys.readouterr().out
    assert "webvision imagenet" not in printed
    assert printed.endswith(f"webvision in {all_classes}: every image is there\n")


def test_it_is_loaded_by_its_name(all_classes):
    assert "webvision" in datasets.FILE_NAMES
    assert_same(datasets.load_files("webvision", all_classes), load_webvision(all_classes))
    assert datasets.load_files("webvision", all_classes, imagenet="none").imagenet is None
    plant(load_webvision(all_classes).test.path(2), "text")
    found = datasets.load_files("webvision", str(all_classes), on_bad_image="skip", workers=1)
    assert found.test.labels.tolist() == [0, 1, *range(3, 50)]


def test_the_command_takes_another_number_of_classes(root, tmp_path_factory, capsys):
    words = ["--data_path", str(root), "--workers", "0", "--num_class", "4"]
    main(["check", "webvision", *words])
    out = capsys.readouterr().out
    assert "webvision train: 24 images of 4 classes" in out and "every image is there" in out
    assert "note: the test list names 8 images, the official one 200" in out and "65944" not in out
    folder = tmp_path_factory.mktemp("cache")
    main(["cache", "webvision", *words, "--size", "20", "--out", str(folder)])
    assert len(open_caches(folder, load_webvision(root, 4), (20,))["train"]) == 24
    for number in ("1", "1001"):
        text = message(main, ["check", "webvision", "--data_path", str(root), "--num_class", number])
        assert text.startswith(f"--num_class {number}: WebVision has 1000 classes")


def test_the_command_makes_a_cache_of_the_size_that_is_asked_for(all_classes, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("cache")
    words = ["cache", "webvision", "--data_path", str(all_classes), "--workers", "0", "--size", "20"]
    assert "needs --out" in message(main, words)
    main([*words, "--out", str(folder / "all")])
    assert f"webvision imagenet: 50 images in {folder / 'all/imagenet'}" in capsys.readouterr().out
    data, transform = load_webvision(all_classes), augment.resize_and_center_crop(20, 16)
    caches = open_caches(folder / "all", data, (320, 20))
    assert {part: len(cache) for part, cache in caches.items()} == {"train": 50, "test": 50, "imagenet": 50}
    for part, cache in caches.items():
        assert torch.equal(transform(cache[9]), transform(getattr(data, part).read(9)))
    for sizes in ([()], [(320,)], [(256, 19)], []):
        assert "another list or size" in message(open_caches, folder / "all", data, *sizes)
    main([*words, "--out", str(folder / "all")])  # nothing to do
    assert "another list or size" in message(main, [*words[:-1], "21", "--out", str(folder / "all")])

    plant(data.imagenet.path(4), "truncated")
    words += ["--out", str(folder / "some")]
    assert "image 4 of the imagenet list" in message(main, words)
    main([*words[:-1], str(folder / "two"), "--imagenet", "none"])
    assert sorted(path.name for path in (folder / "two").iterdir()) == ["test", "train"]
    main([*words, "--on_bad_image", "skip"])
    kept = load_webvision(all_classes, on_bad_image="skip")
    assert len(open_caches(folder / "some", kept, (20,))["imagenet"]) == 49


@pytest.mark.parametrize("size", [(500, 400), (330, 470), (320, 320), (90, 60)])
def test_training_sees_the_same_pixels_in_a_cache_of_320_as_in_the_files(tmp_path, size):
    make_webvision(tmp_path / "data", classes=2, per_class=2, test_per_class=1, size=size)
    data = load_webvision(tmp_path / "data", 2)
    build(data.train, tmp_path / "cache", 320)
    cache = open_cache(tmp_path / "cache", data.train, (320,))
    assert "another list or size" in message(open_cache, tmp_path / "cache", data.train)
    transform = augment.resize_random_resized_crop_and_flip()
    for whole, small in zip(views(data, transform, None), views(data, transform, cache), strict=True):
        assert whole.shape[1:] == (3, 299, 299)
        assert torch.equal(whole, small)


def views(data: FileData, transform, cache) -> list[torch.Tensor]:
    """Two views of every training image, from the files or a cache, drawn by a generator of the same state."""
    loading = {"mean": data.mean, "std": data.std, "device": torch.device("cpu"), "workers": 0, "views": 2}
    generator = torch.Generator().manual_seed(5)
    batches = FileBatches(data.train, 4, transform, shuffle=True, generator=generator, cache=cache, **loading)
    (found, _), *_ = batches
    return list(found)
