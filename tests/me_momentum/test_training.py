"""An epoch of cross-entropy and predictions, against plain loops; initial weights; LeNet's order of layers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from common.gpu.device import Device
from common.gpu.loader import Batches, Images
from common.runs.cli import UserError
from me_momentum.networks import make_network
from me_momentum.training import predict, train_epoch

CPU = Device(torch.device("cpu"), "fp32", "tests")
# channels and pixels of small images
NETWORKS = {"lenet": (1, 16), "small": (1, 8), "resnet18": (3, 12), "preact_narrow": (1, 20)}


def network_and_images(name: str, count: int) -> tuple[torch.nn.Module, Images]:
    channels, size = NETWORKS[name]
    generator = torch.Generator().manual_seed(count)
    shades = torch.randint(200, (count, 1, 1, channels), generator=generator)  # so that images differ
    pixels = (shades + torch.randint(56, (count, size, size, channels), generator=generator)).byte()
    torch.manual_seed(1)
    network = make_network(name, 4, channels, size)
    return network, Images(pixels.numpy(), (0.5,) * channels, (0.25,) * channels, torch.device("cpu"))


def sgd(network: torch.nn.Module) -> SGD:
    return SGD(network.parameters(), 0.02, 0.9, weight_decay=1e-2)


def observed(count: int) -> torch.Tensor:
    return torch.randint(4, (count,), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", ["lenet", "preact_narrow"])
def test_an_epoch_is_that_of_a_plain_loop(name):
    """Two passes with the same momentum; the last batch has two rows. In float64 rounding does not grow."""
    network, images = network_and_images(name, 26)
    network, labels = network.double(), observed(26)
    other = copy.deepcopy(network)
    optimizer, plain = sgd(network), sgd(other)
    order = torch.randperm(26, generator=torch.Generator().manual_seed(5)).split(8)
    batches = [((images.view(index).double(),), index) for index in order]
    for _ in range(2):
        loss, hits = 0.0, 0
        for (batch,), index in batches:
            logits = other.train()(batch)
            each = -F.log_softmax(logits, dim=1)[range(len(index)), labels[index]]
            plain.zero_grad()
            each.mean().backward()
            plain.step()
            loss += each.sum().item()
            hits += int((logits.argmax(dim=1) == labels[index]).sum())
        network.eval()  # as validation leaves it
        found = train_epoch(network, optimizer, batches, labels, CPU)
        assert found == pytest.approx((loss / 26, 100 * hits / 26), rel=1e-5)
    for (key, value), wanted in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_labels_are_looked_up_by_position_in_the_training_part_and_only_the_subset_is_trained_on():
    network, images = network_and_images("lenet", 20)
    other, subset = copy.deepcopy(network), torch.tensor([3, 4, 11, 19])
    labels = torch.full((20,), -5)  # no class: to look at one of these would be an error
    labels[subset] = torch.tensor([0, 1, 2, 3])
    found = train_epoch(network, sgd(network), Batches(images, 3, subset=subset), labels, CPU)
    alone = Images(images.pixels[subset].permute(0, 2, 3, 1).numpy(), (0.5,), (0.25,), torch.device("cpu"))
    assert found == pytest.approx(train_epoch(other, sgd(other), Batches(alone, 3), labels[subset], CPU))
    for value, other_value in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, other_value)


@pytest.mark.parametrize(
    ("name", "padding", "size"),
    [("resnet18", 0, 11), ("resnet18", 1, 9), ("preact_narrow", 0, 5), ("lenet", 0, 14), ("small", 0, 4)],
)
def test_a_last_batch_of_one_row_of_the_smallest_images_that_are_taken_trains_too(name, padding, size):
    images = Images(np.zeros((3, size, size, 3), np.uint8), (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    network = make_network(name, 4, 3, size, padding)
    train_epoch(network, sgd(network), Batches(images, 2), observed(3), CPU)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    steps = [v for key, v in network.state_dict().items() if key.endswith("num_batches_tracked")]
    assert all(step == 2 for step in steps), "no batch is left out"
    with pytest.raises(UserError, match=rf"--network {name}: images of {size - 1} pixels are too small"):
        make_network(name, 4, 3, size - 1, padding)


@pytest.mark.parametrize("name", ["lenet", "preact_narrow"])
def test_predictions_are_by_position_and_leave_the_network_as_it_is(name):
    network, images = network_and_images(name, 23)
    network.eval()
    with torch.no_grad():
        logits = network(images.view(torch.arange(23)))
        [*network.children()][-1].bias.sub_(logits.mean(dim=0))  # so that no class is always the largest
        logits -= logits.mean(dim=0)
    before = {key: value.clone() for key, value in network.train().state_dict().items()}
    for size, seed in ((1, 0), (5, 1), (64, 2)):
        batches = Batches(images, size, shuffle=True, generator=torch.Generator().manual_seed(seed))
        found = predict(network, batches, 23, CPU)
        assert found.dtype == torch.int64 and torch.equal(found, logits.argmax(dim=1))
    assert len(found.unique()) > 1
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_lenets_pooling_before_relu_is_relu_before_pooling_in_outputs_and_gradients():
    torch.manual_seed(0)
    lenet = make_network("lenet", 10, 1, 28)
    images = torch.randn(6, 1, 28, 28, requires_grad=True)
    x = F.max_pool2d(F.relu(lenet.conv1(images)), 2)
    x = F.max_pool2d(F.relu(lenet.conv2(x)), 2)
    released = lenet.fc3(F.relu(lenet.fc2(F.relu(lenet.fc1(x.view(6, -1))))))
    leaves, outputs = [images, *lenet.parameters()], [lenet(images), released]
    gradients = [torch.autograd.grad(F.cross_entropy(out, torch.arange(6)), leaves) for out in outputs]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for found, wanted in zip(*gradients, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "padding", "channels", "size", "maps"),
    [
        ("resnet18", 0, 3, 32, [30, 4]),
        ("resnet18", 1, 3, 32, [32, 4]),
        ("preact_resnet18", 0, 1, 8, [8, 2]),  # narrow, and its stem padded whatever the flag says
        ("preact_resnet18", 1, 3, 32, [32, 4]),
    ],
)
def test_the_stem_has_no_padding_unless_it_is_asked_for(name, padding, channels, size, maps):
    network, seen = make_network(name, 10, channels, size, stem_padding=padding).eval(), []
    for module in (network.stem, network.blocks[-1]):
        module.register_forward_hook(lambda _module, _input, output: seen.append(output.shape[2]))
    with torch.no_grad():
        assert network(torch.zeros(1, channels, size, size)).shape == (1, 10)
    assert seen == maps
