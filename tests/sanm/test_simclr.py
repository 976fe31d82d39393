"""SimCLR's loss, schedule, head and the kNN diagnostic."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from sanm import simclr
from sanm.networks import simclr_resnet
from sanm.simclr import knn_accuracy, learning_rate, make_simclr, nt_xent


def unit_embeddings(images: int, dimensions: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(images, 2, dimensions, generator=generator), dim=2)


# the loss ---------------------------------------------------------------------------------------------------------------


def plain_nt_xent(embeddings: np.ndarray, temperature: float) -> float:
    """The definition, anchor by anchor, in float64; without the factor of SupContrast."""
    views = [(i, v) for v in (0, 1) for i in range(len(embeddings))]
    terms = []
    for i, v in views:
        similar = {
            (j, w): math.exp(float(embeddings[i, v] @ embeddings[j, w]) / temperature)
            for j, w in views
            if (j, w) != (i, v)
        }
        terms.append(-math.log(similar[i, 1 - v] / sum(similar.values())))
    return sum(terms) / len(terms)


def test_golden_loss_and_gradient(golden):
    for case in golden("sanm", "simclr_loss"):
        embeddings = torch.from_numpy(case["embeddings"]).requires_grad_()
        loss = nt_xent(embeddings, float(case["temperature"]))
        loss.backward()
        assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-5), case.name
        torch.testing.assert_close(
            embeddings.grad, torch.from_numpy(case["gradient"]), rtol=1e-4, atol=1e-5, msg=case.name
        )


@pytest.mark.parametrize(("images", "temperature"), [(2, 0.5), (7, 0.5), (5, 0.07), (3, 2.0)])
def test_the_loss_is_the_definition_times_the_factor(images, temperature):
    embeddings = unit_embeddings(images, seed=images)
    expected = plain_nt_xent(embeddings.double().numpy(), temperature)
    assert nt_xent(embeddings, temperature).item() == pytest.approx(expected * temperature / 0.07, rel=1e-5)
    assert nt_xent(embeddings, temperature, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    embeddings = unit_embeddings(4, 6)
    embeddings.requires_grad_()
    nt_xent(embeddings, 0.5).backward()
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    ends = [
        plain_nt_xent((embeddings.detach() + s * 1e-4 * direction).double().numpy(), 0.5) for s in (1, -1)
    ]
    expected = (ends[0] - ends[1]) / 2e-4 * 0.5 / 0.07
    assert float((embeddings.grad * direction).sum()) == pytest.approx(expected, rel=1e-2)


def test_the_loss_is_finite_at_extreme_temperatures_and_float32_under_autocast():
    embeddings = unit_embeddings(6).requires_grad_()
    loss = nt_xent(embeddings, 1e-3)  # exp(1000) is not a float32
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(embeddings, 0.5)
    assert inside.dtype == torch.float32 and torch.equal(inside, nt_xent(embeddings, 0.5))
    assert nt_xent(embeddings.bfloat16(), 0.5).dtype == torch.float32


def test_one_image_alone_has_no_loss_and_no_gradient():
    embeddings = unit_embeddings(1).requires_grad_()
    loss = nt_xent(embeddings, 0.5)
    loss.backward()
    assert loss.item() == 0 and not embeddings.grad.any()


def test_views_that_agree_cost_less_and_a_temperature_must_be_positive():
    embeddings = unit_embeddings(8)
    same = torch.stack([embeddings[:, 0]] * 2, dim=1)
    assert nt_xent(same, 0.5) < nt_xent(embeddings, 0.5)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        nt_xent(embeddings, 0)


# the learning rate ------------------------------------------------------------------------------------------------------


def test_golden_learning_rates(golden):
    for case in golden("sanm", "simclr_lr"):
        base, epochs, size = float(case["base_lr"]), int(case["epochs"]), int(case["batches_per_epoch"])
        found = [
            learning_rate(
                int(epoch),
                int(batch),
                base=base,
                epochs=epochs,
                batches_per_epoch=size,
                warm=int(case["batch_size"]) > 256,
            )
            for epoch, batch in zip(case["epoch"], case["batch"], strict=True)
        ]
        np.testing.assert_allclose(found, case["lr"], rtol=1e-12, err_msg=case.name)


def rates(epochs: int, batches: int = 4, **options) -> list[float]:
    """The rate of every step of a run."""
    settings = {"base": 0.5, "epochs": epochs, "batches_per_epoch": batches, **options}
    return [learning_rate(e, b, **settings) for e in range(1, epochs + 1) for b in range(batches)]


def test_without_cosine_the_rate_drops_after_the_given_epochs():
    found = rates(1000, 1, cosine=False, warm=False)
    assert [found[epoch - 1] for epoch in (1, 700, 701, 800, 801, 900, 901, 1000)] == pytest.approx(
        [0.5, 0.5, 0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005]
    )
    assert rates(4, 1, cosine=False, warm=False, decay_epochs=[2], decay_rate=0.5) == [0.5, 0.5, 0.25, 0.25]
    warmed = rates(12, 2, cosine=False)
    assert warmed[0] == 0.01 and warmed[10] == pytest.approx(0.255) and warmed[20:] == [0.5] * 4


@pytest.mark.parametrize("epochs", [2, 3, 8, 9, 20, 100])
def test_warm_up_rises_step_by_step_then_the_cosine_falls(epochs):
    found = rates(epochs)
    warm = 4 * (10 if epochs >= 10 else epochs // 2)
    assert found[0] == 0.01
    rises = np.diff(found[:warm])
    assert (rises > 0).all() and np.allclose(rises, rises[0])
    target = learning_rate(warm // 4, 0, base=0.5, epochs=epochs, batches_per_epoch=4, warm=False)
    assert found[warm - 1] + rises[0] == pytest.approx(target)
    assert (np.diff(found[warm:]) <= 0).all() and found[-1] == pytest.approx(0.0005)
    assert found[warm:] == rates(epochs, warm=False)[warm:]


def test_a_single_epoch_has_no_warm_up():
    assert rates(1) == rates(1, warm=False)


# the network ------------------------------------------------------------------------------------------------------------


def test_the_network_has_the_published_names_and_shapes():
    shapes = {name: list(value.shape) for name, value in make_simclr().state_dict().items()}
    assert {name.split(".")[0] for name in shapes} == {"encoder", "head"}
    assert [shapes[f"head.{i}.weight"] for i in (0, 2)] == [[512, 512], [128, 512]]
    assert sum(name.startswith("encoder.") for name in shapes) == len(simclr_resnet().state_dict())
    narrow = make_simclr(channels=1, size=8)
    assert [list(narrow.head[i].weight.shape) for i in (0, 2)] == [[32, 32], [64, 32]]
    assert isinstance(narrow.head[1], torch.nn.ReLU)


@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_have_length_one_and_are_float32(autocast):
    network = make_simclr(1, 8)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings, features = network(images), network.features(images)
    assert embeddings.dtype == features.dtype == torch.float32
    assert embeddings.shape == (6, 64) and features.shape == (6, 32)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(6), atol=1e-6)


# kNN --------------------------------------------------------------------------------------------------------------------


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around 5 centres, with much overlap, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(5, (count,), generator=generator)
    return centres[labels] + 2 * torch.randn(count, 12, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (20, 1.0), (90, 0.5)])
def test_knn_agrees_with_neighbours_of_scikit_learn(k, temperature, monkeypatch):
    monkeypatch.setattr(simclr, "QUERIES", 32)  # several chunks, the last one smaller
    (bank, bank_labels), (features, labels) = clusters(90, 0), clusters(77, 1)
    distances, found = (
        NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank.numpy()).kneighbors(features.numpy())
    )
    votes = np.zeros((77, 5))
    for query in range(77):
        np.add.at(
            votes[query], bank_labels.numpy()[found[query]], np.exp((1 - distances[query]) / temperature)
        )
    expected = 100 * np.mean(votes.argmax(axis=1) == labels.numpy())
    assert 30 < expected < 100
    assert knn_accuracy(bank, bank_labels, features, labels, 5, k, temperature) == pytest.approx(expected)


def test_k_is_at_most_the_bank_and_no_temperature_overflows():
    (bank, bank_labels), (features, labels) = clusters(30, 0), clusters(20, 1)
    assert knn_accuracy(bank, bank_labels, features, labels, 5) == knn_accuracy(
        bank, bank_labels, features, labels, 5, k=30
    )
    nearest = knn_accuracy(bank, bank_labels, features, labels, 5, k=1)
    assert knn_accuracy(bank, bank_labels, features, labels, 5, temperature=1e-4) == nearest
    assert knn_accuracy(bank, bank_labels, 5 * bank, bank_labels, 5, k=1) == 100  # lengths do not matter
