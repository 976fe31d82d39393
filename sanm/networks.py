"""Encoder, classifier and the decoder of SMR in one network (README, section 3).

Every network maps images to the encoder's last map and the scores of the classes, and masked images to their reconstruction.
Layers are made in the order encoder, classifier, decoder. The layers of the SimCLR-style encoder have the names of published
SimCLR checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.encoders import load_encoder
from common.gpu.weights import imagenet_resnet
from common.pretraining.simclr import SimCLR

# widths and strides of the stages, and blocks of each; below 16 pixels the narrow ones
USUAL = (64, 128, 256, 512), (1, 2, 2, 2), 2
NARROW = (16, 32, 32), (1, 2, 1), 1
# of --arch narrow, at any size
HALVING = (16, 32, 64), (1, 2, 2), 1


class Outputs(NamedTuple):
    """What a forward pass gives; scores and reconstruction are float32 whatever the autocast."""

    maps: Tensor  # [B, D, h, w] the encoder's last map
    scores: Tensor  # [B, K] logits, or probabilities where the release has them so
    reconstruction: Tensor | None  # [M, C, H, W] of the masked images (SMR, Eq. 10)


class MaskedNetwork(nn.Module):
    """Encoder, linear classifier on the pooled map, decoder on the map itself."""

    def __init__(
        self, encoder: nn.Module, width: int, num_classes: int, decoder: nn.Module, softmax: bool = False
    ):
        """encoder: images -> maps [B, width, h, w]; decoder: maps -> images.

        softmax: return probabilities in place of logits, as the released SimCLR-style network does.
        """
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, num_classes)
        self.decoder = decoder
        self.softmax = softmax

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Outputs:
        """images [B, C, H, W]; masked [M, C, H, W]: images to be reconstructed, in a batch of their own before the others.

        One call for both, since DistributedDataParallel wants one call per backward pass.
        """
        reconstruction = None if masked is None else self.reconstruct(self.encoder(masked), masked.shape[2:])
        maps = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            scores = self.classifier(maps.float().mean(dim=(2, 3)))
            scores = F.softmax(scores, dim=1) if self.softmax else scores
        return Outputs(maps, scores, reconstruction)

    def reconstruct(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Images of the given height and width from maps; resized bilinearly where the decoder's own size is another."""
        images = self.decoder(maps).float()
        if images.shape[2:] != tuple(size):
            images = F.interpolate(images, tuple(size), mode="bilinear", align_corners=False)
        return images


def make_network(
    base: str, num_classes: int, channels: int = 3, size: int = 32, softmax: bool = False, arch: str = "auto"
) -> MaskedNetwork:
    """The network of a base for images [channels, size, size], narrow below 16 pixels (README, section 3 A and B).

    c2d: SimCLR-style ResNet-18, for pre-trained weights; softmax makes its scores probabilities. dividemix: PreAct ResNet-18,
    which has logits in the release too. arch: auto, or narrow: at any size three blocks whose last map is a quarter of the
    image.
    """
    kind = SimCLREncoder if base == "c2d" else PreActEncoder
    widths, strides, blocks = HALVING if arch == "narrow" else stages(size)
    encoder, width = kind(channels, widths, strides, blocks), widths[-1]
    rebuild = (
        quadrupling_decoder(width, channels)
        if arch == "narrow"
        else decoder(width, channels, narrow=size < 16)
    )
    return MaskedNetwork(encoder, width, num_classes, rebuild, softmax and base == "c2d")


def clothing_network(name: str, num_classes: int, pretrained: str = "none") -> MaskedNetwork:
    """torchvision's resnet50 (README, section 3 C), or resnet18 to try things out, with the decoder of 224-pixel images.

    pretrained: imagenet, none, or a file with the weights of an encoder. UserError: weights that are not there or do not fit.
    """
    from torchvision import models  # noqa: PLC0415 (seconds to import, of use only here)

    resnet: models.ResNet = imagenet_resnet(name) if pretrained == "imagenet" else models.get_model(name)
    width, encoder = resnet.fc.in_features, MapOf(resnet)
    if pretrained not in ("imagenet", "none"):
        load_encoder(encoder, pretrained)
    return MaskedNetwork(encoder, width, num_classes, clothing_decoder(width))


