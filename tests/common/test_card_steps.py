"""A training step of each paper on a pretend card: all of it is on the card, and the host waits for nothing that is not listed.

Augmentation too: what it waits for, and how many operators it starts. And `make check-gpu` on the pretend card.

See tests/pretend_card.py. A step is the second of two, so that what is made once (constants of policies, momentum)
is not counted. Networks are the narrow ones, images 8 pixels: kinds and places of operators do not depend on sizes.
"""

import csv
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.io import decode_jpeg

from benchmarks.launches import launches
from common.gpu import augment, policies
from common.gpu import device as gpu
from common.gpu.device import Device
from common.gpu.image_operations import to_device
from sfa import losses as sfa_losses
from sfa import training as sfa
from tests import card_steps, check_gpu
from tests.card_steps import STEPS, Bench
from tests.pretend_card import CardError, PretendCard, usable

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not usable(), reason="a card is there, or this torch has no CUDA in it"),
    pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
]
CARD = Device(torch.device("cuda", 0), "bf16", "tests")
EXACT = CARD._replace(precision="fp32")
CPU = Device(torch.device("cpu"), "fp32", "tests")
COUNTED = ROOT / "benchmarks" / "reference" / "speed" / "launches.csv"


@pytest.fixture
def card():
    with PretendCard(ROOT) as pretend:
        yield pretend


def waits(card: PretendCard, step) -> Counter:
    """What the second of two steps waits for: the first makes tables and momentum."""
    marks: list[int] = []
    step(Bench(CARD, 8, 3, watch=lambda: marks.append(len(card.syncs))))
    return Counter((s.place.rpartition(":")[0], s.reason) for s in card.syncs[slice(*marks)])


@pytest.mark.slow
def test_no_step_waits_for_the_card_or_starts_more_operators_than_counted():
    with COUNTED.open(newline="", encoding="utf-8") as file:
        counted = {row["step"]: int(row["operators"]) for row in csv.DictReader(file)}
    found = {row["step"]: (row["operators"], row["waits"]) for row in launches(Namespace())}
    assert found.keys() == counted.keys()
    for name, (operators, waits) in found.items():
        assert waits == 0, name
        assert 0.8 * counted[name] <= operators <= 1.05 * counted[name], name


@pytest.mark.parametrize("name", STEPS)
def test_networks_see_float32_channels_last_images_on_a_card(name, card):
    found = set()

    def look(module, arguments):
        images = arguments[0]
        if isinstance(module, torch.nn.Conv2d) and images.shape[1] == 3:
            found.add((images.dtype, images.is_contiguous(memory_format=torch.channels_last)))

    handle = register_module_forward_pre_hook(look)
    waited = waits(card, STEPS[name])
    handle.remove()
    assert found == {(torch.float32, True)}
    assert {place for place, _ in waited} <= {"common/gpu/image_operations.py"}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_the_same_losses_on_a_card(name, card):
    torch.testing.assert_close(STEPS[name](Bench(EXACT)), STEPS[name](Bench(CPU)), rtol=1e-4, atol=1e-6)


@pytest.fixture
def card_without_float64(monkeypatch):
    """A card as MPS: without float64, and with nothing of CUDA's own."""
    monkeypatch.setattr(gpu, "has_float64", lambda device: device.type == "cpu")
    monkeypatch.setattr(Device, "on_cuda", lambda self: False)
    with PretendCard(ROOT, float64=False) as pretend:
        yield pretend


@pytest.mark.parametrize("name", ["AFM", "SFA", "Me-Momentum", "Manifold DivideMix", "SANM"])
def test_a_step_makes_no_float64_on_a_card_without_it(name, card_without_float64):
    torch.testing.assert_close(STEPS[name](Bench(EXACT)), STEPS[name](Bench(CPU)), rtol=1e-4, atol=1e-6)
    assert card_without_float64.operators


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
    tensors = [torch.tensor([True, False, True]), torch.rand(2, 3, dtype=torch.float64), torch.arange(4)]
    tensors += [torch.empty(0, dtype=torch.int64), torch.arange(10, dtype=torch.uint8)[::2]]
    tensors += [torch.rand(3, 1).T]
    before = card.operators.total()
    with card.no_syncs():
        sent = to_device(CARD.device, *tensors)
    assert card.operators.total() - before == 1
    for found, own in zip(sent, tensors, strict=True):
        assert (found.device, found.dtype) == (CARD.device, own.dtype)
        assert torch.equal(found.cpu(), own)
    assert to_device(torch.device("cpu"), *tensors) == tuple(tensors)


def test_a_pass_on_a_card_draws_from_a_generator_of_the_cpu_that_the_cards_own_seeds(card):
    bench = Bench(CARD)

    def two_passes():
        bench.generator = CARD.generator(1)
        return [[index.tolist() for _, index in bench.batches(bench.crop)] for _ in range(2)]

    passes = two_passes()
    assert passes[0] != passes[1] and two_passes() == passes


# planted faults -----------------------------------------------------------------------------------------------------------


