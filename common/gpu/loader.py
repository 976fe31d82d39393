"""Mini-batches with one or more views: of images on the device (Batches) and of image files (FileBatches)."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from common.datasets.file_lists import FileSplit, require_heads
from common.datasets.image_cache import ImageCache
from common.datasets.images import batch_memory, in_workers
from common.datasets.in_memory import Data, Split
from common.datasets.limit import limited_test
from common.gpu import augment, decode
from common.gpu import device as gpu
from common.gpu.image_operations import to_device
from common.runs.cli import UserError


class Images:
    """The images of a split for a device, uint8 channels-last, with the constants of their normalisation.

    They are at the `home` of the device, and so is their augmentation; views are on the device.
    """

    def __init__(
        self, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ):
        """images: uint8 [N, H, W, C]; mean and std: per channel, of pixels scaled to [0, 1]."""
        self.device, home = device, gpu.home(device)
        pixels = torch.as_tensor(np.ascontiguousarray(images)).to(home)
        self.pixels = pixels.permute(0, 3, 1, 2)  # [N, C, H, W], channels-last in memory
        self.mean = torch.tensor(mean, device=home)
        self.std = torch.tensor(std, device=home)
        self._scale, self._shift = augment.scale_and_shift(self.mean, self.std)

    def __len__(self) -> int:
        return len(self.pixels)

    def view(
        self, index: Tensor, augmentation: Callable | None = None, generator: Generator | None = None
    ) -> Tensor:
        """The images at index [B], augmented by augmentation(batch, generator) if given: float32 [B, C, H, W].

        generator: on the CPU. An augmentation that returns k views at once, [k, B, C, H, W], gives all of them.
        """
        batch = self.pixels[index]
        if augmentation is not None:
            batch = augmentation(batch, generator)
        if batch.is_cuda:  # channels-last, for its convolutions; on a CPU these take either form
            batch = (
                batch.movedim(-3, -1).to(torch.float32, memory_format=torch.contiguous_format).movedim(-1, -3)
            )
        return augment.scaled(batch, self._scale, self._shift).to(self.device)  # augment.normalise


class Batches:
    """Each iteration is a pass over the images: yields (views, index), views a tuple of k [B, C, H, W] tensors.

    subset: the positions to visit, [n] on the images' device (all by default). shuffle: a new order in every pass, drawn from
    generator. Each view has its own draws; an augmentation that makes all views at once decides their number. The last batch
    may be smaller, or is dropped.

    rank, world: for several processes. With shuffle each process yields its consecutive piece of every batch, with the draws
    of one process; without it, the processes take complete batches in turn.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        subset: Tensor | None = None,
        views: int = 1,
        augmentation: Callable | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: Generator | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        """generator: needed to shuffle or augment. On the CPU it draws order and augmentation. On a card it draws a seed at the
        beginning of each pass, for a generator on the CPU that draws them.

        ValueError: batches that cannot be cut into equal pieces.
        """
        if (shuffle or augmentation is not None) and generator is None:
            raise ValueError("shuffling and augmenting need a generator")
        if shuffle and world > 1 and (batch_size % world or not drop_last):
            raise ValueError(f"batches of {batch_size} and a rest cannot be cut into {world} equal pieces")
        self.images, self.batch_size, self.views = images, batch_size, views
        home = images.pixels.device
        self.subset = torch.arange(len(images), device=home) if subset is None else subset.to(home)
        self.augmentation, self.shuffle, self.generator = augmentation, shuffle, generator
        self.drop_last, self.rank, self.world = drop_last, rank, world

    def __len__(self) -> int:
        """The batches of a pass that this process goes through."""
        batches = len(self.subset) / self.batch_size
        batches = math.floor(batches) if self.drop_last else math.ceil(batches)
        return batches if self.shuffle else len(range(self.rank, batches, self.world))

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        order, generator = self.subset, self._on_cpu()
        if self.shuffle:
            (shuffled,) = to_device(order.device, torch.randperm(len(order), generator=generator))
            order = order[shuffled]
        if self.drop_last:
            order = order[: len(order) // self.batch_size * self.batch_size]
        for number, index in enumerate(order.split(self.batch_size) if len(order) else ()):
            if not self.shuffle and number % self.world != self.rank:
                continue
            views = self._views(index, generator)
            if self.shuffle and self.world > 1:
                views = [view.chunk(self.world)[self.rank] for view in views]
                index = index.chunk(self.world)[self.rank]  # noqa: PLW2901
            yield tuple(views), index.to(self.images.device)

    def _on_cpu(self) -> Generator | None:
        """The generator of a pass."""
        drawn = self.generator
        if drawn is None or drawn.device.type == "cpu":
            return drawn
        seed = torch.randint(2**63 - 1, (), generator=drawn, device=drawn.device)
        return torch.Generator().manual_seed(int(seed))  # waits for the card, once in a pass

    def _views(self, index: Tensor, generator: Generator | None) -> list[Tensor]:
        views = [self.images.view(index, self.augmentation, generator) for _ in range(self.views)]
        if views[0].dim() < 5:
            return views
        if self.views > 1:
            raise ValueError(f"the augmentation makes all views at once, and {self.views} are asked for")
        return list(views[0])

    def endless(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Endless passes. ValueError: no batch."""
        if not len(self):
            raise ValueError("no batch to go through again and again")
        while True:
            yield from self


class FileBatches:
    """Each iteration is a pass over image files: yields (views, index), views a tuple of k [B, 3, H, W] tensors.

    Worker processes read and transform the images; the device normalises them. index [B], on the device: positions within the
    split. Of `world` processes, `rank` this one, each has a piece of every batch in training, and batches in turn in
    evaluation. A view depends only on the generator, its position and its number: not on workers, rank or world. One pass at
    a time; a pass may stop before its end.
    """

    def __init__(
        self,
        split: FileSplit,
        batch_size: int,
        transform: Callable[[Tensor], Tensor],
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        workers: int = 4,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: Generator | None = None,
        views: int = 1,
        rank: int = 0,
        world: int = 1,
        cache: ImageCache | None = None,
        decoded_on: str = "cpu",
    ):
        """transform: uint8 [3, h, w] to uint8 [3, H, W], drawing from torch's global CPU generator if at all.

        batch_size: of all processes together. drop_last: leave out a last batch that is smaller. generator: on the CPU and in
        the same state in all processes; gives each pass its order and its draws; without it every pass has the same draws.
        cache: read the images from it. decoded_on: "cpu", or "gpu" to decode and transform JPEG files there. UserError: batches
        that cannot be cut into equal pieces, or no batch; a file to test on that is no image; "gpu" without one or with a cache.
        """
        if shuffle and generator is None:
            raise ValueError("shuffling needs a generator")
        if cache is not None and len(cache) != len(split.paths):
            raise ValueError(f"a cache of {len(cache)} images for a split of {len(split.paths)}")
        if decoded_on == "gpu" and (device.type != "cuda" or cache is not None):
            wrong = "--image_cache" if cache is not None else f"--device {device.type}"
            raise UserError(f"--decode gpu decodes files on a CUDA device: leave one out, it or {wrong}")
        if cache is None:
            require_heads(split)
        self.count, self.batch_size, self.views = len(split.paths), batch_size, views
        self.shuffle, self.drop_last, self.generator = shuffle, drop_last, generator
        self.rank, self.world, self.device = rank, world, device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self._pass = 0
        # the work of the workers: for each batch the seed of the pass, and positions
        self._plan: list[tuple[int, np.ndarray]] = []
        self._check_sizes()
        self._decoded: Callable | None = None
        work = partial(_views, split, cache, transform, views)
        if decoded_on == "gpu":
            self._decoded = partial(_views_on_card, split, transform, views, device)
            work = partial(decode.pack, split)
        self._pixels = in_workers(work, self._plan, workers, pin_memory=device.type == "cuda")

    def _check_sizes(self) -> None:
        if self.drop_last and self.count < self.batch_size:
            raise UserError(
                f"a batch of {self.batch_size} is more than all {self.count} images: choose a smaller one"
            )
        last = 0 if self.drop_last else self.count % self.batch_size
        for size in (self.batch_size, last) if self._trains else ():
            if size % self.world:
                raise UserError(
                    f"a batch of {size} images cannot be cut into {self.world} equal pieces: choose another size"
                )

    @property
    def _trains(self) -> bool:
        return self.shuffle or self.drop_last

    def __len__(self) -> int:
        """The batches of a pass that this process goes through."""
        return len(self._own(np.zeros(self.count)))

    def _own(self, order: np.ndarray) -> list[np.ndarray]:
        """This process's part of a pass over the positions `order` [N], by batch."""
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.drop_last and len(batches[-1]) < self.batch_size:
            batches.pop()
        if self._trains:
            return [np.split(batch, self.world)[self.rank] for batch in batches]
        return batches[self.rank :: self.world]

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        self._pass += 1
        own_pass, seed, order = self._pass, 0, np.arange(self.count)
        if self.generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        if self.shuffle:
            order = torch.randperm(self.count, generator=self.generator).numpy()
        self._plan[:] = [(seed, batch) for batch in self._own(order)]
        for (seed, batch), result in zip(list(self._plan), self._pixels, strict=True):
            pixels = result if self._decoded is None else self._decoded((seed, batch), result)
            yield self._on_device(pixels, batch)
            if self._pass != own_pass:
                raise RuntimeError("another pass over the same FileBatches has begun")

    def _on_device(self, pixels: Tensor, batch: np.ndarray) -> tuple[tuple[Tensor, ...], Tensor]:
        """pixels: uint8 [k, B, H, W, 3]."""
        pinned = self.device.type == "cuda"
        pixels = pixels.to(self.device, non_blocking=pinned).permute(0, 1, 4, 2, 3)  # channels-last in memory
        views = tuple(augment.normalise(view, self.mean, self.std) for view in pixels)
        return views, torch.from_numpy(batch).to(self.device, non_blocking=pinned)


class Labelled(NamedTuple):
    """Batches of a split in its order, and its labels by position."""

    batches: Iterable
    labels: Tensor  # int [N], on the device


class Tests(NamedTuple):
    """The test images of every epoch (--limit_test), and all of them (--full_test_at_end)."""

    limited: Labelled
    whole: Labelled


def test_batches(
    data: Data,
    limit: int | None,
    seed: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Tests:
    """Plain batches of the test images of a data set in memory, in order. rank, world: as of `Batches`."""

    def in_order(split: Split) -> Labelled:
        images = Images(split.images, data.mean, data.std, device)
        return Labelled(
            Batches(images, batch_size, rank=rank, world=world), torch.from_numpy(split.labels).to(device)
        )

    whole = in_order(data.test)
    if limit is None:
        return Tests(whole, whole)
    return Tests(in_order(data.test.only(limited_test(data.test.labels, limit, seed))), whole)


class Part(NamedTuple):
    """Batches of a part of the training samples, with an index within all training samples."""

    batches: FileBatches
    numbers: Tensor  # int [n]: positions of the part's samples within all, on the device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:  # type: ignore[override]
        for views, index in self.batches:
            yield views, self.numbers[index]

    def endless(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Endless passes."""
        while True:
            yield from self


def _views(
    split: FileSplit, cache: ImageCache | None, transform: Callable, views: int, batch: tuple[int, np.ndarray]
) -> Tensor:
    """All views of the images of a batch, in a worker: uint8 [k, B, H, W, 3]. UserError: an image cannot be read."""
    images = ((split.read(i) if cache is None else cache[i]) for i in batch[1].tolist())
    return _transformed(images, transform, views, batch, batch_memory)


def _views_on_card(
    split: FileSplit,
    transform: Callable,
    views: int,
    device: torch.device,
    batch: tuple[int, np.ndarray],
    packed: Tensor,
) -> Tensor:
    """All views of the images of a packed batch, decoded and transformed on the device: uint8 [k, B, H, W, 3]."""
    images = decode.images(split, batch[1], packed, device)
    memory = partial(torch.empty, dtype=torch.uint8, device=device)
    return _transformed(images, transform, views, batch, memory)


def _transformed(
    images: Iterable[Tensor],
    transform: Callable,
    views: int,
    batch: tuple[int, np.ndarray],
    new_memory: Callable[[tuple[int, ...]], Tensor],
) -> Tensor:
    """Every view of every image of a batch, with draws of its own: uint8 [k, B, H, W, 3] in new memory."""
    seed, positions = batch
    pixels = torch.empty(0)  # until the size of a view is known
    # only the CPU's generator: workers must not touch the GPU
    with torch.random.fork_rng(devices=[]):
        for place, (i, image) in enumerate(zip(positions.tolist(), images, strict=True)):
            for view in range(views):
                torch.default_generator.manual_seed(_mixed(seed, i, view))
                made = transform(image).permute(1, 2, 0)
                if not len(pixels):
                    pixels = new_memory((views, len(positions), *made.shape))
                pixels[view, place] = made
    return pixels


def _mixed(seed: int, position: int, view: int) -> int:
    """A seed of 64 bits for one view of one image in one pass."""
    return int(np.random.SeedSequence((seed, position, view)).generate_state(1, np.uint64)[0])
