"""Pre-trained encoders: files of this project, published SimCLR checkpoints, plain state dicts."""

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
    """The number of a file's tensors in the encoder, and of its other tensors (head, classifier)."""

    taken: int
    left: int


def load_encoder(encoder: nn.Module, path: str | Path) -> Taken:
    """Load all weights of an encoder from a file, or none, and print their number.

    The file: .safetensors; or one of torch.save, a state dict of tensors or a dict with one as `model`, as SupContrast
    writes it. Names may have the prefixes `module.` and `encoder.`, and shortcuts of residual blocks may be called shortcut or
    downsample; num_batches_tracked may be missing. No code in the file runs. UserError: no such file, damaged, other content,
    a tensor of the encoder that is missing or has another shape, or layers of a deeper encoder.
    """
    path = Path(path)
    tensors = _by_name(_read(path), path)
    own = encoder.state_dict()
    weights = {name: tensors[there] for name in own for there in _names(name) if there in tensors}
    for name, tensor in own.items():
        if name not in weights and not name.endswith("num_batches_tracked"):
            raise UserError(
                f"--pretrained {path}: has no {name}, expected with shape {list(tensor.shape)}: "
                f"not an encoder of this kind ({len(tensors)} tensors{_some(tensors)})"
            )
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"--pretrained {path}: {name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}: "
                "an encoder of other images or another width"
            )
    accepted = {there for name in own for there in _names(name)}
    parts = {name.partition(".")[0] for name in own}
    for name in tensors:
        if name not in accepted and name.partition(".")[0] in parts:
            raise UserError(
                f"--pretrained {path}: has {name}, which this encoder has not: another architecture"
            )
    encoder.load_state_dict(weights, strict=False)
    counts = Taken(len(weights), len(tensors) - len(weights))
    processes.say(f"encoder from {path}: {counts.taken} tensors taken, {counts.left} others left")
    return counts


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, read as tensors and plain data only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # published checkpoints also hold the options of their training
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--pretrained {path}: no such file") from None
    except Exception as error:  # safetensors and torch raise many types for damaged files
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
    tensors = {}
    for full_name, tensor in loaded.items():
        name = full_name
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name in tensors:
            raise UserError(f"--pretrained {path}: holds {name} twice, under different prefixes")
        tensors[name] = tensor
    return tensors


def _names(name: str) -> tuple[str, ...]:
    """Possible names of a tensor of the encoder in a file; the last one in the file is used."""
    first, second = SHORTCUTS
    return name.replace(first, second), name.replace(second, first), name


def _some(tensors: dict[str, Tensor]) -> str:
    return "".join(f"{', ' if i else ': '}{name}" for i, name in enumerate(list(tensors)[:2]))
