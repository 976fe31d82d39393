"""Small networks in place of those for photographs, of images of 64 pixels."""

from torch import Tensor, nn

import afm.networks
from me_momentum import Clothing
from sanm import Train_clothing1M
from sanm.networks import MaskedNetwork
from sfa import learners
from sfa.networks import TwoHeads

make_backbone = afm.networks.make_backbone


def _encoder() -> list[nn.Module]:
    """16 maps of 7 x 7."""
    layers = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU()]
    return [*layers, nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]


class WebvisionNetwork(nn.Module):
    """In place of sfa's webvision_network: 16 features."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        assert name == "resnet18"
        self.layers, self.heads = nn.Sequential(*_encoder()), TwoHeads(16, num_classes)

    def forward(self, images: Tensor):
        return self.heads(self.layers(images).mean(dim=(2, 3)))


def masked_network(name: str, num_classes: int, pretrained: str) -> MaskedNetwork:
    """In place of sanm's clothing_network."""
    assert (name, pretrained) == ("resnet18", "none")
    decoder = nn.ConvTranspose2d(16, 3, 4, stride=4)
    return MaskedNetwork(nn.Sequential(*_encoder()), 16, num_classes, decoder)


def afm_backbone(name: str, image_size: int, channels: int, pretrained: str) -> tuple[nn.Module, int]:
    """In place of afm's make_backbone; the narrow network for digits is small enough."""
    if image_size < 64:
        return make_backbone(name, image_size, channels, pretrained)
    return nn.Sequential(*_encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 16


def clothing_network(num_classes: int, name: str, pretrained: str) -> nn.Module:
    """In place of me_momentum's clothing_network."""
    assert (name, pretrained) == ("resnet18", "none")
    return nn.Sequential(*_encoder(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


# script -> where its network is made, by which name, and the small one
SMALL = {
    "afm.train": (afm.networks, "make_backbone", afm_backbone),
    "sfa.Train_webvision": (learners, "webvision_network", WebvisionNetwork),
    "sanm.Train_clothing1M": (Train_clothing1M, "clothing_network", masked_network),
    "me_momentum.Clothing": (Clothing, "clothing_network", clothing_network),
}
