"""Passes over the data against plain loops: warm-up and its clipping, training on a split, losses and scores by position."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from sanm import mixmatch
from sanm.masking import MaskRule, draw_masks, mask
from sanm.mixmatch import Samples
from sanm.networks import Outputs, make_network
from sanm.training import (
    Masks,
    Step,
    accuracy,
    learning_rate,
    network_scores,
    sample_losses,
    train_divided,
    warm_up,
)

CPU, BF16 = (Device(torch.device("cpu"), precision, "tests") for precision in ("fp32", "bf16"))
K, N = 4, 26


def narrow(seed: int = 1, base: str = "c2d", softmax: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return make_network(base, K, 1, 8, softmax)


class Small(nn.Module):
    """A network that can be in float64, where rounding does not grow: convolution, batch norm, ReLU, mean, classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, K)
        self.double()

    def forward(self, batch: Tensor) -> Outputs:
        maps = self.encoder(batch)
        return Outputs(maps, self.classifier(maps.mean(dim=(2, 3))), None)


def images() -> Images:
    pixels = torch.randint(256, (N, 8, 8, 1), generator=torch.Generator().manual_seed(2)).byte()
    return Images(pixels.numpy(), (0.5,), (0.25,), torch.device("cpu"))


def labels() -> Tensor:
    return torch.randint(K, (N,), generator=torch.Generator().manual_seed(9))


def pass_over(views: int, order: Tensor, size: int, dtype: torch.dtype = torch.float32) -> list:
    """Batches (views, index) in an order; of several views each is another image."""
    return [
        (tuple(images().view((index + k) % N).to(dtype) for k in range(views)), index)
        for index in order.split(size)
    ]


@torch.no_grad()
def changed(network: nn.Module, before: list[Tensor]) -> float:
    """The norm of what a step added to the weights."""
    return float(
        sum((p - b).square().sum() for p, b in zip(network.parameters(), before, strict=True)).sqrt()
    )


# schedule and warm-up ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_drops_once_to_a_tenth():
    assert [learning_rate(epoch, 0.02, 3) for epoch in range(6)] == pytest.approx([0.02] * 3 + [0.002] * 3)


