"""The command line of main.py: the release's flags, ours, and what is refused before anything is written."""

import re

import numpy as np
import pytest

from common.runs import cli
from me_momentum import main
from me_momentum.flags import PRESETS, directory_name, loop_limits, make_parser, method, parse_args

# names and defaults, frozen: a change of one is a change for every user
FLAGS = """
-h/--help='==SUPPRESS==' --dataset='mnist' --data_path='./data' --noise_type='symmetric' --noise_rate=0.2
--posterior=None --data_percent=0.9 --network='auto' --stem_padding=0 --lr=0.01 --weight_decay=0.0001
--batch_size=128 --n_epoch=100 --cuda_graphs/--no-cuda_graphs=False --model_dir=None
--selection='confident' --max_outer_loop=3 --max_inner_loop=20 --es_step=0.1 --es_limit=2.0
--select_view='train' --val_view='train' --legacy_batch_mean/--no-legacy_batch_mean=None
--image_size=32 --test_split=0.2 --on_bad_image='error' --workers=4 --out=None
--seed=1 --device='auto' --precision='auto' --compile=False --fidelity='paper' --preset=None
--noise_file=None -r/--resume='auto' --limit_train=None --limit_test=None --full_test_at_end=False
"""
NETWORKS = ["auto", "lenet", "resnet18", "resnet34", "small", "preact_resnet18", "preact_narrow"]
# typed values of the release's flags, and what they are read as
RELEASED = (
    "--seed 5 --lr 0.1 --weight_decay 5e-4 --batch_size 64 --n_epoch 50 --dataset cifar100 --data_percent 0.8 "
    "--data_path elsewhere --noise_type pairflip --noise_rate 0.4 --max_outer_loop 5 --max_inner_loop 10"
)
READ = {
    **{"seed": 5, "lr": 0.1, "weight_decay": 5e-4, "batch_size": 64, "num_epochs": 50, "dataset": "cifar100"},
    **{"data_percent": 0.8, "data_path": "elsewhere", "noise_type": "pairflip", "noise_rate": 0.4},
    **{"max_outer_loop": 5, "max_inner_loop": 10},
}
# of the published cells
PROTOCOL = {
    **{
        "lr": 0.01,
        "weight_decay": 1e-4,
        "batch_size": 128,
        "num_epochs": 100,
        "data_percent": 0.9,
        "seed": 1,
    },
    **{"max_outer_loop": 3, "max_inner_loop": 20, "es_step": 0.1, "es_limit": 2.0, "stem_padding": 0},
    **{"network": "auto", "fidelity": "paper", "limit_train": None, "noise_file": None},
}


def parsed(words: str):
    return parse_args(words.split())


def presets() -> dict[str, dict]:
    """The sections of main.py; those under clothing1m/ are of Clothing.py."""
    sections = cli.read_presets(PRESETS)
    return {name: section for name, section in sections.items() if not name.startswith("clothing1m/")}


def test_flags_and_defaults_are_the_frozen_ones_and_every_flag_has_a_help_line(capsys):
    actions = make_parser()._actions
    found = [f"{'/'.join(action.option_strings)}={action.default!r}".replace(" ", "") for action in actions]
    assert found == FLAGS.split()
    assert [list(action.choices) for action in actions if action.dest == "network"] == [NETWORKS]
    assert all(action.help and action.help.strip() and "\n" not in action.help for action in actions)
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [option for action in actions for option in action.option_strings if option not in text] == []


def test_the_released_flags_keep_their_names_and_types():
    args = vars(parsed(RELEASED))
    assert {name: (args[name], type(args[name])) for name in READ} == {
        n: (v, type(v)) for n, v in READ.items()
    }


def test_the_released_model_dir_is_a_name_for_out():
    assert parsed("").out is None
    for words in ("--model_dir here", "--out here", "--model_dir here --out here"):
        assert (parsed(words).out, parsed(words).model_dir) == ("here", None)


@pytest.mark.parametrize(
    ("words", "select", "val", "batch_mean"),
    [
        ("", "train", "train", False),
        ("--fidelity released --select_view test", "test", "train", True),
        ("--val_view test", "train", "test", False),
        ("--legacy_batch_mean", "train", "train", True),
        ("--fidelity released --no-legacy_batch_mean", "train", "train", False),
    ],
)
def test_views_are_the_releases_and_fidelity_decides_test_accuracy_unless_a_flag_is_typed(
    words, select, val, batch_mean
):
    args = parsed(words)
    assert (args.select_view, args.val_view, args.legacy_batch_mean) == (select, val, batch_mean)
    assert parsed(f"{words} --noise_file labels.npy --noise_type instance").noise_type == "given"


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ("", (100, 3, 19, 0.1, 2.0)),
        ("--n_epoch 7 --max_outer_loop 2 --max_inner_loop 1", (7, 2, 0, 0.1, 2.0)),
        ("--es_step 0.5 --es_limit 0", (100, 3, 19, 0.5, 0.0)),
        # one phase without a margin, which nothing ends early
        ("--selection none --n_epoch 7 --es_step 1", (7, 1, 0, 0, 2.0)),
    ],
)
def test_max_inner_loop_is_one_more_than_the_rounds(words, limits):
    assert loop_limits(parsed(words)) == limits


