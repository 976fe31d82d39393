"""Inputs of speed measurements: small images, the views that PIL makes of them, and facts about the machine."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common.datasets.file_lists import IMAGENET_MEAN, IMAGENET_STD, FileSplit
from common.gpu import augment
from common.gpu.policies import four_views, six_views
from common.runs.run import command, git_commit


def photograph_parts(count: int, part: tuple[int, int], size: tuple[int, int]) -> Iterator[Image.Image]:
    """Random parts of scikit-learn's two photographs of 640 x 427 pixels in turn, resized; part, size: width and height."""
    from sklearn.datasets import load_sample_images  # noqa: PLC0415 (a second of import that only this needs)

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % 2]
        left, top = (int(rng.integers(photograph.size[side] - part[side])) for side in (0, 1))
        box = (left, top, left + part[0], top + part[1])
        yield photograph.resize(size, Image.Resampling.BICUBIC, box=box)


def make_small_images(count: int, size: int = 32) -> np.ndarray:
    """Squares of 128 pixels of the photographs, made smaller: uint8 [count, size, size, 3]."""
    return np.stack([np.asarray(image) for image in photograph_parts(count, (128, 128), (size, size))])


def views_by_pil(augmentation: Callable | None, views: int, size: int) -> list[Callable]:
    """PIL's transform for each view that `common.gpu.loader.Batches` makes by this augmentation: of images of `size` pixels.

    ValueError: an augmentation that has no counterpart here.
    """
    if augmentation is None:
        return [transforms.Compose([])] * views
    function, options = getattr(augmentation, "func", augmentation), getattr(augmentation, "keywords", {})
    if function is augment.crop_and_flip:
        crop = transforms.RandomCrop(size, padding=options.get("padding", 4))
        return [transforms.Compose([crop, transforms.RandomHorizontalFlip()])] * views
    if function is augment.simclr_view:
        return [simclr_view(size)] * views
    if function not in (augment.warm_up_view, six_views, four_views):
        raise ValueError(f"no counterpart by PIL for the augmentation {augmentation}")
    (crop,) = views_by_pil(options["crop"], 1, size)
    if function is augment.warm_up_view:
        return [warm_up_view(crop)] * views
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])
    auto, rand = transforms.Compose([crop, policy]), transforms.Compose([crop, rand_augment])
    if function is four_views:
        return [crop, crop, auto, auto]
    reference = crop if options.get("weak_reference") else auto
    return [auto, auto, rand, rand, reference, reference]


def simclr_view(size: int) -> Callable:
    """As `common.gpu.augment.simclr_view`."""
    crop, flip = transforms.RandomResizedCrop(size, scale=(0.2, 1)), transforms.RandomHorizontalFlip()
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    return transforms.Compose([crop, flip, jitter, transforms.RandomGrayscale(0.2)])


def warm_up_view(crop: Callable) -> Callable:
    """The view of SANM's warm-up, as `common.gpu.augment.warm_up_view`."""
    moves = {"translate": (0.1, 0.1), "scale": (2 / 3, 3 / 2), "shear": (-0.1, 0.1, -0.1, 0.1)}
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return transforms.Compose([jitter, crop, transforms.RandomAffine(15, **moves)])


class PilViews(Dataset):
    """The views of images uint8 [N, H, W, 3], made and normalised one by one: k of float32 [3, H, W], and the position."""

    def __init__(self, images: np.ndarray, views: list[Callable], mean, std, positions: Sequence[int]):
        """positions: of the images to go through."""
        self.images, self.views, self.positions = images, views, positions
        self.normalised = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> tuple[Tensor | int, ...]:
        i = self.positions[number]
        image = self.open(i)
        return *(self.normalised(view(image)) for view in self.views), i

    def open(self, i: int) -> Image.Image:
        """Image i."""
        return Image.fromarray(self.images[i])


class PilFiles(PilViews):
    """The same of image files: images are their paths."""

    def open(self, i: int) -> Image.Image:
        """Image i, decoded."""
        with Image.open(self.images[i]) as image:
            return image.convert("RGB")


def pil_files(split: FileSplit) -> PilFiles:
    """The images of a split by PIL and torchvision: the views of `common.gpu.augment.random_resized_crop_and_flip`."""
    view = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()])
    paths = np.array([str(split.path(i)) for i in range(len(split.paths))])
    return PilFiles(paths, [view], IMAGENET_MEAN, IMAGENET_STD, range(len(paths)))


def pil_loader(views: PilViews, size: int, workers: int, device: torch.device, **options) -> DataLoader:
    """A DataLoader of batches of `size` whose workers stay from pass to pass."""
    options |= {"persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    return DataLoader(views, size, num_workers=workers, **options)


def rand_augment(image: Image.Image) -> Image.Image:
    """FixMatch's RandAugment by PIL: two operations, each with probability 1/2, levels 1 to 9; cutout of half of the side."""
    for _ in range(2):
        name, level = random.choice(RAND_AUGMENT), random.randint(1, 9)
        if random.random() < 0.5:
            image = rand_augment_operation(image, name, level)
    width, height = image.size
    side = height // 2
    x = int(max(0, random.uniform(0, width) - side / 2))
    y = int(max(0, random.uniform(0, height) - side / 2))
    image = image.copy()
    box = (x, y, min(width, x + side), min(height, y + side))
    ImageDraw.Draw(image).rectangle(box, fill=(127, 127, 127))
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


def surroundings(device: torch.device) -> dict:
    """What a speed depends on beside the code."""
    # os.process_cpu_count is there from Python 3.13 on
    count_cpus = getattr(os, "process_cpu_count", lambda: len(os.sched_getaffinity(0)))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": count_cpus(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git": git_commit(),
        "command": command(),
    }
