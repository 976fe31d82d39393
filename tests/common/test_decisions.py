"""decisions.csv as --noise_file: labels are corrected and images left out, in every script, and what is refused."""

import importlib

import numpy as np
import pytest

from common.datasets import labels_of, read_decisions, without_removed
from common.runs.run import Run
from tests.common.small_file_data import (
    make_clothing1m,
    make_food101n,
    make_mini_imagenet,
    make_webvision,
    write_lines,
)
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
HEADING = "index,path,given_label,decision,new_label"
ROWS = ("4,a.png,1,keep,", '0,"b,""1"".png",2,relabel,0', "7,,1,remove,", "2,,0,keep,0")


def write(path, *rows, heading=HEADING):
    write_lines(path, [heading, *rows])
    return path


@pytest.fixture
def decisions(tmp_path):
    """A file of ROWS."""
    return write(tmp_path / "decisions.csv", *ROWS)


def test_labels_are_those_of_the_run_with_the_changes_by_their_index(decisions):
    assert labels_of(decisions, np.array([0, 2, 4, 7]), 8, 3).tolist() == [0, 0, 1, 1]
    everywhere = labels_of(decisions, np.arange(8), 8, 3, otherwise=np.full(8, 2))
    assert everywhere.tolist() == [0, 2, 0, 2, 1, 2, 2, 1]
    assert without_removed(np.array([0, 2, 4, 7]), decisions).tolist() == [0, 2, 4]
    assert without_removed(np.array([1, 2]), decisions, positions=np.array([5, 7, 4])).tolist() == [2]
    assert read_decisions(decisions).relabelled.tolist() == [False, True, False, False]
    write(decisions, *ROWS[1:])  # a changed file is read again
    assert read_decisions(decisions).images.tolist() == [0, 7, 2]
    rows = [row.replace('"b,""1"".png"', "b").replace(",", ";") for row in ROWS]  # as a spreadsheet saves it
    write(decisions, *rows, heading="\ufeff" + HEADING.replace(",", ";"))
    assert without_removed(np.array([0, 2, 4, 7]), decisions).tolist() == [0, 2, 4]


def test_any_other_file_removes_nothing(decisions, tmp_path):
    kept = np.arange(3)
    labels = write(tmp_path / "labels.csv", "0,1", "1,1", "2,0", heading="index,label")
    for file in (None, labels, tmp_path / "nosuch.csv", f"{decisions}:given_label"):
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
    text = message(labels_of, path, np.array([0]), 8, 3)
    assert line in text and text.startswith(f"--noise_file {path}: ")


def test_images_that_are_not_listed_and_an_empty_training_set_are_refused(decisions):
    assert "no label of training image 3" in message(labels_of, decisions, np.array([0, 3]), 8, 3)
    line = "does not list training image 3: export it from a run on the same"
    assert line in message(without_removed, np.array([0, 3]), decisions)
    assert "removes all 1 training images" in message(without_removed, np.array([7]), decisions)


# every script ---------------------------------------------------------------------------------------------------------

DIGITS = "--dataset digits --limit_train 40"
MOMENTUM = DIGITS.replace("40", "100") + " --noise_rate 0.4 --data_percent 0.5"
LIMITED = "--limit_train 9 --workers 0"
CLOTHES = f" {LIMITED} --batch_size 2 --network resnet18"
NARROW = "--arch narrow --pretrained none"
SCRIPTS = {
    "me_momentum.main": MOMENTUM,
    "sfa.Train_cifar": f"{DIGITS} --noise_ratio 0.4",
    "sanm.Train_cifar": f"{DIGITS} --base dividemix --r 0.4",
    "afm.train": f"{DIGITS} --train-batch 8",
    "manifold_dividemix.train_semisup": f"{DIGITS} --ood-ratio 0.2 --noise-ratio 0.2 {NARROW}",
    "afm.train of files": "--dataset food --data-root {food} --train-batch 2 --pretrained none",
    "me_momentum.Clothing": "--data_root {clothes} --no_pretrain" + CLOTHES,
    "sanm.Train_clothing1M": "--data_path {clothes} --pretrained none" + CLOTHES,
    "sfa.Train_webvision": "--data_path {web} --num_class 4 --imb_factor 0.5 --batch_size 2 --workers 0",
    "manifold_dividemix.train_semisup_miniimagenet": f"--data-dir {{mini}} --img-size 8 {NARROW} {LIMITED}",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of small data sets of image files."""
    makers = make_food101n, make_clothing1m, make_webvision, make_mini_imagenet
    made = {name: tmp_path_factory.mktemp(name) for name in ("food", "clothes", "web", "mini")}
    for make, folder in zip(makers, made.values(), strict=True):
        make(folder)
    return made


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
def test_every_script_trains_on_corrected_labels_without_removed_images(name, folders, tmp_path, monkeypatch):
    words = SCRIPTS[name].format(**folders)
    index, given, _ = labels_in(name, f"{words} --out {tmp_path / 'first'}", monkeypatch)
    rows = [f"{i},,{label},keep," for i, label in zip(index, given, strict=True)]
    new = (given[2] + 1) % 3
    rows[1], rows[2] = f"{index[1]},,{given[1]},remove,", f"{index[2]},,{given[2]},relabel,{new}"
    words += f" --noise_file {write(tmp_path / 'decisions.csv', *rows[::-1])}"
    corrected, labels, columns = labels_in(name, f"{words} --out {tmp_path / 'second'}", monkeypatch)
    assert corrected.tolist() == np.delete(index, 1).tolist()
    assert labels.tolist() == [given[0], new, *given[3:]]
    assert columns["profile"].endswith("+removed=1") and columns["noise_type"].startswith("decisions.csv")
