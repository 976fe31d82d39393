"""Several processes give what one gives: the functions alone, and in two processes that torchrun starts once for all tests.

This file is also the script that the two processes run; each leaves what it saw in rank0.pt or rank1.pt.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.gpu import processes
from common.runs import cli
from common.runs.cli import UserError

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


def own_piece(rows: Tensor) -> Tensor:
    """A process's consecutive piece of a batch, as the loaders yield it."""
    return rows.chunk(processes.world())[processes.rank()]


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
    seen: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(STEPS):
        images, labels = batch(step)
        features, plain, mixed = network(own_piece(images))
        loss = F.cross_entropy(plain, labels) + 1.5 * F.cross_entropy(mixed, labels.roll(1))
        optimizer.zero_grad()
        loss.backward()
        seen["losses"].append(loss.detach())
        seen["gradients"].append(
            {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}
        )
        seen.setdefault("features", features.detach().clone())
        optimizer.step()
    seen["state"] = {name: value.clone() for name, value in whole.state_dict().items()}
    whole.eval()
    seen["evaluated"] = whole.backbone(batch(99)[0]).detach()
    return seen


def work(folder: Path) -> None:
    """Everything in turn; what was seen goes to rank<N>.pt below folder."""
    seen: dict[str, Any] = {"before": numbers()}
    processes.start(CPU)
    seen["after"] = numbers()
    rank = processes.rank()
    processes.say(f"said by {rank}")
    seen |= rows(rank) | networks() | alone(rank, folder) | by_itself(rank)
    try:
        cli.exit_cleanly(lambda _: processes.from_first(refuse), [])
    except SystemExit as end:
        seen["status"] = end.code
    try:
        processes.from_first(refuse, source=1)
    except (UserError, SystemExit) as end:
        seen["refused_by_second"] = repr(end)
    processes.wait()
    processes.stop()
    seen["stopped"] = numbers()
    torch.save(seen, folder / f"rank{rank}.pt")


def numbers() -> tuple:
    return processes.launched(), processes.planned(), processes.world(), processes.rank()


def refuse() -> None:
    raise UserError(f"refused by {processes.rank()}")


def rows(rank: int) -> dict[str, Any]:
    """Rows of a batch cut, gathered and summed."""
    seen: dict[str, Any] = {}
    whole = torch.arange(24).view(ROWS, 3)
    seen["piece"] = own_piece(whole)
    seen["gathered"] = processes.gather_rows(seen["piece"])
    turned = torch.arange(24.0).view(3, ROWS).t()  # rows that do not lie one after another in memory
    seen["gathered_turned"] = processes.gather_rows(own_piece(turned))
    leaf = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = processes.gather_rows(leaf)
    (gathered * torch.arange(12.0).view(4, 3)).sum().backward()
    seen["gathered_leaf"], seen["gradient"] = gathered.detach(), leaf.grad
    own = torch.tensor([1.0, 10.0**rank], requires_grad=True)
    seen["total"], seen["kept"] = processes.total(own), own.detach()
    seen["pieces"] = [processes.piece(rows) for rows in (whole, turned)]
    parts = [10 * rank + torch.arange(float(size)) for size in (2, 1, 3)]
    seen["parts"] = processes.gather_parts(parts)
    seen["own_parts"] = processes.piece_parts(seen["parts"], [2, 1, 3])
    loss = torch.tensor(1.0 + 3 * rank, requires_grad=True)
    mean = processes.mean_loss(2 * loss)
    mean.backward()
    seen["mean"], seen["mean_gradient"] = mean.detach(), loss.grad
    return seen


def networks() -> dict[str, Any]:
    """Networks trained by two processes."""
    seen: dict[str, Any] = {}
    network = make_network()
    before = {name: value.data_ptr() for name, value in network.state_dict(keep_vars=True).items()}
    synchronised = processes.synchronised(network)
    after = {name: value.data_ptr() for name, value in network.state_dict(keep_vars=True).items()}
    seen["same_tensors"] = synchronised is network and before == after
    seen["plain_layers"] = sum(type(layer) is nn.BatchNorm2d for layer in network.modules())
    parallel = processes.parallel(network, CPU, unused_parameters=True)
    seen["wrapped"] = isinstance(parallel, DistributedDataParallel) and parallel.module is network
    seen["synchronised"] = train(parallel, network)

    layer = processes.synchronised(nn.Sequential(nn.BatchNorm2d(4)))
    images = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(5))
    half = own_piece(images.bfloat16())
    try:
        with torch.autocast("cpu", torch.bfloat16):
            seen["half"] = layer(half).detach()
    except RuntimeError as error:
        seen["half"] = str(error)

    shared = nn.BatchNorm2d(2)
    with torch.no_grad():
        for tensor in (*shared.buffers(), *shared.parameters()):
            tensor.fill_(processes.rank() + 5)
    seen["averaged"], seen["loss_gradients"] = averaged(), passes()

    processes.share_buffers(shared)
    seen["shared"] = {name: value.clone() for name, value in shared.state_dict().items()}
    return seen


