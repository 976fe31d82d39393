"""The passes over the data against plain loops, in one process and in two that torchrun starts once for all tests.

This file is also the script that the two processes run; each leaves what it saw in rank0.pt or rank1.pt.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
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
from sfa import losses, robust_losses, training
from sfa.mixmatch import step_loss
from sfa.networks import TwoHeads

ROOT = Path(__file__).resolve().parents[2]
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
            self.layers = nn.Sequential(
                nn.Conv2d(
                    1, 4, 3, bias=False
                ),  # a bias would be taken out again by the norm, and move by rounding alone
                nn.BatchNorm2d(4, momentum=0.3),
                nn.ReLU(),
                nn.Conv2d(4, 6, 3, bias=False),
            )
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


def whole_batches(order: Tensor, size: int, views: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    numbers = range(1, views + 1)
    return [(tuple(view(index, n) for n in numbers), index) for index in order.split(size)]


def own_pieces(batches: list) -> list:
    """This process's piece of each batch, as the loaders cut them."""
    piece = lambda rows: rows.chunk(processes.world())[processes.rank()]  # noqa: E731
    return [(tuple(piece(own) for own in views), piece(index)) for views, index in batches]


def own_batches(order: Tensor, size: int) -> list:
    """This process's share of the plain batches, as the loaders deal them out."""
    dealt = order.split(size)[processes.rank() :: processes.world()]
    return [((view(index, 0),), index) for index in dealt]


CONFIDENT, DOUBTFUL = torch.arange(N)[::2][:12], torch.arange(N)[1::2][:12]
SHUFFLED = torch.randperm(N, generator=torch.Generator().manual_seed(7))


# what one process does, and each of two -------------------------------------------------------------------------------


def trainer(seed: int = 3) -> tuple[nn.Module, nn.Module, SGD]:
    """A network, what its training steps go through, and its optimiser."""
    network = processes.synchronised(Network(seed))
    return network, processes.parallel(network, CPU.device), SGD(network.parameters(), 0.1, momentum=0.9)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def warmed_up(loss=losses.cross_entropy) -> dict[str, Any]:
    network, parallel, optimizer = trainer()
    batches = own_pieces(whole_batches(SHUFFLED[:24], BATCH, 1))
    network.eval()  # to be put into training mode
    found = training.warm_up(parallel, optimizer, batches, labels(), COUNTS, CPU, loss)
    return {"losses": found, "state": state_of(network)}


def mix_settings() -> dict[str, Any]:
    """Weights and partners of the mixture, drawn anew but alike by each call, and the weight of the unlabelled losses."""
    weights, generator = iter((0.8, 0.3, 0.6)), torch.Generator().manual_seed(5)
    return {
        "weight": lambda step: 2.0 + step,
        "draw_lam": lambda: next(weights),
        "draw_permutation": lambda rows: torch.randperm(rows, generator=generator),
    }


def trained(unlabelled: bool = True, **options) -> dict[str, Any]:
    """Three steps; the unlabelled batches are larger than the labelled ones, and begin again after two."""
    network, parallel, optimizer = trainer()
    peer = processes.synchronised(Network(4))
    peer.train()  # to be put into evaluation mode
    network.eval()
    labelled = own_pieces(whole_batches(CONFIDENT, 4, 2))
    doubtful = own_pieces(whole_batches(DOUBTFUL, 6, 2)) * 2
    found = training.train_semi(
        network,
        peer,
        optimizer,
        labelled,
        iter(doubtful) if unlabelled else None,
        labels=labels(),
        clean=clean(),
        class_counts=COUNTS,
        temperature=TEMPERATURE,
        device=CPU,
        parallel=parallel,
        **mix_settings(),
        **options,
    )
    return {"losses": found, "state": state_of(network), "peer": state_of(peer)}


def evaluated(size: int, order: Tensor) -> dict[str, Tensor]:
    """All that is found out about samples, from batches of that size in that order."""
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
    "warm_up ldam": partial(warmed_up, LDAM),
    "all forwarded": trained,
    "all forwarded ldam": partial(trained, loss=LDAM),
    "labelled forwarded": partial(trained, forward_unlabelled=False),
    "all confident": partial(trained, unlabelled=False),
    "evaluated": partial(evaluated, 4, torch.arange(N)),
    "evaluated in any order": partial(evaluated, 5, SHUFFLED),
    "one batch": partial(evaluated, N, torch.arange(N)),
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
def both(tmp_path_factory) -> list[dict]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("training")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    """What one process saw."""
    return everything()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# plain loops ----------------------------------------------------------------------------------------------------------


