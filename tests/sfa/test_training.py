"""The passes over the data against plain loops, in one process and in two that torchrun starts once for all tests.

This file is also the script that the two processes run; each leaves what it sees in rank0.pt or rank1.pt.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu import processes
from common.gpu.device import Device
from sfa import mixmatch, robust_losses, training
from sfa.networks import TwoHeads
from tests.end_to_end.runs import ROOT, start

CPU = Device(torch.device("cpu"), "fp32", "tests")
N, K, BATCH, TEMPERATURE = 26, 4, 8, 0.6
COUNTS = torch.tensor([11, 8, 5, 2])
LDAM = partial(robust_losses.ldam, largest_margin=0.3, scale=3)


@contextmanager
def in_float64() -> Iterator[None]:
    """What the passes make, they make in the default type."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


class Heads(TwoHeads):
    """Two heads that leave float64 as it is."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return features, self.standard(features), self.balanced(features)


class Network(nn.Module):
    """Two batch normalisations and two heads, in float64: two processes differ from one in the last digits alone."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        with in_float64():
            # without biases: the norms would take them out again, and they would move by rounding alone
            first, second = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 6, 3, bias=False)
            self.layers = nn.Sequential(first, nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), second)
            self.inner = nn.Sequential(nn.BatchNorm2d(6), nn.Tanh())
            self.heads = Heads(6, K)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.inner(self.layers(images)).mean(dim=(2, 3)))


