"""Train_clothing1M.py and clothing.py: flags, what is refused, lists, subsets, label quality, divisions, masks, best weights."""

import argparse
import csv
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.models import resnet18

from common import datasets
from common.datasets.file_lists import make_split
from common.datasets.image_cache import build_caches
from common.gpu.device import Device
from common.runs import cli
from common.runs.cli import UserError
from sanm import Train_clothing1M, clothing, networks
from sanm.clothing import balanced_subset, subset_size
from sanm.networks import MaskedNetwork, Outputs, clothing_network
from sanm.selection import clean_probability, normalised
from sanm.Train_clothing1M import (
    Data,
    Division,
    Setting,
    cell,
    co_divide,
    directory_name,
    label_quality,
    make_parser,
    method,
    parse_args,
)
from tests.common.small_file_data import make_clothing1m, plant, write_lines

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

CPU = Device(torch.device("cpu"), "fp32", "tests")

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--data_path",), "./Dataset/noise_label_data/Clothing1M"),
    (("--num_batches",), 15625),
    (("--num_class",), 14),
    (("--image_size",), 224),
    (("--on_bad_image",), "error"),
    (("--image_cache",), None),
    (("--workers",), 5),
    (("--id",), "clothing1m"),
    (("--network",), "resnet50"),
    (("--pretrained",), "imagenet"),
    (("--batch_size",), 8),
    (("--lr", "--learning_rate"), 0.0009),
    (("--lr_drop",), 40),
    (("--num_epochs",), 80),
    (("--alpha",), 0.5),
    (("--lambda_u",), 0),
    (("--T",), 0.5),
    (("--p_threshold",), 0.5),
    (("--sync_bn", "--no-sync_bn"), None),
    (("--gpuid",), 0),
    (("--masking",), "adversarial"),
    (("--mask-lo",), 0.06),
    (("--mask-hi",), 0.13),
    (("--mask-quality",), 0.1),
    (("--mask-anchor",), None),
    (("--clamp-targets",), False),
    (("--recon-weight",), 0.3),
    (("--out",), None),
    (("--seed",), 123),
    (("--device",), "auto"),
    (("--precision",), "auto"),
    (("--compile",), False),
    (("--fidelity",), "paper"),
    (("--preset",), None),
    (("--noise_file",), None),
    (("-r", "--resume"), "auto"),
    (("--limit_train",), None),
    (("--limit_test",), None),
    (("--full_test_at_end",), False),
]

# the release's flags: option, default, a typed value and what it is read as. Not here: --data_path, which it ignores
RELEASED = [
    ("--batch_size", 8, "16", 16),
    ("--lr", 0.0009, "0.1", 0.1),
    ("--learning_rate", 0.0009, "0.1", 0.1),
    ("--alpha", 0.5, "4", 4.0),
    ("--lambda_u", 0, "25", 25.0),
    ("--p_threshold", 0.5, "0.6", 0.6),
    ("--T", 0.5, "0.3", 0.3),
    ("--num_epochs", 80, "3", 3),
    ("--id", "clothing1m", "x", "x"),
    ("--seed", 123, "7", 7),  # untyped in the release
    ("--gpuid", 0, "1", 1),
    ("--num_class", 14, "14", 14),
    ("--num_batches", 15625, "9", 9),
]


# the command line -----------------------------------------------------------------------------------------------------


def actions() -> list:
    return make_parser()._actions


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[-1])
def test_every_flag_has_a_help_line(action):
    assert action.help and action.help.strip() and "\n" not in action.help


def test_flags_and_defaults_are_the_frozen_ones():
    assert [(tuple(action.option_strings), action.default) for action in actions()] == FLAGS


@pytest.mark.parametrize(("option", "default", "text", "value"), RELEASED)
def test_the_released_flags_keep_their_names_defaults_and_types(option, default, text, value):
    [name] = [action.dest for action in actions() if option in action.option_strings]
    assert getattr(parse_args([]), name) == default
    found = getattr(parse_args([option, text]), name)
    assert found == value
    assert type(found) is type(value)


def test_help_exits_0_and_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [option for action in actions() for option in action.option_strings if option not in text] == []


def test_the_released_statistics_are_those_of_each_process():
    assert parse_args([]).sync_bn is True
    assert parse_args(["--fidelity", "released"]).sync_bn is False
    assert parse_args(["--fidelity", "released", "--sync_bn"]).sync_bn is True
    assert parse_args(["--no-sync_bn"]).sync_bn is False


def test_the_run_directory_is_named_after_what_differs():
    assert directory_name(parse_args([])) == "clothing1m-seed_123"
    args = parse_args(["--fidelity", "released", "--T", "0.4", "--seed", "3"])
    assert directory_name(args) == "clothing1m-fidelity_released-seed_3-T_0.4"
    assert directory_name(parse_args(["--masking", "none"])) == "clothing1m-seed_123-masking_none"
    assert method(parse_args(["--masking", "none"])) == "DivideMix"
    assert method(parse_args([])) == "SANM(DivideMix)"


