"""The flags of the table of all methods follow from the methods' presets by the rule that stands in benchmarks/cross.toml."""

import math
import tomllib
from argparse import Namespace
from fractions import Fraction
from functools import cache

import pytest

import afm.train
import manifold_dividemix.pretrain
import manifold_dividemix.train_semisup
import me_momentum.main
import sanm.Train_cifar
import sfa.Train_cifar
from benchmarks import cross
from common import noise

DESCRIPTION = tomllib.loads(cross.DESCRIPTION.read_text(encoding="utf-8"))
DATA = [name for name in DESCRIPTION if name != "settings"]
IMAGES = {"digits": 1437, "mnist": 60000, "cifar10": 50000, "cifar100": 50000}  # of the training sets
SCRIPTS = {
    "ce": afm.train,
    "afm": afm.train,
    "sfa": sfa.Train_cifar,
    "me_momentum": me_momentum.main,
    "sanm": sanm.Train_cifar,
    "pretrain": manifold_dividemix.pretrain,
    "manifold_dividemix": manifold_dividemix.train_semisup,
}
SPLITTING = ("sfa", "sanm", "manifold_dividemix")
# what is trained on, and where it is written; of the backbone see test_cross.py
DATA_FLAGS = {"dataset", "data_path", "noise_type", "noise_mode", "noise_rate", "noise_ratio", "r"}
DATA_FLAGS |= {"imb_type", "imb_factor", "ood_ratio", "corruption"}
OTHER_FLAGS = {"preset", "limit_train", "seed", "out", "network", "arch", "pretrained", "knn_every"}
EXCEPTIONS = {
    ("digits", "pretrain"): {"knn_k": 10},
    ("digits", "manifold_dividemix"): {"knn_k": 10},  # by data set and method: not the preset's
    ("digits", "me_momentum"): {"data_percent": 0.8},
    ("mnist", "sanm"): {"warm_up_views": "weak"},
}


@cache
def preset_of(data: str, method: str) -> Namespace:
    """A method's preset for a data set as its script understands it."""
    return SCRIPTS[method].parse_args(["--preset", DESCRIPTION[data]["presets"][method]])


def nearest(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def images_in(data: str, imb_factor: float | None) -> int:
    """Training images of a data set, or of its long tail."""
    if imb_factor is None:
        return IMAGES[data]
    return int(noise.class_counts(IMAGES[data], 10, "exp", imb_factor).sum())


def warm_up_of(method: str, args: Namespace) -> tuple[int, int, int]:
    """Epochs, those of warm-up, and the batch size of the warm-up."""
    if method == "manifold_dividemix":
        return args.epochs, args.warmup_epoch, args.batch_size
    return args.num_epochs + (method == "sanm"), args.warm_up, 2 * args.batch_size  # SANM counts from 0


def shortest(data: str) -> int:
    """The steps of the shortest warm-up of the presets."""
    found = []
    for method in SPLITTING:
        args = preset_of(data, method)
        _, epochs, batch = warm_up_of(method, args)
        whole = images_in(args.dataset, args.imb_factor if method == "sfa" else None)
        found.append(epochs * math.ceil((args.limit_train or whole) / batch))
    return min(found)


def warm_up(data: str, method: str, epochs: int, images: int) -> int:
    """Epochs of warm-up of a method that has so many epochs and so many images."""
    args = preset_of(data, method)
    whole, own, batch = warm_up_of(method, args)
    share = nearest(Fraction(own * epochs, whole))
    like_the_preset = images_in(data, args.imb_factor if method == "sfa" else None)
    steps = max(share * math.ceil(like_the_preset / batch), shortest(data))
    return min(epochs // 2, max(share, math.ceil(steps / math.ceil(images / batch))))


def schedule(data: str, method: str, images: int) -> dict:
    """The flags of a method that its schedule decides, on so many images."""
    args, epochs = preset_of(data, method), DESCRIPTION[data]["epochs"]
    if method in ("ce", "afm"):
        drops = [nearest(Fraction(drop * epochs, args.num_epochs)) for drop in args.schedule]
        return {"num_epochs": epochs, "schedule": drops}
    if method == "me_momentum":
        return {"num_epochs": epochs // 4, "max_inner_loop": 4, "max_outer_loop": 1}
    if method in ("sfa", "sanm"):
        whole, own, _ = warm_up_of(method, args)
        first = warm_up(data, method, epochs, images)
        drop = first + nearest(Fraction((args.lr_drop - own) * (epochs - first), whole - own))
        return {"num_epochs": epochs - (method == "sanm"), "warm_up": first, "lr_drop": drop}
    encoder, training = preset_of(data, "pretrain").epochs, preset_of(data, "manifold_dividemix")
    before = nearest(Fraction(encoder * epochs, encoder + training.epochs))
    if method == "pretrain":
        return {"num_epochs": before, "epochs": before}
    rest = epochs - before
    interval = max(1, nearest(Fraction(training.interval * rest, training.epochs)))
    first = warm_up(data, method, rest, images)
    return {"num_epochs": rest, "epochs": rest, "warmup_epoch": first, "interval": interval}


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("data", DATA)
def test_every_flag_is_the_presets_with_its_schedule_shortened_by_the_rule(data, method):
    for setting in cross.settings_of(data, None, DESCRIPTION):
        flags = cross.flags_in(setting, DESCRIPTION[data])[method]
        given = SCRIPTS[method].parse_args(["--dataset", data, *flags.split()])
        expected = vars(preset_of(data, method)) | schedule(data, method, images_in(data, setting.imb_factor))
        expected |= EXCEPTIONS.get((data, method), {})
        names = (vars(given).keys() | expected.keys()) - DATA_FLAGS - OTHER_FLAGS
        differing = {n: (vars(given).get(n), expected.get(n)) for n in names}
        assert {n: pair for n, pair in differing.items() if pair[0] != pair[1]} == {}, setting.name


@pytest.mark.parametrize("data", DATA)
def test_only_a_setting_with_fewer_images_changes_flags_and_they_are_those_of_the_warm_up(data):
    long_tails = {s.name for s in cross.settings_of(data, None, DESCRIPTION) if s.imb_factor is not None}
    more = DESCRIPTION[data].get("more", {})
    assert set(more) == long_tails
    for flags in more.values():
        assert set(flags) == set(SPLITTING)
        names = {word for words in flags.values() for word in words.split() if word.startswith("--")}
        assert names <= {"--warm_up", "--lr_drop", "--warmup-epoch"}


def test_the_steps_that_the_rule_names():
    assert {data: shortest(data) for data in DATA} == {"digits": 75, "mnist": 2910, "cifar10": 2910}
    text = cross.DESCRIPTION.read_text(encoding="utf-8")
    assert "75 on digits, 2910 on MNIST and CIFAR-10" in text
