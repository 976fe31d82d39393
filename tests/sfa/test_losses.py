"""The losses of the standard head against formulas in NumPy, row by row and class by class; their limits and their gradients."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfa import losses, robust_losses
from sfa.mixmatch import semi_loss

COUNTS = [400, 90, 30, 7, 1]
N, K = 6, len(COUNTS)

# the settings are not the defaults, so that each of them matters
LOSSES = {
    "ce": losses.cross_entropy,
    "balanced_softmax": robust_losses.balanced_softmax,
    "logit_adjusted": partial(robust_losses.logit_adjusted, tau=0.6),
    "ldam": partial(robust_losses.ldam, largest_margin=0.4, scale=7),
    "gce": partial(robust_losses.generalised_cross_entropy, q=0.3),
    "sce": partial(robust_losses.symmetric_cross_entropy, ce_weight=0.7, rce_weight=1.3),
}
BY_COUNTS = ("balanced_softmax", "logit_adjusted", "ldam")


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - math.log(sum(math.exp(other - z.max()) for other in z))


def hard(name: str, z: np.ndarray, y: int, counts: list[float]) -> float:
    """The loss of one row of logits whose label is y, with the settings of LOSSES."""
    log_p = log_softmax(z)
    if name == "ce":
        return -log_p[y]
    if name == "balanced_softmax":
        weighed = [n * math.exp(own) for n, own in zip(counts, z, strict=True)]
        return -math.log(weighed[y] / sum(weighed))
    if name == "logit_adjusted":
        prior = [n / sum(counts) for n in counts]
        weighed = [p**0.6 * math.exp(own) for p, own in zip(prior, z, strict=True)]
        return -math.log(weighed[y] / sum(weighed))
    if name == "ldam":
        margins = [1 / n**0.25 for n in counts]
        reduced = z.copy()
        reduced[y] -= 7 * 0.4 * margins[y] / max(margins)
        return -log_softmax(reduced)[y]
    if name == "gce":
        return (1 - math.exp(log_p[y]) ** 0.3) / 0.3
    if name == "sce":
        wrong = sum(math.exp(log_p[k]) for k in range(len(z)) if k != y)
        return 0.7 * -log_p[y] + 1.3 * wrong * -math.log(1e-4)
    raise ValueError(name)


def soft(name: str, z: np.ndarray, t: np.ndarray, counts: list[float]) -> float:
    """The same of a soft target: the hard form of every class, weighed; but the reverse term is the cross-entropy H(p, t)."""
    if name == "sce":
        log_p = log_softmax(z)
        reverse = -sum(math.exp(log_p[k]) * math.log(max(t[k], 1e-4)) for k in range(len(z)))
        return 0.7 * -float(t @ log_p) + 1.3 * reverse
    return sum(t[k] * hard(name, z, k, counts) for k in range(len(z)))


def random_logits(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_targets(seed: int = 1) -> torch.Tensor:
    """Rows on the simplex; the first is sharp, so that some of its entries are below 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, K, generator=generator, dtype=torch.float64)
    logits[0] *= 20
    return torch.softmax(logits, dim=1)


