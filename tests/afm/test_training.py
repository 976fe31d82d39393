"""An epoch of training, the test, and the attention of samples: against plain loops, torch and scikit-learn."""

import csv
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afm import train as script
from afm import training
from afm.attention import GroupAttention
from afm.flags import parse_args
from afm.networks import AttentiveFeatureMixup
from afm.train import groups_of_batch
from common.gpu.device import Device

CPU = Device(torch.device("cpu"), "fp32", "tests")
WIDTH, CLASSES = 6, 4
NAN = float("nan")


def head(group_size: int = 2, attentive: bool = True, shared: bool = True, **options):
    """A network on given features [B, 6] of 4 classes."""
    torch.manual_seed(0)
    attention = GroupAttention(WIDTH, group_size, hidden=8, **options) if attentive else None
    return AttentiveFeatureMixup(nn.Identity(), WIDTH, CLASSES, attention, shared)


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, 6] and labels [N]."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(count, WIDTH, generator=generator)
    return features, torch.randint(CLASSES, (count,), generator=generator)


def batches_of(features: torch.Tensor, size: int, order: torch.Tensor | None = None) -> list:
    order = torch.arange(len(features)) if order is None else order
    return [((features[index],), index) for index in order.split(size)]


def grouping(words: str = "", mixing: bool = True) -> partial:
    """The script's groups and weights."""
    args, generator = parse_args(words.split()), torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    return partial(groups_of_batch, args=args, mixing=mixing, generator=generator, rng=rng)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-3)


def step(optimizer: torch.optim.SGD, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def epoch_of(network, batches, labels, words="", mixing=True, loss_weights=(1.5, 0.5), **options):
    options |= {"loss_weights": loss_weights, "device": CPU}
    return training.train_epoch(network, sgd(network), batches, labels, grouping(words, mixing), **options)


def plain_epoch(network, batches, labels, groups_of):
    """The epoch group by group: means of the three losses, accuracy, and the weights of each sample in its groups."""
    optimizer, losses, hits, found = sgd(network), [], [], {}
    for (features,), index in batches:
        given, mixtures = labels[index], []
        logits = network.classifier(features)
        for group in groups_of(len(index))[0].tolist():
            weights = network.attention(features[group][None])[0]
            mixture = network.classifier(sum(w * features[i] for w, i in zip(weights, group, strict=True)))
            terms = [w * mixture.log_softmax(0)[given[i]] for w, i in zip(weights, group, strict=True)]
            mixtures.append(-sum(terms))
            for w, i in zip(weights.tolist(), group, strict=True):
                found.setdefault(int(index[i]), []).append(w)
        mixed, plain = sum(mixtures) / len(mixtures), F.cross_entropy(logits, given)
        loss = 1.2 * mixed + 0.7 * plain
        step(optimizer, loss)
        losses.append([loss.item(), mixed.item(), plain.item()])
        hits.append((logits.argmax(dim=1) == given).float().mean().item())
    return np.mean(losses, axis=0).tolist(), 100 * np.mean(hits), found


@pytest.mark.parametrize(("group_size", "rounds"), [(2, 1), (3, 2)])
def test_an_epoch_agrees_with_one_that_goes_group_by_group(group_size, rounds):
    features, labels = samples(20)
    batches = batches_of(features, 10, torch.randperm(20, generator=torch.Generator().manual_seed(3)))
    words = f"--group-size {group_size} --group-rounds {rounds}"
    fast, slow = head(group_size), head(group_size)
    done = epoch_of(fast, batches, labels, words, loss_weights=(1.2, 0.7))
    losses, accuracy, weights = plain_epoch(slow, batches, labels, grouping(words))
    assert [done.loss, done.mixed_loss, done.plain_loss] == pytest.approx(losses, rel=1e-5)
    assert done.accuracy == pytest.approx(accuracy)
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    expected = [np.mean(weights.get(position, NAN)) for position in range(20)]
    found = training.mean_weights(done.members, done.weights, 20)
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_the_flags_of_the_target_arrive_in_the_loss():
    features, labels = samples(8)
    losses, moved = [], []
    for target, detach in (("soft", False), ("soft", True), ("both", False)):
        network = head(attention="sigmoid")
        done = epoch_of(network, batches_of(features, 8), labels, target=target, detach_target=detach)
        losses.append(done.mixed_loss)
        moved.append(network.attention.score[-1].weight.detach())
    assert losses[0] == losses[1] != losses[2]
    assert not torch.allclose(moved[0], moved[1]) and not torch.allclose(moved[1], moved[2])


def test_without_mixing_it_is_plain_cross_entropy_training():
    features, labels = samples(20)
    network, plain = head(attentive=False), head(attentive=False)
    batches, optimizer, losses = batches_of(features, 5), sgd(plain), []
    done = epoch_of(network, batches, labels, "--lam 0", mixing=False, loss_weights=(0.0, 2.0))
    for (x,), index in batches:
        losses.append(F.cross_entropy(plain.classifier(x), labels[index]))
        step(optimizer, 2 * losses[-1])
    assert all(map(torch.equal, network.parameters(), plain.parameters()))
    assert (done.mixed_loss, done.plain_loss) == (0, pytest.approx(torch.stack(losses).mean().item()))
    assert done.loss == pytest.approx(2 * done.plain_loss)
    assert done.members.shape == done.weights.shape == (0, 2) and training.mean_peak(done.weights) is None


def test_fine_tuning_leaves_an_attention_without_gradient_as_it_was():
    features, labels = samples(8)
    network, fresh = head(), head()
    words = "--dataset clothing1m --train-on noisy+clean --epochs 9 --finetune-epochs 2"
    data = SimpleNamespace(train=None, clean_train=(batches_of(features, 4), labels))
    run = SimpleNamespace(device=CPU, progress=lambda batches, _description: batches)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)  # weight decay would move it
    done = script.train(8, parse_args(words.split()), data, network, optimizer, grouping(), run)
    assert done.loss == pytest.approx(done.plain_loss)  # with weight 1, not 0.5
    assert all(map(torch.equal, network.attention.parameters(), fresh.attention.parameters()))
    assert not torch.equal(network.classifier.weight, fresh.classifier.weight)