def test_the_profile_is_that_of_the_paper_only_where_nothing_is_shortened():
    assert cell(parse_args([]))["profile"] == "paper"
    assert cell(parse_args(["--masking", "none", "--T", "0.4"]))["profile"] == "paper"
    for words in ("--num_epochs 79", "--num_batches 15624", "--image_size 223", "--network resnet18"):
        assert cell(parse_args(words.split()))["profile"] == "short", words
    assert cell(parse_args(["--noise_file", "a/own.npy"]))["noise_type"] == "own.npy"


# what is refused --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> Path:
    """Clothing1M of 12 noisy images of three classes; two validation and two test images of each."""
    make_clothing1m(tmp_path / "data")
    return tmp_path / "data"


QUICK = (
    "--network resnet18 --pretrained none --image_size 64 --batch_size 2 --num_batches 42 --num_epochs 1 --device cpu "
    "--workers 0"
)


def refused(argv: list[str], capsys) -> str:
    """The one line that the script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(Train_clothing1M.main, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--num_class 10", "--num_class: Clothing1M has 14 classes, got 10"),
        ("--image_size 63", "--image_size: must be at least 64, got 63"),
        ("--image_size 0", "--image_size: .*got 0"),
        ("--mask-lo 0.2", "--mask-lo: must be at most --mask-hi 0.13, got 0.2"),
        ("--mask-hi 0.05", "--mask-lo: must be at most --mask-hi 0.05, got 0.06"),
        ("--mask-hi 1.1", "--mask-hi.*: must be between 0 and 1, got 1.1"),
        ("--mask-quality -0.1", "--mask-quality.*: must be between 0 and 1, got -0.1"),
        ("--mask-anchor middle", "--mask-anchor.*middle.*choose from .*corner.*centre"),
        ("--masking some", "--masking: .*some.*choose from .*adversarial.*none"),
        ("--recon-weight -1", "--recon-weight.*: must be >= 0, got -1"),
        ("--lr 0", "--lr.*: must be > 0, got 0"),
        ("--lr inf", "--lr.*: .*got inf"),
        ("--lr_drop 0", "--lr_drop: must be at least 1, got 0"),
        ("--T 0", "--T: must be > 0, got 0"),
        ("--alpha 0", "--alpha: must be > 0, got 0"),
        ("--lambda_u -1", "--lambda_u: must be >= 0, got -1"),
        ("--p_threshold 1.5", "--p_threshold: must be between 0 and 1, got 1.5"),
        ("--num_epochs 0", "--num_epochs: must be at least 1, got 0"),
        ("--num_batches 0", "--num_batches: must be at least 1, got 0"),
        ("--batch_size 0", "--batch_size: must be at least 1, got 0"),
        ("--workers -1", "--workers: must be >= 0, got -1"),
        ("--network resnet34", "--network: .*resnet34.*choose from .*resnet50.*resnet18"),
        ("--on_bad_image guess", "--on_bad_image: .*guess.*choose from .*error.*skip"),
        ("--seed -1", "--seed: .*got -1"),
        ("--fidelity both", "--fidelity: .*both.*choose from .*paper.*released"),
        ("--preset nosuch", "preset nosuch: choose from "),
        ("--preset embedded/digits/simclr", "preset embedded/digits/simclr is for pretrain.py, not for Train_clothing1M.py"),
        ("--mask 0.1", "unrecognized arguments: --mask 0.1"),
        # what only the data tell
        ("--data_path nosuch", r"clothing1m not found in .*; looked in .*nosuch for noisy_label_kv.txt.*; get it from"),
        ("--batch_size 7", "--batch_size 7: the class-balanced subset has only 12 images.*use a smaller batch"),
        ("--num_batches 1", "--batch_size 2: the class-balanced subset has only 2 images.*more --num_batches"),
        ("--limit_train 3", "--batch_size 2: the class-balanced subset has only 3 images.*or more images"),
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--image_cache nosuch", "no image cache in nosuch"),
        ("--pretrained nosuch.pt", "--pretrained nosuch.pt: no such file"),
        ("--pretrained data/clean_val_key_list.txt", r"--pretrained data/clean_val_key_list.txt: damaged"),
        ("--gpuid 99 --device cuda", "--device cuda: there is no CUDA device 99"),
    ],
)  # fmt: skip
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(words, line, root, capsys, monkeypatch):
    monkeypatch.chdir(root.parent)
    before = sorted(root.parent.rglob("*"))
    found = refused(f"{QUICK} --data_path data --out run {words}".split(), capsys)
    assert re.search(line, found), found
    assert sorted(root.parent.rglob("*")) == before


def test_a_missing_image_is_refused_before_anything_is_written(root, capsys):
    key = (root / "clean_val_key_list.txt").read_text().split()[3]
    plant(root / key, "missing")
    before = sorted(root.parent.rglob("*"))
    found = refused([*QUICK.split(), "--data_path", str(root), "--out", str(root.parent / "run")], capsys)
    assert "image 3 of the validation list" in found and "or use --on_bad_image skip" in found
    assert sorted(root.parent.rglob("*")) == before


def test_a_damaged_image_ends_the_run_without_a_result_or_is_left_out(root, capsys, monkeypatch):
    monkeypatch.setattr(Train_clothing1M, "clothing_network", small_network)
    key = (root / "noisy_train_key_list.txt").read_text().split()[5]
    plant(root / key, "truncated")
    argv = [*QUICK.split(), "--data_path", str(root), "--out"]
    found = refused([*argv, str(root.parent / "stopped")], capsys)
    assert "of the train list" in found and key in found and "is damaged (" in found
    assert "use --on_bad_image skip" in found
    assert not (root.parent / "stopped" / "result.json").exists()
    run = root.parent / "run"
    Train_clothing1M.main([*argv, str(run), "--on_bad_image", "skip"])
    skipped = table(run / "skipped_images.csv")
    assert [(row["path"], row["position"]) for row in skipped] == [(str(root / key), "5")]
    assert np.load(run / "train_index.npy").tolist() == [i for i in range(12) if i != 5]


# the lists ---------------------------------------------------------------------------------------------------------------


def released_layout(root: Path) -> None:
    """The release's lists in place of the official ones."""
    pairs = {"noisy_train.txt": "noisy", "clean_val.txt": "clean", "clean_test.txt": "clean"}
    labels = {}
    for kind in ("noisy", "clean"):
        lines = (root / f"{kind}_label_kv.txt").read_text().splitlines()
        labels[kind] = dict(line.rsplit(" ", 1) for line in lines)
    for file, kind in pairs.items():
        keys = (root / file.replace(".txt", "_key_list.txt")).read_text().split()
        write_lines(root / file, [f"{key} {labels[kind][key]}" for key in keys])
    for path in (*root.glob("*_key_list.txt"), *root.glob("*_kv.txt")):
        path.unlink()


