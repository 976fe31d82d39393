"""The cases recorded from the authors' code, but for noise, augmentation and pre-training, which have tests of their own."""

import random

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

from common.gpu.device import Device
from sanm.choices import CLOTHING_RULE, MaskRule, averages_history
from sanm.clothing import balanced_subset, subset_size
from sanm.losses import negative_entropy, prior_penalty, ramp_up, soft_cross_entropy, squared_error
from sanm.masking import extrema, mask, mask_clothing, mask_ratio, side_lengths
from sanm.mixmatch import Samples, guess_labels, mix, refine_labels, stack
from sanm.networks import clothing_network, make_network
from sanm.selection import clean_probability, divide, normalised, remember
from sanm.training import Masks, Step, accuracy, learning_rate, train_divided, warm_up
from tests.sanm.toy import toy_from, weights_of

CPU = Device(torch.device("cpu"), "fp32", "")
RELEASED = MaskRule(anchor="corner")


def tensors(case, *names: str) -> list[Tensor]:
    return [torch.from_numpy(case[name]) for name in names]


def close(actual, expected, rtol: float = 0, atol: float = 1e-6) -> None:
    expected = torch.as_tensor(np.asarray(expected))
    actual = actual if isinstance(actual, Tensor) else torch.as_tensor(np.asarray(actual))
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol, check_device=False)


# masking --------------------------------------------------------------------------------------------------------------


def test_masking(golden):
    for case in golden("sanm", "mask_cifar"):
        images, maps, targets, draws = tensors(case, "images", "featmap", "targets_in", "draws")
        clean, (height, width) = torch.from_numpy(case["clean_prob"])[:, 0], images.shape[2:]
        at = extrema(maps, height, width)
        for ours, name in zip(at, ("row_max", "col_max", "row_min", "col_min"), strict=True):
            assert ours.tolist() == case[name].tolist(), (case.name, name)
        ratio = mask_ratio(draws[:, 0], clean, 0.03)
        close(ratio, case["rho"])
        rows, columns = side_lengths(0.5 * ratio * height * width, draws[:, 1])
        assert rows.tolist() == case["mask_h"].tolist() and columns.tolist() == case["mask_w"].tolist()
        masked = mask(images, maps, clean, targets, draws, RELEASED)
        close(masked.at_max, case["img_max"])
        close(masked.at_min, case["img_min"])
        close(masked.targets_max, case["targets_out"])
        assert masked.targets_min is masked.targets_max


def test_masking_of_clothing1m_as_released(golden):
    for case in golden("sanm", "mask_clothing_released"):
        images, maps, clean, draws = tensors(case, "images", "featmap", "clean_prob", "draws")
        clean, targets = clean[:, 0], torch.eye(14, dtype=torch.float64)[: len(images)]
        at = extrema(maps, *images.shape[2:])
        for ours, name in zip(at, ("row_max", "col_max", "row_min", "col_min"), strict=True):
            assert ours.tolist() == case[name].tolist(), (case.name, name)
        rule = CLOTHING_RULE._replace(anchor="corner", as_released=True)
        masked = mask_clothing(images, maps, clean, targets, draws, rule)
        close(masked.at_max, case["img_max"])
        close(masked.at_min, case["img_min"])
        # the targets lose what the release takes for ratios: areas in pixels
        top = torch.arange(len(images))
        close(1 - masked.targets_max[top, top], case["area_px_max"], rtol=1e-6)
        close(1 - masked.targets_min[top, top], case["area_px_min"], rtol=1e-6)


# losses, selection, schedule, test -------------------------------------------------------------------------------------


def test_losses(golden):
    for case in golden("sanm", "losses"):
        scores_x, targets_x = tensors(case, "scores_x", "targets_x")
        scores_u, targets_u = tensors(case, "scores_u", "targets_u")
        close(soft_cross_entropy(scores_x, targets_x), case["loss_x"], rtol=2e-6)
        close(squared_error(scores_u, targets_u), case["loss_u"], rtol=2e-6, atol=0)
        close(negative_entropy(scores_x), case["neg_entropy_x"], rtol=2e-6)
        weight = ramp_up(float(case["lambda_u"]), float(case["epoch"]), float(case["warm_up"]))
        close(weight, case["weight_u"], atol=1e-12)


def test_ramp(golden):
    for case in golden("sanm", "ramp"):
        most, warm = float(case["lambda_u"]), float(case["warm_up"])
        close([ramp_up(most, float(now), warm) for now in case["current"]], case["weight"], atol=1e-12)


