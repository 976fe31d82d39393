"""SimCLR's loss, schedule, head and the kNN diagnostic; its epochs, with a small encoder and images of noise."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.optim import SGD

from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from common.pretraining import simclr
from common.pretraining.flags import add_recipe_flags, settle
from common.pretraining.simclr import SimCLR, knn_accuracy, learning_rate, nt_xent, train_epoch
from common.runs import cli
from common.runs.run import Run

CPU = Device(torch.device("cpu"), "fp32", "")


def small_network(dimensions: int = 6) -> SimCLR:
    """Two convolutions for grey images, with the same weights every time."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()]
    return SimCLR(nn.Sequential(*layers), 8, dimensions)


def unit_embeddings(images: int, dimensions: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(images, 2, dimensions, generator=generator), dim=2)


def test_golden_loss_and_gradient(golden):
    for case in golden("sanm", "simclr_loss"):
        embeddings, gradient = (torch.from_numpy(case[name]) for name in ("embeddings", "gradient"))
        loss = nt_xent(embeddings.requires_grad_(), float(case["temperature"]))
        loss.backward()
        assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-5), case.name
        torch.testing.assert_close(embeddings.grad, gradient, rtol=1e-4, atol=1e-5, msg=case.name)


def test_the_loss_at_extreme_temperatures_under_autocast_of_one_image_and_with_a_base_temperature():
    embeddings, one = unit_embeddings(6).requires_grad_(), unit_embeddings(1).requires_grad_()
    loss = nt_xent(embeddings, 1e-3)  # exp(1000) is not a float32
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(embeddings, 0.5)
    assert inside.dtype == torch.float32 and torch.equal(inside, nt_xent(embeddings, 0.5))
    assert nt_xent(embeddings.bfloat16(), 0.5).dtype == torch.float32
    loss = nt_xent(one, 0.5)
    loss.backward()
    assert loss.item() == 0 and not one.grad.any()
    same_temperature = nt_xent(embeddings, 0.5, 0.5).item()
    assert inside.item() == pytest.approx(same_temperature * 0.5 / 0.07, rel=1e-5)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        nt_xent(embeddings, 0)


def test_golden_learning_rates(golden):
    for case in golden("sanm", "simclr_lr"):
        settings = {"base": float(case["base_lr"]), "warm": int(case["batch_size"]) > 256}
        settings |= {"epochs": int(case["epochs"]), "batches_per_epoch": int(case["batches_per_epoch"])}
        steps = zip(case["epoch"].tolist(), case["batch"].tolist(), strict=True)
        found = [learning_rate(epoch, batch, **settings) for epoch, batch in steps]
        np.testing.assert_allclose(found, case["lr"], rtol=1e-12, err_msg=case.name)


def rates(epochs: int, batches: int = 4, **options) -> list[float]:
    """The rate of every step of a run."""
    settings = {"base": 0.5, "epochs": epochs, "batches_per_epoch": batches, **options}
    return [learning_rate(e, b, **settings) for e in range(1, epochs + 1) for b in range(batches)]


def test_without_cosine_the_rate_drops_after_the_given_epochs():
    found = rates(1000, 1, cosine=False, warm=False)
    expected = np.repeat([0.5, 0.05, 0.005, 0.0005], [700, 100, 100, 100])
    assert found == pytest.approx(expected)
    assert rates(4, 1, cosine=False, warm=False, decay_epochs=[2], decay_rate=0.5) == [0.5, 0.5, 0.25, 0.25]
    warmed = rates(12, 2, cosine=False)
    assert warmed[0] == 0.01 and warmed[10] == pytest.approx(0.255) and warmed[20:] == [0.5] * 4


@pytest.mark.parametrize(
    ("epochs", "asked", "had"), [(20, 1, 1), (20, 4, 4), (4, 4, 4), (20, 20, 20), (3, 4, 1), (15, 16, 7)]
)
def test_as_many_epochs_of_warm_up_as_asked_for_of_fewer_the_first_half(epochs, asked, had):
    found, plain = rates(epochs, warm_epochs=asked), rates(epochs, warm=False)
    assert found[0] == 0.01 and found[4 * had :] == plain[4 * had :]
    assert np.allclose(np.diff(found[: 4 * had]), (plain[4 * had - 1] - 0.01) / (4 * had))
    assert rates(epochs, warm_epochs=10) == rates(epochs)


@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_have_length_one_and_are_float32(autocast):
    network = small_network(dimensions=5)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings, features = network(images), network.features(images)
    assert embeddings.dtype == features.dtype == torch.float32
    assert embeddings.shape == (6, 5) and features.shape == (6, 8)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(6), atol=1e-6)


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
    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank.numpy())
    distances, found = neighbours.kneighbors(features.numpy())
    votes = np.zeros((77, 5))
    weights = np.exp((1 - distances) / temperature)
    np.add.at(votes, (np.arange(77)[:, None], bank_labels.numpy()[found]), weights)
    expected = 100 * np.mean(votes.argmax(axis=1) == labels.numpy())
    assert 30 < expected < 100
    assert knn_accuracy(bank, bank_labels, features, labels, 5, k, temperature) == pytest.approx(expected)


