"""The encoder f1, a linear classifier f2 and a projection on its embedding (README, section 3).

The layers of the encoder have the usual names of PreAct ResNets: conv1, bn1, layer1 to layer4, shortcut.0. Those of
--arch narrow are narrow1 to narrow3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_dividemix.choices import ARCHITECTURES

PROJECTION = 128  # dimensions of the projection
# widths and strides of the stages: usual; below 16 pixels, a block each; of --arch narrow, at any size
USUAL = (64, 128, 256, 512), (1, 2, 2, 2)
NARROW = (16, 32, 64), (1, 2, 1)
HALVING = (16, 32, 64), (1, 2, 2)


class PreActBlock(nn.Module):
    """Basic pre-activation block. The shortcut starts from the activated tensor, not from the block's input."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = _shortcut(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        out = self.conv1(activated)
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(activated)


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck, for ResNet-50 and 101: 1x1, 3x3, 1x1 (README, difference 16)."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        width_out = width * self.expansion
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width_out, 1, bias=False)
        self.shortcut = _shortcut(width_in, width_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, 4 width, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return self.conv3(F.relu(self.bn3(out))) + self.shortcut(activated)


def _shortcut(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    """The identity, or a 1x1 convolution if the shape changes."""
    if stride == 1 and width_in == width_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride, bias=False))


class Encoder(nn.Module):
    """f1: PreAct ResNet with a 3x3 stem; neither norm nor activation after its last stage."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        strides: Sequence[int],
        blocks: Sequence[int],
        bottleneck: bool = False,
        prefix: str = "layer",
    ):
        """widths, strides, blocks: of the stages, which are called prefix1, prefix2, ..."""
        super().__init__()
        kind = PreActBottleneck if bottleneck else PreActBlock
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages, self.prefix = len(widths), prefix
        width_in = widths[0]
        for stage, (width, stride, count) in enumerate(zip(widths, strides, blocks, strict=True), start=1):
            layers = []
            for number in range(count):
                layers.append(kind(width_in, width, stride if number == 0 else 1))
                width_in = width * kind.expansion
            self.add_module(f"{prefix}{stage}", nn.Sequential(*layers))
        self.width = width_in

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> maps [B, D, h, w]; 32 pixels give 512 x 4 x 4."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"{self.prefix}{stage}")(x)
        return x


def make_encoder(arch: str = "resnet18", channels: int = 3, size: int = 32) -> Encoder:
    """The encoder of images [channels, size, size], of one of ARCHS.

    A PreAct ResNet; below 16 pixels a narrow one of three blocks for every number. "narrow": three blocks at any size, whose last
    map is a quarter of the image.
    """
    if arch == "narrow":
        # below 16 pixels it differs from the other narrow one in a stride alone: names of its own let a file be refused
        return Encoder(channels, *HALVING, blocks=(1, 1, 1), prefix="narrow")
    blocks, bottleneck = ARCHITECTURES[arch]
    if size < 16:
        return Encoder(channels, *NARROW, blocks=(1, 1, 1))
    return Encoder(channels, *USUAL, blocks=blocks, bottleneck=bottleneck)


class Network(nn.Module):
    """f1, f2 and the projection, called one by one, so that none is computed without need."""

    def __init__(self, encoder: nn.Module, width: int, num_classes: int):
        """encoder: images -> maps [B, width, h, w]."""
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, num_classes)
        self.projection = nn.Linear(width, PROJECTION)
        self.projection_bn = nn.BatchNorm1d(PROJECTION)

    def forward(self, images: Tensor) -> Tensor:
        """f1: images [B, C, H, W] -> embeddings h [B, D], float32, the mean over the encoder's last map."""
        return self.encoder(images).float().mean(dim=(2, 3))

    def classify(self, embeddings: Tensor) -> Tensor:
        """f2: embeddings [B, D] -> logits [B, K], float32 also under autocast."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.classifier(embeddings)

    def project(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] -> projections [B, 128], linear and batch-normalised, not of unit length; float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.projection_bn(self.projection(embeddings))

    def head(self) -> list[nn.Parameter]:
        """The parameters trained at the learning rate of the head: all but the encoder's."""
        return [p for name, p in self.named_parameters() if not name.startswith("encoder.")]
