"""Passes over the data against plain loops: warm-up, training on a split, losses and scores by position."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.datasets import Data, Split
from common.gpu.device import Device
from common.gpu.loader import Batches
from sanm import mixmatch, pretrain
from sanm.choices import MaskRule
from sanm.masking import draw_masks, mask
from sanm.mixmatch import Samples
from sanm.networks import make_network
from sanm.training import Masks, Step, network_scores, sample_losses, train_divided, warm_up
from tests.passes import K, N, images, labels, pass_over, seeded

CPU, BF16 = (Device(torch.device("cpu"), precision, "tests") for precision in ("fp32", "bf16"))


def narrow(seed: int = 1, base: str = "c2d", softmax: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return make_network(base, K, 1, 8, softmax)


@pytest.mark.parametrize("penalise", [False, True])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_warm_up_adds_the_negative_entropy_and_clips_gradients_only_if_asked(clip, penalise):
    network, order = narrow(), torch.randperm(N, generator=seeded(5))
    before, ((batch,), index) = copy.deepcopy(network).train(), pass_over(order, N)[0]
    log_p = before(batch).scores.log_softmax(dim=1)
    expected = -log_p[range(N), labels()[order]].mean()
    if penalise:
        expected = expected + (log_p.exp() * log_p).sum(dim=1).mean()
    expected.backward()
    optimizer, options = SGD(network.parameters(), 1.0), {"penalise_confidence": penalise, "clip": clip}
    found = warm_up(network.eval(), optimizer, [((batch,), index)], labels(), CPU, **options)
    assert found.tolist() == pytest.approx([float(expected.detach())], rel=1e-5)
    trained = [name for name, parameter in before.named_parameters() if parameter.grad is not None]
    of = lambda part: torch.cat([part(name).flatten() for name in trained])  # noqa: E731
    gradient = of(lambda name: before.get_parameter(name).grad)
    moved = of(lambda name: before.get_parameter(name) - network.get_parameter(name))
    factor = 1 if clip is None else clip / gradient.norm()
    torch.testing.assert_close(moved, factor * gradient, rtol=1e-3, atol=1e-6)


def step_of(generator: torch.Generator, lams: list[float], **changes) -> Step:
    """A step that mixes by the given weights."""
    draws = iter(lams)
    step = Step(
        lambda views, clean: Samples(views[:4], views[4:], clean),
        masks=Masks(draw_masks, mask, MaskRule(), generator),
        draw_lam=lambda: next(draws),
        draw_permutation=lambda rows: torch.randperm(rows, generator=generator),
        weight=lambda number: 2.0 + number,
        temperature=0.5,
        reconstruction_weight=0.02,
        device=CPU,
    )
    return step._replace(**changes)


@pytest.mark.parametrize("masked", [True, False])
def test_an_epoch_on_a_split_is_that_of_a_plain_loop(masked):
    """Three labelled batches, the last smaller, and two unlabelled ones of which the first comes again."""
    labelled, unlabelled = pass_over(torch.arange(10), 4, 6), pass_over(torch.arange(10, 17), 5, 6)
    lams, clean = [0.2, 0.9, 0.6], torch.rand(N, generator=seeded(6), dtype=torch.float64)
    network, peer = narrow(1).eval(), narrow(2).train()
    twin, other = copy.deepcopy(network).train(), copy.deepcopy(peer).eval()
    optimizer, plain = (SGD(n.parameters(), 0.02, momentum=0.9, weight_decay=5e-4) for n in (network, twin))
    before, endless = copy.deepcopy(peer.state_dict()), [unlabelled[0], unlabelled[1], unlabelled[0]]
    step = step_of(seeded(7), lams, **({} if masked else {"masks": None}))
    found = train_divided(
        network, peer, optimizer, labelled, iter(endless), step, labels=labels(), clean=clean
    )
    assert found.shape == (3, 5)

    generator = seeded(7)

    def masks(originals, maps, quality, targets, sizes):
        draws = torch.cat([draw_masks(size, 1, MaskRule(), generator) for size in sizes])
        return mask(originals, maps, quality, targets, draws, MaskRule())

    for number, ((views_x, x), (views_u, u)) in enumerate(zip(labelled, endless, strict=True)):
        loss = mixmatch.step_loss(
            twin,
            other,
            Samples(views_x[:4], views_x[4:], clean[x]),
            Samples(views_u[:4], views_u[4:], clean[u]),
            labels()[x],
            masks=masks if masked else None,
            weight=2.0 + number,
            reconstruction_weight=0.02,
            draw_lam=lambda lam=lams[number]: lam,
            draw_permutation=lambda rows: torch.randperm(rows, generator=generator),
            temperature=0.5,
        )
        plain.zero_grad()
        loss.total.backward()
        plain.step()
        expected = [float(part.detach()) for part in loss]
        assert found[number].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-7)
    # the peer is only asked: in evaluation mode, and it stays as it is
    assert not peer.training and network.training
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())


def test_last_batches_of_one_image_train():
    network, peer, (x, u) = narrow(1), narrow(2), [pass_over(torch.arange(n, n + 1), 1, 6) for n in (0, 1)]
    optimizer, clean = SGD(network.parameters(), 0.02), torch.full((N,), 0.5)
    step = step_of(seeded(0), [0.5])
    found = train_divided(network, peer, optimizer, x, iter(u), step, labels=labels(), clean=clean)
    assert found.shape == (1, 5) and torch.isfinite(found).all()


def test_under_bfloat16_every_weight_learns_as_in_float32():
    """The predictions without gradients come first, in the same autocast: their casts must not serve the mixed batch."""
    gradients, clean = {}, torch.linspace(0, 1, N)
    for device in (CPU, BF16):
        network, peer = narrow(1), narrow(2)
        x, u = (pass_over(torch.arange(start, start + 16), 16, 6) for start in (0, 10))
        optimizer, step = SGD(network.parameters(), 0.0), step_of(seeded(7), [0.3], device=device)
        train_divided(network, peer, optimizer, x, iter(u), step, labels=labels(), clean=clean)
        gradients[device] = {name: p.grad for name, p in network.named_parameters()}
    for name, gradient in gradients[CPU].items():
        assert gradients[BF16][name] is not None, name
        cosine = F.cosine_similarity(gradients[BF16][name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.9, name


def plain_scores(network: nn.Module) -> Tensor:
    """Of all images at once, in evaluation mode."""
    with torch.no_grad():
        return copy.deepcopy(network).eval()(images().view(torch.arange(N))).scores


@pytest.mark.parametrize("size", [5, 64])
def test_losses_and_scores_come_by_position_whatever_the_order_of_the_batches(size):
    nets = [narrow(1), narrow(2, "dividemix")]
    expected = torch.stack([plain_scores(network) for network in nets])
    before = copy.deepcopy(nets[0].state_dict())
    batches = pass_over(torch.randperm(N, generator=seeded(3)), size)
    for network in nets:
        network.train()
    found = network_scores(nets, batches, N, K, CPU)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    losses = F.cross_entropy(expected[0], labels(), reduction="none")
    for passed in (batches, Batches(images(), 7)):
        nets[0].train()
        found = sample_losses(nets[0], passed, labels(), N, CPU)
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
        assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in nets[0].state_dict().items())


def test_losses_and_scores_are_float32_under_bfloat16():
    network = narrow()
    with torch.no_grad():
        network.classifier.weight.mul_(20)
    found = sample_losses(network, pass_over(torch.arange(N), 8), labels(), N, BF16)
    assert found.dtype == torch.float32
    # not rounded to bfloat16 anywhere after the encoder
    assert (found.bfloat16().float() != found).sum() > N // 2
    exact = F.cross_entropy(plain_scores(network), labels(), reduction="none")
    assert (found - exact).abs().max() < 0.05 * exact.max()
    scores = network_scores([network], pass_over(torch.arange(N), 8), N, K, BF16)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "channels", "mean"),
    [("cifar100", 3, 0.5071), ("cifar100", 1, 0.2), ("cifar10", 3, 0.2), ("digits", 1, 0.2)],
)
def test_in_pre_training_only_cifar100_has_constants_of_its_own(name, channels, mean):
    split = Split(np.zeros((1, 8, 8, channels), np.uint8), np.zeros(1, np.int64))
    data = Data(name, split, split, 10, (0.2,) * channels, (0.3,) * channels)
    assert pretrain.normalisation(data)[0][0] == mean
