"""A folder of your own images: what it lists, its test part, its check, and training on it."""

import csv
import json
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from afm import data as afm_data
from afm import train as afm_train
from afm.flags import parse_args as parse_afm_args
from common import datasets
from common.datasets.__main__ import main as command
from common.datasets.folder import load_folder, load_folder_files, ordered, split_off
from common.gpu.device import Device
from manifold_dividemix import train_semisup_miniimagenet
from me_momentum import Clothing
from sanm import Train_clothing1M
from sfa import Train_cifar, Train_webvision
from sfa.flags import cifar_directory, parse_cifar_args
from tests.common.small_file_data import write_lines
from tests.end_to_end.small_networks import masked_network
from tests.lines import message, refused

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CLASSES = ("B", "a", "b10", "b2")  # in the order of their ids
LABELS = np.repeat([0, 1, 2, 3], [10, 6, 5, 9])


def paint(path: Path, label: int, number: int, size: int = 8) -> None:
    """A small PNG whose corner pixel is (number, label, 7)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((size, size, 3), 20 * label, dtype=np.uint8)
    image[0, 0] = number, label, 7
    Image.fromarray(image).save(path)


def make_folders(root: Path, labels=LABELS, test: bool = True) -> None:
    """Class folders: one training image of each class lies a folder deeper."""
    for number, label in enumerate(labels):
        deeper = "deep" if number and labels[number - 1] != label else ""
        paint(root / "train" / CLASSES[label] / deeper / f"{number:02}.png", label, number)
    for number, label in enumerate([3, 2, 1, 0] if test else []):
        paint(root / "test" / CLASSES[label] / f"{number}.PNG", label, 100 + number)


def make_lists(root: Path, names=CLASSES, truth: bool = True) -> None:
    """train.csv with the true labels LABELS or none, where the first image of each class has the next class's; and test.csv."""
    wrong = np.append(True, LABELS[1:] != LABELS[:-1])
    rows = ["path,note,label,true_label"]
    for number, label in enumerate(LABELS):
        paint(root / "pictures" / f"{number:02}.png", label, number)
        given = names[(label + wrong[number]) % 4]
        rows.append(f'pictures/{number:02}.png,"a, b",{given},{names[label]}')
    paint(root / "t.png", 3, 100)
    write_lines(root / "train.csv", rows if truth else [row.rpartition(",")[0] for row in rows])
    write_lines(root / "test.csv", ["label,path", f"{names[3]},t.png"])


# what it lists --------------------------------------------------------------------------------------------------------


