"""An epoch of training, the test, and the attention of samples: against plain loops, torch and scikit-learn."""

import csv
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

from afm import train as script
from afm import training
from afm.attention import GroupAttention
from afm.networks import AttentiveFeatureMixup
from afm.train import groups_of_batch, parse_args
from afm.training import (
    attention_of_samples,
    attention_statistics,
    evaluate,
    mean_peak,
    mean_weights,
    pair_weights,
    pooled_features,
    train_epoch,
    train_epoch_mixing_inputs,
)
from common.gpu.device import Device

CPU = Device(torch.device("cpu"), "fp32", "tests")
WIDTH, CLASSES = 6, 4


def head(group_size: int = 2, seed: int = 0, attentive: bool = True, shared: bool = True, **options):
    """A network on given features [B, 6] of 4 classes."""
    torch.manual_seed(seed)
    attention = GroupAttention(WIDTH, group_size, hidden=8, **options) if attentive else None
    return AttentiveFeatureMixup(nn.Identity(), WIDTH, CLASSES, attention, shared)


def samples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, 6] and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(count, WIDTH, generator=generator)
    return features, torch.randint(CLASSES, (count,), generator=generator)


def batches_of(features: torch.Tensor, size: int, order: torch.Tensor | None = None) -> list:
    order = torch.arange(len(features)) if order is None else order
    return [((features[index],), index) for index in order.split(size)]


