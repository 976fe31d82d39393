"""The table of all methods: the same images, labels, backbone and epochs for each, and rows that say so."""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cross
from benchmarks.cross import METHODS, Setting, check_given_labels, inputs_of, prepare, settings_of
from common import datasets, noise
from common.datasets.posterior import posterior_for
from common.runs.cli import UserError
from common.runs.results import COLUMNS
from tests.benchmarks.files import read

DESCRIPTION = tomllib.loads(cross.DESCRIPTION.read_text(encoding="utf-8"))
DATA = [name for name in DESCRIPTION if name != "settings"]
# 4 epochs in all for each
SHORT = """
[settings]
"sym0.5" = { noise_type = "symmetric", noise_rate = 0.5 }
"if0.1-imb0.5" = { noise_type = "imb", noise_rate = 0.5, imb_factor = 0.1 }
[digits]
profile = "embedded"
epochs = 4
settings = ["sym0.5", "if0.1-imb0.5"]
[digits.flags]
ce = "--network preact_narrow --train-batch 64 --epochs 4 --schedule 2 --lam 0"
afm = "--network preact_narrow --train-batch 64 --epochs 4 --schedule 2"
sfa = "--arch narrow --num_epochs 4 --warm_up 2 --lr_drop 3"
me_momentum = "--network preact_narrow --data_percent 0.6 --n_epoch 2 --max_inner_loop 2 --max_outer_loop 1"
sanm = "--base dividemix --arch narrow --num_epochs 3 --warm_up 2 --lr_drop 3 --warm_up_views weak"
pretrain = "--arch narrow --epochs 2 --batch_size 64 --lr 0.01 --knn_every 2"
manifold_dividemix = "--arch narrow --epochs 2 --warmup-epoch 1 --interval 1 --clustering"
"""


def dry_run(capsys, *words: str) -> list[list[str]]:
    """The words of each command."""
    cross.main([*words, "--dry-run"])
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def parsed(command: list[str]):
    """The flags of a command as its script understands them."""
    script = import_module(command[1].removesuffix(".py").replace("/", "."))
    return script.parse_args(command[2:])


@pytest.mark.parametrize("data", DATA)
def test_every_method_has_the_same_backbone_and_as_many_epochs(data, capsys):
    epochs, backbones = {}, set()
    first = DESCRIPTION[data]["settings"][0]
    for command in dry_run(capsys, "--dataset", data, "--seeds", "1", "--settings", first):
        args = parsed(command)
        method = args.out.split("/")[5]
        count = args.num_epochs + (command[1] == "sanm/Train_cifar.py")  # the last epoch, counted from 0
        if method == "me_momentum":  # early stopping, then rounds
            assert args.max_outer_loop == 1
            count *= args.max_inner_loop
        epochs[method] = epochs.get(method, 0) + count
        name = getattr(args, "network", None) or args.arch
        backbones.add({"auto": "resnet18"}.get(name, name.removeprefix("preact_")))
    assert epochs == dict.fromkeys(METHODS, DESCRIPTION[data]["epochs"])
    assert backbones == {"narrow" if data != "cifar10" else "resnet18"}


@pytest.mark.parametrize("data", DATA)
def test_all_methods_read_the_same_images_with_the_same_labels(data, capsys):
    labels = {}
    for command in dry_run(capsys, "--dataset", data, "--seeds", "3"):
        args = parsed(command)
        assert args.seed == 3 and args.dataset == data
        setting = args.out.split("/")[4]
        if command[1] != "manifold_dividemix/pretrain.py":
            folder = getattr(args, "data_root", None) or args.data_path
            source = (args.noise_file, folder)
            assert source == labels.setdefault(setting, source)
            assert args.noise_file or "cross_data" in folder
    assert len(labels) == len(DESCRIPTION[data]["settings"]) and len(set(labels.values())) == len(labels)


def test_the_long_tail_changes_the_warm_up_in_the_commands(capsys):
    commands = dry_run(capsys, "--seeds", "1", "--methods", "sfa", "sanm")
    for setting in settings_of("digits", None, DESCRIPTION):
        flags = cross.flags_in(setting, DESCRIPTION["digits"])
        for method in ("sfa", "sanm"):
            (own,) = (c for c in commands if c[-1].endswith(f"/{setting.name}/{method}/seed1"))
            assert f" {flags[method]} --out " in " ".join(own)
            assert (own.count("--warm_up") == 2) == (setting.imb_factor is not None)