def test_class_folders_have_the_classes_and_the_order_of_torchvisions_imagefolder(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/.hidden").mkdir()
    expected = ImageFolder(tmp_path / "train", allow_empty=True)
    data = load_folder(tmp_path, size=8)
    assert data.classes == CLASSES == tuple(name for name in expected.classes if name[0] != ".")
    assert [os.path.join(tmp_path, path) for path in data.paths] == [path for path, _ in expected.samples]
    assert data.train.labels.tolist() == LABELS.tolist() == [label - 1 for _, label in expected.samples]
    assert data.train.images[:, 0, 0].tolist() == [
        [int(Path(path).stem), label, 7] for path, label in zip(data.paths, LABELS, strict=True)
    ]
    assert (data.name, data.num_classes, data.test.labels.tolist()) == ("folder", 4, [0, 1, 2, 3])
    assert data.test.images[:, 0, 0, 0].tolist() == [103, 102, 101, 100]
    assert data.mean == pytest.approx((data.train.images / 255).mean(axis=(0, 1, 2)))
    assert np.array_equal(data.noisy_labels, LABELS) and not data.truth_known
    some = np.array([4, 2])
    assert data.true_labels(some, "given") is None
    assert data.true_labels(some, "symmetric").tolist() == LABELS[some].tolist()


@pytest.mark.parametrize("names", [CLASSES, ("0", "1", "2", "3"), ("3", "11", "0", "2")])
def test_a_list_has_observed_labels_and_true_ones_or_none(names, tmp_path):
    make_lists(tmp_path, names)
    data = load_folder(tmp_path, size=8)
    ids = names if names == CLASSES else tuple(map(str, range(max(map(int, names)) + 1)))
    assert data.classes == ids and data.num_classes == len(ids)
    true = np.array([ids.index(name) for name in names])[LABELS]
    assert np.array_equal(data.train.labels, true) and data.truth_known
    assert np.flatnonzero(data.noisy_labels != true).tolist() == [0, 10, 16, 21]
    assert data.noisy_labels[0] == ids.index(names[1])
    assert data.test.labels.tolist() == [ids.index(names[3])] and data.paths[3] == "pictures/03.png"
    assert np.array_equal(data.true_labels(np.arange(30), "given"), true)
    files = load_folder_files(tmp_path)
    assert files.verified.tolist() == (data.noisy_labels == true).tolist()
    assert np.array_equal(files.train.labels, data.noisy_labels)
    make_lists(tmp_path, names, truth=False)
    data = load_folder(tmp_path, size=8)
    assert np.array_equal(data.train.labels, data.noisy_labels) and not data.truth_known
    assert set(load_folder_files(tmp_path).verified.tolist()) == {-1}


def test_names_of_classes_are_ids_only_if_all_are_whole_numbers():
    assert ordered({"10", "2", "x"}, 9) == ("10", "2", "x")
    assert ordered({"02", "1"}, 9) == ("02", "1")
    assert ordered({"2", "0"}, 3) == ("0", "1", "2")
    with pytest.raises(ValueError, match="label 3 is too large for 3 images"):
        ordered({"3", "0"}, 3)


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["file,label", "a.png,1"], "train.csv: has no column path: its first line must name path,label"),
        (["path,label", "a.png,1", "b.png,"], "train.csv: line 3: no label; fill the column in every row"),
        (["path,label,true_label", "a.png,1", ], "train.csv: line 2: no true_label"),
        (["path,label", "a.png,1", "a.png,0"], "train.csv: line 3: a.png is there already, in line 2"),
        (["path,label"], "train.csv: no image in it"),
        (["path,label", "a.png,x", "b.png,x"], "its training images are of 1 class, 2 at least are needed"),
        (["path,label", "a.png,7", "b.png,0"], "train.csv: label 7 is too large for 2 images"),
    ],
)  # fmt: skip
def test_a_bad_list_is_named_with_its_line(lines, line, tmp_path):
    write_lines(tmp_path / "train.csv", lines)
    assert line in message(load_folder, tmp_path)


def test_a_folder_of_another_layout_is_refused(tmp_path):
    assert "needs DIR/train/CLASS/ with image files, or DIR/train.csv" in message(load_folder, tmp_path)
    make_folders(tmp_path)
    paint(tmp_path / "test/new/1.png", 0, 0)
    assert "class new of the test part is not among the 4 of train" in message(load_folder, tmp_path)
    (tmp_path / "train/empty").mkdir()
    assert "train/empty holds no image: remove it" in message(load_folder, tmp_path)


# the test part --------------------------------------------------------------------------------------------------------


def test_without_a_test_part_a_stratified_fifth_is_tested_on_the_same_one_at_every_call(tmp_path, capsys):
    labels = np.repeat([0, 1, 2, 3], [20, 10, 5, 15])
    make_folders(tmp_path, labels, test=False)
    data = load_folder(tmp_path, 8)
    files, half = (load_folder_files(tmp_path, split) for split in (0.2, 0.5))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and "has no test part: --test_split 0.2" in warnings[0]
    assert "as noisy as those that are trained on" in warnings[0]
    assert np.bincount(data.test.labels).tolist() == [4, 2, 1, 3]
    assert np.bincount(half.test.labels).tolist() in ([10, 5, 2, 8], [10, 5, 3, 7])
    assert np.array_equal(data.train.labels, files.train.labels) and files.listed == len(data.paths) == 40
    tested = {os.fsdecode(path) for path in files.test.paths}
    assert len(tested) == 10 and len(tested | {*data.paths}) == 50
    assert sorted(data.test.images[:, 0, 0, 0]) != list(range(10)), "not simply the first ones"


