"""Image files as tensors, read one by one or by worker processes."""

import io
import math
import multiprocessing.queues
import os
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.runs.cli import SHARED_MEMORY, MachineError, UserError, at_end, worker_died

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


def is_image_name(name: str) -> bool:
    """Whether a file name has the suffix of an image and is not hidden, such as macOS's `._x.jpg`."""
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
    Pillow the other files. DamagedImage: neither can. OSError: the file cannot be read.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content):
        raise DamagedImage(Path(path), "empty file")
    try:
        # takes seconds to import, needed only for images from files
        from torchvision.io import ImageReadMode, decode_image  # noqa: PLC0415

        image = decode_image(torch.from_numpy(content), mode=ImageReadMode.RGB)
    except (RuntimeError, ImportError):  # torchvision's decoders are deprecated since 0.29
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


IN_FLIGHT = 2  # results of each worker that wait, or that it computes, while the parent uses another one
_memory: deque[Tensor] = deque()  # of this process, a worker: what `batch_memory` hands out in turn


def batch_memory(shape: Sequence[int]) -> Tensor:
    """Empty uint8 memory for a Tensor that a function of `in_workers` returns, one for each call of the function.

    In a worker it is shared memory that is used again. So the parent must copy a result before it asks for the next one.
    MachineError: shared memory is too small.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = math.prod(shape)
    memory = _memory.popleft() if len(_memory) > IN_FLIGHT else torch.empty(0, dtype=torch.uint8)
    if len(memory) < size:
        memory = _shared(torch.empty(size, dtype=torch.uint8))
    _memory.append(memory)
    return memory[:size].view(*shape)


class _Calls(Dataset):
    """A function in the form that DataLoader needs."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, argument: Any) -> Any:
        try:
            result = self.function(argument)
            return result if get_worker_info() is None else _shared(result)
        except UserError as error:
            return error


def _shared(result: Any) -> Any:
    """A result with its tensors moved to shared memory, from where the parent reads them. MachineError: it is too small."""
    if isinstance(result, Tensor):
        try:
            result.share_memory_()
        except RuntimeError as error:  # if a thread of the worker raises it later, the parent waits for ever
            reason = str(error).splitlines()[0].rpartition(": ")[2]
            raise MachineError(f"no room for images in shared memory ({reason}): {SHARED_MEMORY}") from None
    elif isinstance(result, (list, tuple)):
        for part in result:
            _shared(part)
    return result


def in_workers(
    function: Callable, arguments: Sequence, workers: int, *, pin_memory: bool = False
) -> "Passes":
    """function(argument) for each argument in order, computed by worker processes (by this process for 0 workers).

    The workers live as long as the result, at most until the script ends, through any number of passes. `arguments` may change
    between passes. One pass at a time; a pass may stop before its end. A pass raises a UserError that the function raises or
    returns.
    MachineError: workers cannot be started, or one has died. An error ends all workers.
    """
    loader = partial(
        DataLoader,
        _Calls(function),
        sampler=arguments,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=IN_FLIGHT if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_the_process_group,
        pin_memory=pin_memory,
        multiprocessing_context=_quiet_context() if workers else None,
        generator=torch.Generator(),  # otherwise each pass draws a number from the global generator
    )
    return Passes(loader)


class Passes:
    """A pass over what workers compute at every iteration: see `in_workers`."""

    def __init__(self, new_loader: Callable[[], DataLoader]):
        self._new_loader = new_loader
        self._loader: DataLoader | None = None
        self._running: Any = None
        self._mapped: deque[UntypedStorage] = deque()  # memory of the workers that stays mapped

    def __iter__(self) -> Iterator[Any]:
        self._start()
        running = self._running
        while True:
            try:
                result = next(running)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                result = worker_died(str(error))
            if isinstance(result, UserError):
                self.close()
                raise result
            if isinstance(result, Tensor):
                self._mapped.append(result.untyped_storage())
            yield result

    def _start(self) -> None:
        if self._loader is None:
            self._loader = self._new_loader()
            self._mapped = deque(maxlen=self._loader.num_workers * (IN_FLIGHT + 1))
            at_end(partial(_close, weakref.ref(self)))
        try:
            _try_semaphores(self._loader.num_workers)
            self._running, failure = iter(self._loader), None
        except OSError as error:
            failure = MachineError(f"workers cannot be started ({error.strerror}): {SHARED_MEMORY}")
        if failure is not None:  # raised here, so that no traceback keeps the started workers alive
            self.close()
            raise failure

    def close(self) -> None:
        """End the workers now; another pass starts new ones."""
        running, self._running, self._loader = self._running, None, None
        self._mapped.clear()
        if hasattr(
            running, "_shutdown_workers"
        ):  # `del` is not enough: the traceback of an error keeps the pass
            with suppress(RuntimeError):  # torch raises it if another worker has died
                running._shutdown_workers()


def _try_semaphores(workers: int) -> None:
    """OSError: fewer semaphores than DataLoader needs. DataLoader itself would fail and leave a half-made pass behind."""
    semaphores = [multiprocessing.Lock() for _ in range(3 * workers + 8 if workers else 0)]
    del semaphores


def _close(passes: weakref.ref, *_error: Any) -> None:
    held = passes()
    if held is not None:
        held.close()


class _QuietQueue(multiprocessing.queues.Queue):
    """A queue whose thread prints nothing if the other end is gone. `Passes` reports that in one line."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._ignore_epipe = True


def _quiet_context() -> multiprocessing.context.BaseContext:
    """The context of the start method in use, with quiet queues."""
    context = copy(multiprocessing.get_context(multiprocessing.get_start_method()))
    context.Queue = partial(_QuietQueue, ctx=context)  # type: ignore[method-assign]
    return context


def _as_it_is(result: Any) -> Any:
    return result


def _leave_the_process_group(_worker: int) -> None:
    """Leave Ctrl-C and signals to the process group to the parent, which ends its workers."""
    os.setsid()
    signal.set_wakeup_fd(-1)  # a forked worker inherits its parent's
