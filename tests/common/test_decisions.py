"""decisions.csv as --noise_file: labels are corrected and images left out, in every script, and what is refused."""

import importlib
import json

import numpy as np
import pytest

from common.datasets import labels_of, read_decisions, without_removed
from common.runs.cli import UserError
from common.runs.run import Run
from tests.common.small_file_data import make_clothing1m, make_food101n, make_mini_imagenet, make_webvision

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
HEADING = "index,path,given_label,decision,new_label"
ROWS = ("4,a.png,1,keep,", '0,"b,""1"".png",2,relabel,0', "7,,1,remove,", "2,,0,keep,0")


def write(path, *rows, heading=HEADING):
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return path


def test_labels_are_those_of_the_run_with_the_changes_by_their_index(tmp_path):
    path = write(tmp_path / "decisions.csv", *ROWS)
    assert labels_of(path, np.array([0, 2, 4, 7]), 8, 3).tolist() == [0, 0, 1, 1]
    assert without_removed(np.array([0, 2, 4, 7]), path).tolist() == [0, 2, 4]
    assert without_removed(np.array([1, 2]), path, positions=np.array([5, 7, 4])).tolist() == [2]
    decisions = read_decisions(path)
    assert decisions.relabelled.tolist() == [False, True, False, False]
    write(path, *ROWS[1:])  # a changed file is read again
    assert read_decisions(path).images.tolist() == [0, 7, 2]
    write(path, *ROWS)
    everywhere = labels_of(path, np.arange(8), 8, 3, otherwise=np.full(8, 2))
    assert everywhere.tolist() == [0, 2, 0, 2, 1, 2, 2, 1]


def test_a_table_that_a_spreadsheet_saved_is_read_too(tmp_path):
    rows = [row.replace('"b,""1"".png"', "b").replace(",", ";") for row in ROWS]
    path = write(tmp_path / "decisions.csv", *rows, heading="\ufeff" + HEADING.replace(",", ";"))
    assert without_removed(np.array([0, 2, 4, 7]), path).tolist() == [0, 2, 4]


def test_any_other_file_removes_nothing(tmp_path):
    kept = np.arange(3)
    labels = write(tmp_path / "labels.csv", "0,1", "1,1", "2,0", heading="index,label")
    for file in (None, labels, tmp_path / "nosuch.csv", f"{write(tmp_path / 'd.csv', *ROWS)}:given_label"):
        assert read_decisions(file) is None and without_removed(kept, file) is kept


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("3,,0,drop,", "the decision about image 3 is 'drop': use one of keep, relabel, remove"),
        ("3,,0,relabel,", "image 3 is relabelled without a new_label"),
        ("3,,0,relabel,cat", "column new_label: needs whole numbers, holds 'cat'"),
        ("3,,0,relabel,3", "label 3 at position 4 is outside 0..2"),
        ("3,,x,keep,", "column given_label: needs whole numbers, holds 'x'"),
        ("4,,0,keep,", "column index: names image 4 twice"),
        ("-1,,0,keep,", "column index: names image -1"),
        ("3,,0,keep", "its lines differ in length"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, line):
    path = write(tmp_path / "decisions.csv", *ROWS, row)
    with pytest.raises(UserError) as error:
        labels_of(path, np.array([0]), 8, 3)
    assert line in str(error.value) and str(error.value).startswith(f"--noise_file {path}: ")


def test_images_that_are_not_listed_and_an_empty_training_set_are_refused(tmp_path):
    path = write(tmp_path / "decisions.csv", *ROWS)
    with pytest.raises(UserError, match="no label of training image 3"):
        labels_of(path, np.array([0, 3]), 8, 3)
    with pytest.raises(UserError, match="does not list training image 3: export it from a run on the same"):
        without_removed(np.array([0, 3]), path)
    with pytest.raises(UserError, match="removes all 1 training images"):
        without_removed(np.array([7]), path)


# every script ---------------------------------------------------------------------------------------------------------

