"""The command lines of the three scripts: the release's flags, ours, and what is refused before anything is written."""

import re

import numpy as np
import pytest
import safetensors.torch
import torch

from common.gpu import processes
from common.runs import cli
from manifold_dividemix import pretrain, train_semisup, train_semisup_miniimagenet
from manifold_dividemix.networks import make_encoder
from manifold_dividemix.train_semisup import PRESETS

CIFAR, MINI = "train_semisup.py", "train_semisup_miniimagenet.py"
SCRIPTS = {CIFAR: train_semisup, MINI: train_semisup_miniimagenet, "pretrain.py": pretrain}

# frozen: a change of a name, a default or a choice is a change for every user
HELP = [(("-h", "--help"), "==SUPPRESS==", None)]
OPEN_SET = [
    (("--dataset",), "cifar100", None),
    (("--data-dir", "--data_path"), "./data", None),
    (("--corruption",), None, None),
    (("--ood-dir",), None, None),
    (("--ood-ratio",), 0.2, None),
    (("--open-set-cache",), None, None),
    (("--num-class",), 100, None),
]
FILES = [
    (("--img-size",), 32, None),
    (("--on_bad_image",), "error", ["error", "skip"]),
    (("--decoded",), None, None),
]
ARCH = (("--arch",), "resnet18", ["resnet18", "resnet34", "resnet50", "resnet101", "narrow"])
SHARED = [
    (("--out",), None, None),
    (("--seed",), 123, None),
    (("--device",), "auto", ["auto", "cpu", "cuda"]),
    (("--precision",), "auto", ["auto", "fp32", "bf16"]),
    (("--compile",), False, None),
    (("--fidelity",), "paper", ["paper", "released"]),
    (("--preset",), None, None),
    (("--noise_file",), None, None),
    (("-r", "--resume"), "auto", ["auto", "never"]),
    (("--limit_train",), None, None),
    (("--limit_test",), None, None),
    (("--full_test_at_end",), False, None),
]


def noise(types: list[str], default: str | None, drawn: bool = True) -> list:
    found = [
        (("--noise-type",), default, types),
        (("--noise-ratio",), 0.2, None),
    ]
    if drawn:
        found += [
            (("--posterior",), None, None),
            (("--noise-seed",), 0, None),
            (("--label-rng",), "python", ["python", "numpy"]),
        ]
    return found


def training(epochs: int, warm_up: int, start_factor: int) -> list:
    return [
        ARCH,
        (("--pretrained",), "save/last.pth", None),
        (("--weights",), "finetune", ["finetune", "freeze"]),
        (("--epochs",), epochs, None),
        (("--warmup-epoch",), warm_up, None),
        (("--batch-size",), 64, None),
        (("--lr-backbone",), 0.03, None),
        (("--lr-head",), 0.3, None),
        (("--weight-decay",), 5e-4, None),
        (("--momentum",), 0.9, None),
        (("--bn-mode",), None, ["train", "frozen", "warm-up"]),
        (("--gpu",), 0, None),
        (("--remove-ood",), 0.01, None),
        (("--ood-start-factor",), start_factor, None),
        (("--knn-k",), 10, None),
        (("--knn-encoder",), "current", ["current", "pretrained"]),
        (("--clustering",), False, None),
        (("--no-clustering",), True, None),
        (("--interval",), 30, None),
        (("--p-threshold",), 0.3, None),
        (("--selection",), "gmm", ["gmm", "none"]),
        (("--lambda_x",), 1, None),
        (("--lambda_u",), 100, None),
        (("--lambda_xe",), 1, None),
        (("--lambda_ue",), 100, None),
        (("--lambda_c",), 1, None),
        (("--temperature",), 0.5, None),
        (("--alpha",), 4, None),
        (("--thr_un",), 0.9, None),
        (("--LN-loss",), "RL", ["RL", "CE"]),
        (("--rce",), "released", ["released", "log"]),
        (("--ramp",), None, ["fixed", "released"]),
        (("--warmup-mask",), None, ["sample", "released"]),
        (("--warmup-loss",), "SCE", ["SCE", "CE"]),
        (("--eval-train", "--no-eval-train"), False, None),
        (("--exp-dir",), None, None),
        (("--print-freq",), 100, None),
        (("--drops",), 0.005, None),
        (("--lambda_ce",), 1, None),
        (("--emb-loss",), "no", None),
    ]


