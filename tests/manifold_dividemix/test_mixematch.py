"""The parts of a MixEMatch step against their formulas: embeddings, targets, mixtures, the loss and where its gradient goes."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.device import Device
from manifold_dividemix import losses, mixematch
from manifold_dividemix.choices import Lambdas
from manifold_dividemix.mixematch import Views
from manifold_dividemix.networks import Network, make_encoder

K, T, SHAPE = 5, 0.5, (1, 8, 8)
BF16 = Device(torch.device("cpu"), "bf16", "tests")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def network() -> Network:
    """One with running statistics of its own and predictions far from uniform, in train mode."""
    torch.manual_seed(3)
    made = Network(make_encoder("resnet18", *SHAPE[:2]), 64, K)
    made.train()
    with torch.no_grad():
        made.project(made(3 * torch.randn(32, *SHAPE) + 1))
        made.classifier.weight.mul_(20)
    return made


def images(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, *SHAPE, generator=generator)


def views(size: int, generator: torch.Generator) -> Views:
    """Strong views that differ from the weak ones."""
    weak = tuple(images(size, generator) for _ in range(2))
    return Views(weak, tuple(2 * images(size, generator) - 1 for _ in range(2)))


def plain_mean(own: Network, given: Sequence[Tensor]) -> Tensor:
    """The mean of predictions, not of logits, a forward pass per view."""
    with torch.no_grad():
        return sum(F.softmax(own.classify(own(view)), dim=1) for view in given) / len(given)


def same_buffers(own: nn.Module, twin: nn.Module) -> bool:
    pairs = zip(own.buffers(), twin.buffers(), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("frozen", ["nothing", "network", "encoder"])
def test_each_view_is_a_batch_of_its_own_unless_batch_norms_are_frozen(frozen, generator):
    """Also where the encoder alone is frozen, as under --weights freeze."""
    own = network().train(frozen != "network")
    own.encoder.train(frozen == "nothing")
    twin, passes, given = copy.deepcopy(own), [], [images(size, generator) + size for size in (6, 6, 3)]
    own.encoder.register_forward_hook(lambda *_: passes.append(1))
    found = mixematch.encode(own, given)
    assert len(passes) == (3 if frozen == "nothing" else 1)
    for h, view in zip(found, given, strict=True):
        torch.testing.assert_close(h, twin(view), rtol=1e-5, atol=1e-5)
    assert same_buffers(own, twin)
    sum(h.square().sum() for h in found).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.encoder.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_targets_are_the_sharpened_means_of_the_views(training, generator):
    own = network().train(training)
    twin, given = copy.deepcopy(own), views(4, generator).weak
    labels, clean = torch.tensor([0, 2, 2, 4]), torch.tensor([1.0, 0.0, 0.25, 0.8], dtype=torch.float64)
    found = mixematch.guess_labels(own, given, T), mixematch.refine_labels(own, given, labels, clean, T)
    mean, again = plain_mean(twin, given), plain_mean(twin, given)
    refined = clean[:, None] * F.one_hot(labels, K) + (1 - clean[:, None]) * again
    for targets, rows in zip(found, (mean, refined), strict=True):
        powers = rows.double() ** (1 / T)
        expected = (powers / powers.sum(dim=1, keepdim=True)).float()
        torch.testing.assert_close(targets, expected, rtol=1e-3, atol=1e-5)
        assert not targets.requires_grad
    assert same_buffers(own, twin)
    assert all(p.grad is None for p in own.parameters())


def test_a_guess_is_sure_from_the_threshold_on():
    targets = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [1.0, 0.0]])
    masks = [mixematch.confident(targets, threshold).tolist() for threshold in (0.75, 1.0, 0.0)]
    assert masks == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert mixematch.confident(targets, 0.5).dtype == torch.float32


class Given:
    """What a step gets: both sides, and all that its loss depends on."""

    def __init__(self, bx: int, bu: int, generator: torch.Generator, **changes):
        self.x, self.u = views(bx, generator), views(bu, generator)
        self.labels = torch.randint(K, (bx,), generator=generator)
        self.clean = torch.rand(bx, generator=generator, dtype=torch.float64)
        self.options = {"lambdas": Lambdas(0.5, 30, 2, 10, 0.25), "ramp": 0.4, "lam": 0.3}
        self.options["permutation"] = torch.randperm(2 * (bx + bu), generator=generator)
        self.options |= {"temperature": T, "threshold": 0.7, **changes}

    def loss(self, own: Network, **changes) -> mixematch.Loss:
        labelled = (self.x, self.labels, self.clean)
        return mixematch.step_loss(own, labelled, self.u, **{**self.options, **changes})


def plain_parts(own: Network, given: Given, kind: str, rce: str) -> list[Tensor]:
    """The six parts of the loss, with rows that are mixed one by one; losses of rows are tested alone."""
    larger, order = 1 - given.options["lam"], given.options["permutation"].tolist()

    def mixed(rows: list[Tensor]) -> Tensor:
        return torch.stack([larger * rows[i] + (1 - larger) * rows[j] for i, j in enumerate(order)])

    # the unlabelled views first, which running statistics show
    guessed = mixematch.guess_labels(own, given.u.weak, T)
    refined = mixematch.refine_labels(own, given.x.weak, given.labels, given.clean, T)
    trained = (guessed.max(dim=1).values >= given.options["threshold"]).float()
    strong, x = [*given.x.strong, *given.u.strong], slice(2 * len(refined))
    u = slice(x.stop, None)
    embeddings = [own(view) for view in strong]
    logits_in = own.classify(own(mixed([image for view in strong for image in view])))
    logits_emb = own.classify(mixed([h for of_view in embeddings for h in of_view]))
    targets = mixed([*refined, *refined, *guessed, *guessed])
    mask, parts = mixed([*torch.ones(x.stop), *trained, *trained]), []
    for logits in (logits_in, logits_emb):
        parts.append(losses.labelled_loss(logits[x], targets[x], mask[x], kind, rce))
        parts.append(losses.unlabelled_loss(logits[u], targets[u], mask[u]))
    z = [F.normalize(own.project(h), dim=1) for h in embeddings[2:]]
    return [*parts, losses.contrastive_loss(torch.stack(z, dim=1), 0.05), losses.balance_penalty(logits_in)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "rce"), [("RL", "released"), ("RL", "log"), ("CE", "released")])
@pytest.mark.parametrize(("bx", "bu"), [(4, 4), (5, 2), (1, 6)])  # last batches are smaller
def test_the_loss_of_a_step_is_the_weighted_sum_of_its_parts(bx, bu, kind, rce, training, generator):
    own, given = network().train(training), Given(bx, bu, generator)
    twin = copy.deepcopy(own)
    found = given.loss(own, kind=kind, rce=rce)
    plain = plain_parts(twin, given, kind, rce)
    expected = [float(part.detach()) for part in plain]
    assert [float(part) for part in found[1:]] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # the ramp is of the unlabelled losses alone
    factors = (0.5, 0.4 * 30, 2, 0.4 * 10, 0.25, 1)
    total = sum(factor * part for factor, part in zip(factors, plain, strict=True))
    torch.testing.assert_close(found.total, total, rtol=1e-4, atol=1e-4)
    assert not any(part.requires_grad for part in found[1:])
    assert same_buffers(own, twin)
    # and so is its gradient, as far as rounding allows
    found.total.backward()
    total.backward()
    for (name, p), q in zip(own.named_parameters(), twin.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.999, name


def test_under_bfloat16_losses_are_float32_and_gradients_near_those_of_float32(generator):
    """Targets come first, without gradients and in the same autocast: their casts must not serve the mixed batch."""
    given, gradients = Given(8, 8, generator, threshold=0.0), []
    for precision in ("fp32", "bf16"):
        own = network().eval()
        with BF16._replace(precision=precision).autocast():
            found = given.loss(own)
        assert all(part.dtype == torch.float32 for part in found)
        found.total.backward()
        gradients.append({name: p.grad for name, p in own.named_parameters()})
    for name, gradient in gradients[0].items():
        assert F.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0) > 0.9, name