DIGITS = "--dataset digits --limit_train 40"
MOMENTUM = DIGITS.replace("40", "100") + " --noise_rate 0.4 --data_percent 0.5"
LIMITED = "--limit_train 9 --workers 0"
CLOTHES = "--data_root {root}" + f" {LIMITED} --batch_size 2"
SCRIPTS = {
    "me_momentum.main": (None, MOMENTUM),
    "sfa.Train_cifar": (None, f"{DIGITS} --noise_ratio 0.4"),
    "sanm.Train_cifar": (None, f"{DIGITS} --base dividemix --r 0.4"),
    "afm.train": (None, f"{DIGITS} --train-batch 8"),
    "manifold_dividemix.train_semisup": (
        None,
        f"{DIGITS} --ood-ratio 0.2 --noise-ratio 0.2 --arch narrow --pretrained none",
    ),
    "afm.train of files": (
        make_food101n,
        "--dataset food --data-root {root} --train-batch 2 --pretrained none",
    ),
    "me_momentum.Clothing": (make_clothing1m, CLOTHES + " --network resnet18 --no_pretrain"),
    "sanm.Train_clothing1M": (
        make_clothing1m,
        CLOTHES.replace("root ", "path ", 1) + " --network resnet18 --pretrained none",
    ),
    "sfa.Train_webvision": (
        make_webvision,
        "--data_path {root} --num_class 4 --imb_factor 0.5 --batch_size 2 --workers 0",
    ),
    "manifold_dividemix.train_semisup_miniimagenet": (
        make_mini_imagenet,
        "--data-dir {root} --arch narrow --pretrained none --img-size 8 " + LIMITED,
    ),
}


class Stop(Exception):
    """Ends a script where it saves its labels; its arguments are theirs."""


def labels_in(script, words, monkeypatch):
    """Training images [n], observed labels [n] and columns of the results of a script that is called with these words."""

    def stop(run, index, clean, noisy, num_classes):
        raise Stop(index, noisy, run._cell_columns())

    with monkeypatch.context() as patch, pytest.raises(Stop) as stopped:
        patch.setattr(Run, "save_labels", stop)
        importlib.import_module(script.split()[0]).main([*words.split(), "--device", "cpu"])
    return stopped.value.args


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_on_the_corrected_labels_without_the_removed_images(name, tmp_path, monkeypatch):
    make, words = SCRIPTS[name]
    if make is not None:
        make(tmp_path / "data")
    words = words.format(root=tmp_path / "data")
    index, given, _ = labels_in(name, f"{words} --out {tmp_path / 'first'}", monkeypatch)
    rows = [f"{i},,{label},keep," for i, label in zip(index, given, strict=True)]
    new = (given[2] + 1) % 3
    rows[1], rows[2] = f"{index[1]},,{given[1]},remove,", f"{index[2]},,{given[2]},relabel,{new}"
    path = write(tmp_path / "decisions.csv", *rows[::-1])
    corrected, labels, columns = labels_in(
        name, f"{words} --noise_file {path} --out {tmp_path / 'second'}", monkeypatch
    )
    assert corrected.tolist() == np.delete(index, 1).tolist()
    assert labels.tolist() == [given[0], new, *given[3:]]
    assert columns["profile"].endswith("+removed=1") and columns["noise_type"].startswith("decisions.csv")


def test_the_run_counts_what_was_changed(tmp_path, monkeypatch, capsys):
    index, given, _ = labels_in("me_momentum.main", f"{MOMENTUM} --out {tmp_path / 'first'}", monkeypatch)
    what = ["relabel"] * 3 + ["remove"] * 2 + ["keep"] * 95
    columns = zip(index, given, what, (given + 1) % 10, strict=True)
    path = write(
        tmp_path / "decisions.csv", *(f"{i},,{label},{word},{new}" for i, label, word, new in columns)
    )
    run = tmp_path / "second"
    words = f"{MOMENTUM} --noise_file {path} --out {run} --selection none --n_epoch 1 --device cpu"
    importlib.import_module("me_momentum.main").main(words.split())
    assert "decisions.csv: 3 labels changed, 2 images removed\n" in capsys.readouterr().out
    noise = json.loads((run / "result.json").read_text())["noise"]
    assert (noise["relabelled"], noise["removed"], noise["samples"]) == (3, 2, 98)
