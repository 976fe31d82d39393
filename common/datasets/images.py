"""Image files as tensors, read one by one or by worker processes."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


def is_image_name(name: str) -> bool:
    """Whether a file listed from a folder is an image by its suffix, and no hidden file such as macOS's `._x.jpg`."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


class DamagedImage(Exception):
    """A file that holds no image, or only a part of one."""

    def __init__(self, path: Path, reason: str):
        """reason: a few words."""
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} is damaged ({self.reason})"


def read_image(path: str | Path) -> Tensor:
    """The image in a file as RGB: uint8 [3, H, W], channels-last in memory.

    Grey, palette and CMYK images become RGB and transparency is dropped, as in Pillow's convert("RGB"); 16 bits per channel
    become 8; of an animation the first picture is taken. torchvision decodes what it can, for speed, and
    Pillow the rest. DamagedImage: neither can. OSError: the file cannot be read.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content):
        raise DamagedImage(Path(path), "empty file")
    try:
        # seconds to import, of use only where images come from files
        from torchvision.io import ImageReadMode, decode_image  # noqa: PLC0415

        image = decode_image(torch.from_numpy(content), mode=ImageReadMode.RGB)
    except (RuntimeError, ImportError):  # torchvision is to lose its decoders: deprecated since 0.29
        image = _read_with_pillow(content.tobytes(), Path(path))
    if image.ndim == 4:
        image = image[0]
    return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)


def _read_with_pillow(content: bytes, path: Path) -> Tensor:
    """uint8 or, of 16 bits, int32 [3, H, W]."""
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I;16"):  # which Pillow would clip to 8 bits
                return torch.from_numpy(np.array(image, dtype=np.int32)).expand(3, -1, -1)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise DamagedImage(path, "no image of a known format") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedImage(path, reason) from None


# worker processes -----------------------------------------------------------------------------------------------------


class _Calls(Dataset):
    """A function in the shape that DataLoader wants."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, argument: Any) -> Any:
        return self.function(argument)


def in_workers(
    function: Callable, arguments: Sequence, workers: int, *, pin_memory: bool = False
) -> DataLoader:
    """function(argument) for each of the arguments in their order, computed by worker processes (by this one for 0).

    The workers live as long as the result, through any number of passes; `arguments` may be changed between passes. Do not
    raise while a pass is a local variable: kept alive by the traceback, its workers would end late.
    """
    return DataLoader(
        _Calls(function),
        sampler=arguments,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_the_process_group,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or each pass would draw a number from the global one
    )


def _as_it_is(result: Any) -> Any:
    return result


def _leave_the_process_group(_worker: int) -> None:
    """Ctrl-C, and a signal to the whole job, are for the parent: it ends its workers in its own time."""
    os.setsid()
