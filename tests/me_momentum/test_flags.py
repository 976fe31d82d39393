"""The command line of main.py: the release's flags, ours, and what is refused before anything is written."""

import re
from pathlib import Path

import numpy as np
import pytest

from common.runs import cli
from me_momentum import main
from me_momentum.flags import PRESETS, directory_name, loop_limits, make_parser, method, parse_args

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--dataset",), "mnist"),
    (("--data_path",), "./data"),
    (("--noise_type",), "symmetric"),
    (("--noise_rate",), 0.2),
    (("--posterior",), None),
    (("--data_percent",), 0.9),
    (("--network",), "auto"),
    (("--stem_padding",), 0),
    (("--lr",), 0.01),
    (("--weight_decay",), 1e-4),
    (("--batch_size",), 128),
    (("--n_epoch",), 100),
    (("--cuda_graphs", "--no-cuda_graphs"), True),
    (("--model_dir",), None),
    (("--selection",), "confident"),
    (("--max_outer_loop",), 3),
    (("--max_inner_loop",), 20),
    (("--es_step",), 0.1),
    (("--es_limit",), 2.0),
    (("--select_view",), "train"),
    (("--val_view",), "train"),
    (("--legacy_batch_mean", "--no-legacy_batch_mean"), None),
    (("--out",), None),
    (("--seed",), 1),
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

# frozen too: the networks to choose from
NETWORKS = ["auto", "lenet", "resnet18", "resnet34", "small", "preact_resnet18", "preact_narrow"]

# the release's flags: option, default there, a typed value and what it is read as. Not here: --model_dir, a name for --out
RELEASED = [
    ("--seed", 1, "5", 5),
    ("--lr", 0.01, "0.1", 0.1),
    ("--weight_decay", 1e-4, "5e-4", 5e-4),
    ("--batch_size", 128, "64", 64),
    ("--n_epoch", 100, "50", 50),
    ("--dataset", "mnist", "cifar100", "cifar100"),
    ("--data_percent", 0.9, "0.8", 0.8),
    ("--data_path", "./data", "elsewhere", "elsewhere"),
    ("--noise_type", "symmetric", "pairflip", "pairflip"),
    ("--noise_type", "symmetric", "instance", "instance"),
    ("--noise_type", "symmetric", "oneflip", "oneflip"),
    ("--noise_rate", 0.2, "0.4", 0.4),
    ("--max_outer_loop", 3, "5", 5),
    ("--max_inner_loop", 20, "10", 10),
]

# what the release does where it is told nothing else
PROTOCOL = {
    "lr": 0.01, "weight_decay": 1e-4, "batch_size": 128, "num_epochs": 100, "data_percent": 0.9, "max_outer_loop": 3,
    "max_inner_loop": 20, "es_step": 0.1, "es_limit": 2.0, "stem_padding": 0, "network": "auto", "seed": 1,
    "fidelity": "paper", "limit_train": None, "noise_file": None,
}  # fmt: skip


def actions() -> list:
    return make_parser()._actions


def presets() -> dict[str, dict]:
    """The sections of main.py; those under clothing1m/ are of Clothing.py."""
    sections = cli.read_presets(PRESETS)
    return {name: section for name, section in sections.items() if not name.startswith("clothing1m/")}


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[-1])
def test_every_flag_has_a_help_line(action):
    assert action.help and action.help.strip() and "\n" not in action.help


def test_flags_and_defaults_are_the_frozen_ones():
    assert [(tuple(action.option_strings), action.default) for action in actions()] == FLAGS


def test_the_networks_to_choose_from_are_the_frozen_ones():
    [choices] = [action.choices for action in actions() if action.option_strings == ["--network"]]
    assert list(choices) == NETWORKS


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


def test_the_released_model_dir_is_a_name_for_out():
    assert parse_args([]).out is None
    for argv in (["--model_dir", "here"], ["--out", "here"], ["--model_dir", "here", "--out", "here"]):
        args = parse_args(argv)
        assert (args.out, args.model_dir) == ("here", None)