def plain_warm_up(loss=None) -> dict[str, Any]:
    network = Network(3).train()
    optimizer = SGD(network.parameters(), 0.1, momentum=0.9)
    loss, found = loss or (lambda z, t, _: F.cross_entropy(z, t.argmax(dim=1))), []
    for index in SHUFFLED[:24].split(BATCH):
        _, standard, auxiliary = network(view(index, 1))
        own = labels()[index]
        total = loss(standard, F.one_hot(own, K).double(), COUNTS)
        total = total + F.cross_entropy(auxiliary + COUNTS.double().log(), own)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.detach())
    return {"losses": torch.stack(found), "state": state_of(network)}


def sharpened(p: Tensor) -> Tensor:
    p = p ** (1 / TEMPERATURE)
    return p / p.sum(dim=1, keepdim=True)


def plain_training(unlabelled: bool = True, forward_unlabelled: bool = True, loss=None) -> dict[str, Any]:
    """Steps 1 to 6 of Sec. 4, one after the other."""
    network, peer = Network(3).train(), Network(4).eval()
    optimizer = SGD(network.parameters(), 0.1, momentum=0.9)
    mix_weights, generator, found = (0.8, 0.7, 0.6), torch.Generator().manual_seed(5), []
    predict = lambda net, x: torch.softmax(net(x)[1], dim=1)  # noqa: E731
    for step in range(3):
        x = CONFIDENT[4 * step : 4 * step + 4]
        x1, x2 = view(x, 1), view(x, 2)
        stack, targets = [x1, x2], []
        with torch.no_grad():
            if unlabelled:
                u = (DOUBTFUL[:6], DOUBTFUL[6:])[step % 2]
                u1, u2 = view(u, 1), view(u, 2)
                q = predict(network, u1) + predict(network, u2) + predict(peer, u1) + predict(peer, u2)
                stack += [u1, u2]
                targets = [sharpened(q / 4)] * 2
            p = (predict(network, x1) + predict(network, x2)) / 2
            w = clean()[x][:, None]
            targets = [sharpened(w * F.one_hot(labels()[x], K) + (1 - w) * p)] * 2 + targets
        stack, targets = torch.cat(stack), torch.cat(targets)
        partner = torch.randperm(len(stack), generator=generator)
        share = mix_weights[step]
        mixed = share * stack + (1 - share) * stack[partner]
        t = share * targets + (1 - share) * targets[partner]
        if not forward_unlabelled:
            mixed, t = mixed[:8], t[:8]
        _, z1, z2 = network(mixed)
        z2 = z2 + COUNTS.double().log()
        labelled = [-(t[:8] * z[:8].log_softmax(1)).sum(1).mean() for z in (z1, z2)]
        if loss is not None:
            labelled[0] = loss(z1[:8], t[:8], COUNTS)
        if unlabelled and forward_unlabelled:
            doubtful = [((z[8:].softmax(1) - t[8:]) ** 2).mean() for z in (z1, z2)]
        else:
            doubtful = [torch.zeros(()).double()] * 2
        penalty = -(K * z1.softmax(1).mean(0)).log().mean()
        total = sum(labelled) + (2 + step) * sum(doubtful) + penalty
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        parts = (total, labelled[0], doubtful[0], labelled[1], doubtful[1])
        found.append(torch.stack([part.detach() for part in parts]))
    return {"losses": torch.stack(found), "state": state_of(network), "peer": state_of(Network(4))}


