"""The released networks (README, section 3): LeNet, ResNet-18/34 with an unpadded stem, ResNet-50 for Clothing1M.

Not in the release: a PreAct ResNet-18. PyTorch's own initialisation; layers are made in the release's order.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.weights import imagenet_resnet, read_weights
from common.runs.cli import UserError
from me_momentum.choices import PREACT


def make_network(name: str, num_classes: int, channels: int, size: int, stem_padding: int = 0) -> nn.Module:
    """One of NETWORKS for images [channels, size, size]. UserError: images that are too small for it.

    preact_resnet18 is narrow below 16 pixels, preact_narrow always. stem_padding is for resnet18 and resnet34 alone.
    """
    # the ResNets' last maps must have more than one pixel, or batch normalisation fails on a last batch of one image
    smallest = {"lenet": 14, "small": 4, **dict.fromkeys(PREACT, 5)}.get(name, 11 - 2 * stem_padding)
    if size < smallest:
        raise UserError(f"--network {name}: images of {size} pixels are too small for it; use small")
    if name == "lenet":
        return LeNet(num_classes, channels, size)
    if name == "small":
        return SmallNet(num_classes, channels)
    if name in PREACT:
        narrow = name == "preact_narrow" or size < 16
        widths, blocks_per_stage = ((16, 32, 64), 1) if narrow else ((64, 128, 256, 512), 2)
        return PreActResNet(num_classes, channels, widths, blocks_per_stage)
    blocks = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}[name]
    return ResNet(blocks, num_classes, channels, stem_padding)


def usual_network(dataset: str, channels: int, size: int) -> str:
    """The release's network for a data set; for other data sets one that fits their images."""
    if dataset == "cifar100":
        return "resnet34"
    if size < 14:
        return "small"
    return "lenet" if channels == 1 else "resnet18"


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max-pooling; 61 706 parameters for 10 classes of 28-pixel grey images.

    Pooling comes before ReLU, which gives the same values with a quarter of the work.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, size: int = 28):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * ((size // 2 - 4) // 2) ** 2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, size, size] -> logits [B, C]."""
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class SmallNet(nn.Module):
    """LeNet's relative for the 8-pixel digits: two 3x3 convolutions and two linear layers."""

    def __init__(self, num_classes: int = 10, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 2 * 2, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C]."""
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.adaptive_max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class BasicBlock(nn.Module):
    """Convolution, norm, ReLU, convolution, norm; plus the shortcut; ReLU."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        changes = stride != 1 or width_in != width
        projection = (
            (nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if changes else ()
        )
        self.shortcut = nn.Sequential(*projection) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    """Post-activation ResNet of basic blocks, 64 to 512 wide. The release's stem has no padding: 32 pixels become 30."""

    def __init__(self, blocks: Sequence[int], num_classes: int, channels: int = 3, stem_padding: int = 0):
        """blocks: of each of the four stages; all but the first halve the resolution."""
        super().__init__()
        self.stem = nn.Conv2d(channels, 64, 3, padding=stem_padding, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        layers, width_in = [], 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for block in range(count):
                layers.append(BasicBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(width_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C]."""
        maps = self.blocks(F.relu(self.stem_norm(self.stem(images))))
        return self.classifier(maps.mean(dim=(2, 3)))


class PreActBlock(nn.Module):
    """Basic pre-activation block. Its shortcut starts from the activated tensor, not from the block's input."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        activated = F.relu(self.norm1(x))
        shortcut = activated if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.norm2(self.conv1(activated)))) + shortcut


class PreActResNet(nn.Module):
    """Pre-activation ResNet with a padded stem, which other methods have on CIFAR; no norm or activation after the last block."""

    def __init__(self, num_classes: int, channels: int, widths: Sequence[int], blocks_per_stage: int):
        """widths: of the stages; each but the first halves the resolution. The stem has the first one's width."""
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks, width_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks_per_stage):
                blocks.append(PreActBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C]."""
        maps = self.blocks(F.relu(self.stem_norm(self.stem(images))))
        return self.classifier(maps.mean(dim=(2, 3)))


# Clothing1M (README, section 8) ------------------------------------------------------------------------------------------


def clothing_network(num_classes: int, name: str = "resnet50", pretrained: str = "imagenet") -> nn.Module:
    """torchvision's ResNet with a fresh last layer; 23 536 718 parameters for ResNet-50 and 14 classes.

    pretrained: imagenet (torchvision's first weights), none, or the path of a torchvision ResNet's weights. UserError: the
    weights cannot be fetched or read, or are of another network.
    """
    from torchvision import models  # noqa: PLC0415  (seconds of import that --help need not wait for)

    network: models.ResNet = imagenet_resnet(name) if pretrained == "imagenet" else models.get_model(name)
    if pretrained not in ("imagenet", "none"):
        weights, own = read_weights(Path(pretrained), "--pretrained"), network.state_dict()
        body = {key: value for key, value in weights.items() if not key.startswith("fc.")}
        foreign = [key for key, value in body.items() if key not in own or value.shape != own[key].shape]
        missing = [key for key in own if key not in body and not key.startswith("fc.")]
        if foreign or missing:
            raise UserError(f"--pretrained {pretrained}: {(foreign + missing)[0]} does not fit {name}")
        network.load_state_dict(body, strict=False)
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    return network
