"""Passes over the data against plain loops: modes, warm-up and its masks, MixEMatch epochs, embeddings and logits by position."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu.device import Device
from manifold_dividemix import mixematch
from manifold_dividemix.choices import Lambdas
from manifold_dividemix.losses import symmetric_cross_entropy, warm_up_loss
from manifold_dividemix.mixematch import Views
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.training import (
    Step,
    all_logits,
    embed,
    set_mode,
    top_accuracy,
    train_divided,
    warm_up,
    without_single,
)
from tests.manifold_dividemix.toy import ToyEncoder
from tests.passes import K, N, images, labels, pass_over, seeded

CPU, BF16 = (Device(torch.device("cpu"), precision, "tests") for precision in ("fp32", "bf16"))


def narrow() -> Network:
    """With running statistics of its own."""
    torch.manual_seed(1)
    made = Network(make_encoder("resnet18", 1, 8), 64, K).train()
    with torch.no_grad():
        made.project(made(images().view(torch.arange(N))))
    return made


def kept() -> Tensor:
    return torch.rand(N, generator=seeded(8)) < 0.7


def shuffled() -> Tensor:
    return torch.randperm(N, generator=seeded(5))


def sgd(network: nn.Module) -> SGD:
    return SGD(network.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)


def descend(optimizer: SGD, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def near(network: nn.Module, twin: nn.Module) -> None:
    torch.testing.assert_close(network.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen_encoder", [False, True])
@pytest.mark.parametrize("warming_up", [False, True])
@pytest.mark.parametrize("mode", ["train", "frozen", "warm-up"])
def test_batch_norms_use_batch_statistics_where_the_mode_says(mode, warming_up, frozen_encoder):
    trains = mode == "train" or (mode == "warm-up" and warming_up)
    for before in (False, True):
        network = narrow().train(before)
        set_mode(network, mode, warming_up, frozen_encoder)
        norms = [m for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [norm.training for norm in norms] == [trains and not frozen_encoder] * 7
        assert network.projection_bn.training is network.training is trains


@pytest.mark.parametrize(
    ("mask", "loss", "training"),
    [("sample", "SCE", True), ("sample", "CE", False), ("batch", "SCE", False), ("all", "CE", True)],
)
def test_an_epoch_of_warm_up_is_that_of_a_plain_loop(mask, loss, training):
    """Two passes, the second with the momentum of the first; the last batch has two rows."""
    network = narrow().train(training)
    twin = copy.deepcopy(network)
    optimizer, plain, ratio = sgd(network), sgd(twin), float(kept().float().mean())
    batches = pass_over(shuffled(), 8)
    each_loss = {"SCE": symmetric_cross_entropy, "CE": partial(F.cross_entropy, reduction="none")}[loss]
    for _ in range(2):
        found = warm_up(network, optimizer, batches, labels(), kept(), CPU, loss=loss, mask=mask)
        expected = []
        for (batch,), index in batches:
            each = each_loss(twin.classify(twin(batch)), labels()[index])
            value = warm_up_loss(each, kept()[index], mask, ratio)
            descend(plain, value)
            expected.append(float(value.detach()))
        assert found.tolist() == pytest.approx(expected, rel=1e-3)
        assert not found.requires_grad
    near(network, twin)


@pytest.mark.parametrize("project", [False, True])
def test_a_last_batch_of_one_image_is_trained_on_in_the_warm_up(project):
    network = narrow()
    before = int(network.projection_bn.num_batches_tracked)
    batches = pass_over(torch.arange(9), 8)
    found = warm_up(network, sgd(network), batches, labels(), kept() | True, CPU, project=project)
    assert len(found) == 2 and torch.isfinite(found).all()
    # one sample has no batch statistics
    assert network.projection_bn.num_batches_tracked == before + project


def test_the_projections_batch_norm_collects_statistics_in_every_forward_pass_of_the_warm_up():
    """Two epochs of three batches, by hand: momentum 0.1, unbiased variance, embeddings before each step; then it is frozen."""
    torch.manual_seed(4)
    network = Network(ToyEncoder(16, 5), 5, K)
    twin, size = copy.deepcopy(network), network.projection.out_features
    views = torch.randn(N, 1, 4, 4, generator=seeded(3))
    batches = [((views[index],), index) for index in shuffled().split(9)]
    mean, var = torch.zeros(size), torch.ones(size)
    optimizer, plain = sgd(network), sgd(twin)
    for epoch in (1, 2):
        set_mode(network, "warm-up", True, False)
        warm_up(network, optimizer, batches, labels(), kept(), CPU, loss="CE", project=True)
        for (batch,), index in batches:
            h = twin(batch)
            projected = twin.projection(h).detach()
            mean = 0.9 * mean + 0.1 * projected.mean(dim=0)
            var = 0.9 * var + 0.1 * projected.var(dim=0)
            each = F.cross_entropy(twin.classify(h), labels()[index], reduction="none")
            descend(plain, (each * kept()[index]).mean())
        assert network.projection_bn.num_batches_tracked == 3 * epoch
        torch.testing.assert_close(network.projection_bn.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(network.projection_bn.running_var, var, rtol=1e-5, atol=1e-6)
    for name in ("projection.weight", "projection.bias", "projection_bn.weight", "projection_bn.bias"):
        assert torch.equal(network.state_dict()[name], twin.state_dict()[name]), name  # not trained
    set_mode(network, "warm-up", False, False)
    wanted = (network.projection(network(views)) - mean) / (var + network.projection_bn.eps).sqrt()
    torch.testing.assert_close(network.project(network(views)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "rce", "training"), [("RL", "log", True), ("RL", "released", False), ("CE", "log", True)]
)
def test_an_epoch_on_a_split_is_that_of_a_plain_loop(kind, rce, training):
    """Three labelled batches, the last smaller, and two unlabelled ones of which the first comes again."""
    labelled, unlabelled = pass_over(torch.arange(10), 4, 4), pass_over(torch.arange(10, 17), 5, 4)
    lams, rows = [0.2, 0.9, 0.6], []
    lambdas, ramp = Lambdas(1, 30, 2, 10, 0.5), lambda number: 0.1 * (1 + number)
    clean = torch.rand(N, generator=seeded(6), dtype=torch.float64)
    network = narrow().train(training)
    twin = copy.deepcopy(network)
    optimizer, plain = sgd(network), sgd(twin)
    endless, draws, generator = iter(2 * unlabelled), iter(lams), seeded(7)

    def permutation(count: int) -> Tensor:
        rows.append(count)
        return torch.randperm(count, generator=generator)

    shared = {"temperature": 0.4, "threshold": 0.6, "kind": kind, "rce": rce}
    step = Step(lambda: next(draws), permutation, ramp, lambdas, device=CPU, **shared)
    found = train_divided(network, optimizer, labelled, endless, step, labels=labels(), clean=clean)
    # as many steps as labelled batches, and no unlabelled one more than they need
    assert found.shape == (3, 7) and len(list(endless)) == 1
    assert rows == [2 * 9, 2 * 6, 2 * 7]

    generator = seeded(7)
    for number, ((x, index), (u, _)) in enumerate(zip(labelled, 2 * unlabelled, strict=False)):
        loss = mixematch.step_loss(
            twin,
            (Views(x[:2], x[2:]), labels()[index], clean[index]),
            Views(u[:2], u[2:]),
            lambdas=lambdas,
            ramp=ramp(number),
            lam=lams[number],
            permutation=torch.randperm(rows[number], generator=generator),
            **shared,
        )
        descend(plain, loss.total)
        expected = [float(part.detach()) for part in loss]
        assert found[number].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    near(network, twin)
    assert network.training is training and not found.requires_grad


def test_batches_of_one_sample_are_left_out_where_they_must_be():
    batches = [(f"views {n}", torch.arange(n)) for n in (3, 1, 2, 1, 1, 4)]
    assert [len(index) for _, index in without_single(iter(batches))] == [3, 2, 4]


@pytest.mark.parametrize(("order", "size"), [(torch.arange(N), 64), (shuffled(), 5), (shuffled(), 1)])
def test_one_pass_equals_separate_ones_whatever_the_order_of_the_batches(order, size):
    network = narrow()
    with torch.no_grad():
        h = copy.deepcopy(network).eval()(images().view(torch.arange(N)))
        logits = network.classify(h)
    expected = -logits.log_softmax(dim=1)[range(N), labels()]
    before = copy.deepcopy(network)
    embedded = embed(network, pass_over(order, size), labels(), CPU)
    torch.testing.assert_close(embedded.embeddings, h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedded.losses, expected, rtol=1e-4, atol=1e-5)
    assert embedded.hits.tolist() == (logits.argmax(dim=1) == labels()).tolist()
    assert embedded.hits.dtype == torch.bool and 0 < embedded.hits.sum() < N
    assert not embedded.embeddings.requires_grad and not embedded.losses.requires_grad
    assert not network.training
    near(network.train(), before)
    found = all_logits(network, pass_over(order, size), N, K, CPU)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert not network.training and not found.requires_grad


def test_losses_and_embeddings_are_float32_under_bfloat16():
    network = narrow()
    with torch.no_grad():
        network.classifier.weight.mul_(20)
    batches = pass_over(torch.arange(N), 8)
    embedded, exact = (embed(network, batches, labels(), device) for device in (BF16, CPU))
    assert embedded.embeddings.dtype == embedded.losses.dtype == torch.float32
    # not rounded to bfloat16 anywhere after the encoder
    losses = F.cross_entropy(network.classify(embedded.embeddings), labels(), reduction="none")
    torch.testing.assert_close(embedded.losses, losses, rtol=1e-5, atol=1e-6)
    assert (embedded.losses.bfloat16().float() != embedded.losses).sum() > N // 2
    difference = (embedded.embeddings - exact.embeddings).abs().max()
    assert 0 < difference < 0.05 * exact.embeddings.abs().max()
    assert all_logits(network, batches, N, K, BF16).dtype == torch.float32


def test_accuracy_is_in_percent_and_of_the_k_largest():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    wanted = torch.tensor([0, 2, 0, 1])
    assert [top_accuracy(logits, wanted, k) for k in (1, 2, 3, 5)] == [25, 50, 100, 100]
    assert top_accuracy(logits, wanted) == 25