def test_with_true_labels_those_are_tested_on_without_a_warning(tmp_path, capsys):
    make_lists(tmp_path)
    (tmp_path / "test.csv").unlink()
    data = load_folder(tmp_path, 8)
    assert not capsys.readouterr().err
    everything = np.concatenate([data.train.images, data.test.images])[:, 0, 0, 1]
    assert np.array_equal(everything, np.concatenate([data.train.labels, data.test.labels]))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0])
def test_a_split_that_leaves_one_side_empty_is_refused(fraction):
    assert message(split_off, LABELS, fraction).startswith(f"--test_split {fraction}: ")


# images ---------------------------------------------------------------------------------------------------------------


def test_images_are_decoded_once_until_one_changes(tmp_path, monkeypatch):
    make_folders(tmp_path)
    decode = Mock(wraps=datasets.mini_imagenet._decode)
    monkeypatch.setattr(datasets.mini_imagenet, "_decode", decode)
    first = load_folder(tmp_path, 4).train.images
    assert first.shape == (30, 4, 4, 3) and decode.call_count == 2
    assert np.array_equal(load_folder(tmp_path, 4).train.images, first) and decode.call_count == 2
    paint(tmp_path / "train/B/03.png", 3, 200)
    changed = load_folder(tmp_path, 4).train.images
    assert decode.call_count == 3 and not np.array_equal(changed[3], first[3])


def test_a_damaged_image_stops_or_is_left_out(tmp_path):
    make_lists(tmp_path)
    (tmp_path / "pictures/07.png").write_bytes(b"no picture")
    line = message(load_folder, tmp_path, 8)
    assert "image 7 of the train list" in line and "07.png" in line and "--on_bad_image skip" in line
    data = load_folder(tmp_path, 8, on_bad_image="skip")
    assert data.skipped == ((str(tmp_path / "pictures/07.png"), 7, "no image of a known format"),)
    assert "pictures/07.png" not in data.paths and len(data.paths) == 29
    assert data.train.images[:, 0, 0, 1].tolist() == data.train.labels.tolist()
    assert np.flatnonzero(data.noisy_labels != data.train.labels).tolist() == [0, 9, 15, 20]


# check ----------------------------------------------------------------------------------------------------------------


def test_check_counts_images_classes_sizes_and_lists_copies_under_two_labels(tmp_path, capsys):
    make_folders(tmp_path)
    for new, old in (("a/again", "a/11"), ("b2/twin", "B/02"), ("../test/a/shared", "a/12")):
        (tmp_path / f"train/{new}.png").write_bytes((tmp_path / f"train/{old}.png").read_bytes())
    paint(tmp_path / "train/a/large.png", 1, 50, size=12)
    command(["check", "folder", "--data_path", str(tmp_path), "--images", "--workers", "0"])
    text, errors = capsys.readouterr()
    assert "folder train: 33 images of 4 classes, from 5 (b10) to 10 (B) a class" in text
    assert "width x height 8 x 8 (32 images), 12 x 12 (1 images)" in text
    assert "folder test: 5 images of 4 classes" in text and "folder: 3 copies of other images" in text
    [twins] = [line for line in text.splitlines() if "one of them is wrong" in line]
    assert "02.png (train B)" in twins and "twin.png (train b2)" in twins
    assert "warning: 1 images are in train and in test" in errors and "every image is there and whole" in text