def test_k_is_at_most_the_bank_and_no_temperature_overflows():
    bank, bank_labels = clusters(30, 0)
    accuracy = partial(knn_accuracy, bank, bank_labels, *clusters(20, 1), 5)
    assert accuracy() == accuracy(k=30)
    assert accuracy(temperature=1e-4) == accuracy(k=1)
    assert knn_accuracy(bank, bank_labels, 5 * bank, bank_labels, 5, k=1) == 100  # lengths do not matter


def small_batches(images: int, size: int) -> Batches:
    """Batches of two views, which differ by noise, of random images of 8 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 1), dtype=np.uint8)

    def noisy(batch, generator):
        return batch.float() + 20 * torch.randn(batch.shape, generator=generator)

    grey = Images(pixels, (0.5,), (0.25,), torch.device("cpu"))
    return Batches(grey, size, views=2, augmentation=noisy, generator=torch.Generator().manual_seed(0))


def test_an_epoch_is_sgd_on_the_loss_of_both_views_at_the_rate_of_each_step():
    network, other = small_network(), small_network()
    optimizer, plain = (SGD(n.parameters(), 9.0, 0.9, weight_decay=1e-2) for n in (network, other))
    loss = train_epoch(network, optimizer, small_batches(10, 4), lambda batch: 0.1 / (batch + 1), 0.5, CPU)

    losses, sizes = [], []
    other.train()
    for batch, (views, index) in enumerate(small_batches(10, 4)):
        plain.param_groups[0]["lr"] = 0.1 / (batch + 1)
        plain.zero_grad()
        step_loss = nt_xent(torch.stack(other(torch.cat(views)).chunk(2), dim=1), 0.5)
        step_loss.backward()
        plain.step()
        losses.append(step_loss.item())
        sizes.append(len(index))
    assert sizes == [4, 4, 2]
    assert loss == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_last_batch_of_one_image_costs_nothing_and_teaches_nothing():
    network = small_network()
    before = {name: value.clone() for name, value in network.named_parameters()}
    optimizer = SGD(network.parameters(), 1.0)
    assert train_epoch(network, optimizer, small_batches(1, 4), lambda batch: 1.0, 0.5, CPU) == 0
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert train_epoch(network, optimizer, small_batches(5, 4), lambda batch: 1e-3, 0.5, CPU) > 0


def assert_holds(path: Path, encoder: nn.Module, **metadata: str) -> None:
    """The file has the encoder's tensors and no others. Its bytes may differ: safetensors' metadata have no fixed order."""
    tensors, own = load_file(path), encoder.state_dict()
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


def test_the_encoder_file_holds_the_encoder_in_plain_order(tmp_path):
    network = CPU.prepare(small_network())
    assert not network.encoder[3].weight.is_contiguous()  # it is channels-last
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(simclr.encoder_file(network, {"dataset": "digits", "epochs": "5"}))
    assert_holds(path, network.encoder, dataset="digits", epochs="5")


LABELS, TEST_LABELS = torch.arange(24) % 3, torch.arange(15) % 3
CELL = dict.fromkeys(("noise_rate", "imb_factor", "ood_ratio")) | {
    "dataset": "strokes", "noise_type": "none", "profile": "short",
}  # fmt: skip
METADATA = {"dataset": "strokes", "epochs": "5", "seed": "1"}  # of the encoder's file


def strokes(labels: torch.Tensor, seed: int) -> Images:
    """Images of 8 pixels with noise, brighter in the rows of their class."""
    pixels = np.random.default_rng(seed).integers(0, 160, (len(labels), 8, 8, 1), dtype=np.uint8)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[3 * label : 3 * label + 2] += 60
    return Images(pixels, (0.5,), (0.25,), torch.device("cpu"))


TRAIN, TEST = strokes(LABELS, 0), strokes(TEST_LABELS, 1)


@pytest.fixture
def pre_trained(tmp_path):
    """pre_trained("--flag", ..., name="run", labels=LABELS, ...) -> the run and its network, after 5 epochs of 3 batches."""

    def go(*words: str, name: str = "run", labels: torch.Tensor = LABELS, **options) -> tuple[Run, SimCLR]:
        parser = cli.Parser()
        parser.add_argument("--dataset", default="strokes")
        add_recipe_flags(parser)
        cli.add_shared_flags(parser, default_seed=1)
        usual = f"--epochs 5 --batch_size 8 --lr 0.05 --knn_every 2 --out {tmp_path / name}"
        args = parser.parse_args([*usual.split(), *words])
        settle(args)
        run = Run(args, CPU, paper="sanm", method="SimCLR", name=name, cell=CELL)
        network = CPU.prepare(small_network())
        data = TRAIN, TEST, labels, TEST_LABELS, 3
        try:
            run.save_labels(np.arange(24), None, LABELS.numpy(), 3)
            simclr.pre_train(run, args, CPU, network, *data, flip=False, **options)
        finally:
            run.release()
        return run, network

    return go


def column(run: Run, name: str) -> list:
    return [row[name] for row in run.rows]


def knn(network: SimCLR, bank=slice(None)) -> float:
    """The accuracy on the test images, with all or some training images as the bank."""
    train, test = (simclr.pooled_features(network, Batches(images, 16), CPU) for images in (TRAIN, TEST))
    return knn_accuracy(train[bank], LABELS[bank], test, TEST_LABELS, 3)


def metrics(run: Run) -> dict:
    return json.loads((run.folder / "result.json").read_text())["metrics"]


def test_a_run_measures_every_few_epochs_and_keeps_the_encoder(pre_trained):
    run, network = pre_trained()
    assert list(run.rows[0]) == ["epoch", "loss", "knn_accuracy", "lr", "seconds"]
    assert [value is not None for value in column(run, "knn_accuracy")] == [False, True, False, True, True]
    assert run.rows[-1]["knn_accuracy"] == knn(network) == metrics(run)["last"]
    assert set(metrics(run)) == {"best", "last", "last10", "last_loss"}
    assert_holds(run.folder / "encoder.safetensors", network.encoder, **METADATA)


def test_the_rate_is_the_schedules_and_warms_up_in_the_epochs_asked_for(pre_trained):
    for name, words, warm in (("cold", (), False), ("warm", ("--warm", "--warmup-epochs", "3"), True)):
        run, _ = pre_trained(*words, name=name)
        expected = rates(5, 3, base=0.05, warm=warm, warm_epochs=3)
        assert column(run, "lr") == expected[2::3]  # of the last of three batches
    assert column(run, "lr")[0] != learning_rate(1, 2, base=0.05, epochs=5, batches_per_epoch=3)


def test_neighbours_are_sought_in_the_bank_alone(pre_trained):
    bank = torch.tensor([7, 0, 4, 3, 1, 21])  # no image of the last class: a third of the test images is lost
    labels = torch.full_like(LABELS, -1)  # of no class: an error where they are looked at
    labels[bank] = LABELS[bank]
    run, network = pre_trained(name="bank", labels=labels, bank=bank)
    everyone, _ = pre_trained(name="all")
    assert run.rows[-1]["knn_accuracy"] == knn(network, bank) != everyone.rows[-1]["knn_accuracy"]
    assert column(run, "loss") == column(everyone, "loss")


def spread(features: torch.Tensor) -> dict[str, float | None]:
    assert features.shape == (24, 8)
    return {"deviation": float(features.std()), "unknown": None, "not asked for": 1.0}


def test_further_measures_are_columns_where_knn_is_measured_and_metrics_at_the_end(pre_trained):
    plain, _ = pre_trained(name="plain")
    run, network = pre_trained(name="measured", measure=spread, measured_names=("deviation", "unknown"))
    assert list(run.rows[0]) == ["epoch", "loss", "knn_accuracy", "deviation", "unknown", "lr", "seconds"]
    assert [value is not None for value in column(run, "deviation")] == [False, True, False, True, True]
    assert column(run, "unknown") == [None] * 5
    features = simclr.pooled_features(network, Batches(TRAIN, 16), CPU)
    assert run.rows[-1]["deviation"] == float(features.std())
    further = {name: value for name, value in metrics(run).items() if name not in metrics(plain)}
    assert further == {"last_deviation": run.rows[-1]["deviation"], "last_unknown": None}
    for name in ("loss", "knn_accuracy", "lr"):
        assert column(run, name) == column(plain, name)


def test_a_run_that_stopped_while_measuring_goes_on_to_the_same_end(pre_trained):
    whole, network = pre_trained(name="whole", measure=spread, measured_names=["deviation"])
    calls = []

    def failing(features: torch.Tensor) -> dict[str, float | None]:
        calls.append(len(features))
        if len(calls) == 2:
            raise InterruptedError
        return spread(features)

    with pytest.raises(InterruptedError):
        pre_trained(measure=failing, measured_names=["deviation"])
    for _ in range(2):  # the second one finds it finished
        run, _ = pre_trained(measure=spread, measured_names=["deviation"])
        for name in ("epoch", "loss", "knn_accuracy", "deviation", "lr"):
            assert column(run, name) == column(whole, name)
        assert metrics(run) == metrics(whole)
        assert_holds(run.folder / "encoder.safetensors", network.encoder, **METADATA)
