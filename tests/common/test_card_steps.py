"""One training step of each paper on a pretend card: all of it is on the card, and the host waits for nothing unasked.

Augmentation too: what it waits for, and how many operators it starts.

See pretend_card.py beside this file. A step is the second of two, so that what is made once (constants of policies, momentum)
is not counted. Networks are the narrow ones, images 8 pixels: kinds and places of operators do not depend on sizes.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import SGD

from afm.networks import make_network as afm_network
from afm.train import draw
from afm.train import parse_args as afm_args
from afm.training import train_epoch as afm_epoch
from common.gpu import augment, policies
from common.gpu.device import Device
from common.gpu.image_operations import to_device
from common.gpu.loader import Batches, Images
from common.pretraining import simclr
from manifold_dividemix import training as manifold
from manifold_dividemix.mixematch import Weights
from manifold_dividemix.networks import Network, make_encoder
from me_momentum.networks import SmallNet
from me_momentum.training import predict
from me_momentum.training import train_epoch as plain_epoch
from sanm import training as sanm
from sanm.masking import MaskRule, draw_masks, mask
from sanm.networks import make_network as sanm_network
from sanm.networks import make_simclr
from sanm.Train_cifar import six_as_samples
from sfa import training as sfa
from sfa.networks import preact_resnet_narrow
from tests.pretend_card import CardError, PretendCard, usable

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not usable(), reason="a card is there, or this torch has no CUDA in it")

CARD = Device(torch.device("cuda", 0), "bf16", "tests")
SIZE, CLASSES, COUNT = 8, 10, 16  # batches of 8: two steps
UPLOAD, DOWNLOAD = "copy to the card, blocking", "copy to the CPU"


@pytest.fixture
def card():
    with PretendCard(ROOT) as pretend:
        yield pretend


class Bench:
    """Images, labels and the like on the card, and batches that tell when the second of two steps begins and ends."""

    def __init__(self, card: PretendCard, channels: int = 1):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (COUNT, SIZE, SIZE, channels), dtype=np.uint8)
        self.card, self.channels = card, channels
        self.images = Images(pixels, (0.5,) * channels, (0.2,) * channels, CARD.device)
        self.labels = torch.from_numpy(rng.integers(0, CLASSES, COUNT)).to(CARD.device)
        self.clean = torch.from_numpy(rng.random(COUNT)).to(CARD.device)
        self.generator = CARD.generator(1)
        self.waits: Counter = Counter()  # of the second step
        self.kernels = 0

    def batches(self, augmentation=None, views: int = 1, watched: bool = True):
        made = Batches(
            self.images, 8, views=views, augmentation=augmentation, shuffle=True, generator=self.generator
        )
        return self.watched(made) if watched else made

    def watched(self, batches):
        """Two steps: of the second, what is waited for and how many operators start kernels."""
        source = iter(batches)
        yield next(source)
        waits, kernels = len(self.card.syncs), self.card.operators.total()
        yield next(source)
        found = self.card.syncs[waits:]
        self.waits = Counter((f"{s.place.rpartition(':')[0]}", s.reason) for s in found)
        self.kernels = self.card.operators.total() - kernels

    def permutation(self, rows: int):
        return torch.randperm(rows, generator=self.generator, device=CARD.device)

    def optimizer(self, network, fused: bool = False):
        return SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=fused or None)


CROP = partial(augment.random_crop, padding=1)


def crop(images, generator):
    return augment.random_crop(images, 1, generator)


def step_of_afm(b: Bench) -> None:
    args = afm_args(["--preset", "embedded/digits-sym0.5/afm-k3", "--group-rounds", "2"])
    network = CARD.prepare(afm_network(args, CLASSES, SIZE, b.channels))
    draws = partial(draw, args=args, mixing=True, generator=b.generator, rng=np.random.default_rng(0))
    done = afm_epoch(
        network, b.optimizer(network), b.batches(crop), b.labels, draws, loss_weights=(1.5, 0.5), device=CARD
    )
    assert np.isfinite(done.loss)


def step_of_sfa_warm_up(b: Bench) -> None:
    network = CARD.prepare(preact_resnet_narrow(CLASSES, b.channels))
    counts = torch.bincount(b.labels, minlength=CLASSES)
    losses = sfa.warm_up(network, b.optimizer(network), b.batches(crop), b.labels, counts, CARD)
    assert losses.isfinite().all()


def step_of_sfa(b: Bench) -> None:
    network, peer = (CARD.prepare(preact_resnet_narrow(CLASSES, b.channels)) for _ in range(2))
    losses = sfa.train_semi(
        network, peer, b.optimizer(network), b.batches(crop, views=2), b.batches(crop, 2, watched=False).endless(),
        labels=b.labels, clean=b.clean, class_counts=torch.bincount(b.labels, minlength=CLASSES),
        weight=lambda step: 1.0, draw_mix_weight=lambda: 0.7, draw_permutation=b.permutation, temperature=0.5, device=CARD,
    )  # fmt: skip
    assert losses.isfinite().all()
    features, confidence = sfa.features_and_confidence(network, Batches(b.images, 8), b.labels, CARD)
    assert features.dtype == confidence.dtype == torch.float32


def step_of_me_momentum(b: Bench) -> None:
    network = CARD.prepare(SmallNet(CLASSES, b.channels))
    CARD.replay(network, (8, b.channels, SIZE, SIZE))
    loss, _ = plain_epoch(network, b.optimizer(network, fused=True), b.batches(), b.labels, CARD)
    assert np.isfinite(loss) and b.card.notes["graph replayed"] == 2
    assert predict(network, Batches(b.images, 8), COUNT, CARD).device == CARD.device


def step_of_manifold_warm_up(b: Bench) -> None:
    network = CARD.prepare(_manifold_network(b)).train()
    kept = torch.ones(COUNT, dtype=torch.bool, device=CARD.device)
    manifold.warm_up(network, b.optimizer(network), b.batches(crop), b.labels, kept, CARD)


def _manifold_network(b: Bench) -> Network:
    encoder = make_encoder("resnet18", b.channels, SIZE)
    return Network(encoder, encoder.width, CLASSES)


def step_of_manifold(b: Bench) -> None:
    network = CARD.prepare(_manifold_network(b)).train()
    view = partial(policies.four_views, crop=crop)
    step = manifold.Step(
        lambda: 0.7, b.permutation, lambda n: 0.5, Weights(), 0.5, 0.9, "RL", "released", CARD
    )
    losses = manifold.train_divided(
        network, b.optimizer(network), b.batches(view), b.batches(view, watched=False).endless(), step,
        labels=b.labels, clean=b.clean,
    )  # fmt: skip
    assert losses.isfinite().all()


def step_of_sanm_warm_up(b: Bench) -> None:
    network = CARD.prepare(sanm_network("dividemix", CLASSES, b.channels, SIZE))
    view = partial(augment.warm_up_view, crop=crop)
    sanm.warm_up(
        network, b.optimizer(network), b.batches(view), b.labels, CARD, penalise_confidence=True, clip=1.0
    )


def step_of_sanm(b: Bench) -> None:
    network, peer = (CARD.prepare(sanm_network("dividemix", CLASSES, b.channels, SIZE)) for _ in range(2))
    view = partial(policies.six_views, crop=crop)
    step = sanm.Step(
        six_as_samples, sanm.Masks(draw_masks, mask, MaskRule(), b.generator), lambda: 0.7, b.permutation, lambda n: 1.0,
        0.5, 0.02, CARD,
    )  # fmt: skip
    losses = sanm.train_divided(
        network, peer, b.optimizer(network), b.batches(view), b.batches(view, watched=False).endless(), step,
        labels=b.labels, clean=b.clean,
    )  # fmt: skip
    assert losses.isfinite().all()


def step_of_simclr(b: Bench) -> None:
    network = CARD.prepare(make_simclr(b.channels, SIZE))
    batches = b.batches(partial(augment.simclr_view, flip=False), views=2)
    simclr.train_epoch(network, b.optimizer(network, fused=True), batches, lambda batch: 0.1, 0.5, CARD)


# what is waited for in a step: by file and reason, at most so many times
ALLOWED = {
    step_of_afm: {("afm/grouping.py", UPLOAD): 1},  # to go: torch.arange on the generator's device
    step_of_sfa_warm_up: {},
    step_of_sfa: {},
    step_of_me_momentum: {},
    step_of_manifold_warm_up: {},
    step_of_manifold: {},
    step_of_sanm_warm_up: {},
    step_of_sanm: {},
    step_of_simclr: {},
}


@pytest.mark.parametrize("step", ALLOWED, ids=lambda step: step.__name__.removeprefix("step_of_"))
def test_a_step_runs_on_a_card_and_waits_for_nothing_else(step, card):
    torch.manual_seed(0)
    bench = Bench(card)
    step(bench)
    assert bench.kernels > 10
    unasked = {key: count for key, count in bench.waits.items() if count > ALLOWED[step].get(key, 0)}
    assert not unasked, f"{unasked} of {bench.waits}"


@pytest.mark.parametrize(
    "step", [step_of_simclr, step_of_sanm_warm_up], ids=lambda s: s.__name__.removeprefix("step_of_")
)
def test_a_step_on_colour_images(step, card):
    step(Bench(card, channels=3))


def test_the_cpu_is_as_it_was():
    weight = torch.ones(3, requires_grad=True)
    for _ in range(2):
        (2 * weight).sum().backward()
        with PretendCard(ROOT):
            on_card = torch.ones(3, device="cuda", requires_grad=True)
            (3 * on_card).sum().backward()
            assert on_card.grad.tolist() == [3, 3, 3]
    assert weight.grad.tolist() == [4, 4, 4]
    assert not torch.cuda.is_available()


# augmentation -------------------------------------------------------------------------------------------------------------

# operators that start kernels in a call on 64 images of 32 x 32 in colour: the most with seeds 1 to 20
AUGMENTATION = {
    "auto_augment": (policies.auto_augment, 102),
    "rand_augment": (policies.rand_augment, 95),
    "six_views": (partial(policies.six_views, crop=augment.crop_and_flip), 112),
    "four_views": (partial(policies.four_views, crop=augment.crop_and_flip), 107),
    "simclr_view": (augment.simclr_view, 145),
    "warm_up_view": (partial(augment.warm_up_view, crop=augment.crop_and_flip), 126),
    "crop_and_flip": (augment.crop_and_flip, 3),
}


@pytest.mark.parametrize("name", AUGMENTATION)
def test_an_augmentation_waits_for_nothing_and_starts_few_operators(name, card):
    call, count = AUGMENTATION[name]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    images = torch.from_numpy(pixels).to(CARD.device)
    call(images, torch.Generator())  # makes tables
    before = card.operators.total()
    with card.no_syncs():
        views = call(images, torch.Generator().manual_seed(1))
    assert not [note for note in card.notes if "not pinned" in note]
    assert card.operators.total() - before <= 1.05 * count
    with torch.random.fork_rng(devices=[]):
        own = call(torch.from_numpy(pixels), torch.Generator().manual_seed(1))
    assert torch.equal(views.cpu(), own)


def test_tensors_of_all_types_get_to_a_card_in_one_copy_without_a_wait(card):
    tensors = [
        torch.tensor([True, False, True]), torch.rand(2, 3, dtype=torch.float64), torch.empty(0, dtype=torch.int64),
        torch.arange(10, dtype=torch.uint8)[::2], torch.rand(3, 1).T, torch.arange(4),
    ]  # fmt: skip
    before = card.operators.total()
    with card.no_syncs():
        sent = to_device(CARD.device, *tensors)
    assert card.operators.total() - before == 1
    for found, own in zip(sent, tensors, strict=True):
        assert found.device == CARD.device and found.dtype == own.dtype
        assert torch.equal(found.cpu(), own)
    assert to_device(torch.device("cpu"), *tensors) == tuple(tensors)


def test_a_pass_on_a_card_draws_from_a_generator_of_the_cpu_that_the_cards_own_seeds(card):
    bench = Bench(card)
    passes = [[index.tolist() for _, index in bench.batches(crop, watched=False)] for _ in range(2)]
    assert passes[0] != passes[1]
    bench.generator = CARD.generator(1)
    again = [[index.tolist() for _, index in bench.batches(crop, watched=False)] for _ in range(2)]
    assert again == passes


# planted faults -----------------------------------------------------------------------------------------------------------


def test_a_cpu_tensor_inside_a_step_is_an_error(card, monkeypatch):
    monkeypatch.setattr(
        sfa, "warm_up_loss", lambda s, a, given, counts, loss: (s * torch.ones(len(s), 1)).sum()
    )
    with pytest.raises(CardError, match=r"Expected all tensors to be on the same device.* cuda:0 and cpu"):
        step_of_sfa_warm_up(Bench(card))


def test_a_mask_on_the_wrong_device_is_an_error(card, monkeypatch):
    itself = torch.eye
    monkeypatch.setattr(
        torch, "eye", lambda n, device=None, **rest: itself(n, **rest)
    )  # the device is forgotten
    with pytest.raises(CardError, match="Expected all tensors to be on the same device"):
        step_of_simclr(Bench(card))


def test_a_generator_on_the_wrong_device_is_an_error(card):
    bench = Bench(card)
    bench.generator = torch.Generator().manual_seed(1)  # batches take it, a permutation on the card does not
    with pytest.raises(CardError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        step_of_sfa(bench)
    with pytest.raises(CardError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        augment.crop_and_flip(bench.images.pixels, CARD.generator(1))


def test_an_item_inside_a_step_is_seen_with_its_line(card, monkeypatch):
    original = sfa._step

    def step(optimizer, loss):
        original(optimizer, loss)
        float(loss.detach())

    monkeypatch.setattr(sfa, "_step", step)
    bench = Bench(card)
    step_of_sfa_warm_up(bench)
    assert bench.waits[("sfa/training.py", "item, float, int or bool of a tensor")] == 1


def test_bfloat16_features_into_a_float32_buffer_are_an_error(card, monkeypatch):
    """What `features[index], _, auxiliary = network(images)` does where the network leaves bfloat16."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    with pytest.raises(
        RuntimeError, match=r"Index put requires the source and destination dtypes match|dtype"
    ):
        step_of_sfa(Bench(card))


def test_numpy_of_a_tensor_on_the_card_is_an_error(card):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(2, device="cuda").numpy()
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        np.asarray(torch.ones(2, device="cuda"))