def splits_of(data) -> list[tuple]:
    return [
        (split.part, [str(split.path(i)) for i in range(len(split.paths))], split.labels.tolist())
        for split in (data.train, data.validation, data.test)
    ]


def test_both_layouts_of_the_lists_give_the_same_splits(root, capsys):
    official = clothing.load(root, "error", 0)
    told = capsys.readouterr().out
    released_layout(root)
    found = clothing.load(root, "error", 0)
    assert capsys.readouterr().out == told
    assert splits_of(found) == splits_of(official)
    assert [len(paths) for _, paths, _ in splits_of(found)] == [12, 6, 6]
    assert all(Path(path).is_file() for _, paths, _ in splits_of(found) for path in paths)
    assert found.positions.tolist() == list(range(12)) and found.listed == 12
    assert (found.name, found.num_classes, found.classes) == (official.name, 14, official.classes)
    assert found.verified.tolist() == official.verified.tolist()


def test_the_released_lists_too_may_lie_beside_images_without_their_folder(root):
    expected = splits_of(clothing.load(root, "error", 0))
    released_layout(root)
    for folder in (root / "images").iterdir():
        folder.rename(root / folder.name)
    (root / "images").rmdir()
    found = splits_of(clothing.load(root, "error", 0))
    assert found == [
        (part, [path.replace("images/", "") for path in paths], labels) for part, paths, labels in expected
    ]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["images/a.jpg 3", "images/b.jpg 14"], r"noisy_train.txt: line 2: .* a label 0\.\.13"),
        (["images/a.jpg"], r"noisy_train.txt: line 1: 'images/a.jpg' is not a key, a blank and a label"),
        (["images/a.jpg 3", "images/a.jpg 4"], "noisy_train.txt: line 2: images/a.jpg is there already, in line 1"),
        ([], "noisy_train.txt: no image in it"),
        (["images/none.jpg 3"], "image 0 of the train list, .*images/none.jpg, is missing"),
    ],
)  # fmt: skip
def test_a_released_list_that_cannot_be_used_is_told_by_its_line(lines, error, root):
    released_layout(root)
    write_lines(root / "noisy_train.txt", lines)
    with pytest.raises(UserError, match=error) as found:
        clothing.load(root, "error", 0)
    assert "\n" not in str(found.value)


# the class-balanced subset --------------------------------------------------------------------------------------------------


def plain_subset(labels: list[int], num_samples: int, num_classes: int, rng: random.Random) -> list[int]:
    """Class by class: the first ones of each in the shuffled order; of those of all classes the first num_samples."""
    order = list(range(len(labels)))
    rng.shuffle(order)
    taken = []
    for k in range(num_classes):
        of_class = [place for place, i in enumerate(order) if labels[i] == k]
        taken += of_class[: int(np.ceil(num_samples / num_classes))]
    chosen = [order[place] for place in sorted(taken)[:num_samples]]
    rng.shuffle(chosen)
    return chosen


