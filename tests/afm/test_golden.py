"""AFM's parts against cases recorded from the authors' release, and against the paper's Figure 2."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afm.attention import GroupAttention
from afm.mixing import mixed_features, mixed_loss, target_weights, total_loss
from afm.networks import AttentiveFeatureMixup, Outputs, make_network
from afm.train import groups_of_batch, keep_weights, learning_rate, parse_args, train
from afm.training import evaluate
from common.gpu.device import Device

CPU = Device(torch.device("cpu"), "fp32", "tests")
RELEASED = parse_args(["--fidelity", "released"])


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def assert_close(actual, expected, name, rtol=1e-5, atol=1e-6):
    actual, expected = (torch.as_tensor(values).detach().double() for values in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_recorded(case, found: dict, **tolerance) -> None:
    """Each value is that of the case with its name."""
    for name, value in found.items():
        assert_close(value, case[name], f"{case.name} {name}", **tolerance)


def released_head(case, prefix: str = "") -> AttentiveFeatureMixup:
    """The release's network without its backbone, with the parameters of a case."""
    hidden, width = case[f"{prefix}proj_first_weight"].shape
    attention = GroupAttention(width, 2, hidden=hidden, attention=RELEASED.attention)
    network = AttentiveFeatureMixup(nn.Identity(), width, len(case[f"{prefix}cls_bias"]), attention)
    with torch.no_grad():
        for name, parameter in released_names(network).items():
            parameter.copy_(tensor(case[prefix + name]))
    return network


def released_names(network: AttentiveFeatureMixup) -> dict[str, nn.Parameter]:
    """All parameters of such a network by the names of the cases."""
    first, second = network.attention.projections
    parts = {"proj_first": first, "proj_second": second, "attn": network.attention.score[-1]}
    parts["cls"] = network.classifier
    names = {f"{part}_{kind}": own for part in parts for kind, own in parts[part].named_parameters()}
    assert len(names) == len(list(network.parameters()))
    return names


def grouping(args, generator_seed: int = 0):
    """The script's groups for a batch of so many rows."""
    generator, rng = torch.Generator().manual_seed(generator_seed), np.random.default_rng(generator_seed)
    return lambda rows, mixing=True: groups_of_batch(rows, args, mixing, generator, rng)


def losses_of(outputs: Outputs, labels: torch.Tensor, groups: torch.Tensor, args) -> tuple[torch.Tensor, ...]:
    """The mixed, the plain and the total loss as the flags say."""
    mixed = mixed_loss(outputs.mixed, labels[groups], target_weights(outputs.weights, args.mix_target))
    plain = F.cross_entropy(outputs.plain, labels)
    return mixed, plain, total_loss(mixed, plain, args.weight_mixed, args.weight_plain)


def figure2_network(case) -> AttentiveFeatureMixup:
    group_size, hidden, width = case["proj_weight"].shape
    options = {name: case.description["options"][name] for name in ("interaction", "attention")}
    attention = GroupAttention(width, group_size, hidden=hidden, **options)
    shared = "plain_cls_weight" not in case.arrays
    network = AttentiveFeatureMixup(nn.Identity(), width, len(case["mix_cls_bias"]), attention, shared)
    with torch.no_grad():
        for name, parameters in figure2_names(network).items():
            for parameter, values in zip(parameters, each(case[name], parameters), strict=True):
                parameter.copy_(values)
    return network


def figure2_names(network: AttentiveFeatureMixup) -> dict[str, list[nn.Parameter]]:
    """All parameters by the names of the cases, which stack the projections."""
    layers = {"proj": list(network.attention.projections), "attn": [network.attention.score[-1]]}
    layers["mix_cls"] = [network.mixed_classifier]
    if network.classifier is not network.mixed_classifier:
        layers["plain_cls"] = [network.classifier]
    names = {}
    for part, own in layers.items():
        names |= {f"{part}_{kind}": [getattr(layer, kind) for layer in own] for kind in ("weight", "bias")}
    assert sum(map(len, names.values())) == len(list(network.parameters()))
    return names


