"""The cache of small images: the pixels that the test transform makes, whole or not there, of the list it was made from."""

import pickle
import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from common import datasets
from common.datasets import image_cache
from common.datasets.image_cache import build, build_caches, open_cache, open_caches
from common.gpu import augment
from common.runs.locks import Lock
from tests.common.small_file_data import make_clothing1m, make_food101n, plant
from tests.lines import message

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """12 training images of 480 x 400 pixels."""
    root = tmp_path_factory.mktemp("food")
    make_food101n(root, size=(480, 400))
    return datasets.load_food101n(root).train


@pytest.mark.parametrize("workers", [0, 2])
def test_images_have_the_shorter_side_and_the_pixels_of_the_test_transform(split, tmp_path, workers):
    build(split, tmp_path, workers=workers)
    cache = open_cache(tmp_path, split)
    assert len(cache) == 12
    transform = augment.resize_and_center_crop()
    for i in range(12):
        assert (cache[i].shape, cache[i].dtype) == ((3, 256, 256 * 480 // 400), torch.uint8)
        assert torch.equal(transform(cache[i]), transform(split.read(i)))
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"images.u8", "index.npz"}
    assert (tmp_path / "images.u8").stat().st_size == 12 * 3 * 256 * 307


def test_small_images_and_upright_ones_are_made_as_large(tmp_path):
    make_food101n(tmp_path / "food", classes=1, size=(30, 47))
    split = datasets.load_food101n(tmp_path / "food").train
    build(split, tmp_path / "cache", size=64)
    cache = open_cache(tmp_path / "cache", split, (64, 320))
    assert cache[0].shape == (3, 64 * 47 // 30, 64)
    assert "of another list or size" in message(open_cache, tmp_path / "cache", split)


def test_a_cache_travels_to_other_processes_without_its_pixels(split, tmp_path):
    build(split, tmp_path)
    cache = open_cache(tmp_path, split)
    expected = cache[3]
    sent = pickle.dumps(cache)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent)[3], expected)
    expected.zero_()  # a copy: nothing reaches the file
    assert cache[3].any()


def test_a_cache_of_another_list_is_refused_and_a_finished_one_not_made_again(split, tmp_path, monkeypatch):
    build(split, tmp_path)
    monkeypatch.setattr(image_cache, "_write", lambda *_: pytest.fail("made again"))
    build(split, tmp_path)
    fewer = split.only(np.arange(11))
    line = "holds 12 images of another list or size (256 pixels) than the 11 of the train list at 256"
    assert line in message(open_cache, tmp_path, fewer)
    assert line in message(build, fewer, tmp_path)
    assert "another list" in message(open_cache, tmp_path, split.only(np.arange(12)[::-1]))


def test_an_interrupted_build_leaves_nothing_that_looks_finished(split, tmp_path, monkeypatch):
    # the first call estimates the space
    estimate = image_cache._small_images(split, 256, np.arange(12))
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "_small_images", Mock(side_effect=[estimate, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            build(split, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []
    assert "no image cache in" in message(open_cache, tmp_path, split)
    build(split, tmp_path)
    assert len(open_cache(tmp_path, split)) == 12


@pytest.mark.parametrize("file", ["images.u8", "index.npz"])
def test_a_damaged_cache_is_refused(split, tmp_path, file):
    build(split, tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    line = r"(is damaged|cannot be read).*delete the folder and build it"
    assert re.search(line, message(open_cache, tmp_path, split))


def test_too_little_space_is_said_before_anything_is_written(split, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2e6))
    assert "12 images needs about 0.00283 GB, 0.002 GB are free in" in message(build, split, tmp_path)
    assert not (tmp_path / "images.u8").exists()


def test_a_damaged_image_and_a_second_builder_are_named(tmp_path):
    make_food101n(tmp_path / "food")
    split = datasets.load_food101n(tmp_path / "food").train
    plant(split.path(4), "truncated")
    assert re.search(r"image 4 of the train list, .* is damaged", message(build, split, tmp_path / "cache"))
    with Lock(tmp_path / "cache" / ".lock", "wait"):
        assert "in use by process" in message(build, split, tmp_path / "cache")
    (tmp_path / "file").touch()
    assert "cannot be written" in message(build, split, tmp_path / "file")


def test_every_split_has_a_cache(tmp_path):
    make_clothing1m(tmp_path / "clothes")
    data = datasets.load_clothing1m(tmp_path / "clothes", "noisy+clean")
    build_caches(tmp_path / "cache", data)
    sizes = {part: len(cache) for part, cache in open_caches(tmp_path / "cache", data).items()}
    assert sizes == {"train": 12, "test": 6, "validation": 6, "clean_train": 6}