def test_float64_on_a_card_without_it_is_an_error(card_without_float64, monkeypatch):
    monkeypatch.setattr(gpu, "home", lambda device: device)  # images and their augmentation are on the card
    with pytest.raises(CardError, match="this card has no float64, at common/gpu/image_operations"):
        card_steps.of_simclr(Bench(CARD))


def test_a_cpu_tensor_inside_a_step_is_an_error(card, monkeypatch):
    line = r"Expected all tensors to be on the same device.* cuda:0 and cpu"
    monkeypatch.setattr(sfa, "warm_up_loss", lambda standard, *_: (standard * torch.ones(1)[:, None]).sum())
    with pytest.raises(CardError, match=line):
        card_steps.of_sfa_warm_up(Bench(CARD))
    monkeypatch.setattr(torch, "eye", lambda n, device, eye=torch.eye, **rest: eye(n, **rest))
    with pytest.raises(CardError, match=line):
        card_steps.of_simclr(Bench(CARD))


def test_a_generator_on_the_wrong_device_is_an_error(card):
    bench = Bench(CARD)
    with pytest.raises(CardError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randperm(4, generator=bench.generator, device=CARD.device)
    with pytest.raises(CardError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        augment.crop_and_flip(bench.images.pixels, CARD.generator(1))


def test_an_item_inside_a_step_is_seen_with_its_line(card, monkeypatch):
    original = sfa._step

    def step(optimizer, loss):
        original(optimizer, loss)
        float(loss.detach())

    monkeypatch.setattr(sfa, "_step", step)
    waited = waits(card, card_steps.of_sfa_warm_up)
    assert waited[("sfa/training.py", "item, float, int or bool of a tensor")] == 1


def test_bfloat16_features_into_a_float32_buffer_are_an_error(card, monkeypatch):
    """What `features[index], _, auxiliary = network(images)` does where the network leaves bfloat16."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    with pytest.raises(RuntimeError, match="dtype"):
        card_steps.of_sfa(Bench(CARD))


@pytest.mark.parametrize("convert", [lambda tensor: tensor.numpy(), np.asarray], ids=["numpy", "asarray"])
def test_numpy_of_a_tensor_on_the_card_is_an_error(card, convert):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        convert(torch.ones(2, device="cuda"))


# `make check-gpu` -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_that_agrees_is_ok(card):
    checks = [*check_gpu.steps(CARD, 8, 8), *check_gpu.views(CARD, 4)]
    checks += [check for check in check_gpu.recorded(CARD, 8, 8) if check.check != "--compile"]
    assert [check for check in checks if check.status != "ok"] == []
    assert len(checks) == 2 * 9 + 5 + len(check_gpu.RECORDED)
    rows = list(csv.DictReader(check_gpu.to_csv(checks, "pretended").decode().splitlines()))
    assert [row["what"] for row in rows] == [check.what for check in checks]
    assert {row["device"] for row in rows} == {"pretended"}


def test_a_wrong_view_differs(card, monkeypatch):
    def wrong(images, generator):
        return augment.crop_and_flip(images, generator).bitwise_xor(int(images.is_cuda))

    monkeypatch.setattr(check_gpu, "VIEWS", {"wrong": wrong})
    [check] = check_gpu.views(CARD, 4)
    assert (check.status, check.what) == ("differs", "wrong") and "12288 of 12288" in check.detail


def test_files_decoded_on_the_card_are_compared_with_the_cpus(card, monkeypatch, tmp_path):
    usual = decode_jpeg
    for more, status in ((0, "ok"), (5, "differs")):

        def as_nvjpeg(files, mode, device, more=more):
            return [usual(file, mode=mode).add(more).to(device) for file in files]

        monkeypatch.setattr("torchvision.io.decode_jpeg", as_nvjpeg)
        [check] = check_gpu.decoded(CARD, tmp_path / status)
        assert (check.status, check.what) == (status, "--decode gpu"), check.detail


def test_a_step_that_fails_does_not_hide_the_others(card, monkeypatch):
    steps = {name: check_gpu.STEPS[name] for name in ("SFA warm-up", "Me-Momentum")}
    monkeypatch.setattr(check_gpu, "STEPS", steps)
    usual = sfa_losses.warm_up_loss

    def mixed_up(standard, *rest):
        return usual(standard, *rest) + (standard.sum() * torch.ones(1) if standard.is_cuda else 0)

    monkeypatch.setattr("sfa.training.warm_up_loss", mixed_up)
    checks = list(check_gpu.steps(CARD, 8, 8))
    expected = [("SFA warm-up", "failed")] * 2 + [("Me-Momentum", "ok")] * 2
    assert [(check.what, check.status) for check in checks] == expected
    assert "Expected all tensors to be on the same device" in checks[0].detail


@pytest.mark.parametrize(
    ("found", "status"), [([1.0, 2.0], "ok"), ([1.0, 2.1], "differs"), ([1.0, float("nan")], "differs")]
)
def test_losses_are_compared_to_a_tolerance(found, status):
    assert check_gpu.compared("a", "b", torch.tensor(found), torch.tensor([1.0, 2.0]), 1e-3).status == status


def test_without_a_card_it_is_one_line(capsys):
    with pytest.raises(check_gpu.UserError, match="no CUDA device is here"):
        check_gpu.main([])