# settled defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "select", "val", "batch_mean"),
    [
        ([], "train", "train", False),
        (["--fidelity", "released"], "train", "train", True),
        (["--fidelity", "released", "--select_view", "test"], "test", "train", True),
        (["--val_view", "test"], "train", "test", False),
        (["--legacy_batch_mean"], "train", "train", True),
        (["--fidelity", "released", "--no-legacy_batch_mean"], "train", "train", False),
    ],
)
def test_views_are_the_releases_and_fidelity_decides_test_accuracy_unless_a_flag_is_typed(
    argv, select, val, batch_mean
):
    args = parse_args(argv)
    assert (args.select_view, args.val_view, args.legacy_batch_mean) == (select, val, batch_mean)


def test_a_noise_file_means_given_labels():
    assert parse_args(["--noise_file", "labels.npy"]).noise_type == "given"
    assert parse_args(["--noise_file", "labels.npy", "--noise_type", "instance"]).noise_type == "given"


@pytest.mark.parametrize(
    ("argv", "limits"),
    [
        ([], (100, 3, 19, 0.1, 2.0)),
        (["--n_epoch", "7", "--max_outer_loop", "2", "--max_inner_loop", "4"], (7, 2, 3, 0.1, 2.0)),
        (["--es_step", "0.5", "--es_limit", "0"], (100, 3, 19, 0.5, 0.0)),
        # one phase without a margin, which nothing ends early
        (["--selection", "none", "--n_epoch", "7", "--es_step", "1"], (7, 1, 0, 0, 2.0)),
    ],
)
def test_the_limits_of_the_loops(argv, limits):
    assert loop_limits(parse_args(argv)) == limits


@pytest.mark.parametrize(
    ("argv", "name", "directory"),
    [
        ([], "Me-Momentum", "dataset_mnist-noise_type_symmetric-noise_rate_0.2-seed_1"),
        (
            ["--selection", "none", "--dataset", "digits", "--seed", "3"],
            "CE",
            "dataset_digits-noise_type_symmetric-noise_rate_0.2-seed_3-selection_none",
        ),
        (
            ["--fidelity", "released", "--n_epoch", "9"],
            "Me-Momentum",
            "dataset_mnist-noise_type_symmetric-noise_rate_0.2-fidelity_released-seed_1-num_epochs_9",
        ),
        (
            ["--fidelity", "released", "--val_view", "test", "--data_path", "x", "--preset",
             "cifar10/cifar10-inst0.4/me-momentum"],
            "Me-Momentum",
            "dataset_cifar10-noise_type_instance-noise_rate_0.4-fidelity_released-seed_1-val_view_test",
        ),
    ],
)  # fmt: skip
def test_method_and_run_directory_say_what_was_run(argv, name, directory):
    args = parse_args(argv)
    assert (method(args), directory_name(args)) == (name, directory)


# presets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_every_preset_parses_and_its_values_arrive(name):
    section = presets()[name]
    args = vars(parse_args(["--preset", name]))
    assert section
    assert {flag: args["num_epochs" if flag == "n_epoch" else flag] for flag in section} == section


@pytest.mark.parametrize(
    "name", [name for name in presets() if not name.startswith(("embedded/", "claims/"))]
)
def test_the_published_cells_are_run_by_the_published_protocol(name):
    """The rest of the flags says which cell it is, as its name does."""
    dataset, noisy, what = re.fullmatch(r"(\w+)/\1-(\w+0\.\d)/([\w-]+)", name).groups()
    args = vars(parse_args(["--preset", name]))
    assert {flag: args[flag] for flag in PROTOCOL} == PROTOCOL
    assert args["dataset"] == dataset
    assert args["noise_type"] == {"sym": "symmetric", "inst": "instance"}[noisy[:-3]]
    assert args["noise_rate"] == float(noisy[-3:])
    assert args["selection"] == {"me-momentum": "confident", "ce": "none"}[what]


def test_there_is_a_preset_of_every_published_cell_and_its_baseline():
    expected = {
        f"{data}/{data}-{noisy}{rate}/{what}"
        for data in ("mnist", "cifar10", "cifar100")
        for noisy in ("sym", "inst")
        for rate in (0.2, 0.4)
        for what in ("me-momentum", "ce")
    }
    assert {name for name in presets() if not name.startswith(("embedded/", "claims/"))} == expected


@pytest.mark.parametrize(
    "name", [name for name in presets() if name.startswith("embedded/") and name.endswith("/ce")]
)
def test_an_embedded_baseline_differs_in_the_selection_alone(name):
    baseline, own = (vars(parse_args(["--preset", n])) for n in (name, name[:-2] + "me-momentum"))
    assert {flag for flag in own if own[flag] != baseline[flag]} == {"selection", "preset"}


