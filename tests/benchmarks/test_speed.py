"""The speeds of reading images and of making views: a tiny run writes a row per source and number of workers."""

import itertools
import random

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch import nn

from benchmarks import operators
from benchmarks.speed import main, make_photographs, view_pipelines
from benchmarks.speed_inputs import RAND_AUGMENT, make_small_images, rand_augment, rand_augment_operation
from common.gpu import policies
from common.runs.cli import UserError
from tests.benchmarks.files import read

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


PIPELINES = ("SANM's six views", "SimCLR's pair of views", "SANM's warm-up view")
BY_PIPELINE = (("float32 on the device", "0"), ("PIL", "0"), ("PIL", "1"))
SOURCES = {
    "images": [(None, *pair) for pair in itertools.product(("files", "cache", "PIL"), "01")],
    "views": [(name, *pair) for name in PIPELINES for pair in BY_PIPELINE],
}


@pytest.mark.parametrize(("what", "sources"), SOURCES.items())
def test_every_source_is_timed_with_each_number_of_workers(what, sources, tmp_path, capsys):
    out = tmp_path / "new" / "speed.csv"
    words = [what, "--images", "12", "--workers", "0", "1", "--passes", "3", "--device", "cpu"]
    main([*words, "--out", str(out)])
    rows = read(out)
    found = [(row.get("pipeline"), row["source"], row["workers"]) for row in rows]
    assert sorted(found, key=str) == sorted(sources, key=str)
    for row in rows:
        assert (row["what"], row["images"], row["passes"], row["device"]) == (what, "12", "3", "cpu")
        assert 0 < float(row["q1"]) <= float(row["median_images_per_second"]) <= float(row["q3"])
        assert int(row["least_processor_us_per_image"]) > 0 and None not in row.values()
    printed = capsys.readouterr().out
    assert printed.count("images/s") == len(sources) and f"written to {out}" in printed


def test_ways_to_decode_and_to_crop_are_timed_and_compared(tmp_path):
    out = tmp_path / "parts.csv"
    main(["parts", "--images", "2", "--passes", "1", "--out", str(out)])
    rows = {(row["part"], row["way"]): row for row in read(out)}
    batched = "two matrix products, by batch"
    assert {("decode", "torchvision"), ("decode", "Pillow"), ("crop", batched)} < rows.keys()
    for (part, way), row in rows.items():
        assert float(row["processor_us_per_image"]) > 0
        assert int(row["largest_difference"]) <= (way == batched), (part, way)


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path):
    (tmp_path / "file").touch()
    for out, text in ((tmp_path, "cannot be written"), (tmp_path / "file" / "x.csv", "cannot be made")):
        with pytest.raises(UserError, match=text):
            main(["images", "--out", str(out)])


def test_the_photographs_and_the_small_images_differ(tmp_path):
    split, images = make_photographs(tmp_path / "files", 6), make_small_images(6)
    assert split.read(0).shape == (3, 384, 512)
    assert len({split.path(i).read_bytes() for i in range(6)}) == 6
    assert (images.shape, images.dtype) == ((6, 32, 32, 3), np.uint8)
    assert len({image.tobytes() for image in images}) == 6


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
    every = torch.cartesian_prod(torch.arange(14), torch.arange(1, 10), torch.arange(2))
    operation, level, negated = every[:, :, None].unbind(1)
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
        assert 8 <= rows.sum() <= 17 and 8 <= columns.sum() <= 17


def test_the_operators_of_a_step_are_those_of_the_network_forward_and_backward():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 2))
    with operators.Operators() as recorded:
        network(torch.ones(3, 1, 8, 8)).mean().backward()
    names = [call.operator._schema.name.removeprefix("aten::") for call in recorded.calls]
    assert names[:3] == ["convolution", "native_batch_norm", "addmm"]
    assert names[3:] == ["mm", "mm", "native_batch_norm_backward", "convolution_backward"]
    weights = [weight.clone() for weight in network.parameters()]
    ticks = iter([0.0, 9.0, 10.0, 13.0, 20.0, 22.0])
    assert operators.replay_seconds(recorded.calls, 2, lambda: next(ticks)) == 2  # not the first
    assert all(map(torch.equal, weights, network.parameters()))


def test_operators_measures_a_step_of_the_processor(tmp_path):
    words = f"operators --methods Me-Momentum --size 8 --batch 2 --passes 1 --out {tmp_path}/o.csv"
    main(words.split())
    row = pd.read_csv(tmp_path / "o.csv").to_dict("records")[0]
    assert row["convolutions_ms"] > 0 and row["operators_ms"] > 0 and row["network"] == "narrow"
    assert row["operators_share"] == pytest.approx(row["operators_ms"] / row["step_ms"], abs=0.01)
    with pytest.raises(UserError, match="--methods nothing"):
        main(["operators", "--methods", "nothing", "--out", f"{tmp_path}/o.csv"])
