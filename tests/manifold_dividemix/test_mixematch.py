"""The parts of a MixEMatch step against their formulas: embeddings, targets, mixtures, the loss and where its gradient goes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.gpu.device import Device
from manifold_dividemix import losses, mixematch
from manifold_dividemix.mixematch import Targets, Views, Weights
from manifold_dividemix.networks import Network, make_encoder

K, T, SHAPE = 5, 0.5, (1, 8, 8)
BF16 = Device(torch.device("cpu"), "bf16", "tests")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def network() -> Network:
    """One with running statistics of its own and predictions far from uniform, in train mode."""
    torch.manual_seed(3)
    made = Network(make_encoder("resnet18", *SHAPE[:2]), 64, K, 16)
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


def probabilities(size: int, generator: torch.Generator) -> Tensor:
    return torch.softmax(2 * torch.randn(size, K, generator=generator), dim=1)


def plain_sharpened(rows: Tensor, temperature: float = T) -> Tensor:
    powers = rows.double() ** (1 / temperature)
    return (powers / powers.sum(dim=1, keepdim=True)).float()


def buffers(of: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in of.named_buffers()}


# embeddings -------------------------------------------------------------------------------------------------------------


def test_in_train_mode_each_view_is_a_batch_of_its_own(generator):
    own = network()
    twin, given = copy.deepcopy(own), [images(size, generator) + size for size in (6, 6, 3)]
    counted = int(own.encoder.bn1.num_batches_tracked)
    found = mixematch.encode(own, given)
    assert int(own.encoder.bn1.num_batches_tracked) == counted + 3
    for h, view in zip(found, given, strict=True):
        torch.testing.assert_close(h, twin(view))
    assert all(torch.equal(value, buffers(twin)[name]) for name, value in buffers(own).items())
    # joined they would have other statistics
    joined = torch.cat(found)
    assert not torch.allclose(twin(torch.cat(given)), joined, atol=0.1)


@pytest.mark.parametrize("whole", [True, False])
def test_with_frozen_norms_one_pass_gives_the_same(whole, generator):
    """Also where the encoder alone is frozen, as under --weights freeze."""
    own = network().eval()
    if not whole:
        own.train()
        own.encoder.eval()
    passes, given = [], [images(size, generator) for size in (6, 2, 3)]
    own.encoder.register_forward_hook(lambda *_: passes.append(1))
    before = buffers(own)
    found = mixematch.encode(own, given)
    assert len(passes) == 1 and [len(h) for h in found] == [6, 2, 3]
    for h, view in zip(found, given, strict=True):
        torch.testing.assert_close(h, own(view), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in buffers(own).items())


@pytest.mark.parametrize("training", [True, False])
def test_embeddings_carry_gradients_into_the_encoder(training, generator):
    own = network().train(training)
    sum(h.square().sum() for h in mixematch.encode(own, [images(4, generator)] * 2)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.encoder.parameters())


# sharpening -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0])
def test_sharpening_is_the_plain_formula_and_keeps_the_order(temperature, generator):
    rows = torch.softmax(torch.randn(64, 10, generator=generator), dim=1)
    found = mixematch.sharpen(rows, temperature)
    torch.testing.assert_close(found, plain_sharpened(rows, temperature), rtol=1e-5, atol=1e-7)
    assert torch.equal(found.argsort(dim=1), rows.argsort(dim=1))


def test_sharpening_makes_no_nan_of_zeros_or_of_a_tiny_temperature(generator):
    assert torch.equal(mixematch.sharpen(torch.eye(4), T), torch.eye(4))
    rows = torch.softmax(torch.randn(64, 10, generator=generator), dim=1)
    surest = F.one_hot(rows.argmax(dim=1), 10).float()
    torch.testing.assert_close(mixematch.sharpen(rows, 1e-4), surest, atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [0, -0.5])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        mixematch.sharpen(torch.eye(2), temperature)


# targets ----------------------------------------------------------------------------------------------------------------


def test_the_mean_is_of_predictions_not_of_logits(generator):
    own = network().eval()
    embeddings = [4 * torch.randn(6, 64, generator=generator) for _ in range(2)]
    first, second = (F.softmax(own.classify(h), dim=1) for h in embeddings)
    torch.testing.assert_close(mixematch.mean_prediction(own, embeddings), (first + second) / 2)
    of_logits = F.softmax(sum(own.classify(h) for h in embeddings) / 2, dim=1)
    assert not torch.allclose((first + second) / 2, of_logits, atol=0.05)


def test_a_guess_is_sure_from_the_threshold_on():
    targets = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [1.0, 0.0]])
    assert mixematch.confident(targets, 0.75).tolist() == [0, 1, 1, 1]
    assert mixematch.confident(targets, 1.0).tolist() == [0, 0, 0, 1]
    assert mixematch.confident(targets, 0.0).tolist() == [1] * 4
    assert mixematch.confident(targets, 0.5).dtype == torch.float32


def test_refined_labels_mix_the_observed_label_and_the_mean_prediction(generator):
    mean, labels = probabilities(4, generator), torch.tensor([3, 3, 0, 4])
    clean = torch.tensor([1.0, 0.0, 0.25, 0.8], dtype=torch.float64)
    found = mixematch.refined(mean, labels, clean)
    for i, (label, weight) in enumerate(zip(labels.tolist(), clean.tolist(), strict=True)):
        row = [weight * (c == label) + (1 - weight) * float(mean[i, c]) for c in range(K)]
        assert found[i].tolist() == pytest.approx(row, rel=1e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_targets_are_made_of_the_weak_views_of_their_own_side(training, generator):
    own = network().train(training)
    twin, x, u = copy.deepcopy(own), views(4, generator), views(7, generator)
    labels, clean = torch.tensor([0, 2, 2, 4]), torch.rand(4, generator=generator, dtype=torch.float64)
    found = mixematch.make_targets(own, x, u, labels, clean, T, 0.8)
    with torch.no_grad():
        guess, mean = (
            sum(F.softmax(twin.classify(twin(view)), dim=1) for view in side.weak) / 2 for side in (u, x)
        )
    unlabelled = plain_sharpened(guess)
    torch.testing.assert_close(found.unlabelled, unlabelled, rtol=1e-3, atol=1e-5)
    one_hot = F.one_hot(labels, K).double()
    labelled = plain_sharpened(clean[:, None] * one_hot + (1 - clean[:, None]) * mean)
    torch.testing.assert_close(found.labelled, labelled, rtol=1e-3, atol=1e-5)
    assert found.mask.tolist() == [float(row.max() >= 0.8) for row in unlabelled]
    assert not any(tensor.requires_grad for tensor in found)
    # four passes in the order u1, u2, x1, x2, which the statistics show
    assert all(torch.allclose(value, buffers(twin)[name], atol=1e-6) for name, value in buffers(own).items())


def test_confidence_is_asked_of_the_sharpened_guess(generator):
    """A mean prediction of 0.8 is 0.94 sharpened: above 0.9."""
    own = network().eval()
    with torch.no_grad():
        own.classifier.weight.zero_()
        own.classifier.bias.copy_(torch.tensor([0.8, 0.05, 0.05, 0.05, 0.05]).log())
    x, u = views(2, generator), views(3, generator)
    arguments = own, x, u, torch.tensor([0, 1]), torch.ones(2)
    found = mixematch.make_targets(*arguments, T, 0.9)
    assert float(found.unlabelled[0, 0]) == pytest.approx(0.64 / 0.65, rel=1e-5)
    assert found.mask.tolist() == [1] * 3
    assert mixematch.make_targets(*arguments, 1.0, 0.9).mask.tolist() == [0] * 3
    # labels that are surely clean are left alone by sharpening
    torch.testing.assert_close(found.labelled, torch.eye(K)[:2])


def test_targets_leave_the_weights_without_a_gradient(generator):
    own = network()
    mixematch.make_targets(
        own, views(2, generator), views(3, generator), torch.tensor([0, 1]), torch.ones(2), T, 0.9
    )
    assert all(p.grad is None for p in own.parameters())


# mixtures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_each_row_keeps_the_larger_share_of_itself(share, generator):
    rows, permutation = images(6, generator), torch.tensor([5, 0, 2, 1, 4, 3])
    found = mixematch.mix(rows, share, permutation)
    larger = max(share, 1 - share)
    for i, j in enumerate(permutation.tolist()):
        torch.testing.assert_close(found[i], larger * rows[i] + (1 - larger) * rows[j])
    assert torch.equal(mixematch.mix(rows, share, permutation), mixematch.mix(rows, 1 - share, permutation))


# the loss ---------------------------------------------------------------------------------------------------------------

SIZES = [(4, 4), (5, 2), (1, 6)]  # labelled and unlabelled; last batches are smaller


def step(bx: int, bu: int, generator: torch.Generator):
    """Both sides with their targets, and a permutation."""
    mask = (torch.rand(bu, generator=generator) < 0.6).float()
    mask[0] = 1
    targets = Targets(probabilities(bx, generator), probabilities(bu, generator), mask)
    return (
        views(bx, generator),
        views(bu, generator),
        targets,
        torch.randperm(2 * (bx + bu), generator=generator),
    )


def plain_parts(
    own: Network, x: Views, u: Views, targets: Targets, share: float, permutation: Tensor, kind, rce
):
    """The six parts of the loss, with rows that are mixed one by one."""
    larger, order = max(share, 1 - share), permutation.tolist()

    def mixed(rows: list[Tensor]) -> Tensor:
        return torch.stack([larger * rows[i] + (1 - larger) * rows[j] for i, j in enumerate(order)])

    strong = [*x.strong, *u.strong]
    embeddings = [own(view) for view in strong]
    inputs = mixed([image for view in strong for image in view])
    logits_in = own.classify(own(inputs))
    logits_emb = own.classify(mixed([h for of_view in embeddings for h in of_view]))
    target = mixed([*targets.labelled, *targets.labelled, *targets.unlabelled, *targets.unlabelled])
    mask = mixed([*torch.ones(2 * len(targets.labelled)), *targets.mask, *targets.mask])
    count, parts = 2 * len(targets.labelled), []
    for logits in (logits_in, logits_emb):
        log_p = logits.log_softmax(dim=1)
        each = -(target * log_p).sum(dim=1)
        if kind == "RL":
            log_t = (
                target.clamp_min(1e-4).log() if rce == "log" else target.clamp_min(1e-7).log_softmax(dim=1)
            )
            each = each - (log_p.exp().clamp_min(1e-7) * log_t).sum(dim=1)
        squared = ((log_p.exp() - target) ** 2).mean(dim=1)
        parts += [(mask * each)[:count].sum() / count, (mask * squared)[count:].sum() / (len(order) - count)]
    z = [F.normalize(own.project(h), dim=1) for h in embeddings[2:]]
    parts.append(losses.contrastive_loss(torch.stack(z, dim=1), 0.05))
    mean = logits_in.softmax(dim=1).mean(dim=0)
    parts.append((torch.log(1 / K / mean) / K).sum())
    return parts


OPTIONS = [("RL", "released"), ("RL", "log"), ("CE", "released")]
WEIGHTS = Weights(0.5, 30, 2, 10, 0.25)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "rce"), OPTIONS)
@pytest.mark.parametrize(("bx", "bu"), SIZES)
def test_the_loss_of_a_step_is_the_weighted_sum_of_its_parts(bx, bu, kind, rce, training, generator):
    own = network().train(training)
    twin, (x, u, targets, permutation) = copy.deepcopy(own), step(bx, bu, generator)
    options = {"share": 0.3, "permutation": permutation}
    found = mixematch.step_loss(own, x, u, targets, **options, weights=WEIGHTS, ramp=0.4, kind=kind, rce=rce)
    plain = plain_parts(twin, x, u, targets, **options, kind=kind, rce=rce)
    expected = [float(part.detach()) for part in plain]
    assert [float(part) for part in found[1:]] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    factors = (0.5, 0.4 * 30, 2, 0.4 * 10, 0.25, 1)
    total = sum(factor * part for factor, part in zip(factors, plain, strict=True))
    torch.testing.assert_close(found.total, total, rtol=1e-4, atol=1e-4)
    assert found.total.requires_grad and not any(part.requires_grad for part in found[1:])
    # and so is its gradient, as far as rounding allows
    found.total.backward()
    total.backward()
    for (name, p), q in zip(own.named_parameters(), twin.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.999, name


def test_the_default_weights_are_those_of_the_release():
    assert Weights() == (1, 100, 1, 100, 1)


def test_the_ramp_is_of_the_unlabelled_losses_alone(generator):
    own, (x, u, targets, permutation) = network().eval(), step(3, 4, generator)
    found = [
        mixematch.step_loss(
            own, x, u, targets, share=0.3, permutation=permutation, weights=Weights(), ramp=ramp
        )
        for ramp in (0.0, 0.5, 1.0)
    ]
    assert [float(part) for part in found[0][1:]] == [float(part) for part in found[2][1:]]
    unlabelled = 100 * float(found[0].unlabelled + found[0].unlabelled_embedding)
    totals = [float(loss.total.detach()) for loss in found]
    assert [total - totals[0] for total in totals] == pytest.approx(
        [0, unlabelled / 2, unlabelled], rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize("part", ["labelled_embedding", "unlabelled_embedding"])
def test_mixed_embeddings_send_gradients_into_the_encoder(part, generator):
    own, (x, u, targets, permutation) = network().eval(), step(3, 4, generator)
    weights = Weights(0, 0, 0, 0, 0)._replace(**{part: 1})
    gradients = []
    for used in (weights, Weights(0, 0, 0, 0, 0)):  # without any there is the penalty's
        own.zero_grad()
        options = {"share": 0.3, "permutation": permutation}
        mixematch.step_loss(own, x, u, targets, **options, weights=used).total.backward()
        gradients.append([p.grad.clone() for p in own.encoder.parameters()])
    differences = [(a - b).abs().max() for a, b in zip(*gradients, strict=True)]
    assert min(differences) > 0


def test_the_contrastive_loss_is_of_the_unlabelled_strong_views_alone(generator):
    own, (x, u, targets, permutation) = network().eval(), step(3, 4, generator)
    options = {"share": 0.3, "permutation": permutation, "weights": Weights()}
    contrastive = lambda x, u: mixematch.step_loss(own, x, u, targets, **options).contrastive  # noqa: E731
    before = contrastive(x, u)
    other = views(3, generator)
    torch.testing.assert_close(contrastive(other, u), before, rtol=1e-4, atol=1e-4)
    weak = Views(tuple(images(4, generator) for _ in range(2)), u.strong)
    torch.testing.assert_close(contrastive(x, weak), before)
    z = [F.normalize(own.project(own(view)), dim=1) for view in u.strong]
    torch.testing.assert_close(
        before, losses.contrastive_loss(torch.stack(z, dim=1), 0.05).detach(), rtol=1e-4, atol=1e-4
    )
    hot = mixematch.step_loss(own, x, u, targets, **options, temperature=0.5).contrastive
    torch.testing.assert_close(
        hot, losses.contrastive_loss(torch.stack(z, dim=1), 0.5).detach(), rtol=1e-4, atol=1e-4
    )


def test_projections_are_normalised_by_each_view_alone_in_train_mode(generator):
    own, (x, u, targets, permutation) = network(), step(3, 4, generator)
    counted = int(own.projection_bn.num_batches_tracked)
    mixematch.step_loss(own, x, u, targets, share=0.3, permutation=permutation, weights=Weights())
    assert int(own.projection_bn.num_batches_tracked) == counted + 2


def test_a_guess_that_is_not_sure_still_serves_as_a_partner(generator):
    """The mask is mixed like the rows: an unlabelled row that is not sure gets the share of a labelled partner."""
    own, (x, u, targets, _) = network().eval(), step(2, 2, generator)
    targets = targets._replace(mask=torch.zeros(2))
    unlabelled = {}
    for name, permutation in {
        "among themselves": torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]),
        "with labelled ones": torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]),
    }.items():
        loss = mixematch.step_loss(own, x, u, targets, share=0.6, permutation=permutation, weights=Weights())
        unlabelled[name] = float(loss.unlabelled)
    assert unlabelled["among themselves"] == 0 and unlabelled["with labelled ones"] > 0


def test_under_bfloat16_losses_are_float32_and_gradients_near_those_of_float32(generator):
    x, u, targets, permutation = step(8, 8, generator)
    gradients = {}
    for autocast in (False, True):
        own = network().eval()
        with BF16._replace(precision="bf16" if autocast else "fp32").autocast():
            found = mixematch.step_loss(
                own, x, u, targets, share=0.3, permutation=permutation, weights=Weights()
            )
        assert all(part.dtype == torch.float32 for part in found)
        found.total.backward()
        gradients[autocast] = {name: p.grad for name, p in own.named_parameters()}
    for name, gradient in gradients[False].items():
        assert F.cosine_similarity(gradients[True][name].flatten(), gradient.flatten(), dim=0) > 0.9, name
