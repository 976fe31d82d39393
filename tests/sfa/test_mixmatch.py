"""The semi-supervised step: targets, partners and guards against plain formulas."""

import torch
import torch.nn.functional as F
from torch import nn

from common.gpu.device import Device
from sfa import mixmatch
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


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_guessed_labels_are_the_mean_of_four_predictions_sharpened():
    network, peer, views = Linear(), Linear(), (rows(0, 7, 6), rows(1, 7, 6))
    mean = sum(F.softmax(n(v)[1], dim=1) for n in (network, peer) for v in views) / 4
    guessed = mixmatch.guess_labels(network, peer, views, 0.5)
    torch.testing.assert_close(guessed, (mean**2 / (mean**2).sum(1, keepdim=True)).detach())


def test_joining_the_peers_views_changes_nothing_in_evaluation_mode():
    peer, views = preact_resnet_narrow(K).eval(), [rows(seed, 6, 1, 8, 8) for seed in (0, 1)]
    torch.testing.assert_close(peer(torch.cat(views))[1], torch.cat([peer(view)[1] for view in views]))


def test_a_clean_sample_keeps_its_label_and_another_takes_the_mean_prediction():
    network, views = Linear(), (rows(0, 2, 6), rows(1, 2, 6))
    refined = mixmatch.refine_labels(network, views, torch.tensor([3, 3]), torch.tensor([1.0, 0.0]), 1.0)
    mean = sum(F.softmax(network(view)[1], dim=1) for view in views) / 2
    torch.testing.assert_close(refined[0], F.one_hot(torch.tensor(3), K).float())
    torch.testing.assert_close(refined[1], mean[1].detach())


def test_rows_that_are_not_forwarded_still_serve_as_partners():
    network, peer, views = Linear(), Linear(), (rows(0, 4, 6), rows(1, 4, 6))
    others = (rows(2, 4, 6), rows(3, 4, 6))
    settings = {"class_counts": torch.ones(K), "weight": 2.0, "lam": 0.3, "temperature": 0.5}
    settings |= {"permutation": torch.arange(15, -1, -1)}  # every labelled row meets an unlabelled one
    labelled = (views, torch.arange(4), torch.ones(4))
    first, second = (
        mixmatch.step_loss(network, peer, labelled, unlabelled, **settings, forward_unlabelled=False)
        for unlabelled in (others, tuple(view + 1 for view in others))
    )
    assert first.unlabelled == first.balanced_unlabelled == 0
    assert not torch.isclose(first.labelled, second.labelled)


def test_a_last_batch_of_one_row_trains():
    network, peer = preact_resnet_narrow(K), preact_resnet_narrow(K)
    view = rows(0, 1, 1, 8, 8)
    batch = [((view, view), torch.tensor([0]))]
    losses = train_semi(
        network,
        peer,
        torch.optim.SGD(network.parameters(), 0.01),
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
    assert losses.shape == (1, 5) and torch.isfinite(losses).all()
