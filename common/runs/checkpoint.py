"""Checkpoints: atomic writes, one predecessor kept, read as plain data only.

A state is a dict of named objects: networks, optimisers and schedules (anything with state_dict and
load_state_dict), torch and NumPy generators, dicts of tensors and numbers (restored in place), and lists of
these.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from common.runs.cli import UserError
from common.runs.files import write_whole

UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save(folder: Path, content: dict) -> None:
    """Write content (tensors and plain data) as the folder's checkpoint; the last one stays as its predecessor.

    WriteError: the disk is full or the write fails otherwise; the last checkpoint stays.
    """
    write_whole(folder / CURRENT, lambda file: write(content, file), keep_as=folder / PREVIOUS)


def write(content: dict, file: BinaryIO) -> None:
    """torch.save that raises the cause of a failure: the OSError of a full disk, or the exception of a signal."""
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch's own, about the incomplete file
        if error.__context__ is not None:
            raise error.__context__ from None
        raise


def load(folder: Path) -> dict | None:
    """The folder's checkpoint on the CPU, or its predecessor with a warning; None without either.

    Read with weights_only: a file that holds more than tensors and plain data is refused, and none of its code runs. A
    predecessor that is read replaces the checkpoint. UserError: no checkpoint is readable. OSError: the disk fails.
    """
    current, previous = folder / CURRENT, folder / PREVIOUS
    for path in (current, previous):
        if not path.exists():
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for damaged files, with unsafe advice
            if isinstance(error, OSError) and error.errno in UNREADABLE:
                raise
            reason = f"damaged, or holds more than tensors and plain data ({type(error).__name__})"
            print(f"warning: {path} is {reason}; it is not used", file=sys.stderr)
            continue
        if path == previous:
            os.replace(previous, current)
        return content
    if current.exists() or previous.exists():
        raise UserError(
            f"no readable checkpoint in {folder}: remove the folder to start again, or choose another --out"
        )
    return None


def collect(state: Any) -> Any:
    """The state of an object, or of a dict or list of objects, as tensors and plain data. TypeError: anything else."""
    if isinstance(state, torch.Generator):
        return state.get_state()
    if isinstance(state, np.random.Generator):
        return json.dumps(state.bit_generator.state)
    if hasattr(state, "state_dict"):
        return state.state_dict()
    if isinstance(state, list):
        return [collect(item) for item in state]
    if isinstance(state, dict):
        return {name: collect(item) for name, item in state.items()}
    if isinstance(state, torch.Tensor) or type(state) in (int, float, bool, str, type(None)):
        return state
    raise TypeError(
        f"a {type(state).__name__} cannot be kept in a checkpoint: only tensors and plain data can"
    )


def restore(state: Any, saved: Any, generators: bool = True) -> None:
    """Restore the same objects, in place, from a result of `collect`.

    generators: torch's too; without them they keep their seeds, because a generator's state fits one kind of device.
    """
    if isinstance(state, torch.Generator):
        if generators:
            state.set_state(saved)
    elif isinstance(state, np.random.Generator):
        state.bit_generator.state = json.loads(saved)
    elif hasattr(state, "load_state_dict"):
        state.load_state_dict(saved)
    elif isinstance(state, list):
        if len(state) != len(saved):
            raise ValueError(f"the checkpoint holds {len(saved)} of what are {len(state)} objects here")
        for item, saved_item in zip(state, saved, strict=True):
            restore(item, saved_item, generators)
    elif isinstance(state, dict):
        _restore_dict(state, saved, generators)
    else:
        raise TypeError(f"a {type(state).__name__} cannot be restored in place: put it in a dict")


def _restore_dict(state: dict, saved: dict, generators: bool) -> None:
    missing = [name for name, item in state.items() if name not in saved and _is_live(item)]
    if missing:
        raise ValueError(f"the checkpoint holds no {', '.join(missing)}")
    for name in set(state) - set(saved):
        del state[name]
    for name, item in saved.items():
        if name in state and _is_live(state[name]):
            restore(state[name], item, generators)
        else:
            state[name] = item


def _is_live(item: Any) -> bool:
    """Whether an object must be restored in place; tensors, numbers and lists of them are replaced."""
    if isinstance(item, list):
        return bool(item) and all(_is_live(entry) for entry in item)
    return isinstance(item, (torch.Generator, np.random.Generator, dict)) or hasattr(item, "load_state_dict")
