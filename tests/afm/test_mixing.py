"""Mixed features and targets of Figure 2, their loss against torch's cross-entropy with soft targets, and the total."""

import pytest
import torch
import torch.nn.functional as F

from afm.mixing import mixed_features, mixed_loss, target_weights, total_loss


def case(groups: int = 6, group_size: int = 3, classes: int = 4):
    """Logits [M, C], labels [M, K], weights [M, K]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(groups, classes, generator=generator)
    labels = torch.randint(classes, (groups, group_size), generator=generator)
    weights = torch.rand(groups, group_size, generator=generator)
    return logits.requires_grad_(), labels, (weights / weights.sum(dim=1, keepdim=True)).requires_grad_()


def test_mixtures_of_images():
    _, _, weights = case()
    members = torch.randn(6, 3, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    mixed = mixed_features(members, weights)
    for g in range(6):
        torch.testing.assert_close(mixed[g], sum(weights[g, k] * members[g, k] for k in range(3)))
    assert mixed_features(members[:0], weights[:0]).shape == (0, 3, 4, 5)


@pytest.mark.parametrize(("groups", "group_size"), [(6, 2), (1, 3), (6, 6)])
def test_the_soft_target_is_the_weighted_label(groups, group_size):
    logits, labels, weights = case(groups, group_size)  # a class more than once in a group of six of four
    expected = F.cross_entropy(logits, mixed_features(F.one_hot(labels, 4).float(), weights))
    found = mixed_loss(logits, labels, target_weights(weights))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (logits, weights)) for loss in (found, expected)))


def test_detach_stops_the_gradient_through_the_label_alone():
    logits, labels, weights = case()
    scaled = logits * weights[:, :1]  # the weights are in the feature too
    of_labels = (weights.detach(), target_weights(weights, detach=True), target_weights(weights))
    losses = [mixed_loss(scaled, labels, own) for own in of_labels]
    assert losses[0] == losses[1] == losses[2]
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_no_group_costs_nothing_and_leaves_finite_gradients():
    _, labels, weights = case(groups=0)
    layer = torch.nn.Linear(5, 4)
    loss = mixed_loss(layer(torch.zeros(0, 5)), labels, weights)
    assert loss == 0
    total_loss(loss, torch.tensor(0.0), 1.5, 0.5).backward()
    assert torch.equal(layer.weight.grad, torch.zeros(4, 5))


def test_extreme_logits_give_finite_losses():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert mixed_loss(logits, torch.tensor([[0, 1], [0, 1]]), torch.full((2, 2), 0.5)) == 1e4


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="soft, both, got hard"):
        target_weights(case()[2], "hard")