def test_check_names_missing_and_damaged_images_and_the_noise_rate_of_a_list(tmp_path, capsys):
    make_lists(tmp_path)
    (tmp_path / "test.csv").unlink()
    (tmp_path / "pictures/05.png").unlink()
    (tmp_path / "pictures/06.png").write_bytes(b"no picture")
    line = message(command, ["check", "folder", "--data_path", str(tmp_path)])
    assert "2 images missing or damaged" in line
    text = capsys.readouterr().out
    assert f"missing: {tmp_path}/pictures/05.png" in text and f"damaged: {tmp_path}/pictures/06.png" in text
    assert "4 labels are not the true ones, 13.3 %" in text and "folder test: none" in text


# training -------------------------------------------------------------------------------------------------------------

SFA = "--dataset folder --image_size 8 --workers 0 --num_epochs 2 --warm_up 1 --batch_size 8 --device cpu --data_path"
AFM = "--dataset folder --image_size 8 --workers 0 --network resnet18 --epochs 2 --train-batch 8 --device cpu --data-root"


def trained(main, words: str, root: Path, *more: str) -> tuple[dict, list[dict]]:
    """noise.json and the rows of the log of a run on the folder."""
    out = root / "run"
    main([*words.split(), str(root), *more, "--out", str(out)])
    with (out / "log.csv").open() as file:
        return json.loads((out / "noise.json").read_text()), list(csv.DictReader(file))


def test_sfa_trains_on_a_folder_and_knows_what_its_true_labels_tell(tmp_path):
    make_lists(tmp_path)
    noise, rows = trained(Train_cifar.main, SFA, tmp_path)
    assert (noise["samples"], noise["realised_rate"]) == (30, pytest.approx(4 / 30))
    assert len(rows) == 2 and rows[1]["net1_precision"]
    arguments = json.loads((tmp_path / "run/args.json").read_text())["arguments"]
    expected = {"noise_mode": "given", "imb_type": "none", "min_draw_count": 1}
    assert arguments | expected == arguments
    kept = np.load(tmp_path / "run/noisy_labels.npz")
    assert np.array_equal(kept["labels"], load_folder(tmp_path, 8).noisy_labels[kept["index"]])


