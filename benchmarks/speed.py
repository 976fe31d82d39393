"""How fast the parts are that a run waits for; one CSV per measurement.

    python -m benchmarks.speed images       # training images per second from files and from the cache of small images

images: JPEGs of 512 x 384 pixels, cut from the two photographs that scikit-learn brings along, through the training pipeline
of Food-101N (random resized crop to 224, flip, normalisation).
"""

import csv
import io
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

from common import augment, cli, gpu
from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD, FileSplit, make_split
from common.datasets.image_cache import build, open_cache
from common.files import write_atomic
from common.loader import FileBatches
from common.run import command, git_commit

SIZE = (512, 384)  # width and height; the longer side of Food-101's images is 512
QUALITY = 90
BATCH = 64


def main(argv=None):
    """Measure, print a table, write a CSV."""
    args = make_parser().parse_args(argv)
    rows = []
    for row in images(args):
        print(
            f"{row['source']:>5}, {row['workers']} workers: {row['median_images_per_second']:8.1f} images/s "
            f"({row['q1']:.1f} to {row['q3']:.1f})",
            flush=True,
        )
        rows.append(row)
    out = Path(args.out or f"results/speed_{args.what}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out, table.getvalue().encode())
    print(f"written to {out}")


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["images"], help="what to measure")
    parser.add_argument("--images", type=cli.count, default=512, metavar="N", help="JPEGs to make")
    parser.add_argument(
        "--workers",
        nargs="+",
        type=cli.count_or_zero,
        default=[0, 1, 2],
        metavar="N",
        help="processes that decode",
    )
    parser.add_argument(
        "--passes", type=cli.count, default=5, metavar="N", help="timed ones, after one that is not"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where images are normalised"
    )
    parser.add_argument("--out", metavar="CSV", help="by default results/speed_WHAT.csv")
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
                batches = FileBatches(
                    split,
                    min(BATCH, args.images),
                    augment.random_resized_crop_and_flip(),
                    mean=IMAGENET_MEAN,
                    std=IMAGENET_STD,
                    device=device,
                    workers=workers,
                    shuffle=True,
                    generator=torch.Generator().manual_seed(1),
                    cache=own,
                )
                speeds = [args.images / seconds(batches, device) for _ in range(1 + args.passes)][1:]
                q1, median, q3 = np.percentile(speeds, [25, 50, 75])
                yield {
                    "what": args.what,
                    "source": source,
                    "workers": workers,
                    "images": args.images,
                    "passes": args.passes,
                    "median_images_per_second": round(float(median), 1),
                    "q1": round(float(q1), 1),
                    "q3": round(float(q3), 1),
                    **surroundings(device),
                }


def make_photographs(folder: Path, count: int) -> FileSplit:
    """JPEGs of random parts, two thirds of the width and the height, of the two photographs."""
    folder.mkdir(parents=True)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        photograph = photographs[i % 2]
        width, height = (2 * side // 3 for side in photograph.size)
        left, top = (
            int(rng.integers(whole - part))
            for whole, part in zip(photograph.size, (width, height), strict=True)
        )
        cut = photograph.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        cut.save(folder / name, quality=QUALITY)
    return make_split(folder, names, [i % 2 for i in range(count)])


def seconds(batches: Iterable, device: torch.device) -> float:
    """How long one pass takes, until the last batch is on the device."""
    start = time.perf_counter()
    for _ in batches:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def surroundings(device: torch.device) -> dict:
    """What a speed depends on beside the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.process_cpu_count()
        if hasattr(os, "process_cpu_count")
        else len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git": git_commit(),
        "command": command(),
    }


if __name__ == "__main__":
    cli.exit_cleanly(main)
