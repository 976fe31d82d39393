"""The toy network of the recorded training steps: an 8x8 convolution with stride 8, its mean, a linear classifier, a decoder."""

import torch
from torch import Tensor, nn

from sanm.networks import MaskedNetwork

PARTS = {"conv": "encoder.0", "lin": "classifier", "deconv": "decoder"}


class Toy(MaskedNetwork):
    """Maps [B, K, 4, 4] of images [B, 3, 32, 32]."""

    def __init__(self, num_classes: int, width: int, softmax: bool = False):
        encoder = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU())
        super().__init__(encoder, width, num_classes, nn.ConvTranspose2d(width, 3, 8, stride=8), softmax)


def toy_from(case, prefix: str, softmax: bool = False) -> Toy:
    """The network whose weights a case holds under prefix (before, peer or after)."""
    network = Toy(len(case[f"{prefix}_lin_b"]), len(case[f"{prefix}_conv_b"]), softmax)
    network.load_state_dict(weights_of(case, prefix))
    return network


def weights_of(case, prefix: str) -> dict[str, Tensor]:
    """The state dict that a case holds under prefix."""
    return {
        f"{part}.{name}": torch.from_numpy(case[f"{prefix}_{short}_{name[0]}"])
        for short, part in PARTS.items()
        for name in ("weight", "bias")
    }
