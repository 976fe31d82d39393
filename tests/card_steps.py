"""Training steps of every paper on small random images, on any device: for the pretend card, the counts, and `check_gpu`.

A step function takes a `Bench`, trains for one pass and returns its losses, float32 [n] on the CPU. All draws come from CPU
generators, so that passes on two devices have the same draws.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from afm import training as afm
from afm.networks import make_network as afm_network
from afm.train import groups_of_batch
from afm.train import parse_args as afm_args
from common.gpu import augment, policies
from common.gpu import device as gpu
from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from common.pretraining import simclr
from manifold_dividemix import training as manifold
from manifold_dividemix.choices import Lambdas
from manifold_dividemix.networks import Network, make_encoder
from me_momentum import networks as me_momentum_networks
from me_momentum import training as me_momentum
from sanm import training as sanm
from sanm.choices import MaskRule
from sanm.masking import draw_masks, mask
from sanm.networks import make_network as sanm_network
from sanm.networks import make_simclr
from sanm.Train_cifar import six_as_samples
from sfa import training as sfa
from sfa.networks import preact_resnet18, preact_resnet_narrow

CLASSES = 10


class Bench:
    """Images [2 batch, C, size, size], labels and clean probabilities on a device; below 16 pixels networks are narrow.

    watch: called after each of the two steps of a pass; what lies between is a step with its augmentation.
    """

    def __init__(self, device: Device, size=8, channels=1, batch=8, watch: Callable[[], None] = lambda: None):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (2 * batch, size, size, channels), dtype=np.uint8)
        self.device, self.size, self.channels, self.batch, self.watch = device, size, channels, batch, watch
        self.images = Images(pixels, (0.5,) * channels, (0.2,) * channels, device.device)
        self.labels = torch.from_numpy(rng.integers(0, CLASSES, 2 * batch)).to(device.device)
        self.clean = gpu.put(torch.from_numpy(rng.random(2 * batch)), device.device)
        self.generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)  # of initial weights

    def batches(self, augmentation=None, views: int = 1) -> Iterator:
        """One pass of two batches."""
        options = {"views": views, "augmentation": augmentation, "shuffle": True}
        batches = iter(Batches(self.images, self.batch, generator=self.generator, **options))
        for _ in range(2):
            yield next(batches)
            self.watch()

    def unlabelled(self, augmentation, views: int = 1) -> Iterable:
        """Endless batches, not watched."""
        options = {"views": views, "augmentation": augmentation, "shuffle": True}
        generator = torch.Generator().manual_seed(2)
        return Batches(self.images, self.batch, generator=generator, **options).endless()

    def permutation(self, rows: int) -> Tensor:
        """Partners of a mixture, on the device."""
        return self.on_device(torch.randperm(rows, generator=self.generator))

    def on_device(self, drawn: Tensor) -> Tensor:
        """What was drawn on the CPU, without a wait for the card."""
        if self.device.on_cuda():
            drawn = drawn.pin_memory()
        return drawn.to(self.device.device, non_blocking=True)

    def at_home(self, drawn: Tensor) -> Tensor:
        """What was drawn on the CPU, where float64 is computed."""
        return self.on_device(drawn) if gpu.has_float64(self.device.device) else drawn

    def crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crop and flip at the images' size."""
        return augment.crop_and_flip(images, generator, max(self.size // 8, 1))

    def network(self, made: nn.Module) -> tuple[nn.Module, SGD]:
        """A network on the device and its optimiser."""
        network, fused = self.device.prepare(made), self.device.on_cuda() or None
        return network, SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=fused)


def of_afm(b: Bench) -> Tensor:
    """AFM: groups, attention, mixture."""
    args = afm_args(["--preset", "embedded/digits-sym0.5/afm-k2", "--network", "resnet18"])
    network, optimizer = b.network(afm_network(args, CLASSES, b.size, b.channels))
    rng = np.random.default_rng(0)

    def grouping(rows: int) -> tuple[Tensor, Tensor | None]:
        groups, weights = groups_of_batch(rows, args, True, b.generator, rng)
        return b.on_device(groups), weights

    done = afm.train_epoch(
        network, optimizer, b.batches(b.crop), b.labels, grouping, loss_weights=(1.5, 0.5), device=b.device
    )
    return torch.tensor([done.loss, done.mixed_loss, done.plain_loss])


def _sfa_network(b: Bench) -> nn.Module:
    return (preact_resnet_narrow if b.size < 16 else preact_resnet18)(CLASSES, b.channels)


def of_sfa_warm_up(b: Bench) -> Tensor:
    """SFA and the cross-entropy beside it: both heads on the observed labels."""
    network, optimizer = b.network(_sfa_network(b))
    counts = torch.bincount(b.labels, minlength=CLASSES)
    return sfa.warm_up(network, optimizer, b.batches(b.crop), b.labels, counts, b.device).cpu()


def of_sfa(b: Bench) -> Tensor:
    """SFA: MixMatch on the split, then features for the selection."""
    network, optimizer = b.network(_sfa_network(b))
    peer, _ = b.network(_sfa_network(b))
    losses = sfa.train_semi(
        network,
        peer,
        optimizer,
        b.batches(b.crop, views=2),
        b.unlabelled(b.crop, 2),
        labels=b.labels,
        clean=b.clean,
        class_counts=torch.bincount(b.labels, minlength=CLASSES),
        weight=lambda step: 1.0,
        draw_lam=lambda: 0.7,
        draw_permutation=b.permutation,
        temperature=0.5,
        device=b.device,
    )
    features, confidence = sfa.features_and_confidence(
        network, Batches(b.images, b.batch), b.labels, b.device
    )
    assert features.dtype == confidence.dtype == torch.float32
    return torch.cat([losses.cpu().flatten(), confidence.cpu()])


def of_me_momentum(b: Bench) -> Tensor:
    """Me-Momentum: cross-entropy on extracted samples, then predictions."""
    name = "small" if b.size < 16 else "resnet18"
    network, optimizer = b.network(me_momentum_networks.make_network(name, CLASSES, b.channels, b.size))
    loss, accuracy = me_momentum.train_epoch(network, optimizer, b.batches(b.crop), b.labels, b.device)
    predicted = me_momentum.predict(network, Batches(b.images, b.batch), 2 * b.batch, b.device)
    assert predicted.device == b.device.device
    return torch.tensor([loss, accuracy])


def _manifold_network(b: Bench) -> tuple[nn.Module, SGD]:
    encoder = make_encoder("resnet18", b.channels, b.size)
    network, optimizer = b.network(Network(encoder, encoder.width, CLASSES))
    return network.train(), optimizer


def of_manifold_warm_up(b: Bench) -> Tensor:
    """Manifold DivideMix: warm-up on the samples that are kept."""
    network, optimizer = _manifold_network(b)
    kept = torch.ones(2 * b.batch, dtype=torch.bool, device=b.device.device)
    return manifold.warm_up(network, optimizer, b.batches(b.crop), b.labels, kept, b.device).cpu()


def of_manifold(b: Bench) -> Tensor:
    """Manifold DivideMix: MixEMatch."""
    network, optimizer = _manifold_network(b)
    views = partial(policies.four_views, crop=b.crop)
    step = manifold.Step(
        lambda: 0.7, b.permutation, lambda n: 0.5, Lambdas(), 0.5, 0.9, "RL", "released", b.device
    )
    return manifold.train_divided(
        network, optimizer, b.batches(views), b.unlabelled(views), step, labels=b.labels, clean=b.clean
    ).cpu()


def of_sanm_warm_up(b: Bench) -> Tensor:
    """SANM: warm-up with the confidence penalty."""
    network, optimizer = b.network(sanm_network("dividemix", CLASSES, b.channels, b.size))
    batches = b.batches(partial(augment.warm_up_view, crop=b.crop))
    return sanm.warm_up(
        network, optimizer, batches, b.labels, b.device, penalise_confidence=True, clip=1.0
    ).cpu()


def of_sanm(b: Bench) -> Tensor:
    """SANM: masks, modulated labels, reconstruction, on DivideMix."""
    network, optimizer = b.network(sanm_network("dividemix", CLASSES, b.channels, b.size))
    peer, _ = b.network(sanm_network("dividemix", CLASSES, b.channels, b.size))
    views = partial(policies.six_views, crop=b.crop)
    masks = sanm.Masks(lambda *drawn: b.at_home(draw_masks(*drawn)), mask, MaskRule(), b.generator)
    step = sanm.Step(six_as_samples, masks, lambda: 0.7, b.permutation, lambda n: 1.0, 0.5, 0.02, b.device)
    return sanm.train_divided(
        network, peer, optimizer, b.batches(views), b.unlabelled(views), step, labels=b.labels, clean=b.clean
    ).cpu()


def of_simclr(b: Bench) -> Tensor:
    """SimCLR pre-training of SANM and Manifold DivideMix."""
    network, optimizer = b.network(make_simclr(b.channels, b.size))
    batches = b.batches(partial(augment.simclr_view, flip=False), views=2)
    loss = simclr.train_epoch(network, optimizer, batches, lambda batch: 0.1, 0.5, b.device)
    return torch.tensor([loss])


STEPS = {
    "AFM": of_afm,
    "SFA warm-up": of_sfa_warm_up,
    "SFA": of_sfa,
    "Me-Momentum": of_me_momentum,
    "Manifold DivideMix warm-up": of_manifold_warm_up,
    "Manifold DivideMix": of_manifold,
    "SANM warm-up": of_sanm_warm_up,
    "SANM": of_sanm,
    "SimCLR": of_simclr,
}
