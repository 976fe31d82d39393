"""sanm/pretrain.py on digits and on small colour images. Killed runs: test_manifold_pretrain, with the same loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from common import datasets
from common.gpu import device as gpu
from common.gpu.encoders import load_encoder
from common.gpu.loader import Batches, Images
from common.pretraining.simclr import knn_accuracy, pooled_features
from sanm import pretrain
from sanm.networks import make_simclr, simclr_resnet
from tests.end_to_end.runs import result, table

EPOCHS = 3
SETTING = f"--dataset digits --epochs {EPOCHS} --batch_size 64 --lr 0.01 --temp 0.15 --seed 1 --device cpu"
FLAGS = SETTING.split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanm_pretrain") / "run"
    pretrain.main([*FLAGS, "--out", str(folder)])
    return folder


def knn_of(encoder: torch.nn.Module) -> float:
    data, device = datasets.load("digits"), gpu.Device(torch.device("cpu"), "fp32", "")
    network = make_simclr(1, 8)
    network.encoder = encoder
    sides = []
    for split in (data.train, data.test):
        batches = Batches(Images(split.images, data.mean, data.std, device.device), 128)
        sides += [pooled_features(network, batches, device), torch.from_numpy(split.labels)]
    return knn_accuracy(*sides, data.num_classes)


@pytest.mark.slow
def test_a_run_leaves_its_log_result_and_an_encoder_that_is_better_than_an_untrained_one(run):
    rows, found = table(run), result(run)
    assert list(rows[0]) == ["epoch", "loss", "knn_accuracy", "lr", "seconds"]
    assert len(rows) == EPOCHS and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    expected = {"paper": "sanm", "method": "SimCLR", "dataset": "digits", "noise_type": "none"}
    expected |= {"noise_rate": None, "profile": "embedded", "metric": "knn_accuracy", "epochs": EPOCHS}
    assert {name: found[name] for name in expected} == expected
    assert found["noise"]["realised_rate"] == 0 and found["images"] == 1437 * EPOCHS
    assert found["metrics"]["last"] == float(rows[-1]["knn_accuracy"])
    torch.manual_seed(1)
    encoder = simclr_resnet(1, 8)
    untrained = knn_of(encoder)
    assert load_encoder(encoder, run / "encoder.safetensors") == (len(encoder.state_dict()), 0)
    assert knn_of(encoder) == pytest.approx(found["metrics"]["last"], abs=0.3)
    assert found["metrics"]["last"] > untrained + 5
    with safe_open(run / "encoder.safetensors", "pt") as file:
        assert file.metadata() == {"dataset": "digits", "epochs": str(EPOCHS), "seed": "1"}


def test_small_colour_images_without_cosine_a_last_batch_of_one_and_knn_at_the_end_alone(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 9), ("test", 4)):
        arrays[f"{part}_labels"] = np.arange(count) % 3
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar100.npz", **arrays)
    data = f"--dataset cifar100 --data_path {tmp_path} --device cpu --out {tmp_path / 'run'} --limit_test 4"
    schedule = "--epochs 3 --batch_size 4 --no-cosine --lr 0.01 --lr_decay_epochs 2 --knn_every 2"
    pretrain.main([*data.split(), *schedule.split(), "--full_test_at_end"])
    rows, found = table(tmp_path / "run"), result(tmp_path / "run")
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.01, 0.001])
    assert [bool(row["knn_accuracy"]) for row in rows] == [False, True, True]
    assert found["profile"] == "short+limit_test=4" and found["images"] == 27
    assert set(found["metrics"]) == {"best", "last", "last10", "last_loss", "full_test", "full_test_images"}
    assert found["metrics"]["full_test"] == found["metrics"]["last"], "all four test images are in both"
    load_encoder(simclr_resnet(3, 8), tmp_path / "run" / "encoder.safetensors")
