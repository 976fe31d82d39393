"""SFA's parts against cases recorded from the authors' release."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.gpu.device import Device
from common.gpu.mixture import sklearn_upper_posterior, upper_posterior
from sfa import evaluation, losses, selection
from sfa.networks import InceptionResNetV2, PreActBlock, preact_resnet18
from sfa.training import summed_logits, train_semi, warm_up
from tests.sfa.toy import Toy

CPU = Device(torch.device("cpu"), "fp32", "tests")


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def assert_close(actual, expected, tolerance, name):
    actual, expected = torch.as_tensor(actual).double(), tensor(expected).double()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def test_losses_and_their_gradients(golden):
    for case in golden("sfa", "losses"):
        parts = ("logits_labelled", "logits_unlabelled")
        labelled, unlabelled = (tensor(case[part]).requires_grad_() for part in parts)
        targets, guessed = tensor(case["target_labelled"]), tensor(case["target_unlabelled"])
        counts, hard = tensor(case["class_count"]), tensor(case["hard_label"])
        bx = losses.soft_cross_entropy(losses.balanced(labelled, counts), targets)
        bu = losses.squared_error(losses.balanced(unlabelled, counts), guessed)
        warm_up = losses.warm_up_loss(labelled, labelled, hard, counts)
        values = {
            "soft_ce": losses.soft_cross_entropy(labelled, targets),
            "unlabelled_mse": losses.squared_error(unlabelled, guessed),
            "balanced_soft_ce": bx,
            "balanced_unlabelled_mse": bu,
            "webvision_balanced_soft_ce": bx,
            "balanced_hard_ce_mean": warm_up - F.cross_entropy(labelled, hard),
            "lambda_at_epoch40p25_warm30_lu25": torch.tensor(losses.ramp_up(25, 40.25, 30)),
        }
        for name, value in values.items():
            assert_close(value.detach(), case[name], 1e-5, f"{case.name} {name}")
        (bx + 3 * bu).backward()
        assert_close(labelled.grad, case["grad_labelled_of_bx_plus_3bu"], 1e-5, case.name)
        assert_close(unlabelled.grad, case["grad_unlabelled_of_bx_plus_3bu"], 1e-5, case.name)


def test_rampup_and_threshold(golden):
    for case in golden("sfa", "rampup"):
        lambda_u, warm_up = float(case["lambda_u"]), int(case["warm_up"])
        weights = [losses.ramp_up(lambda_u, position, warm_up) for position in case["epoch_position"]]
        assert np.allclose(weights, case["weight"], rtol=1e-14, atol=0), case.name
    for case in golden("sfa", "threshold"):
        num_classes, phi = int(case["num_classes"]), float(case["phi"])
        taus = [selection.confidence_threshold(num_classes, phi, int(e)) for e in case["epoch"]]
        assert np.allclose(taus, case["threshold"], rtol=1e-14, atol=0), case.name


def test_centroids(golden):
    for case in golden("sfa", "centroids"):
        features, labels, mask = (tensor(case[n]) for n in ("features", "labels", "mask"))
        num_classes = len(case["centroid_raw"])
        unit = selection.centred_unit_features(features)
        centroids, counts = selection.class_means(unit, labels, mask, num_classes)
        assert_close(centroids, case["centroid_centred_l2"], 1e-4, case.name)
        assert torch.equal(counts, torch.bincount(labels[mask], minlength=num_classes))
        everyone, _ = selection.class_means(unit, labels, torch.ones_like(mask), num_classes)
        assert_close(everyone, case["centroid_centred_l2_nomask"], 1e-4, case.name)
        for k in range(num_classes):  # every column of the release's matrix, as if all were of class k
            score = selection.closeness(unit, torch.full_like(labels, k), centroids[None])
            assert_close(score, case["score_cl2n_l2"][:, k], 1e-4, case.name)


def assert_same_probabilities(found: torch.Tensor, expected: np.ndarray, name: str):
    """Within 0.02, and the same side of 0.5 wherever the recorded probability is not within 0.05 of it."""
    found, clear = found.numpy(), np.abs(expected - 0.5) >= 0.05
    assert np.array_equal(found[clear] > 0.5, expected[clear] > 0.5), name
    assert np.abs(found - expected).max() < 0.02, name


@pytest.mark.parametrize("posterior", [upper_posterior, sklearn_upper_posterior])
def test_gmm(golden, posterior):
    for case in golden("sfa", "gmm"):
        labels = tensor(case["labels"])
        own = tensor(case["scores"])[torch.arange(len(labels)), labels]
        num_classes = case["scores"].shape[1]
        scaled = selection.scale_within_class(own, labels, num_classes)
        assert_close(scaled, case["normalised_own_class_score"], 1e-6, case.name)
        probabilities = selection.clean_probability(own, labels, num_classes, posterior)
        assert_same_probabilities(probabilities, case["clean_prob"], case.name)


def select_case(case, threshold: float, beta: float, min_draw_count: int, initial: bool):
    """The selection, whose steps are those of the case."""
    features, labels = tensor(case["features"]), tensor(case["labels"])
    logits = features @ tensor(case["balanced_head_weight"]) + tensor(case["balanced_head_bias"])
    confidence = F.softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    moments = selection.Moments(tensor(case["ema_mean_in"]), tensor(case["ema_sq_in"]))
    num_classes = logits.shape[1]
    found = selection.stochastic_feature_averaging(
        features,
        labels,
        confidence,
        None if initial else moments,
        normals=tensor(case["normal_draws"]).reshape(-1, num_classes, features.shape[1]),
        threshold=threshold,
        beta=beta,
        min_draw_count=min_draw_count,
    )
    confident = confidence > threshold
    assert np.array_equal(confident.numpy(), case["confident_mask"]), case.name
    unit = selection.centred_unit_features(features)
    centroids, _ = selection.class_means(unit, labels, confident, num_classes)
    assert_close(centroids, case["instant_centroid"], 1e-4, case.name)
    assert_close(found.moments.mean, case["ema_mean_out"], 1e-5, case.name)
    assert_close(found.moments.square, case["ema_sq_out"], 1e-5, case.name)
    assert_close(found.centroids.reshape(case["centroid_used"].shape), case["centroid_used"], 1e-4, case.name)
    for k in range(num_classes):
        score = selection.closeness(unit, torch.full_like(labels, k), found.centroids)
        assert_close(score, case["scores"][:, k], 2e-4, case.name)
    assert_same_probabilities(found.clean, case["clean_prob"], case.name)
    return found


def test_select(golden):
    for case in golden("sfa", "select"):
        epoch, num_classes = int(case["epoch"]), len(case["balanced_head_bias"])
        threshold = selection.confidence_threshold(num_classes, float(case["phi"]), epoch)
        initial = epoch == int(case["warm_up"]) + 1
        found = select_case(case, threshold, float(case["beta"]), min_draw_count=300, initial=initial)
        assert found.drawn.nonzero()[:, 0].tolist() == list(case["sampled_classes"]), case.name
        differing = (found.selected.numpy() != case["selected"]).sum()
        assert differing <= (np.abs(case["clean_prob"] - 0.5) < 0.05).sum(), case.name
        assert np.abs(found.counts.numpy() - case["selected_count"]).sum() <= differing, case.name


def test_webselect(golden):
    for case in golden("sfa", "webselect"):
        epoch = int(case["epoch"])
        threshold = selection.confidence_threshold(50, 1.005, epoch)
        found = select_case(case, threshold, beta=0.9, min_draw_count=0, initial=epoch <= 2)
        assert found.drawn.all()


def test_selection_stats(golden):
    for case in golden("sfa", "selection_stats"):
        arrays = (case[n] for n in ("clean_prob", "selected", "observed_label", "clean_label"))
        report = evaluation.selection_statistics(*arrays, int(case["num_classes"]))
        assert report["selected"] == int(case["selected_total"]), case.name
        assert report["auc"] == pytest.approx(float(case["auc_4dp"]), abs=6e-5), case.name
        for shot in evaluation.SHOTS:
            found = [report[f"{shot}_precision"], report[f"{shot}_recall"]]
            expected = case[f"{shot}_precision_recall"]
            assert found == pytest.approx(list(expected), abs=6e-5, nan_ok=True), (case.name, shot)


def test_block(golden):
    for case in golden("sfa", "block"):
        width, width_in = case["conv_a"].shape[:2]
        block = PreActBlock(width_in, width, int(case["stride"]))
        assert (block.conv_skip is not None) == ("conv_skip" in case.arrays), case.name
        with torch.no_grad():
            for i, norm in enumerate((block.norm1, block.norm2), start=1):
                parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
                for part, name in zip(parts, ("scale", "shift", "mean", "var"), strict=True):
                    part.copy_(tensor(case[f"norm{i}_{name}"]))
            for name in ("conv_a", "conv_b", "conv_skip"):
                if name in case.arrays:
                    getattr(block, name).weight.copy_(tensor(case[name]))
            x = tensor(case["x"])
            assert_close(block.eval()(x), case["y_eval"], 1e-4, case.name)
            assert_close(block.train()(x), case["y_train"], 1e-4, case.name)


def hashed(count: int, start: int = 0) -> np.ndarray:
    """The recorded cases' recipe for weights and inputs: numbers in [-0.5, 0.5) from a hash of their positions."""
    h = (np.arange(start, start + count, dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(2**32)
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(2246822519)) % np.uint64(2**32)
    h ^= h >> np.uint64(13)
    return h / 2**32 - 0.5


def fill(network: nn.Module) -> nn.Module:
    """Weights by the recipe; a fresh network's batch norms already stand as it asks."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                shift = 1000003 if module is network.heads.balanced else 0
                weight = module.weight
                values = hashed(weight.numel(), shift) * np.sqrt(24 / weight[0].numel())
                weight.copy_(torch.from_numpy(values.astype(np.float32)).reshape(weight.shape))
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Linear):
                module.bias.copy_(0.01 * torch.arange(len(module.bias)))
    return network.eval()


def test_backbone(golden):
    for case in golden("sfa", "backbone"):
        num_classes = case["standard_logits"].shape[1]
        if "x" in case.arrays:
            network, x, tolerance = preact_resnet18(num_classes), tensor(case["x"]), 1e-3
        else:
            network, tolerance = InceptionResNetV2(num_classes), 1e-2
            x = torch.from_numpy((4 * hashed(3 * 299 * 299, 77)).astype(np.float32)).reshape(1, 3, 299, 299)
        parameters = list(network.parameters())
        assert sum(p.numel() for p in parameters) == int(case["param_count"]), case.name
        assert len(parameters) == int(case["tensor_count"]), case.name
        with torch.no_grad():
            outputs = fill(network)(x)
        for found, name in zip(outputs, ("features", "standard_logits", "balanced_logits"), strict=True):
            error = np.abs(found.numpy() - case[name]).max() / np.abs(case[name]).max()
            assert error < tolerance, (case.name, name)


def blocks(total: int, size: int) -> list[torch.Tensor]:
    return list(torch.arange(total).split(size))


@pytest.mark.parametrize("kind", ["warmup_cifar", "warmup_web"])
def test_warm_up_epoch(golden, kind):
    for case in golden("sfa", kind):
        network = Toy(case, "net_before")
        optimizer = torch.optim.SGD(network.parameters(), float(case["lr"]), momentum=0.9, weight_decay=5e-4)
        x = tensor(case["x"])
        batches = [((x[index],), index) for index in blocks(len(x), int(case["batch_size"]))]
        counts = tensor(case["observed_class_count"])
        totals = warm_up(network, optimizer, batches, tensor(case["label"]), counts, CPU)
        assert_close(totals, case["total_loss"], 1e-4, case.name)
        network.assert_equals(case, "net_after", 1e-4)


@pytest.mark.parametrize(("kind", "forward_unlabelled"), [("train_cifar", True), ("train_web", False)])
def test_semi_supervised_epoch(golden, kind, forward_unlabelled):
    for case in golden("sfa", kind):
        network, peer = Toy(case, "net_before"), Toy(case, "peer")
        optimizer = torch.optim.SGD(network.parameters(), float(case["lr"]), momentum=0.9, weight_decay=5e-4)
        size, labelled = int(case["batch_size"]), len(case["x_label"])
        x1, x2, u1, u2 = (tensor(case[n]) for n in ("x_view1", "x_view2", "u_view1", "u_view2"))
        steps, epoch, lambda_u = labelled // size + 1, float(case["epoch"]), float(case["lambda_u"])
        ramp = [losses.ramp_up(lambda_u, epoch + step / steps, 30) for step in range(steps)]
        weights, permutations = iter(case["beta_draw"]), iter(case["permutation"])
        batches = [((x1[i], x2[i]), i) for i in blocks(labelled, size)]
        others = itertools.cycle([((u1[i], u2[i]), i) for i in blocks(len(u1), size)])
        found = train_semi(
            network,
            peer,
            optimizer,
            batches,
            others,
            labels=tensor(case["x_label"]),
            clean=tensor(case["x_weight"]),
            class_counts=tensor(case["class_count"]),
            weight=ramp.__getitem__,
            draw_lam=lambda draws=weights: float(next(draws)),
            draw_permutation=lambda rows, draws=permutations: tensor(next(draws)[:rows]),
            temperature=0.5,
            device=CPU,
            forward_unlabelled=forward_unlabelled,
        )
        assert_close(found[:, 0], case["total_loss"], 2e-4, case.name)
        if forward_unlabelled:
            assert_close(found[:, 1:], case["loss_parts"][:, [0, 1, 3, 4]], 2e-4, case.name)
        else:
            assert_close(found[:, 3], case["loss_parts"][:, 0], 2e-4, case.name)
        network.assert_equals(case, "net_after", 2e-4)
        peer.assert_equals(case, "peer", 0)


def test_test_protocol(golden):
    for case in golden("sfa", "test_cifar"):
        logits = toy_logits(case)
        counts = np.ones(logits.shape[1], dtype=int)
        report = evaluation.accuracies(logits.argmax(dim=1).numpy(), case["label"], counts)
        assert round(report["test_accuracy"], 2) == pytest.approx(float(case["accuracy_percent_2dp"]))
        recall = [round(report[f"class_{k}"], 2) for k in range(logits.shape[1])]
        assert recall == pytest.approx(list(case["class_accuracy_percent_2dp"]), abs=0.011)


def test_web_test_protocol(golden):
    for case in golden("sfa", "test_web"):
        logits, labels = toy_logits(case), tensor(case["label"])
        found = [evaluation.top_k_accuracy(logits, labels, k) for k in (1, 5)]
        assert found == pytest.approx(list(case["top1_top5"]), abs=0.006), case.name


def toy_logits(case) -> torch.Tensor:
    x = tensor(case["x"])
    networks = [Toy(case, "net1"), Toy(case, "net2")]
    batches = [((x[index],), index) for index in blocks(len(x), 16)]
    logits = summed_logits(networks, batches, len(x), case["summed_scores"].shape[1], CPU)
    assert_close(logits, case["summed_scores"], 1e-4, case.name)
    return logits
