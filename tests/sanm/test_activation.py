"""The concentration of activation maps: its values by hand, and what is said of right and wrong labels."""

import math

import pytest
import torch

from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from sanm.activation import concentration, concentration_statistics, map_concentrations
from sanm.networks import make_network


def test_one_place_is_one_and_an_even_map_zero():
    maps = torch.zeros(4, 2, 3, 3)
    maps[0, 1, 2, 0] = -7.0
    maps[1] = 0.3
    maps[3, 0, 0, 0], maps[3, 1, 1, 1] = 1.0, math.sqrt(3)  # energies 1 and 3
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = [1, 0, 0, 1 - entropy / math.log(9)]
    assert concentration(maps).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(concentration(1e4 * maps), concentration(maps))
    assert concentration(torch.ones(2, 5, 1, 1)).tolist() == [0, 0]


def test_statistics_of_right_and_wrong_labels():
    values, right = torch.tensor([0.1, 0.4, 0.3, 0.6]), torch.tensor([True, False, True, True])
    found = concentration_statistics(values, right)
    assert found == pytest.approx({"map_auc": 1 / 3, "map_right": 1 / 3, "map_wrong": 0.4})
    found = concentration_statistics(values, torch.ones(4, dtype=bool))
    assert found["map_auc"] is None and found["map_wrong"] is None


def test_every_image_has_its_own_value():
    torch.manual_seed(0)
    network = make_network("dividemix", 10, channels=1, size=8)
    device = Device(torch.device("cpu"), "fp32", "")
    pixels = torch.randint(0, 256, (7, 8, 8, 1), dtype=torch.uint8).numpy()
    images = Images(pixels, (0.5,), (0.5,), device.device)
    values = map_concentrations(network, Batches(images, 3), 7, device)
    each = [concentration(network(images.view(torch.tensor([i]))).maps).item() for i in range(7)]
    assert values.tolist() == pytest.approx(each, abs=1e-5) and len(set(each)) == 7
