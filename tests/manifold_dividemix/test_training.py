"""Passes over the data against plain loops: modes, warm-up and its masks, MixEMatch epochs, looks and scores by position."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from manifold_dividemix import mixematch
from manifold_dividemix.mixematch import Views, Weights
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.training import (
    Step,
    all_logits,
    look,
    set_mode,
    top_accuracy,
    train_divided,
    warm_up,
    without_single,
)
from tests.manifold_dividemix.toy import ToyEncoder

CPU, BF16 = (Device(torch.device("cpu"), precision, "tests") for precision in ("fp32", "bf16"))
K, N = 4, 26


def narrow(seed: int = 1) -> Network:
    """With running statistics of its own."""
    torch.manual_seed(seed)
    made = Network(make_encoder("resnet18", 1, 8), 64, K, 16).train()
    with torch.no_grad():
        made.project(made(images().view(torch.arange(N))))
    return made


def images() -> Images:
    pixels = torch.randint(256, (N, 8, 8, 1), generator=torch.Generator().manual_seed(2)).byte()
    return Images(pixels.numpy(), (0.5,), (0.25,), torch.device("cpu"))


def labels() -> Tensor:
    return torch.randint(K, (N,), generator=torch.Generator().manual_seed(9))


def shuffled(seed: int = 5) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))


def pass_over(order: Tensor, size: int, views: int = 1) -> list:
    """Batches (views, index) in an order; of several views each is another image."""
    return [
        (tuple(images().view((index + k) % N) for k in range(views)), index) for index in order.split(size)
    ]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def sgd(network: nn.Module, lr: float = 0.02) -> SGD:
    return SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def near(network: nn.Module, twin: nn.Module) -> None:
    for (name, own), wanted in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5, msg=name)


# modes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_encoder", [False, True])
@pytest.mark.parametrize("warming_up", [False, True])
@pytest.mark.parametrize("mode", ["train", "frozen", "warm-up"])
@pytest.mark.parametrize("before", [False, True])
def test_batch_norms_take_the_statistics_of_batches_where_the_mode_says(
    mode, warming_up, frozen_encoder, before
):
    network = narrow().train(before)
    set_mode(network, mode, warming_up, frozen_encoder)
    trains = mode == "train" or (mode == "warm-up" and warming_up)
    norms = [m for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7
    assert {norm.training for norm in norms} == {trains and not frozen_encoder}
    assert network.projection_bn.training is network.training is trains
    statistics = state(network)
    with torch.no_grad():
        network.project(network(images().view(torch.arange(8))))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, statistics[name])}
    assert any(name.startswith("encoder.") for name in moved) is (trains and not frozen_encoder)
    assert any(name.startswith("projection_bn.running") for name in moved) is trains


# warm-up ----------------------------------------------------------------------------------------------------------------


def kept() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(8)) < 0.7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", ["SCE", "CE"])
@pytest.mark.parametrize("mask", ["sample", "batch", "all"])
def test_an_epoch_of_warm_up_is_that_of_a_plain_loop(mask, loss, training):
    """Two passes, of which the second goes on with the momentum of the first; the last batch has two rows."""
    network = narrow().train(training)
    twin = copy.deepcopy(network)
    optimizer, plain = sgd(network), sgd(twin)
    batches = pass_over(shuffled(), 8)
    for _ in range(2):
        found = warm_up(network, optimizer, batches, labels(), kept(), CPU, loss=loss, mask=mask)
        expected = []
        for (batch,), index in batches:
            p = F.softmax(twin.classify(twin(batch)), dim=1)
            each = -p[range(len(index)), labels()[index]].log()
            if loss == "SCE":
                one_hot = F.one_hot(labels()[index], K).float()
                each = each - (p.clamp(1e-7, 1) * one_hot.clamp(1e-4, 1).log()).sum(dim=1)
            if mask == "sample":
                value = (each * kept()[index]).sum() / len(index)
            else:
                share = kept()[index] if mask == "batch" else kept()
                value = each.mean() * share.sum() / len(share)
            plain.zero_grad()
            value.backward()
            plain.step()
            expected.append(float(value.detach()))
        assert found.tolist() == pytest.approx(expected, rel=1e-3)
        assert not found.requires_grad
    near(network, twin)


@pytest.mark.parametrize(("mask", "ignored"), [("sample", True), ("batch", False), ("all", False)])
def test_the_labels_of_removed_samples_are_ignored_in_the_sample_form_alone(mask, ignored):
    batches, other = pass_over(shuffled(), 8), torch.where(kept(), labels(), (labels() + 1) % K)
    trained = []
    for own in (labels(), other):
        network = narrow()
        warm_up(network, sgd(network), batches, own, kept(), CPU, mask=mask)
        trained.append(state(network))
    same = all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert same is ignored


def test_a_batch_of_removed_samples_alone_moves_no_weight():
    network = narrow()
    before = [p.clone() for p in network.parameters()]
    batches = pass_over(torch.arange(8), 8)
    found = warm_up(network, SGD(network.parameters(), 0.1), batches, labels(), torch.arange(N) > 7, CPU)
    assert found.tolist() == [0]
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


def test_the_projection_is_not_trained_in_the_warm_up():
    network = narrow()
    before = state(network)
    warm_up(network, sgd(network), pass_over(shuffled(), 8), labels(), kept(), CPU)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith("projection"), name


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
    network = Network(ToyEncoder(16, 5), 5, K, 6)
    twin, training = copy.deepcopy(network), torch.Generator().manual_seed(3)
    views = torch.randn(N, 1, 4, 4, generator=training)
    batches = [((views[index],), index) for index in shuffled().split(9)]
    assert [len(index) for _, index in batches] == [9, 9, 8]
    mean, var = torch.zeros(6), torch.ones(6)
    optimizer, plain = sgd(network, 0.1), sgd(twin, 0.1)
    for epoch in (1, 2):
        set_mode(network, "warm-up", True, False)
        warm_up(network, optimizer, batches, labels(), kept(), CPU, loss="CE", project=True)
        for (batch,), index in batches:
            h = twin(batch)
            projected = (h @ twin.projection.weight.T + twin.projection.bias).detach()
            centred = projected - projected.mean(dim=0)
            mean = 0.9 * mean + 0.1 * projected.mean(dim=0)
            var = 0.9 * var + 0.1 * (centred**2).sum(dim=0) / (len(index) - 1)
            each = F.cross_entropy(twin.classify(h), labels()[index], reduction="none")
            plain.zero_grad()
            (each * kept()[index]).mean().backward()
            plain.step()
        assert network.projection_bn.num_batches_tracked == 3 * epoch
        torch.testing.assert_close(network.projection_bn.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(network.projection_bn.running_var, var, rtol=1e-5, atol=1e-6)
    assert mean.abs().min() > 1e-3 and (var - 1).abs().min() > 1e-2
    for name in ("projection.weight", "projection.bias", "projection_bn.weight", "projection_bn.bias"):
        assert torch.equal(network.state_dict()[name], twin.state_dict()[name]), name  # not trained
    set_mode(network, "warm-up", False, False)
    h = network(views)
    wanted = (network.projection(h) - mean) / (var + network.projection_bn.eps).sqrt()
    torch.testing.assert_close(network.project(h), wanted, rtol=1e-4, atol=1e-5)


# MixEMatch --------------------------------------------------------------------------------------------------------------


def test_batches_of_one_sample_are_left_out_for_batch_norm():
    batches = [(f"views {n}", torch.arange(n)) for n in (3, 1, 2, 1, 1, 4)]
    assert [len(index) for _, index in without_single(iter(batches))] == [3, 2, 4]
    endless = Batches(
        images(), 5, subset=torch.arange(6), shuffle=True, generator=torch.Generator()
    ).endless()
    several = without_single(endless)
    assert [len(next(several)[1]) for _ in range(4)] == [5] * 4


def step_of(shares: list[float], rows: list[int], **changes) -> Step:
    """A step that mixes by the given shares, and notes the numbers of rows that permutations are drawn for."""
    draws, generator = iter(shares), torch.Generator().manual_seed(7)

    def permutation(count: int) -> Tensor:
        rows.append(count)
        return torch.randperm(count, generator=generator)

    step = Step(
        draw_share=lambda: next(draws),
        draw_permutation=permutation,
        ramp=lambda number: 0.1 * (1 + number),
        weights=Weights(1, 30, 2, 10, 0.5),
        temperature=0.4,
        threshold=0.6,
        kind="RL",
        rce="log",
        device=CPU,
    )
    return step._replace(**changes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "rce"), [("RL", "log"), ("RL", "released"), ("CE", "log")])
def test_an_epoch_on_a_split_is_that_of_a_plain_loop(kind, rce, training):
    """Three labelled batches, the last smaller, and two unlabelled ones of which the first comes again."""
    labelled, unlabelled = pass_over(torch.arange(10), 4, 4), pass_over(torch.arange(10, 17), 5, 4)
    shares, clean = (
        [0.2, 0.9, 0.6],
        torch.rand(N, generator=torch.Generator().manual_seed(6), dtype=torch.float64),
    )
    network, rows = narrow().train(training), []
    twin = copy.deepcopy(network)
    optimizer, plain = sgd(network), sgd(twin)
    given = [unlabelled[0], unlabelled[1], unlabelled[0], unlabelled[1]]
    endless = iter(given)
    step = step_of(shares, rows, kind=kind, rce=rce)
    found = train_divided(network, optimizer, labelled, endless, step, labels=labels(), clean=clean)
    # as many steps as labelled batches, and no unlabelled one more than they need
    assert found.shape == (3, 7) and len(list(endless)) == 1
    assert rows == [2 * 9, 2 * 6, 2 * 7]

    generator = torch.Generator().manual_seed(7)
    for number, ((views_x, index), (views_u, _)) in enumerate(zip(labelled, given, strict=False)):
        x, u = (Views(views[:2], views[2:]) for views in (views_x, views_u))
        targets = mixematch.make_targets(twin, x, u, labels()[index], clean[index], 0.4, 0.6)
        loss = mixematch.step_loss(
            twin, x, u, targets, share=shares[number], permutation=torch.randperm(rows[number], generator=generator),
            weights=Weights(1, 30, 2, 10, 0.5), ramp=0.1 * (1 + number), kind=kind, rce=rce,
        )  # fmt: skip
        plain.zero_grad()
        loss.total.backward()
        plain.step()
        assert found[number].tolist() == pytest.approx(
            [float(part.detach()) for part in loss], rel=1e-4, abs=1e-6
        )
    near(network, twin)
    assert network.training is training and not found.requires_grad


def test_there_are_as_many_steps_as_labelled_batches_however_many_unlabelled_ones():
    few = Batches(
        images(), 4, subset=torch.arange(9), augmentation=four, generator=torch.Generator(), shuffle=True
    )
    one = Batches(
        images(),
        4,
        subset=torch.tensor([20, 21]),
        augmentation=four,
        generator=torch.Generator(),
        shuffle=True,
    )
    for labelled, unlabelled, steps in ((few, one, 3), (one, few, 1)):
        network = narrow()
        found = train_divided(
            network, sgd(network, 1e-3), labelled, without_single(unlabelled.endless()), step_of([0.5] * 3, []),
            labels=labels(), clean=torch.full((N,), 0.5),
        )  # fmt: skip
        assert found.shape == (steps, 7) and torch.isfinite(found).all()


def four(batch: Tensor, _) -> Tensor:
    """Four views of a batch."""
    return torch.stack([batch, batch.flip(2), batch.flip(3), batch.flip(2, 3)])


def test_a_labelled_batch_of_one_image_trains():
    network = narrow()
    found = train_divided(
        network, sgd(network), pass_over(torch.arange(1), 1, 4), iter(pass_over(torch.arange(5, 7), 2, 4)),
        step_of([0.5], []), labels=labels(), clean=torch.full((N,), 0.5),
    )  # fmt: skip
    assert found.shape == (1, 7) and torch.isfinite(found).all()


def test_under_bfloat16_every_weight_learns_as_in_float32():
    """Targets come first, without gradients and in the same autocast: their casts must not serve the mixed batch."""
    gradients = {}
    for device in (CPU, BF16):
        network = narrow().eval()  # behind batch statistics some gradients are nothing but rounding
        train_divided(
            network, SGD(network.parameters(), 0.0), pass_over(torch.arange(16), 16, 4),
            iter(pass_over(torch.arange(10, 26), 16, 4)), step_of([0.3], [], device=device, threshold=0.0),
            labels=labels(), clean=torch.linspace(0, 1, N),
        )  # fmt: skip
        gradients[device] = {name: p.grad for name, p in network.named_parameters()}
    for name, gradient in gradients[CPU].items():
        assert gradients[BF16][name] is not None, name
        assert F.cosine_similarity(gradients[BF16][name].flatten(), gradient.flatten(), dim=0) > 0.9, name


# looks ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_pass(network: Network) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of all images at once, in evaluation mode."""
    twin = copy.deepcopy(network).eval()
    h = twin(images().view(torch.arange(N)))
    return h, F.linear(h, twin.classifier.weight, twin.classifier.bias)