def each(array: np.ndarray, parameters: list) -> torch.Tensor:
    """An array of a case with the parameters it is of along its first axis."""
    return tensor(array).reshape(len(parameters), *parameters[0].shape)


def test_groups_of_k_as_in_figure_2(golden):
    for case in golden("afm", "figure2_reference"):
        tolerance = {"rtol": 1e-4, "atol": 1e-6}
        network = figure2_network(case)
        features, labels, groups = (tensor(case[name]) for name in ("features", "labels", "groups"))
        features.requires_grad_()
        scores = network.attention.scores(features[groups])
        alpha = scores.sigmoid() if network.attention.attention == "sigmoid" else scores.softmax(dim=1)
        outputs = network(features, groups)
        one_hot = F.one_hot(labels, case["mixed_targets"].shape[1]).float()
        weights = f"--weight-mixed {case['weight_mixed']} --weight-plain {case['weight_plain']}"
        mixed, plain, total = losses_of(outputs, labels, groups, parse_args(weights.split()))
        found = {
            "attention": alpha,
            "mix_weights": outputs.weights,
            "mixed_features": mixed_features(features[groups], outputs.weights),
            "mixed_targets": mixed_features(one_hot[groups], outputs.weights),
            "mixed_logits": outputs.mixed,
            "plain_logits": outputs.plain,
            "ce_mixed": mixed,
            "ce_plain": plain,
            "total_loss": total,
        }
        total.backward()
        found["grad_features"] = features.grad
        for name, own in figure2_names(network).items():
            gradients = torch.stack([parameter.grad for parameter in own])
            found[f"grad_{name}"] = gradients.reshape(case[f"grad_{name}"].shape)
        assert_recorded(case, found, **tolerance)


def test_pairs_of_the_released_head_with_losses_and_gradients(golden):
    for case in golden("afm", "head_pairs"):
        weights = f"--weight-naive {case['flag_weight_naive']} --weight-afm {case['flag_weight_afm']}"
        args = parse_args(["--fidelity", "released", *weights.split()])
        network = released_head(case)
        features, labels = tensor(case["features"]).requires_grad_(), tensor(case["labels"])
        groups, drawn = grouping(args)(len(labels))
        outputs = network(features, groups, drawn)
        mixed, plain, total = losses_of(outputs, labels, groups, args)
        found = {
            "mix_coefficient": outputs.weights[:, :1],
            "attn_logit": network.attention.scores(features[groups]),
            "mixed_features": mixed_features(features[groups], outputs.weights),
            "mixed_logits": outputs.mixed.repeat(2, 1),
            "plain_logits": outputs.plain,
            "ce_mixed": mixed,
            "ce_plain": plain,
            "total_loss": total,
        }
        total.backward()
        found |= {"grad_features": features.grad, "eval_logits": network.eval()(features)}
        found |= {f"grad_{name}": own.grad for name, own in released_names(network).items()}
        assert_recorded(case, found)
        assert_close(outputs.weights.sum(dim=1), torch.ones(len(groups)), f"{case.name} weights")


def test_pairs_inside_each_replicas_piece(golden):
    for case in golden("afm", "replica_pairs"):
        args = parse_args(["--fidelity", "released", "--pair-chunks", str(case["replicas"])])
        network = released_head(case)
        features, labels = tensor(case["features"]), tensor(case["labels"])
        groups, drawn = grouping(args)(len(labels))
        assert groups.T.tolist() == [case[of].tolist() for of in ("first_index", "second_index")], case.name
        outputs = network(features, groups, drawn)
        mixed, plain, _ = losses_of(outputs, labels, groups, args)
        in_batch_order = torch.empty(len(labels), outputs.mixed.shape[1])
        for member in groups.T:
            in_batch_order[member] = outputs.mixed.detach()
        found = {"mix_coefficient": outputs.weights[:, :1], "mixed_logits": in_batch_order}
        found |= {"plain_logits": outputs.plain, "ce_mixed": mixed, "ce_plain": plain}
        assert_recorded(case, found)


