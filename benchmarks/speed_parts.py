"""Processor time of ways to decode JPEGs, to crop cached images and to normalise batches."""

import importlib
import io
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from benchmarks.speed_inputs import surroundings
from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD
from common.gpu.augment import (
    CropDraws,
    ResizedCrop,
    normalise,
    random_resized_crop_and_flip,
    scale_and_shift,
    triangle_places,
    triangle_weights,
)

REPEATS = 3  # of each way in its turn
Box = tuple[int, int, int, int]  # left, top, width, height


def parts(args: Namespace, make_photographs: Callable) -> Iterator[dict]:
    """The least time per image of all passes for each way, in one thread, ways in turn: rows of the CSV.

    largest_difference: of a pixel, from the first way of the same step. Ways that need a package are left out without it. A way
    that decodes a part makes only the box that the crop needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        split = make_photographs(Path(folder) / "files", args.images)
        files = [split.path(i).read_bytes() for i in range(args.images)]
    pipeline: Any = random_resized_crop_and_flip()
    crop = pipeline.transforms[0]
    whole = [_torchvision(content, (0, 0, 0, 0)) for content in files]
    boxes = [_box(crop, image, i) for i, image in enumerate(whole)]
    jobs: dict[tuple[str, str], Callable] = {}
    for name, (package, decode) in DECODERS.items():
        if _there(package):
            jobs["decode", name] = lambda decode=decode: list(map(decode, files, boxes))
    small = [F.interpolate(image[None], (256, 341), mode="bilinear", antialias=True)[0] for image in whole]
    small_boxes = [_box(crop, image, i) for i, image in enumerate(small)]
    jobs["crop", "torchvision, image by image"] = lambda: [_seeded(crop, *pair) for pair in enumerate(small)]
    jobs["crop", "two matrix products, by batch"] = lambda: list(
        crop_batch(torch.stack(small), small_boxes, 224)
    )
    mean, std = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    scale, shift = scale_and_shift(mean, std)
    for size in (32, 224):
        batch = torch.stack([image[:, :size, :size].permute(1, 2, 0) for image in whole]).permute(0, 3, 1, 2)
        plain, rows = (f"normalise {size} x {size} pixels", "plain formula"), "in place, row by row"
        jobs[plain] = lambda batch=batch: batch.float() * scale - shift
        jobs[plain[0], rows] = lambda batch=batch: normalise(batch, mean, std)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times, results = {job: np.inf for job in jobs}, {}
    for _ in range(args.passes):
        for job, run in (item for item in jobs.items() for _ in range(REPEATS)):
            start = time.process_time()
            results[job] = run()
            times[job] = min(times[job], time.process_time() - start)
    torch.set_num_threads(threads)
    for (part, way), seconds in times.items():
        first = results[next(job for job in jobs if job[0] == part)]
        pairs = [
            (own, image if own.shape == image.shape else _cut(image, box))
            for own, image, box in zip(results[part, way], first, boxes, strict=True)
        ]
        differ = max((own.double() - expected.double()).abs().max().item() for own, expected in pairs)
        row = {"what": args.what, "part": part, "way": way, "images": args.images, "passes": args.passes}
        row |= {
            "processor_us_per_image": round(1e6 * seconds / args.images, 1),
            "largest_difference": f"{differ:g}",
        }
        yield row | surroundings(torch.device("cpu"))


def crop_batch(images: Tensor, boxes: list[Box], size: int) -> Tensor:
    """Boxes of images uint8 [B, 3, H, W], resized to [B, 3, size, size] in float32 by antialiased bilinear weights."""
    height, width = images.shape[2:]
    left, top, box_width, box_height = torch.tensor(boxes).T
    box = CropDraws(top, left, box_height, box_width)
    across = _weights(box.left, box.width, width, size)
    down = _weights(box.top, box.height, height, size)
    rows = torch.matmul(images.float(), across.mT[:, None])
    return torch.matmul(down[:, None], rows).add_(0.5).floor_().to(torch.uint8)


def _weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights of `pixels` inputs for `size` outputs: float32 [B, size, pixels]."""
    place, _, inside, _ = triangle_places(start, length, pixels)
    scale = (length.double() / size)[:, None]
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    return triangle_weights(place, centre, inside, scale.clamp_min(1)).float()


def _seeded(crop: Callable, number: int, image: Tensor) -> Tensor:
    torch.default_generator.manual_seed(number)
    return crop(image)


def _box(crop: ResizedCrop, image: Tensor, number: int) -> Box:
    drawn: Any = _seeded(lambda image: crop.drawn.make_params([image]), number, image)
    return drawn["left"], drawn["top"], drawn["width"], drawn["height"]


def _cut(image: Tensor, box: Box) -> Tensor:
    left, top, width, height = box
    return image[:, top : top + height, left : left + width]


def _there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def _torchvision(content: bytes, _: Box) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _pillow(content: bytes, _: Box) -> Tensor:
    return _tensor(np.array(Image.open(io.BytesIO(content))))


def _simplejpeg(content: bytes, _: Box) -> Tensor:
    return _tensor(importlib.import_module("simplejpeg").decode_jpeg(content))


def _imagecodecs(content: bytes, _: Box) -> Tensor:
    return _tensor(importlib.import_module("imagecodecs").jpeg8_decode(content))


def _pyvips(content: bytes, box: Box) -> Tensor:
    image = importlib.import_module("pyvips").Image.new_from_buffer(content, "", access="sequential")
    return _tensor(image.crop(*box).numpy())


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


DECODERS: dict[str, tuple[str, Callable[[bytes, Box], Tensor]]] = {
    "torchvision": ("torchvision", _torchvision),
    "Pillow": ("PIL", _pillow),
    "simplejpeg": ("simplejpeg", _simplejpeg),
    "imagecodecs": ("imagecodecs", _imagecodecs),
    "pyvips, down to the end of the crop": ("pyvips", _pyvips),
}
