"""How fast the parts are that a run waits for; one CSV per measurement.

    python -m benchmarks.speed images       # training images per second from files and from the cache of small images
    python -m benchmarks.speed views        # images per second that get all their views, ours and PIL's

images: JPEGs of 512 x 384 pixels, cut from the two photographs that scikit-learn brings along, through the training pipeline
of Food-101N (random resized crop to 224, flip, normalisation).
views: 32 x 32 pixels of the same photographs, through SANM's pipelines for CIFAR (its six views, the SimCLR pair, the view
of its warm-up): batches on the device, against PIL and torchvision image by image in the workers of a DataLoader.
"""

import csv
import io
import os
import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common import augment, cli, gpu
from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD, FileSplit, make_split
from common.datasets.image_cache import build, open_cache
from common.datasets.in_memory import NORMALISATION
from common.files import write_atomic
from common.loader import Batches, FileBatches, Images
from common.policies import six_views
from common.run import command, git_commit

SIZE = (512, 384)  # width and height; the longer side of Food-101's images is 512
QUALITY = 90
BATCH = 64


def main(argv=None):
    """Measure, print a table, write a CSV."""
    args = make_parser().parse_args(argv)
    rows = []
    for row in {"images": images, "views": views}[args.what](args):
        name = f"{row['pipeline']}, {row['source']}" if "pipeline" in row else f"{row['source']:>5}"
        print(
            f"{name}, {row['workers']} workers: {row['median_images_per_second']:8.1f} images/s "
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
    parser.add_argument("what", choices=["images", "views"], help="what to measure")
    parser.add_argument("--images", type=cli.count, default=512, metavar="N", help="images to make")
    parser.add_argument(
        "--workers",
        nargs="+",
        type=cli.count_or_zero,
        default=[0, 1, 2],
        metavar="N",
        help="processes that decode, or augment with PIL",
    )
    parser.add_argument(
        "--passes", type=cli.count, default=5, metavar="N", help="timed ones, after one that is not"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where batches are augmented and normalised",
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
                yield measured(args, batches, device, source=source, workers=workers)


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
        batches = Batches(
            on_device,
            size,
            views=count,
            augmentation=ours,
            shuffle=True,
            generator=torch.Generator(device).manual_seed(1),
        )
        yield measured(args, batches, device, pipeline=pipeline, source="float32 on the device", workers=0)
        for workers in args.workers:
            loader = DataLoader(
                PilViews(small, theirs, mean, std),
                size,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
            )
            moved = Moved(loader, device)
            yield measured(args, moved, device, pipeline=pipeline, source="PIL", workers=workers)


def measured(args: Namespace, batches: Iterable, device: torch.device, **which: str | int) -> dict:
    """A row of the CSV: images per second over the passes that are timed. which: columns that name the row."""
    speeds = [args.images / seconds(batches, device) for _ in range(1 + args.passes)][1:]
    q1, median, q3 = np.percentile(speeds, [25, 50, 75])
    return {
        "what": args.what,
        **which,
        "images": args.images,
        "passes": args.passes,
        "median_images_per_second": round(float(median), 1),
        "q1": round(float(q1), 1),
        "q3": round(float(q3), 1),
        **surroundings(device),
    }


def view_pipelines() -> dict[str, tuple[Callable, int, list[Callable]]]:
    """By name: what makes a view of a batch (or all views), how many times it is called, and PIL's transform for each view."""
    crop = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    auto = transforms.Compose(
        [crop, transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])]
    )
    rand = transforms.Compose([crop, rand_augment])
    simclr = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.2, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
        ]
    )
    shear = (-0.1, 0.1, -0.1, 0.1)
    warm_up = transforms.Compose(
        [
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            crop,
            transforms.RandomAffine(15, translate=(0.1, 0.1), scale=(2 / 3, 3 / 2), shear=shear),
        ]
    )
    return {
        "SANM's six views": (
            partial(six_views, crop=augment.crop_and_flip),
            1,
            [auto, auto, rand, rand, auto, auto],
        ),
        "SimCLR's pair of views": (augment.simclr_view, 2, [simclr, simclr]),
        "SANM's warm-up view": (partial(augment.warm_up_view, crop=augment.crop_and_flip), 1, [warm_up]),
    }


class PilViews(Dataset):
    """Views of images uint8 [N, H, W, 3], made and normalised one by one: float32 [k, 3, H, W] each."""

    def __init__(
        self, images: np.ndarray, views: list[Callable], mean: tuple[float, ...], std: tuple[float, ...]
    ):
        self.images, self.views = images, views
        self.normalised = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image = Image.fromarray(self.images[i])
        return torch.stack([self.normalised(view(image)) for view in self.views])


class Moved:
    """The batches of a loader on a device."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield batch.to(self.device, non_blocking=True)


def rand_augment(image: Image.Image) -> Image.Image:
    """FixMatch's RandAugment by PIL: two operations, each with probability 1/2, levels 1 to 9; then cutout of 16 pixels."""
    for _ in range(2):
        name, level = random.choice(RAND_AUGMENT), random.randint(1, 9)
        if random.random() < 0.5:
            image = rand_augment_operation(image, name, level)
    width, height = image.size
    x = int(max(0, random.uniform(0, width) - 8))
    y = int(max(0, random.uniform(0, height) - 8))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x, y, min(width, x + 16), min(height, y + 16)), fill=(127, 127, 127))
    return image


RAND_AUGMENT = (
    *("AutoContrast", "Equalize", "Identity", "Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Rotate", "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY"),
)


def rand_augment_operation(image: Image.Image, name: str, level: int) -> Image.Image:
    """One operation of RandAugment at a level of 1 to 9; shifts and turns to either side alike."""
    sign = random.choice((-1, 1))
    shear = sign * 0.3 * level / 10
    right, down = (sign * int(0.3 * level / 10 * side) for side in image.size)
    moved = partial(image.transform, image.size, Image.Transform.AFFINE)
    operations = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Identity": lambda: image,
        "Posterize": lambda: ImageOps.posterize(image, int(4 * level / 10) + 4),
        "Rotate": lambda: image.rotate(sign * int(30 * level / 10)),
        "ShearX": lambda: moved((1, shear, 0, 0, 1, 0)),
        "ShearY": lambda: moved((1, 0, 0, shear, 1, 0)),
        "Solarize": lambda: ImageOps.solarize(image, 256 - int(256 * level / 10)),
        "TranslateX": lambda: moved((1, 0, right, 0, 1, 0)),
        "TranslateY": lambda: moved((1, 0, 0, 0, 1, down)),
    }
    if name in operations:
        return operations[name]()
    return getattr(ImageEnhance, name)(image).enhance(0.9 * level / 10 + 0.05)


def make_small_images(count: int) -> np.ndarray:
    """Random squares of 128 pixels of the two photographs in turn, at 32 x 32: uint8 [count, 32, 32, 3]."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    small = []
    for i in range(count):
        left, top = (int(rng.integers(side - 128)) for side in photographs[i % 2].size)
        box = (left, top, left + 128, top + 128)
        small.append(np.asarray(photographs[i % 2].resize((32, 32), Image.Resampling.BICUBIC, box=box)))
    return np.stack(small)


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