def one_hot(labels: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    return F.one_hot(labels, K).to(dtype)


LABELS = torch.tensor([0, 1, 2, 3, 4, 3])


# values and gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_hard_targets_agree_with_the_formula(name):
    logits = random_logits()
    rows = [hard(name, z, y, COUNTS) for z, y in zip(logits.numpy(), LABELS.tolist(), strict=True)]
    found = LOSSES[name](logits, one_hot(LABELS), torch.tensor(COUNTS))
    assert found.shape == ()
    assert float(found) == pytest.approx(np.mean(rows), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_soft_targets_agree_with_the_formula(name):
    logits, targets = random_logits(), random_targets()
    assert float(targets.min()) < 1e-4
    rows = [soft(name, z, t, COUNTS) for z, t in zip(logits.numpy(), targets.numpy(), strict=True)]
    assert float(LOSSES[name](logits, targets, torch.tensor(COUNTS))) == pytest.approx(
        np.mean(rows), rel=1e-10
    )


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sce"])
def test_a_soft_target_gives_the_weighed_mean_of_the_hard_ones(name):
    logits, targets, counts = random_logits(), random_targets(), torch.tensor(COUNTS)
    for row in range(N):
        one, target = logits[row : row + 1], targets[row : row + 1]
        each = [LOSSES[name](one, one_hot(torch.tensor([k])), counts) for k in range(K)]
        mean = sum(target[0, k] * each[k] for k in range(K))
        torch.testing.assert_close(LOSSES[name](one, target, counts), mean)


def test_the_reverse_term_of_a_soft_target_is_a_cross_entropy_with_it():
    """So it takes the target's own logarithm, where the weighed mean of hard ones would take that of 1e-4 alone."""
    loss = partial(robust_losses.symmetric_cross_entropy, ce_weight=0, rce_weight=1)
    even = torch.full((1, K), 1 / K, dtype=torch.float64)
    for seed in range(3):
        assert float(loss(random_logits(seed)[:1], even, None)) == pytest.approx(math.log(K))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_differences(name):
    logits = random_logits(seed=3).requires_grad_()
    for targets in (random_targets(), one_hot(LABELS)):
        assert torch.autograd.gradcheck(lambda z, t=targets: LOSSES[name](z, t, torch.tensor(COUNTS)), logits)


@pytest.mark.parametrize("name", LOSSES)
def test_a_shift_of_all_logits_of_a_row_changes_nothing(name):
    logits, counts = random_logits(), torch.tensor(COUNTS)
    shifted = logits + torch.arange(N, dtype=torch.float64)[:, None]
    loss = LOSSES[name]
    torch.testing.assert_close(
        loss(shifted, random_targets(), counts), loss(logits, random_targets(), counts)
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_float32_agrees_with_float64_whatever_the_type_of_the_counts(name, dtype):
    logits, targets = random_logits(), random_targets()
    found = LOSSES[name](logits.float(), targets.float(), torch.tensor(COUNTS, dtype=dtype))
    assert found.dtype == torch.float32
    expected = LOSSES[name](logits, targets, torch.tensor(COUNTS))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


# extremes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_extreme_logits_give_finite_losses_and_gradients(name, kind):
    logits = torch.zeros(4, K)
    logits[0, 0], logits[1, 1] = 1e4, -1e4
    logits[2] = torch.tensor([1e4, -1e4, 1e4, 0, -1e4])
    logits[3] = -1e4
    for labels in (torch.tensor([0, 1, 0, 2]), torch.tensor([3, 0, 1, 4]), torch.tensor([4, 4, 4, 4])):
        own = logits.clone().requires_grad_()
        targets = one_hot(labels, torch.float32)
        targets = targets if kind == "hard" else 0.6 * targets + 0.4 / K
        loss = LOSSES[name](own, targets, torch.tensor(COUNTS))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(own.grad).all()
        assert float(loss.detach()) >= 0


@pytest.mark.parametrize("name", ["gce", "sce"])
def test_losses_robust_to_label_noise_are_bounded_but_for_the_share_of_cross_entropy(name):
    logits = torch.zeros(1, K, dtype=torch.float64)
    logits[0, 0] = 1e4
    found = float(LOSSES[name](logits, one_hot(torch.tensor([1])), torch.tensor(COUNTS)))
    assert found == pytest.approx({"gce": 1 / 0.3, "sce": 0.7 * 1e4 + 1.3 * -math.log(1e-4)}[name])


@pytest.mark.parametrize("name", LOSSES)
def test_a_count_of_0_is_read_as_1(name):
    logits, targets = random_logits().requires_grad_(), random_targets()
    for counts in ([5, 0, 3, 0, 9], [0] * K):
        found = LOSSES[name](logits, targets, torch.tensor(counts))
        expected = LOSSES[name](logits, targets, torch.tensor(counts).clamp_min(1))
        assert torch.isfinite(found) and torch.equal(found, expected)
        assert torch.isfinite(torch.autograd.grad(found, logits)[0]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_only_losses_robust_to_the_distribution_look_at_the_counts(name):
    logits, targets = random_logits(), random_targets()
    first, second = (LOSSES[name](logits, targets, torch.tensor(counts)) for counts in (COUNTS, COUNTS[::-1]))
    assert torch.equal(first, second) is (name not in BY_COUNTS)


@pytest.mark.parametrize("name", BY_COUNTS)
def test_of_two_classes_the_rarer_weighs_more(name):
    """A row that prefers neither: the label of the rare class costs more than that of the frequent one."""
    logits, counts = torch.zeros(1, K, dtype=torch.float64), torch.tensor(COUNTS)
    each = [float(LOSSES[name](logits, one_hot(torch.tensor([k])), counts)) for k in range(K)]
    assert each == sorted(each) and each[0] < each[-1]


# limits -----------------------------------------------------------------------------------------------------------------


def test_gce_goes_to_cross_entropy_and_to_the_absolute_error():
    logits, targets = random_logits(), random_targets()
    near = robust_losses.generalised_cross_entropy(logits, targets, None, q=1e-7)
    torch.testing.assert_close(near, losses.cross_entropy(logits, targets, None), rtol=1e-5, atol=0)
    labels = one_hot(LABELS)
    absolute = (torch.softmax(logits, dim=1) - labels).abs().sum(dim=1).mean()
    torch.testing.assert_close(
        robust_losses.generalised_cross_entropy(logits, labels, None, q=1), absolute / 2
    )


def test_logit_adjustment_of_weight_1_is_balanced_softmax_and_of_weight_0_cross_entropy():
    logits, targets, counts = random_logits(), random_targets(), torch.tensor(COUNTS)
    for tau, other in ((1, robust_losses.balanced_softmax), (0, losses.cross_entropy)):
        found = robust_losses.logit_adjusted(logits, targets, counts, tau=tau)
        torch.testing.assert_close(found, other(logits, targets, counts))
    default = robust_losses.logit_adjusted(logits, targets, counts)
    torch.testing.assert_close(default, robust_losses.balanced_softmax(logits, targets, counts))


def test_the_margins_of_ldam_go_by_the_fourth_root_of_the_counts_up_to_the_largest_for_the_rarest_class():
    counts, zeros = torch.tensor([16, 1, 81]), torch.zeros(1, 3, dtype=torch.float64)
    for scale, largest in ((1, 0.5), (7, 0.4)):
        margins = []
        for k in range(3):
            target = F.one_hot(torch.tensor([k]), 3).double()
            loss = robust_losses.ldam(zeros, target, counts, largest_margin=largest, scale=scale)
            # -log(e^-m / (e^-m + 2)), turned round for m
            margins.append(math.log((math.exp(float(loss)) - 1) / 2))
        assert margins == pytest.approx([scale * largest / 2, scale * largest, scale * largest / 3])


def test_the_margin_of_ldam_is_one_for_all_where_the_counts_are_equal():
    logits, labels = random_logits(), one_hot(LABELS)
    for count in (1, 50):
        found = robust_losses.ldam(logits, labels, torch.full((K,), count), largest_margin=0.5, scale=4)
        torch.testing.assert_close(found, losses.cross_entropy(logits - 2 * labels, labels, None))


def test_the_weights_of_sce_are_those_of_its_two_terms():
    logits, targets = random_logits(), random_targets()
    plain, reverse = (
        robust_losses.symmetric_cross_entropy(logits, targets, None, *weights) for weights in ((1, 0), (0, 1))
    )
    torch.testing.assert_close(plain, losses.cross_entropy(logits, targets, None))
    found = robust_losses.symmetric_cross_entropy(logits, targets, None, ce_weight=6, rce_weight=0.1)
    torch.testing.assert_close(found, 6 * plain + 0.1 * reverse)
    # of a sure label: what the other classes get, times -log 1e-4
    wrong = 1 - torch.softmax(logits, dim=1)[torch.arange(N), LABELS]
    reverse = robust_losses.symmetric_cross_entropy(logits, one_hot(LABELS), None, ce_weight=0)
    torch.testing.assert_close(reverse, -math.log(1e-4) * wrong.mean())


def test_the_defaults_are_those_of_the_papers():
    logits, targets, counts = random_logits(), random_targets(), torch.tensor(COUNTS)
    settings = {
        robust_losses.ldam: {"largest_margin": 0.5, "scale": 30},
        robust_losses.generalised_cross_entropy: {"q": 0.7},
        robust_losses.symmetric_cross_entropy: {"ce_weight": 0.1, "rce_weight": 1},
        robust_losses.logit_adjusted: {"tau": 1},
    }
    for loss, values in settings.items():
        assert torch.equal(loss(logits, targets, counts), loss(logits, targets, counts, **values))


# in warm-up and in semi-supervised training -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_in_the_warm_up_only_the_term_of_the_standard_head_changes(name):
    standard, auxiliary = (random_logits(seed).requires_grad_() for seed in (4, 5))
    counts = torch.tensor(COUNTS)
    found = losses.warm_up_loss(standard, auxiliary, LABELS, counts, LOSSES[name])
    rows = [
        hard(name, z, y, COUNTS) + hard("balanced_softmax", b, y, COUNTS)
        for z, b, y in zip(
            standard.detach().numpy(), auxiliary.detach().numpy(), LABELS.tolist(), strict=True
        )
    ]
    assert float(found.detach()) == pytest.approx(np.mean(rows), rel=1e-10)
    usual = losses.warm_up_loss(standard, auxiliary, LABELS, counts)
    assert torch.equal(usual, losses.warm_up_loss(standard, auxiliary, LABELS, counts, losses.cross_entropy))
    gradients = [torch.autograd.grad(loss, (standard, auxiliary)) for loss in (found, usual)]
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    assert torch.equal(gradients[0][0], gradients[1][0]) is (name == "ce")


@pytest.mark.parametrize("cut", [4, N])
@pytest.mark.parametrize("name", LOSSES)
def test_in_semi_supervised_training_only_the_labelled_term_of_the_standard_head_changes(name, cut):
    standard, auxiliary = (random_logits(seed).requires_grad_() for seed in (6, 7))
    targets, counts = random_targets(), torch.tensor(COUNTS)
    given = (standard, auxiliary, targets, cut, counts, 3.0)
    found, usual = semi_loss(*given, LOSSES[name]), semi_loss(*given)
    labelled = LOSSES[name](standard[:cut], targets[:cut], counts)
    torch.testing.assert_close(found.labelled, labelled.detach())
    assert float(usual.labelled) == pytest.approx(
        float(losses.soft_cross_entropy(standard[:cut], targets[:cut]).detach())
    )
    for part in ("unlabelled", "balanced_labelled", "balanced_unlabelled"):
        assert torch.equal(getattr(found, part), getattr(usual, part))
    torch.testing.assert_close(found.total - labelled, usual.total - usual.labelled)
    gradients = [torch.autograd.grad(loss.total, (standard, auxiliary)) for loss in (found, usual)]
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    torch.testing.assert_close(gradients[0][0][cut:], gradients[1][0][cut:])
    assert torch.allclose(gradients[0][0][:cut], gradients[1][0][:cut]) is (name == "ce")


def test_the_parts_of_the_semi_supervised_loss_are_those_of_the_formula():
    standard, auxiliary, targets = random_logits(6), random_logits(7), random_targets()
    found = semi_loss(standard, auxiliary, targets, 4, torch.tensor(COUNTS), 3.0)
    shifted = auxiliary.numpy() + np.log(COUNTS)
    p, balanced = (np.exp([log_softmax(z) for z in logits]) for logits in (standard.numpy(), shifted))
    t = targets.numpy()
    parts = [-np.sum(t[:4] * np.log(q[:4])) / 4 for q in (p, balanced)]
    parts += [np.mean((q[4:] - t[4:]) ** 2) for q in (p, balanced)]
    penalty = sum(np.log(1 / K / mean) / K for mean in p.mean(axis=0))
    found_parts = [
        found.labelled, found.balanced_labelled, found.unlabelled, found.balanced_unlabelled, found.total
    ]  # fmt: skip
    total = parts[0] + parts[1] + 3 * parts[2] + 3 * parts[3] + penalty
    assert [float(part) for part in found_parts] == pytest.approx([*parts, total], rel=1e-10)
