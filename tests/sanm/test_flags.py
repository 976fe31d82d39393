"""The command line of Train_cifar.py: the release's flags, ours, and what is refused before anything is written."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from common.runs import cli
from sanm import Train_cifar, Train_clothing1M, pretrain
from sanm.flags import mask_rule
from sanm.networks import simclr_resnet
from sanm.Train_cifar import PRESETS, directory_name, make_parser, method, parse_args

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--dataset",), "cifar10"),
    (("--data_path",), "./data"),
    (("--noise_mode",), "sym"),
    (("--r",), 0.5),
    (("--posterior",), None),
    (("--num_class",), 10),
    (("--check_path",), ""),
    (("--id",), ""),
    (("--base",), "c2d"),
    (("--arch",), "auto"),
    (("--pretrained",), None),
    (
        ("--released-softmax", "--no-released-softmax"),
        None,
    ),
    (("--selection",), "gmm"),
    (("--batch_size",), 64),
    (("--lr", "--learning_rate"), 0.02),
    (("--lr_drop",), 150),
    (("--num_epochs",), 360),
    (("--warm_up",), None),
    (("--warm-up-views",), "strong"),
    (("--alpha",), 4),
    (("--lambda_u",), 25),
    (("--T",), 0.5),
    (("--p_threshold",), 0.5),
    (("--gpuid",), 0),
    (("--masking",), "adversarial"),
    (("--mask-lo",), 0.02),
    (("--mask-hi",), 0.07),
    (("--mask-quality",), 0.03),
    (("--mask-anchor",), None),
    (("--clamp-targets",), False),
    (("--recon-weight",), 0.02),
    (("--ref-views",), "strong"),
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

# the release's flags: option, default there, a typed value and what it is read as. Of --data_path and --check_path the defaults
# are ours
RELEASED = [
    ("--batch_size", 64, "128", 128),
    ("--lr", 0.02, "0.1", 0.1),
    ("--learning_rate", 0.02, "0.1", 0.1),
    ("--noise_mode", "sym", "asym", "asym"),
    ("--alpha", 4, "0.5", 0.5),
    ("--lambda_u", 25, "150", 150.0),
    ("--p_threshold", 0.5, "0.6", 0.6),
    ("--T", 0.5, "0.2", 0.2),
    ("--num_epochs", 360, "50", 50),
    ("--r", 0.5, "0.9", 0.9),
    ("--id", "", "run1", "run1"),
    ("--seed", 123, "7", 7),  # a typed one stays a string in the release
    ("--gpuid", 0, "1", 1),
    ("--num_class", 10, "100", 100),
    ("--data_path", "./data", "elsewhere", "elsewhere"),
    ("--check_path", "", "elsewhere", "elsewhere"),
    ("--dataset", "cifar10", "cifar100", "cifar100"),
]

SCRIPTS = {None: Train_cifar, "pretrain.py": pretrain, "Train_clothing1M.py": Train_clothing1M}


def actions() -> list:
    return make_parser()._actions


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[-1])
def test_every_flag_has_a_help_line(action):
    assert action.help and action.help.strip() and "\n" not in action.help


def test_flags_and_defaults_are_the_frozen_ones():
    assert [(tuple(action.option_strings), action.default) for action in actions()] == FLAGS


def test_the_networks_to_choose_from_are_the_frozen_ones():
    [choices] = [action.choices for action in actions() if action.option_strings == ["--arch"]]
    assert list(choices) == ["auto", "narrow"]


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


# settled defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "softmax"),
    [
        ("", False),
        ("--fidelity released", True),
        ("--fidelity released --base dividemix", False),
        ("--fidelity released --no-released-softmax", False),
        ("--no-released_softmax --fidelity released", False),
        ("--released-softmax", True),
        ("--released-softmax --pretrained none", True),
    ],
)
def test_fidelity_and_base_decide_the_second_softmax_unless_it_is_typed(words, softmax):
    assert parse_args(words.split()).released_softmax is softmax


@pytest.mark.parametrize("script", [Train_cifar, Train_clothing1M], ids=["cifar", "clothing1m"])
@pytest.mark.parametrize(
    ("words", "anchor"),
    [
        ("", "centre"),
        ("--fidelity released", "corner"),
        ("--fidelity released --mask-anchor centre", "centre"),
        ("--mask_anchor corner", "corner"),
    ],
)
def test_masks_are_centred_but_in_the_release_unless_an_anchor_is_typed(script, words, anchor):
    args = script.parse_args(words.split())
    assert args.mask_anchor == mask_rule(args).anchor == anchor


@pytest.mark.parametrize(
    ("words", "epochs"), [("", 10), ("--dataset cifar100", 20), ("--dataset digits", 10), ("--warm_up 3", 3)]
)
def test_warm_up_follows_the_data_set_unless_it_is_typed(words, epochs):
    assert parse_args(words.split()).warm_up == epochs


def test_a_noise_file_means_given_labels():
    assert parse_args(["--noise_file", "labels.npy"]).noise_mode == "given"
    assert parse_args(["--noise_file", "labels.npy", "--noise_mode", "asym"]).noise_mode == "given"


@pytest.mark.parametrize(
    ("words", "name", "directory"),
    [
        ("", "SANM(C2D)", "dataset_cifar10-noise_mode_sym-r_0.5-base_c2d-seed_123"),
        (
            "--base dividemix --dataset digits --num_epochs 20",
            "SANM(DivideMix)",
            "dataset_digits-noise_mode_sym-r_0.5-base_dividemix-seed_123-num_epochs_20",
        ),
        (
            "--dataset cifar100 --masking none --r 0.9",
            "C2D",
            "dataset_cifar100-noise_mode_sym-r_0.9-base_c2d-seed_123-masking_none",
        ),
        (
            "--base dividemix --masking none --noise_mode asym",
            "DivideMix",
            "dataset_cifar10-noise_mode_asym-r_0.5-base_dividemix-seed_123-masking_none",
        ),
        (
            "--base dividemix --selection none --mask-anchor corner",
            "CE",
            "dataset_cifar10-noise_mode_sym-r_0.5-base_dividemix-seed_123-selection_none-mask_anchor_corner",
        ),
        (
            "--fidelity released --mask-anchor centre --lr 0.1",
            "SANM(C2D)",
            "dataset_cifar10-noise_mode_sym-r_0.5-base_c2d-fidelity_released-seed_123-lr_0.1-mask_anchor_centre",
        ),
    ],
)
def test_method_and_run_directory_say_what_was_run(words, name, directory):
    args = parse_args(words.split())
    assert (method(args), directory_name(args)) == (name, directory)


def test_a_schedule_that_does_not_fit_is_told(capsys):
    Train_cifar.note_schedule(parse_args([]))
    assert capsys.readouterr().out == ""
    Train_cifar.note_schedule(parse_args(["--num_epochs", "5"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "--warm_up 10" in lines[0] and "--lr_drop 150" in lines[1]
    Train_cifar.note_schedule(parse_args(["--num_epochs", "5", "--selection", "none", "--lr_drop", "3"]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        ("", "90 % rule off, --r 0.5: ", "of each epoch"),
        ("--r 0.9", "90 % rule on, --r 0.9: ", "the last 5 loss vectors"),
        ("--r 0.95 --fidelity released", "90 % rule off, --r 0.95: ", "of each epoch"),
        ("--noise_file labels.npy", "90 % rule off, --r 0.5: ", "type --r 0.9 if 90 % are wrong)"),
        ("--noise_mode given", "90 % rule off, --r 0.5: ", "type --r 0.9 if 90 % are wrong)"),
        ("--noise_file labels.npy --r 0.9", "90 % rule on, --r 0.9: ", "the last 5 loss vectors"),
        ("--preset cifar10/cifar10-sym0.9/ce", "90 % rule on, --r 0.9: ", "the last 5 loss vectors"),
        (
            "--preset cifar10/cifar10-sym0.9/sanm-c2d --noise_file labels.npy",
            "90 % rule on, --r 0.9: ",
            "the last 5 loss vectors",
        ),
    ],
)
def test_labels_from_a_file_turn_the_90_percent_rule_on_only_where_r_is_set(words, start, end, capsys):
    args = parse_args(words.split())
    Train_cifar.note_quality(args)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(start) and line.endswith(end)
    assert Train_cifar.uses_history(args) is (" on, " in start)


# presets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.read_presets(PRESETS))
def test_every_preset_parses_by_its_own_script_and_its_values_arrive(name):
    section = cli.read_presets(PRESETS)[name]
    flags = {
        flag.replace("-", "_"): value for flag, value in section.items() if flag not in ("script", "encoder")
    }
    assert section
    args = vars(SCRIPTS[section.get("script")].parse_args(["--preset", name]))
    assert {flag: args[flag] for flag in flags} == flags


@pytest.mark.parametrize("name", cli.read_presets(PRESETS))
def test_a_preset_is_refused_by_the_other_scripts(name, capsys):
    own = cli.read_presets(PRESETS)[name].get("script")
    for script, module in SCRIPTS.items():
        if script != own:
            with pytest.raises(SystemExit) as stop:
                module.parse_args(["--preset", name])
            assert stop.value.code == 2
            assert f"preset {name} is for " in capsys.readouterr().err


def test_an_encoder_of_a_preset_is_that_of_a_preset_of_pre_training_on_the_same_data():
    sections = cli.read_presets(PRESETS)
    begun = {name: section["encoder"] for name, section in sections.items() if "encoder" in section}
    assert begun
    for name, encoder in begun.items():
        assert sections[encoder]["script"] == "pretrain.py"
        assert sections[encoder]["dataset"] == sections[name]["dataset"]
        assert sections[name].get("base", "c2d") == "c2d"


@pytest.mark.parametrize(
    "name", [n for n in cli.read_presets(PRESETS) if re.match(r"cifar100?/cifar100?-", n)]
)
def test_the_name_of_a_cell_says_what_its_flags_say(name):
    dataset, noisy, rate, what = re.fullmatch(r"(\w+)/\1-([a-z]+)(0\.\d)/([\w-]+)", name).groups()
    args = parse_args(["--preset", name])
    assert (args.dataset, args.noise_mode, args.r) == (dataset, noisy, float(rate))
    assert (args.num_epochs, args.batch_size, args.lr, args.fidelity) == (360, 64, 0.02, "paper")
    assert method(args) == {
        "sanm-c2d": "SANM(C2D)", "sanm-dividemix": "SANM(DivideMix)", "c2d": "C2D", "dividemix": "DivideMix", "ce": "CE",
    }[what]  # fmt: skip


# refusals ---------------------------------------------------------------------------------------------------------------


def refused(argv: list[str], capsys) -> str:
    """The one line that the script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(Train_cifar.main, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


# what would end soon if it were not refused
QUICK = "--dataset digits --base dividemix --num_epochs 1 --warm_up 1 --limit_train 32 --device cpu --out run"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--dataset nosuch", "nosuch: choose from .*cifar10"),
        ("--dataset cifar100 --data_path nosuch", "cifar100 not found.*nosuch"),
        ("--noise_mode given", "--noise_mode given: .*--noise_file"),  # digits bring no noisy labels
        ("--noise_mode symm", "--noise_mode: .*symm.*choose from .*sym.*asym"),
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--r 1.5", "--r: .*got 1.5"),
        ("--r -0.1", "--r: .*got -0.1"),
        ("--r nan", "--r: .*got nan"),
        ("--base divide", "--base: .*divide.*choose from .*dividemix.*c2d"),
        (
            "--base c2d",
            "pretrained/ckpt_digits_resnet18.pth: make one with .*pretrain.py --dataset digits.*--pretrained",
        ),
        ("--arch wide", "--arch: .*wide.*choose from .*auto.*narrow"),
        ("--arch narrow --base c2d --pretrained none", "--arch: narrow is for --base dividemix"),
        ("--base c2d --fidelity released", "no pretrained/ckpt_cifar10_resnet18.pth"),
        ("--base c2d --pretrained nosuch.pth", "--pretrained nosuch.pth: no such file"),
        ("--pretrained encoder.safetensors", "--pretrained: is for --base c2d, got encoder.safetensors"),
        ("--released-softmax", "--released-softmax: --base dividemix returns logits"),
        ("--selection all", "--selection: .*all.*choose from .*gmm.*none"),
        ("--masking random", "--masking: .*random.*choose from .*adversarial.*none"),
        ("--mask-lo 0.2", "--mask-lo: must be at most --mask-hi 0.07, got 0.2"),
        ("--mask_hi 0.01", "--mask-lo: must be at most --mask-hi 0.01, got 0.02"),
        ("--mask-lo -1", "--mask-lo.*: .*got -1"),
        ("--mask-quality 2", "--mask-quality.*: .*got 2"),
        ("--mask-anchor middle", "--mask-anchor.*: .*middle.*choose from .*corner.*centre"),
        ("--recon-weight -1", "--recon-weight.*: .*got -1"),
        ("--ref-views none", "--ref-views.*: .*none.*choose from .*strong.*weak"),
        ("--batch_size 0", "--batch_size: .*got 0"),
        ("--lr 0", "--lr.*: .*got 0"),
        ("--lr inf", "--lr.*: .*got inf"),
        ("--lr_drop 0", "--lr_drop: .*got 0"),
        ("--num_epochs 0", "--num_epochs: .*got 0"),
        ("--num_epochs ten", "--num_epochs: .*got ten"),
        ("--warm_up 0", "--warm_up: .*got 0"),
        ("--alpha 0", "--alpha: .*got 0"),
        ("--lambda_u -1", "--lambda_u: .*got -1"),
        ("--T 0", "--T: .*got 0"),
        ("--p_threshold 1.1", "--p_threshold: .*got 1.1"),
        ("--limit_train 0", "--limit_train: .*got 0"),
        ("--limit_train 1", "--limit_train 1: one image cannot be split"),
        ("--seed 4294967296", "--seed: .*got 4294967296"),
        ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        ("--fidelity both", "--fidelity: .*both.*choose from .*paper.*released"),
        ("--resume 30", "--resume: .*30.*choose from .*auto.*never"),
        ("--epochs 3", "unrecognized arguments: --epochs"),
    ],
)
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(line, refused(f"{QUICK} {words}".split(), capsys))
    assert list(tmp_path.iterdir()) == []