def drawing(*flags: str, seed: int = 0, mixing: bool = True) -> partial:
    """The script's draws of groups and weights."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    return partial(groups_of_batch, args=parse_args([*flags]), mixing=mixing, generator=generator, rng=rng)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-3)


# training ---------------------------------------------------------------------------------------------------------------


def plain_epoch(network, optimizer, batches, labels, groups_of, weight_mixed, weight_plain):
    """The same epoch sample by sample: means of the three losses, hits, and the weight of each sample in each group."""
    losses, hits, found = [], [], {}
    for (features,), index in batches:
        given = labels[index]
        logits = network.classifier(features)
        plain = sum(F.cross_entropy(logits[n][None], given[n][None]) for n in range(len(given))) / len(given)
        mixtures = []
        for group in groups_of(len(index)).tolist():
            weights = network.attention(features[group][None])[0]
            mixture = network.classifier(sum(w * features[i] for w, i in zip(weights, group, strict=True)))
            mixtures.append(
                -sum(w * mixture.log_softmax(0)[given[i]] for w, i in zip(weights, group, strict=True))
            )
            for w, i in zip(weights.tolist(), group, strict=True):
                found.setdefault(int(index[i]), []).append(w)
        mixed = sum(mixtures) / len(mixtures)
        loss = weight_mixed * mixed + weight_plain * plain
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([loss.item(), mixed.item(), plain.item()])
        hits += [int(logits[n].argmax() == given[n]) for n in range(len(given))]
    return np.mean(losses, axis=0), 100 * np.mean(hits), found


@pytest.mark.parametrize(("group_size", "rounds"), [(2, 1), (3, 2)])
def test_an_epoch_agrees_with_one_that_goes_sample_by_sample(group_size, rounds):
    features, labels = samples(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    flags = ["--group-size", str(group_size), "--group-rounds", str(rounds)]
    fast, slow = head(group_size), head(group_size)
    done = train_epoch(
        fast,
        sgd(fast),
        batches_of(features, 10, order),
        labels,
        drawing(*flags),
        loss_weights=(1.2, 0.7),
        device=CPU,
    )
    groups = drawing(*flags)
    losses, accuracy, weights = plain_epoch(
        slow, sgd(slow), batches_of(features, 10, order), labels, lambda rows: groups(rows)[0], 1.2, 0.7
    )
    assert [done.loss, done.mixed_loss, done.plain_loss] == pytest.approx(list(losses), rel=1e-5)
    assert done.accuracy == pytest.approx(accuracy)
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for position, mean in enumerate(mean_weights(done.members, done.weights, 20).tolist()):
        assert mean == pytest.approx(
            np.mean(weights[position]) if position in weights else np.nan, nan_ok=True
        )


def test_the_flags_of_the_target_arrive_in_the_loss():
    features, labels = samples(8)
    found = {}
    for target, detach in (("soft", False), ("soft", True), ("both", False)):
        network = head(attention="sigmoid")
        options = {"loss_weights": (1.5, 0.5), "target": target, "detach_target": detach, "device": CPU}
        done = train_epoch(network, sgd(network), batches_of(features, 8), labels, drawing(), **options)
        found[target, detach] = done.mixed_loss, network.attention.score[-1].weight.detach()
    assert found["soft", False][0] == found["soft", True][0] != found["both", False][0]
    for a, b in pairwise(found.values()):
        assert not torch.allclose(a[1], b[1])


def test_without_mixing_it_is_plain_cross_entropy_training():
    features, labels = samples(20)
    network, plain = head(attentive=False), head(attentive=False)
    done = train_epoch(
        network,
        sgd(network),
        batches_of(features, 5),
        labels,
        drawing("--lam", "0", mixing=False),
        loss_weights=(0.0, 2.0),
        device=CPU,
    )
    optimizer, losses = sgd(plain), []
    for (x,), index in batches_of(features, 5):
        loss = F.cross_entropy(plain.classifier(x), labels[index])
        optimizer.zero_grad()
        (2 * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.equal, network.parameters(), plain.parameters()))
    assert done.mixed_loss == 0
    assert done.plain_loss == pytest.approx(np.mean(losses))
    assert done.loss == pytest.approx(2 * np.mean(losses))
    assert done.members.shape == done.weights.shape == (0, 2)
    assert mean_peak(done.weights) is None


def test_fine_tuning_leaves_an_attention_without_gradient_as_it_was():
    features, labels = samples(8)
    network, fresh = head(), head()
    args = parse_args(
        ["--dataset", "clothing1m", "--train-on", "noisy+clean", "--epochs", "9", "--finetune-epochs", "2"]
    )
    data = SimpleNamespace(train=None, clean_train=(batches_of(features, 4), labels))
    run = SimpleNamespace(device=CPU, progress=lambda batches, _description: batches)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)  # weight decay would move it
    done = script.train(8, args, data, network, optimizer, drawing(), run)
    assert done.loss == pytest.approx(done.plain_loss)  # with weight 1, not 0.5
    assert all(map(torch.equal, network.attention.parameters(), fresh.attention.parameters()))
    assert not torch.equal(network.classifier.weight, fresh.classifier.weight)


def test_a_batch_smaller_than_a_group_is_in_the_plain_loss_only():
    features, labels = samples(2)
    network = head(3)
    flags = ["--group-size", "3"]
    done = train_epoch(
        network,
        sgd(network),
        batches_of(features, 2),
        labels,
        drawing(*flags),
        loss_weights=(1.5, 0.5),
        device=CPU,
    )
    assert done.mixed_loss == 0
    assert done.loss == pytest.approx(0.5 * done.plain_loss)
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_mixing_inputs_is_mixup():
    features, labels = samples(12)
    network, plain = head(attentive=False), head(attentive=False)
    flags = ["--mix-at", "input", "--weights", "random", "--lam", "1"]
    done = train_epoch_mixing_inputs(
        network, sgd(network), batches_of(features, 6), labels, drawing(*flags), weight=2.0, device=CPU
    )
    draws, optimizer, losses = drawing(*flags), sgd(plain), []
    for (x,), index in batches_of(features, 6):
        groups, weights = draws(len(index))
        assert groups[:, 0].tolist() == list(range(6))
        assert sorted(groups[:, 1].tolist()) == list(range(6))
        lam, partner, given = weights[:, :1], groups[:, 1], labels[index]
        logits = plain.classifier(lam * x + (1 - lam) * x[partner])
        a, b = (F.cross_entropy(logits, y, reduction="none") for y in (given, given[partner]))
        loss = (lam[:, 0] * a + (1 - lam[:, 0]) * b).mean()
        optimizer.zero_grad()
        (2 * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert done.loss / 2 == done.mixed_loss == pytest.approx(np.mean(losses))
    assert (done.plain_loss, done.accuracy) == (None, None)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# draws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["attentive", "uniform", "random"])
def test_draws_give_weights_only_where_none_are_learnt(weights):
    groups, drawn = drawing("--weights", weights, "--group-size", "3")(10)
    assert groups.shape == (4 * 3, 3)  # four rounds
    if weights == "attentive":
        assert drawn is None
    else:
        torch.testing.assert_close(drawn.sum(dim=1), torch.ones(12))
        assert (drawn.std() < 1e-6) == (weights == "uniform")
    nothing, none = drawing("--weights", weights, "--group-size", "3", mixing=False)(10)
    assert nothing.shape == none.shape == (0, 3)


def test_the_order_of_the_data_does_not_depend_on_what_is_mixed(tmp_path, monkeypatch):
    """Groups and weights have generators of their own; so images, crops and the test are the same for any K."""
    seen = []

    def recorded(network, optimizer, batches, *rest, **options):
        batches = list(batches)
        seen[-1] += [(index.tolist(), images.sum().item()) for (images,), index in batches]
        return training.train_epoch(network, optimizer, batches, *rest, **options)

    monkeypatch.setattr(script, "train_epoch", recorded)
    halves = ["--group-order", "halves", "--group-rounds", "1"]
    settings = [[], ["--group-size", "3"], ["--weights", "random", *halves], ["--lam", "0"]]
    for number, flags in enumerate(settings):
        seen.append([])
        common = ["--dataset", "digits", "--limit_train", "64", "--train-batch", "16", "--epochs", "2"]
        script.main([*common, *flags, "--device", "cpu", "--out", str(tmp_path / str(number))])
    assert len(seen[0]) == 8
    assert seen[0][:4] != seen[0][4:]
    assert all(order == seen[0] for order in seen)


def test_the_share_of_dead_scores_is_that_of_all_groups_of_the_epoch():
    """Learning rate 0, so that the scores of every batch can be looked at afterwards."""
    features, labels = samples(7)
    network, flags = head(), ["--group-rounds", "3"]
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    with torch.no_grad():  # scores of both signs
        scores = network.attention.scores(torch.stack([features, features.flip(0)], dim=1))
        network.attention.score[-1].bias -= scores.mean(dim=0)
    options = {"loss_weights": (1.5, 0.5), "device": CPU}
    done = train_epoch(network, optimizer, batches_of(features, 4), labels, drawing(*flags), **options)
    signs, draws = [], drawing(*flags)
    for (x,), index in batches_of(features, 4):  # of 4 and 3 samples, so of 6 and 3 groups
        signs += (network.attention.scores(x[draws(len(index))[0]]) <= 0).flatten().tolist()
    assert len(signs) == 2 * 9 and 0 < sum(signs) < len(signs)
    assert done.dead == pytest.approx(np.mean(signs))
    with torch.no_grad():
        network.attention.score[-1].bias.fill_(-100)
    for batches, dead in ((batches_of(features, 4), 1.0), (batches_of(features[:1], 1), None)):
        assert train_epoch(network, optimizer, batches, labels, drawing(), **options).dead == dead
    drawn = drawing("--weights", "uniform")
    assert (
        train_epoch(head(attentive=False), optimizer, batches_of(features, 4), labels, drawn, **options).dead
        is None
    )


@pytest.mark.parametrize(
    ("flags", "shown"), [([], True), (["--attention", "sigmoid"], False), (["--weights", "random"], False)]
)
def test_the_log_shows_a_dead_relu_where_there_is_one(flags, shown, tmp_path):
    words = [
        "--dataset",
        "digits",
        "--limit_train",
        "32",
        "--train-batch",
        "16",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    script.main([*words, *flags, "--out", str(tmp_path / "run")])
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["attention_dead"] != "") == shown
    assert not shown or 0 <= float(row["attention_dead"]) <= 1


# the test ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_of_samples_and_beside_it_of_batches(shared):
    features, labels = samples(7)
    network = head(shared=shared)
    found = evaluate(network, batches_of(features, 3), labels, CPU)  # batches of 3, 3 and 1
    losses = F.cross_entropy(network.classifier(features), labels, reduction="none").detach()
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    batch_means = [losses[:3].mean(), losses[3:6].mean(), losses[6]]
    assert found.loss_batchmean == pytest.approx(np.mean(batch_means), rel=1e-6)
    assert found.loss != pytest.approx(found.loss_batchmean, rel=1e-3)
    accuracy = [100 * (c(features).argmax(dim=1) == labels).float().mean().item()
                for c in (network.classifier, network.mixed_classifier)]  # fmt: skip
    assert [found.accuracy, found.mixed_accuracy] == pytest.approx(accuracy)
    assert not network.training


# who gets how much attention --------------------------------------------------------------------------------------------


def test_mean_weights():
    members, weights = (
        torch.tensor([[0, 2], [2, 4], [0, 2]]),
        torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.6, 0.4]]),
    )
    found = mean_weights(members, weights, 6).tolist()
    nan = float("nan")
    assert found == pytest.approx([0.4, nan, 1.7 / 3, nan, 0.5, nan], nan_ok=True)
    nothing = mean_weights(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
    assert nothing.isnan().tolist() == [True] * 3


def test_mean_peak():
    assert mean_peak(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.0, 1.0]])) == pytest.approx(0.8)
    assert mean_peak(torch.zeros(0, 2)) is None


def test_attention_statistics_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    weights, known = (
        generator.random(60).astype(np.float32).round(2),
        generator.integers(-1, 2, 60).astype(np.int8),
    )
    weights[::7] = np.nan
    found = attention_statistics(torch.from_numpy(weights), torch.from_numpy(known))
    used = ~np.isnan(weights) & (known >= 0)
    assert found["attention_auc"] == pytest.approx(roc_auc_score(known[used], weights[used]))
    assert found["attention_right"] == pytest.approx(weights[used & (known == 1)].mean())
    assert found["attention_wrong"] == pytest.approx(weights[used & (known == 0)].mean())


@pytest.mark.parametrize(
    ("weights", "known", "expected"),
    [
        ([0.1, 0.2], [-1, -1], (None, None, None)),
        ([0.1, 0.3, 0.9], [1, 1, -1], (0.2, None, None)),
        ([0.1, 0.3, float("nan")], [0, 0, 1], (None, 0.2, None)),
        ([float("nan")] * 2, [0, 1], (None, None, None)),
        ([0.9, 0.1, 0.5], [1, 0, -1], (0.9, 0.1, 1.0)),
        ([0.5, 0.5], [1, 0], (0.5, 0.5, 0.5)),
    ],
)
def test_statistics_say_nothing_where_there_is_nothing_to_say(weights, known, expected):
    found = attention_statistics(torch.tensor(weights), torch.tensor(known, dtype=torch.int8))
    names = ("attention_right", "attention_wrong", "attention_auc")
    assert found == {
        name: value if value is None else pytest.approx(value)
        for name, value in zip(names, expected, strict=True)
    }


def test_pooled_features_are_by_position_and_in_eval_mode():
    network, (features, _) = head(), samples(7)
    network.backbone = nn.Dropout(0.5)
    network.train()
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    assert torch.equal(pooled_features(network, batches_of(features, 3, order), 7, CPU), features)


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_attention_of_a_sample_is_the_mean_over_partners_and_positions(group_size):
    network, (features, _) = head(group_size), samples(9)
    found = attention_of_samples(network, features, 40, torch.Generator().manual_seed(5))
    generator, weights = torch.Generator().manual_seed(5), [[] for _ in range(9)]
    for _ in range(40):
        order = torch.randperm(9, generator=generator).tolist()
        for start in range(0, 9 - group_size + 1, group_size):
            group = order[start : start + group_size]
            for position, sample in enumerate(group):
                weights[sample].append(network.attention(features[group][None])[0, position].item())
    assert found.tolist() == pytest.approx([np.mean(w) for w in weights], rel=1e-5)


def test_the_attention_of_a_sample_tends_to_its_mean_over_all_ordered_pairs():
    network, (features, _) = head(attention="sigmoid"), samples(6)
    with torch.no_grad():  # a strong attention, or the mean is 1/2 for all
        network.attention.score[-1].weight.mul_(20)
    pairs = pair_weights(network, features)
    off = ~torch.eye(6, dtype=torch.bool)
    expected = torch.stack(
        [torch.cat([pairs[i, :, 0][off[i]], pairs[:, i, 1][off[i]]]).mean() for i in range(6)]
    )
    found = attention_of_samples(network, features, 4000, torch.Generator().manual_seed(0))
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 0.04  # five standard errors of a mean of 4000 numbers in [0, 1]


@pytest.mark.parametrize("attention", ["sigmoid", "complement"])
def test_pair_weights_are_those_of_every_ordered_pair(attention):
    network, (features, _) = head(attention=attention), samples(5)
    found = pair_weights(network, features)
    assert found.shape == (5, 5, 2)
    for i in range(5):
        for j in range(5):
            torch.testing.assert_close(found[i, j], network.attention(features[[i, j]][None])[0].detach())
    assert pair_weights(network, features[:1]).shape == (1, 1, 2)
