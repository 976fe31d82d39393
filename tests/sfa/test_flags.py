"""The command line of Train_cifar.py: the release's flags, ours, and what is refused before anything is written."""

import re
from functools import partial

import pytest
import torch

from common.runs import cli
from sfa import Train_cifar, losses, robust_losses
from sfa.flags import PRESETS, cifar_directory, note_schedule
from sfa.Train_cifar import make_parser, parse_args

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--dataset",), "cifar10"),
    (("--data_path",), "./data"),
    (("--imb_type",), "exp"),
    (("--imb_factor",), 0.01),
    (("--noise_mode",), "imb"),
    (("--noise_ratio",), 0.5),
    (("--posterior",), None),
    (("--num_class",), 10),
    (("--batch_size",), 64),
    (("--lr", "--learning_rate"), 0.02),
    (("--lr_drop",), 150),
    (("--num_epochs",), 200),
    (("-w", "--warm_up"), 30),
    (("--alpha",), 4),
    (("--lambda_u",), 25),
    (("--T",), 0.5),
    (("--arch",), "resnet18"),
    (("--gpuid",), 0),
    (("--loss",), "ce"),
    (("--ldam_margin",), 0.5),
    (("--ldam_scale",), 30),
    (("--gce_q",), 0.7),
    (("--sce_ce",), None),
    (("--sce_rce",), None),
    (("--adjustment_tau",), 1),
    (("--selection",), "sfa"),
    (("--p_threshold",), 0.5),
    (("--beta",), 0.99),
    (("--phi",), 1.005),
    (("--sample_rate",), 1),
    (("--min_draw_count",), None),
    (("--ema_mode",), None),
    (("--mixture",), "em"),
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

# the release's flags: option, default, a typed value and what it is read as. Not here: -r/--resume, an epoch there
RELEASED = [
    ("--batch_size", 64, "32", 32),
    ("--lr", 0.02, "0.1", 0.1),
    ("--learning_rate", 0.02, "0.1", 0.1),
    ("--alpha", 4.0, "0.75", 0.75),
    ("--lambda_u", 25.0, "0", 0.0),
    ("--p_threshold", 0.5, "0.6", 0.6),
    ("--T", 0.5, "0.3", 0.3),
    ("--num_epochs", 200, "300", 300),
    ("--seed", 123, "7", 7),  # untyped in the release, where giving it crashes
    ("--gpuid", 0, "1", 1),
    ("--num_class", 10, "100", 100),
    ("--data_path", "./data", "elsewhere", "elsewhere"),
    ("--dataset", "cifar10", "cifar100", "cifar100"),
    ("--imb_type", "exp", "step", "step"),
    ("--imb_factor", 0.01, "0.02", 0.02),
    ("--noise_mode", "imb", "sym", "sym"),
    ("--noise_ratio", 0.5, "0.2", 0.2),
    ("--arch", "resnet18", "resnet18", "resnet18"),
    ("-w", 30, "10", 10),
    ("--warm_up", 30, "10", 10),
    ("--beta", 0.99, "0.9", 0.9),
    ("--phi", 1.005, "1.01", 1.01),
    ("--sample_rate", 1, "5", 5),
]


def actions() -> list:
    return make_parser()._actions


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.option_strings[-1])
def test_every_flag_has_a_help_line(action):
    assert action.help and action.help.strip() and "\n" not in action.help


def test_flags_and_defaults_are_the_frozen_ones():
    assert [(tuple(action.option_strings), action.default) for action in actions()] == FLAGS


def test_the_networks_to_choose_from_are_the_frozen_ones():
    [choices] = [action.choices for action in actions() if action.option_strings == ["--arch"]]
    assert list(choices) == ["resnet18", "narrow"]


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


# presets and settled defaults -------------------------------------------------------------------------------------------


OURS = [name for name, section in cli.read_presets(PRESETS).items() if "script" not in section]
OTHERS = [name for name in cli.read_presets(PRESETS) if name not in OURS]


@pytest.mark.parametrize("name", OURS)
def test_every_preset_of_the_script_parses_and_its_values_arrive(name):
    section = cli.read_presets(PRESETS)[name]
    args = vars(parse_args(["--preset", name]))
    assert section
    assert {flag: args.get(flag) for flag in section} == section


@pytest.mark.parametrize("name", [name for name in OURS if not name.startswith("claims/")])
def test_the_name_of_a_preset_ends_in_its_selection_and_its_loss(name):
    args = parse_args(["--preset", name])
    assert name.split("/")[2] == args.selection + (f"-{args.loss}" if args.loss != "ce" else "")