def test_mixing_inputs_is_mixup():
    features, labels = samples(12)
    network, plain = head(attentive=False), head(attentive=False)
    batches, optimizer, losses = batches_of(features, 6), sgd(plain), []
    groups, pairs = (grouping("--mix-at input --weights random --lam 1") for _ in range(2))
    options = {"weight": 2.0, "device": CPU}
    done = training.train_epoch_mixing_inputs(network, sgd(network), batches, labels, groups, **options)
    for (x,), index in batches:
        groups, weights = pairs(len(index))
        assert groups[:, 0].tolist() == sorted(groups[:, 1].tolist()) == list(range(6))
        lam, partner, given = weights[:, :1], groups[:, 1], labels[index]
        logits = plain.classifier(lam * x + (1 - lam) * x[partner])
        a, b = (F.cross_entropy(logits, y, reduction="none") for y in (given, given[partner]))
        losses.append((lam[:, 0] * a + (1 - lam[:, 0]) * b).mean())
        step(optimizer, 2 * losses[-1])
    assert done.loss / 2 == done.mixed_loss == pytest.approx(torch.stack(losses).mean().item())
    assert (done.plain_loss, done.accuracy) == (None, None)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["attentive", "uniform", "random"])
def test_weights_are_given_only_where_none_are_learnt(kind):
    groups, weights = grouping(f"--weights {kind} --group-size 3")(10)
    assert groups.shape == (4 * 3, 3)  # four rounds
    assert (weights is None) == (kind == "attentive")
    if weights is not None:
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(12))
        assert (weights.std() < 1e-6) == (kind == "uniform")
    nothing, none = grouping(f"--weights {kind} --group-size 3", mixing=False)(10)
    assert nothing.shape == none.shape == (0, 3)


def test_the_order_of_the_data_does_not_depend_on_what_is_mixed(tmp_path, monkeypatch):
    """Groups and weights have generators of their own. The log shows a dead ReLU where there is one."""
    seen = []

    def recorded(network, optimizer, batches, *rest, **options):
        batches = list(batches)
        seen[-1] += [(index.tolist(), images.sum().item()) for (images,), index in batches]
        return training.train_epoch(network, optimizer, batches, *rest, **options)

    monkeypatch.setattr(script, "train_epoch", recorded)
    settings = ("", "--group-size 3 --attention sigmoid", "--weights random", "--lam 0")
    for number, words in enumerate(settings):
        seen.append([])
        common = "--dataset digits --limit_train 32 --limit_test 20 --train-batch 16 --epochs 2 --device cpu"
        script.main([*common.split(), *words.split(), "--out", str(tmp_path / str(number))])
        with (tmp_path / str(number) / "log.csv").open(newline="") as file:
            dead = [row["attention_dead"] for row in csv.DictReader(file)]
        assert all(0 <= float(value) <= 1 for value in dead) if words == "" else dead == ["", ""]
    assert len(seen[0]) == 4 and seen[0][:2] != seen[0][2:]
    assert all(order == seen[0] for order in seen)