@pytest.mark.parametrize(
    ("counts", "num_samples"),
    [
        ([10, 10, 10], 9),  # whole quota
        ([10, 10, 10], 10),  # four of a class at most, ten in all
        ([10, 2, 10], 12),  # a short class
        ([10, 0, 1], 12),  # an empty one
        ([3, 3, 3], 100),  # more than there are
        ([30, 30, 30], 1),
    ],
)
def test_a_subset_is_balanced_over_classes(counts, num_samples):
    labels = np.repeat(np.arange(3), counts)
    quota, sizes = -(-num_samples // 3), set()
    for seed in range(20):
        found = balanced_subset(labels, num_samples, 3, random.Random(seed))
        assert found.dtype == np.int64
        assert found.tolist() == plain_subset(labels.tolist(), num_samples, 3, random.Random(seed))
        assert len(set(found.tolist())) == len(found) == subset_size(labels, num_samples, 3)
        taken = np.bincount(labels[found], minlength=3)
        assert (taken <= np.minimum(counts, quota)).all()
        if len(found) < num_samples:  # then every class gives what it can
            assert taken.tolist() == np.minimum(counts, quota).tolist()
        sizes.add(tuple(found.tolist()))
    assert len(sizes) > 1  # another seed, another subset or order


def test_a_subset_is_not_in_the_order_of_classes_or_of_the_list():
    labels = np.repeat(np.arange(2), 50)
    found = balanced_subset(labels, 40, 2, random.Random(0))
    assert sorted(found.tolist()) != found.tolist()
    assert 5 < labels[found[:20]].sum() < 15  # both classes in both halves


# label quality ---------------------------------------------------------------------------------------------------------------


class Stub:
    """What is needed of a run."""

    def progress(self, batches, _description, training=True):
        return batches


class Reader(nn.Module):
    """Takes images for scores."""

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(images, images, None)


def setting(labels: list[int], margins: list[float], *words: str, seed: int = 0) -> Setting:
    """A setting of images that are their own scores: `margins` for the observed label and 0 for all others.

    The loss of an image is log(1 + 13 / e^margin), whatever the label.
    """
    images = torch.tensor(margins)[:, None] * torch.eye(14)[labels]
    args = parse_args(list(words))

    def batches(split, _cache, _transform, size, **_):
        rows = images[[int(path) for path in split.paths]]
        return [((rows[piece],), piece) for piece in torch.arange(len(rows)).split(size)]

    split = make_split(Path(), [str(i) for i in range(len(labels))], labels)
    data = Data(None, split, None, None, None, (), None, batches)
    return Setting(args, CPU, Stub(), data, np.random.default_rng(seed), CPU.generator(0))


# 20 images of class 0, 12 of class 1, two of class 2; those of a multiple of 3 have low losses
LABELS = [0] * 20 + [1] * 12 + [2] * 2
MARGINS = [(4.0 if i % 3 == 0 else -2.0) + 0.01 * i for i in range(len(LABELS))]


@pytest.mark.parametrize(
    "batches", [21, 42]
)  # of four: 6 or 12 of a class, so 14 of 84 or 26 of 168 are found
@pytest.mark.parametrize("seed", range(3))
def test_clean_probabilities_stay_with_their_images(batches, seed):
    s = setting(LABELS, MARGINS, "--batch_size", "4", "--num_batches", str(batches), seed=seed)
    found = label_quality(Reader(), "losses", s)
    positions = found.positions.tolist()
    assert found.positions.dtype == torch.int64 and len(set(positions)) == len(positions)
    assert len(positions) == subset_size(np.array(LABELS), 4 * batches, 14) == {21: 14, 42: 26}[batches]
    assert positions != sorted(positions)
    assert (found.clean > 0.5).tolist() == [i % 3 == 0 for i in positions]
    # the mixture of the losses themselves, by another way to them; its input is float32
    losses = np.log1p(13 / np.exp(np.array(MARGINS)[positions]))
    again = np.random.default_rng(seed)
    again.integers(2**63)
    expected = clean_probability(normalised(torch.from_numpy(losses)), int(again.integers(2**31)))
    torch.testing.assert_close(found.clean, expected, rtol=0, atol=1e-4)


def test_another_call_draws_another_subset():
    s = setting(LABELS, MARGINS, "--batch_size", "4", "--num_batches", "21")
    first, second = (label_quality(Reader(), "losses", s).positions.tolist() for _ in range(2))
    assert sorted(first) != sorted(second)


def test_as_released_the_probabilities_are_paired_with_the_first_images_and_short_classes_leave_zeros():
    words = ("--batch_size", "4", "--num_batches", "6")  # 24 asked for, two of a class: six are found
    s = setting(LABELS, MARGINS, *words, "--fidelity", "released")
    found = label_quality(Reader(), "losses", s)
    assert found.positions.tolist() == list(range(24))
    again = np.random.default_rng(0)
    subset = balanced_subset(np.array(LABELS), 24, 14, random.Random(int(again.integers(2**63))))
    assert len(subset) == 6
    losses = np.zeros(24)
    losses[:6] = np.log1p(13 / np.exp(np.array(MARGINS)[subset]))
    expected = clean_probability(normalised(torch.from_numpy(losses)), int(again.integers(2**31)))
    torch.testing.assert_close(found.clean, expected, rtol=0, atol=1e-4)
    assert (found.clean[6:] > 0.5).all()  # nothing is as clean as no loss at all
    right = [i % 3 == 0 for i in range(24)]
    assert (found.clean > 0.5).tolist() != right
    # where classes are not short the pairs are wrong all the same; never more positions than images
    s = setting(LABELS, MARGINS, "--batch_size", "4", "--num_batches", "42", "--fidelity", "released")
    found = label_quality(Reader(), "losses", s)
    assert found.positions.tolist() == list(range(34))


def test_losses_that_are_not_finite_are_told_in_one_line():
    margins = [float("nan"), *MARGINS[1:]]
    s = setting(LABELS, margins, "--batch_size", "4", "--num_batches", "200")
    with pytest.raises(UserError, match="losses of training samples are not finite: lower --lr") as error:
        label_quality(Reader(), "losses", s)
    assert "\n" not in str(error.value)


# one epoch on a division ----------------------------------------------------------------------------------------------------


def divided(monkeypatch, clean: list[float], *words: str):
    """What `co_divide` gives to the epoch of images 30, 29, ... with these clean probabilities, and what it returns."""
    seen = {}

    def epoch(network, peer, optimizer, labelled, unlabelled, step, **more):
        unlabelled = [next(unlabelled) for _ in range(3)]
        seen.update(networks=(network, peer), optimizer=optimizer, labelled=list(labelled))
        seen.update(unlabelled=unlabelled, step=step, **more)
        return torch.tensor([[1.0, 2, 3, 4, 5], [3.0, 4, 5, 6, 7]])

    monkeypatch.setattr(Train_clothing1M, "train_divided", epoch)
    # margins are the numbers of the images, so a view tells which image it is of
    s = setting([i % 14 for i in range(40)], [float(i) for i in range(40)], "--batch_size", "4", *words)
    division = Division(torch.arange(30, 30 - len(clean), -1), torch.tensor(clean, dtype=torch.float64))
    nets, parallel, optimizer = [nn.Linear(1, 1), nn.Linear(1, 1)], nn.Linear(1, 1), object()
    losses, selected = co_divide(nets, parallel, optimizer, division, "epoch 1", s)
    assert torch.equal(selected.given, seen["labels"]) and selected.right is None
    assert seen["networks"] == tuple(nets) and seen["optimizer"] is optimizer and seen["parallel"] is parallel
    return seen, (losses, int(selected.chosen.sum()))


def test_images_labels_and_probabilities_of_a_division_belong_together(monkeypatch):
    clean = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.95, 0.5, 0.6, 0.05, 0.02]
    seen, (losses, selected) = divided(monkeypatch, clean)
    assert losses == [2, 3, 4, 5, 6] and selected == 5
    assert seen["clean"].tolist() == clean
    assert seen["labels"].tolist() == [(30 - i) % 14 for i in range(11)]
    sides = []
    for batches in (seen["labelled"], seen["unlabelled"]):
        numbers = torch.cat([index for _, index in batches]).tolist()
        images = torch.cat([views[0] for views, _ in batches]).sum(dim=1).tolist()
        assert images == [30 - i for i in numbers]
        sides.append(numbers)
    above = [i for i, value in enumerate(clean) if value > 0.5]
    assert sides[0] == above
    below = [i for i in range(11) if i not in above]
    assert sides[1] == [*below, *below[:4]]  # six, in batches of four and two, and again from the start