@pytest.mark.parametrize("name", OTHERS)
def test_presets_of_the_other_script_are_refused(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", name])
    assert stop.value.code == 2
    assert f"preset {name} is for Train_webvision.py, not for Train_cifar.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "ema_mode"),
    [
        ([], "persist"),
        (["--fidelity", "paper"], "persist"),
        (["--fidelity", "released"], "released"),
        (["--fidelity", "released", "--ema_mode", "persist"], "persist"),
        (["--ema_mode", "persist", "--fidelity", "released"], "persist"),
        (["--ema_mode", "released"], "released"),
    ],
)
def test_fidelity_decides_ema_mode_unless_it_is_typed(argv, ema_mode):
    assert parse_args(argv).ema_mode == ema_mode


@pytest.mark.parametrize(
    ("argv", "count"),
    [
        ([], 300),
        (["--dataset", "digits"], 9),
        (["--dataset", "digits", "--min_draw_count", "0"], 0),
        (["--dataset", "cifar100", "--min_draw_count", "30"], 30),
    ],
)
def test_the_draw_count_follows_the_data_set_unless_it_is_typed(argv, count):
    assert parse_args(argv).min_draw_count == count


def test_a_noise_file_means_given_labels():
    assert parse_args(["--noise_file", "labels.npy"]).noise_mode == "given"


@pytest.mark.parametrize(
    ("argv", "weights"),
    [
        ([], (0.1, 1)),
        (["--dataset", "digits"], (0.1, 1)),
        (["--dataset", "cifar100"], (6, 0.1)),
        (["--dataset", "cifar100", "--sce_ce", "0.5"], (0.5, 0.1)),
        (["--dataset", "cifar100", "--sce_rce", "2"], (6, 2)),
        (["--sce_ce", "0"], (0, 1)),
        (["--sce_rce", "0"], (0.1, 0)),
    ],
)
def test_the_weights_of_sce_follow_the_data_set_unless_they_are_typed(argv, weights):
    args = parse_args(argv)
    assert (args.sce_ce, args.sce_rce) == weights


def test_the_choices_of_selection_and_loss_are_the_frozen_ones():
    choices = {action.option_strings[-1]: action.choices for action in actions() if action.choices}
    assert choices["--selection"] == ["sfa", "gmm", "none"]
    assert choices["--loss"] == ["ce", "ldam", "gce", "sce", "logit_adjusted", "balanced_softmax"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ce", losses.cross_entropy),
        ("ldam", partial(robust_losses.ldam, largest_margin=0.5, scale=30)),
        ("ldam --ldam_margin 0.2", partial(robust_losses.ldam, largest_margin=0.2, scale=30)),
        ("ldam --ldam_scale 5", partial(robust_losses.ldam, largest_margin=0.5, scale=5)),
        ("gce", partial(robust_losses.generalised_cross_entropy, q=0.7)),
        ("gce --gce_q 1", partial(robust_losses.generalised_cross_entropy, q=1)),
        ("sce", partial(robust_losses.symmetric_cross_entropy, ce_weight=0.1, rce_weight=1)),
        (
            "sce --dataset cifar100",
            partial(robust_losses.symmetric_cross_entropy, ce_weight=6, rce_weight=0.1),
        ),
        ("sce --sce_ce 2", partial(robust_losses.symmetric_cross_entropy, ce_weight=2, rce_weight=1)),
        ("sce --sce_rce 3", partial(robust_losses.symmetric_cross_entropy, ce_weight=0.1, rce_weight=3)),
        ("logit_adjusted", robust_losses.balanced_softmax),
        ("logit_adjusted --adjustment_tau 0.5", partial(robust_losses.logit_adjusted, tau=0.5)),
        ("balanced_softmax", robust_losses.balanced_softmax),
    ],
)
def test_the_loss_asked_for_is_the_one_trained_with_and_its_flags_arrive(words, expected):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    given = (logits, targets, torch.tensor([50, 9, 2]))
    loss = robust_losses.standard_loss(parse_args(["--loss", *words.split()]))
    torch.testing.assert_close(loss(*given), expected(*given))


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("", "SFA"),
        ("--selection gmm", "GMM"),
        ("--selection none", "no selection"),
        ("--loss ldam", "SFA + LDAM"),
        ("--loss gce", "SFA + GCE"),
        ("--loss sce", "SFA + SCE"),
        ("--loss logit_adjusted", "SFA + logit adjustment"),
        ("--selection gmm --loss balanced_softmax", "GMM + balanced softmax"),
        ("--selection none --loss gce", "no selection + GCE"),
    ],
)
def test_results_name_the_selection_and_the_loss(words, method):
    assert Train_cifar.method(parse_args(words.split())) == method