@pytest.mark.parametrize("penalise", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_epoch_of_warm_up_is_that_of_a_plain_loop(clip, penalise):
    """Two passes, of which the second goes on with the momentum of the first; the last batch has two rows."""
    network = Small().eval()
    twin, order = copy.deepcopy(network), torch.randperm(N, generator=torch.Generator().manual_seed(5))
    optimizer, plain = (SGD(n.parameters(), 0.02, momentum=0.9, weight_decay=5e-4) for n in (network, twin))
    batches = pass_over(1, order, 8, torch.float64)
    for _ in range(2):
        found = warm_up(network, optimizer, batches, labels(), CPU, penalise_confidence=penalise, clip=clip)
        expected = []
        twin.train()
        for (batch,), index in batches:
            log_p = twin(batch).scores.log_softmax(dim=1)
            loss = -log_p[range(len(index)), labels()[index]].mean()
            if penalise:
                loss = loss + (log_p.exp() * log_p).sum(dim=1).mean()
            plain.zero_grad()
            loss.backward()
            if clip is not None:
                norm = sum(p.grad.square().sum() for p in twin.parameters()).sqrt()
                for p in twin.parameters():
                    p.grad *= min(1, clip / float(norm))
            plain.step()
            expected.append(float(loss.detach()))
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
    for (name, own), wanted in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        # clip_grad_norm_ divides by the norm and a millionth
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_a_large_gradient_is_cut_to_the_norm_asked_for_and_a_small_one_left_alone():
    steps = {}
    for clip in (None, 1e-3, 1e3):
        network = narrow()
        with torch.no_grad():
            network.classifier.weight.mul_(100)
        before = [p.clone() for p in network.parameters()]
        batches = pass_over(1, torch.arange(8), 8)
        warm_up(
            network,
            SGD(network.parameters(), 1.0),
            batches,
            labels(),
            CPU,
            penalise_confidence=False,
            clip=clip,
        )
        steps[clip] = changed(network, before)
    assert steps[None] > 1
    assert steps[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert steps[1e3] == pytest.approx(steps[None], rel=1e-5)


# training on a split ----------------------------------------------------------------------------------------------------


def step_of(generator: torch.Generator, shares: list[float], rows: list[int], **changes) -> Step:
    """A step that mixes by the given shares, and notes the numbers of rows that permutations are drawn for."""
    draws = iter(shares)

    def permutation(count: int) -> Tensor:
        rows.append(count)
        return torch.randperm(count, generator=generator)

    step = Step(
        lambda views, clean: Samples(views[:4], views[4:], clean),
        masks=Masks(draw_masks, mask, MaskRule(), generator),
        draw_share=lambda: next(draws),
        draw_permutation=permutation,
        weight=lambda number: 2.0 + number,
        temperature=0.5,
        reconstruction_weight=0.02,
        device=CPU,
    )
    return step._replace(**changes)


@pytest.mark.parametrize("masks", [True, False])
def test_an_epoch_on_a_split_is_that_of_a_plain_loop(masks):
    """Three labelled batches, the last smaller, and two unlabelled ones of which the first comes again."""
    labelled, unlabelled = pass_over(6, torch.arange(10), 4), pass_over(6, torch.arange(10, 17), 5)
    shares, weights = (
        [0.2, 0.9, 0.6],
        torch.rand(N, generator=torch.Generator().manual_seed(6), dtype=torch.float64),
    )
    network, peer = narrow(1).eval(), narrow(2).train()
    twin, other = copy.deepcopy(network), copy.deepcopy(peer).eval()
    optimizer, plain = (SGD(n.parameters(), 0.02, momentum=0.9, weight_decay=5e-4) for n in (network, twin))
    before, rows = copy.deepcopy(peer.state_dict()), []
    endless = iter([unlabelled[0], unlabelled[1], unlabelled[0]])
    step = step_of(torch.Generator().manual_seed(7), shares, rows, **({} if masks else {"masks": None}))
    found = train_divided(network, peer, optimizer, labelled, endless, step, labels=labels(), clean=weights)
    assert found.shape == (3, 5)
    versions = 6 if masks else 4
    assert rows == [versions * 9, versions * 6, versions * 7]

    generator = torch.Generator().manual_seed(7)
    twin.train()
    for number, ((views_x, x), (views_u, u)) in enumerate(
        zip(labelled, [*unlabelled, unlabelled[0]], strict=True)
    ):
        guessed = mixmatch.guess_labels(twin, other, views_u[4:], 0.5)
        refined = mixmatch.refine_labels(twin, views_x[4:], labels()[x], weights[x], 0.5)
        targets, originals = (
            torch.cat([refined.targets, guessed.targets]),
            torch.cat([views_x[4], views_u[4]]),
        )
        masked = None
        if masks:
            draws = torch.cat([draw_masks(len(of), 1, MaskRule(), generator) for of in (x, u)])
            maps, quality = torch.cat([refined.maps, guessed.maps]), torch.cat([weights[x], weights[u]])
            masked = mask(originals, maps, quality, targets, draws, MaskRule())
        sides = [Samples(v[:4], v[4:], weights[of]) for v, of in ((views_x, x), (views_u, u))]
        stack = mixmatch.stack(*sides, targets, masked)
        permutation = torch.randperm(versions * len(targets), generator=generator)
        mixture = mixmatch.mix(stack, shares[number], permutation)
        loss = mixmatch.step_loss(
            twin, mixture, originals, masked, weight=2.0 + number, reconstruction_weight=0.02
        )
        plain.zero_grad()
        loss.total.backward()
        plain.step()
        assert found[number].tolist() == pytest.approx(
            [float(part.detach()) for part in loss], rel=1e-5, abs=1e-7
        )
        total, loss_x, loss_u, prior, rec = found[number].tolist()
        assert total == pytest.approx(loss_x + (2 + number) * loss_u + prior + 0.02 * rec, rel=1e-5)
    for (name, own), wanted in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-7, msg=name)
    # the peer is only asked: in evaluation mode, and it stays as it is
    assert not peer.training and network.training
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())