@pytest.mark.parametrize("words", [(), ("--p_threshold", "1"), ("--p_threshold", "0")])
@pytest.mark.parametrize(
    "clean", [[0.9] * 10, [0.9] * 9 + [0.1], [0.1] * 9 + [0.9], [0.0] * 8, list(np.linspace(0.6, 1, 10))]
)
def test_both_sides_of_a_split_have_a_batch_at_least(clean, words, monkeypatch):
    seen, (_, selected) = divided(monkeypatch, clean, *words)
    assert 4 <= selected <= len(clean) - 4
    assert sum(len(index) for _, index in seen["labelled"]) == selected
    assert len(seen["labelled"][0][1]) == len(seen["unlabelled"][0][1]) == 4


def test_an_epoch_is_set_as_described(monkeypatch):
    seen, _ = divided(monkeypatch, list(np.linspace(0, 1, 20)), "--T", "0.4", "--recon-weight", "0.2")
    step = seen["step"]
    assert (step.temperature, step.reconstruction_weight, step.forward_unlabelled) == (0.4, 0.2, False)
    assert step.weight(0) == step.weight(10**6) == 0  # no unlabelled loss
    shares = [step.draw_share() for _ in range(200)]
    # Beta(0.5, 0.5): 0.41 of its mass is within a tenth of 0 or 1, of Beta(4, 4) less than a hundredth
    assert 0.25 < np.mean([share < 0.1 or share > 0.9 for share in shares]) < 0.57
    assert sorted(step.draw_permutation(9).tolist()) == list(range(9))
    assert divided(monkeypatch, [0.9] * 10, "--masking", "none")[0]["step"].masks is None