def test_the_run_directory_names_what_differs_from_the_defaults_of_the_data_set():
    always = "dataset_cifar100-imb_type_exp-imb_factor_0.01-noise_mode_imb-noise_ratio_0.5-seed_123"
    for words, name in (
        ("", ""),
        ("--sce_ce 6", ""),
        ("--selection gmm --loss sce", "-loss_sce-selection_gmm"),
    ):
        args = parse_args(["--dataset", "cifar100", *words.split()])
        assert cifar_directory(args) == always + name


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ("", 0),
        ("--warm_up 200", 1),
        ("--warm_up 200 --selection gmm", 1),
        ("--warm_up 200 --selection none", 0),
        ("--lr_drop 200 --selection none", 1),
    ],
)
def test_a_warm_up_to_the_end_is_said_unless_nothing_is_to_be_selected(words, notes, capsys):
    note_schedule(parse_args(words.split()))
    assert capsys.readouterr().out.count("note: ") == notes


# refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--noise_ratio", "nan", "--noise_ratio: .*got nan"),
        ("--noise_ratio", "1.5", "--noise_ratio: .*got 1.5"),
        ("--noise_mode", "asym", "--noise_mode: .*asym.*choose from .*imb.*sym"),
        ("--noise_mode", "given", "--noise_mode given: .*--noise_file"),  # digits bring no noisy labels
        ("--noise_file", "nosuch.npy", "--noise_file nosuch.npy"),
        ("--imb_factor", "2", "--imb_factor: .*got 2"),
        ("--imb_factor", "0", "--imb_factor: .*got 0"),
        ("--imb_type", "linear", "--imb_type: .*linear.*choose from .*exp.*step"),
        ("--dataset", "nosuch", "nosuch: choose from .*cifar10"),
        ("--p_threshold", "-1", "--p_threshold: .*got -1"),
        ("--beta", "1.01", "--beta: .*got 1.01"),
        ("--phi", "0", "--phi: .*got 0"),
        ("--lr", "inf", "--lr.*: .*got inf"),
        ("--T", "0", "--T: .*got 0"),
        ("--num_epochs", "0", "--num_epochs: .*got 0"),
        ("--batch_size", "0", "--batch_size: .*got 0"),
        ("--warm_up", "0", "--warm_up: .*got 0"),
        ("--min_draw_count", "-3", "--min_draw_count: .*got -3"),
        ("--seed", "4294967296", "--seed: .*got 4294967296"),
        ("--preset", "nosuch", "preset nosuch: choose from .*embedded/"),
        ("--fidelity", "both", "--fidelity: .*both.*choose from .*paper.*released"),
        ("--resume", "30", "--resume: .*30.*choose from .*auto.*never"),
        ("--selection", "dividemix", "--selection: .*dividemix.*choose from .*sfa.*gmm.*none"),
        (
            "--loss",
            "focal",
            "--loss: .*focal.*choose from .*ce.*ldam.*gce.*sce.*logit_adjusted.*balanced_softmax",
        ),
        ("--gce_q", "2", "--gce_q: .*got 2"),
        ("--gce_q", "0", "--gce_q: .*got 0"),
        ("--ldam_margin", "-0.5", "--ldam_margin: .*got -0.5"),
        ("--ldam_scale", "0", "--ldam_scale: .*got 0"),
        ("--sce_ce", "-1", "--sce_ce: .*got -1"),
        ("--sce_rce", "nan", "--sce_rce: .*got nan"),
        ("--adjustment_tau", "0", "--adjustment_tau: .*got 0"),
    ],
)
def test_a_bad_value_ends_in_status_2_and_one_line_naming_it(flag, value, line, tmp_path, capsys):
    out = tmp_path / "run"
    # what would end soon if it were not refused
    argv = ["--dataset", "digits", "--num_epochs", "1", "--limit_train", "32", "--out", str(out), flag, value]
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(Train_cifar.main, argv)
    assert stop.value.code == 2
    assert re.fullmatch(rf"[^\n]*error: [^\n]*{line}[^\n]*\n", capsys.readouterr().err)
    assert not out.exists()