def test_a_look_equals_separate_passes_whatever_the_order_of_the_batches():
    network = narrow()
    h, logits = plain_pass(network)
    expected = -logits.log_softmax(dim=1)[range(N), labels()]
    before = state(network)
    for order, size in ((torch.arange(N), 64), (torch.arange(N), 8), (shuffled(), 5), (shuffled(), 1)):
        network.train()
        seen = look(network, pass_over(order, size), labels(), CPU)
        torch.testing.assert_close(seen.embeddings, h, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.losses, expected, rtol=1e-4, atol=1e-5)
        assert seen.hits.tolist() == (logits.argmax(dim=1) == labels()).tolist()
        assert not seen.embeddings.requires_grad and not seen.losses.requires_grad and not network.training
    assert seen.hits.dtype == torch.bool and 0 < seen.hits.sum() < N
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    seen = look(network, Batches(images(), 7), labels(), CPU)
    torch.testing.assert_close(seen.losses, expected, rtol=1e-4, atol=1e-5)


def test_losses_and_embeddings_are_float32_under_bfloat16():
    network = narrow()
    with torch.no_grad():
        network.classifier.weight.mul_(20)
    seen = look(network, pass_over(torch.arange(N), 8), labels(), BF16)
    assert seen.embeddings.dtype == seen.losses.dtype == torch.float32
    # not rounded to bfloat16 anywhere after the encoder
    logits = network.classify(seen.embeddings)
    torch.testing.assert_close(
        seen.losses, F.cross_entropy(logits, labels(), reduction="none"), rtol=1e-5, atol=1e-6
    )
    assert (seen.losses.bfloat16().float() != seen.losses).sum() > N // 2
    h, _ = plain_pass(network)
    assert 0 < (seen.embeddings - h).abs().max() < 0.05 * h.abs().max()


def test_logits_of_the_test_come_by_position():
    network = narrow()
    _, expected = plain_pass(network)
    for order, size in ((torch.arange(N), 64), (shuffled(), 5)):
        network.train()
        found = all_logits(network, pass_over(order, size), N, K, CPU)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not network.training and not found.requires_grad
    assert all_logits(network, pass_over(shuffled(), 5), N, K, BF16).dtype == torch.float32


def test_accuracy_is_in_percent_and_of_the_k_largest():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    wanted = torch.tensor([0, 2, 0, 1])
    assert [top_accuracy(logits, wanted, k) for k in (1, 2, 3, 5)] == [25, 50, 100, 100]
    assert top_accuracy(logits, wanted) == 25
