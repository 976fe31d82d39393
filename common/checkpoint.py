"""Checkpoints: written whole or not at all, one predecessor kept, read as plain data only.

A state is a dict of named objects: networks, optimisers and schedules (anything with state_dict and
load_state_dict), torch and NumPy generators, dicts of tensors and numbers (restored in place), and lists of
these.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cli import UserError

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at every moment either the old content or the whole new one is there. OSError on
    failure."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save(folder: Path, content: dict) -> None:
    """Write content (tensors and plain data) as the folder's checkpoint; the one before stays as its
    predecessor."""
    temporary = folder / (CURRENT + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if (folder / CURRENT).exists():
        os.replace(folder / CURRENT, folder / PREVIOUS)
    os.replace(temporary, folder / CURRENT)
    _sync_folder(folder)


def load(folder: Path) -> dict | None:
    """The folder's checkpoint on the CPU, or its predecessor with a warning; None where there never was one.

    Read with weights_only: a file that holds more than tensors and plain data is refused, and runs nothing.
    UserError: a checkpoint is there, but neither it nor its predecessor can be read.
    """
    present = [folder / name for name in (CURRENT, PREVIOUS) if (folder / name).exists()]
    for path in present:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for damaged files; each is reported here
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"warning: {path} cannot be read ({reason}); trying its predecessor", file=sys.stderr)
    if present:
        raise UserError(
            f"no readable checkpoint in {folder}: remove the folder to start again, or choose another --out"
        )
    return None


def collect(state: Any) -> Any:
    """The state of an object, or of a dict or list of objects, as tensors and plain data."""
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
    return state


def restore(state: Any, saved: Any) -> None:
    """Put what `collect` returned back into the same objects, in place."""
    if isinstance(state, torch.Generator):
        state.set_state(saved)
    elif isinstance(state, np.random.Generator):
        state.bit_generator.state = json.loads(saved)
    elif hasattr(state, "load_state_dict"):
        state.load_state_dict(saved)
    elif isinstance(state, list):
        if len(state) != len(saved):
            raise ValueError(f"the checkpoint holds {len(saved)} of what are {len(state)} objects here")
        for item, saved_item in zip(state, saved, strict=True):
            restore(item, saved_item)
    elif isinstance(state, dict):
        _restore_dict(state, saved)
    else:
        raise TypeError(f"a {type(state).__name__} cannot be restored in place: put it in a dict")


def _restore_dict(state: dict, saved: dict) -> None:
    missing = [name for name, item in state.items() if name not in saved and _is_live(item)]
    if missing:
        raise ValueError(f"the checkpoint holds no {', '.join(missing)}")
    for name in set(state) - set(saved):
        del state[name]
    for name, item in saved.items():
        if name in state and _is_live(state[name]):
            restore(state[name], item)
        else:
            state[name] = item


def _is_live(item: Any) -> bool:
    """Objects that must be restored in place; tensors, numbers and lists of them are simply replaced."""
    if isinstance(item, list):
        return bool(item) and all(_is_live(entry) for entry in item)
    return isinstance(item, (torch.Generator, np.random.Generator, dict)) or hasattr(item, "load_state_dict")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