def test_an_odd_row_is_left_out_of_the_mixed_loss_only(golden):
    for case in golden("afm", "odd_batches"):
        for size, outcome in case.description["by_batch_size"].items():
            count, generator = int(size), torch.Generator().manual_seed(int(size))
            features = torch.rand(count, 6, generator=generator).requires_grad_()
            labels = torch.randint(3, (count,), generator=generator)
            attention = GroupAttention(6, attention=RELEASED.attention)
            network = AttentiveFeatureMixup(nn.Identity(), 6, 3, attention)
            groups, drawn = grouping(RELEASED)(count)
            outputs = network(features, groups, drawn)
            assert outputs.mixed.shape == (count // 2, 3)
            assert outputs.plain.shape == (count, 3)
            assert outcome.startswith("ok") == (count % 2 == 0)
            if outcome.startswith("ok"):  # where the release works at all, it has each mixture twice
                assert re.search(rf"logits \({2 * len(outputs.mixed)}, ", outcome)
            mixed, plain, total = losses_of(outputs, labels, groups, RELEASED)
            left_out = torch.ones(count, dtype=torch.bool).index_fill(0, groups.flatten(), False)
            assert left_out.nonzero().flatten().tolist() == ([count - 1] if count % 2 else [])
            (of_mixed,) = torch.autograd.grad(mixed, features, retain_graph=True)
            (of_plain,) = torch.autograd.grad(plain, features, retain_graph=True)
            assert (of_mixed.norm(dim=1) > 0).tolist() == (~left_out).tolist()
            assert (of_plain.norm(dim=1) > 0).all()
            total.backward()
            assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
            assert (mixed == 0) == (count == 1)


class Recorded:
    """What `train` and `keep_weights` need of a run: no progress bar, rows of the log, and the files that were saved."""

    def __init__(self):
        self.device, self.rows, self.saved = CPU, [], []

    def progress(self, batches, _description):
        return batches

    def save_weights(self, name, _weights):
        self.saved.append((name, len(self.rows)))


def in_turn(case, epoch: int, network: nn.Module, after: list):
    """The recorded batches of an epoch; the parameters after each step go into `after`."""
    steps, size = int(case["steps_per_epoch"]), case["step_labels"].shape[1]
    for step in range((epoch - 1) * steps, epoch * steps):
        yield (tensor(case["step_features"][step]),), torch.arange(step * size, (step + 1) * size)
        after.append({name: values.detach().clone() for name, values in released_names(network).items()})


def run_recorded(case) -> None:
    flags = {name: value for name, value in case.description["options"].items() if name != "all"}
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *map(str, np.ravel(value))]
    args = parse_args(["--fidelity", "released", *words])
    assert args.num_epochs == case["epochs"]
    network, run = released_head(case, "init_"), Recorded()
    optimizer = torch.optim.SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    labels, tested = tensor(case["step_labels"]).flatten(), tensor(case["valid_labels"])
    positions = torch.arange(len(tested)).split(case["valid_batch_sizes"].tolist())
    valid = tensor(case["valid_features"])
    steps, after, best = int(case["steps_per_epoch"]), [], -1
    for epoch in range(1, args.num_epochs + 1):
        name, rates = f"{case.name} epoch {epoch}", case["step_lr"][(epoch - 1) * steps : epoch * steps]
        optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
        assert np.allclose(rates, learning_rate(args, epoch), rtol=1e-12, atol=0), name
        data = SimpleNamespace(train=(in_turn(case, epoch, network, after), labels))
        done = train(epoch, args, data, network, optimizer, grouping(args), run)
        test = evaluate(network, [((valid[index],), index) for index in positions], tested, CPU)
        assert_close(done.loss, case["printed_train_loss"][epoch - 1], name, rtol=0, atol=1e-4)
        assert_close(done.accuracy / 100, case["printed_train_acc"][epoch - 1], name, rtol=0, atol=6e-5)
        assert_close(test.loss_batchmean, case["printed_valid_loss"][epoch - 1], name, rtol=0, atol=1e-5)
        assert_close(test.accuracy / 100, case["printed_valid_acc"][epoch - 1], name, rtol=0, atol=6e-7)
        if "valid_logits_by_epoch" in case.arrays:
            assert_close(network.eval()(valid), case["valid_logits_by_epoch"][epoch - 1], name, rtol=1e-4)
        row = {"test_accuracy": test.accuracy, "validation_accuracy": None}
        keep_weights(network, row, epoch, args, run)
        best = epoch - 1 if ("model_best.pt", epoch - 1) in run.saved else best
        run.rows.append(row)
    assert best == case["best_epoch"], case.name
    assert len(after) == len(case["step_lr"])
    for name in after[0]:
        found = torch.stack([parameters[name] for parameters in after])
        expected = case[f"after_{name}"]  # after every step, or after the last alone
        assert_close(found[-len(expected) :], expected, f"{case.name} {name}", rtol=1e-4)


