"""Networks with two heads on one feature (README, section 3): a standard classifier and an auxiliary balanced one.

Every network maps images to (features [B, D], standard logits [B, K], balanced logits [B, K]), float32 whatever the
autocast: the selection and the losses read them. PyTorch's default initialisation throughout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Linear):
    """A classifier by angles, as LDAM needs it: scale times the cosines of the feature with the weights of the classes."""

    def __init__(self, feature_size: int, num_classes: int, scale: float):
        super().__init__(feature_size, num_classes, bias=False)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, K]."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class TwoHeads(nn.Module):
    """The standard and the auxiliary balanced classifier on one feature; the gradients of both reach it."""

    def __init__(self, feature_size: int, num_classes: int):
        super().__init__()
        self.feature_size = feature_size
        self.standard = nn.Linear(feature_size, num_classes)
        self.balanced = nn.Linear(feature_size, num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, D] -> (features, standard logits [B, K], balanced logits [B, K]), all float32."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            return features, self.standard(features), self.balanced(features)


# CIFAR: pre-activation ResNet -----------------------------------------------------------------------------------------


class PreActBlock(nn.Module):
    """Basic pre-activation block. Its identity skip is the activated tensor, not the block's input (README, section 3.1)."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv_a = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv_b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or width_in != width
        self.conv_skip = nn.Conv2d(width_in, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        activated = F.relu(self.norm1(x))
        skip = activated if self.conv_skip is None else self.conv_skip(activated)
        return self.conv_b(F.relu(self.norm2(self.conv_a(activated)))) + skip


class PreActResNet(nn.Module):
    """Pre-activation ResNet with two heads. No norm or activation after the last block: features can be negative."""

    def __init__(self, num_classes: int, in_channels: int, widths: Sequence[int], blocks_per_stage: int):
        """widths: of the stages; each but the first halves the resolution. The stem has the first one's width."""
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks, width_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks_per_stage):
                blocks.append(PreActBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.heads = TwoHeads(widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, H, W] -> (features [B, D], standard logits [B, K], balanced logits [B, K])."""
        maps = self.blocks(F.relu(self.stem_norm(self.stem(images))))
        return self.heads(maps.mean(dim=(2, 3)))


def preact_resnet18(num_classes: int, in_channels: int = 3) -> PreActResNet:
    """PreAct ResNet-18 of the release: 512 features; 11 176 404 parameters for 10 classes."""
    return PreActResNet(num_classes, in_channels, widths=(64, 128, 256, 512), blocks_per_stage=2)


def preact_resnet_narrow(num_classes: int, in_channels: int = 1) -> PreActResNet:
    """Its narrow form: three stages, so that the last map of 8-pixel images is still 2x2; 64 features at any size."""
    return PreActResNet(num_classes, in_channels, widths=(16, 32, 64), blocks_per_stage=1)


# WebVision: Inception-ResNet-v2 (README, section 3.2), and torchvision's ResNets ------------------------------------


class Unit(nn.Sequential):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(self, width_in: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__(
            nn.Conv2d(width_in, width, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(width, eps=1e-3),
            nn.ReLU(),
        )


class Branches(nn.Module):
    """Branches side by side on the same input, joined along the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, sum of the branches' widths, H', W']."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class InceptionResidual(nn.Module):
    """Residual block: x + scale * (1x1 convolution with bias of the joined branches), then ReLU unless it is the last."""

    def __init__(self, width: int, branches: Branches, joined: int, scale: float, activate: bool = True):
        super().__init__()
        self.branches = branches
        self.up = nn.Conv2d(joined, width, 1)
        self.scale, self.activate = scale, activate

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> the same shape."""
        out = x + self.scale * self.up(self.branches(x))
        return F.relu(out) if self.activate else out


def _block_a() -> InceptionResidual:
    branches = Branches(
        Unit(320, 32, 1),
        nn.Sequential(Unit(320, 32, 1), Unit(32, 32, 3, padding=1)),
        nn.Sequential(Unit(320, 32, 1), Unit(32, 48, 3, padding=1), Unit(48, 64, 3, padding=1)),
    )
    return InceptionResidual(320, branches, joined=128, scale=0.17)


def _block_b() -> InceptionResidual:
    branches = Branches(
        Unit(1088, 192, 1),
        nn.Sequential(
            Unit(1088, 128, 1), Unit(128, 160, (1, 7), padding=(0, 3)), Unit(160, 192, (7, 1), padding=(3, 0))
        ),
    )
    return InceptionResidual(1088, branches, joined=384, scale=0.10)


def _block_c(scale: float = 0.20, activate: bool = True) -> InceptionResidual:
    branches = Branches(
        Unit(2080, 192, 1),
        nn.Sequential(
            Unit(2080, 192, 1), Unit(192, 224, (1, 3), padding=(0, 1)), Unit(224, 256, (3, 1), padding=(1, 0))
        ),
    )
    return InceptionResidual(2080, branches, joined=448, scale=scale, activate=activate)


def _entry_a() -> Branches:
    return Branches(
        Unit(192, 96, 1),
        nn.Sequential(Unit(192, 48, 1), Unit(48, 64, 5, padding=2)),
        nn.Sequential(Unit(192, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, padding=1)),
        nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), Unit(192, 64, 1)),
    )


def _reduction_a() -> Branches:
    return Branches(
        Unit(320, 384, 3, stride=2),
        nn.Sequential(Unit(320, 256, 1), Unit(256, 256, 3, padding=1), Unit(256, 384, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def _reduction_b() -> Branches:
    return Branches(
        nn.Sequential(Unit(1088, 256, 1), Unit(256, 384, 3, stride=2)),
        nn.Sequential(Unit(1088, 256, 1), Unit(256, 288, 3, stride=2)),
        nn.Sequential(Unit(1088, 256, 1), Unit(256, 288, 3, padding=1), Unit(288, 320, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-v2 with two heads for 299-pixel images; 54 460 164 parameters for 50 classes, no dropout."""

    def __init__(self, num_classes: int):
        super().__init__()
        stem = [
            Unit(3, 32, 3, stride=2),
            Unit(32, 32, 3),
            Unit(32, 64, 3, padding=1),
            nn.MaxPool2d(3, stride=2),
        ]
        stem += [Unit(64, 80, 1), Unit(80, 192, 3), nn.MaxPool2d(3, stride=2)]
        stages = [_entry_a(), *(_block_a() for _ in range(10)), _reduction_a()]
        stages += [*(_block_b() for _ in range(20)), _reduction_b()]
        stages += [*(_block_c() for _ in range(9)), _block_c(scale=1.0, activate=False), Unit(2080, 1536, 1)]
        self.stages = nn.Sequential(*stem, *stages)
        self.heads = TwoHeads(1536, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, 299, 299] -> (features [B, 1536], standard logits [B, K], balanced logits [B, K])."""
        return self.heads(self.stages(images).mean(dim=(2, 3)))


class ResNet(nn.Module):
    """torchvision's ResNet with two heads, from random weights: lighter than Inception-ResNet-v2."""

    def __init__(self, name: str, num_classes: int):
        """name: resnet50 (2048 features), resnet18 (512), ..."""
        from torchvision import models  # noqa: PLC0415 (seconds to import, of use only here)

        super().__init__()
        self.encoder = models.get_model(name)
        feature_size = self.encoder.fc.in_features
        self.encoder.fc = nn.Identity()
        self.heads = TwoHeads(feature_size, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] -> (features [B, D], standard logits [B, K], balanced logits [B, K])."""
        return self.heads(self.encoder(images))


def webvision_network(name: str, num_classes: int) -> nn.Module:
    """inception_resnet_v2, or one of torchvision's ResNets by its name."""
    return InceptionResNetV2(num_classes) if name == "inception_resnet_v2" else ResNet(name, num_classes)