WORKERS = (("--workers",), 8, None)
TYPES = ["sym", "asym", "superclass", "margin1", "margin2", "margin3", "hard", "no", "given"]
FLAGS = {
    CIFAR: [*HELP, *OPEN_SET, *noise(TYPES, "sym"), *training(300, 5, 10), WORKERS, *SHARED],
    MINI: [
        *HELP,
        *FILES,
        (("--data-dir", "--data_path"), "./data", None),
        (("--num-class",), 100, None),
        WORKERS,
        *noise(["red", "blue"], "red", drawn=False),
        *training(50, 10, 1),
        *SHARED,
    ],
    "pretrain.py": [
        *HELP,
        *OPEN_SET,
        *noise([*TYPES, "red", "blue"], None),
        *FILES,
        (("--epochs",), 1000, None),
        (("--batch_size",), 1024, None),
        (("--drop_last", "--no-drop_last"), False, None),
        (("--lr", "--learning_rate"), 0.5, None),
        (("--momentum",), 0.9, None),
        (("--weight_decay",), 1e-4, None),
        (("--temp",), 0.5, None),
        (("--cosine", "--no-cosine"), True, None),
        (("--lr_decay_epochs",), [700, 800, 900], None),
        (("--lr_decay_rate",), 0.1, None),
        (("--warm", "--no-warm"), None, None),
        (("--warmup_epochs",), 10, None),
        (("--knn_every",), None, None),
        ARCH,
        (("--gpu",), 0, None),
        (("--knn-k",), 10, None),
        WORKERS,
        *SHARED,
    ],
}

# the release's flags: option, default there, a typed value and what it is read as (spec 7). Of --data-dir, --exp-dir and
# --noise-file the defaults are ours; --corruption's is settled by the data set
RELEASED = {
    CIFAR: [
        ("--data-dir", "./data", "elsewhere", "elsewhere"),
        ("--num-class", 100, "10", 10),
        ("--corruption", "imagenet32", "place365", "place365"),
        ("--noise-file", None, "labels.json", "labels.json"),
        ("--noise-ratio", 0.2, "0.4", 0.4),
        ("--ood-ratio", 0.2, "0.6", 0.6),
        ("--p-threshold", 0.3, "0.5", 0.5),
        ("--pretrained", "save/last.pth", "other.pth", "other.pth"),
        ("--exp-dir", None, "elsewhere", "elsewhere"),
        ("--print-freq", 100, "10", 10),
        ("--gpu", 0, "1", 1),
        ("--arch", "resnet18", "resnet34", "resnet34"),
        ("--drops", 0.005, "0.1", 0.1),
        ("--weights", "finetune", "freeze", "freeze"),
        ("--epochs", 300, "50", 50),
        ("--warmup-epoch", 5, "20", 20),
        ("--interval", 30, "10", 10),
        ("--batch-size", 64, "128", 128),
        ("--lr-backbone", 0.03, "0.002", 0.002),
        ("--lr-head", 0.3, "0.2", 0.2),
        ("--weight-decay", 5e-4, "0.001", 0.001),
        ("--momentum", 0.9, "0.8", 0.8),
        ("--lambda_u", 100, "50", 50.0),
        ("--lambda_ue", 100, "30", 30.0),
        ("--lambda_x", 1, "2", 2.0),
        ("--lambda_xe", 1, "0", 0.0),
        ("--lambda_c", 1, "0.5", 0.5),
        ("--lambda_ce", 1, "0.5", 0.5),
        ("--temperature", 0.5, "1", 1.0),
        ("--alpha", 4, "0.5", 0.5),
        ("--emb-loss", "no", "mse", "mse"),
        ("--LN-loss", "RL", "CE", "CE"),
        ("--workers", 8, "2", 2),
        ("--thr_un", 0.9, "0.95", 0.95),
        ("--remove-ood", 0.01, "0.02", 0.02),
        ("--noise-type", "sym", "asym", "asym"),
    ]
}
CHANGED = {"--epochs": 50, "--warmup-epoch": 10, "--noise-type": "red"}
RELEASED[MINI] = [
    (option, CHANGED.get(option, default), *(("blue", "blue") if option == "--noise-type" else typed))
    for option, default, *typed in RELEASED[CIFAR]
    if option not in ("--corruption", "--ood-ratio", "--noise-file")
]


def actions(script: str) -> list:
    return SCRIPTS[script].make_parser()._actions


