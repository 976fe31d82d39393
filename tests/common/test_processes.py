"""Several processes give what one gives: the functions alone, and in two processes that torchrun starts.

This file is also the script that each of the two processes runs; one of its tests goes through the functions `check_...`.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.gpu import device, processes
from common.runs import cli
from common.runs.cli import UserError
from common.runs.run import Run
from tests.common.test_moved_run import CELL

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROWS, CLASSES, STEPS = 8, 3, 3


class Block(nn.Module):
    """Batch normalisation deep inside, without and with weights that were trained."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=0.3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.layers(x))


class Mixing(nn.Module):
    """Features of a piece, gathered; one head for rows and for mixtures of pairs, as in attentive feature mixup."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(), nn.Flatten())
        self.attention, self.head = nn.Linear(4 * 16, 1), nn.Linear(4 * 16, CLASSES)
        self.unused = nn.Linear(2, 2)  # without gradient in every step

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = processes.gather_rows(self.backbone(images))
        partners = features.roll(ROWS // 2, dims=0)  # each row's partner is another process's
        weight = torch.sigmoid(self.attention(features) - self.attention(partners))
        return features, self.head(features), self.head(weight * features + (1 - weight) * partners)


def make_network() -> Mixing:
    torch.manual_seed(3)
    network = Mixing().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A global batch, its two halves quite unlike each other."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(ROWS, 2, 6, 6, generator=generator, dtype=torch.float64)
    images[ROWS // 2 :] = 3 * images[ROWS // 2 :] + 1
    return images, torch.randint(CLASSES, (ROWS,), generator=generator)


def train(network: nn.Module, whole: nn.Module) -> dict[str, Any]:
    """Some steps of SGD on the loss of the whole batch: what one can see of them. whole: the network inside."""
    optimizer = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9)
    seen: dict[str, Any] = {"features": [], "losses": [], "gradients": []}
    for step in range(STEPS):
        images, labels = batch(step)
        features, plain, mixed = network(processes.piece(images))
        loss = F.cross_entropy(plain, labels) + 1.5 * F.cross_entropy(mixed, labels.roll(1))
        optimizer.zero_grad()
        loss.backward()
        seen["features"].append(features.detach().clone())
        seen["losses"].append(loss.detach())
        gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
        # DistributedDataParallel may leave zeros where one process leaves nothing
        unused = [gradients.pop(name) for name in ("unused.weight", "unused.bias") if name in gradients]
        assert not any(gradient.any() for gradient in unused)
        seen["gradients"].append(gradients)
        optimizer.step()
    seen["state"] = {name: value.clone() for name, value in whole.state_dict().items()}
    seen["evaluated"] = whole.eval().backbone(batch(99)[0]).detach()
    return seen


def numbers() -> tuple:
    return processes.launched(), processes.planned(), processes.world(), processes.rank()


def refuse() -> None:
    raise UserError(f"refused by {processes.rank()}")


# in two processes -----------------------------------------------------------------------------------------------------


def torchrun(function: str, folder: Path) -> subprocess.CompletedProcess:
    """Two processes that each call a function of this file on the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    command += [function, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    ended = torchrun("stop", tmp_path)
    assert ended.returncode != 0
    assert [(tmp_path / f"steps{rank}").read_text() for rank in (0, 1)] == ["3", "3"], ended.stderr
    assert ended.stderr.count("SIGTERM: stopped; the same command resumes after epoch 0\n") == 1


def stop(folder: Path) -> None:
    """A run whose second process gets SIGTERM in its third step."""

    def train(_) -> None:
        args = Namespace(out=str(folder), resume="auto", num_epochs=3, seed=1, fidelity="paper", preset=None)
        run = Run(args, device.pick("cpu", several=True), paper="sfa", method="SFA", name="name", cell=CELL)
        run.resume({"weights": {"w": torch.zeros(1)}})
        batches = [((torch.zeros(2),), torch.arange(2))] * 8
        for _ in run.epochs(1):
            for step, _ in enumerate(run.progress(batches, "training"), start=1):
                (folder / f"steps{processes.rank()}").write_text(str(step))
                if step == 3 and processes.rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                processes.wait()

    cli.exit_cleanly(train, [])


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_only_the_first_speaks(tmp_path):
    ended = torchrun("work", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "said by 0\n"
    assert ended.stderr.count("error: refused by 0") == 1 and "refused by 1" not in ended.stderr
    assert "Traceback" not in ended.stderr


def work(folder: Path) -> None:
    """What each of the two processes does."""
    rank = processes.rank()
    assert numbers() == (True, 2, 1, rank)
    network = make_network()
    trained = train(network, network)  # in this process alone, on whole batches
    assert len(trained["gradients"][0]) == 11, "every weight of the network but the unused ones"
    processes.start(CPU)
    assert numbers() == (True, 2, 2, rank)
    processes.say(f"said by {rank}")
    check_rows(rank)
    check_training(trained)
    check_autocast()
    check_averages(rank)
    check_shared_buffers(rank)
    check_from_first(rank, folder)
    check_alone(rank)
    check_errors(rank)
    processes.wait()
    processes.stop()
    assert numbers() == (True, 2, 1, rank)


def check_rows(rank: int) -> None:
    """Rows of a batch cut into consecutive pieces, gathered and summed."""
    turned = torch.arange(24.0).view(3, ROWS).t()  # rows that do not lie one after another in memory
    for rows in (torch.arange(24).view(ROWS, 3), turned):
        own = rows.split(ROWS // 2)[rank]
        assert torch.equal(processes.piece(rows), own)
        assert torch.equal(processes.gather_rows(own), rows)
    leaf, weights = torch.full((2, 3), float(rank), requires_grad=True), torch.arange(12.0).view(4, 3)
    gathered, again = processes.gather_rows(leaf), processes.gather_rows(2 * leaf)
    (gathered * weights + again * weights).sum().backward()
    assert gathered.tolist() == [[0, 0, 0]] * 2 + [[1, 1, 1]] * 2
    assert torch.equal(leaf.grad, 2 * 3 * weights.split(2)[rank]), "the own one times the processes"
    own = torch.tensor([1.0, 10.0**rank], requires_grad=True)
    total = processes.total(own)
    assert (total.tolist(), total.requires_grad, own.tolist()) == ([2, 11], False, [1, 10**rank])
    parts = processes.gather_parts([10 * rank + torch.arange(float(size)) for size in (2, 1, 3)])
    assert parts.tolist() == [0, 1, 10, 11, 0, 10, 0, 1, 2, 10, 11, 12]
    own_parts = processes.piece_parts(parts, [2, 1, 3])
    assert own_parts.tolist() == [10 * rank + row for row in (0, 1, 0, 0, 1, 2)]
    loss = torch.tensor(1.0 + 3 * rank, requires_grad=True)
    mean = processes.mean_loss(2 * loss)
    mean.backward()
    assert (mean.item(), loss.grad) == (5, 2), "the gradient of the own loss"


def check_training(expected: dict[str, Any]) -> None:
    """Losses, gradients, features and running statistics are those of the whole batch."""
    network = make_network()
    untrained = {name: value.clone() for name, value in network.state_dict().items()}
    halves = torch.cat([make_network().backbone(half) for half in batch(0)[0].chunk(2)])
    assert (halves - expected["features"][0]).abs().max() > 0.1, "the halves differ enough to notice"

    before = {name: value.data_ptr() for name, value in network.state_dict(keep_vars=True).items()}
    assert processes.synchronised(network) is network
    assert before == {name: value.data_ptr() for name, value in network.state_dict(keep_vars=True).items()}
    assert not any(type(layer) is nn.BatchNorm2d for layer in network.modules())
    parallel = processes.parallel(network, CPU, unused_parameters=True)
    assert isinstance(parallel, DistributedDataParallel) and parallel.module is network
    found = train(parallel, network)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # rounding in double precision
    assert list(found["state"]) == list(untrained)
    moved = [name for name in untrained if "running" in name or "tracked" in name]
    assert len(moved) == 6
    assert not any(torch.equal(untrained[name], found["state"][name]) for name in moved)
    of_first = processes.from_first(lambda: found["state"])
    assert all(torch.equal(of_first[name], value) for name, value in found["state"].items())


def check_autocast() -> None:
    """Batch normalisation in bfloat16 is that of one process."""
    images = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(5)).bfloat16()
    layer = processes.synchronised(nn.Sequential(nn.BatchNorm2d(4)))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(processes.piece(images)), processes.piece(nn.BatchNorm2d(4)(images))
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)


def check_averages(rank: int) -> None:
    """Gradients are averaged each in its own shape, layout and type; some are missing."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((), (3,), (2, 3), (2, 2, 3, 3))]
    parameters += [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(4))]
    values = [torch.arange(p.numel(), dtype=p.dtype).view_as(p) + 10 * i for i, p in enumerate(parameters)]
    for parameter, value in zip(parameters[:-1], values[:-1], strict=True):
        parameter.grad = value * (1 + 2 * rank)
    parameters[3].grad = parameters[3].grad.contiguous(memory_format=torch.channels_last)
    before = [parameter.grad for parameter in parameters]
    processes.average_gradients(iter(parameters))
    processes.average_gradients([parameters[-1]])  # none has a gradient
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, before, strict=True)), "in place"
    for grad, value in zip(before[:-1], values[:-1], strict=True):
        assert torch.equal(grad, 2 * value)  # of 1 and 3 times
    assert before[3].is_contiguous(memory_format=torch.channels_last)


def check_shared_buffers(rank: int) -> None:
    """Buffers are shared, and weights are not."""
    network = nn.BatchNorm2d(2)
    with torch.no_grad():
        for tensor in (*network.buffers(), *network.parameters()):
            tensor.fill_(rank + 5)
    processes.share_buffers(network)
    assert all((buffer == 5).all() for buffer in network.buffers())
    assert all((parameter == rank + 5).all() for parameter in network.parameters())


def check_from_first(rank: int, folder: Path) -> None:
    """One process makes it for all, or before all."""
    calls = []

    def make() -> dict[str, int]:
        calls.append(rank)
        return {"made_by": rank}

    def fetch() -> str:
        file = folder / "fetched"
        if file.exists():
            return "found"
        time.sleep(0.5)  # the other process would be here by now
        file.write_text("fetched")
        return "fetched"

    for source in (0, 1):
        assert processes.from_first(make, source) == {"made_by": source}
        assert calls == [rank] * (rank == source)
        calls.clear()
    assert processes.first_alone(fetch) == ["fetched", "found"][rank]


def check_alone(rank: int) -> None:
    """Processes that work alone do not wait for each other; then both are together again."""
    network, weights = nn.BatchNorm1d(3), nn.Linear(3, 2)
    with processes.alone():
        assert numbers() == (True, 2, 1, rank)
        assert processes.from_first(lambda: rank) == rank
        # unlike numbers of steps: whatever waited for the other would wait for ever
        for _ in range(1 + 2 * rank):
            own = processes.gather_rows(torch.full((2, 3), float(rank), requires_grad=True))
            loss = weights(network(own)).sum() + processes.total(torch.tensor(1.0))
            loss.backward()
            processes.average_gradients(weights.parameters())
            processes.share_buffers(network)
            processes.wait()
        assert torch.equal(own, torch.full((2, 3), float(rank)))
    assert processes.total(network.num_batches_tracked) == 1 + 3, "steps of both, counted together again"
    assert numbers() == (True, 2, 2, rank)


def check_errors(rank: int) -> None:
    """A user error of one process ends all; its own process prints it."""
    with pytest.raises(SystemExit) as end:
        cli.exit_cleanly(lambda _: processes.from_first(refuse), [])
    assert end.value.code == 2
    with pytest.raises((UserError, SystemExit)) as end:
        processes.from_first(refuse, source=1)
    assert repr(end.value) == ["SystemExit(2)", "UserError('refused by 1')"][rank]


# in one process -------------------------------------------------------------------------------------------------------


def assert_everything_hands_back_what_it_was_given() -> None:
    tensor = torch.arange(7.0, requires_grad=True)
    for function in (processes.gather_rows, processes.total, processes.piece):
        assert function(tensor) is tensor
    assert processes.mean_loss(tensor) is tensor and processes.piece_parts(tensor, [3, 4]) is tensor
    assert torch.equal(processes.gather_parts([tensor, tensor]), torch.cat([tensor, tensor]))
    tensor.grad = torch.arange(7.0)
    processes.average_gradients([tensor, torch.zeros(2, requires_grad=True)])
    assert torch.equal(tensor.grad, torch.arange(7.0))
    network = nn.Sequential(nn.BatchNorm2d(2))
    assert processes.parallel(network, CPU) is network
    assert processes.synchronised(network) is network and type(network[0]) is nn.BatchNorm2d
    processes.share_buffers(network)
    made = object()
    for source in (0, 1):
        assert processes.from_first(lambda: made, source) is made
    assert processes.first_alone(lambda: made) is made
    processes.wait()
    processes.stop()
    with pytest.raises(UserError, match=f"refused by {dist.get_rank() if dist.is_initialized() else 0}"):
        processes.from_first(refuse)
    processes.say("a word")


def test_in_one_process_everything_hands_back_what_it_was_given(capsys):
    assert numbers() == (False, 1, 1, 0)
    assert_everything_hands_back_what_it_was_given()
    assert capsys.readouterr().out == "a word\n"
    with processes.alone():
        assert numbers() == (False, 1, 1, 0)


def test_only_torchrun_makes_a_process_one_of_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some schedulers set it for their own ends
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert numbers() == (False, 1, 1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert numbers() == (True, 4, 1, 3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert numbers() == (False, 1, 1, 0)


@pytest.fixture
def two(monkeypatch) -> None:
    """This process believes that it is the second of two, and fails where it would wait for the first."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    for name in ("barrier", "all_gather", "all_reduce", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("waits for the other process"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("leaves the other process"))


@pytest.mark.usefixtures("two")
def test_alone_nothing_waits_for_another_process_and_everything_hands_back_what_it_was_given(capsys):
    assert (processes.world(), processes.rank()) == (2, 1)
    with processes.alone():
        assert (processes.world(), processes.rank()) == (1, 1)
        assert_everything_hands_back_what_it_was_given()
    assert capsys.readouterr().out == "", "the first process alone speaks"


@pytest.mark.usefixtures("two")
def test_after_alone_the_processes_share_the_work_again_whatever_happened_inside():
    with pytest.raises(KeyError), processes.alone():
        raise KeyError
    assert processes.world() == 2
    with processes.alone():
        with processes.alone():
            assert processes.world() == 1
        assert processes.world() == 1, "still inside the outer one"
        with pytest.raises(SystemExit), processes.alone():
            raise SystemExit
        assert processes.world() == 1
    assert processes.world() == 2
    assert torch.equal(processes.piece(torch.arange(4)), torch.tensor([2, 3]))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
