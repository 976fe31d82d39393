"""Image operations on batches against PIL's, image by image and bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from common.gpu import image_operations as operations
from tests.common.pil import image_by_image

SIZES = [(32, 32), (8, 8), (7, 13), (3, 3), (2, 9), (1, 5), (5, 1), (1, 1)]
every_kind = pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
every_size = pytest.mark.parametrize(("height", "width"), SIZES)
# ours and PIL's, with and without a factor
ENHANCING = {
    operations.brightness: ImageEnhance.Brightness,
    operations.color: ImageEnhance.Color,
    operations.contrast: ImageEnhance.Contrast,
    operations.sharpness: ImageEnhance.Sharpness,
}
PLAIN = {
    operations.luminance: lambda image: image.convert("L"),
    operations.autocontrast: ImageOps.autocontrast,
    operations.equalize: ImageOps.equalize,
    operations.invert: ImageOps.invert,
}


def random_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [count, channels, height, width]: noise, constant, black and white, low contrast, smooth, mostly of one value."""
    r = np.random.RandomState(seed)
    shape = (channels, height, width)
    y, x = np.mgrid[:height, :width]

    def one(kind: int) -> np.ndarray:
        if kind == 0:
            return r.randint(0, 256, shape)
        if kind == 1:
            return np.full(shape, r.choice([0, 1, 77, 128, 254, 255]))
        if kind == 2:
            return r.choice([0, 255], shape)
        if kind == 3:
            return r.randint(0, 200) + r.randint(0, r.randint(2, 56), shape)
        if kind == 4:
            slopes = r.normal(0, 200 / max(height, width), (2, channels, 1, 1))
            return (r.uniform(0, 256, (channels, 1, 1)) + slopes[0] * x + slopes[1] * y).clip(0, 255)
        return np.where(r.rand(*shape) < 0.15, r.randint(0, 256, shape), r.randint(0, 256))

    return torch.from_numpy(np.stack([one(i % 6) for i in range(count)]).astype(np.uint8))


def colour(image: Image.Image, value: int):
    return (value,) * 3 if image.mode == "RGB" else value


def transform(image: Image.Image, data, fill: int, resampling=Image.Resampling.NEAREST) -> Image.Image:
    data, fill = [float(value) for value in data], colour(image, fill)
    return image.transform(image.size, Image.Transform.AFFINE, data, resampling, fillcolor=fill)


def factors(count: int, seed: int = 1) -> Tensor:
    """Enhancing factors float64 [count]: those of the policies, 0 and 1, and random ones up to 3."""
    r = np.random.RandomState(seed)
    usual = [0, 1, *(1 + np.linspace(-0.9, 0.9, 19)), *(0.9 * np.arange(10) / 10 + 0.05)]
    return torch.from_numpy(np.where(r.rand(count) < 0.6, r.choice(usual, count), r.uniform(0, 3, count)))


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_luminance_refuses_other_numbers_of_channels(channels):
    with pytest.raises(ValueError, match=str(channels)):
        operations.luminance(torch.zeros(2, channels, 4, 4, dtype=torch.uint8))


@every_kind
@every_size
@pytest.mark.parametrize(("ours", "theirs"), ENHANCING.items())
def test_enhancing_is_pils(ours, theirs, channels, height, width):
    images, factor = random_images(180, channels, height, width), factors(180)
    expected = image_by_image(images, lambda image, i: theirs(image).enhance(factor[i].item()))
    assert torch.equal(ours(images, factor), expected)
    assert torch.equal(ours(images, factor.float()), expected)  # PIL itself computes in float32


@every_kind
@every_size
@pytest.mark.parametrize(("ours", "theirs"), PLAIN.items())
def test_operations_without_parameter_are_pils(ours, theirs, channels, height, width):
    images = random_images(240, channels, height, width)
    assert torch.equal(ours(images), image_by_image(images, lambda image, i: theirs(image)))


def test_equalize_of_a_channel_whose_highest_value_is_common_is_pils():
    """Then the rest is so little that values beyond 255 come out, and are cut off."""
    r = np.random.RandomState(0)
    shares = r.uniform(0, 0.8, (60, 1, 1, 1))
    images = np.where(r.rand(60, 3, 32, 32) < shares, 250, r.randint(0, 250, (60, 3, 32, 32)))
    images = torch.from_numpy(images.astype(np.uint8))
    expected = image_by_image(images, lambda image, i: ImageOps.equalize(image))
    assert torch.equal(operations.equalize(images), expected)
    assert not torch.equal(expected, images)


@every_kind
def test_posterize_is_pils(channels):
    images, bits = random_images(160, channels, 8, 8), torch.arange(1, 9).repeat(20)
    expected = image_by_image(images, lambda image, i: ImageOps.posterize(image, bits[i].item()))
    assert torch.equal(operations.posterize(images, bits), expected)