@pytest.mark.parametrize(
    ("words", "name", "directory"),
    [
        (
            "--selection none --dataset digits --seed 3 --data_path x",
            "CE",
            "dataset_digits-noise_type_symmetric-noise_rate_0.2-seed_3-selection_none",
        ),
        (
            "--fidelity released --n_epoch 9",
            "Me-Momentum",
            "dataset_mnist-noise_type_symmetric-noise_rate_0.2-fidelity_released-seed_1-num_epochs_9",
        ),
    ],
)
def test_method_and_run_directory_say_what_was_run(words, name, directory):
    assert (method(parsed(words)), directory_name(parsed(words))) == (name, directory)


# presets ----------------------------------------------------------------------------------------------------------------


def test_every_preset_parses_and_its_values_arrive():
    for name, section in presets().items():
        args = vars(parse_args(["--preset", name]))
        found = {flag: args["num_epochs" if flag == "n_epoch" else flag] for flag in section}
        assert found == section != {}, name
    args = parsed("--n_epoch 3 --preset embedded/digits-sym0.4/ce --noise_rate 0.1")
    assert (args.num_epochs, args.noise_rate, args.dataset, args.selection) == (3, 0.1, "digits", "none")


def test_every_published_cell_and_its_baseline_is_run_by_the_published_protocol():
    """The rest of the flags says which cell it is, as its name does."""
    names = {name for name in presets() if not name.startswith(("embedded/", "claims/"))}
    for data in ("mnist", "cifar10", "cifar100"):
        for noise, rate in (("sym", 0.2), ("sym", 0.4), ("inst", 0.2), ("inst", 0.4)):
            for what in ("me-momentum", "ce"):
                name = f"{data}/{data}-{noise}{rate}/{what}"
                args = vars(parse_args(["--preset", name]))
                cell = {"dataset": data, "noise_type": {"sym": "symmetric", "inst": "instance"}[noise]}
                cell |= {"noise_rate": rate, "selection": "none" if what == "ce" else "confident"}
                assert {flag: args[flag] for flag in PROTOCOL | cell} == PROTOCOL | cell
                names.remove(name)
    assert names == set()


def test_an_embedded_baseline_differs_in_the_selection_alone():
    names = [name for name in presets() if name.startswith("embedded/") and name.endswith("/ce")]
    assert names
    for name in names:
        baseline, own = (vars(parse_args(["--preset", n])) for n in (name, name[:-2] + "me-momentum"))
        assert {flag for flag in own if own[flag] != baseline[flag]} == {"selection", "preset"}


# refusals ---------------------------------------------------------------------------------------------------------------


def refused(argv: list[str], capsys) -> str:
    """The one line that the script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(main.main, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--noise_rate 1.5", "--noise_rate: .*got 1.5"),
        ("--noise_type asym", "--noise_type: .*asym.*choose from .*symmetric.*pairflip.*instance"),
        ("--noise_type given", "--noise_type given: .*--noise_file"),  # digits bring no noisy_labels
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--data_percent 0", "--data_percent: both parts need images, got 0"),
        ("--data_percent 1", "--data_percent: both parts need images, got 1"),
        ("--data_percent 0.0001", "--data_percent 0.0001: .*1437 images"),
        ("--model_dir here", "--model_dir: is a name for --out.*here.*run"),
        ("--dataset nosuch", "nosuch: choose from .*mnist"),
        ("--dataset mnist --data_path nosuch", "mnist not found.*nosuch"),
        ("--network lenet", "--network lenet: images of 8 pixels.*use small"),
        ("--stem_padding -1", "--stem_padding: .*got -1"),
        ("--lr 0", "--lr: .*got 0"),
        ("--weight_decay -1", "--weight_decay: .*got -1"),
        ("--batch_size 0", "--batch_size: .*got 0"),
        ("--n_epoch 0", "--n_epoch: .*got 0"),
        ("--max_outer_loop 0", "--max_outer_loop: .*got 0"),
        ("--max_inner_loop 0", "--max_inner_loop: .*got 0"),
        ("--es_step 0", "--es_step: .*got 0"),
        ("--es_limit -1", "--es_limit: .*got -1"),
        ("--limit_train 1", "--data_percent 0.9: .*1 images"),
        ("--limit_train 40", "class [0-9] is not among the 4 observed labels.*--limit_train"),
        ("--dataset few --data_path . --noise_type asymmetric", "asymmetric.*10 classes"),
        ("--dataset few --data_path . --noise_type oneflip", "oneflip.*3 classes"),
        ("--dataset oblong --data_path .", "--network lenet: images of 16 x 20 pixels are not square"),
        ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        ("--preset clothing1m/clothing1m/me-momentum", "preset .* is for Clothing.py, not for main.py"),
        ("--n_epochs 3", "unrecognized arguments: --n_epochs"),
    ],
)
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shape in (("few", (60, 8, 8)), ("oblong", (60, 16, 20))):
        images, labels = np.zeros(shape, np.uint8), np.arange(60) % 2
        arrays = {"train_images": images, "train_labels": labels}
        np.savez(f"{name}.npz", **arrays, test_images=images, test_labels=labels)
    # what would end soon if it were not refused
    quick = "--dataset digits --n_epoch 1 --max_outer_loop 1 --max_inner_loop 1 --device cpu --out run"
    assert re.search(line, refused(f"{quick} {words}".split(), capsys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.npz", "oblong.npz"]