def parse(script: str, words: str = ""):
    return SCRIPTS[script].parse_args(words.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_defaults_and_choices_are_the_frozen_ones(script):
    found = [
        (tuple(action.option_strings), action.default, action.choices and list(action.choices))
        for action in actions(script)
    ]
    assert found == FLAGS[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_line_and_help_shows_them_all(script, capsys):
    for action in actions(script):
        assert action.help and action.help.strip() and "\n" not in action.help, action.option_strings
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = [option for action in actions(script) for option in action.option_strings]
    assert [option for option in options if option not in text] == []


@pytest.mark.parametrize(
    ("script", "option", "default", "text", "value"),
    [(script, *flag) for script, flags in RELEASED.items() for flag in flags],
)
def test_the_released_flags_keep_their_names_defaults_and_types(script, option, default, text, value):
    # the release's --noise-file is our --noise_file
    spellings = {option, option.replace("-", "_").replace("__", "--", 1)}
    [name] = {action.dest for action in actions(script) if spellings & {*action.option_strings}}
    assert getattr(parse(script), name) == default
    found = getattr(parse(script, f"{option} {text}"), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("script", [CIFAR, MINI])
def test_switches_are_true_booleans(script):
    assert parse(script).clustering is False
    assert parse(script, "--clustering").clustering is True
    assert parse(script, "--clustering --no-clustering").clustering is False
    assert parse(script).eval_train is False
    assert parse(script, "--eval-train").eval_train is True
    assert parse(script, "--eval-train --no-eval-train").eval_train is False


@pytest.mark.parametrize("script", [CIFAR, MINI])
def test_the_releases_exp_dir_is_our_out(script):
    assert parse(script, "--exp-dir one").out == "one"
    assert parse(script, "--out one --exp-dir two").out == "two"
    assert parse(script, "--exp-dir one --out two").out == "two"


# settled defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "bn_mode", "ramp", "mask"),
    [
        (CIFAR, "", "train", "fixed", "sample"),
        (MINI, "", "train", "fixed", "sample"),
        (CIFAR, "--fidelity released", "frozen", "released", "batch"),
        (MINI, "--fidelity released", "warm-up", "released", "all"),
        # each quirk alone
        (CIFAR, "--bn-mode frozen", "frozen", "fixed", "sample"),
        (CIFAR, "--ramp released", "train", "released", "sample"),
        (CIFAR, "--warmup-mask released", "train", "fixed", "batch"),
        (MINI, "--warmup-mask released", "train", "fixed", "all"),
        # and typed flags win, before and after
        (CIFAR, "--fidelity released --bn-mode train", "train", "released", "batch"),
        (CIFAR, "--ramp fixed --fidelity released", "frozen", "fixed", "batch"),
        (MINI, "--fidelity released --warmup-mask sample", "warm-up", "released", "sample"),
        (MINI, "--fidelity released --bn-mode frozen", "frozen", "released", "all"),
    ],
)
def test_fidelity_decides_each_quirk_unless_it_is_typed(script, words, bn_mode, ramp, mask):
    args = parse(script, words)
    assert (args.bn_mode, args.ramp, args.warmup_mask) == (bn_mode, ramp, mask)
    assert args.rce == "released"  # the only form known to have been run, under both
    assert args.num_epochs == args.epochs


def test_fidelity_changes_nothing_else():
    for script in (CIFAR, MINI):
        paper, released = (vars(parse(script, f"--fidelity {f}")) for f in ("paper", "released"))
        assert {name for name in paper if paper[name] != released[name]} == {
            "fidelity", "bn_mode", "ramp", "warmup_mask",
        }  # fmt: skip


@pytest.mark.parametrize("script", [CIFAR, "pretrain.py"])
@pytest.mark.parametrize(
    ("words", "pool"),
    [
        ("", "imagenet32"),
        ("--dataset digits", "photographs"),
        ("--dataset cifar10", "imagenet32"),
        ("--dataset digits --corruption mnist", "mnist"),
        ("--corruption photographs", "photographs"),
    ],
)
def test_the_pool_follows_the_data_set_unless_it_is_typed(script, words, pool):
    assert parse(script, words).corruption == pool


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("", "noise_type", "sym"),
        ("--dataset mini_imagenet", "noise_type", "red"),
        ("--dataset mini_imagenet --noise-type blue", "noise_type", "blue"),
        ("--noise-type asym", "noise_type", "asym"),
        ("", "warm", True),
        ("--batch_size 256", "warm", False),
        ("", "knn_every", 10),
        ("--dataset digits", "knn_every", 1),
        ("--epochs 7", "num_epochs", 7),
    ],
)
def test_settled_defaults_of_pre_training(words, name, value):
    assert getattr(parse("pretrain.py", words), name) == value


