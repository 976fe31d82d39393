"""Measure the speed of the parts that a run waits for, and of training steps; one CSV per measurement.

    python -m benchmarks.speed images       # training images per second from files and from the cache of small images
    python -m benchmarks.speed views        # images per second that get all their views, ours and PIL's
    python -m benchmarks.speed parts        # ways to decode such files and to crop cached images, by processor time
    python -m benchmarks.speed steps        # training steps of all methods, part by part, beside a plain reference path
    python -m benchmarks.speed launches     # operators and waits of a training step on a GPU, counted without one
    python -m benchmarks.speed operators    # what part of a training step the network's own operators take, on a CPU

images: JPEGs of 512 x 384 pixels, cut from the two photographs of scikit-learn, through the training pipeline of Food-101N
(random resized crop to 224, flip, normalisation): files and cache by ours, and the files by PIL and torchvision in the workers of
a DataLoader.
parts: the same files by torchvision and Pillow, and by simplejpeg, imagecodecs and pyvips where they are installed.
views: 32 x 32 pixels of the same photographs, through SANM's pipelines for CIFAR (its six views, the SimCLR pair, the view
of its warm-up): batches on the device, and PIL and torchvision image by image in the workers of a DataLoader.
steps, launches, operators: see benchmarks/step_speed.py, launches.py and operators.py.
"""

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launches import launch_line, launches
from benchmarks.operators import add_operator_flags, operator_line, operators
from benchmarks.results import make_folder
from benchmarks.speed_inputs import (
    PilViews,
    make_small_images,
    photograph_parts,
    pil_files,
    pil_loader,
    surroundings,
    views_by_pil,
)
from benchmarks.speed_parts import parts
from benchmarks.step_speed import add_step_flags, step_line, steps
from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD, FileSplit, make_split
from common.datasets.image_cache import build, open_cache
from common.datasets.in_memory import NORMALISATION
from common.gpu import augment
from common.gpu import device as gpu
from common.gpu.loader import Batches, FileBatches, Images
from common.gpu.policies import six_views
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import write_atomic
from common.runs.results import to_csv

SIZE = (512, 384)  # width and height; the longer side of Food-101's images is 512
QUALITY = 90
BATCH = 64


def main(argv=None):
    """Measure, print a table, write a CSV."""
    args = make_parser().parse_args(argv)
    kinds = {"images": (images, row_line), "views": (views, row_line), "steps": (steps, step_line)}
    kinds["parts"] = (partial(parts, make_photographs=make_photographs), part_line)
    kinds["launches"], kinds["operators"] = (launches, launch_line), (operators, operator_line)
    measure, line = kinds[args.what]
    out = Path(args.out or f"results/speed_{args.what}.csv")
    check_writable(out)  # before minutes of measuring
    rows = []
    for row in measure(args):
        print(line(row), flush=True)
        rows.append(row)
        write_atomic(out, to_csv(rows, rows[0]).encode())  # kept if a later measurement fails
    print(f"written to {out}")


def check_writable(out: Path) -> None:
    """Make the folder of an output file. UserError: it cannot be made, or is not writable."""
    make_folder(out)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: name a file in a writable folder")


def row_line(row: dict) -> str:
    """A row of `images` or `views` as it is printed."""
    name = f"{row['pipeline']}, {row['source']}" if "pipeline" in row else f"{row['source']:>5}"
    return (
        f"{name}, {row['workers']} workers: {row['median_images_per_second']:8.1f} images/s "
        f"({row['q1']:.1f} to {row['q3']:.1f}), {row['least_processor_us_per_image']} us of processor time an image"
    )


def part_line(row: dict) -> str:
    """A row of `parts` as it is printed."""
    return (
        f"{row['part']}, {row['way']}: {row['processor_us_per_image']} us an image, "
        f"pixels within {row['largest_difference']} of those of the first way"
    )


def make_parser() -> cli.Parser:
    """The command line: a measurement, and its own flags."""
    parser = cli.Parser(prog="python -m benchmarks.speed", description=__doc__)
    measurements = parser.add_subparsers(
        dest="what", required=True, metavar="{images,parts,views,steps,launches,operators}"
    )
    abouts = {"images": "images read from files and cache", "parts": "ways to decode and to crop"}
    for what, about in {**abouts, "views": "views of small images"}.items():
        flags = measurements.add_parser(what, help=about)
        add = flags.add_argument
        count: dict[str, Any] = {"type": cli.count, "metavar": "N"}
        workers = "processes that decode, or augment with PIL"
        add("--images", **count, default=64 if what == "parts" else 512, help="images to make")
        if what != "parts":
            add("--workers", nargs="+", type=cli.count_or_zero, default=[0, 1, 2], metavar="N", help=workers)
        add("--passes", **count, default=5, help="timed passes, after one that is not timed")
    add_step_flags(measurements.add_parser("steps", help="training steps of all methods"))
    measurements.add_parser(
        "launches", help="operators and waits of training steps on a GPU, counted on a pretend card"
    )
    about = "the part of training steps that the network's own operators take, on a CPU"
    add_operator_flags(measurements.add_parser("operators", help=about))
    device = "where batches are augmented and normalised, and networks trained"
    for what, flags in measurements.choices.items():
        flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device)
        flags.add_argument("--out", metavar="CSV", help=f"by default results/speed_{what}.csv")
    return parser


