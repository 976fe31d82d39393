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
from tests.common.small_file_data import labelled, make_webvision, plant, read_lines, write_lines
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


def files(split: FileSplit) -> list[Path]:
    return [split.path(i) for i in range(len(split.paths))]


def content(data: FileData) -> list:
    """The images and labels of all splits."""
    return [(split.folder, labelled(split)) for split in data.splits()]


def test_images_and_labels_are_those_of_the_lists_in_their_order(root):
    data = load_webvision(root, 4)
    assert (data.name, data.num_classes, data.classes) == ("webvision", 4, ("0", "1", "2", "3"))
    for split, file, folder in ((data.train, TRAIN, root), (data.test, TEST, root / "val_images_256")):
        lines = [line.split() for line in read_lines(root / file)]
        assert labelled(split) == [(path, int(label)) for path, label in lines if int(label) < 4]
        assert (split.labels.dtype, split.paths.dtype.kind, split.folder) == (np.int64, "S", folder)
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
        assert labelled(split) == [image for image in labelled(other) if image[1] < num_class]
    # positions count the images of these classes: other lines have none
    assert data.positions.tolist() == list(range(6 * num_class))
    assert data.listed == len(data.verified) == 6 * num_class


def test_all_thousand_classes_can_be_asked_for_and_no_more(root):
    data = read_webvision(root, 1000, "none")  # the lists alone: the images of higher classes are not there
    assert len(data.train.labels) == len(read_lines(root / TRAIN)) == 31
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
    write_lines(root / file, [line for line in read_lines(root / file) if int(line.split()[1]) > 3])
    assert message(load_webvision, root, 4) == f"{root / file}: no image of the first 4 classes in it"


