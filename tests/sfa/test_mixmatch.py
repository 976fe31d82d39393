"""The semi-supervised step: guards, and its parts against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.gpu.device import Device
from sfa import losses, mixmatch
from sfa.networks import TwoHeads, preact_resnet_narrow
from sfa.training import train_semi

CPU = Device(torch.device("cpu"), "fp32", "tests")
K = 5


class Linear(nn.Module):
    """A network without batch norm, so that a step can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.heads = TwoHeads(6, K)

    def forward(self, x):
        return self.heads(x)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def settings(rows: int, **changes):
    given = {"class_counts": torch.ones(K), "weight": 2.0, "lam": 0.3, "temperature": 0.5}
    return given | {"permutation": torch.randperm(rows, generator=torch.Generator().manual_seed(1))} | changes


def test_sharpen_agrees_with_the_plain_formula_and_refuses_no_temperature(generator):
    p = torch.rand(8, K, generator=generator)
    p = p / p.sum(1, keepdim=True)
    assert torch.allclose(mixmatch.sharpen(p, 0.5), p**2 / (p**2).sum(1, keepdim=True), atol=1e-6)
    assert torch.allclose(mixmatch.sharpen(p, 1.0), p, atol=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        mixmatch.sharpen(p, 0)


def test_guessed_labels_are_the_mean_of_four_predictions_sharpened(generator):
    network, peer = Linear(), Linear()
    views = tuple(torch.randn(7, 6, generator=generator) for _ in range(2))
    mean = sum(F.softmax(n(v)[1], dim=1) for n in (network, peer) for v in views) / 4
    found = mixmatch.guess_labels(network, peer, views, 0.5)
    torch.testing.assert_close(found, (mean**2 / (mean**2).sum(1, keepdim=True)).detach())


def test_joining_the_peers_views_changes_nothing_in_evaluation_mode(generator):
    peer = preact_resnet_narrow(K).eval()
    views = [torch.randn(6, 1, 8, 8, generator=generator) for _ in range(2)]
    apart = torch.cat([peer(view)[1] for view in views])
    torch.testing.assert_close(peer(torch.cat(views))[1], apart)


def test_a_sample_known_to_be_clean_keeps_its_label_and_a_doubtful_one_takes_the_prediction(generator):
    network, labels = Linear(), torch.tensor([3, 3])
    views = (torch.randn(2, 6, generator=generator),) * 2
    found = mixmatch.refine_labels(network, views, labels, torch.tensor([1.0, 0.0]), temperature=1.0)
    torch.testing.assert_close(found[0], F.one_hot(torch.tensor(3), K).float())
    torch.testing.assert_close(found[1], F.softmax(network(views[0])[1], dim=1)[1].detach())


def test_the_losses_of_the_release_and_a_plain_loop_agree(generator):
    logits, targets = torch.randn(6, K, generator=generator), torch.rand(6, K, generator=generator)
    plain = -sum(float((targets[i] * F.log_softmax(logits[i], dim=0)).sum()) for i in range(6)) / 6
    assert float(losses.soft_cross_entropy(logits, targets)) == pytest.approx(plain, rel=1e-5)
    assert float(losses.prior_penalty(torch.zeros(3, K))) == pytest.approx(0, abs=1e-6)
    assert float(losses.prior_penalty(10 * torch.eye(K)[:1])) > 0


def test_a_class_without_selected_samples_gives_a_finite_loss(generator):
    logits = torch.randn(4, K, generator=generator, requires_grad=True)
    counts = torch.tensor([3, 0, 2, 0, 9])
    loss = losses.soft_cross_entropy(
        losses.balanced(logits, counts), F.one_hot(torch.tensor([0, 1, 2, 3]), K).float()
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert torch.equal(losses.balanced(logits, counts), losses.balanced(logits, counts.clamp_min(1)))


def test_without_doubtful_samples_only_labelled_terms_remain(generator):
    network, peer = Linear(), Linear()
    views, labels, clean = (
        tuple(torch.randn(4, 6, generator=generator) for _ in range(2)),
        torch.arange(4),
        torch.ones(4),
    )
    found = mixmatch.step_loss(network, peer, (views, labels, clean), None, **settings(8))
    assert found.unlabelled == 0 and found.balanced_unlabelled == 0
    assert torch.isfinite(found.total) and found.total.requires_grad


def test_rows_that_are_not_forwarded_still_serve_as_partners(generator):
    network, peer = Linear(), Linear()
    views, doubtful = (tuple(torch.randn(4, 6, generator=generator) for _ in range(2)) for _ in range(2))
    permutation = torch.arange(15, -1, -1)  # every labelled row meets an unlabelled one
    given = (views, torch.arange(4), torch.ones(4))
    run = lambda u: mixmatch.step_loss(  # noqa: E731
        network, peer, given, u, **settings(16, permutation=permutation), forward_unlabelled=False
    )
    first, second = run(doubtful), run(tuple(view + 1 for view in doubtful))
    assert first.unlabelled == 0
    assert not torch.isclose(first.labelled, second.labelled)


def test_a_last_batch_of_one_row_trains(generator):
    network, peer = preact_resnet_narrow(K), preact_resnet_narrow(K)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    view = torch.randn(1, 1, 8, 8, generator=generator)
    batch = [((view, view), torch.tensor([0]))]
    found = train_semi(
        network,
        peer,
        optimizer,
        batch,
        iter(batch),
        labels=torch.tensor([2]),
        clean=torch.tensor([0.9]),
        class_counts=torch.ones(K),
        weight=lambda step: 1.0,
        draw_lam=lambda: 0.5,
        draw_permutation=torch.randperm,
        temperature=0.5,
        device=CPU,
    )
    assert found.shape == (1, 5) and torch.isfinite(found).all()


def test_the_unlabelled_weight_ramps_over_sixteen_epochs():
    assert [losses.ramp_up(25, p, 30) for p in (30, 38, 46, 99)] == [0, 12.5, 25, 25]