@every_kind
def test_solarize_is_pils(channels):
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for threshold in (torch.arange(0, 257), torch.linspace(256, 0, 10).double(), torch.rand(50) * 256):
        images = values.expand(len(threshold), channels, 16, 16)
        expected = image_by_image(images, lambda image, i: ImageOps.solarize(image, threshold[i].item()))  # noqa: B023
        assert torch.equal(operations.solarize(images, threshold), expected)


def matrices(kind: str, count: int, seed: int = 2) -> np.ndarray:
    r = np.random.RandomState(seed)
    matrix = r.normal(0, 1, (count, 6)) * [1, 1, 10, 1, 1, 10]
    if kind == "identity and a little":
        matrix = matrix * [0.1, 0.1, 0.2, 0.1, 0.1, 0.2] + [1, 0, 0, 0, 1, 0]
    if kind in ("scale", "round scale", "translation"):
        matrix[:, [1, 3]] = 0
    if kind == "translation":
        matrix[:, [0, 4]] = 1
        matrix[::2] = np.round(2 * matrix[::2]) / 2
    if kind in ("round", "round scale"):
        matrix = np.round(20 * matrix) / 20
    if kind == "far":
        matrix[:, [2, 5]] *= 100
    return matrix


@every_kind
@every_size
@pytest.mark.parametrize(
    "kind", ["any", "identity and a little", "scale", "round scale", "translation", "round", "far"]
)
def test_affine_nearest_is_pils(kind, channels, height, width):
    images, matrix = random_images(120, channels, height, width), matrices(kind, 120)
    expected = image_by_image(images, lambda image, i: transform(image, matrix[i], 128))
    assert torch.equal(operations.affine_nearest(images, torch.from_numpy(matrix), fill=128), expected)


def test_affine_nearest_adds_up_as_pil_where_rounding_decides():
    """Steps of a tenth onto whole numbers: 0.1 * 10 is 1, ten times 0.1 added up is less."""
    images = random_images(100, 1, 32, 32)
    scale = np.arange(1, 101) / 10
    matrix = np.zeros((100, 6))
    matrix[:, 0], matrix[:, 4] = scale, scale[::-1]
    matrix[:, 2], matrix[:, 5] = -scale / 2, -scale[::-1] / 2  # the first pixel's centre comes from 0
    expected = image_by_image(images, lambda image, i: transform(image, matrix[i], 0))
    assert torch.equal(operations.affine_nearest(images, torch.from_numpy(matrix)), expected)


@every_kind
@every_size
def test_rotation_is_pils(channels, height, width):
    degrees = np.concatenate([np.arange(-390, 400, 15), np.linspace(0, 30, 10), np.linspace(-200, 200, 60)])
    images = random_images(len(degrees), channels, height, width)
    expected = image_by_image(images, lambda image, i: image.rotate(degrees[i], fillcolor=colour(image, 9)))
    matrix = operations.rotation(torch.from_numpy(degrees), height, width)
    assert torch.equal(operations.affine_nearest(images, matrix, fill=9), expected)


@every_kind
@every_size
def test_shear_bicubic_is_pils(channels, height, width):
    r = np.random.RandomState(3)
    amounts = np.concatenate([np.linspace(-0.3, 0.3, 19), np.linspace(-2, 2, 41), r.uniform(-0.5, 0.5, 60)])
    amounts = np.concatenate([amounts, amounts])
    down = np.arange(len(amounts)) < len(amounts) // 2
    images = random_images(len(amounts), channels, height, width)

    def sheared(image, i):
        data = (1, 0, 0, amounts[i], 1, 0) if down[i] else (1, amounts[i], 0, 0, 1, 0)
        return transform(image, data, 128, Image.Resampling.BICUBIC)

    right, below = (torch.from_numpy(amounts * which) for which in (~down, down))
    ours = operations.shear_bicubic(images, right, below, 128)
    assert torch.equal(ours, image_by_image(images, sheared))


# each with parameters [B] or [B, 6], drawn for B images
OPERATIONS = {
    **dict.fromkeys(PLAIN, lambda r, b: ()),
    **dict.fromkeys(ENHANCING, lambda r, b: (r.uniform(0, 2, b),)),
    operations.posterize: lambda r, b: (r.randint(1, 9, b),),
    operations.solarize: lambda r, b: (r.uniform(0, 256, b),),
    operations.affine_nearest: lambda r, b: (r.normal(0, 1, (b, 6)),),
    operations.shear_bicubic: lambda r, b: (r.uniform(-0.3, 0.3, b), np.zeros(b)),
}


@pytest.mark.parametrize(("function", "draw"), OPERATIONS.items())
@every_kind
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (7, 13), (1, 6), (6, 1)])
@pytest.mark.parametrize("count", [0, 5])
def test_shape_and_dtype_are_kept_and_the_input_left_alone(function, draw, channels, size, count):
    images = random_images(5, channels, *size)[:count]
    before = images.clone()
    result = function(images, *map(torch.from_numpy, draw(np.random.RandomState(4), count)))
    assert result.shape == (count, 1 if function is operations.luminance else channels, *size)
    assert result.dtype == torch.uint8
    assert torch.equal(images, before)