# encoders -------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Convolution, norm, ReLU, convolution, norm; plus the shortcut; ReLU."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class SimCLREncoder(nn.Module):
    """Post-activation ResNet with a 3x3 stem and no max-pool (README, section 3 A)."""

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[int], blocks_per_stage: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(widths)
        width_in = widths[0]
        for stage, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
            blocks = [BasicBlock(width_in, width, stride)]
            blocks += [BasicBlock(width, width, 1) for _ in range(blocks_per_stage - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width_in = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> maps [B, D, h, w]; 32 pixels give 512 x 4 x 4."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


def simclr_resnet(channels: int = 3, size: int = 32) -> SimCLREncoder:
    """ResNet-18 for CIFAR; below 16 pixels three stages of one block, whose map of 8 pixels is 32 x 4 x 4."""
    return SimCLREncoder(channels, *stages(size))


def make_simclr(channels: int = 3, size: int = 32) -> SimCLR:
    """SimCLR for images [channels, size, size]: ResNet-18, 128 dimensions; narrow, 64 below 16 pixels (README, section 10)."""
    return SimCLR(simclr_resnet(channels, size), width_of(size), 64 if size < 16 else 128)


def width_of(size: int) -> int:
    """Channels of the last map of images of that size."""
    return stages(size)[0][-1]


def stages(size: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Widths and strides of an encoder's stages, and blocks of each, for images of that size."""
    return NARROW if size < 16 else USUAL


class PreActBlock(nn.Module):
    """Basic pre-activation block. Its identity shortcut is the activated tensor, not the block's input (README, section 3 B)."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        shortcut = activated if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)))) + shortcut


class PreActEncoder(nn.Module):
    """Pre-activation ResNet; no norm or activation after the last block (README, section 3 B)."""

    def __init__(self, channels: int, widths: Sequence[int], strides: Sequence[int], blocks_per_stage: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks, width_in = [], widths[0]
        for width, stride in zip(widths, strides, strict=True):
            blocks.append(PreActBlock(width_in, width, stride))
            blocks += [PreActBlock(width, width, 1) for _ in range(blocks_per_stage - 1)]
            width_in = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> maps [B, D, h, w]; 32 pixels give 512 x 4 x 4."""
        return self.blocks(F.relu(self.bn1(self.conv1(images))))


class MapOf(nn.Module):
    """The part of a torchvision ResNet up to its last map, under torchvision's names."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        for name, module in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> maps [B, D, H / 32, W / 32]."""
        for module in self.children():
            images = module(images)
        return images


# decoders of SMR: transposed convolutions with bias and nothing between them ---------------------------------------------


def decoder(width: int, channels: int, narrow: bool) -> nn.Sequential:
    """4 -> 10 -> 15 -> 32 pixels; the narrow network's 4 -> 5 -> 7 -> 8."""
    if narrow:
        return nn.Sequential(
            nn.ConvTranspose2d(width, 32, 2), nn.ConvTranspose2d(32, 16, 3), nn.ConvTranspose2d(16, channels, 2)
        )  # fmt: skip
    return nn.Sequential(
        nn.ConvTranspose2d(width, 256, 4, stride=2),
        nn.ConvTranspose2d(256, 128, 6),
        nn.ConvTranspose2d(128, channels, 4, stride=2),
    )


def quadrupling_decoder(width: int, channels: int) -> nn.Sequential:
    """n -> 2 n -> 4 n -> 4 n pixels, for a map that is a quarter of the image: 2 -> 8, 7 -> 28, 8 -> 32."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, 32, 4, stride=2, padding=1),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.ConvTranspose2d(16, channels, 3, padding=1),
    )


def clothing_decoder(width: int) -> nn.Sequential:
    """7 -> 25 -> 75 -> 224 pixels."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, 256, 6, stride=3, output_padding=1),
        nn.ConvTranspose2d(256, 128, 2, stride=3, output_padding=1),
        nn.ConvTranspose2d(128, 3, 2, stride=3),
    )