def test_sfa_does_not_claim_precision_where_the_true_labels_are_unknown(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train/B/04.png").write_bytes(b"")
    noise, rows = trained(Train_cifar.main, SFA, tmp_path, "--on_bad_image", "skip")
    assert (noise["samples"], noise["realised_rate"]) == (29, None)
    assert rows[1]["net1_selected"] and not rows[1]["net1_precision"] and not rows[1]["right_selected_min"]
    assert "clean" not in np.load(tmp_path / "run/clean_probability.npz")
    assert "04.png" in (tmp_path / "run/skipped_images.csv").read_text()


def test_afm_trains_on_a_folder(tmp_path):
    make_folders(tmp_path)
    noise, rows = trained(afm_train.main, AFM, tmp_path)
    assert (noise["samples"], noise["realised_rate"]) == (30, None)
    assert len(rows) == 2 and rows[1]["attention_peak"] and not rows[1]["attention_auc"]


def test_afm_reads_the_files_in_every_epoch_at_the_size_of_its_crops(tmp_path, capsys):
    make_lists(tmp_path)
    words = [*AFM.split(), str(tmp_path), "--image_size", "224", "--limit_train", "16"]
    cpu = Device(torch.device("cpu"), "fp32", "tests")
    data = afm_data.load(parse_afm_args(words), cpu, torch.Generator().manual_seed(0))
    (images,), _ = next(iter(data.train.batches))
    assert images.shape == (8, 3, 224, 224) and not (tmp_path / "decoded").exists()
    assert data.known.tolist() == (data.clean == data.observed).tolist() and 0 in data.known
    assert np.array_equal(data.clean, load_folder(tmp_path, 8).train.labels[data.index])
    line = refused(capsys, parse_afm_args, *words, "--noise-type", "symmetric")
    assert "--noise-type: symmetric noise is drawn on images in memory" in line


@pytest.mark.parametrize(("words", "wrong"), [([], 0), (["--noise_mode", "sym", "--noise_ratio", "0.5"], 15)])
def test_noise_is_drawn_on_a_folder_only_if_it_is_asked_for(words, wrong, tmp_path):
    make_folders(tmp_path)
    args = parse_cifar_args([*SFA.split(), str(tmp_path), *words])
    data = datasets.from_arguments(vars(args))
    index, observed = Train_cifar.long_tailed_noisy(data, args)
    assert (observed != LABELS[index]).sum() == pytest.approx(wrong, abs=2)
    truth = data.true_labels(index, args.noise_mode)
    assert truth is None if not words else np.array_equal(truth, LABELS[index])


def test_two_folders_have_two_run_directories_and_other_data_sets_keep_theirs():
    def name(*words: str) -> str:
        return cifar_directory(parse_cifar_args(["--data_path", *words]))

    assert name("x/cats", "--dataset", "folder").startswith("dataset_folder_cats-imb_type_none-")
    assert name("dogs/", "--dataset", "folder").startswith("dataset_folder_dogs-")
    usual = "dataset_cifar10-imb_type_exp-imb_factor_0.01-noise_mode_imb-noise_ratio_0.5-seed_123"
    assert name("x") == usual


def test_a_script_of_one_data_set_says_who_reads_folders(capsys):
    line = refused(capsys, train_semisup_miniimagenet.main, "--dataset", "folder")
    assert "use manifold_dividemix/train_semisup.py" in line


# the scripts for image files, with flags
SMALL = "--network resnet18 --image_size 64 --batch_size 4"
FILE_SCRIPTS = {
    "afm": (afm_train, "--network preact_narrow --image_size 224 --train_batch 8 --test_batch 8 --epochs 1"),
    "sfa": (Train_webvision, "--network resnet18 --image_size 33 --batch_size 4 --num_epochs 2"),
    "me_momentum": (Clothing, f"{SMALL} --no_pretrain --n_epoch 1 --max_inner_loop 2 --max_outer_loop 1"),
    "sanm": (Train_clothing1M, f"{SMALL} --pretrained none --num_batches 4 --num_epochs 1"),
}


@pytest.mark.slow  # two runs each
@pytest.mark.parametrize("paper", FILE_SCRIPTS)
def test_the_scripts_for_files_read_a_folder_and_train_on_decisions(paper, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Train_clothing1M, "clothing_network", masked_network)
    make_lists(tmp_path)
    (tmp_path / "pictures/07.png").write_bytes(b"no picture")
    script, words = FILE_SCRIPTS[paper]
    words = f"--dataset folder --data_path {tmp_path} --workers 0 --device cpu --on_bad_image skip {words}"
    script.main([*words.split(), "--out", str(tmp_path / "first")])
    rows = quality_of(tmp_path / "first")
    # without a validation part six of the 30 images validate; image 7 is damaged, it trains in no script
    validates = paper in ("me_momentum", "sanm")
    assert len(rows) in ((23, 24) if validates else (29,)) and 7 not in rows
    assert ("has no validation part: --test_split 0.2" in capsys.readouterr().err) == validates
    truth, names = LABELS.tolist(), list(CLASSES)
    for index, row in rows.items():
        assert row["path"] == str(tmp_path / f"pictures/{index:02}.png") and row["score"]
        assert int(row["true_label"]) == truth[index] and row["given_class"] == names[int(row["given_label"])]
    noise = json.loads((tmp_path / "first/noise.json").read_text())
    wrong = [i for i, row in rows.items() if row["given_label"] != row["true_label"]]
    assert noise["samples"] == len(rows) and noise["realised_rate"] == pytest.approx(len(wrong) / len(rows))
    assert "07.png" in (tmp_path / "first/skipped_images.csv").read_text()

    removed = next(i for i in rows if i not in wrong)
    lines = ["index,path,given_label,decision,new_label"]
    for index, row in rows.items():
        decision = "remove," if index == removed else "keep,"
        if index in wrong:
            decision = f"relabel,{row['true_label']}"
        lines.append(f"{index},{row['path']},{row['given_label']},{decision}")
    write_lines(tmp_path / "decisions.csv", lines)
    words = f"{words} --noise_file {tmp_path / 'decisions.csv'} --out {tmp_path / 'second'}"
    script.main(words.split())
    corrected = quality_of(tmp_path / "second")
    assert corrected.keys() == rows.keys() - {removed}
    assert all(int(row["given_label"]) == truth[index] for index, row in corrected.items())
    assert f"decisions.csv: {len(wrong)} labels changed, 1 images removed\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "second/result.json").read_text())
    counted = {"relabelled": len(wrong), "removed": 1, "samples": len(corrected)}
    assert result["noise"] | counted == result["noise"]
    assert result["dataset"] == "folder" and result["profile"] == "short+removed=1"


def test_decisions_about_other_files_are_refused(tmp_path):
    make_lists(tmp_path)
    lines = ["index,path,given_label,decision,new_label", *(f"{i},x/{i:02}.png,0,keep," for i in range(30))]
    write_lines(tmp_path / "decisions.csv", lines)
    data, files = load_folder(tmp_path, 8), load_folder_files(tmp_path)
    some, path = np.array([8, 2]), tmp_path / "decisions.csv"
    assert datasets.observed_labels(data, some, "given", 0, 0, path).tolist() == [0, 0]
    assert datasets.relabelled(files, path).train.labels.tolist() == [0] * 30
    (tmp_path / "pictures/07.png").write_bytes(b"no picture")
    data, files = load_folder(tmp_path, 8, on_bad_image="skip"), load_folder_files(tmp_path, 0.2, "skip")
    assert 7 not in files.positions and len(datasets.relabelled(files, path).train.labels) == 29
    line = message(datasets.observed_labels, data, some, "given", 0, 0, path)
    assert "decisions.csv: image 8 is x/08.png there, and pictures/09.png in this data set: export" in line


def quality_of(run: Path) -> dict[int, dict[str, str]]:
    """The rows of label_quality.csv by image."""
    with (run / "label_quality.csv").open(newline="") as file:
        return {int(row["index"]): row for row in csv.DictReader(file)}


def test_a_folder_may_have_a_validation_part_and_positions_do_not_move_without_one(tmp_path, capsys):
    make_lists(tmp_path)
    usual, held = load_folder_files(tmp_path), load_folder_files(tmp_path, validates=True)
    assert "validate, with their observed labels" in capsys.readouterr().err and usual.validation is None
    assert (len(held.positions), len(held.validation.labels), held.listed) == (24, 6, 30)
    assert np.array_equal(held.train.paths, usual.train.paths[held.positions])
    assert np.array_equal(held.true_labels, usual.true_labels[held.positions])
    rest = np.setdiff1d(np.arange(30), held.positions)
    assert np.array_equal(held.validation.labels, usual.train.labels[rest])
    write_lines(tmp_path / "validation.csv", ["path,label,true_label", "t.png,a,B"])
    own = load_folder_files(tmp_path, validates=True)
    assert not capsys.readouterr().err and len(own.positions) == 30
    assert own.validation.labels.tolist() == [0] and own.validation.part == "validation"
    command(["check", "folder", "--data_path", str(tmp_path), "--workers", "0"])
    text, errors = capsys.readouterr()
    assert "folder validation: 1 images of 1 classes" in text
    assert "warning: 1 images are in test and in validation" in errors
    write_lines(tmp_path / "validation.csv", ["path,label", "t.png,new"])
    assert "class new of the validation part is not among the 4" in message(load_folder_files, tmp_path)