@pytest.mark.parametrize("kind", ["train_run", "lr"])
def test_the_released_script_step_for_step_and_its_schedule(kind, golden):
    for case in golden("afm", kind):
        run_recorded(case)


PARTS = {f"fc_{letter}": f"attention.projections.{i}" for i, letter in enumerate("ab")}
PARTS |= {"fc_weight": "attention.score", "fc_classifier": "classifier"}


def output_shapes(network: AttentiveFeatureMixup, parts: dict[str, nn.Module]) -> dict[str, list[list[int]]]:
    """Shapes of what each part gives in a training step on 8 images of 224 pixels."""
    shapes: dict[str, list[list[int]]] = {name: [] for name in parts}
    for name, part in parts.items():
        part.register_forward_hook(lambda *call, name=name: shapes[name].append(list(call[2].shape)))
    features = network.backbone(torch.empty(8, 3, 224, 224))
    members = features.view(2, 4, -1).transpose(0, 1)
    # not by forward, which switches autocast off: the meta device has none
    network.mixed_classifier(mixed_features(members, network.attention(members)))
    network.classifier(features)
    return shapes


def test_architecture(golden):
    from torchvision import models  # noqa: PLC0415

    for case in golden("afm", "architecture"):
        for name, expected in case.description["models"].items():
            args = parse_args(["--fidelity", "released", "--network", name, "--pretrained", "none"])
            classes = expected["train_output_shapes_batch8"]["fc_classifier"][0][1]
            with torch.device("meta"):
                network = make_network(args, classes, image_size=224)
                theirs = models.get_model(name).state_dict()
                own = dict(network.backbone.named_children())
                parts = {part: network.get_submodule(PARTS[part]) if part in PARTS else own[part]
                         for part in expected["params_by_top_module"]}  # fmt: skip
                shapes = output_shapes(network, parts)
            assert sum(p.numel() for p in network.parameters()) == expected["total_params"], name
            count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
            assert count == expected["params_by_top_module"], name
            assert sum(b.numel() for b in network.buffers()) == expected["buffer_elements"], name
            keys = list(network.backbone.state_dict())
            assert keys == [key for key in theirs if key not in expected["torchvision_keys_missing"]], name
            assert len(keys) + len(expected["extra_keys"]) == expected["n_state_entries"], name
            # the release classifies each mixture twice
            recorded = {part: expected["train_output_shapes_batch8"][part] for part in shapes}
            assert shapes == recorded | {"fc_classifier": [[4, classes], [8, classes]]}, name