def test_clean_probability(golden):
    for case in golden("sanm", "cleanprob"):
        labels, history = torch.from_numpy(case["labels"]), []
        averages = averages_history(float(case["r"]), released=True)
        for epoch, scores in enumerate(torch.from_numpy(case["scores"])):
            losses = normalised(torch.nn.functional.cross_entropy(scores, labels, reduction="none"))
            close(losses, case["norm_losses"][epoch])
            history = remember(history, losses)
            values = torch.stack(history).mean(dim=0) if averages else losses
            clean = clean_probability(values, case.description["numpy_seed_before_each_fit"])
            close(clean, case["clean_prob"][epoch], atol=1e-5)
            assert divide(clean, 0.5).tolist() == case["selected"][epoch].tolist()
        assert len(history) <= 5


def test_learning_rate(golden):
    for case in golden("sanm", "lr_schedule"):
        ours = [learning_rate(int(epoch), 0.02, 150) for epoch in case["cifar_epoch"]]
        close(ours, case["cifar_lr"], atol=1e-15)
        ours = [learning_rate(int(epoch), 0.0009, 40) for epoch in case["clothing_epoch"]]
        close(ours, case["clothing_lr"], atol=1e-15)


def test_test_accuracy(golden):
    for case in golden("sanm", "test_ensemble"):
        first, second, labels = tensors(case, "scores_1", "scores_2", "labels")
        ours = accuracy(first + second, labels)
        close(ours, case["accuracy"], atol=1e-4)
        close(max(99.0, ours), case["best_when_previous_best_99"], atol=1e-4)


# networks -------------------------------------------------------------------------------------------------------------


