"""The loss of mixtures against torch's cross-entropy with soft targets, and where there is nothing to mix."""

import pytest
import torch
import torch.nn.functional as F

from afm.losses import mixed_loss, total_loss


def case(groups: int = 6, group_size: int = 3, classes: int = 4, seed: int = 0):
    """Logits [M, C], labels [M, K], weights [M, K]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups, classes, generator=generator)
    labels = torch.randint(classes, (groups, group_size), generator=generator)
    weights = torch.rand(groups, group_size, generator=generator)
    return logits.requires_grad_(), labels, (weights / weights.sum(dim=1, keepdim=True)).requires_grad_()


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_the_soft_target_is_the_weighted_label(group_size):
    logits, labels, weights = case(group_size=group_size)  # a class more than once in a group of six of four
    targets = (weights[:, :, None] * F.one_hot(labels, 4)).sum(dim=1)
    expected = F.cross_entropy(logits, targets)
    found = mixed_loss(logits, labels, weights)
    torch.testing.assert_close(found, expected)
    for ours, torchs in zip(
        torch.autograd.grad(found, (logits, weights)),
        torch.autograd.grad(expected, (logits, weights)),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs)


def test_both_counts_all_members_alike_whatever_their_weight():
    logits, labels, weights = case()
    expected = sum(F.cross_entropy(logits, labels[:, k]) for k in range(3)) / 3
    found = mixed_loss(logits, labels, weights, target="both")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mixed_loss(logits, labels, weights * 0, target="both"), expected)
    assert torch.autograd.grad(found, weights, allow_unused=True) == (None,)


def test_detach_stops_the_gradient_through_the_label_alone():
    logits, labels, weights = case()
    scaled = logits * weights[:, :1]  # the weights are in the feature too
    through_feature = mixed_loss(scaled, labels, weights.detach())
    detached = mixed_loss(scaled, labels, weights, detach_target=True)
    both = mixed_loss(scaled, labels, weights)
    assert through_feature == detached == both
    gradients = [
        torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in (through_feature, detached, both)
    ]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize("target", ["soft", "both"])
def test_no_group_costs_nothing_and_leaves_finite_gradients(target):
    logits, labels, weights = case(groups=0)
    loss = mixed_loss(logits, labels, weights, target)
    assert loss == 0
    loss.backward()
    assert logits.grad.shape == (0, 4)

    layer = torch.nn.Linear(5, 4)
    total = total_loss(
        mixed_loss(layer(torch.zeros(0, 5)), labels, weights, target), torch.tensor(0.0), 1.5, 0.5
    )
    total.backward()
    assert torch.equal(layer.weight.grad, torch.zeros(4, 5))


def test_extreme_logits_give_finite_losses():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    loss = mixed_loss(logits, torch.tensor([[0, 1], [0, 1]]), torch.full((2, 2), 0.5))
    assert loss == 1e4


def test_the_total_is_the_weighted_sum():
    assert total_loss(torch.tensor(2.0), torch.tensor(10.0), 1.5, 0.5) == 8


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="soft, both, got hard"):
        mixed_loss(*case(), target="hard")
