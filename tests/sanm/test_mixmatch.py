"""The parts of a step against their formulas: guessed and refined labels, the mixed batch row by row, the loss and its parts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanm import losses, mixmatch
from sanm.masking import Masked
from sanm.mixmatch import Samples
from sanm.networks import make_network

K, T = 5, 0.5
SHAPE = (1, 8, 8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def networks(softmax: bool = False) -> tuple[nn.Module, nn.Module]:
    """One that is trained and its peer, with running statistics of their own."""
    torch.manual_seed(3)
    made = [make_network("c2d", K, *SHAPE[:2], softmax) for _ in range(2)]
    with torch.no_grad():
        for network in made:
            network.classifier.weight.mul_(10)  # so that predictions are far from uniform
            network.train()(3 * torch.randn(32, *SHAPE) + 1)
    return made[0].train(), made[1].eval()


def views(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, *SHAPE, generator=generator) for _ in range(count))


def plain_sharpened(rows: Tensor, temperature: float = T) -> Tensor:
    powers = rows.double() ** (1 / temperature)
    return (powers / powers.sum(dim=1, keepdim=True)).float()


# sharpening -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0])
def test_sharpening_is_the_plain_formula_and_keeps_the_order(temperature, generator):
    rows = torch.softmax(torch.randn(64, 10, generator=generator), dim=1)
    found = mixmatch.sharpen(rows, temperature)
    torch.testing.assert_close(found, plain_sharpened(rows, temperature), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(64))
    assert torch.equal(found.argsort(dim=1), rows.argsort(dim=1))


def test_sharpening_lowers_the_entropy_and_makes_no_nan_of_zeros_or_of_a_tiny_temperature(generator):
    rows = torch.softmax(torch.randn(64, 10, generator=generator), dim=1)
    entropy = [-(p * p.clamp_min(1e-30).log()).sum(dim=1) for p in (mixmatch.sharpen(rows, T), rows)]
    assert (entropy[0] < entropy[1]).all()
    assert torch.equal(mixmatch.sharpen(torch.eye(4), T), torch.eye(4))
    surest = F.one_hot(rows.argmax(dim=1), 10).float()
    torch.testing.assert_close(mixmatch.sharpen(rows, 1e-4), surest, atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [0, -0.5])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        mixmatch.sharpen(torch.eye(2), temperature)


# targets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", [False, True])
def test_guessed_labels_are_the_sharpened_mean_of_four_predictions_and_maps_those_of_the_first_view(
    softmax, generator
):
    network, peer = networks(softmax)
    images = views(2, 7, generator)
    own, other = copy.deepcopy(network), copy.deepcopy(peer)
    found = mixmatch.guess_labels(network, peer, images, T)
    with torch.no_grad():
        outputs = [own(view) for view in images]
        rows = [F.softmax(out.scores, dim=1) for out in [*outputs, *(other(view) for view in images)]]
    torch.testing.assert_close(found.targets, plain_sharpened(sum(rows) / 4), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.maps, outputs[0].maps)
    assert not torch.allclose(found.maps, outputs[1].maps)
    assert not found.targets.requires_grad and not found.maps.requires_grad
    if (
        softmax
    ):  # of probabilities softmax is taken once more: the surest of K classes has at most e / (e + K - 1)
        assert float(max(row.max() for row in rows)) <= 0.4047


@pytest.mark.parametrize("softmax", [False, True])
def test_refined_labels_mix_the_observed_label_and_the_own_mean_prediction_by_quality(softmax, generator):
    network, _ = networks(softmax)
    images, labels = views(2, 4, generator), torch.tensor([3, 3, 0, 4])
    clean = torch.tensor([1.0, 0.0, 0.25, 0.8], dtype=torch.float64)
    own = copy.deepcopy(network)
    found = mixmatch.refine_labels(network, images, labels, clean, T)
    with torch.no_grad():
        outputs = [own(view) for view in images]
    first, second = (F.softmax(out.scores, dim=1) for out in outputs)
    for i, (label, weight) in enumerate(zip(labels.tolist(), clean.tolist(), strict=True)):
        row = [(1 - weight) * float(first[i, c] + second[i, c]) / 2 + weight * (c == label) for c in range(K)]
        expected = plain_sharpened(torch.tensor([row]))[0]
        torch.testing.assert_close(found.targets[i], expected, rtol=1e-4, atol=1e-6)
    assert found.targets.dtype == torch.float32
    torch.testing.assert_close(found.maps, outputs[0].maps)
    assert not found.targets.requires_grad


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in network.named_buffers()}


def test_four_separate_forwards_move_the_running_statistics_of_the_trained_network_and_none_those_of_the_peer(
    generator,
):
    network, peer = networks()
    u, x = views(2, 7, generator), views(2, 4, generator)
    one_by_one, before = copy.deepcopy(network), {k: v.clone() for k, v in peer.state_dict().items()}
    weights = [p.clone() for p in network.parameters()]
    counted = int(network.encoder.bn1.num_batches_tracked)
    mixmatch.guess_labels(network, peer, u, T)
    mixmatch.refine_labels(network, x, torch.arange(4), torch.rand(4), T)
    with torch.no_grad():
        for view in (*u, *x):
            one_by_one(view)
    assert int(network.encoder.bn1.num_batches_tracked) == counted + 4
    found, expected = statistics(network), statistics(one_by_one)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())
    assert all(torch.equal(p, w) for p, w in zip(network.parameters(), weights, strict=True))


def test_predictions_are_made_with_the_statistics_of_each_view_alone(generator):
    network, peer = networks()
    u = views(2, 6, generator)
    other = tuple(torch.cat([view[:3], 5 + 3 * view[3:]]) for view in u)  # the same first three, among others
    found = [mixmatch.guess_labels(copy.deepcopy(network), peer, v, T).targets[:3] for v in (u, other)]
    assert not torch.allclose(*found, atol=1e-3)
    found = [mixmatch.guess_labels(copy.deepcopy(network).eval(), peer, v, T).targets[:3] for v in (u, other)]
    torch.testing.assert_close(*found)


# the mixed batch --------------------------------------------------------------------------------------------------------

SIZES = [(4, 4), (5, 2), (1, 6)]  # labelled and unlabelled; last batches are smaller


def step_batch(bx: int, bu: int, generator: torch.Generator, trained: int = 4):
    """Both sides, their targets, and masked copies with targets of their own."""
    x, u = (
        Samples(views(trained, n, generator), views(2, n, generator), torch.rand(n, generator=generator))
        for n in (bx, bu)
    )
    rows = lambda: torch.softmax(torch.randn(bx + bu, K, generator=generator), dim=1)  # noqa: E731
    masked = Masked(*views(2, bx + bu, generator), rows(), rows())
    return x, u, rows(), masked


def plain_rows(x: Samples, u: Samples, targets: Tensor, masked: Masked | None) -> list[tuple[Tensor, Tensor]]:
    """The rows of a step, image and target, in the order of the README, section 4, step 5."""
    rows, bx = [], len(x.clean)
    for side, start, count in ((x, 0, bx), (u, bx, len(u.clean))):
        for view in side.trained:
            rows += [(view[i], targets[start + i]) for i in range(count)]
        if masked is not None:
            rows += [(masked.at_max[start + i], masked.targets_max[start + i]) for i in range(count)]
            rows += [(masked.at_min[start + i], masked.targets_min[start + i]) for i in range(count)]
    return rows


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("trained", [4, 2])
@pytest.mark.parametrize(("bx", "bu"), SIZES)
def test_the_mixed_batch_is_that_of_a_plain_loop(bx, bu, trained, masks, share, generator):
    x, u, targets, masked = step_batch(bx, bu, generator, trained)
    masked = masked if masks else None
    rows = plain_rows(x, u, targets, masked)
    versions = trained + 2 * masks
    assert len(rows) == versions * (bx + bu)
    permutation = torch.randperm(len(rows), generator=generator)
    found = mixmatch.mix(mixmatch.stack(x, u, targets, masked), share, permutation)
    larger = max(share, 1 - share)
    partners = [rows[j] for j in permutation.tolist()]
    for i, (own, partner) in enumerate(zip(rows, partners, strict=True)):
        image, target = (larger * a + (1 - larger) * b for a, b in zip(own, partner, strict=True))
        torch.testing.assert_close(found.inputs[i], image, rtol=0, atol=1e-6)
        side, at = (0, i) if i < versions * bx else (1, i - versions * bx)
        torch.testing.assert_close(found.targets[side][at], target, rtol=0, atol=1e-6)
    assert [len(side) for side in found.targets] == [versions * bx, versions * bu]
    assert found.shapes == ((versions, bx), (versions, bu))
    assert found.inputs.dtype == torch.float32 and len(found.inputs) == len(rows)


@pytest.mark.parametrize(("bx", "bu"), SIZES)
def test_unlabelled_rows_that_are_not_forwarded_still_serve_as_partners(bx, bu, generator):
    x, u, targets, masked = step_batch(bx, bu, generator, trained=2)
    stack = mixmatch.stack(x, u, targets, masked)
    permutation = torch.arange(4 * (bx + bu) - 1, -1, -1)  # the first rows meet the last, unlabelled ones
    whole, part = (mixmatch.mix(stack, 0.7, permutation, forward) for forward in (True, False))
    assert torch.equal(part.inputs, whole.inputs[: 4 * bx])
    assert all(torch.equal(a, b) for a, b in zip(part.targets, whole.targets, strict=True))
    first = 0.7 * x.trained[0][0] + 0.3 * masked.at_min[-1]
    torch.testing.assert_close(part.inputs[0], first, rtol=0, atol=1e-6)


# the loss ---------------------------------------------------------------------------------------------------------------

WEIGHTS = {"weight": 3.0, "reconstruction_weight": 0.02}


@torch.no_grad()
def plain_parts(network: nn.Module, mixture, images: Tensor, masked: Masked | None, forward_unlabelled: bool):
    """L_x, L_u, L_prior and L_rec, from outputs of the network itself: the masked copies go first."""
    rec = 0.0
    if masked is not None:
        copies = torch.cat([masked.at_max, masked.at_min])
        rebuilt = network.decoder(network.encoder(copies))
        rec = sum(((half - images) ** 2).mean() for half in (rebuilt[: len(images)], rebuilt[len(images) :]))
    scores = network(mixture.inputs).scores
    count = len(mixture.targets[0])
    log_p, p = scores.log_softmax(dim=1), scores.softmax(dim=1)
    loss_x = -(mixture.targets[0] * log_p[:count]).sum() / count
    loss_u = ((p[count:] - mixture.targets[1]) ** 2).mean() if forward_unlabelled else 0.0
    prior = sum(torch.log(1 / K / p[:, c].mean()) / K for c in range(K))
    return [float(part) for part in (loss_x, loss_u, prior, rec)]


@pytest.mark.parametrize("forward_unlabelled", [True, False])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("bx", "bu"), SIZES)
def test_the_loss_of_a_step_is_the_weighted_sum_of_its_parts(bx, bu, masks, forward_unlabelled, generator):
    network, _ = networks()
    twin = copy.deepcopy(network)
    x, u, targets, masked = step_batch(bx, bu, generator)
    images, masked = torch.cat([x.reference[0], u.reference[0]]), masked if masks else None
    stack = mixmatch.stack(x, u, targets, masked)
    rows = (4 + 2 * masks) * (bx + bu)
    mixture = mixmatch.mix(stack, 0.3, torch.randperm(rows, generator=generator), forward_unlabelled)
    options = {**WEIGHTS, "forward_unlabelled": forward_unlabelled}
    found = mixmatch.step_loss(network, mixture, images, masked, **options)
    plain = plain_parts(twin, mixture, images, masked, forward_unlabelled)
    assert [float(part) for part in found[1:]] == pytest.approx(plain, rel=1e-4, abs=1e-6)
    total = plain[0] + 3 * plain[1] + plain[2] + 0.02 * plain[3]
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-4)
    assert found.total.requires_grad and not any(part.requires_grad for part in found[1:])
    # its two batches have moved the running statistics in the same order
    expected = statistics(twin)
    for name, value in statistics(network).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_all_of_the_network_learns_and_without_masks_all_but_the_decoder(generator):
    x, u, targets, masked = step_batch(4, 4, generator)
    images = torch.cat([x.reference[0], u.reference[0]])
    for given in (masked, None):
        network, _ = networks()
        stack = mixmatch.stack(x, u, targets, given)
        rows = (6 if given else 4) * 8
        mixture = mixmatch.mix(stack, 0.3, torch.randperm(rows, generator=generator))
        mixmatch.step_loss(network, mixture, images, given, **WEIGHTS).total.backward()
        without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        decoder = [f"decoder.{name}" for name, _ in network.decoder.named_parameters()]
        assert without == ([] if given else decoder)


def test_the_decoder_learns_as_the_weight_of_the_reconstruction_says(generator):
    x, u, targets, masked = step_batch(4, 4, generator)
    images, gradients = torch.cat([x.reference[0], u.reference[0]]), []
    permutation = torch.randperm(48, generator=generator)
    for weight in (0.02, 0.3):
        network, _ = networks()
        mixture = mixmatch.mix(mixmatch.stack(x, u, targets, masked), 0.3, permutation)
        options = {"weight": 3.0, "reconstruction_weight": weight}
        mixmatch.step_loss(network, mixture, images, masked, **options).total.backward()
        gradients.append(network.decoder[0].weight.grad)
    torch.testing.assert_close(gradients[1], 15 * gradients[0], rtol=1e-3, atol=1e-7)


def test_a_weight_of_zero_leaves_the_unlabelled_loss_out_of_the_total_and_in_the_log(generator):
    network, _ = networks()
    x, u, targets, _ = step_batch(4, 4, generator)
    mixture = mixmatch.mix(mixmatch.stack(x, u, targets, None), 0.3, torch.arange(32))
    found = mixmatch.step_loss(network, mixture, x.trained[0], None, weight=0.0, reconstruction_weight=0.02)
    assert float(found.unlabelled) > 0 and float(found.reconstruction) == 0
    assert float(found.total.detach()) == pytest.approx(float(found.labelled + found.prior), rel=1e-6)
    expected = losses.squared_error(network(mixture.inputs).scores[16:], mixture.targets[1])
    torch.testing.assert_close(found.unlabelled, expected.detach(), rtol=1e-4, atol=1e-7)
