"""The losses against plain sums over Python's numbers, where they must stay finite, and the schedules."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu.device import Device
from common.pretraining.simclr import nt_xent
from manifold_dividemix import losses

K = 6
BF16 = Device(torch.device("cpu"), "bf16", "tests")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def plain_softmax(logits: Tensor) -> list[list[float]]:
    rows = []
    for row in logits.tolist():
        exponentials = [math.exp(s - max(row)) for s in row]
        rows.append([e / sum(exponentials) for e in exponentials])
    return rows


def simplex(count: int, generator: torch.Generator) -> Tensor:
    return torch.softmax(2 * torch.randn(count, K, generator=generator), dim=1)


def logits_and_labels(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(count, K, generator=generator)
    return logits, torch.randint(K, (count,), generator=generator)


# symmetric cross-entropy ------------------------------------------------------------------------------------------------


def test_hard_symmetric_cross_entropy_is_ce_and_the_clipped_reverse_one(generator):
    logits, labels = logits_and_labels(7, generator)
    expected = []
    for p, label in zip(plain_softmax(logits), labels.tolist(), strict=True):
        reverse = -sum(max(p[c], 1e-7) * math.log(1.0 if c == label else 1e-4) for c in range(K))
        expected.append(-math.log(p[label]) + reverse)
    found = losses.symmetric_cross_entropy(logits, labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    hard = F.one_hot(labels, K).float()
    torch.testing.assert_close(losses.soft_symmetric_cross_entropy(logits, hard, "log"), found)


def plain_reverse(p: list[float], targets: list[float], rce: str) -> float:
    """The reverse part of a row, by the form of that name."""
    if rce == "log":
        logs = [math.log(max(t, 1e-4)) for t in targets]
    else:
        clipped = [max(t, 1e-7) for t in targets]
        logs = [t - math.log(sum(map(math.exp, clipped))) for t in clipped]
    return -sum(max(q, 1e-7) * own for q, own in zip(p, logs, strict=True))


@pytest.mark.parametrize("rce", ["log", "released"])
@pytest.mark.parametrize("kind", ["RL", "CE"])
def test_the_labelled_loss_is_the_mean_over_all_rows_of_mask_times_loss(kind, rce, generator):
    logits, labels = logits_and_labels(4, generator)
    targets, mask = simplex(4, generator), [1.0, 0.25, 0.0, 0.7]
    targets[0] = F.one_hot(labels, K)[0].float()  # zeros are clipped
    expected = 0.0
    for p, t, m in zip(plain_softmax(logits), targets.tolist(), mask, strict=True):
        each = -sum(a * math.log(b) for a, b in zip(t, p, strict=True))
        expected += m * (each + (plain_reverse(p, t, rce) if kind == "RL" else 0)) / 4
    found = losses.labelled_loss(logits, targets, torch.tensor(mask), kind, rce)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    if (kind, rce) == ("RL", "released"):
        assert losses.labelled_loss(logits, targets, torch.tensor(mask)) == found, "the default"


def test_the_released_reverse_part_hardly_penalises_anything(generator):
    logits, _ = logits_and_labels(200, generator)
    targets = simplex(200, generator)
    forward = losses.soft_cross_entropy(logits, targets)
    reverse = losses.soft_symmetric_cross_entropy(logits, targets) - forward
    assert (reverse - math.log(K)).abs().max() < 1.05
    assert (losses.soft_symmetric_cross_entropy(logits, targets, "log") - forward).max() > 4


# the masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "value", "gradient"),
    [
        # divided by the rows of the batch, not by those that are kept
        ("sample", 10 / 4, [0.25, 0, 0.25, 0.25]),
        ("batch", 3 * 0.75, [0.75 / 4] * 4),
        ("all", 3 * 0.9, [0.9 / 4] * 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_removed_sample_has_no_gradient_in_the_sample_form_alone(mask, value, gradient, dtype):
    each = torch.tensor([1.0, 2.0, 3.0, 6.0], requires_grad=True)
    found = losses.warm_up_loss(each, torch.tensor([1, 0, 1, 1]).to(dtype), mask, 0.9)
    found.backward()
    assert float(found.detach()) == pytest.approx(value) and found.dtype == torch.float32
    assert each.grad.tolist() == pytest.approx(gradient)


def test_the_unlabelled_loss_is_the_mean_over_all_rows_of_mask_times_squared_error(generator):
    logits, _ = logits_and_labels(4, generator)
    targets, mask = simplex(4, generator), torch.tensor([1.0, 0.25, 0.0, 0.7])
    expected = 0.0
    for p, t, m in zip(plain_softmax(logits), targets.tolist(), mask.tolist(), strict=True):
        expected += m * sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / K / 4
    assert float(losses.unlabelled_loss(logits, targets, mask)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.labelled_loss, losses.unlabelled_loss])
def test_masked_rows_have_no_gradient_and_the_others_one_through_the_softmax(loss, generator):
    logits, _ = logits_and_labels(4, generator)
    logits.requires_grad_()
    loss(logits, simplex(4, generator), torch.tensor([1.0, 0.0, 0.5, 0.0])).backward()
    assert (logits.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True, False]
    # a softmax does not change when all logits of a row do
    torch.testing.assert_close(logits.grad.sum(dim=1), torch.zeros(4), rtol=0, atol=1e-6)


# contrastive loss -------------------------------------------------------------------------------------------------------


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_the_contrastive_loss_is_nt_xent_of_the_pre_training_with_its_gradient(temperature):
    own, other = (unit_rows(9, 2, 16).requires_grad_() for _ in range(2))
    found, expected = losses.contrastive_loss(own, temperature), nt_xent(other, temperature, temperature)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert (losses.contrastive_loss(own) == found) == (temperature == 0.05), "the temperature of training"


def test_contrastive_loss_stays_finite_at_the_ends():
    alike, apart = torch.ones(4, 2, 8) / math.sqrt(8), torch.eye(8)[:4].unsqueeze(1).repeat(1, 2, 1)
    opposite, one = torch.stack([alike[:, 0], -alike[:, 0]], dim=1), unit_rows(1, 2, 8)
    for features, value in ((alike, math.log(7)), (apart, 0), (opposite, None), (one, 0)):
        features.requires_grad_()
        loss = losses.contrastive_loss(features)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(features.grad).all()
        assert value is None or float(loss.detach()) == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert (one.grad == 0).all()


def test_autocast_does_not_lower_the_precision_of_any_loss(generator):
    logits, labels = logits_and_labels(16, generator)
    targets, mask = simplex(16, generator), torch.rand(16, generator=generator)
    features = unit_rows(16, 2, 32)

    def all_of_them() -> list[Tensor]:
        return [
            losses.contrastive_loss(features),
            losses.balance_penalty(logits),
            losses.symmetric_cross_entropy(logits, labels),
            losses.labelled_loss(logits, targets, mask),
            losses.labelled_loss(logits, targets, mask, "CE"),
            losses.unlabelled_loss(logits, targets, mask),
        ]

    expected = all_of_them()
    with BF16.autocast():
        found = all_of_them()
    for own, wanted in zip(found, expected, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-7)


# penalty ----------------------------------------------------------------------------------------------------------------


def test_the_penalty_compares_the_mean_prediction_with_the_uniform_one(generator):
    logits, _ = logits_and_labels(5, generator)
    mean = [sum(column) / 5 for column in zip(*plain_softmax(logits), strict=True)]
    expected = sum(math.log(1 / K / p) / K for p in mean)
    assert float(losses.balance_penalty(logits)) == pytest.approx(expected, rel=1e-5)
    # each sample is sure, but of another class
    assert float(losses.balance_penalty(50 * torch.eye(K))) == pytest.approx(0, abs=1e-6)


def test_the_penalty_does_not_underflow_where_a_class_is_never_predicted():
    logits = torch.zeros(8, K)
    logits[:, 0] = 1000  # all other mean predictions are exp(-1000), 0 in float32 and in float64
    logits.requires_grad_()
    penalty = losses.balance_penalty(logits)
    assert float(penalty.detach()) == pytest.approx(5 / 6 * 1000 - math.log(K), rel=1e-5)
    penalty.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("top", [0, 1])
@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: losses.symmetric_cross_entropy(logits, torch.tensor([0])).sum(),
        lambda logits: losses.soft_symmetric_cross_entropy(logits, torch.eye(K)[:1]).sum(),
        lambda logits: losses.soft_symmetric_cross_entropy(logits, torch.eye(K)[:1], "log").sum(),
        lambda logits: losses.unlabelled_loss(logits, torch.eye(K)[:1], torch.ones(1)),
    ],
)
def test_losses_and_gradients_of_extreme_logits_are_finite(loss, top):
    logits = torch.zeros(1, K)
    logits[0, top] = 1e4  # every other probability is 0 in float32
    logits.requires_grad_()
    value = loss(logits)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


# schedules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "ramp"), [(0, 0), (10, 0), (10.5, 1 / 32), (14, 0.25), (26, 1), (300, 1)]
)
def test_the_unlabelled_weight_rises_over_sixteen_epochs_after_the_warm_up(position, ramp):
    assert losses.ramp_up(position, 10) == pytest.approx(ramp, abs=1e-12)


def test_the_position_counts_steps_and_as_released_the_finished_epochs_twice():
    assert [losses.position(12, step, 4) for step in range(4)] == [12, 12.25, 12.5, 12.75]
    assert [losses.position(12, step, 4, "released") for step in range(4)] == [24, 24.25, 24.5, 24.75]
    # with a warm-up of 20 the released ramp ends before it starts, with one of 10 it starts at 0.625 (README, difference 3)
    assert losses.ramp_up(losses.position(20, 0, 100, "released"), 20) == 1
    begins = [losses.ramp_up(losses.position(epoch, 0, 100, "released"), 10) for epoch in (10, 13)]
    assert begins == [0.625, 1]


@pytest.mark.parametrize(("labelled", "steps", "released"), [(7, 2, 2), (8, 2, 3), (9, 3, 3)])
def test_the_release_counts_a_step_too_many_where_the_batch_size_divides(labelled, steps, released):
    assert losses.ramp_steps(labelled, 4, steps) == steps
    assert losses.ramp_steps(labelled, 4, steps, "released") == released


def test_learning_rates_are_a_cosine_from_the_base_over_all_epochs():
    half = math.sqrt(0.5)
    rates = [losses.learning_rate(epoch, 0.2, 4) for epoch in range(4)]
    assert rates == pytest.approx([0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half)])