PLAIN = {
    "warm_up": plain_warm_up,
    "warm_up ldam": partial(plain_warm_up, LDAM),
    "all forwarded": plain_training,
    "all forwarded ldam": partial(plain_training, loss=LDAM),
    "labelled forwarded": partial(plain_training, forward_unlabelled=False),
    "all confident": partial(plain_training, unlabelled=False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_training_is_the_plain_loop(name, one):
    expected = PLAIN[name]()
    assert expected["losses"].shape[0] == 3
    assert_close(one[name], expected)


@pytest.mark.parametrize("name", ["evaluated", "evaluated in any order", "one batch"])
def test_each_sample_gets_its_own_features_confidence_loss_and_logits(name, one):
    seen, networks = one[name], [Network(seed).eval() for seed in (3, 4)]
    with torch.no_grad():
        for i in range(N):
            outputs = [network(view(torch.tensor([i]), 0)) for network in networks]
            (features, standard, auxiliary), y = outputs[0], labels()[i]
            assert_close(seen["features"][i], features[0])
            assert_close(seen["confidence"][i], auxiliary.softmax(1)[0, y])
            assert_close(seen["sample_losses"][i], -standard.log_softmax(1)[0, y])
            assert_close(seen["logits"][i], sum(z1 + z2 for _, z1, z2 in outputs)[0])
    assert [seen[n].shape for n in ("features", "confidence", "sample_losses", "logits")] == [
        (N, 6), (N,), (N,), (N, K)
    ]  # fmt: skip
    assert not any(value.requires_grad for value in seen.values() if isinstance(value, Tensor))


def test_looking_at_samples_changes_no_network(one):
    assert_close(one["evaluated"]["state"], state_of(Network(3)))


def test_positions_that_no_batch_brings_are_0():
    network = Network(3)
    with in_float64():
        some = [((view(index, 0),), index) for index in (torch.tensor([5, 2]), torch.tensor([9]))]
        found = training.sample_losses(network, some, labels(), CPU)
        logits = training.summed_logits([network], some, N, K, CPU)
    assert found.nonzero()[:, 0].tolist() == [2, 5, 9]
    assert logits.any(dim=1).nonzero()[:, 0].tolist() == [2, 5, 9]


def in_float32(seed: int) -> nn.Module:
    network = Network(seed).float()
    heads = TwoHeads(6, K)
    heads.load_state_dict(network.heads.state_dict())
    network.heads = heads
    return network


def test_features_losses_and_logits_are_float32_whatever_the_autocast():
    network = in_float32(3)
    half = Device(torch.device("cpu"), "bf16", "tests")
    batches = [((view(index, 0).float(),), index) for index in torch.arange(N).split(6)]
    plain, rough = (
        [
            *training.features_and_confidence(network, batches, labels(), device),
            training.sample_losses(network, batches, labels(), device),
            training.summed_logits([network], batches, N, K, device),
        ]
        for device in (CPU, half)
    )
    for exact, found in zip(plain, rough, strict=True):
        assert found.dtype == exact.dtype == torch.float32
        assert not torch.equal(found, exact), "within the autocast"
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("which", ["warm_up", "train_semi"])
def test_training_steps_are_taken_within_the_autocast(which):
    half = Device(torch.device("cpu"), "bf16", "tests")
    batch = [(tuple(own.float() for own in views), index) for views, index in whole_batches(CONFIDENT, 12, 2)]
    losses_of = []
    for device in (CPU, half):
        network = in_float32(3)
        optimizer = SGD(network.parameters(), 0.1)
        if which == "warm_up":
            [(views, index)] = batch
            found = training.warm_up(network, optimizer, [((views[0],), index)], labels(), COUNTS, device)
        else:
            options = {"labels": labels(), "clean": clean(), "class_counts": COUNTS, "device": device}
            options |= {"temperature": TEMPERATURE, **mix_settings()}
            found = training.train_semi(network, in_float32(4), optimizer, batch, iter(batch), **options)
        losses_of.append(found)
    exact, rough = losses_of
    assert rough.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)
    assert (rough != exact).all()


def test_the_share_of_the_own_row_is_never_below_one_half():
    """max(l, 1 - l): a draw of 0.2 mixes as one of 0.8 does."""
    network, peer = Network(3), Network(4).eval()
    index = CONFIDENT[:4]
    pair = lambda rows: (view(rows, 1), view(rows, 2))  # noqa: E731
    totals = []
    for draw in (0.2, 0.8):
        own = deepcopy(network)  # its running statistics do not matter in training mode, but leave them alone
        found = step_loss(
            own,
            peer,
            (pair(index), labels()[index], clean()[index]),
            pair(DOUBTFUL[:4]),
            class_counts=COUNTS,
            weight=1.0,
            lam=draw,
            permutation=torch.arange(16).flip(0),
            temperature=TEMPERATURE,
        )
        totals.append(found.total.detach())
    assert_close(*totals)


# two processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_see_what_one_sees(name, both, one):
    for seen in both:
        assert_close(seen[name], one[name])


@pytest.mark.parametrize("name", PLAIN)
def test_the_weights_and_running_statistics_have_moved(name, one):
    before, after = state_of(Network(3)), one[name]["state"]
    still = [key for key, value in before.items() if torch.equal(value, after[key])]
    assert still == []


if __name__ == "__main__":
    work(Path(sys.argv[1]))