def averaged() -> list[Tensor | None]:
    """Gradients of several shapes, layouts and types, some of them missing, averaged."""
    shapes = ((), (3,), (2, 3), (2, 2, 3, 3))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters += [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(4))]
    for number, parameter in enumerate(parameters[:-1]):
        values = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        parameter.grad = (values + 10 * number) * (1 + 2 * processes.rank())
    parameters[3].grad = parameters[3].grad.contiguous(memory_format=torch.channels_last)
    before = [parameter.grad for parameter in parameters]
    processes.average_gradients(iter(parameters))
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, before, strict=True)), "in place"
    processes.average_gradients([parameters[-1]])  # none has a gradient
    return [parameter.grad for parameter in parameters]


def passes() -> list[Tensor]:
    """Gradients of one loss of two passes, each on a piece of the batch: without DistributedDataParallel."""
    network = make_network()
    network.unused = None
    images, labels = batch(0)
    first, second = (
        network.head(processes.gather_rows(encode(network, view))) for view in (images, images.flip(3))
    )
    (F.cross_entropy(first, labels) + (first - second).square().mean()).backward()
    processes.average_gradients(network.parameters())
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def encode(network: Mixing, images: Tensor) -> Tensor:
    """Features of this process's piece, by the running statistics, which every process has alike."""
    return network.backbone.eval()(processes.piece(images))


def alone(rank: int, folder: Path) -> dict[str, Any]:
    """What the first process does for all, or before all."""
    calls = []

    def make() -> dict[str, int]:
        calls.append(rank)
        return {"made_by": rank}

    def fetch() -> str:
        file = folder / "fetched"
        if file.exists():
            return f"{rank} found it"
        time.sleep(0.5)  # the other process would be here by now
        file.write_text("fetched")
        return f"{rank} fetched it"

    made = processes.from_first(make)
    seen = {"from_first": made, "calls": list(calls), "first_alone": processes.first_alone(fetch)}
    return seen | {
        "from_second": processes.from_first(make, source=1),
        "calls_for_second": calls[len(seen["calls"]) :],
    }


def by_itself(rank: int) -> dict[str, Any]:
    """What each process does while the other does something else; then both together again."""
    network = nn.BatchNorm1d(3)
    weights = nn.Linear(3, 2)
    with processes.alone():
        seen: dict[str, Any] = {"numbers_alone": numbers(), "made_alone": processes.from_first(lambda: rank)}
        # unlike numbers of steps: whatever waited for the other would wait for ever
        for _ in range(1 + 2 * rank):
            own = processes.gather_rows(torch.full((2, 3), float(rank), requires_grad=True))
            loss = weights(network(own)).sum() + processes.total(torch.tensor(1.0))
            loss.backward()
            processes.average_gradients(weights.parameters())
            processes.share_buffers(network)
            processes.wait()
        seen["rows_alone"] = own.detach()
    seen["steps"] = processes.total(network.num_batches_tracked)
    return seen | {"numbers_afterwards": numbers()}


@pytest.fixture(scope="module", params=[pytest.param("two", marks=pytest.mark.slow)])
def launch(tmp_path_factory) -> tuple[list[dict], subprocess.CompletedProcess]:
    """What each of two processes saw, and what they printed."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)], ended


@pytest.fixture(scope="module")
def both(launch) -> list[dict]:
    return launch[0]


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


def test_the_processes_know_their_number_before_and_after_they_join_and_only_the_first_speaks(launch):
    for rank, seen in enumerate(launch[0]):
        assert seen["before"] == seen["stopped"] == (True, 2, 1, rank)
        assert seen["after"] == (True, 2, 2, rank)
    assert launch[1].stdout == "said by 0\n"


def test_pieces_of_a_batch_are_consecutive_and_gather_to_the_batch(both):
    whole = torch.arange(24).view(ROWS, 3)
    turned = torch.arange(24.0).view(3, ROWS).t()
    for seen, piece in zip(both, whole.split(ROWS // 2), strict=True):
        assert torch.equal(seen["piece"], piece)
        assert torch.equal(seen["gathered"], whole)
        assert torch.equal(seen["gathered_turned"], turned)
    for rank, seen in enumerate(both):
        own = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        assert all(
            torch.equal(piece, rows[own]) for piece, rows in zip(seen["pieces"], (whole, turned), strict=True)
        )


def test_gathered_rows_have_the_gradient_of_the_own_piece_times_the_processes(both):
    weights = torch.arange(12.0).view(4, 3)
    for rank, seen in enumerate(both):
        assert torch.equal(seen["gathered_leaf"], torch.tensor([0.0, 0, 1, 1])[:, None].expand(4, 3))
        assert torch.equal(seen["gradient"], 2 * weights[2 * rank : 2 * rank + 2])


def test_sums_parts_and_means_over_processes(both):
    """Parts of 2, 1 and 3 rows are gathered one after another; a mean loss has the gradient of the own one."""
    for rank, seen in enumerate(both):
        assert seen["total"].tolist() == [2, 11] and not seen["total"].requires_grad
        assert seen["kept"].tolist() == [1, 10**rank]
        assert seen["parts"].tolist() == [0, 1, 10, 11, 0, 10, 0, 1, 2, 10, 11, 12]
        assert seen["own_parts"].tolist() == [10 * rank + row for row in (0, 1, 0, 0, 1, 2)]
        assert (seen["mean"], seen["mean_gradient"]) == (5, 2)


def assert_close(found, expected) -> None:
    """Equal but for rounding in double precision."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The same steps in this process, on whole batches, by torch's own batch normalisation."""
    network = make_network()
    return train(network, network)