def images() -> Tensor:
    """[N, 1, 7, 7], each brighter than the one before, so that pieces of a batch have unlike statistics."""
    noise = torch.randn(N, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise + torch.arange(N, dtype=torch.float64)[:, None, None, None] / 5


def labels() -> Tensor:
    return torch.randint(K, (N,), generator=torch.Generator().manual_seed(1))


def clean() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def view(index: Tensor, number: int) -> Tensor:
    """The images at index, in a view of that number: 0 is plain."""
    return images()[index].roll(number, dims=3) * (1 + 0.2 * number)


def global_batches(order: Tensor, size: int, views: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    numbers = range(1, views + 1)
    return [(tuple(view(index, n) for n in numbers), index) for index in order.split(size)]


def own_pieces(batches: list) -> list:
    """This process's piece of each batch, as the loaders cut them."""
    piece = processes.piece
    return [(tuple(piece(own) for own in views), piece(index)) for views, index in batches]


def own_batches(order: Tensor, size: int) -> list:
    """This process's part of the plain batches, as the loaders deal them out."""
    dealt = order.split(size)[processes.rank() :: processes.world()]
    return [((view(index, 0),), index) for index in dealt]


LABELLED, UNLABELLED = torch.arange(N)[::2][:12], torch.arange(N)[1::2][:12]
SHUFFLED = torch.randperm(N, generator=torch.Generator().manual_seed(7))


def trainer(seed: int = 3) -> tuple[nn.Module, nn.Module, SGD]:
    """A network, what its training steps go through, and its optimiser."""
    network = processes.synchronised(Network(seed))
    return network, processes.parallel(network, CPU.device), SGD(network.parameters(), 0.1, momentum=0.9)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def warmed_up() -> dict[str, Any]:
    network, parallel, optimizer = trainer()
    batches = own_pieces(global_batches(SHUFFLED[:24], BATCH, 1))
    network.eval()  # to be put into training mode
    losses = training.warm_up(parallel, optimizer, batches, labels(), COUNTS, CPU, LDAM)
    return {"losses": losses, "state": state_of(network)}


def settings(device: Device) -> dict[str, Any]:
    """Of semi-supervised training; the weights and the partners of the mixture are alike by each call."""
    lams, generator = iter((0.8, 0.3, 0.6)), torch.Generator().manual_seed(5)
    options = {"labels": labels(), "clean": clean(), "class_counts": COUNTS, "temperature": TEMPERATURE}
    options |= {"weight": lambda step: 2.0 + step, "draw_lam": lambda: next(lams), "device": device}
    return options | {"draw_permutation": lambda rows: torch.randperm(rows, generator=generator)}


def trained(unlabelled: bool = True, **options) -> dict[str, Any]:
    """Three steps; the unlabelled batches are larger than the labelled ones, and begin again after two."""
    network, parallel, optimizer = trainer()
    peer = processes.synchronised(Network(4))
    peer.train()  # to be put into evaluation mode
    network.eval()
    batches = own_pieces(global_batches(LABELLED, 4, 2))
    others = iter(own_pieces(global_batches(UNLABELLED, 6, 2)) * 2) if unlabelled else None
    options |= settings(CPU) | {"parallel": parallel}
    losses = training.train_semi(network, peer, optimizer, batches, others, **options)
    return {"losses": losses, "state": state_of(network), "peer": state_of(peer)}


def evaluated(size: int, order: Tensor) -> dict[str, Tensor]:
    """Features, confidences, losses and logits of samples, from batches of that size in that order."""
    networks = [processes.synchronised(Network(seed)).train() for seed in (3, 4)]
    first, batches = networks[0], lambda: iter(own_batches(order, size))
    features, confidence = training.features_and_confidence(first, batches(), labels(), CPU)
    seen = {"features": features, "confidence": confidence}
    first.train()
    seen["sample_losses"] = training.sample_losses(first, batches(), labels(), CPU)
    first.train()
    seen["logits"] = training.summed_logits(iter(networks), batches(), N, K, CPU)
    return seen | {"state": state_of(first)}


SCENARIOS = {
    "warm_up": warmed_up,
    "all forwarded ldam": partial(trained, loss=LDAM),
    "labelled forwarded": partial(trained, forward_unlabelled=False),
    "all labelled": partial(trained, unlabelled=False),
    "evaluated": partial(evaluated, 4, torch.arange(N)),
    "evaluated in any order": partial(evaluated, 5, SHUFFLED),
}


def everything() -> dict[str, dict]:
    with in_float64():
        return {name: do() for name, do in SCENARIOS.items()}


def work(folder: Path) -> None:
    """What each of the two processes does."""
    processes.start(CPU.device)
    seen = everything()
    processes.wait()
    rank = processes.rank()
    processes.stop()
    torch.save(seen, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    """What one process sees."""
    return everything()


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def plain_warm_up() -> dict[str, Any]:
    network, losses = Network(3).train(), []
    optimizer = SGD(network.parameters(), 0.1, momentum=0.9)
    for index in SHUFFLED[:24].split(BATCH):
        _, standard, auxiliary = network(view(index, 1))
        own = labels()[index]
        total = LDAM(standard, F.one_hot(own, K).double(), COUNTS)
        total = total + F.cross_entropy(auxiliary + COUNTS.double().log(), own)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.detach())
    return {"losses": torch.stack(losses), "state": state_of(network)}


def sharpened(p: Tensor) -> Tensor:
    p = p ** (1 / TEMPERATURE)
    return p / p.sum(dim=1, keepdim=True)


def plain_training(unlabelled: bool = True, forward_unlabelled: bool = True, loss=None) -> dict[str, Any]:
    """The steps of README, section 4, one after the other."""
    network, peer = Network(3).train(), Network(4).eval()
    optimizer = SGD(network.parameters(), 0.1, momentum=0.9)
    lams, generator, losses = (0.8, 0.7, 0.6), torch.Generator().manual_seed(5), []
    predict = lambda net, x: torch.softmax(net(x)[1], dim=1)  # noqa: E731
    for step in range(3):
        x = LABELLED[4 * step : 4 * step + 4]
        x1, x2 = view(x, 1), view(x, 2)
        stack, targets = [x1, x2], []
        with torch.no_grad():
            if unlabelled:
                u = (UNLABELLED[:6], UNLABELLED[6:])[step % 2]
                u1, u2 = view(u, 1), view(u, 2)
                q = predict(network, u1) + predict(network, u2) + predict(peer, u1) + predict(peer, u2)
                stack += [u1, u2]
                targets = [sharpened(q / 4)] * 2
            p = (predict(network, x1) + predict(network, x2)) / 2
            w = clean()[x][:, None]
            targets = [sharpened(w * F.one_hot(labels()[x], K) + (1 - w) * p)] * 2 + targets
        stack, targets = torch.cat(stack), torch.cat(targets)
        partner, lam = torch.randperm(len(stack), generator=generator), lams[step]
        mixed = lam * stack + (1 - lam) * stack[partner]
        t = lam * targets + (1 - lam) * targets[partner]
        if not forward_unlabelled:
            mixed, t = mixed[:8], t[:8]
        _, z1, z2 = network(mixed)
        z2 = z2 + COUNTS.double().log()
        l_x = [-(t[:8] * z[:8].log_softmax(1)).sum(1).mean() for z in (z1, z2)]
        if loss is not None:
            l_x[0] = loss(z1[:8], t[:8], COUNTS)
        l_u = [torch.zeros(()).double()] * 2
        if unlabelled and forward_unlabelled:
            l_u = [((z[8:].softmax(1) - t[8:]) ** 2).mean() for z in (z1, z2)]
        total = sum(l_x) + (2 + step) * sum(l_u) - (K * z1.softmax(1).mean(0)).log().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(torch.stack([part.detach() for part in (total, l_x[0], l_u[0], l_x[1], l_u[1])]))
    return {"losses": torch.stack(losses), "state": state_of(network), "peer": state_of(Network(4))}


PLAIN = {
    "warm_up": plain_warm_up,
    "all forwarded ldam": partial(plain_training, loss=LDAM),
    "labelled forwarded": partial(plain_training, forward_unlabelled=False),
    "all labelled": partial(plain_training, unlabelled=False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_training_is_the_plain_loop(name, one):
    assert_close(one[name], PLAIN[name]())
    before, after = state_of(Network(3)), one[name]["state"]
    assert not [key for key, value in before.items() if torch.equal(value, after[key])], "all have moved"


@pytest.mark.parametrize("name", ["evaluated", "evaluated in any order"])
def test_each_sample_gets_its_own_features_confidence_loss_and_logits(name, one):
    seen, networks = one[name], [Network(seed).eval() for seed in (3, 4)]
    with torch.no_grad():
        outputs = [[net(view(torch.tensor([i]), 0)) for i in range(N)] for net in networks]
    features, standard, auxiliary = (torch.cat(of) for of in zip(*outputs[0], strict=True))
    y = (torch.arange(N), labels())
    expected = {
        "features": features,
        "confidence": auxiliary.softmax(1)[y],
        "sample_losses": -standard.log_softmax(1)[y],
        "logits": sum(torch.cat([z1 + z2 for _, z1, z2 in of]) for of in outputs),
    }
    assert_close(seen, expected | {"state": state_of(Network(3))})
    assert not any(value.requires_grad for value in seen.values() if isinstance(value, Tensor))


def test_positions_that_no_batch_brings_are_0():
    network = Network(3)
    with in_float64():
        some = [((view(index, 0),), index) for index in (torch.tensor([5, 2]), torch.tensor([9]))]
        losses = training.sample_losses(network, some, labels(), CPU)
        logits = training.summed_logits([network], some, N, K, CPU)
    assert losses.nonzero()[:, 0].tolist() == logits.any(dim=1).nonzero()[:, 0].tolist() == [2, 5, 9]


def test_a_step_of_one_row_has_a_finite_loss_and_gradient():
    network, peer, index = Network(3).train(), Network(4).eval(), torch.tensor([5])
    views = view(index, 1), view(index, 2)
    options = {"class_counts": COUNTS, "weight": 1.0, "lam": 0.4, "temperature": TEMPERATURE}
    labelled, partners = (views, labels()[index], clean()[index]), torch.arange(3, -1, -1)
    loss = mixmatch.step_loss(network, peer, labelled, views, permutation=partners, **options)
    loss.total.backward()
    assert torch.isfinite(torch.stack(loss)).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def in_float32(seed: int) -> nn.Module:
    network, heads = Network(seed).float(), TwoHeads(6, K)
    heads.load_state_dict(network.heads.state_dict())
    network.heads = heads
    return network


def in_precision(which: str, device: Device) -> list[Tensor]:
    network = in_float32(3)
    if which == "evaluation":
        batches = [((view(index, 0).float(),), index) for index in torch.arange(N).split(6)]
        return [
            *training.features_and_confidence(network, batches, labels(), device),
            training.sample_losses(network, batches, labels(), device),
            training.summed_logits([network], batches, N, K, device),
        ]
    [(views, index)] = global_batches(LABELLED, 12, 2)
    batch, optimizer = [(tuple(own.float() for own in views), index)], SGD(network.parameters(), 0.1)
    if which == "warm_up":
        batch = [(batch[0][0][:1], index)]
        return [training.warm_up(network, optimizer, batch, labels(), COUNTS, device)]
    options = settings(device)
    return [training.train_semi(network, in_float32(4), optimizer, batch, iter(batch), **options)]


@pytest.mark.parametrize("which", ["evaluation", "warm_up", "train_semi"])
def test_passes_are_within_the_autocast_and_return_float32(which):
    half = Device(torch.device("cpu"), "bf16", "tests")
    for exact, rough in zip(in_precision(which, CPU), in_precision(which, half), strict=True):
        assert rough.dtype == exact.dtype == torch.float32
        assert not torch.equal(rough, exact)
        torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_two_processes_see_what_one_sees(one, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = start(*words, __file__, tmp_path, PYTHONPATH=str(ROOT))
    assert ended.status == 0, ended.err
    for rank in (0, 1):
        assert_close(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), one)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