def test_folders_by_synset_have_the_labels_that_the_list_of_synsets_gives_them(by_synset, tmp_path_factory):
    by_id = tmp_path_factory.mktemp("by_id")
    make_webvision(by_id)
    found, expected = load_webvision(by_synset, 4), load_webvision(by_id, 4)
    synsets = [line.split()[0] for line in read_lines(by_synset / SYNSETS)]
    assert synsets[:4] != sorted(synsets[:4])
    assert found.classes == tuple(synsets[:4])
    assert [path.parent.name for path in files(found.imagenet)] == [synsets[k] for k in found.imagenet.labels]
    assert found.imagenet.labels.tolist() == expected.imagenet.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for one, other in zip(files(found.imagenet), files(expected.imagenet), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_folders_by_class_id_come_first(root):
    before = load_webvision(root, 4)
    make_webvision(root, by_synset=True)  # folders of the other kind beside them, and the list
    after = load_webvision(root, 4)
    assert content(after) == content(before)
    assert after.classes[:2] == ("n02000000", "n01999000")  # which names the classes all the same


def test_images_are_in_the_order_of_classes_and_names_and_hidden_files_are_none(root):
    first = sorted((root / VAL / "0").iterdir())
    for name in ("ILSVRC2012_val_00000000.JPEG", "A.JPEG", "z.JPEG"):
        (root / VAL / "0" / name).write_bytes(first[0].read_bytes())
    for name in ("0/.DS_Store", "0/._ILSVRC2012_val_00000001.JPEG", "0/Thumbs.db", "0/val.txt", "devkit.txt"):
        (root / VAL / name).touch()
    expected = ["A.JPEG", "ILSVRC2012_val_00000000.JPEG", *(path.name for path in first), "z.JPEG"]
    found = load_webvision(root, 2).imagenet
    assert labelled(found)[:5] == [(f"0/{name}", 0) for name in expected]
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
    val = by_synset / VAL
    (by_synset / SYNSETS).unlink()
    line = rf"{val} has no folder 0, 1, \.\.\., .* no {SYNSETS} to find .* use --imagenet none"
    assert re.search(line, message(load_webvision, by_synset, 4))
    assert load_webvision(by_synset, 4, imagenet="none").imagenet is None
    make_webvision(by_synset)  # folders by class id beside them
    for k in (1, 3):
        (val / str(k)).rename(by_synset / f"{k} is not there")
    line = rf"looked in {val} for .* 4 classes .* 1 is missing \(2 are\): .* use --imagenet none"
    assert re.search(line, message(load_webvision, by_synset, 4))


def write_kit(folder: Path, synsets: list[str]) -> dict[str, int]:
    """A development kit's meta.mat, which numbers the synsets in another order; its ids."""
    ids = {synset: number for number, synset in enumerate(sorted(synsets), start=1)}
    rows = np.array([*ids.items()], dtype=[("WNID", "O"), ("ILSVRC2012_ID", "i4")])
    savemat(folder / "meta.mat", {"synsets": rows})
    return ids


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
    path, val = by_synset / file, by_synset / VAL
    class_of = {Path(name).stem: label for name, label in labelled(load_webvision(by_synset, 4).imagenet)}
    synsets = [line.split()[0] for line in read_lines(by_synset / SYNSETS)]
    for image in [*val.glob("*/*")]:
        image.rename(val / image.name)
    for folder in [below for below in val.iterdir() if below.is_dir()]:
        folder.rmdir()
    text = message(load_webvision, by_synset, 4)
    assert f"the images in {val} are in no folder per class: put val.txt or " in text
    if kind == "kit":
        path.write_text("1\n" * 8)
        assert "put the development kit's meta.mat beside it" in message(load_webvision, by_synset, 4)
        ids = write_kit(path.parent, synsets)
        lines = [str(ids[synsets[class_of[name]]]) for name in sorted(class_of)]
    else:
        line = {"id": "{0}.JPEG {1}", "synset": "{0}.JPEG\t{2}", "kaggle": "{0},{2} 1 2 3 4"}[kind]
        heading = ["ImageId,PredictionString"] * (kind == "kaggle")
        lines = heading + [line.format(name, k, synsets[k]) for name, k in class_of.items()]
    write_lines(path, lines)
    found = {Path(name).stem: label for name, label in labelled(load_webvision(by_synset, 3).imagenet)}
    assert found == {name: label for name, label in class_of.items() if label < 3}
    write_lines(path, lines[:-1])
    assert re.search("has no line for|holds 7 ids for 8 images", message(load_webvision, by_synset, 4))


def test_training_images_may_be_the_small_ones(root):
    expected = load_webvision(root, 4).train
    (root / "google").rename(root / "google_resized_256")
    found = load_webvision(root, 4).train
    assert [path.name for path in files(found)] == [path.name for path in files(expected)]
    assert all(path.is_file() for path in files(found))


def test_folders_without_images_are_told_and_a_single_one_is_counted(root, monkeypatch, capsys):
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith("/2"):
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        assert message(load_webvision, root, 4) == f"{root / VAL / '2'} cannot be listed (Permission denied)"
    for path in (root / VAL / "2").iterdir():
        path.unlink()
    assert load_webvision(root, 4).imagenet.labels.tolist() == [0, 0, 1, 1, 3, 3]
    assert "note: the imagenet list names 6 images, the official one 200" in capsys.readouterr().out
    for path in (root / VAL).glob("*/*"):
        path.unlink()
        (path.parent / ".gitkeep").touch()
    text = message(load_webvision, root, 4)
    assert f"webvision: no image below {root / VAL}: get them from" in text and "use --imagenet none" in text


def test_a_damaged_list_of_synsets_is_told(by_synset):
    lines = read_lines(by_synset / SYNSETS)
    for damaged in (lines[:-1], [*lines[:-1], lines[0]], [*lines, lines[0]]):
        write_lines(by_synset / SYNSETS, damaged)
        counts = f"{len({*damaged})} synsets in {len(damaged)} lines, not 1000"
        assert message(load_webvision, by_synset, 4).startswith(f"{by_synset / SYNSETS}: {counts}")


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
    kept = train.tolist(), [0, 1, 2, 4, 5, 6, 7], [1, 2, 3, 4, 5, 7]
    for split, whole, positions in zip(found.splits(), data.splits(), kept, strict=True):
        assert labelled(split) == [labelled(whole)[i] for i in positions]
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


def test_loading_and_check_print_the_counts_and_which_are_not_the_official_ones(all_classes, capsys):
    load_webvision(all_classes)
    counts = capsys.readouterr().out.splitlines()
    assert counts == [
        "webvision train: 50 images of 50 classes",
        "note: the train list names 50 images, the official one 65944",
        "webvision test: 50 images of 50 classes",
        "note: the test list names 50 images, the official one 2500",
        "webvision imagenet: 50 images of 50 classes",
        "note: the imagenet list names 50 images, the official one 2500",
    ]
    words = ["check", "webvision", "--data_path", str(all_classes), "--workers", "0"]
    end = f"webvision in {all_classes}: every image is there"
    main([*words, "--images"])
    assert capsys.readouterr().out.splitlines() == [*counts, f"{end} and whole"]
    main([*words, "--imagenet", "none"])
    assert capsys.readouterr().out.splitlines() == [*counts[:4], end]


def test_it_is_loaded_by_its_name(all_classes):
    assert "webvision" in datasets.FILE_NAMES
    assert content(datasets.load_files("webvision", all_classes)) == content(load_webvision(all_classes))
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
    options = {"mean": data.mean, "std": data.std, "device": torch.device("cpu"), "workers": 0, "views": 2}
    views = []
    for source in (None, cache):
        options |= {"cache": source, "shuffle": True, "generator": torch.Generator().manual_seed(5)}
        ((found, _),) = FileBatches(data.train, 4, augment.resize_random_resized_crop_and_flip(), **options)
        views.append(torch.cat(found))
    assert views[0].shape == (8, 3, 299, 299) and torch.equal(*views)
