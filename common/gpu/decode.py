"""JPEG files decoded on a card by nvJPEG (--decode gpu). It has never run on one: `make check-gpu` compares it with a CPU.

Workers send the files of a batch as they are; this process decodes them. Files that are no JPEG of one or three channels, and
those that nvJPEG refuses, are decoded on the CPU. Decoders differ in rounding, so pixels differ from those of the CPU.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.datasets.file_lists import FileSplit
from common.datasets.images import batch_memory

LENGTH = 8  # bytes of a length, int64


def pack(split: FileSplit, batch: tuple[int, np.ndarray]) -> Tensor:
    """In a worker, the files of a batch of B images: uint8, B lengths as int64 and then their bytes.

    batch: the seed of the pass, unused, and positions [B]. A file that nvJPEG cannot take has length 0.
    """
    _, positions = batch
    files = [_jpeg(split, i) for i in positions.tolist()]
    lengths = np.array([len(file) for file in files], dtype=np.int64)
    packed = np.concatenate([lengths.view(np.uint8), *files])
    memory = batch_memory(packed.shape)
    memory.numpy()[:] = packed
    return memory


def _jpeg(split: FileSplit, i: int) -> np.ndarray:
    """The file of image i: uint8 [n], n = 0 if it is no JPEG of one or three channels or cannot be read."""
    with suppress(
        OSError
    ):  # of Pillow too, for a file without a known format; `images` names what cannot be read
        content = np.fromfile(split.path(i), dtype=np.uint8)
        with Image.open(io.BytesIO(content.data)) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return content
    return np.empty(0, dtype=np.uint8)


def images(split: FileSplit, positions: np.ndarray, packed: Tensor, device: torch.device) -> Iterator[Tensor]:
    """The images of a packed batch in their order, on the device: uint8 [3, h, w] each. UserError: as `FileSplit.read`."""
    head = LENGTH * len(positions)
    # the workers use their memory again
    files = packed[head:].clone().split(packed[:head].view(torch.int64).tolist())
    decoded = iter(_decode([file for file in files if len(file)], device))
    for i, file in zip(positions.tolist(), files, strict=True):
        image = next(decoded) if len(file) else None
        yield split.read(i).to(device) if image is None else image


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEG files [n]: uint8 [3, h, w] on the device each, None for one that nvJPEG refuses."""
    from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415  (takes seconds to import)

    if not files:
        return []
    try:
        return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))
    except RuntimeError as error:  # one of them refused, or several: which ones is not said
        if len(files) == 1:
            _warn(str(error).partition("\n")[0])
            return [None]
        return [image for file in files for image in _decode([file], device)]


@cache
def _warn(why: str) -> None:
    """Say once that files are decoded on the CPU."""
    print(f"warning: nvJPEG refuses a file ({why}): such files are decoded on the CPU", file=sys.stderr)
