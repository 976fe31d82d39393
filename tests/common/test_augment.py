"""Augmentations of batches against torchvision's transforms applied image by image."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2_contingency, chisquare, ks_2samp, kstest
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional, v2

from common.gpu import augment, policies
from common.gpu.image_operations import hue
from tests.common.pil import image_by_image


def numbered(channels: int, height: int, width: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """An image [C, H, W] whose values 1, 2, 3, ... are all different, in rows that rise from left to right."""
    return torch.arange(1, channels * height * width + 1).reshape(channels, height, width).to(dtype)


def copies(image: Tensor, count: int) -> Tensor:
    return image.expand(count, *image.shape)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torchvision(draw, count: int) -> list:
    """What `count` calls of a function give that draws from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [draw() for _ in range(count)]


def different(batch: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in batch.contiguous()}


CROP, FLIP = transforms.RandomCrop((8, 6), padding=2), transforms.RandomHorizontalFlip()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda batch, g: augment.random_crop(batch, 2, g), CROP),
        (augment.random_flip, FLIP),
        (partial(augment.crop_and_flip, padding=2), transforms.Compose([CROP, FLIP])),
    ],
    ids=["random_crop", "random_flip", "crop_and_flip"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_possible_outputs_are_exactly_those_of_torchvision(ours, theirs, channels):
    image = numbered(channels, 8, 6)
    possible = torch.stack(torchvision(lambda: theirs(image), 1000))
    assert different(ours(copies(image, 1000), generator())) == different(possible)


@pytest.mark.parametrize("p", [0, 0.3, 0.5, 1])
def test_random_flip_mirrors_a_share_p_of_the_images(p):
    image = numbered(3, 4, 4)
    flipped = augment.random_flip(copies(image, 3000), generator(), p)
    mirrored = (flipped == image.flip(2)).flatten(1).all(1)
    assert ((flipped == image).flatten(1).all(1) ^ mirrored).all()
    assert binomtest(int(mirrored.sum()), 3000, p).pvalue > 1e-3


def test_crop_and_flip_keep_each_image_in_its_row_and_crops_are_channels_last_of_the_same_type():
    images = torch.arange(1, 51, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 8, 8)
    out = augment.crop_and_flip(images, generator(), padding=2)
    assert torch.equal(out.amax(dim=(1, 2, 3)), images[:, 0, 0, 0])
    out = augment.random_crop(copies(numbered(3, 6, 5, torch.bfloat16), 7), 1, generator())
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dataset", "size", "padding", "mirrors"),
    [
        ("digits", 8, 1, False),
        ("mnist", 28, 3, False),
        ("fashion_mnist", 28, 3, True),
        ("cifar10", 32, 4, True),
        ("own", 4, 1, True),  # an eighth of 4 is nothing: 1 pixel at least
    ],
)
def test_training_crops_by_an_eighth_and_mirrors_all_but_handwriting(dataset, size, padding, mirrors):
    image, middle = numbered(1, size, size), size // 2
    out = augment.training_augmentation(dataset, size)(copies(image, 2000), generator())
    mirrored = (out[:, 0, middle, middle] < out[:, 0, middle, middle - 1]).double().mean().item()
    assert mirrored == pytest.approx(0.5 if mirrors else 0, abs=0.06 * mirrors)
    assert len(different(out)) == (2 * padding + 1) ** 2 * (1 + mirrors)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.1307,), (0.3081,)), ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))],
    ids=["grey", "colour"],
)
def test_normalise_is_to_tensor_and_normalize(mean, std):
    images = np.random.RandomState(0).randint(0, 256, size=(20, 9, 7, len(mean)), dtype=np.uint8)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    batch, constants = torch.from_numpy(images).permute(0, 3, 1, 2), (torch.tensor(mean), torch.tensor(std))
    ours = augment.normalise(batch, *constants)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.stack([theirs(image) for image in images]), rtol=0, atol=1e-6)
    # in every memory format: the bits of the plain formula, its strides, and the images stay what they are
    scale, shift = augment.scale_and_shift(*constants)
    before, groups = batch.clone(), batch.view(2, 10, *batch.shape[1:])
    for given in (batch, batch.contiguous(), batch[:, :, 1:, ::2], batch.float(), groups):
        made, plain = augment.normalise(given, *constants), given.float() * scale - shift
        assert torch.equal(made, plain)
        assert made.stride() == plain.stride()
    assert torch.equal(batch, before)


# all of it exact: no tolerance anywhere below

both_modes = pytest.mark.parametrize("channels", [1, 3])
all_sizes = pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (7, 13)])