# masks ---------------------------------------------------------------------------------------------------------------------


def masked_targets(monkeypatch, *words: str, peak: int = 0):
    """The masks of `co_divide` on grey images of 224 pixels, of clean probability 1 and 0, whose maps of 7 peak at (peak, peak).

    Also what the targets' top classes lose, the shares that are painted, and the rows that the mask at the maximum touches.
    """
    step = divided(monkeypatch, [0.9] * 10, *words)[0]["step"]
    images, maps = torch.full((64, 3, 224, 224), -2.0), torch.zeros(64, 5, 7, 7)
    maps[:, :, peak, peak] = 2
    clean, targets = torch.arange(64) % 2, torch.eye(14)[torch.arange(64) % 14]
    masked = step.masks(images, maps, clean, targets, (40, 24))
    top = targets.argmax(dim=1, keepdim=True)
    lost = [1 - t.gather(1, top)[:, 0] for t in (masked.targets_max, masked.targets_min)]
    painted = [(copy[:, 0] != -2).float().mean(dim=(1, 2)) for copy in (masked.at_max, masked.at_min)]
    rows = (masked.at_max[:, 0] != -2).any(dim=2)  # [64, 224]
    return masked, lost, painted, clean.bool(), rows


def test_masks_are_shares_of_the_image_and_targets_lose_as_much(monkeypatch):
    masked, lost, painted, clean, rows = masked_targets(monkeypatch)
    for share, area, targets in zip(lost, painted, (masked.targets_max, masked.targets_min), strict=True):
        # sides are rounded to pixels: of rectangles of 50 to 120 pixels
        torch.testing.assert_close(area, share, rtol=0.02, atol=0)
        assert 0.06 <= share[clean].min() < 0.075 and 0.115 < share[clean].max() <= 0.13
        assert 0.16 <= share[~clean].min() < 0.175 and 0.215 < share[~clean].max() <= 0.23
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(64), rtol=0, atol=1e-6)
        assert targets.min() > 0 and targets.max() < 1
        torch.testing.assert_close(targets.min(dim=1).values, share / 13, rtol=1e-5, atol=0)
    # two draws of their own
    assert (lost[0] - lost[1]).abs().min() > 0
    assert rows[:, 0].all() and not rows[:, 223].any()  # at the maximum


def test_the_flags_of_the_masks_arrive(monkeypatch):
    words = ("--mask-lo", "0.3", "--mask-hi", "0.3", "--mask-quality", "0.5")
    _, lost, _, clean, _ = masked_targets(monkeypatch, *words)
    for share in lost:
        torch.testing.assert_close(share, torch.where(clean, 0.3, 0.8), rtol=0, atol=1e-6)
    # the peak is at row 112; doubtful images lose 0.8 of their rows' square, clean ones about 123 rows
    for anchor, first in (("corner", 101), ("centre", 51)):
        rows = masked_targets(monkeypatch, *words, "--mask-anchor", anchor, peak=3)[-1]
        tops = rows[clean].int().argmax(dim=1)
        assert (tops - first).abs().max() < 16, anchor
    words = ("--mask-lo", "1", "--mask-hi", "1", "--mask-quality", "1")
    assert masked_targets(monkeypatch, *words)[0].targets_max.min() < 0
    assert masked_targets(monkeypatch, *words, "--clamp-targets")[0].targets_max.min() == 0


def test_as_released_targets_lose_pixels_and_the_maximum_is_masked_at_the_bottom(monkeypatch):
    masked, lost, painted, clean, rows = masked_targets(monkeypatch, "--fidelity", "released")
    pixels = 224 * 224
    for share, area in zip(lost, painted, strict=True):
        assert 0.06 * pixels <= share.min() and 0.12 * pixels < share.max() <= 0.13 * pixels + 0.1
        torch.testing.assert_close(area * pixels, share, rtol=0.02, atol=0)
        assert (area[~clean] < 0.14).all()  # the quality term counts a tenth of a pixel
    torch.testing.assert_close(masked.targets_max.sum(dim=1), torch.ones(64), rtol=0, atol=1e-2)
    assert rows[:, 223].all() and not rows[:, 0].any()