def images(args: Namespace) -> Iterator[dict]:
    """Images per second from files and from the cache, for each number of workers: rows of the CSV."""
    device = gpu.pick(args.device).device
    with tempfile.TemporaryDirectory() as folder:
        split = make_photographs(Path(folder) / "files", args.images)
        build(split, Path(folder) / "cache")
        cache = open_cache(Path(folder) / "cache", split)
        for workers in args.workers:
            for source, own in (("files", None), ("cache", cache)):
                generator = torch.Generator().manual_seed(1)
                options: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "device": device}
                options |= {"shuffle": True, "workers": workers, "generator": generator, "cache": own}
                crop = augment.random_resized_crop_and_flip()
                batches = FileBatches(split, min(BATCH, args.images), crop, **options)
                yield measured(args, batches, device, source=source, workers=workers)
            loader = pil_loader(pil_files(split), min(BATCH, args.images), workers, device, shuffle=True)
            yield measured(args, Moved(loader, device), device, source="PIL", workers=workers)


def views(args: Namespace) -> Iterator[dict]:
    """Images per second that get all their views, for each pipeline: on the device, then by PIL for each number of workers.

    Both end with normalised float32 views on the device. Rows of the CSV.
    """
    device = gpu.pick(args.device).device
    size = min(BATCH, args.images)
    small = make_small_images(args.images)
    mean, std = NORMALISATION["cifar10"]
    on_device = Images(small, mean, std, device)
    for pipeline, (ours, count, theirs) in view_pipelines().items():
        generator = torch.Generator(device).manual_seed(1)
        batches = Batches(on_device, size, views=count, augmentation=ours, shuffle=True, generator=generator)
        yield measured(args, batches, device, pipeline=pipeline, source="float32 on the device", workers=0)
        for workers in args.workers:
            by_pil = PilViews(small, theirs, mean, std, range(len(small)))
            moved = Moved(pil_loader(by_pil, size, workers, device, shuffle=True), device)
            yield measured(args, moved, device, pipeline=pipeline, source="PIL", workers=workers)


def measured(args: Namespace, batches: Iterable, device: torch.device, **which: str | int) -> dict:
    """A row of the CSV: images per second over the passes that are timed. which: columns that name the row."""
    passes = [seconds(batches, device) for _ in range(1 + args.passes)][1:]
    speeds = [args.images / elapsed for elapsed, _ in passes]
    quartiles = (round(float(speed), 1) for speed in np.percentile(speeds, [50, 25, 75]))
    row = {"what": args.what, **which, "images": args.images, "passes": args.passes}
    row |= zip(("median_images_per_second", "q1", "q3"), quartiles, strict=True)
    row["least_processor_us_per_image"] = round(1e6 * min(spent for _, spent in passes) / args.images)
    return row | surroundings(device)


def view_pipelines() -> dict[str, tuple[Callable, int, list[Callable]]]:
    """By name: what makes a view of a batch (or all views), the number of its calls, and PIL's transform for each view."""
    crop = augment.crop_and_flip
    pipelines: dict[str, tuple[Callable, int]] = {
        "SANM's six views": (partial(six_views, crop=crop), 1),
        "SimCLR's pair of views": (augment.simclr_view, 2),
        "SANM's warm-up view": (partial(augment.warm_up_view, crop=crop), 1),
    }
    return {name: (ours, count, views_by_pil(ours, count, 32)) for name, (ours, count) in pipelines.items()}


class Moved:
    """The batches of a loader on a device."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[list[Tensor]]:
        for *views, _ in self.loader:
            yield [view.to(self.device, non_blocking=True) for view in views]


def make_photographs(folder: Path, count: int) -> FileSplit:
    """JPEGs of random parts, two thirds of the width and the height, of the two photographs."""
    folder.mkdir(parents=True)
    names = [f"{i}.jpg" for i in range(count)]
    for name, photograph in zip(names, photograph_parts(count, (426, 284), SIZE), strict=True):
        photograph.save(folder / name, quality=QUALITY)
    return make_split(folder, names, [i % 2 for i in range(count)])


def seconds(batches: Iterable, device: torch.device) -> tuple[float, float]:
    """How long one pass takes until the last batch is on the device, and the processor time of this process and its workers."""
    start, spent = time.perf_counter(), processor_seconds()
    for _ in batches:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, processor_seconds() - spent


def processor_seconds() -> float:
    """What this process and its live workers have computed so far: of all their threads, on Linux."""
    threads = [Path(f"/proc/{worker.pid}/task").glob("*/schedstat") for worker in active_children()]
    nanoseconds = [int(file.read_text().split()[0]) for files in threads for file in files]
    return time.process_time() + sum(nanoseconds) / 1e9


if __name__ == "__main__":
    cli.exit_cleanly(main)