def test_last_batches_of_one_image_train():
    network, peer, one = narrow(1), narrow(2), [pass_over(6, torch.arange(n, n + 1), 1) for n in (0, 1)]
    found = train_divided(
        network, peer, SGD(network.parameters(), 0.02), one[0], iter(one[1]),
        step_of(torch.Generator().manual_seed(0), [0.5], []), labels=labels(), clean=torch.full((N,), 0.5),
    )  # fmt: skip
    assert found.shape == (1, 5) and torch.isfinite(found).all()


def test_under_bfloat16_every_weight_learns_as_in_float32():
    """The predictions without gradients come first, in the same autocast: their casts must not serve the mixed batch."""
    gradients = {}
    for device in (CPU, BF16):
        network, peer = narrow(1), narrow(2)
        batch = pass_over(6, torch.arange(16), 16)
        step = step_of(torch.Generator().manual_seed(7), [0.3], [], device=device)
        train_divided(
            network, peer, SGD(network.parameters(), 0.0), batch, iter(pass_over(6, torch.arange(10, 26), 16)), step,
            labels=labels(), clean=torch.linspace(0, 1, N),
        )  # fmt: skip
        gradients[device] = {name: p.grad for name, p in network.named_parameters()}
    for name, gradient in gradients[CPU].items():
        assert gradients[BF16][name] is not None, name
        cosine = F.cosine_similarity(gradients[BF16][name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.9, name


# losses and scores of all samples ---------------------------------------------------------------------------------------


def plain_scores(network: nn.Module) -> Tensor:
    """Of all images at once, in evaluation mode."""
    with torch.no_grad():
        return copy.deepcopy(network).eval()(images().view(torch.arange(N))).scores


@pytest.mark.parametrize("softmax", [False, True])
def test_losses_come_by_position_whatever_the_order_of_the_batches(softmax):
    network = narrow(softmax=softmax)
    expected = F.cross_entropy(plain_scores(network), labels(), reduction="none")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for order, size in ((torch.arange(N), 64), (torch.arange(N), 8), (shuffled, 5), (shuffled, 1)):
        network.train()
        found = sample_losses(network, pass_over(1, order, size), labels(), N, CPU)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    batches = Batches(images(), 7)
    torch.testing.assert_close(
        sample_losses(network, batches, labels(), N, CPU), expected, rtol=1e-5, atol=1e-6
    )


def test_losses_are_float32_under_bfloat16():
    network = narrow()
    with torch.no_grad():
        network.classifier.weight.mul_(20)
    found = sample_losses(network, pass_over(1, torch.arange(N), 8), labels(), N, BF16)
    assert found.dtype == torch.float32
    # not rounded to bfloat16 anywhere after the encoder
    assert (found.bfloat16().float() != found).sum() > N // 2
    assert len(found.unique()) > N - 3
    exact = F.cross_entropy(plain_scores(network), labels(), reduction="none")
    assert (found - exact).abs().max() < 0.05 * exact.max()


def test_scores_of_all_networks_come_by_position_whatever_the_order_of_the_batches():
    nets = [narrow(seed, base) for seed, base in ((1, "c2d"), (2, "dividemix"))]
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for order, size in ((torch.arange(N), 64), (shuffled, 5)):
        for network in nets:
            network.train()
        found = network_scores(nets, pass_over(1, order, size), N, K, CPU)
        assert found.shape == (2, N, K) and found.dtype == torch.float32
        for own, network in zip(found, nets, strict=True):
            torch.testing.assert_close(own, plain_scores(network), rtol=1e-5, atol=1e-6)
    assert network_scores(nets, pass_over(1, shuffled, 5), N, K, BF16).dtype == torch.float32


def test_accuracy_is_in_percent_and_of_the_sum_of_scores_in_the_test():
    first = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    second = torch.tensor([[0.0, 4.0], [0.0, 1.0], [0.0, 1.0], [9.0, 0.0]])
    wanted = torch.tensor([1, 0, 1, 1])
    assert accuracy(first, wanted) == 75 and accuracy(second, wanted) == 50
    assert accuracy(first + second, wanted) == 75