# networks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "parameters"), [("resnet50", 2048, 42_544_081), ("resnet18", 512, None)]
)
def test_a_network_gives_scores_and_rebuilds_images_of_224_pixels(name, width, parameters):
    network = clothing_network(name, 14).eval()
    if parameters:
        assert sum(p.numel() for p in network.parameters()) == parameters
    with torch.no_grad():
        out = network(torch.zeros(1, 3, 224, 224), torch.ones(2, 3, 224, 224))
        assert out.maps.shape == (1, width, 7, 7) and out.scores.shape == (1, 14)
        assert out.reconstruction.shape == (2, 3, 224, 224)
        # by the decoder itself; of other sizes by resizing
        assert network.decoder(out.maps).shape == (1, 3, 224, 224)
        assert network(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)).reconstruction.shape[2:] == (
            64,
            64,
        )


def small_encoder_file(path: Path, weights: dict[str, Tensor]) -> None:
    """torchvision's names; SupContrast's, with its options beside; our own of pretrain.py; by the name of the file."""
    encoder = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    if path.name == "torchvision.pth":
        torch.save(weights, path)
    elif path.name == "supcontrast.pth":
        model = {
            f"module.encoder.{n.replace('downsample', 'shortcut')}": value for n, value in encoder.items()
        }
        model["module.head.0.weight"] = torch.zeros(3, 3)
        torch.save({"model": model, "opt": argparse.Namespace(temp=0.5), "epoch": 7}, path)
    else:
        save_file({f"encoder.{name}": value for name, value in encoder.items()}, path)


@pytest.mark.parametrize("file", ["torchvision.pth", "supcontrast.pth", "ours.safetensors"])
def test_a_network_begins_from_the_encoder_of_a_file(file, tmp_path):
    torch.manual_seed(1)
    weights = resnet18().state_dict()
    small_encoder_file(tmp_path / file, weights)
    nets = [clothing_network("resnet18", 14, str(tmp_path / file)) for _ in range(2)]
    for net in nets:
        for name, value in net.encoder.state_dict().items():
            assert torch.equal(value, weights[name]), name
    assert not torch.equal(nets[0].classifier.weight, nets[1].classifier.weight)
    assert not torch.equal(nets[0].decoder[0].weight, nets[1].decoder[0].weight)
    with pytest.raises(UserError, match=rf"--pretrained .*{file}: .*expected"):
        clothing_network("resnet50", 14, str(tmp_path / file))


def test_imagenet_weights_are_those_of_torchvision(monkeypatch):
    fetched = resnet18()
    monkeypatch.setattr(networks, "imagenet_resnet", lambda name: {"resnet18": fetched}[name])
    network = clothing_network("resnet18", 14, "imagenet")
    assert torch.equal(network.encoder.conv1.weight, fetched.conv1.weight)
    assert network.classifier.weight.shape == (14, 512)


# runs -----------------------------------------------------------------------------------------------------------------------


def small_network(_name: str, num_classes: int, _pretrained: str) -> MaskedNetwork:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 5, stride=8), nn.BatchNorm2d(8), nn.ReLU())
    return MaskedNetwork(encoder, 8, num_classes, nn.ConvTranspose2d(8, 3, 8, stride=8))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_small(root: Path, monkeypatch, words: str = "") -> Path:
    monkeypatch.setattr(Train_clothing1M, "clothing_network", small_network)
    run = root.parent / "run"
    Train_clothing1M.main(f"{QUICK} --data_path {root} --out {run} {words}".split())
    return run


def test_each_network_learns_from_the_division_that_its_peer_made_at_the_end_of_the_epoch_before(
    root, monkeypatch
):
    divisions, used, ratings = [], [], []
    rate, train = Train_clothing1M.label_quality, Train_clothing1M.co_divide

    def label_quality(network, name, s):
        divisions.append(rate(network, name, s))
        ratings.append((id(network), name))
        return divisions[-1]

    def co_divide(nets, parallel, optimizer, peers, name, s):
        before = [next(net.parameters()).detach().clone() for net in nets]
        returned = train(nets, parallel, optimizer, peers, name, s)
        moved = [not torch.equal(next(n.parameters()), old) for n, old in zip(nets, before, strict=True)]
        assert isinstance(optimizer, SGD) and moved == [True, False]
        used.append(([id(net) for net in nets], peers, len(divisions), int(returned[1].chosen.sum())))
        return returned

    monkeypatch.setattr(Train_clothing1M, "label_quality", label_quality)
    monkeypatch.setattr(Train_clothing1M, "co_divide", co_divide)
    run = run_small(root, monkeypatch, "--num_epochs 3 --lr_drop 2")
    first, second = ratings[0][0], ratings[1][0]
    assert first != second
    # none after the last epoch, where nobody would use it
    assert ratings == [(net, f"epoch {epoch} losses") for epoch in (0, 1, 2) for net in (first, second)]
    assert [nets for nets, *_ in used] == [[first, second], [second, first]] * 3
    for call, (_, peers, done, _) in enumerate(used):
        epoch, learner = divmod(call, 2)
        assert done == 2 * (epoch + 1)
        expected = divisions[2 * epoch + 1 - learner]
        assert torch.equal(peers.positions, expected.positions) and torch.equal(peers.clean, expected.clean)
    rows = table(run / "log.csv")
    # net2's losses select what net1 learns from
    for row, (of_first, of_second) in zip(rows[1:], zip(used[::2], used[1::2], strict=True), strict=True):
        assert (int(row["net2_selected"]), int(row["net1_selected"])) == (of_first[3], of_second[3])
    assert [float(row["lr"]) for row in rows] == pytest.approx([9e-4, 9e-4, 9e-5, 9e-5], rel=1e-12)


