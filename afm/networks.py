"""ResNets, and the network around the attention: pooled features, mixtures, classifiers (README, section 3)."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm.attention import GroupAttention, mixing_weights
from afm.choices import PREACT
from afm.mixing import mixed_features
from common.gpu import processes
from common.gpu.weights import imagenet_resnet, read_weights
from common.runs.cli import UserError

# names in the release's checkpoints, and ours
RELEASED_NAMES = {
    "fc_a.": "attention.projections.0.",
    "fc_b.": "attention.projections.1.",
    "fc_weight.": "attention.score.0.",
    "fc_classifier.": "classifier.",
}

PARTS = ("backbone.", "attention.", "classifier.", "mixed_classifier.")


class Outputs(NamedTuple):
    """What a training step needs of the global batch of N rows, M groups of K and C classes; float32."""

    mixed: Tensor  # [M, C] logits of the mixtures
    plain: Tensor  # [N, C] logits of the unmixed features
    weights: Tensor  # [M, K] mixing weights
    scores: Tensor | None  # [M, K] attention scores z (complement: [M, 1]); None where the weights are given


class AttentiveFeatureMixup(nn.Module):
    """Backbone, attention and classifier; the test uses the backbone and the classifier alone."""

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        num_classes: int,
        attention: GroupAttention | None,
        shared_classifier: bool = True,
    ):
        """backbone: images -> pooled features [B, width]. attention: None where the mixing weights are not learnt.

        shared_classifier: one classifier for mixed and plain features (release), else one for each (Figure 2).
        """
        super().__init__()
        self.backbone, self.attention = backbone, attention
        self.classifier = nn.Linear(width, num_classes)
        self.mixed_classifier = self.classifier if shared_classifier else nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, D], float32 whatever the autocast."""
        return self.backbone(images).float()

    def forward(
        self,
        images: Tensor,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | Outputs:
        """Evaluation: images -> plain logits [B, C]. Training, with groups: `Outputs` (README, section 4).

        images: [B, C, H, W], under torchrun this process's piece of a global batch of N. groups: int [M, K] rows of the
        global batch. weights: [M, K] mixing weights; None: the attention gives them. Attention, mixtures and
        classifiers are computed in float32.
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            if groups is None:
                return self.classifier(features)
            features = processes.gather_rows(features)
            members = features[groups]  # [M, K, D]
            scores = None
            if weights is None:
                scores = self.attention.scores(members)
                weights = mixing_weights(scores, self.attention.attention)
            mixed = self.mixed_classifier(mixed_features(members, weights))
            return Outputs(mixed, self.classifier(features), weights, scores)


def make_network(
    args: Namespace, num_classes: int, image_size: int, channels: int = 3
) -> AttentiveFeatureMixup:
    """Backbone, attention and classifiers as the flags ask for, with their initial weights."""
    backbone, width = make_backbone(args.network, image_size, channels, args.pretrained)
    attention = None
    if args.weights == "attentive" and args.weight_mixed > 0:
        attention = GroupAttention(
            width,
            args.group_size,
            interaction=args.interaction,
            attention=args.attention,
            attn_hidden=args.attn_hidden,
        )
    return AttentiveFeatureMixup(backbone, width, num_classes, attention, args.shared_classifier)


def make_backbone(
    name: str, image_size: int, channels: int = 3, pretrained: str = "none"
) -> tuple[nn.Module, int]:
    """A ResNet that ends in its pooled features, and their width D.

    name: resnet18 to resnet152, torchvision's for images of 64 pixels and more; below that with a 3x3 stem of stride 1
    and no max-pooling, as is usual on CIFAR; below 16 pixels a narrow one whatever the number. Or preact_resnet18, with
    that stem for images of any size and a narrow form of its own, which preact_narrow is at any size. pretrained: imagenet
    (torchvision's download) or none; a path is for `load_weights`. UserError: the weights cannot be fetched, or there are none.
    """
    if name in PREACT:
        if pretrained == "imagenet":
            raise UserError(f"--pretrained imagenet: there is none for --network {name}; use a path or none")
        return preact_resnet(channels, narrow=name == "preact_narrow" or image_size < 16)
    if image_size < 16:
        if pretrained == "imagenet":
            raise UserError("--pretrained imagenet: there is none for images below 16 pixels; use none")
        return narrow_resnet(channels), 64
    from torchvision import models  # noqa: PLC0415  (seconds of import that --help need not wait for)

    network: models.ResNet = imagenet_resnet(name) if pretrained == "imagenet" else models.get_model(name)
    width, network.fc = network.fc.in_features, nn.Identity()
    if image_size < 64:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network, width


def narrow_resnet(channels: int) -> nn.Sequential:
    """Three stages of one basic block each, 16, 32 and 64 wide, for images of 8 pixels: pooled features [B, 64]."""
    from torchvision.models.resnet import BasicBlock  # noqa: PLC0415

    layers = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    before = 16
    for width in (16, 32, 64):
        stride, skip = 1, None
        if width != before:
            stride = 2
            skip = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers.append(BasicBlock(before, width, stride, skip))
        before = width
    for layer in nn.Sequential(*layers).modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


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
    """Pre-activation ResNet for small images, up to its pooled features; no norm or activation after the last block.

    It keeps PyTorch's own initialisation, as it has in most work on noisy labels.
    """

    def __init__(self, channels: int, widths: Sequence[int], blocks_per_stage: int):
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

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> pooled features [B, D]."""
        return self.blocks(F.relu(self.stem_norm(self.stem(images)))).mean(dim=(2, 3))


def preact_resnet(channels: int, narrow: bool) -> tuple[PreActResNet, int]:
    """PreAct ResNet-18, or three narrow stages of one block each; and the width of its features."""
    widths, blocks_per_stage = ((16, 32, 64), 1) if narrow else ((64, 128, 256, 512), 2)
    return PreActResNet(channels, widths, blocks_per_stage), widths[-1]


def load_weights(network: AttentiveFeatureMixup, path: Path) -> list[str]:
    """Copy into the network what a file of weights has; the names of what stays as it was, for want of the same shape.

    The file: a model_best.pt of an earlier run, the release's model_best.pkl, or a torchvision ResNet, whose classifier is
    left. With one classifier, that of plain features is taken. UserError: no such file, nothing but tensors expected, or the
    weights of another backbone.
    """
    own = network.state_dict()
    if network.mixed_classifier is network.classifier:
        own = {name: value for name, value in own.items() if not name.startswith("mixed_classifier.")}
    found = {_own_name(name, own): value for name, value in read_weights(path, "--pretrained").items()}
    fitting = {name: value for name, value in found.items() if name in own and value.shape == own[name].shape}
    foreign = [name for name in found if name.startswith("backbone.") and name not in fitting]
    foreign = [name for name in foreign if not name.startswith("backbone.fc.")]
    if foreign or not any(name.startswith("backbone.") for name in fitting):
        which = (
            f"its {foreign[0].removeprefix('backbone.')} does not fit" if foreign else "no tensor in it fits"
        )
        raise UserError(f"--pretrained {path}: {which} the backbone; name the --network it is of")
    network.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def _own_name(name: str, own: dict[str, Tensor]) -> str:
    name = name.removeprefix("module.")
    for theirs, ours in RELEASED_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name in own or name.startswith(PARTS) else f"backbone.{name}"
