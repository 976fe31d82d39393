"""The speeds of reading images and of making views: a tiny run writes a row per source and number of workers."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from benchmarks.speed import main, make_photographs, view_pipelines
from benchmarks.speed_inputs import RAND_AUGMENT, make_small_images, rand_augment, rand_augment_operation
from common.gpu import policies
from common.runs.cli import UserError
from tests.benchmarks.files import read

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_images_are_timed_from_files_and_cache(tmp_path, capsys):
    out = tmp_path / "new" / "speed.csv"
    words = ["images", "--images", "12", "--workers", "0", "1", "--passes", "3", "--device", "cpu"]
    main([*words, "--out", str(out)])
    rows = read(out)
    assert [(row["source"], row["workers"]) for row in rows] == [
        *(("files", "0"), ("cache", "0"), ("PIL", "0")),
        *(("files", "1"), ("cache", "1"), ("PIL", "1")),
    ]
    for row in rows:
        assert (row["what"], row["images"], row["passes"], row["device"]) == ("images", "12", "3", "cpu")
        assert 0 < float(row["q1"]) <= float(row["median_images_per_second"]) <= float(row["q3"])
        assert int(row["least_processor_us_per_image"]) > 0 and None not in row.values()
    printed = capsys.readouterr().out
    assert printed.count("images/s") == 6
    assert f"written to {out}" in printed


def test_ways_to_decode_and_to_crop_are_timed_and_compared(tmp_path):
    out = tmp_path / "parts.csv"
    main(["parts", "--images", "2", "--passes", "1", "--out", str(out)])
    rows = {(row["part"], row["way"]): row for row in read(out)}
    assert {("decode", "torchvision"), ("decode", "Pillow"), ("crop", "two matrix products, by batch")} < set(
        rows
    )
    for (part, way), row in rows.items():
        assert float(row["processor_us_per_image"]) > 0
        assert int(row["largest_difference"]) <= (way == "two matrix products, by batch"), (part, way)


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path):
    (tmp_path / "file").touch()
    for out, text in ((tmp_path, "cannot be written"), (tmp_path / "file" / "x.csv", "cannot be made")):
        with pytest.raises(UserError, match=text):
            main(["images", "--out", str(out)])


def test_the_photographs_differ(tmp_path):
    split = make_photographs(tmp_path / "files", 6)
    assert split.read(0).shape == (3, 384, 512)
    assert len({split.path(i).read_bytes() for i in range(6)}) == 6


def test_views_are_timed_on_the_device_and_by_pil(tmp_path, capsys):
    out = tmp_path / "speed.csv"
    words = ["views", "--images", "12", "--workers", "0", "1", "--passes", "3", "--device", "cpu"]
    main([*words, "--out", str(out)])
    rows = read(out)
    pipelines = ["SANM's six views", "SimCLR's pair of views", "SANM's warm-up view"]
    sources = [("float32 on the device", "0"), ("PIL", "0"), ("PIL", "1")]
    assert [(row["pipeline"], row["source"], row["workers"]) for row in rows] == [
        (pipeline, *source) for pipeline in pipelines for source in sources
    ]
    for row in rows:
        assert (row["what"], row["images"], row["passes"], row["device"]) == ("views", "12", "3", "cpu")
        assert 0 < float(row["q1"]) <= float(row["median_images_per_second"]) <= float(row["q3"])
    assert capsys.readouterr().out.count("images/s") == 9


@pytest.mark.parametrize("pipeline", view_pipelines())
def test_both_pipelines_make_as_many_views_and_about_as_bright(pipeline):
    ours, count, theirs = view_pipelines()[pipeline]
    images = make_small_images(150)
    random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        by_pil = np.array([[np.asarray(view(Image.fromarray(image))) for view in theirs] for image in images])
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(0)
    views = torch.stack([ours(batch, generator) for _ in range(count)]).reshape(-1, 150, 3, 32, 32)
    assert len(views) == len(theirs) == by_pil.shape[1]
    # as samples of the same law: the mean and the standard deviation of each image
    for view, other in zip(views.double(), torch.from_numpy(by_pil).swapaxes(0, 1).double(), strict=True):
        for statistic in (torch.mean, torch.std):
            sides = [statistic(pixels.flatten(1), dim=1).numpy() for pixels in (view, other.contiguous())]
            assert ks_2samp(*sides).pvalue > 1e-3


def test_rand_augment_by_pil_has_the_operations_and_levels_of_ours():
    image = make_small_images(1)[0]
    random.seed(0)
    by_pil = {
        np.asarray(rand_augment_operation(Image.fromarray(image), name, level))[:23].tobytes()
        for name in RAND_AUGMENT
        for level in range(1, 10)
        for _ in range(16)  # either sign
    }
    operation, level, negated = torch.cartesian_prod(torch.arange(14), torch.arange(1, 10), torch.arange(2))[
        :, :, None
    ].unbind(1)
    corner = torch.full((len(level), 2), 31.9, dtype=torch.float64)  # the cutout covers rows from 23 on
    draws = policies.RandAugmentDraws(operation, level, torch.ones_like(level).bool(), negated.bool(), corner)
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(len(level), -1, -1, -1)
    ours = policies.apply_rand_augment(batch, draws).permute(0, 2, 3, 1).contiguous().numpy()
    assert {result[:23].tobytes() for result in ours} == by_pil
    assert len(by_pil) > 100


def test_rand_augment_by_pil_cuts_a_square_out():
    random.seed(0)
    for _ in range(50):
        changed = np.asarray(rand_augment(Image.new("RGB", (32, 32), (127, 127, 0))))[..., 2] == 127
        rows, columns = changed.any(1), changed.any(0)
        assert (changed == rows[:, None] & columns).all()
        assert 8 <= rows.sum() <= 17
        assert 8 <= columns.sum() <= 17


def test_the_small_images_differ():
    images = make_small_images(6)
    assert (images.shape, images.dtype) == ((6, 32, 32, 3), np.uint8)
    assert len({image.tobytes() for image in images}) == 6