def test_the_settings_that_the_field_compares_at_are_there_and_another_is_refused_with_the_choices():
    assert set(DESCRIPTION["cifar10"]["settings"]) == {
        *("sym0.2", "sym0.5", "asym0.4", "inst0.4", "if0.01-imb0.5", "human-worst", "human-aggre")
    }
    used = {name for data in DATA for name in DESCRIPTION[data]["settings"]}
    assert used == set(DESCRIPTION["settings"])
    with pytest.raises(UserError, match=r"--settings human-worst: digits has no .*, choose from sym0\.2"):
        settings_of("digits", ["human-worst"], DESCRIPTION)


def test_labels_are_drawn_from_the_seed_for_all_methods_at_once(tmp_path):
    (setting,) = settings_of("digits", ["sym0.5"], DESCRIPTION)
    clean = datasets.load("digits").train.labels
    drawn = []
    for seed in (1, 2):
        inputs = inputs_of(setting, seed, tmp_path, tmp_path, None)
        prepare(setting, seed, inputs, tmp_path, None)
        drawn.append(np.load(inputs.labels))
        assert np.array_equal(drawn[-1], noise.add_noise("symmetric", clean, 0.5, 10, seed))
    assert not np.array_equal(*drawn)
    prepare(setting, 2, inputs, tmp_path, None)
    assert np.array_equal(np.load(inputs.labels), drawn[1])
    np.save(inputs.labels, drawn[0])
    with pytest.raises(UserError, match=r"digits-sym0\.5-seed2\.npy was made from other data"):
        prepare(setting, 2, inputs, tmp_path, None)


@pytest.mark.parametrize("kind", ["margin1", "hard"])
def test_settings_may_have_noise_from_a_posterior(kind, tmp_path):
    data = datasets.load("digits")
    clean, eta = data.train.labels, posterior_for(kind, data, tmp_path)
    setting = Setting("digits", f"{kind}-0.4", kind, 0.4)
    index, observed = cross.draw(setting, 1, data, tmp_path)
    assert np.array_equal(index, np.arange(1437))
    assert np.array_equal(observed, noise.add_noise(kind, clean, 0.4, 10, 1, posterior=eta))
    index, observed = cross.draw(setting._replace(imb_factor=0.1), 1, data, tmp_path)
    assert len(index) < 700 and (np.diff(index) > 0).all()
    assert np.mean(observed != clean[index]) == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize("limit", [None, 300])
def test_a_long_tail_and_a_subset_are_a_data_set_of_their_own(tmp_path, limit):
    (setting,) = settings_of("digits", ["if0.1-imb0.5"], DESCRIPTION)
    inputs = inputs_of(setting, 5, tmp_path, tmp_path, limit)
    prepare(setting, 5, inputs, tmp_path, limit)
    data, whole = datasets.load("digits", inputs.folder), datasets.load("digits")
    counts = np.bincount(data.train.labels)
    assert len(data.train.labels) == (limit or noise.class_counts(1437, 10, "exp", 0.1).sum())
    assert counts[0] > 5 * counts[9] > 0
    prepare(setting, 5, inputs, tmp_path, limit)  # the same again
    wrong = (data.noisy_labels != data.train.labels).mean()
    assert wrong == pytest.approx(0.5, abs=0.01 if limit is None else 0.08)
    assert np.array_equal(data.test.images, whole.test.images)
    known = dict(zip(map(bytes, whole.train.images), whole.train.labels, strict=True))
    assert [known[bytes(image)] for image in data.train.images] == data.train.labels.tolist()
    assert np.diff(data.train.labels).min() < 0, "not class by class"


