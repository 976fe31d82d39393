"""What the recorded losses do not show: other forms, where losses must stay finite, and the ramp."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.gpu.device import Device
from manifold_dividemix import losses

K = 6
BF16 = Device(torch.device("cpu"), "bf16", "tests")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def simplex(count: int, generator: torch.Generator) -> Tensor:
    return torch.softmax(2 * torch.randn(count, K, generator=generator), dim=1)


def logits_and_labels(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(count, K, generator=generator)
    return logits, torch.randint(K, (count,), generator=generator)


def test_the_forms_of_the_labelled_loss_that_are_not_recorded(generator):
    logits, labels = logits_and_labels(4, generator)
    targets, mask = simplex(4, generator), torch.tensor([1.0, 0.25, 0.0, 0.7])
    targets[0] = F.one_hot(labels, K)[0].float()  # zeros are clipped
    p, log_t = logits.softmax(dim=1).clamp_min(1e-7), targets.clamp_min(1e-4).log()
    forward, reverse = -(targets * logits.log_softmax(dim=1)).sum(dim=1), -(p * log_t).sum(dim=1)
    for kind, rce, each in (
        ("RL", "log", forward + reverse),
        ("CE", "log", forward),
        ("CE", "released", forward),
    ):
        found = losses.labelled_loss(logits, targets, mask, kind, rce)
        torch.testing.assert_close(found, (mask * each).mean())


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


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


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
