"""AutoAugment and RandAugment on batches against a plain PIL pipeline and the release's results; the draws; two papers' views."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy.stats import binomtest, chisquare, kstest
from torch import Generator, Tensor

from common.gpu import policies
from common.gpu.policies import AutoAugmentDraws, RandAugmentDraws
from tests.common.pil import image_by_image

every_kind = pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
every_size = pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (7, 13)])


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def images_of(count: int, channels: int, height: int, width: int) -> Tensor:
    """uint8 [count, channels, height, width]: half noise, half smooth and of little contrast."""
    r = np.random.RandomState(0)
    noise = r.randint(0, 256, (count, channels, height, width))
    ramps = np.linspace(30, 180, height)[:, None] + r.randint(0, 40, (count, channels, 1, width))
    return torch.from_numpy(np.where(r.rand(count, 1, 1, 1) < 0.5, noise, ramps).astype(np.uint8))


def from_hwc(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3)


@pytest.mark.parametrize(
    ("kind", "policy", "index"),
    [("autoaugment_ops", "AUTO", "magnitude_index"), ("randaugment_ops", "RAND", "levels")],
)
def test_every_operation_is_the_releases(golden, kind, policy, index):
    operations = getattr(policies, f"{policy}_AUGMENT_OPERATIONS")
    magnitudes = getattr(policies, f"{policy}_AUGMENT_MAGNITUDES")
    for case in golden("sanm", kind):
        assert sorted(operations) == sorted(case["ops"].tolist())
        image = from_hwc(case["image"])
        for i, name in enumerate(case["ops"].tolist()):
            amounts = np.asarray(magnitudes.get(name, np.zeros(10)), dtype=np.float64)[case[index]]
            if "magnitude" in case.arrays:
                assert amounts.tolist() == case["magnitude"][i].tolist()
            for s, sign in enumerate((1.0, -1.0)):
                batch = image.expand(len(amounts), -1, -1, -1)
                chosen = [(operations, name, amount, sign) for amount in amounts]
                made = policies.make_operations(chosen, batch.shape[1:], batch.device)
                ours = made.apply(batch, np.arange(len(chosen))[None])
                assert torch.equal(ours, from_hwc(case["outputs"][i, :, s])), (case.name, name, sign)


def test_auto_augment_is_the_releases(golden):
    for case in golden("sanm", "autoaugment_call"):
        draws = AutoAugmentDraws(*(torch.from_numpy(case[name]) for name in AutoAugmentDraws._fields))
        ours = policies.apply_auto_augment(from_hwc(case["images"]), draws)
        assert torch.equal(ours, from_hwc(case["outputs"])), case.name


def test_rand_augment_is_the_releases(golden):
    for case in golden("sanm", "randaugment_call"):
        assert case.description["ops"] == list(policies.RAND_AUGMENT_OPERATIONS)
        fields = ("op_index", "level", "applied", "negated", "cutout_centre")
        draws = RandAugmentDraws(*(torch.from_numpy(case[name]) for name in fields))
        ours = policies.apply_rand_augment(from_hwc(case["images"]), draws, side=16)
        assert torch.equal(ours, from_hwc(case["outputs"])), case.name


def test_cutout_is_the_releases(golden):
    for case in golden("sanm", "cutout"):
        images = from_hwc(case["image"]).expand(len(case["centres"]), -1, -1, -1)
        ours = policies.cutout(images, torch.from_numpy(case["centres"]))
        assert torch.equal(ours, from_hwc(case["outputs"])), case.name


def pil_affine(image, data, resampling, fill):
    colour = (fill,) * 3 if image.mode == "RGB" else fill
    return image.transform(image.size, Image.Transform.AFFINE, data, resampling, fillcolor=colour)


def pil_operation(image: Image.Image, name: str, amount: float, fill: int) -> Image.Image:
    """One operation as the releases have it: AutoAugment fills with 128, RandAugment with 0."""
    nearest, bicubic = Image.Resampling.NEAREST, Image.Resampling.BICUBIC

    def rotated() -> Image.Image:
        if fill == 0:
            return image.rotate(amount)
        turned = image.convert("RGBA").rotate(amount)  # laid on grey
        return Image.composite(turned, Image.new("RGBA", image.size, (fill,) * 4), turned).convert(image.mode)

    operations = {
        "identity": lambda: image,
        "shearx": lambda: pil_affine(image, (1, amount, 0, 0, 1, 0), bicubic if fill else nearest, fill),
        "sheary": lambda: pil_affine(image, (1, 0, 0, amount, 1, 0), bicubic if fill else nearest, fill),
        "translatex": lambda: pil_affine(image, (1, 0, amount, 0, 1, 0), nearest, fill),
        "translatey": lambda: pil_affine(image, (1, 0, 0, 0, 1, amount), nearest, fill),
        "rotate": rotated,
        "posterize": lambda: ImageOps.posterize(image, amount),
        "solarize": lambda: ImageOps.solarize(image, amount),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }
    name = name.lower()
    return operations.get(name, lambda: getattr(ImageEnhance, name.capitalize())(image).enhance(amount))()


def pil_auto_augment(image: Image.Image, name: str, index: int, sign: int) -> Image.Image:
    amounts = {"shearX": sign * 0.3 * index / 9, "shearY": sign * 0.3 * index / 9, "rotate": 30 * index / 9}
    shift = sign * 150 / 331 * index / 9
    amounts |= {"translateX": shift * image.width, "translateY": shift * image.height}
    amounts |= {"posterize": 8 - index // 2, "solarize": 256 - 256 * index / 9}
    return pil_operation(image, name, amounts.get(name, 1 + sign * 0.9 * index / 9), fill=128)


def pil_rand_augment(image: Image.Image, name: str, level: int, sign: int) -> Image.Image:
    share = sign * 0.3 * level / 10
    amounts = {"ShearX": share, "ShearY": share, "Rotate": sign * int(30 * level / 10)}
    amounts |= {"TranslateX": int(share * image.width), "TranslateY": int(share * image.height)}
    amounts |= {"Posterize": int(4 * level / 10) + 4, "Solarize": 256 - int(256 * level / 10)}
    return pil_operation(image, name, amounts.get(name, 0.9 * level / 10 + 0.05), fill=0)


def pil_cutout(image: Image.Image, centre: tuple[float, float], side: int, fill: int = 127) -> Image.Image:
    left, top = (int(max(0, c - side / 2)) for c in centre)
    right, bottom = int(min(image.width, left + side)), int(min(image.height, top + side))
    image = image.copy()
    colour = (fill,) * 3 if image.mode == "RGB" else fill
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), colour)
    return image


@every_kind
@every_size
def test_auto_augment_is_pils_for_every_sub_policy_sign_and_choice(channels, height, width):
    cases = torch.cartesian_prod(torch.arange(25), *[torch.tensor([0, 1])] * 4)
    draws = AutoAugmentDraws(cases[:, 0], cases[:, 1:3].bool(), 2 * cases[:, 3:] - 1)

    def augmented(image, i):
        sub_policy = policies.CIFAR10_POLICY[draws.sub_policy[i]]
        for (name, _, index), applied, sign in zip(sub_policy, draws.applied[i], draws.sign[i], strict=True):
            if applied:
                image = pil_auto_augment(image, name, index, sign.item())
        return image

    images = images_of(len(cases), channels, height, width)
    ours = policies.apply_auto_augment(images, draws)
    assert torch.equal(ours, image_by_image(images, augmented))


@every_kind
@every_size
@pytest.mark.parametrize("n", [1, 2, 3])
def test_rand_augment_is_pils(channels, height, width, n):
    images = images_of(400, channels, height, width)
    draws = policies.draw_rand_augment(400, height, width, generator(1), n=n)
    names = list(policies.RAND_AUGMENT_OPERATIONS)

    def augmented(image, i):
        for j in range(n):
            if draws.applied[i, j]:
                sign = -1 if draws.negated[i, j] else 1
                image = pil_rand_augment(image, names[draws.operation[i, j]], draws.level[i, j].item(), sign)
        return pil_cutout(image, draws.cutout_centre[i].tolist(), side=height // 2)

    assert torch.equal(policies.apply_rand_augment(images, draws), image_by_image(images, augmented))


@every_kind
@every_size
@pytest.mark.parametrize("side", [0, 3, 4, 16, 40])
def test_cutout_is_pils_rectangle(channels, height, width, side):
    images = images_of(200, channels, height, width)
    centres = torch.rand(200, 2, generator=generator(), dtype=torch.float64) * torch.tensor([width, height])
    centres[::4] = centres[::4].floor()
    expected = image_by_image(images, lambda image, i: pil_cutout(image, centres[i].tolist(), side, 99))
    assert torch.equal(policies.cutout(images, centres, side, fill=99), expected)


def test_auto_augment_draws_sub_policies_signs_and_choices_as_the_policy_says():
    draws = policies.draw_auto_augment(20000, generator())
    assert chisquare(draws.sub_policy.bincount(minlength=25)).pvalue > 1e-3
    assert draws.sign.unique().tolist() == [-1, 1]
    assert chisquare(np.bincount((draws.sign > 0).long() @ torch.tensor([1, 2]))).pvalue > 1e-3
    for i, pair in enumerate(policies.CIFAR10_POLICY):
        applied = draws.applied[draws.sub_policy == i]
        (_, p, _), (_, q, _) = pair
        # together: the two are independent of each other
        expected = len(applied) * np.array([(1 - p) * (1 - q), p * (1 - q), (1 - p) * q, p * q])
        observed = np.bincount(applied.long() @ torch.tensor([1, 2]), minlength=4)
        assert (observed[expected == 0] == 0).all()
        assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.mark.parametrize("m", [2, 5, 10])
def test_rand_augment_draws_uniformly(m):
    draws = policies.draw_rand_augment(10000, 20, 50, generator(), n=3, m=m)
    assert chisquare(draws.operation.flatten().bincount(minlength=14)).pvalue > 1e-3
    assert draws.level.unique().tolist() == list(range(1, m))
    if m > 2:
        assert chisquare(draws.level.flatten().bincount()[1:]).pvalue > 1e-3
    for coin in (draws.applied, draws.negated):
        assert coin.shape == (10000, 3)
        assert chisquare(np.bincount(coin.long() @ torch.tensor([1, 2, 4]), minlength=8)).pvalue > 1e-3
    assert binomtest(int((draws.applied == draws.negated).sum()), 30000, 0.5).pvalue > 1e-3
    repeated = draws.operation[:, 0] == draws.operation[:, 1]  # with replacement
    assert binomtest(int(repeated.sum()), 10000, 1 / 14).pvalue > 1e-3
    assert draws.cutout_centre.dtype == torch.float64
    for column, length in zip(draws.cutout_centre.T, (50, 20), strict=True):
        assert kstest(column.numpy(), "uniform", (0, length)).pvalue > 1e-3


@pytest.mark.parametrize(("n", "m"), [(0, 10), (-1, 10), (2, 1), (2, 11)])
def test_rand_augment_refuses_what_its_tables_do_not_have(n, m):
    with pytest.raises(ValueError, match=f"got {n if n < 1 else m}$"):
        policies.draw_rand_augment(4, 8, 8, generator(), n=n, m=m)


@pytest.mark.parametrize("augmentation", [policies.auto_augment, policies.rand_augment], ids=["auto", "rand"])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(3, torch.float32), (2, torch.uint8), (3, torch.int64)], ids=str
)
def test_other_batches_are_refused(augmentation, channels, dtype):
    with pytest.raises(ValueError, match="images must be uint8"):
        augmentation(torch.zeros(4, channels, 8, 8, dtype=dtype), generator())


def test_draws_for_another_batch_are_refused():
    images = images_of(5, 3, 8, 8)
    with pytest.raises(ValueError, match="5 images, but draws for 4"):
        policies.apply_auto_augment(images, policies.draw_auto_augment(4, generator()))
    with pytest.raises(ValueError, match="5 images, but draws for 6"):
        policies.apply_rand_augment(images, policies.draw_rand_augment(6, 8, 8, generator()))


@pytest.mark.parametrize("weak_reference", [False, True])
def test_the_third_and_fourth_view_are_rand_augment_the_others_are_not(weak_reference):
    # of a constant image AutoAugment makes no 127, and each cutout is full of it
    images = torch.arange(10, 20, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 32, 32)
    views = policies.six_views(images, generator(), lambda batch, _: batch, weak_reference)
    cut = (views == 127).flatten(2).any(2)
    assert cut.tolist() == [[view in (2, 3)] * 10 for view in range(6)]


@pytest.mark.parametrize(
    ("make", "views", "plain", "least"),
    [
        (policies.six_views, 6, [], 4),
        (partial(policies.six_views, weak_reference=True), 6, [4, 5], 18),
        (policies.four_views, 4, [0, 1], 17),
    ],
    ids=["six", "weak reference", "four"],
)
def test_the_crop_is_applied_once_to_all_views_and_keeps_each_image_in_its_row(make, views, plain, least):
    seen = []

    def crop(batch: Tensor, random: Generator) -> Tensor:
        seen.append((batch, random))
        return batch + 100

    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 3, 16, 16).clone()
    images[:, :, 0] = 60  # so that the histogram operations keep some order
    g = generator()
    made = make(images, g, crop)
    ((batch, random),) = seen
    assert random is g and torch.equal(batch, images.repeat(views, 1, 1, 1))
    # many of the images of a view are untouched but for the crop, and then stand in the row of their own
    untouched = torch.stack([(view == images + 100).flatten(1).all(1) for view in made])
    foreign = (made[:, :, None] == (images + 100)[None, None]).flatten(3).all(3)  # [views, 8, 8]
    assert [view for view in range(views) if untouched[view].all()] == plain and untouched.sum() >= least
    assert torch.equal(foreign.diagonal(dim1=1, dim2=2), untouched)
    assert foreign.sum() == untouched.sum()


def test_the_first_two_views_are_cropped_and_the_others_auto_augment():
    images = images_of(64, 3, 32, 32)
    views = policies.four_views(images, generator(), lambda batch, _: batch)
    assert views.shape == (4, *images.shape)
    assert torch.equal(views[:2], images.expand(2, -1, -1, -1, -1))
    assert torch.equal(views[2:].flatten(0, 1), policies.auto_augment(images.repeat(2, 1, 1, 1), generator()))