def fill(network: torch.nn.Module, shift: int) -> None:
    """Weights by the rule of the cases: nothing of them has to be stored."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    scales = {id(m.weight) for m in norms}
    for j, parameter in enumerate(network.parameters()):
        k = np.arange(parameter.numel(), dtype=np.float64)
        if id(parameter) in scales:
            values = 1 + 0.1 * np.sin(0.3 * k + j + shift)
        elif parameter.dim() == 1:
            values = 0.05 * np.sin(0.3 * k + j + shift)
        else:
            size = 1.3 / np.sqrt(parameter.numel() / parameter.shape[0])
            values = size * np.sin(0.7 * k + 0.013 * k * np.cos(k) + j + shift)
        parameter.data = torch.from_numpy(values.reshape(parameter.shape).astype(np.float32))


def same_to_a_thousandth(ours: Tensor, case, name: str) -> None:
    expected = torch.from_numpy(case[name])
    assert ours.shape == expected.shape, (case.name, name)
    assert (ours - expected).abs().max() <= 1e-3 * expected.abs().max(), (case.name, name)


def network_of_shapes(shapes: list[tuple[int, ...]], classes: int, size: int) -> torch.nn.Module:
    """The one of our networks for images of that size whose parameters have the given shapes."""
    if size == 224:
        made = [clothing_network("resnet50", classes)]
    else:
        made = [make_network(base, classes, 3, size) for base in ("c2d", "dividemix")]
    return next(network for network in made if [tuple(p.shape) for p in network.parameters()] == shapes)


def test_networks(golden):
    for case in golden("sanm", "model"):
        shapes = [tuple(shape) for _, _, shape in case.description["param_order"]]
        (images,), shift = tensors(case, "images"), int(case["shift"])
        size = images.shape[2]
        network = network_of_shapes(shapes, len(case["raw_scores"][0]), size)
        assert sum(p.numel() for p in network.parameters()) == case.description["parameter_count_total"]
        decoder = sum(p.numel() for p in network.decoder.parameters())
        assert decoder == case.description["parameter_count_decoder"]
        fill(network, shift)
        network.eval()
        with torch.no_grad():
            out = network(images, images)
            meaning = case.description["arrays"]["returned_scores"]["meaning"]
            network.softmax = "equal to raw_scores" not in meaning
            returned = network(images).scores
        channels = case["featmap"].shape[1]
        same_to_a_thousandth(out.maps[:, :channels], case, "featmap")
        same_to_a_thousandth(out.maps.mean(dim=(2, 3)), case, "feature")
        same_to_a_thousandth(out.scores, case, "raw_scores")
        close(returned, case["returned_scores"], rtol=1e-3, atol=2e-3)
        step = size // case["reconstruction"].shape[2]
        same_to_a_thousandth(out.reconstruction[:, :, ::step, ::step], case, "reconstruction")


# training -------------------------------------------------------------------------------------------------------------


def test_warm_up(golden, monkeypatch):
    norms, plain = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(plain(*given)))
    for case in golden("sanm", "warmup"):
        network = toy_from(case, "before")
        optimizer = SGD(network.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
        batches, labels = tensors(case, "batches", "labels")
        index = torch.arange(labels.numel()).view(labels.shape)
        norms.clear()
        warm_up(
            network,
            optimizer,
            [((images,), own) for images, own in zip(batches, index, strict=True)],
            labels.flatten(),
            CPU,
            penalise_confidence=case.description["noise_mode"] == "asym",
            clip=1.0,
        )
        close(torch.stack(norms), case["grad_norms"], rtol=1e-4)
        after = weights_of(case, "after")
        torch.testing.assert_close(dict(network.state_dict()), after, rtol=0, atol=1e-5)


def replayed(case) -> dict:
    """The views, labels, clean probabilities and draws of a recorded step."""
    names = ("views_x", "views_u", "labels_x", "clean_prob_x", "clean_prob_u", "draws", "permutation")
    return dict(zip(names, tensors(case, *names), strict=True))


def test_a_training_step_in_its_parts(golden):
    for case in golden("sanm", "train_step"):
        softmax, s = bool(case["softmax_output"]), replayed(case)
        network, peer = toy_from(case, "before", softmax).train(), toy_from(case, "peer", softmax).eval()
        guessed = guess_labels(network, peer, tuple(s["views_u"][4:]), 0.5)
        refined = refine_labels(network, tuple(s["views_x"][4:]), s["labels_x"], s["clean_prob_x"], 0.5)
        close(guessed.targets, case["guessed_u"], atol=1e-5)
        close(refined.targets, case["refined_x"], atol=1e-5)
        images = torch.cat([s["views_x"][4], s["views_u"][4]])
        maps = torch.cat([refined.maps, guessed.maps])
        clean = torch.cat([s["clean_prob_x"], s["clean_prob_u"]])
        targets = torch.cat([refined.targets, guessed.targets])
        masked = mask(images, maps, clean, targets, s["draws"], RELEASED)
        close(masked.at_max, case["masked_max"], atol=1e-5)
        close(masked.at_min, case["masked_min"], atol=1e-5)
        close(masked.targets_max, case["modulated_targets"], atol=1e-5)
        x, u = (
            Samples(tuple(s[f"views_{side}"][:4]), tuple(s[f"views_{side}"][4:]), s[f"clean_prob_{side}"])
            for side in "xu"
        )
        inputs, targets = (torch.cat(parts) for parts in stack(x, u, targets, masked))
        lam, permutation = float(case["beta_draw"]), s["permutation"]
        expected = np.concatenate([case["mixed_targets_x"], case["mixed_targets_u"]])
        close(mix(targets, lam, permutation), expected, atol=1e-5)
        scores = network(mix(inputs, lam, permutation)).scores
        close(scores, case["scores_mixed"], atol=1e-5)
        close(prior_penalty(scores), case["loss_prior"], atol=1e-5)


def test_a_whole_training_step(golden):
    for case in golden("sanm", "train_step"):
        softmax, s = bool(case["softmax_output"]), replayed(case)
        network, peer = toy_from(case, "before", softmax), toy_from(case, "peer", softmax)
        optimizer = SGD(network.parameters(), float(case["lr"]), momentum=0.9, weight_decay=5e-4)
        count_x, count_u = len(s["labels_x"]), s["views_u"].shape[1]
        pieces = iter(s["draws"].split([count_x, count_u]))
        weight = ramp_up(float(case["lambda_u"]), float(case["epoch"]), float(case["warm_up"]))
        step = Step(
            lambda views, clean: Samples(views[:4], views[4:], clean),
            masks=Masks(lambda *_, pieces=pieces: next(pieces), mask, RELEASED, torch.Generator()),
            draw_lam=lambda case=case: float(case["beta_draw"]),
            draw_permutation=lambda _, s=s: s["permutation"],
            weight=lambda _, weight=weight: weight,
            temperature=0.5,
            reconstruction_weight=0.02,
            device=CPU,
        )
        losses = train_divided(
            network,
            peer,
            optimizer,
            [(tuple(s["views_x"]), torch.arange(count_x))],
            iter([(tuple(s["views_u"]), torch.arange(count_x, count_x + count_u))]),
            step,
            labels=torch.cat([s["labels_x"], torch.zeros(count_u, dtype=torch.int64)]),
            clean=torch.cat([s["clean_prob_x"], s["clean_prob_u"]]),
        )
        names = [f"loss_{name}" for name in ("total", "x", "u", "prior", "recon")]
        close(weight, case["weight_u"], atol=1e-9)
        close(losses[0], [float(case[name]) for name in names], rtol=1e-5, atol=1e-5)
        after = weights_of(case, "after")
        torch.testing.assert_close(dict(network.state_dict()), after, rtol=0, atol=1e-5)


def test_class_balanced_subset(golden):
    for case in golden("sanm", "clothing_subset"):
        labels, asked = case["labels"], int(case["num_samples"])
        order = list(range(len(labels)))
        random.Random(int(case["python_seed"])).shuffle(order)
        assert order == case["first_shuffle"].tolist()
        chosen = balanced_subset(labels, asked, 14, random.Random(int(case["python_seed"])))
        assert chosen.tolist() == case["selected"].tolist()
        assert np.bincount(labels[chosen], minlength=14).tolist() == case["per_class"].tolist()
        assert subset_size(labels, asked, 14) == len(chosen)
