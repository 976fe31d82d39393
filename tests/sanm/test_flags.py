"""The command lines of the three scripts: frozen flags, settled defaults, names of runs and cells, presets, refusals."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from common.datasets import Data, Split
from common.runs import cli
from sanm import Train_cifar, Train_clothing1M, flags, pretrain
from sanm.networks import simclr_resnet

CIFAR, CLOTHING, SIMCLR = "Train_cifar.py", "Train_clothing1M.py", "pretrain.py"
SCRIPTS = {CIFAR: Train_cifar, CLOTHING: Train_clothing1M, SIMCLR: pretrain}
PRESETS = cli.read_presets(flags.PRESETS)

# option = default : type or choices. Frozen: a change of a name or a default is a change for every user
SHARED = """
    --out=None:place --seed=123:seed --device='auto':auto|cpu|cuda --precision='auto':auto|fp32|bf16 --compile=False
    --fidelity='paper':paper|released --preset=None --noise_file=None:place -r,--resume='auto':auto|never|anyway
    --limit_train=None:count --limit_test=None:count --full_test_at_end=False"""
FROZEN = {
    CIFAR: """-h,--help='==SUPPRESS==' --dataset='cifar10' --data_path='./data':place
    --noise_mode='sym':sym|asym|margin1|margin2|margin3|hard|given --r=0.5:fraction --posterior=None:place
    --num_class=10:count --check_path='' --id='' --base='c2d':dividemix|c2d --arch='auto':auto|narrow
    --pretrained=None:place --released-softmax,--no-released-softmax=None --selection='gmm':gmm|none
    --batch_size=64:count --lr,--learning_rate=0.02:positive --lr_drop=150:count --num_epochs=360:count
    --warm_up=None:count --warm-up-views='strong':strong|weak --alpha=4:positive --lambda_u=25:non_negative
    --T=0.5:positive --p_threshold=0.5:fraction --gpuid=0:count_or_zero --masking='adversarial':adversarial|none
    --mask-lo=0.02:fraction --mask-hi=0.07:fraction --mask-quality=0.03:fraction --mask-anchor=None:corner|centre
    --clamp-targets=False --recon-weight=0.02:non_negative --ref-views='strong':strong|weak
    --image_size=32:count --test_split=0.2:fraction --on_bad_image='error':error|skip --workers=4:count_or_zero""",
    CLOTHING: """-h,--help='==SUPPRESS==' --data_path='./Dataset/noise_label_data/Clothing1M':place
    --num_batches=15625:count --num_class=14:count --dataset='clothing1m':clothing1m|folder --test_split=0.2:fraction
    --image_size=224:count --on_bad_image='error':error|skip
    --image_cache=None:place --workers=5:count_or_zero --id='clothing1m' --network='resnet50':resnet50|resnet18
    --pretrained='imagenet':place --batch_size=8:count --lr,--learning_rate=0.0009:positive --lr_drop=40:count
    --num_epochs=80:count --alpha=0.5:positive --lambda_u=0:non_negative --T=0.5:positive --p_threshold=0.5:fraction
    --sync_bn,--no-sync_bn=None --gpuid=0:count_or_zero --masking='adversarial':adversarial|none
    --mask-lo=0.06:fraction --mask-hi=0.13:fraction --mask-quality=0.1:fraction --mask-anchor=None:corner|centre
    --clamp-targets=False --recon-weight=0.3:non_negative""",
    SIMCLR: """-h,--help='==SUPPRESS==' --dataset='cifar10' --data_path='./data':place
    --image_size=32:count --test_split=0.2:fraction --on_bad_image='error':error|skip --workers=4:count_or_zero
    --epochs=1000:count --batch_size=1024:count --drop_last,--no-drop_last=False --lr,--learning_rate=0.5:positive
    --momentum=0.9:fraction --weight_decay=0.0001:non_negative --temp=0.5:positive --cosine,--no-cosine=True
    --lr_decay_epochs=[700,800,900]:count --lr_decay_rate=0.1:positive --warm,--no-warm=None
    --warmup_epochs=10:count --knn_every=None:count --model='resnet18':resnet18 --gpuid=0:count_or_zero""",
}
# the release's flags, typed; of --data_path and --check_path the defaults are ours, and its --seed stays a string if typed
RELEASED = {
    CIFAR: """--batch_size 128 --lr 0.1 --noise_mode asym --alpha 0.5 --lambda_u 150.0 --p_threshold 0.6
    --T 0.2 --num_epochs 50 --r 0.9 --id run1 --gpuid 1 --num_class 100 --data_path elsewhere --check_path elsewhere
    --dataset cifar100""",
    CLOTHING: """--batch_size 16 --lr 0.1 --alpha 4.0 --lambda_u 25.0 --p_threshold 0.6 --T 0.3
    --num_epochs 3 --id x --gpuid 1 --num_class 14 --num_batches 9 --data_path elsewhere""",
}


def frozen(action) -> str:
    kind = "|".join(action.choices) if action.choices else getattr(action.type, "__name__", "")
    return f"{','.join(action.option_strings)}={action.default!r}:{kind}".replace(" ", "").rstrip(":")


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_defaults_and_types_are_the_frozen_ones_and_help_shows_each_with_a_line(script, capsys):
    actions = SCRIPTS[script].make_parser()._actions
    assert [frozen(action) for action in actions] == (FROZEN[script] + SHARED).split()
    assert all(action.help and action.help.strip() and "\n" not in action.help for action in actions)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [option for action in actions for option in action.option_strings if option not in text] == []


@pytest.mark.parametrize("script", RELEASED)
def test_the_released_flags_are_a_group_of_their_own_and_keep_their_types(script):
    words = RELEASED[script].split()
    args = SCRIPTS[script].parse_args(words)
    for option, text in zip(words[::2], words[1::2], strict=True):
        assert repr(getattr(args, option[2:])).strip("'") == text, option
    groups = {group.title: group._group_actions for group in SCRIPTS[script].make_parser()._action_groups}
    assert {"of the release", "not in the release", "shared by all scripts"} <= groups.keys()
    assert {action.option_strings[0] for action in groups["of the release"]} == {*words[::2]}


# settled defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "name", "value"),
    [
        (CIFAR, "", "released_softmax", False),
        (CIFAR, "--fidelity released", "released_softmax", True),
        (CIFAR, "--fidelity released --base dividemix", "released_softmax", False),
        (CIFAR, "--no-released_softmax --fidelity released", "released_softmax", False),
        (CIFAR, "--released-softmax --pretrained none", "released_softmax", True),
        *(
            (script, words, "mask_anchor", anchor)
            for script in RELEASED
            for words, anchor in (
                ("", "centre"),
                ("--fidelity released", "corner"),
                ("--fidelity released --mask-anchor centre", "centre"),
                ("--mask_anchor corner", "corner"),
            )
        ),
        (CIFAR, "", "warm_up", 10),
        (CIFAR, "--dataset cifar100", "warm_up", 20),
        (CIFAR, "--dataset cifar100 --warm_up 3", "warm_up", 3),
        (CIFAR, "--noise_file labels.npy --noise_mode asym", "noise_mode", "given"),
        (CLOTHING, "", "sync_bn", True),
        (CLOTHING, "--fidelity released", "sync_bn", False),
        (CLOTHING, "--fidelity released --sync_bn", "sync_bn", True),
        (CLOTHING, "--no-sync_bn", "sync_bn", False),
        (SIMCLR, "", "warm", True),
        (SIMCLR, "--batch_size 256", "warm", False),
        (SIMCLR, "--batch-size 257 --no-warm", "warm", False),
        (SIMCLR, "", "knn_every", 10),
        (SIMCLR, "--dataset digits", "knn_every", 1),
        (SIMCLR, "--dataset digits --knn_every 7", "knn_every", 7),
        (SIMCLR, "--epochs 3", "num_epochs", 3),
        (SIMCLR, "--lr_decay_epochs 5 6", "lr_decay_epochs", [5, 6]),
    ],
)
def test_defaults_that_other_flags_decide_unless_they_are_typed(script, words, name, value):
    assert getattr(SCRIPTS[script].parse_args(words.split()), name) == value


def test_the_rule_of_the_masks_is_that_of_the_flags():
    words = "--mask-lo 0.1 --mask-hi 0.2 --mask-quality 0.3 --mask-anchor corner --clamp-targets"
    assert flags.mask_rule(Train_cifar.parse_args(words.split())) == (0.1, 0.2, 0.3, "corner", True, False)


USUAL = "dataset_cifar10-noise_mode_sym-r_0.5-base_"


@pytest.mark.parametrize(
    ("words", "method", "directory"),
    [
        ("", "SANM(C2D)", f"{USUAL}c2d-seed_123"),
        (
            "--base dividemix --dataset digits --num_epochs 20",
            "SANM(DivideMix)",
            "dataset_digits-noise_mode_sym-r_0.5-base_dividemix-seed_123-num_epochs_20",
        ),
        ("--masking none", "C2D", f"{USUAL}c2d-seed_123-masking_none"),
        ("--base dividemix --masking none", "DivideMix", f"{USUAL}dividemix-seed_123-masking_none"),
        ("--recon-weight 0", "SANM(C2D) without reconstruction", f"{USUAL}c2d-seed_123-recon_weight_0.0"),
        ("--selection none --lr 0.1", "CE", f"{USUAL}c2d-seed_123-selection_none-lr_0.1"),
        (
            "--fidelity released --mask-anchor centre --lr 0.1",
            "SANM(C2D)",
            f"{USUAL}c2d-fidelity_released-seed_123-lr_0.1-mask_anchor_centre",
        ),
    ],
)
def test_method_and_run_directory_of_cifar(words, method, directory):
    args = Train_cifar.parse_args(words.split())
    assert (flags.cifar_method(args), flags.cifar_directory(args)) == (method, directory)


@pytest.mark.parametrize(
    ("words", "method", "directory", "profile"),
    [
        ("", "SANM(DivideMix)", "seed_123", "paper"),
        ("--masking none", "DivideMix", "seed_123-masking_none", "paper"),
        ("--fidelity released --T 0.4", "SANM(DivideMix)", "fidelity_released-seed_123-T_0.4", "paper"),
        ("--num_epochs 79", "SANM(DivideMix)", "seed_123-num_epochs_79", "short"),
        ("--num_batches 15624", "SANM(DivideMix)", "seed_123-num_batches_15624", "short"),
        ("--image_size 223", "SANM(DivideMix)", "seed_123-image_size_223", "short"),
        ("--network resnet18", "SANM(DivideMix)", "seed_123-network_resnet18", "short"),
    ],
)
def test_method_run_directory_and_profile_of_clothing1m(words, method, directory, profile):
    args = Train_clothing1M.parse_args(words.split())
    assert flags.clothing_method(args) == method
    assert flags.clothing_directory(args) == f"clothing1m-{directory}"
    assert flags.clothing_cell(args)["profile"] == profile


@pytest.mark.parametrize(
    ("words", "directory", "profile"),
    [
        ("", "dataset_cifar10-epochs_1000-seed_123", "paper"),
        ("--dataset digits --epochs 5 --seed 1", "dataset_digits-epochs_5-seed_1", "embedded"),
        ("--batch_size 64 --epochs 999", "dataset_cifar10-epochs_999-seed_123-batch_size_64", "short"),
        ("--no-warm --temp 0.1", "dataset_cifar10-epochs_1000-seed_123-temp_0.1-warm_False", "paper"),
    ],
)
def test_run_directory_and_profile_of_pre_training(words, directory, profile):
    args = pretrain.parse_args(words.split())
    assert flags.pretrain_directory(args) == f"pretrain-{directory}"
    assert flags.pretrain_cell(args, "own")["profile"] == profile


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ("sym", 0.5, "paper")),
        ("--num_epochs 359 --r 0.8", ("sym", 0.8, "short")),
        ("--dataset digits --noise_mode asym", ("asym", 0.5, "embedded")),
        ("--noise_mode given", ("given", None, "paper")),
        ("--noise_file a/own.npy", ("own.npy", None, "paper")),
    ],
)
def test_the_cell_of_a_run_says_what_its_labels_are(words, expected):
    cell = flags.cifar_cell(Train_cifar.parse_args(words.split()), "own")
    assert cell["dataset"] == "own"
    assert (cell["noise_type"], cell["noise_rate"], cell["profile"]) == expected
    clothing = flags.clothing_cell(Train_clothing1M.parse_args(["--noise_file", "a/own.npy"]))
    assert (clothing["dataset"], clothing["noise_type"]) == ("clothing1m", "own.npy")


def test_a_schedule_that_does_not_fit_gets_a_note():
    schedule = lambda words: [  # noqa: E731
        note for note in flags.cifar_notes(Train_cifar.parse_args(words.split())) if note.startswith("note:")
    ]
    assert schedule("--num_epochs 10 --lr_drop 10") == []
    warm_up, drop = schedule("--num_epochs 9 --lr_drop 10")
    assert "--warm_up 10 " in warm_up and "--lr_drop 10, --num_epochs 9" in drop
    words = ["--num_epochs", "5", "--selection", "none", "--lr_drop", "3"]
    assert flags.cifar_notes(Train_cifar.parse_args(words)) == []


@pytest.mark.parametrize(
    ("words", "on", "end"),
    [
        ("--r 0.89", "off, --r 0.89", "of each epoch"),
        ("--r 0.9", "on, --r 0.9", "the last 5 loss vectors"),
        ("--r 0.95 --fidelity released", "off, --r 0.95", "of each epoch"),
        ("--noise_file labels.npy", "off, --r 0.5", "type --r 0.9 if 90 % are wrong)"),
        ("--noise_mode given", "off, --r 0.5", "type --r 0.9 if 90 % are wrong)"),
        ("--noise_file labels.npy --r 0.9", "on, --r 0.9", "the last 5 loss vectors"),
        ("--preset cifar10/cifar10-sym0.9/sanm-c2d --noise_file labels.npy", "on, --r 0.9", "5 loss vectors"),
    ],
)
def test_labels_from_a_file_turn_the_90_percent_rule_on_only_where_r_is_set(words, on, end):
    args = Train_cifar.parse_args(words.split())
    line = flags.cifar_notes(args)[-1]
    assert line.startswith(f"90 % rule {on}: ") and line.endswith(end)
    assert flags.uses_history(args) is on.startswith("on")


# presets ----------------------------------------------------------------------------------------------------------------

METHODS = {
    "sanm-c2d": "SANM(C2D)",
    "sanm-dividemix": "SANM(DivideMix)",
    "c2d": "C2D",
    "dividemix": "DivideMix",
    "ce": "CE",
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_parses_by_its_own_script_alone_and_its_values_arrive(name, capsys):
    section = dict(PRESETS[name])
    own, encoder = section.pop("script", CIFAR), section.pop("encoder", None)
    args = SCRIPTS[own].parse_args(["--preset", name])
    assert PRESETS[name] and {flag: getattr(args, flag.replace("-", "_")) for flag in section} == section
    for script in {*SCRIPTS} - {own}:
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[script].parse_args(["--preset", name])
        assert stop.value.code == 2 and f"preset {name} is for " in capsys.readouterr().err
    if encoder is not None:
        assert PRESETS[encoder]["script"] == SIMCLR and args.base == "c2d"
        assert PRESETS[encoder]["dataset"] == args.dataset
    if cell := re.fullmatch(r"(cifar100?)/\1-([a-z]+)(0\.\d)/([\w-]+)", name):
        dataset, noisy, rate, what = cell.groups()
        assert (args.dataset, args.noise_mode, args.r) == (dataset, noisy, float(rate))
        assert (args.num_epochs, args.batch_size, args.lr, args.fidelity) == (360, 64, 0.02, "paper")
        assert flags.cifar_method(args) == METHODS[what]


# refusals ---------------------------------------------------------------------------------------------------------------

# what would end soon if it were not refused
QUICK = {
    CIFAR: "--dataset digits --base dividemix --num_epochs 1 --warm_up 1 --limit_train 32 --device cpu",
    CLOTHING: "--network resnet18 --pretrained none --image_size 64 --device cpu --workers 0",
    SIMCLR: "--dataset digits --epochs 1 --limit_train 32 --device cpu",
}


def refused(script: str, words: list[str], capsys) -> str:
    """The one line that a script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(SCRIPTS[script].main, [*QUICK[script].split(), *words])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        (CIFAR, "--dataset nosuch", "nosuch: choose from .*cifar10"),
        (CIFAR, "--noise_mode given", "--noise_mode given: .*--noise_file"),
        (CIFAR, "--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        (CIFAR, "--r 1.5", "--r: .*got 1.5"),
        (CIFAR, "--base divide", "--base: .*divide.*choose from .*dividemix.*c2d"),
        (CIFAR, "--base c2d", "ckpt_digits_resnet18.pth: make one with .*--dataset digits.*--pretrained"),
        (CIFAR, "--base c2d --fidelity released", "no pretrained/ckpt_cifar10_resnet18.pth"),
        (CIFAR, "--base c2d --pretrained nosuch.pth", "--pretrained nosuch.pth: no such file"),
        (CIFAR, "--pretrained some.pth", "--pretrained: is for --base c2d, got some.pth"),
        (CIFAR, "--arch narrow --base c2d --pretrained none", "--arch: narrow is for --base dividemix"),
        (CIFAR, "--released-softmax", "--released-softmax: --base dividemix returns logits"),
        (CIFAR, "--mask-lo 0.08", "--mask-lo: must be at most --mask-hi 0.07, got 0.08"),
        (CIFAR, "--limit_train 1", "--limit_train 1: one image cannot be split"),
        (CIFAR, "--preset nosuch", "preset nosuch: choose from .*embedded/"),
        (CIFAR, "--epochs 3", "unrecognized arguments: --epochs"),
        (CLOTHING, "--num_class 10", "--num_class: Clothing1M has 14 classes, got 10"),
        (CLOTHING, "--image_size 63", "--image_size: must be at least 64, got 63"),
        (CLOTHING, "--mask-hi 0.05", "--mask-lo: must be at most --mask-hi 0.05, got 0.06"),
        (CLOTHING, "--gpuid 99 --device cuda", "--device cuda: there is no CUDA device 99"),
        (CLOTHING, "--data_path nosuch", "clothing1m not found in .*looked in .*nosuch for noisy_label_kv"),
        (SIMCLR, "--noise_file labels.npy", "--noise_file: no label is used .*got labels.npy"),
        (SIMCLR, "--dataset nosuch", "nosuch: choose from .*cifar10"),
        (SIMCLR, "--lr_decay_epochs 700,800", "--lr_decay_epochs.*: .*got 700,800"),
        (SIMCLR, "--drop_last", "--drop_last: a batch of 1024 is more than all 32 images"),
    ],
)
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(
    script, words, line, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert re.search(line, refused(script, [*words.split(), "--out", "run"], capsys))
    assert list(tmp_path.iterdir()) == []


def test_losses_that_are_not_finite_end_the_run_in_one_line(tmp_path, capsys):
    """One step of warm-up whose own loss is finite; only the losses of the split show what it did to the weights."""
    words = ["--lr", "1e30", "--out", str(tmp_path / "run")]
    assert re.search("not finite: lower --lr", refused(CIFAR, words, capsys))
    assert not (tmp_path / "run" / "result.json").exists()


def test_asymmetric_noise_on_classes_without_a_rule_is_refused(tmp_path, capsys):
    labels = np.arange(60) % 4
    images = np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8)
    np.savez(
        tmp_path / "few.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    words = f"--dataset few --data_path {tmp_path} --noise_mode asym --out {tmp_path / 'run'}".split()
    assert re.search("--noise_mode asym.*10 classes.*few has 4; use sym", refused(CIFAR, words, capsys))
    assert not (tmp_path / "run").exists()


def encoder_file(path: Path, channels: int, size: int, lacks: str = "") -> None:
    weights = simclr_resnet(channels, size).state_dict()
    safetensors.torch.save_file({n: v.contiguous() for n, v in weights.items() if n != lacks}, path)


@pytest.mark.parametrize(
    ("encoder", "line"),
    [
        ((3, 8), r"conv1.weight has shape \[16, 3, 3, 3\], expected \[16, 1, 3, 3\]"),
        ((1, 8, "layer3.0.conv2.weight"), "has no layer3.0.conv2.weight"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_and_nothing_is_written(encoder, line, tmp_path, capsys):
    file = tmp_path / "encoder.safetensors"
    encoder_file(file, *encoder)
    words = ["--base", "c2d", "--pretrained", str(file), "--out", str(tmp_path / "run")]
    assert re.search(line, refused(CIFAR, words, capsys))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# data -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "mean"),
    [("cifar100", 3, 0.5071), ("cifar100", 1, 0.2), ("cifar10", 3, 0.2), ("digits", 1, 0.2)],
)
def test_in_pre_training_only_cifar100_has_constants_of_its_own(name, channels, mean):
    split = Split(np.zeros((1, 8, 8, channels), np.uint8), np.zeros(1, np.int64))
    data = Data(name, split, split, 10, (0.2,) * channels, (0.3,) * channels)
    assert pretrain.normalisation(data)[0][0] == mean
