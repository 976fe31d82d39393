"""Initial weights: torchvision's ResNets trained on ImageNet, or a file of tensors."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.gpu import processes
from common.runs.cli import UserError


def imagenet_resnet(name: str) -> nn.Module:
    """torchvision's ResNet with its IMAGENET1K_V1 weights, downloaded once by the first process. UserError: it cannot be read."""
    from torchvision import models  # noqa: PLC0415

    weights = models.get_model_weights(name).IMAGENET1K_V1

    def load() -> nn.Module:
        network = models.get_model(name)
        try:
            network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
        except Exception as error:  # no network, a full disk, or one of torch's many for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
            raise UserError(
                f"--pretrained imagenet: cannot fetch or read {weights.url} ({reason[:200]}): put the complete file at "
                f"{place}, or use --pretrained PATH or none"
            ) from None
        return network

    return processes.first_alone(load)


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """A state dict of tensors from a file, read as tensors only. UserError: no such file, damaged, or other content."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{what} {path}: no such file") from None
    except Exception as error:  # torch raises many types for damaged files
        raise UserError(
            f"{what} {path}: damaged, or holds more than tensors ({type(error).__name__})"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{what} {path}: not a state dict of tensors")
    return loaded


def cpu_copy(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in network.state_dict().items()}