def test_a_typed_flag_wins_over_the_presets():
    args = parse_args(["--n_epoch", "3", "--preset", "embedded/digits-sym0.4/ce", "--noise_rate", "0.1"])
    assert (args.num_epochs, args.noise_rate, args.dataset, args.selection) == (3, 0.1, "digits", "none")


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
        ("--noise_rate nan", "--noise_rate: .*got nan"),
        ("--noise_type asym", "--noise_type: .*asym.*choose from .*symmetric.*pairflip.*instance"),
        ("--noise_type given", "--noise_type given: .*--noise_file"),  # digits bring no noisy_labels
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--data_percent 0", "--data_percent: both parts need images, got 0"),
        ("--data_percent 1", "--data_percent: both parts need images, got 1"),
        ("--data_percent 1.1", "--data_percent: .*got 1.1"),
        ("--data_percent 0.0001", "--data_percent 0.0001: .*1437 images"),
        ("--model_dir here", "--model_dir: is a name for --out.*here.*run"),
        ("--dataset nosuch", "nosuch: choose from .*mnist"),
        ("--dataset mnist --data_path nosuch", "mnist not found.*nosuch"),
        ("--network resnet50", "--network: .*resnet50.*choose from .*lenet.*resnet34.*preact_resnet18"),
        ("--network lenet", "--network lenet: images of 8 pixels.*use small"),
        ("--stem_padding -1", "--stem_padding: .*got -1"),
        ("--lr 0", "--lr: .*got 0"),
        ("--lr inf", "--lr: .*got inf"),
        ("--weight_decay -1", "--weight_decay: .*got -1"),
        ("--batch_size 0", "--batch_size: .*got 0"),
        ("--n_epoch 0", "--n_epoch: .*got 0"),
        ("--n_epoch ten", "--n_epoch: .*got ten"),
        ("--max_outer_loop 0", "--max_outer_loop: .*got 0"),
        ("--max_inner_loop 0", "--max_inner_loop: .*got 0"),
        ("--es_step 0", "--es_step: .*got 0"),
        ("--es_limit -1", "--es_limit: .*got -1"),
        ("--select_view both", "--select_view: .*both.*choose from .*train.*test"),
        ("--val_view both", "--val_view: .*both.*choose from"),
        ("--selection all", "--selection: .*all.*choose from .*confident.*none"),
        ("--limit_train 0", "--limit_train: .*got 0"),
        ("--limit_train 1", "--data_percent 0.9: .*1 images"),
        ("--limit_train 40", "class [0-9] is not among the 4 observed labels.*--limit_train"),
        ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        ("--fidelity both", "--fidelity: .*both.*choose from .*paper.*released"),
        ("--resume 3", "--resume: .*3.*choose from .*auto.*never"),
        ("--seed 4294967296", "--seed: .*got 4294967296"),
        ("--n_epochs 3", "unrecognized arguments: --n_epochs"),
    ],
)
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what would end soon if it were not refused
    quick = "--dataset digits --n_epoch 1 --max_outer_loop 1 --max_inner_loop 1 --device cpu --out run"
    assert re.search(line, refused(f"{quick} {words}".split(), capsys))
    assert list(tmp_path.iterdir()) == []


def small_data(folder: Path, num_classes: int) -> None:
    labels = np.arange(60) % num_classes
    images = np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(folder / "few.npz", **arrays)


@pytest.mark.parametrize(
    ("noise_type", "line"), [("asymmetric", "asymmetric.*10 classes"), ("oneflip", "oneflip.*3 classes")]
)
def test_noise_for_more_classes_than_there_are_is_refused_too(noise_type, line, tmp_path, capsys):
    small_data(tmp_path, 2)
    argv = ["--dataset", "few", "--data_path", str(tmp_path), "--noise_type", noise_type, "--n_epoch", "1"]
    argv += ["--max_outer_loop", "1", "--max_inner_loop", "1", "--out", str(tmp_path / "run")]
    assert re.search(line, refused(argv, capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["me-momentum", "ce"])
def test_presets_of_clothing1m_are_not_for_this_script(what, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", f"clothing1m/clothing1m/{what}"])
    assert stop.value.code == 2
    assert "Clothing.py" in capsys.readouterr().err