def test_the_weights_that_are_best_on_validation_are_kept_and_tested_at_the_end(root, monkeypatch):
    """By accuracies of ours: net1 is best in epochs 1 and 2 alike, net2 in the last; the test's own never count."""
    given = iter([10, 5, 99, 30, 5, 98, 30, 5, 97, 20, 50, 96, 77])
    monkeypatch.setattr(Train_clothing1M, "accuracy", lambda _scores, _labels: float(next(given)))
    seen, look = [], Train_clothing1M.scores

    def scores(nets, split, name, s):
        kept = [{key: value.clone() for key, value in net.state_dict().items()} for net in nets]
        seen.append((name, len(split.labels), kept))
        return look(nets, split, name, s)

    monkeypatch.setattr(Train_clothing1M, "scores", scores)
    (root / "clean_test_key_list.txt").write_text(
        "\n".join((root / "clean_test_key_list.txt").read_text().split()[:4])
    )
    run = run_small(root, monkeypatch, "--num_epochs 3")
    names = [f"epoch {epoch} {what}" for epoch in range(4) for what in ("validation", "test")]
    assert [(name, count) for name, count, _ in seen] == [
        *zip(names, 4 * [6, 4], strict=True), ("test of the best weights", 4)
    ]  # fmt: skip
    at_validation = [kept for name, _, kept in seen if name.endswith("validation")]
    expected = [at_validation[1][0], at_validation[3][1]]
    assert not all(torch.equal(value, at_validation[2][0][key]) for key, value in expected[0].items())
    for i, wanted in enumerate(expected):
        saved = torch.load(run / f"net{i + 1}_best.pt", weights_only=True)
        for weights in (saved, seen[-1][2][i]):
            assert weights.keys() == wanted.keys()
            assert all(torch.equal(value, wanted[key]) for key, value in weights.items())
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert {name: metrics[name] for name in ("at_best_validation", "best", "last")} == {
        "at_best_validation": 77, "best": 99, "last": 96
    }  # fmt: skip
    assert (metrics["best_validation_net1"], metrics["best_validation_net2"]) == (30, 50)
    assert next(given, None) is None
    # the same command again: nothing is left to do, and nothing is done
    before = {
        path.name: path.read_bytes() for path in (run / "result.json", run / "log.csv", run / "net1_best.pt")
    }
    run_small(root, monkeypatch, "--num_epochs 3")
    assert len(seen) == 9
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("fidelity", "batch", "images"), [("paper", 5, 2 * 10), ("released", 5, 2 * 12)])
def test_the_release_keeps_a_smaller_last_batch(fidelity, batch, images, root, monkeypatch):
    seen, train = [], Train_clothing1M.warm_up

    def warm_up(network, optimizer, batches, labels, device, **options):
        assert options == {"penalise_confidence": True, "clip": None}
        return train(network, optimizer, counted(batches), labels, device, **options)

    def counted(batches):
        for views, index in batches:
            seen.append(len(index))
            yield views, index

    monkeypatch.setattr(Train_clothing1M, "warm_up", warm_up)
    run_small(root, monkeypatch, f"--batch_size {batch} --fidelity {fidelity}")
    assert sum(seen) == images and max(seen) == 2 * batch


def test_part_of_the_images_from_a_cache_with_labels_of_a_file(root, monkeypatch):
    build_caches(root.parent / "cache", datasets.load_clothing1m(root, "noisy"))
    for image in root.rglob("*.jpg"):
        image.write_bytes(b"")  # there, but never read
    np.save(root.parent / "labels.npy", np.arange(12) % 3)
    where = f"--image_cache {root.parent / 'cache'} --noise_file {root.parent / 'labels.npy'}"
    run = run_small(root, monkeypatch, f"{where} --limit_train 8 --limit_test 2 --full_test_at_end")
    index, observed = (np.load(run / f"{name}.npy") for name in ("train_index", "noisy_labels"))
    assert len(index) == 8 and (np.diff(index) > 0).all()
    assert observed.tolist() == (index % 3).tolist()
    for row in table(run / "result.csv"):
        assert (row["noise_type"], row["profile"]) == ("labels.npy", "short+limit_train=8+limit_test=2")
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert metrics["last"] in (0, 50, 100) and metrics["full_test"] >= 0
    assert metrics["full_test_images"] == len(datasets.load_clothing1m(root, "noisy").test.labels) > 2