def test_labels_that_people_gave_are_read_from_the_data_folder(tmp_path):
    """Put beside a data set of CIFAR-10's name and 20 images."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    (setting,) = settings_of("cifar10", ["human-worst"], DESCRIPTION)
    with pytest.raises(UserError, match=r"cifar10n_worse_label\.npy is not there: put CIFAR-10N's labels"):
        check_given_labels([setting], tmp_path)
    given = (labels + 1) % 10
    np.save(tmp_path / "cifar10n_worse_label.npy", given)
    check_given_labels([setting], tmp_path)
    whole = inputs_of(setting, 1, tmp_path / "out", tmp_path, None)
    prepare(setting, 1, whole, tmp_path, None)
    assert whole.labels == tmp_path / "cifar10n_worse_label.npy" and not (tmp_path / "out").exists()
    part = inputs_of(setting, 1, tmp_path / "out", tmp_path, 8)
    prepare(setting, 1, part, tmp_path, 8)
    data = datasets.load("cifar10", part.folder)
    assert len(data.noisy_labels) == 8 and np.array_equal(data.noisy_labels, (data.train.labels + 1) % 10)


def test_a_file_with_labels_of_the_first_images_alone_makes_a_data_set_of_these(tmp_path):
    clean = datasets.load("digits").train.labels
    np.save(tmp_path / "first.npy", (clean[:100] + 1) % 10)
    setting = Setting("digits", "first", "margin1", 0.35, labels="first.npy", images=100)
    for limit in (None, 30):
        inputs = inputs_of(setting, 3, tmp_path / "out", tmp_path, limit)
        prepare(setting, 3, inputs, tmp_path, limit)
        data = datasets.load("digits", inputs.folder)
        assert len(data.train.labels) == (limit or 100)
        assert np.array_equal(data.noisy_labels, (data.train.labels + 1) % 10)
    assert cross.columns_of(setting) == {"noise_type": "margin1", "noise_rate": 0.35, "imb_factor": ""}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Both kinds of inputs through every script, from start to end."""
    out = tmp_path_factory.mktemp("results")
    short = out / "cross.toml"
    short.write_text(SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross, "DESCRIPTION", short)
        cross.main(["--seeds", "2", "--limit_train", "250", "--settings", "if0.1-imb0.5", "--out", str(out)])
        cross.main(["--seeds", "2", "--settings", "sym0.5", "--methods", "ce", "--out", str(out / "whole")])
    return out, read(out / "cross_digits.csv")


@pytest.mark.slow
def test_the_result_is_one_csv_of_all_methods_in_the_schema(finished):
    out, rows = finished
    assert tuple(rows[0]) == COLUMNS
    methods = {row["method"] for row in rows}
    assert methods == {"CE", "AFM (K=2)", "SFA", "Me-Momentum", "SANM(DivideMix)", "Manifold DivideMix"}
    for row in rows:
        assert (row["table"], row["cell"], row["dataset"]) == ("cross", "digits-if0.1-imb0.5", "digits")
        assert (row["noise_type"], row["noise_rate"], row["imb_factor"]) == ("imb", "0.5", "0.1")
        assert (row["profile"], row["epochs"], row["seed"]) == ("embedded+limit_train=250", "4", "2")
    for metric in ("best", "last", "last10"):
        assert sum(row["metric"] == metric for row in rows) == len(METHODS)
    # the cost of a method holds its pre-training
    run = out / "runs/cross/digits/if0.1-imb0.5-limit250/manifold_dividemix/seed2"
    parts = [json.loads((folder / "result.json").read_text()) for folder in (run / "pretrain", run)]
    seconds, images = sum(part["timing"]["seconds"] for part in parts), sum(part["images"] for part in parts)
    own = next(r for r in rows if (r["method"], r["metric"]) == ("Manifold DivideMix", "last"))
    assert float(own["seconds"]) == pytest.approx(seconds, abs=0.01)
    assert float(own["images_per_second"]) == pytest.approx(images / seconds, abs=0.1)


@pytest.mark.slow
def test_every_run_of_a_setting_had_the_same_images_with_the_same_labels(finished):
    out, _ = finished
    kept = []
    for path in out.glob("runs/cross/digits/if0.1-imb0.5-limit250/*/seed2/result.json"):
        index, labels = (np.load(path.with_name(f"{name}.npy")) for name in ("train_index", "noisy_labels"))
        kept.append(dict(zip(index.tolist(), labels.tolist(), strict=True)))
    assert len(kept[0]) == 250 and kept == [kept[0]] * len(METHODS)

    # a whole data set comes with a file of labels
    labels = np.load(out / "whole/runs/cross/digits/sym0.5/ce/seed2/noisy_labels.npy")
    assert len(labels) == 1437
    assert np.array_equal(labels, np.load(out / "whole/cross_data/digits-sym0.5-seed2.npy"))