def noise(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Random images, the first of one value, the second black and white."""
    images = torch.randint(256, (count, channels, height, width), generator=generator(seed)).to(torch.uint8)
    images[0] = 77
    images[1] = 255 * (images[1] > 127)
    return images


@both_modes
@all_sizes
def test_color_jitter_is_torchvisions(channels, height, width):
    images = noise(96, channels, height, width)
    draws = augment.draw_color_jitter(96, generator(1), p=0.9)
    names = ("brightness", "contrast", "saturation", "hue")

    def jittered(image, i):
        for number in draws.order[i].tolist():
            if number < 4:  # the fifth leaves the image as it is
                adjust = getattr(functional, f"adjust_{names[number]}")
                image = adjust(image, draws.strength[i, number].item())
        return image

    assert torch.equal(augment.apply_color_jitter(images, draws), image_by_image(images, jittered))


def test_hue_is_torchvisions_for_all_kinds_of_colours():
    values = torch.tensor([*range(0, 256, 5), 1, 2, 127, 128, 254], dtype=torch.uint8)
    colours = torch.cartesian_prod(values, values, values).T.reshape(3, 1, -1)
    shifts = torch.tensor([-0.5, -0.2, -1 / 256, 0, 0.1, 0.35, 0.5], dtype=torch.float64)
    images = copies(colours, len(shifts))
    theirs = image_by_image(images, lambda image, i: functional.adjust_hue(image, shifts[i].item()))
    assert torch.equal(hue(images, shifts), theirs)


@both_modes
@all_sizes
def test_random_affine_is_torchvisions(channels, height, width):
    images = noise(96, channels, height, width)
    drawn = augment.draw_affine(90, height, width, generator(2))
    turned, still = torch.tensor([90, -90, 180, 45, 0, 0]).double(), torch.zeros(6, dtype=torch.float64)
    shear_x, shear_y = still.clone(), still.clone()
    shear_x[4], shear_y[5] = 20, -20
    special = (turned, turned.sign(), still, still + 1, shear_x, shear_y)
    draws = augment.AffineDraws(*(torch.cat(pair) for pair in zip(drawn, special, strict=True)))

    def moved(image, i):
        angle, right, down, scale, *shear = (values[i].item() for values in draws)
        return functional.affine(image, angle, [int(right), int(down)], scale, shear)

    assert torch.equal(augment.apply_affine(images, draws), image_by_image(images, moved))


@both_modes
@all_sizes
def test_random_resized_crop_is_torchvisions(channels, height, width):
    images = noise(100, channels, height, width)
    draws = augment.draw_resized_crop(100, height, width, generator(3), scale=(0.01, 1))
    whole, pixel = (0, 0, height, width), (height - 1, width - 1, 1, 1)
    for values, *special in zip(draws, whole, whole, pixel, strict=True):
        values[:3] = torch.tensor(special)

    def cropped(image, i):
        return functional.resized_crop(image, *(values[i].item() for values in draws), [height, width])

    ours = augment.apply_resized_crop(images, draws)
    assert torch.equal(ours, image_by_image(images, cropped))
    assert torch.equal(ours[:2], images[:2])
    assert ours.is_contiguous(memory_format=torch.channels_last)


@both_modes
@pytest.mark.parametrize("p", [0, 0.2, 1])
def test_random_grayscale_is_torchvisions_for_a_share_p_of_the_images(channels, p):
    images = noise(1000, channels, 8, 8)[2:]
    ours = augment.random_grayscale(images, generator(4), p)
    theirs = image_by_image(images, lambda image, _: functional.rgb_to_grayscale(image, channels))
    grey = (ours == theirs).flatten(1).all(1)
    untouched = (ours == images).flatten(1).all(1)
    if channels == 1:
        assert untouched.all()
    else:
        assert (grey ^ untouched).all()
        assert binomtest(int(grey.sum()), len(images), p).pvalue > 1e-3


def test_color_jitter_draws_as_torchvision():
    draws = augment.draw_color_jitter(20000, generator(), 0.4, 1.5, 0, 0.3, p=0.7)
    jitter = transforms.ColorJitter(0.4, 1.5, 0.1, 0.3)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = np.array(torchvision(lambda: jitter.get_params(*ranges)[1:], 2000), dtype=float)
    for i, (low, high) in enumerate([(0.6, 1.4), (0, 2.5), (1, 1), (-0.3, 0.3)]):
        values = draws.strength[:, i].numpy()
        if low == high:
            assert (values == low).all()
        else:
            assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
            assert ks_2samp(values, theirs[:, i]).pvalue > 1e-3
    applied = (draws.order != 4).all(1)
    assert ((draws.order == 4).all(1) ^ applied).all()
    assert binomtest(int(applied.sum()), 20000, 0.7).pvalue > 1e-3
    orders, counts = np.unique(draws.order[applied].numpy(), axis=0, return_counts=True)
    assert (np.sort(orders) == np.arange(4)).all()
    assert len(orders) == 24
    assert chisquare(counts).pvalue > 1e-3


def test_color_jitter_without_hue_does_not_round():
    images = noise(20, 3, 8, 8)
    assert torch.equal(augment.color_jitter(images, generator(), 0, 0, 0, 0), images)
    assert not torch.equal(hue(images, torch.zeros(20)), images)


@pytest.mark.parametrize(
    "strengths", [(-0.1, 0, 0, 0), (0, -0.1, 0, 0), (0, 0, -0.1, 0), (0, 0, 0, -0.1), (0, 0, 0, 0.6)]
)
def test_color_jitter_refuses_strengths_that_make_no_sense(strengths):
    with pytest.raises(ValueError, match="must be >= 0"):
        augment.color_jitter(noise(2, 3, 4, 4), generator(), *strengths)


def test_random_affine_draws_as_torchvision():
    ranges = [[-20, 20], [0.1, 0.2], [0.5, 1.5], [-1, 2, 3, 5]]
    draws = augment.draw_affine(8000, 32, 50, generator(), 20, *ranges[1:])
    theirs = torchvision(lambda: np.hstack(transforms.RandomAffine.get_params(*ranges, [50, 32])), 4000)
    bounds = {"angle": (-20, 20), "scale": (0.5, 1.5), "shear_x": (-1, 2), "shear_y": (3, 5)}
    for (name, values), others in zip(draws._asdict().items(), np.transpose(theirs), strict=True):
        if name in bounds:
            low, high = bounds[name]
            assert kstest(values.numpy(), "uniform", (low, high - low)).pvalue > 1e-3
            assert ks_2samp(values.numpy(), others).pvalue > 1e-3
        else:  # whole pixels: +-5 of 50 to the right, +-6 of 32 down (6.4, rounded)
            reach = {"right": 5, "down": 6}[name]
            counts = [np.bincount(d.astype(int) + reach) for d in (values.numpy(), others)]
            assert len(counts[0]) == 2 * reach + 1
            assert chi2_contingency(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (8, 8, (0.08, 1), (3 / 4, 4 / 3)),
        (8, 8, (0.2, 1), (3 / 4, 4 / 3)),
        (6, 12, (0.5, 1), (1 / 2, 3)),
        (5, 9, (0.7, 1), (3 / 4, 4 / 3)),  # now and then no attempt fits
    ],
)
def test_random_resized_crop_draws_as_torchvision(height, width, scale, ratio):
    draws = augment.draw_resized_crop(20000, height, width, generator(), scale, ratio)
    image, crop = numbered(1, height, width), transforms.RandomResizedCrop
    theirs = torchvision(lambda: crop.get_params(image, scale, ratio), 4000)
    both = np.concatenate([torch.stack(draws, dim=1).numpy(), theirs])
    boxes, kind = np.unique(both, axis=0, return_inverse=True)
    parts = np.split(kind.ravel(), [20000])
    counts = np.stack([np.bincount(part, minlength=len(boxes)) for part in parts])
    rare = counts.sum(0) < 30  # together one cell: chi-square wants at least five in each
    counts = np.column_stack([counts[:, ~rare], counts[:, rare].sum(1)])
    assert counts.shape[1] >= 8
    assert chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize("flip", [True, False])
def test_simclr_view_mirrors_one_in_two_if_asked(flip):
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(3, 32, 32)
    out = augment.simclr_view(copies(ramp, 2000), generator(), flip=flip).int()
    mirrored = out[:, 0, :, 0].sum(1) > out[:, 0, :, -1].sum(1)
    assert binomtest(int(mirrored.sum()), 2000, 0.5 * flip).pvalue > 1e-3


def test_simclr_view_crops_then_jitters_four_in_five_and_makes_one_in_five_grey():
    ramp = torch.arange(0, 256, 8).expand(32, 32)
    images = copies(torch.stack([ramp, ramp.T, 255 - ramp]).to(torch.uint8), 3000)
    out = augment.simclr_view(images, generator())
    draws = augment.draw_resized_crop(3000, 32, 32, generator(), scale=(0.2, 1))
    assert (draws.height * draws.width).min() / 1024 == pytest.approx(0.2, abs=0.02)  # whole pixels
    # the crop is drawn first: those that were neither jittered nor made grey, 0.2 * 0.8 of all, show it
    apart = augment.apply_resized_crop(images, draws)
    plain = ((out == apart).flatten(1).all(1) | (out == apart.flip(3)).flatten(1).all(1)).sum()
    assert binomtest(int(plain), 3000, 0.16).pvalue > 1e-3
    grey = (out.amax(1) == out.amin(1)).flatten(1).all(1)
    assert binomtest(int(grey.sum()), 3000, 0.2).pvalue > 1e-3


def test_warm_up_view_jitters_then_crops_then_moves():
    images = noise(50, 3, 16, 16)
    white, seen = torch.full_like(images, 255), []
    out = augment.warm_up_view(images, generator(5), lambda batch, _: seen.append(batch) or white)
    draws = generator(5)
    assert torch.equal(seen[0], augment.color_jitter(images, draws, 0.4, 0.4, 0.4, 0.4))
    shear = (-0.1, 0.1, -0.1, 0.1)
    assert torch.equal(out, augment.random_affine(white, draws, 15, (0.1, 0.1), (2 / 3, 3 / 2), shear))
    assert set(out.unique().tolist()) == {0, 255}


OPERATIONS = {
    "random_crop": lambda images, g: augment.random_crop(images, 1, g),
    "crop_and_flip": augment.crop_and_flip,
    "color_jitter": augment.color_jitter,
    "random_affine": augment.random_affine,
    "random_grayscale": augment.random_grayscale,
    "resized_crop": lambda images, g: augment.apply_resized_crop(
        images, augment.draw_resized_crop(len(images), *images.shape[2:], g)
    ),
    "simclr_view": augment.simclr_view,
    "auto_augment": policies.auto_augment,
    "rand_augment": policies.rand_augment,
    "six_views": partial(policies.six_views, crop=augment.crop_and_flip),
    "weak_reference": partial(policies.six_views, crop=augment.crop_and_flip, weak_reference=True),
    "four_views": partial(policies.four_views, crop=augment.crop_and_flip),
    "warm_up_view": lambda images, g: augment.warm_up_view(images, g, augment.crop_and_flip),
}
every_operation = pytest.mark.parametrize("function", OPERATIONS.values(), ids=OPERATIONS.keys())


@every_operation
@both_modes
@all_sizes
@pytest.mark.parametrize("count", [0, 1, 9])
def test_shape_and_dtype_and_the_input_are_kept(function, channels, height, width, count):
    images = noise(9, channels, height, width)[:count]
    before = images.clone()
    out = function(images, generator())
    assert out.shape[-4:] == images.shape and out.dtype == torch.uint8
    assert torch.equal(images, before)
    assert count == 0 or out.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


@every_operation
def test_the_generator_alone_decides(function):
    images, before = noise(32, 3, 16, 16), torch.get_rng_state()
    first = function(images, generator(1))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, function(channels_last, generator(1)))
    assert not torch.equal(first, function(images, generator(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_resize_random_crop_and_flip_cuts_a_square_out_of_the_resized_image():
    image = noise(3, 3, 60, 90)[2]
    resized = v2.Resize(32, antialias=True)(image)
    assert resized.shape == (3, 32, 48)
    transform = augment.resize_random_crop_and_flip(32, 28)
    views = torch.stack(torchvision(lambda: transform(image), 2000))
    windows = resized.unfold(1, 28, 1).unfold(2, 28, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # 5 x 21 places
    assert different(views) == different(torch.cat([windows, windows.flip(3)]))


def test_resize_random_resized_crop_and_flip_cuts_a_part_out_of_the_resized_image():
    # channels-last in memory, as decoded
    image = noise(3, 60, 90, 3)[2].permute(2, 0, 1)
    transform = augment.resize_random_resized_crop_and_flip(32, 28)
    crop, flip, resized = v2.RandomResizedCrop(28), v2.RandomHorizontalFlip(), v2.Resize(32)(image)
    assert resized.shape == (3, 32, 48)
    expected = torchvision(lambda: flip(crop(resized)), 20)
    torch.testing.assert_close(torchvision(lambda: transform(image), 20), expected, rtol=0, atol=0)


def test_the_default_sizes_are_those_of_the_releases():
    resize, crop, flip = augment.resize_random_crop_and_flip().transforms
    assert (resize.size, crop.size, flip.p) == ([256], (224, 224), 0.5)
    resize, part = augment.resize_random_resized_crop_and_flip().transforms
    crop, flip = part.transforms[0].drawn, part.transforms[1]
    assert (resize.size, crop.size, flip.p) == ([320], (299, 299), 0.5)
    assert (crop.scale, crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert augment.random_resized_crop_and_flip().transforms[0].drawn.size == (224, 224)
