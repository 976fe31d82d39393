"""The command line of pretrain.py, what is refused before anything is written, and the constants that normalise images."""

import re

import numpy as np
import pytest

from common.datasets import Data, Split
from common.runs import cli
from sanm import pretrain
from sanm.pretrain import PRESETS, directory_name, make_parser, parse_args

OURS = {name for name, section in cli.read_presets(PRESETS).items() if section.get("script") == "pretrain.py"}

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--dataset",), "cifar10"),
    (("--data_path",), "./data"),
    (("--epochs",), 1000),
    (("--batch_size",), 1024),
    (("--drop_last", "--no-drop_last"), False),
    (("--lr", "--learning_rate"), 0.5),
    (("--momentum",), 0.9),
    (("--weight_decay",), 1e-4),
    (("--temp",), 0.5),
    (("--cosine", "--no-cosine"), True),
    (("--lr_decay_epochs",), [700, 800, 900]),
    (("--lr_decay_rate",), 0.1),
    (("--warm", "--no-warm"), None),
    (("--warmup_epochs",), 10),
    (("--knn_every",), None),
    (("--model",), "resnet18"),
    (("--gpuid",), 0),
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


def actions() -> list:
    return make_parser()._actions


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[-1])
def test_every_flag_has_a_help_line(action):
    assert action.help and action.help.strip() and "\n" not in action.help


def test_flags_and_defaults_are_the_frozen_ones():
    assert [(tuple(action.option_strings), action.default) for action in actions()] == FLAGS


def test_help_exits_0_and_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [option for action in actions() for option in action.option_strings if option not in text] == []


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_preset_parses_and_its_values_arrive(name):
    section = {k: v for k, v in cli.read_presets(PRESETS)[name].items() if k != "script"}
    args = vars(parse_args(["--preset", name]))
    assert section
    assert {flag: args.get(flag) for flag in section} == section


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ([], "warm", True),
        (["--batch_size", "256"], "warm", False),
        (["--batch-size", "257"], "warm", True),
        (["--batch-size", "16", "--warm"], "warm", True),
        (["--no-warm"], "warm", False),
        ([], "knn_every", 10),
        (["--dataset", "digits"], "knn_every", 1),
        (["--dataset", "digits", "--knn_every", "7"], "knn_every", 7),
        (["--epochs", "3"], "num_epochs", 3),
        (["--lr_decay_epochs", "5", "6"], "lr_decay_epochs", [5, 6]),
        (["--warmup-epochs", "4"], "warmup_epochs", 4),
        (["--drop-last"], "drop_last", True),
    ],
)
def test_settled_defaults(argv, name, value):
    assert getattr(parse_args(argv), name) == value


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "pretrain-dataset_cifar10-epochs_1000-seed_123"),
        (
            ["--dataset", "digits", "--epochs", "5", "--seed", "1"],
            "pretrain-dataset_digits-epochs_5-seed_1",
        ),
        (["--batch_size", "64"], "pretrain-dataset_cifar10-epochs_1000-seed_123-batch_size_64"),
        (["--no-warm", "--temp", "0.1"], "pretrain-dataset_cifar10-epochs_1000-seed_123-temp_0.1-warm_False"),
    ],
)
def test_the_run_directory_is_named_by_what_differs(argv, name):
    assert directory_name(parse_args(argv)) == name


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--noise_file", "labels.npy", "--noise_file: no label is used .*got labels.npy"),
        ("--dataset", "nosuch", "nosuch: choose from .*cifar10"),
        ("--epochs", "0", "--epochs: .*got 0"),
        ("--batch-size", "0", "--batch_size: .*got 0"),
        ("--lr", "inf", "--lr.*: .*got inf"),
        ("--lr", "0", "--lr.*: .*got 0"),
        ("--momentum", "1.5", "--momentum: .*got 1.5"),
        ("--weight_decay", "-1", "--weight_decay.*: .*got -1"),
        ("--temp", "0", "--temp: .*got 0"),
        ("--lr_decay_epochs", "700,800", "--lr_decay_epochs.*: .*got 700,800"),
        ("--lr_decay_rate", "0", "--lr_decay_rate.*: .*got 0"),
        ("--model", "resnet50", "--model: .*resnet50.*choose from .*resnet18"),
        ("--warmup_epochs", "0", "--warmup_epochs.*: .*got 0"),
        ("--knn_every", "0", "--knn_every.*: .*got 0"),
        ("--gpuid", "-1", "--gpuid: .*got -1"),
        ("--seed", "4294967296", "--seed: .*got 4294967296"),
        ("--preset", "nosuch", "preset nosuch: choose from .*embedded/digits/simclr"),
        ("--drop_last", None, "--drop_last: a batch of 1024 is more than all 32 images"),
    ],
)
def test_a_bad_value_ends_in_status_2_and_one_line_naming_it(flag, value, line, tmp_path, capsys):
    out = tmp_path / "run"
    # what would end soon if it were not refused
    argv = [
        "--dataset",
        "digits",
        "--epochs",
        "1",
        "--limit_train",
        "32",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(pretrain.main, [*argv, flag, *([] if value is None else [value])])
    assert stop.value.code == 2
    assert re.fullmatch(rf"[^\n]*error: [^\n]*{line}[^\n]*\n", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "channels", "mean"),
    [("cifar100", 3, 0.5071), ("cifar100", 1, 0.2), ("cifar10", 3, 0.2), ("digits", 1, 0.2)],
)
def test_only_cifar100_has_constants_of_its_own(name, channels, mean):
    split = Split(np.zeros((1, 8, 8, channels), np.uint8), np.zeros(1, np.int64))
    data = Data(name, split, split, 10, (0.2,) * channels, (0.3,) * channels)
    assert pretrain.normalisation(data)[0][0] == mean