def test_mini_imagenet_is_the_only_data_set_of_its_script():
    assert parse(MINI).dataset == "mini_imagenet"


@pytest.mark.parametrize("script", [CIFAR, MINI])
def test_a_warm_up_that_never_ends_is_told_once(script, capsys, monkeypatch):
    parse(script)
    parse(script, "--selection none --warmup-epoch 300")
    assert capsys.readouterr().out == ""
    parse(script, "--epochs 5 --warmup-epoch 5")
    [line] = capsys.readouterr().out.splitlines()
    assert line == "note: warm-up only, --warmup-epoch 5 is not below --epochs 5"
    monkeypatch.setattr(processes, "rank", lambda: 1)  # of several processes the first alone tells
    parse(script, "--epochs 5 --warmup-epoch 5")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("script", "words", "directory"),
    [
        (
            CIFAR,
            "",
            "dataset_cifar100-corruption_imagenet32-noise_ratio_0.2-ood_ratio_0.2-seed_123",
        ),
        (
            CIFAR,
            "--dataset digits --noise-type asym --seed 1 --out elsewhere",
            "dataset_digits-corruption_photographs-noise_ratio_0.2-ood_ratio_0.2-seed_1-noise_type_asym",
        ),
        (
            CIFAR,
            "--fidelity released --clustering",
            "dataset_cifar100-corruption_imagenet32-noise_ratio_0.2-ood_ratio_0.2-seed_123-clustering_True"
            "-fidelity_released",
        ),
        (
            MINI,
            "--fidelity released",
            "dataset_mini_imagenet-noise_type_red-noise_ratio_0.2-img_size_32-seed_123-fidelity_released",
        ),
        (MINI, "", "dataset_mini_imagenet-noise_type_red-noise_ratio_0.2-img_size_32-seed_123"),
        (
            MINI,
            "--noise-ratio 0.8 --warmup-mask released",
            "dataset_mini_imagenet-noise_type_red-noise_ratio_0.8-img_size_32-seed_123-warmup_mask_all",
        ),
        (
            "pretrain.py",
            "",
            "pretrain-dataset_cifar100-epochs_1000-seed_123-corruption_imagenet32-ood_ratio_0.2",
        ),
        (
            "pretrain.py",
            "--dataset digits --epochs 30 --batch_size 64",
            "pretrain-dataset_digits-epochs_30-seed_123-corruption_photographs-ood_ratio_0.2-batch_size_64",
        ),
        (
            "pretrain.py",
            "--dataset mini_imagenet --noise-type blue",
            "pretrain-dataset_mini_imagenet-epochs_1000-seed_123-noise_type_blue-noise_ratio_0.2",
        ),
    ],
)
def test_the_run_directory_is_named_by_what_differs(script, words, directory):
    assert SCRIPTS[script].directory_name(parse(script, words)) == directory


# presets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.read_presets(PRESETS))
def test_every_preset_parses_by_its_own_script_and_its_values_arrive(name):
    section = cli.read_presets(PRESETS)[name]
    args = vars(parse(section.get("script", CIFAR), f"--preset {name}"))
    flags = {flag: value for flag, value in section.items() if flag not in ("script", "encoder")}
    assert flags
    for flag, value in flags.items():
        dest = {"data-dir": "data_path", "exp-dir": "out"}.get(flag, flag.replace("-", "_"))
        assert args[dest] == value, flag


@pytest.mark.parametrize("name", cli.read_presets(PRESETS))
def test_a_preset_is_refused_by_the_other_scripts(name, capsys):
    own = cli.read_presets(PRESETS)[name].get("script", CIFAR)
    for script in SCRIPTS:
        if script != own:
            with pytest.raises(SystemExit) as stop:
                parse(script, f"--preset {name}")
            assert stop.value.code == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"preset {name} is for " in line


def test_an_encoder_of_a_preset_is_that_of_a_preset_of_pre_training_on_the_same_images():
    sections = cli.read_presets(PRESETS)
    begun = {name: section["encoder"] for name, section in sections.items() if "encoder" in section}
    assert begun
    for name, encoder in begun.items():
        assert sections[encoder]["script"] == "pretrain.py"
        script = sections[name].get("script", CIFAR)
        own, its = parse(script, f"--preset {name}"), parse("pretrain.py", f"--preset {encoder}")
        alike = ["dataset", "arch"]
        # what decides the images: from elsewhere, or the list
        alike += ["noise_type", "noise_ratio", "img_size"] if script == MINI else ["corruption", "ood_ratio"]
        assert [getattr(own, flag) for flag in alike] == [getattr(its, flag) for flag in alike], name


