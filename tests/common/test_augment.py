"""Augmentations of batches against torchvision's transforms applied image by image."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2_contingency, chisquare
from torch import Tensor
from torchvision import transforms

from common import augment


def numbered(channels: int, height: int, width: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """An image [C, H, W] whose values 1, 2, 3, ... are all different, in rows that rise from left to right."""
    return torch.arange(1, channels * height * width + 1).reshape(channels, height, width).to(dtype)


def copies(image: Tensor, count: int) -> Tensor:
    return image.expand(count, *image.shape)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torchvision_outputs(transform, image: Tensor, count: int) -> Tensor:
    """What torchvision makes of `count` copies of an image, one by one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.stack([transform(image) for _ in range(count)])


def different(batch: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in batch.contiguous()}


def places(batch: Tensor, image: Tensor, padding: int) -> np.ndarray:
    """How often each of the (2 padding + 1)^2 places was cut out, decoded from crops of a numbered image."""
    # the value at (padding, padding) is the image's at (top, left)
    top, left = np.divmod(batch[:, 0, padding, padding].numpy() - 1, image.shape[2])
    side = 2 * padding + 1
    assert max(top.max(), left.max()) < side
    return np.bincount(top * side + left, minlength=side**2)


# crop and flip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 2), (9, 7, 3), (5, 6, 1)])
def test_random_crop_takes_every_place_as_often_as_torchvision(height, width, padding):
    image = numbered(1, height, width)
    ours = augment.random_crop(copies(image, 6000), padding, generator())
    theirs = torchvision_outputs(transforms.RandomCrop((height, width), padding=padding), image, 2000)
    counts = [places(batch, image, padding) for batch in (ours, theirs)]
    assert chisquare(counts[0]).pvalue > 1e-3
    assert chi2_contingency(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda batch, g: augment.random_crop(batch, 2, g),
            transforms.RandomCrop((8, 6), padding=2),
        ),
        (augment.random_flip, transforms.RandomHorizontalFlip()),
        (
            lambda batch, g: augment.crop_and_flip(batch, g, padding=2),
            transforms.Compose([transforms.RandomCrop((8, 6), padding=2), transforms.RandomHorizontalFlip()]),
        ),
    ],
    ids=["random_crop", "random_flip", "crop_and_flip"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_possible_outputs_are_exactly_those_of_torchvision(ours, theirs, channels):
    image = numbered(channels, 8, 6)
    possible = different(torchvision_outputs(theirs, image, 1000))
    assert different(ours(copies(image, 1000), generator())) == possible


@pytest.mark.parametrize("p", [0, 0.3, 0.5, 1])
def test_random_flip_mirrors_a_share_p_of_the_images(p):
    image = numbered(3, 4, 4)
    flipped = augment.random_flip(copies(image, 3000), generator(), p)
    mirrored = (flipped == image.flip(2)).flatten(1).all(1)
    assert ((flipped == image).flatten(1).all(1) ^ mirrored).all()
    assert binomtest(int(mirrored.sum()), 3000, p).pvalue > 1e-3


def test_crop_and_flip_draw_for_each_image_of_a_batch():
    out = augment.crop_and_flip(copies(numbered(3, 32, 32), 64), generator(), padding=4)
    assert len(different(out)) > 40  # of 81 places x 2; one draw per batch would give 1


def test_crop_and_flip_keep_each_image_in_its_row():
    images = torch.arange(1, 51, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 8, 8)
    out = augment.crop_and_flip(images, generator(), padding=2)
    assert torch.equal(out.amax(dim=(1, 2, 3)), images[:, 0, 0, 0])


def test_a_crop_without_padding_changes_nothing():
    batch = copies(numbered(3, 8, 8), 16)
    assert torch.equal(augment.random_crop(batch, 0, generator()), batch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "function",
    [lambda batch, g: augment.random_crop(batch, 1, g), augment.random_flip, augment.crop_and_flip],
    ids=["random_crop", "random_flip", "crop_and_flip"],
)
def test_shape_channels_and_dtype_are_kept(function, channels, dtype):
    batch = copies(numbered(channels, 6, 5, dtype), 7)
    out = function(batch, generator())
    assert out.shape == batch.shape
    assert out.dtype == dtype
    assert set(out.unique().tolist()) <= {0, *batch.unique().tolist()}


def test_random_crop_returns_channels_last():
    out = augment.random_crop(copies(numbered(3, 6, 5), 7), 1, generator())
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_generator_decides_the_draws_and_the_global_one_is_left_alone():
    batch, before = copies(numbered(3, 8, 8), 32), torch.get_rng_state()
    first = augment.crop_and_flip(batch, generator(1), padding=2)
    assert torch.equal(first, augment.crop_and_flip(batch, generator(1), padding=2))
    assert not torch.equal(first, augment.crop_and_flip(batch, generator(2), padding=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_images_are_not_changed_in_place():
    batch = copies(numbered(3, 8, 8), 32).clone()
    augment.crop_and_flip(batch, generator(), padding=2)
    assert torch.equal(batch, copies(numbered(3, 8, 8), 32))


# the training augmentation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "size", "padding", "mirrors"),
    [
        ("digits", 8, 1, False),
        ("mnist", 28, 3, False),
        ("fashion_mnist", 28, 3, True),
        ("cifar10", 32, 4, True),
        ("cifar100", 32, 4, True),
        ("own", 4, 1, True),  # an eighth of 4 is nothing: 1 pixel at least
    ],
)
def test_training_augmentation_crops_by_an_eighth_and_mirrors_all_but_handwriting(
    dataset, size, padding, mirrors
):
    image = numbered(1, size, size)
    out = augment.training_augmentation(dataset, size)(copies(image, 2000), generator())
    middle = size // 2
    mirrored = (out[:, 0, middle, middle] < out[:, 0, middle, middle - 1]).double().mean().item()
    assert mirrored == pytest.approx(0.5 if mirrors else 0, abs=0.06 * mirrors)
    assert len(different(out)) == (2 * padding + 1) ** 2 * (1 + mirrors)


# normalise --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.1307,), (0.3081,)), ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))],
    ids=["grey", "colour"],
)
def test_normalise_is_to_tensor_and_normalize(mean, std):
    images = np.random.RandomState(0).randint(0, 256, size=(20, 9, 7, len(mean)), dtype=np.uint8)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    ours = augment.normalise(
        torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(mean), torch.tensor(std)
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.stack([theirs(image) for image in images]), rtol=0, atol=1e-6)
