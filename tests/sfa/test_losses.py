"""The losses against formulas in NumPy, row by row and class by class; their limits and their gradients.

The warm-up loss and that of mixed rows: test_golden.py and test_training.py.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfa import Train_cifar, losses, robust_losses
from sfa.mixmatch import semi_loss

COUNTS = [400, 90, 30, 7, 1]
N, K = 6, len(COUNTS)
LABELS = torch.tensor([0, 1, 2, 3, 4, 3])

# the settings are not the defaults, so that each of them matters
LOSSES = {
    "ce": losses.cross_entropy,
    "balanced_softmax": robust_losses.balanced_softmax,
    "logit_adjusted": partial(robust_losses.logit_adjusted, tau=0.6),
    "ldam": partial(robust_losses.ldam, largest_margin=0.4, scale=7),
    "gce": partial(robust_losses.generalised_cross_entropy, q=0.3),
    "sce": partial(robust_losses.symmetric_cross_entropy, ce_weight=0.7, rce_weight=1.3),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - math.log(sum(math.exp(other - z.max()) for other in z))


def hard(name: str, z: np.ndarray, y: int, counts: list[float]) -> float:
    """The loss of one row of logits whose label is y, with the settings of LOSSES."""
    log_p = log_softmax(z)
    if name == "ce":
        return -log_p[y]
    if name in ("balanced_softmax", "logit_adjusted"):
        tau = 1 if name == "balanced_softmax" else 0.6
        weighed = [n**tau * math.exp(own) for n, own in zip(counts, z, strict=True)]
        return -math.log(weighed[y] / sum(weighed))
    if name == "ldam":
        margins = [1 / n**0.25 for n in counts]
        reduced = z.copy()
        reduced[y] -= 7 * 0.4 * margins[y] / max(margins)
        return -log_softmax(reduced)[y]
    assert name == "gce"
    return (1 - math.exp(log_p[y]) ** 0.3) / 0.3


def soft(name: str, z: np.ndarray, t: np.ndarray, counts: list[float]) -> float:
    """The hard form of every class, weighted by the target; SCE: cross-entropies H(t, p) and H(p, t), log t >= log 1e-4."""
    if name == "sce":
        log_p = log_softmax(z)
        reverse = -sum(math.exp(log_p[k]) * math.log(max(t[k], 1e-4)) for k in range(len(z)))
        return 0.7 * -float(t @ log_p) + 1.3 * reverse
    return sum(t[k] * hard(name, z, k, counts) for k in range(len(z)))


def random_logits(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_targets() -> torch.Tensor:
    """Rows on the simplex; the first is sharp: some of its entries are below 1e-4."""
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[0] *= 20
    return torch.softmax(logits, dim=1)


def one_hot(labels: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    return F.one_hot(labels, K).to(dtype)


TARGETS = {"soft": random_targets(), "hard": one_hot(LABELS)}


@each_loss
@pytest.mark.parametrize("kind", TARGETS)
def test_losses_agree_with_the_formula_and_gradients_with_differences(name, kind):
    logits, targets, counts = random_logits().requires_grad_(), TARGETS[kind], torch.tensor(COUNTS)
    pairs = zip(logits.detach().numpy(), targets.numpy(), strict=True)
    expected = np.mean([soft(name, z, t, COUNTS) for z, t in pairs])
    loss = LOSSES[name](logits, targets, counts)
    assert loss.shape == () and float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, targets, counts), logits)
    for dtype in (torch.int64, torch.float32):
        single = LOSSES[name](logits.detach().float(), targets.float(), torch.tensor(COUNTS, dtype=dtype))
        assert single.dtype == torch.float32 and float(single) == pytest.approx(expected, rel=1e-5)


@each_loss
@pytest.mark.parametrize("kind", TARGETS)
def test_extreme_logits_give_finite_losses_and_gradients(name, kind):
    logits = torch.zeros(4, K)
    logits[0, 0], logits[1, 1], logits[3] = 1e4, -1e4, -1e4
    logits[2] = torch.tensor([1e4, -1e4, 1e4, 0, -1e4])
    for labels in ([0, 1, 0, 2], [3, 0, 1, 4], [4, 4, 4, 4]):
        own, targets = logits.clone().requires_grad_(), one_hot(torch.tensor(labels), torch.float32)
        targets = targets if kind == "hard" else 0.6 * targets + 0.4 / K
        loss = LOSSES[name](own, targets, torch.tensor(COUNTS))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(own.grad).all() and float(loss.detach()) >= 0


@each_loss
def test_a_count_of_0_is_read_as_1(name):
    logits, targets = random_logits().requires_grad_(), random_targets()
    for counts in ([5, 0, 3, 0, 9], [0] * K):
        loss = LOSSES[name](logits, targets, torch.tensor(counts))
        assert torch.equal(loss, LOSSES[name](logits, targets, torch.tensor(counts).clamp_min(1)))
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_the_defaults_are_those_of_the_papers():
    given = random_logits(), random_targets(), torch.tensor(COUNTS)
    settings = {
        robust_losses.ldam: {"largest_margin": 0.5, "scale": 30},
        robust_losses.generalised_cross_entropy: {"q": 0.7},
        robust_losses.symmetric_cross_entropy: {"ce_weight": 0.1, "rce_weight": 1},
        robust_losses.logit_adjusted: {"tau": 1},
    }
    for loss, values in settings.items():
        assert torch.equal(loss(*given), loss(*given, **values))
    torch.testing.assert_close(robust_losses.logit_adjusted(*given), robust_losses.balanced_softmax(*given))


def test_gce_goes_to_cross_entropy_and_to_the_absolute_error():
    logits = random_logits()
    near = robust_losses.generalised_cross_entropy(logits, random_targets(), None, q=1e-7)
    torch.testing.assert_close(near, losses.cross_entropy(logits, random_targets(), None), rtol=1e-5, atol=0)
    absolute = (torch.softmax(logits, dim=1) - TARGETS["hard"]).abs().sum(dim=1).mean()
    one = robust_losses.generalised_cross_entropy(logits, TARGETS["hard"], None, q=1)
    torch.testing.assert_close(one, absolute / 2)


def test_the_total_is_back_propagated_and_its_parts_are_not():
    standard = random_logits(6).requires_grad_()
    loss = semi_loss(standard, random_logits(7), random_targets(), N, torch.tensor(COUNTS), 3.0)
    assert loss.total.requires_grad and not any(part.requires_grad for part in loss[1:])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ce", losses.cross_entropy),
        ("ldam --ldam_margin 0.2", partial(robust_losses.ldam, largest_margin=0.2, scale=30)),
        ("ldam --ldam_scale 5", partial(robust_losses.ldam, largest_margin=0.5, scale=5)),
        ("gce", partial(robust_losses.generalised_cross_entropy, q=0.7)),
        ("gce --gce_q 1", partial(robust_losses.generalised_cross_entropy, q=1)),
        ("sce --sce_ce 2", partial(robust_losses.symmetric_cross_entropy, ce_weight=2, rce_weight=1)),
        ("sce --sce_rce 3", partial(robust_losses.symmetric_cross_entropy, ce_weight=0.1, rce_weight=3)),
        ("logit_adjusted", robust_losses.balanced_softmax),
        ("logit_adjusted --adjustment_tau 0.5", partial(robust_losses.logit_adjusted, tau=0.5)),
        ("balanced_softmax", robust_losses.balanced_softmax),
    ],
)
def test_the_loss_asked_for_is_the_one_trained_with_and_its_flags_arrive(words, expected):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    given = (logits, targets, torch.tensor([50, 9, 2]))
    loss = robust_losses.standard_loss(Train_cifar.parse_args(["--loss", *words.split()]))
    torch.testing.assert_close(loss(*given), expected(*given))