def test_two_processes_compute_the_losses_gradients_and_features_of_the_whole_batch(both, expected):
    for found in (seen["synchronised"] for seen in both):
        assert_close(found["features"], expected["features"])
        assert_close(found["losses"], expected["losses"])
        for step in range(STEPS):
            gradients = found["gradients"][step]
            # DistributedDataParallel may leave zeros where one process leaves nothing
            assert all(
                (gradients.pop(name, torch.zeros(1)) == 0).all() for name in ("unused.weight", "unused.bias")
            )
            assert_close(gradients, expected["gradients"][step])
    assert len(expected["gradients"][0]) == 11, "every weight of the network but the unused ones"


def test_running_statistics_are_those_of_whole_batches_and_are_used_in_evaluation(both, expected):
    untrained = make_network().state_dict()
    for found in (seen["synchronised"] for seen in both):
        assert list(found["state"]) == list(untrained)
        assert_close(found["state"], expected["state"])
        assert_close(found["evaluated"], expected["evaluated"])
    moved = [name for name in untrained if "running" in name or "tracked" in name]
    assert len(moved) == 6
    assert not any(torch.equal(untrained[name], expected["state"][name]) for name in moved)


def test_without_synchronisation_the_statistics_would_be_others(expected):
    """The halves of the batch differ enough for the tests above to notice."""
    layers = make_network().backbone
    halves = torch.cat([layers(half) for half in batch(0)[0].chunk(2)])
    assert (halves - expected["features"]).abs().max() > 0.1


def test_synchronising_replaces_the_layers_keeps_their_tensors_and_both_hold_the_same_network(both):
    for seen in both:
        assert seen["same_tensors"] and seen["plain_layers"] == 0 and seen["wrapped"]
    first, second = (seen["synchronised"]["state"] for seen in both)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_normalisation_under_autocast_is_that_of_one_process(both):
    images = torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.BatchNorm2d(4)(images.bfloat16()).detach().float()
    for seen, piece in zip(both, expected.chunk(2), strict=True):
        assert isinstance(seen["half"], Tensor), seen["half"]
        torch.testing.assert_close(seen["half"].float(), piece, rtol=0.02, atol=0.02)


def test_gradients_are_averaged_over_processes_each_in_its_own_shape_and_type(both):
    for seen in both:
        *found, missing = seen["averaged"]
        assert missing is None
        for number, gradient in enumerate(found):
            expected = 2 * (
                torch.arange(gradient.numel()).view(gradient.shape) + 10 * number
            )  # of 1 and 3 times
            assert torch.equal(gradient, expected.to(gradient.dtype))
        assert [gradient.dtype for gradient in found] == [torch.float32] * 4 + [torch.float64]
        assert [gradient.shape for gradient in found] == [(), (3,), (2, 3), (2, 2, 3, 3), (2,)]
        assert found[3].is_contiguous(memory_format=torch.channels_last)


def test_averaged_gradients_of_pieces_are_those_of_the_whole_batch(both):
    expected = passes()
    assert len(expected) == 9, "all but the attention's"
    for seen in both:
        assert_close(seen["loss_gradients"], expected)


def test_buffers_are_shared_and_weights_are_not(both):
    for rank, seen in enumerate(both):
        state = seen["shared"]
        assert all(
            (state[name] == 5).all() for name in ("running_mean", "running_var", "num_batches_tracked")
        )
        assert all((state[name] == rank + 5).all() for name in ("weight", "bias"))


def test_one_process_makes_it_for_all_or_before_all(both):
    assert [seen["from_first"] for seen in both] == [{"made_by": 0}] * 2
    assert [seen["calls"] for seen in both] == [[0], []]
    assert [seen["from_second"] for seen in both] == [{"made_by": 1}] * 2
    assert [seen["calls_for_second"] for seen in both] == [[], [1]]
    assert [seen["first_alone"] for seen in both] == ["0 fetched it", "1 found it"]


def test_processes_that_work_alone_do_not_wait_for_each_other(both):
    for rank, seen in enumerate(both):
        assert seen["numbers_alone"] == (True, 2, 1, rank)
        assert seen["made_alone"] == rank
        assert torch.equal(seen["rows_alone"], torch.full((2, 3), float(rank)))
        assert seen["steps"].item() == 1 + 3, "steps of both, counted together again"
        assert seen["numbers_afterwards"] == (True, 2, 2, rank)


def test_a_user_error_of_one_process_ends_all_and_is_told_once(launch):
    seen, ended = launch
    assert [rank["status"] for rank in seen] == [2, 2]
    assert ended.stderr.count("error: refused by 0") == 1 and "refused by 1" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [rank["refused_by_second"] for rank in seen] == ["SystemExit(2)", "UserError('refused by 1')"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
