"""The scripts that read image files: damaged images, a cache in place of the files, labels of a file, part of the images."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from common import datasets
from common.datasets.file_lists import FileSplit
from common.datasets.image_cache import build_caches
from common.datasets.mini_imagenet import load_mini_imagenet
from common.runs.cli import UserError
from tests.common.small_file_data import (
    make_clothing1m,
    make_food101n,
    make_mini_imagenet,
    make_webvision,
    plant,
)
from tests.end_to_end.runs import result, table
from tests.end_to_end.small_networks import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


class Case(NamedTuple):
    """A script, its small data, and flags for a short run; DATA stands for the folder."""

    script: str
    make: Callable[[Path], None]
    train: Callable[[Path], FileSplit]
    flags: str


def clothes(root: Path) -> FileSplit:
    return datasets.load_clothing1m(root, "noisy").train


CASES = {
    "afm": Case(
        "afm.train",
        make_food101n,
        lambda root: datasets.load_food101n(root).train,
        "--dataset food --data-root DATA --network resnet18 --pretrained none --train-batch 4 --test-batch 4 --epochs 1",
    ),
    "sfa": Case(
        "sfa.Train_webvision",
        lambda root: make_webvision(root, classes=4, per_class=4),
        lambda root: datasets.load_webvision(root, 4).train,
        "--data_path DATA --num_class 4 --network resnet18 --image_size 64 --batch_size 2 --num_epochs 1",
    ),
    "me_momentum": Case(
        "me_momentum.Clothing",
        make_clothing1m,
        clothes,
        "--data_root DATA --no_pretrain --network resnet18 --image_size 64 --batch_size 4 --n_epoch 1 --max_inner_loop 2 "
        "--max_outer_loop 1",
    ),
    "manifold_dividemix": Case(
        "manifold_dividemix.train_semisup_miniimagenet",
        lambda root: make_mini_imagenet(root, classes=3, per_class=8, test_per_class=2),
        lambda root: load_mini_imagenet(root, "blue", 0.4).train,
        "--data-dir DATA --decoded none --pretrained none --img-size 12 --noise-type blue --noise-ratio 0.4 --batch-size 8 "
        "--epochs 1 --warmup-epoch 1",
    ),
    "sanm": Case(
        "sanm.Train_clothing1M",
        make_clothing1m,
        clothes,
        "--data_path DATA --network resnet18 --pretrained none --image_size 64 --batch_size 2 --num_batches 42 --num_epochs 1",
    ),
}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """started(case, "--flag"): makes the data at the first call, and runs the script in a directory of its own each time."""

    def run(case: Case, words: str = "") -> Path:
        if case.script in SMALL:
            monkeypatch.setattr(*SMALL[case.script])
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        words = f"{case.flags.replace('DATA', str(tmp_path / 'data'))} --device cpu --workers 0 --out {out} {words}"
        importlib.import_module(case.script).main(words.split())
        return out

    return run


@pytest.mark.parametrize("paper", CASES)
def test_a_damaged_image_ends_the_run_in_one_line_or_is_left_out_and_recorded(paper, tmp_path, started):
    case = CASES[paper]
    case.make(tmp_path / "data")
    train = case.train(tmp_path / "data")
    plant(train.path(5), "truncated")
    with pytest.raises(UserError, match=r"^image \d+ of the train list.*--on_bad_image skip") as error:
        started(case)
    assert str(train.path(5)) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*/result.json"))
    plant(train.path(2), "missing")
    run = started(case, "--on_bad_image skip")
    kept = [i for i in range(len(train.labels)) if i not in (2, 5)]
    assert np.load(run / "train_index.npy").tolist() == kept
    rows = table(run, "skipped_images.csv")
    assert [(row["path"], row["position"]) for row in rows] == [(str(train.path(i)), str(i)) for i in (2, 5)]
    assert rows[0]["reason"] == "missing" and rows[1]["reason"] not in ("", "missing")
    if paper == "manifold_dividemix":  # which compares the images when a run goes on
        assert json.loads((run / "images.json").read_text())["skipped"] == 2


@pytest.mark.parametrize("paper", ["me_momentum", "sanm"])
def test_part_of_the_images_from_a_cache_with_labels_of_a_file(paper, tmp_path, started):
    case, root = CASES[paper], tmp_path / "data"
    case.make(root)
    build_caches(tmp_path / "cache", datasets.load_clothing1m(root, "noisy"))
    for image in root.rglob("*.jpg"):
        image.write_bytes(b"")  # there, but never read
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    words = f"--image_cache {tmp_path / 'cache'} --noise_file {tmp_path / 'labels.npy'}"
    run = started(case, f"{words} --limit_train 8 --limit_test 2 --full_test_at_end")
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert len(index) == 8 and (np.diff(index) > 0).all() and observed.tolist() == (index % 3).tolist()
    found = result(run)
    assert (found["noise_type"], found["profile"]) == ("labels.npy", "short+limit_train=8+limit_test=2")
    assert found["metrics"]["last"] in (0, 50, 100) and found["metrics"]["full_test"] >= 0
    assert found["metrics"]["full_test_images"] == 6
