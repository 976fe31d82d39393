"""Encoders to begin from: our own files, published SimCLR checkpoints, plain state dicts."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.gpu import processes
from common.runs.cli import UserError

PREFIXES = ("module.", "encoder.")  # of DataParallel and of the network around the encoder
SHORTCUTS = (".shortcut.", ".downsample.")  # the published encoders' name and torchvision's


class Taken(NamedTuple):
    """How many tensors of a file became the encoder's, and how many it holds besides (head, classifier)."""

    taken: int
    left: int


def load_encoder(encoder: nn.Module, path: str | Path) -> Taken:
    """Fill an encoder with the weights of a file, all of them or none, and print how many there were.

    The file: .safetensors; or one of torch.save, a state dict of tensors or a dict with one as `model`, as SupContrast
    writes it. Prefixes `module.` and `encoder.` of the names do not matter, nor whether shortcuts of residual blocks are called
    shortcut or downsample; num_batches_tracked may be missing. Nothing in the file is run. UserError: no such file, damaged,
    other things in it, a tensor of the encoder that it lacks or has in another shape, or further layers of a deeper encoder.
    """
    path = Path(path)
    found = _by_name(_read(path), path)
    own = encoder.state_dict()
    weights = {name: found[there] for name in own for there in _names(name) if there in found}
    for name, tensor in own.items():
        if name not in weights and not name.endswith("num_batches_tracked"):
            raise UserError(
                f"--pretrained {path}: has no {name}, expected with shape {list(tensor.shape)}: "
                f"not an encoder of this kind ({len(found)} tensors{_some(found)})"
            )
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"--pretrained {path}: {name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}: "
                "an encoder of other images or another width"
            )
    known = {there for name in own for there in _names(name)}
    parts = {name.partition(".")[0] for name in own}
    for name in found:
        if name not in known and name.partition(".")[0] in parts:
            raise UserError(
                f"--pretrained {path}: has {name}, which this encoder has not: another architecture"
            )
    encoder.load_state_dict(weights, strict=False)
    counts = Taken(len(weights), len(found) - len(weights))
    processes.say(f"encoder from {path}: {counts.taken} tensors taken, {counts.left} others left")
    return counts


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, read as tensors and plain data only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # published checkpoints keep the options of their training beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--pretrained {path}: no such file") from None
    except Exception as error:  # safetensors and torch raise a dozen kinds for damaged files
        raise UserError(
            f"--pretrained {path}: damaged, or holds more than tensors and options ({type(error).__name__})"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    tensors = isinstance(loaded, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    )
    if not tensors:
        raise UserError(f"--pretrained {path}: holds no state dict of tensors, neither plain nor as `model`")
    return loaded


def _by_name(loaded: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by their names without prefixes."""
    found = {}
    for full_name, tensor in loaded.items():
        name = full_name
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name in found:
            raise UserError(f"--pretrained {path}: holds {name} twice, under different prefixes")
        found[name] = tensor
    return found


def _names(name: str) -> tuple[str, ...]:
    """What a file may call a tensor of the encoder; the last name that it has is taken."""
    first, second = SHORTCUTS
    return name.replace(first, second), name.replace(second, first), name


def _some(found: dict[str, Tensor]) -> str:
    return "".join(f"{', ' if i else ': '}{name}" for i, name in enumerate(list(found)[:2]))
