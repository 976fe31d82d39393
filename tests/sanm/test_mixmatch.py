"""What the recorded steps do not show: batch norms, batches of unlike sizes, the loss with and without masks and L_u, draws."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sanm import losses, mixmatch
from sanm.masking import Masked
from sanm.mixmatch import Samples
from sanm.networks import make_network

K, T = 5, 0.5
SHAPE = (1, 8, 8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def networks() -> tuple[nn.Module, nn.Module]:
    """One that is trained and its peer, with running statistics of their own."""
    torch.manual_seed(3)
    made = [make_network("c2d", K, *SHAPE[:2]) for _ in range(2)]
    with torch.no_grad():
        for network in made:
            network.classifier.weight.mul_(10)  # so that predictions are far from uniform
            network.train()(3 * torch.randn(32, *SHAPE) + 1)
    return made[0].train(), made[1].eval()


def views(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, *SHAPE, generator=generator) for _ in range(count))


def simplex(count: int, generator: torch.Generator) -> Tensor:
    return torch.softmax(torch.randn(count, K, generator=generator), dim=1)


def test_four_forward_passes_move_the_statistics_of_the_trained_network_and_none_those_of_the_peer(generator):
    network, peer = networks()
    u, x = views(2, 7, generator), views(2, 4, generator)
    one_by_one, before = copy.deepcopy(network), copy.deepcopy(peer.state_dict())
    mixmatch.guess_labels(network, peer, u, T)
    mixmatch.refine_labels(network, x, torch.arange(4), torch.rand(4), T)
    with torch.no_grad():
        for view in (*u, *x):
            one_by_one(view)
    for found, expected in ((network.state_dict(), one_by_one.state_dict()), (peer.state_dict(), before)):
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def step_batch(bx: int, bu: int, generator: torch.Generator):
    x, u = (
        Samples(views(4, n, generator), views(2, n, generator), torch.rand(n, generator=generator))
        for n in (bx, bu)
    )
    targets = [simplex(bx + bu, generator) for _ in range(3)]
    return x, u, targets[0], Masked(*views(2, bx + bu, generator), *targets[1:])


def plain_rows(x: Samples, u: Samples, targets: Tensor, masked: Masked | None) -> list[tuple[Tensor, Tensor]]:
    """The rows of a step, image and target, in their order."""
    rows, bx = [], len(x.clean)
    for side, start, count in ((x, 0, bx), (u, bx, len(u.clean))):
        for view in side.trained:
            rows += [(view[i], targets[start + i]) for i in range(count)]
        if masked is not None:
            rows += [(masked.at_max[start + i], masked.targets_max[start + i]) for i in range(count)]
            rows += [(masked.at_min[start + i], masked.targets_min[start + i]) for i in range(count)]
    return rows


class Recorder(nn.Module):
    """Passes to the network what it is given, and keeps it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.given = network, None

    def forward(self, images: Tensor, masked: Tensor | None = None):
        self.given = images, masked
        return self.network(images, masked)


def step(network, peer, x, u, masked, permutation, generator, **changes):
    """step_loss with fixed draws; the masks are the given ones."""
    options = {"weight": 3.0, "reconstruction_weight": 0.02, "temperature": T, "draw_lam": lambda: 0.3}
    options |= {"masks": None if masked is None else lambda *_: masked, "draw_permutation": permutation}
    labels = torch.randint(K, (len(x.clean),), generator=generator)
    return mixmatch.step_loss(network, peer, x, u, labels, **(options | changes)), labels


@pytest.mark.parametrize("forward_unlabelled", [True, False])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("bx", "bu"), [(4, 4), (5, 2), (1, 6)])  # last batches are smaller
def test_the_loss_of_a_step_is_the_weighted_sum_of_its_parts(bx, bu, masks, forward_unlabelled, generator):
    """By outputs of a twin; the masked copies go first, so that the running statistics move in the same order."""
    network, peer = networks()
    twin, (x, u, _, masked) = copy.deepcopy(network), step_batch(bx, bu, generator)
    masked, count = masked if masks else None, (4 + 2 * masks) * bx
    turned = lambda rows: torch.arange(rows - 1, -1, -1)  # noqa: E731  (the first rows meet the last, unlabelled ones)
    recorder = Recorder(network)
    options = {"parallel": recorder, "forward_unlabelled": forward_unlabelled}
    found, labels = step(network, peer, x, u, masked, turned, generator, **options)

    guessed = mixmatch.guess_labels(twin, peer, u.reference, T).targets
    refined = mixmatch.refine_labels(twin, x.reference, labels, x.clean, T).targets
    rows = plain_rows(x, u, torch.cat([refined, guessed]), masked)
    inputs, targets = (torch.stack(kind) for kind in zip(*rows, strict=True))
    inputs, targets = (0.7 * kind + 0.3 * kind.flip(0) for kind in (inputs, targets))
    if not forward_unlabelled:
        inputs, targets = inputs[:count], targets[:count]
    torch.testing.assert_close(recorder.given[0], inputs, rtol=0, atol=1e-6)
    images, rec = torch.cat([x.reference[0], u.reference[0]]), 0.0
    with torch.no_grad():
        if masks:
            halves = twin.decoder(twin.encoder(torch.cat([masked.at_max, masked.at_min]))).chunk(2)
            rec = float(sum(((half - images) ** 2).mean() for half in halves))
        scores = twin(inputs).scores
    loss_x = float(losses.soft_cross_entropy(scores[:count], targets[:count]))
    loss_u = float(losses.squared_error(scores[count:], targets[count:]))  # 0 of no rows
    prior = float(losses.prior_penalty(scores))
    plain = [loss_x + 3 * loss_u + prior + 0.02 * rec, loss_x, loss_u, prior, rec]
    assert [float(part.detach()) for part in found] == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert found.total.requires_grad and not any(part.requires_grad for part in found[1:])
    torch.testing.assert_close(*(dict(n.named_buffers()) for n in (network, twin)), rtol=1e-5, atol=1e-6)


def test_all_of_the_network_learns_and_without_masks_all_but_the_decoder(generator):
    x, u, _, masked = step_batch(4, 4, generator)
    for given in (masked, None):
        network, peer = networks()
        loss, _ = step(network, peer, x, u, given, torch.randperm, generator)
        loss.total.backward()
        without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
        decoder = {f"decoder.{name}" for name, _ in network.decoder.named_parameters()}
        assert without == (set() if given else decoder)


def test_the_draws_of_a_step_come_after_those_of_its_masks_and_the_permutation_is_of_all_rows(generator):
    drawn, (network, peer), (x, u, _, masked) = [], networks(), step_batch(3, 2, generator)

    def masks(images, maps, clean, targets, sizes):
        drawn.append("masks")
        assert torch.equal(images, torch.cat([x.reference[0], u.reference[0]])) and sizes == (3, 2)
        assert torch.equal(clean, torch.cat([x.clean, u.clean]))
        assert maps.shape[0] == targets.shape[0] == 5
        return masked

    def permutation(rows: int) -> Tensor:
        drawn.append(rows)
        return torch.arange(rows)

    draws = {"masks": masks, "draw_lam": lambda: drawn.append("lam") or 0.4}
    step(network, peer, x, u, masked, permutation, generator, **draws)
    assert drawn == ["masks", "lam", 30]
