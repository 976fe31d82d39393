"""The weighted loss of Clothing1M."""

import torch
import torch.nn.functional as F

from me_momentum.losses import prior_weights, weighted_cross_entropy


def test_a_class_without_training_or_validation_samples_has_weight_zero_and_still_counts_in_the_mean():
    weights = prior_weights(torch.tensor([0, 20, 40]), torch.tensor([5, 5, 5]))
    assert weights.tolist() == [0.0, 1.0, 0.5] and weights.dtype == torch.float32
    assert prior_weights(torch.tensor([10, 10]), torch.tensor([0, 8])).tolist() == [0.0, 2.0]


def test_the_loss_is_pytorchs_weighted_mean_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    labels, weights = torch.randint(5, (32,), generator=generator), torch.rand(5, generator=generator)
    logits = torch.randn(32, 5, generator=generator).requires_grad_()
    ours, theirs = weighted_cross_entropy(logits, labels, weights), F.cross_entropy(logits, labels, weights)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_a_batch_of_classes_without_weight_has_neither_loss_nor_gradient():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = weighted_cross_entropy(logits, torch.tensor([1, 1, 1, 1]), torch.tensor([1.0, 0.0, 2.0]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 3))