def test_the_share_of_dead_scores_is_that_of_all_groups_of_the_epoch():
    """Learning rate 0, so that the scores of every batch can be looked at afterwards."""
    features, labels = samples(7)
    network, groups, signs = head(), grouping("--group-rounds 3"), []
    options = {"loss_weights": (1.5, 0.5), "device": CPU}
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    with torch.no_grad():  # scores of both signs
        scores = network.attention.scores(torch.stack([features, features.flip(0)], dim=1))
        network.attention.score[-1].bias -= scores.mean(dim=0)
    batches = batches_of(features, 4)  # of 4 and 3 samples, so of 6 and 3 groups
    done = training.train_epoch(network, optimizer, batches, labels, grouping("--group-rounds 3"), **options)
    for (x,), index in batches:
        signs += (network.attention.scores(x[groups(len(index))[0]]) <= 0).flatten().tolist()
    assert len(signs) == 2 * 9 and 0 < sum(signs) < len(signs)
    assert done.dead == pytest.approx(np.mean(signs))
    one = training.train_epoch(network, optimizer, batches_of(features[:1], 1), labels, grouping(), **options)
    assert one.dead is None


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_of_samples_and_beside_it_of_batches(shared):
    features, labels = samples(7)
    network = head(shared=shared)
    found = training.evaluate(network, batches_of(features, 3), labels, CPU)  # batches of 3, 3 and 1
    losses = F.cross_entropy(network.classifier(features), labels, reduction="none").detach()
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    batch_means = [losses[:3].mean(), losses[3:6].mean(), losses[6]]
    assert found.loss_batchmean == pytest.approx(np.mean(batch_means), rel=1e-6)
    assert found.loss != pytest.approx(found.loss_batchmean, rel=1e-3)
    hits = [c(features).argmax(dim=1) == labels for c in (network.classifier, network.mixed_classifier)]
    expected = [100 * of.float().mean().item() for of in hits]
    assert [found.accuracy, found.mixed_accuracy] == pytest.approx(expected)
    assert not network.training


def test_mean_weights_and_mean_peak():
    members = torch.tensor([[0, 2], [2, 4], [0, 2]])
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.6, 0.4]])
    expected = [0.4, NAN, 1.7 / 3, NAN, 0.5, NAN]
    assert training.mean_weights(members, weights, 6).tolist() == pytest.approx(expected, nan_ok=True)
    assert training.mean_weights(members[:0], weights[:0], 3).isnan().tolist() == [True] * 3
    assert training.mean_peak(weights) == pytest.approx(1.9 / 3)


@pytest.mark.parametrize(
    ("weights", "known", "expected"),
    [
        ([0.1, 0.3, 0.9], [1, 1, -1], (0.2, None, None)),
        ([0.1, 0.3, NAN], [0, 0, 1], (None, 0.2, None)),
        ([0.9, 0.1, 0.5], [1, 0, -1], (0.9, 0.1, 1.0)),
        # of the 6 pairs of a right and a wrong label 3 are in order and one is equal
        ([0.9, 0.5, 0.4, 0.6, 0.4, 0.7, NAN, NAN], [1, 1, 1, 0, 0, -1, 1, 0], (0.6, 0.5, 3.5 / 6)),
    ],
)
def test_statistics_of_right_and_of_wrong_labels_where_there_are_any(weights, known, expected):
    found = training.attention_statistics(torch.tensor(weights), torch.tensor(known, dtype=torch.int8))
    values = [found[f"attention_{name}"] for name in ("right", "wrong", "auc")]
    assert values == [value if value is None else pytest.approx(value) for value in expected]