# refusals ---------------------------------------------------------------------------------------------------------------


def refused(script: str, argv: list[str], capsys) -> str:
    """The one line that the script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(SCRIPTS[script].main, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


# what would end soon if it were not refused
QUICK = {
    CIFAR: "--dataset digits --ood-ratio 0 --pretrained none --epochs 1 --warmup-epoch 1 --limit_train 32 --device cpu",
    MINI: "--data-dir nosuch --pretrained none --epochs 1 --warmup-epoch 1 --device cpu",
    "pretrain.py": "--dataset digits --ood-ratio 0 --epochs 1 --batch_size 16 --limit_train 32 --device cpu",
}

BOTH = [
    ("--arch resnet152", "--arch: .*resnet152.*choose from .*resnet18"),
    ("--weights frozen", "--weights: .*frozen.*choose from .*finetune.*freeze"),
    ("--epochs 0", "--epochs: .*got 0"),
    ("--warmup-epoch -1", "--warmup-epoch.*: .*got -1"),
    ("--batch-size 1", "--batch-size: must be at least 2, got 1"),
    ("--lr-backbone 0", "--lr-backbone.*: .*got 0"),
    ("--lr-head nan", "--lr-head.*: .*got nan"),
    ("--weight-decay -1", "--weight-decay.*: .*got -1"),
    ("--momentum 1.5", "--momentum: .*got 1.5"),
    ("--bn-mode eval", "--bn-mode.*: .*eval.*choose from .*train.*frozen.*warm-up"),
    ("--gpu -1", "--gpu: .*got -1"),
    ("--remove-ood 2", "--remove-ood.*: .*got 2"),
    ("--ood-start-factor -1", "--ood-start-factor.*: .*got -1"),
    ("--knn-k 0", "--knn-k.*: .*got 0"),
    ("--knn-encoder first", "--knn-encoder.*: .*first.*choose from .*current.*pretrained"),
    ("--knn-encoder pretrained", "--knn-encoder: pretrained needs .*got --pretrained none"),
    ("--interval 0", "--interval: .*got 0"),
    ("--clustering perhaps", "--clustering: .*perhaps"),
    ("--p-threshold 1.1", "--p-threshold.*: .*got 1.1"),
    ("--selection all", "--selection: .*all.*choose from .*gmm.*none"),
    ("--lambda_u -1", "--lambda_u: .*got -1"),
    ("--lambda_c inf", "--lambda_c: .*got inf"),
    ("--temperature 0", "--temperature: .*got 0"),
    ("--alpha 0", "--alpha: .*got 0"),
    ("--thr_un 1.01", "--thr_un: .*got 1.01"),
    ("--LN-loss SCE", "--LN-loss.*: .*SCE.*choose from .*RL.*CE"),
    ("--rce soft", "--rce: .*soft.*choose from .*released.*log"),
    ("--ramp on", "--ramp: .*on.*choose from .*fixed.*released"),
    ("--warmup-mask batch", "--warmup-mask.*: .*batch.*choose from .*sample.*released"),
    ("--warmup-loss RL", "--warmup-loss.*: .*RL.*choose from .*SCE.*CE"),
    ("--noise-ratio 1.5", "--noise-ratio.*: .*got 1.5"),
    ("--limit_train 0", "--limit_train: .*got 0"),
    ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
    ("--fidelity both", "--fidelity: .*both.*choose from .*paper.*released"),
    ("--warm_up 3", "unrecognized arguments: --warm_up"),
]

REFUSED = [(script, *case) for script in (CIFAR, MINI) for case in BOTH] + [
    (CIFAR, "--dataset nosuch", "nosuch: choose from .*cifar100"),
    (CIFAR, "--dataset cifar100 --data-dir nosuch", "cifar100 not found.*nosuch"),
    (CIFAR, "--noise-type symm", "--noise-type.*: .*symm.*choose from .*sym.*no"),
    (CIFAR, "--noise-type superclass", "--noise-type superclass.*10 classes"),
    (CIFAR, "--ood-ratio -0.1", "--ood-ratio.*: .*got -0.1"),
    (
        CIFAR,
        "--ood-ratio 0.6 --noise-ratio 0.5",
        "--noise-ratio 0.5 and --ood-ratio 0.6 .* together at most 1",
    ),
    (CIFAR, "--ood-ratio 0.6 --noise-ratio 0.5 --noise_file nosuch.npy", "nosuch.npy: no such file"),
    (CIFAR, "--noise-type given", "--noise_file"),  # digits bring no noisy labels
    (CIFAR, "--ood-ratio 0.2 --corruption nosuch", "nosuch: choose from .*imagenet32"),
    (CIFAR, "--ood-ratio 0.2 --corruption digits", "--corruption digits: .*training images themselves"),
    (
        CIFAR,
        "--ood-ratio 0.2 --corruption imagenet32",
        "not found.*imagenet32.*train_data_batch_1.*--ood-dir",
    ),
    (CIFAR, "--label-rng random", "--label-rng.*: .*random.*choose from .*python.*numpy"),
    (CIFAR, "--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
    (
        CIFAR,
        "--pretrained nosuch.pth",
        "--pretrained nosuch.pth: no such file; make an encoder .*pretrain.py.*none",
    ),
    (CIFAR, "--pretrained save/last.pth", "--pretrained save/last.pth: no such file; make an encoder"),
    (CIFAR, "--remove-ood 0.1", "--remove-ood 0.1: 32 of 32 images would be removed.*smaller"),
    (CIFAR, "--limit_train 1", "one training image has no neighbours: use a larger --limit_train"),
    (CIFAR, "--img-size 32", "unrecognized arguments: --img-size"),
    (MINI, "", "not found.*nosuch"),
    (MINI, "--noise-type sym", "--noise-type.*: .*sym.*choose from .*red.*blue"),
    (MINI, "--ood-ratio 0.2", "unrecognized arguments: --ood-ratio"),  # as in the release
    (MINI, "--img-size 0", "--img-size.*: .*got 0"),
    (MINI, "--on_bad_image guess", "--on_bad_image: .*guess.*choose from .*error.*skip"),
    ("pretrain.py", "--noise_file labels.npy", "--noise_file: no label is used .*got labels.npy"),
    ("pretrain.py", "--noise-type red", "--noise-type: red is not for --dataset digits"),
    ("pretrain.py", "--dataset mini_imagenet --noise-type asym", "asym is not for --dataset mini_imagenet"),
    ("pretrain.py", "--temp 0", "--temp: .*got 0"),
    ("pretrain.py", "--drop_last --batch_size 64", "--drop_last: a batch of 64 is more than all 32 images"),
    ("pretrain.py", "--arch vgg", "--arch: .*vgg.*choose from .*resnet18"),
]


@pytest.mark.parametrize(("script", "words", "line"), REFUSED)
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(
    script, words, line, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = refused(script, f"{QUICK[script]} --out run {words}".split(), capsys)
    assert re.search(line, text), text
    assert list(tmp_path.iterdir()) == []


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
        channels, size = {"three channels": (3, 8), "wide": (1, 32), "lacks": (1, 8)}[kind]
        found = make_encoder("resnet18", channels, size).state_dict()
        if kind == "lacks":
            del found["layer3.0.conv2.weight"]
        safetensors.torch.save_file(found, file)
    words = [*QUICK[CIFAR].split(), "--pretrained", str(file), "--out", str(tmp_path / "run")]
    assert re.search(line, refused(CIFAR, words, capsys))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("script", [CIFAR, "pretrain.py"])
def test_a_run_that_diverges_ends_in_one_line(script, tmp_path, capsys, monkeypatch):
    """Its embeddings are not finite either, of which there is no area under a curve."""
    monkeypatch.chdir(tmp_path)
    rates = {CIFAR: "--lr-backbone 1e30 --lr-head 1e30 --epochs 2", "pretrain.py": "--lr 1e30 --no-warm"}
    words = f"{QUICK[script]} --out run --ood-ratio 0.2 {rates[script]}"
    assert re.search("error: loss.* (not finite|is nan)", refused(script, words.split(), capsys))
    assert not (tmp_path / "run" / "result.json").exists()


def test_an_encoder_of_nans_is_no_traceback(tmp_path, capsys):
    """The outlier score of the first look is of no use then, and the loss of the warm-up says so."""
    weights = make_encoder("resnet18", 1, 8).state_dict()
    weights["conv1.weight"] = torch.full_like(weights["conv1.weight"], np.nan)
    safetensors.torch.save_file(weights, tmp_path / "encoder.safetensors")
    words = f"{QUICK[CIFAR]} --ood-ratio 0.2 --pretrained {tmp_path}/encoder.safetensors --out {tmp_path}/run"
    assert "loss is nan at epoch 1" in refused(CIFAR, words.split(), capsys)
