"""Me-Momentum's parts against cases recorded from the authors' release. Label noise alone: tests/common/test_noise_golden.py."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from common import noise
from common.gpu.device import Device
from me_momentum.alternation import Limits, Place, advance, learning_rate
from me_momentum.confident import confident_examples
from me_momentum.flags import loop_limits, parse_args
from me_momentum.networks import LeNet, ResNet, make_network
from me_momentum.training import predict
from me_momentum.validation import accuracy, balanced_accuracy, batch_mean_accuracy, split

LIMITS = ("n_epoch", "max_outer_loop", "max_inner_loop")
CPU = Device(torch.device("cpu"), "fp32", "tests")


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def walk(validation: np.ndarray, test: np.ndarray, limits: Limits, lr: float) -> dict:
    """What happens in each epoch when the validation accuracies are these; the test accuracies are read when wanted."""
    columns = ("epoch", "phase", "round_id", "lr", "confident_set_id", "saved_latest", "new_best", "done")
    found = {name: [] for name in columns}
    place, test, phases, latest, selection_model, reported = Place(), iter(test), -1, None, [], 0.0
    for number, accuracy_now in enumerate(validation.tolist(), start=1):
        if place.epoch == 0:
            phases += 1
            if place.round > 0:
                selection_model.append(latest)
            else:
                latest = None
        following, verdict = advance(place, accuracy_now, limits)
        if verdict.best_of_loop:
            latest = number
        if verdict.best_of_run:
            reported = next(test)
        row = (place.epoch, int(place.round > 0), phases, learning_rate(place, lr), len(selection_model))
        row = (*row, int(verdict.best_of_loop), int(verdict.best_of_run), following.done)
        for name, value in zip(columns, row, strict=True):
            found[name].append(value)
        place = following
    unread = list(test)
    return found | {"selection_model": selection_model, "final_test_acc": reported, "unread": unread}


def test_control(golden):
    for case in golden("me_momentum", "control"):
        words = [word for name in LIMITS for word in (f"--{name}", str(int(case[name])))]
        limits = loop_limits(parse_args(words))
        found = walk(case["val_acc"], case["test_acc"], limits, 0.01)
        # done after the last epoch, and not before
        assert found.pop("done") == [False] * (len(case["val_acc"]) - 1) + [True], case.name
        assert found.pop("unread") == [], case.name
        assert set(found) == set(case.arrays) - {"val_acc", "test_acc", *LIMITS}
        for name, values in found.items():
            assert np.array_equal(values, case[name]), (case.name, name)


def test_schedules(golden):
    for case in golden("me_momentum", "schedules"):
        rounds = case["inner_round"]
        found = [learning_rate(Place(round=3, epoch=e), float(rounds[0])) for e in range(len(rounds))]
        assert np.array_equal(found, rounds), case.name
        assert len(set(found)) == 3
        early = [learning_rate(Place(outer=1, epoch=e), float(rounds[0])) for e in range(len(rounds))]
        assert set(early) == {float(rounds[0])}


def test_eval(golden):
    for case in golden("me_momentum", "eval"):
        logits, labels = tensor(case["logits"]), tensor(case["labels"])
        size, num_classes = int(case["batch_size"]), int(case["num_classes"])
        parts = torch.arange(len(labels)).split(size)
        predicted = predict(nn.Identity(), [((logits[part],), part) for part in parts], len(labels), CPU)
        assert np.array_equal(predicted, case["predictions"]), case.name

        balanced = balanced_accuracy(predicted, labels, num_classes)
        assert np.array_equal(balanced, case["balanced_acc"], equal_nan=True), case.name
        assert accuracy(predicted, labels) == pytest.approx(float(case["sample_mean_acc"]), rel=1e-12)
        batch_mean = batch_mean_accuracy(predicted, labels, size)
        assert batch_mean == pytest.approx(float(case["reported_test_acc"]), rel=0, abs=1e-4), case.name

        confident = confident_examples(predicted, labels)
        assert np.array_equal(confident, case["selected"]), case.name
        assert np.array_equal(labels[confident], case["selected_labels"]), case.name


def test_split(golden):
    for case in golden("me_momentum", "split"):
        clean, seed, num_classes = case["clean"], int(case["seed"]), int(case["num_classes"])
        rate = float(case["rate"]) * (1 - 1 / num_classes if case["include_noise"] else 1)
        noise_type = case.description["noise_type"]
        noisy = noise.add_noise(noise_type, clean, rate, num_classes, seed, case["images"])
        parts = split(len(clean), float(case["train_fraction"]), seed)
        for part, index in (("train", parts.train), ("val", parts.validation)):
            assert np.array_equal(index, case[f"{part}_index"]), case.name
            assert np.array_equal(noisy[index], case[f"{part}_noisy"]), case.name
            assert np.array_equal(clean[index], case[f"{part}_clean"]), case.name


def network_of(case) -> nn.Module:
    """The network that a case is about: one of so many layers with weights."""
    name = {5: "lenet", 21: "resnet18", 37: "resnet34"}[len(case.description["layers"])]
    (_, channels, size, _), num_classes = case["inputs"].shape, case["logits"].shape[1]
    return make_network(name, num_classes, channels, size)


def weighted(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def fill(network: nn.Module, recipe: str) -> None:
    """Give layer k the weights of the recipe, whose two seeds stand in its text."""
    of_weight, of_bias = map(int, re.findall(r"RandomState\((\d+)\+k\)", recipe))
    with torch.no_grad():
        for k, layer in enumerate(weighted(network)):
            shape = tuple(layer.weight.shape)
            values = np.random.RandomState(of_weight + k).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            layer.weight.copy_(tensor(values.astype(np.float32)))
            if layer.bias is not None:
                bias = np.random.RandomState(of_bias + k).standard_normal(len(layer.bias)) * 0.1
                layer.bias.copy_(tensor(bias.astype(np.float32)))


def places(network: LeNet | ResNet) -> dict[str, nn.Module]:
    """The modules by the names of the cases; a stage is its last block."""
    if isinstance(network, LeNet):
        return dict(network.named_children())
    found = {"conv1": network.stem, "bn1": network.stem_norm, "classifier": network.classifier}
    stage = block = 0
    for number, module in enumerate(network.blocks):
        fresh = number == 0 or module.conv1.out_channels != network.blocks[number - 1].conv1.out_channels
        stage, block = (stage + 1, 0) if fresh else (stage, block + 1)
        found[f"stage{stage}.{block}"] = found[f"stage{stage}"] = module
    return found


def keep_shapes(shapes: dict, name: str, _module, inputs: tuple, output: torch.Tensor) -> None:
    shapes |= {name: list(output.shape), f"into {name}": list(inputs[0].shape)}


def test_models(golden):
    for case in golden("me_momentum", "model"):
        network = network_of(case).eval()
        assert sum(p.numel() for p in network.parameters()) == case.description["parameter_count"]
        layers = [
            [k, type(layer).__name__, list(layer.weight.shape), layer.bias is not None]
            for k, layer in enumerate(weighted(network))
        ]
        assert layers == case.description["layers"], case.name

        fill(network, case.description["weight_recipe"])
        shapes = {}
        for name, module in places(network).items():
            module.register_forward_hook(partial(keep_shapes, shapes, name))
        with torch.no_grad():
            logits = network(tensor(case["inputs"]))
        torch.testing.assert_close(logits, tensor(case["logits"]), rtol=1e-3, atol=1e-3, msg=case.name)
        expected = dict(case.description["output_shapes_of_submodules"])
        if "avgpool" in expected:  # a mean over the maps, no module here
            assert shapes["into classifier"] == expected.pop("avgpool")[:2]
        assert {name: shapes.get(name) for name in expected} == expected, case.name


def test_initial_weights_are_drawn_layer_by_layer_in_the_order_of_the_cases(golden):
    for case in golden("me_momentum", "model"):
        torch.manual_seed(3)
        network = network_of(case)
        torch.manual_seed(3)
        for layer, (_, kind, shape, bias) in zip(weighted(network), case.description["layers"], strict=True):
            alone = getattr(nn, kind)(shape[1], shape[0], *shape[2:3], bias=bias)
            assert torch.equal(layer.weight, alone.weight), case.name
            assert not bias or torch.equal(layer.bias, alone.bias), case.name