def test_pooled_features_are_by_position_and_in_eval_mode():
    network, (features, _) = head(), samples(7)
    network.backbone = nn.Dropout(0.5)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    batches = batches_of(features, 3, order)
    assert torch.equal(training.pooled_features(network.train(), batches, 7, CPU), features)


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_attention_of_a_sample_is_the_mean_over_partners_and_positions(group_size):
    network, (features, _) = head(group_size), samples(9)
    found = training.attention_of_samples(network, features, 40, torch.Generator().manual_seed(5))
    generator, weights = torch.Generator().manual_seed(5), [[] for _ in range(9)]
    for _ in range(40):
        order = torch.randperm(9, generator=generator).tolist()
        for start in range(0, 9 - group_size + 1, group_size):
            group = order[start : start + group_size]
            own = network.attention(features[group][None])[0].tolist()
            for sample, weight in zip(group, own, strict=True):
                weights[sample].append(weight)
    assert found.tolist() == pytest.approx([np.mean(w) for w in weights], rel=1e-5)


def estimated(network, features, sampled: torch.Tensor, batch_size: int = 4):
    """The label quality of 9 training images, of which some are sampled, in 3 rounds."""
    run = SimpleNamespace(device=CPU, args=SimpleNamespace(seed=5), progress=lambda own, _, training: own)
    data = SimpleNamespace(observed=np.zeros(9), num_classes=CLASSES, sampled=sampled.numpy())
    data.sampled_batches, data.plain = batches_of(features[sampled], 2), batches_of(features, batch_size)
    return training.estimate_label_quality(network, data, 3, run)


def test_label_quality_is_the_rank_of_the_attention_beside_the_classifiers_probabilities():
    network, (features, _) = head(attention="sigmoid"), samples(9)
    found = estimated(network, features, torch.arange(9))
    weights = training.attention_of_samples(network, features, 3, torch.Generator().manual_seed(5))
    assert torch.equal(found.score.argsort(), weights.argsort())
    assert (found.score * 8).sort().values.tolist() == [*range(9)]
    torch.testing.assert_close(found.probabilities, F.softmax(network.classifier(features), dim=1).detach())
    ranks = training.scaled_ranks(torch.tensor([3.0, 1.0, 3.0, NAN]))
    assert ranks.isnan().tolist() == [False, False, False, True]
    assert training.scaled_ranks(torch.tensor([3.0, 1.0, 3.0])).tolist() == [0.75, 0, 0.75]
    assert estimated(head(attentive=False), features, torch.arange(9)).score is None


@pytest.mark.parametrize("group_size", [2, 3])
def test_of_more_images_than_are_sampled_all_are_beside_the_same_sampled_ones(group_size):
    network, sampled = head(group_size, attention="softmax"), torch.tensor([0, 3, 4, 8])
    features, _ = samples(9)
    found = estimated(network, features, sampled)
    partners = torch.randint(4, (3, group_size - 1), generator=torch.Generator().manual_seed(5))
    weights = torch.zeros(9)
    for i in range(9):
        for number, own in enumerate(sampled[partners].tolist()):
            place = number % group_size
            group = [*own[:place], i, *own[place:]]
            weights[i] += network.attention(features[group][None])[0, place].item()
    assert torch.equal(found.score, training.scaled_ranks(weights)) and len(set(found.score.tolist())) == 9
    torch.testing.assert_close(found.probabilities, F.softmax(network.classifier(features), dim=1).detach())
    assert torch.equal(found.score, estimated(network, features, sampled, 9).score)
    plain = estimated(head(attentive=False), features, sampled)
    assert plain.score is None and plain.probabilities.shape == (9, CLASSES)


@pytest.mark.parametrize("attention", ["sigmoid", "complement"])
def test_pair_weights_are_those_of_every_ordered_pair(attention):
    network, (features, _) = head(attention=attention), samples(5)
    found = training.pair_weights(network, features)
    assert found.shape == (5, 5, 2)
    for i in range(5):
        for j in range(5):
            torch.testing.assert_close(found[i, j], network.attention(features[[i, j]][None])[0].detach())


def test_the_learning_rate_of_the_release_and_of_fine_tuning():
    rates = [script.learning_rate(parse_args([]), epoch) for epoch in range(1, 31)]
    assert rates == pytest.approx([0.01] * 15 + [0.001] * 10 + [0.0001] * 5)
    args = parse_args(["--preset", "clothing1m/noisy+clean/afm", "--finetune-lr", "0.5"])
    rates = [script.learning_rate(args, epoch) for epoch in range(1, 21)]
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.0001] * 5 + [0.5] * 5)