def test_losses_that_are_not_finite_end_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    """One step of warm-up whose own loss is finite; only the losses of the split show what it did to the weights."""
    monkeypatch.chdir(tmp_path)
    assert re.search("not finite: lower --lr", refused(f"{QUICK} --lr 1e30".split(), capsys))
    assert not (tmp_path / "run" / "result.json").exists()


def small_data(folder: Path, num_classes: int) -> list[str]:
    """few.npz of that many classes, and the flags that name it."""
    labels = np.arange(60) % num_classes
    images = np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(folder / "few.npz", **arrays)
    return ["--dataset", "few", "--data_path", str(folder), "--out", str(folder / "run")]


def test_asymmetric_noise_on_classes_without_a_rule_is_refused(tmp_path, capsys):
    argv = [*QUICK.split(), *small_data(tmp_path, 4), "--noise_mode", "asym"]
    assert re.search("--noise_mode asym.*10 classes.*few has 4; use sym", refused(argv, capsys))
    assert not (tmp_path / "run").exists()


def weights(kind: str) -> dict[str, torch.Tensor]:
    """An encoder that does not fit one grey channel and 8 pixels."""
    encoder = simclr_resnet(*{"three channels": (3, 8), "wide": (1, 32), "fits": (1, 8)}[kind]).state_dict()
    return {name: value.contiguous() for name, value in encoder.items()}


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("three channels", r"conv1.weight has shape \[16, 3, 3, 3\], expected \[16, 1, 3, 3\]"),
        ("wide", r"conv1.weight has shape \[64, 1, 3, 3\], expected \[16, 1, 3, 3\]"),
        ("lacks", "has no layer3.0.conv2.weight"),
        ("damaged", "damaged"),
    ],
)
def test_an_unfit_encoder_is_refused_and_nothing_is_written(kind, line, tmp_path, capsys):
    file = tmp_path / "encoder.safetensors"
    if kind == "damaged":
        file.write_bytes(b"no weights")
    else:
        found = weights("fits" if kind == "lacks" else kind)
        if kind == "lacks":
            del found["layer3.0.conv2.weight"]
        safetensors.torch.save_file(found, file)
    argv = [*QUICK.split(), "--base", "c2d", "--pretrained", str(file), "--out", str(tmp_path / "run")]
    assert re.search(line, refused(argv, capsys))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
