"""The command line of afm/train.py: the release's flags, ours, and what is refused before anything is written."""

import re
from pathlib import Path

import pytest

from afm import train
from afm.data import FOLDERS
from afm.flags import PRESETS, make_parser, method, parse_args
from common.runs import cli

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--dataset",), "food"),
    (("--data-root",), None),
    (("--train-on",), "noisy"),
    (("--noise-type",), "symmetric"),
    (("--noise-rate",), 0.5),
    (("--posterior",), None),
    (("--on_bad_image",), "error"),
    (("--image-cache",), None),
    (("--workers",), 4),
    (("--network",), "resnet50"),
    (("--pretrained",), None),
    (("--shared-classifier", "--no-shared-classifier"), True),
    (("--group-size",), 2),
    (("--group-rounds",), None),
    (("--group-order",), None),
    (("--pair-chunks",), None),
    (("--interaction",), "sum"),
    (("--attention",), None),
    (("--attn-hidden",), 0),
    (("--weights",), "attentive"),
    (("--mix-alpha",), 1.0),
    (("--mix-target",), None),
    (("--detach-target",), False),
    (("--mix-at",), "feature"),
    (("--weight-mixed",), None),
    (("--weight-plain",), None),
    (("--lam",), None),
    (("--lam-scale",), 2.0),
    (("--weight-naive",), None),
    (("--weight-afm",), None),
    (("--train-batch",), 256),
    (("--test-batch",), 200),
    (("--lr",), 0.01),
    (("--schedule",), [15, 25]),
    (("--gamma",), 0.1),
    (("--epochs",), 30),
    (("--finetune-epochs",), 5),
    (("--finetune-lr",), 0.001),
    (("--momentum",), 0.9),
    (("--weight-decay",), 0.0001),
    (("--sync-bn", "--no-sync-bn"), None),
    (("--save-every",), 0),
    (("--checkpoint",), None),
    (("--device_ids",), None),
    (("--out",), None),
    (("--seed",), 0),
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
NETWORKS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "preact_resnet18", "preact_narrow"]

# the release's flags: option, default there, a typed value and what it is read as
RELEASED = [
    ("--network", "resnet50", "resnet152", "resnet152"),
    ("--train-batch", 256, "128", 128),
    ("--test-batch", 200, "100", 100),
    ("--lr", 0.01, "0.1", 0.1),
    ("--schedule", [15, 25], "10", [10]),
    ("--epochs", 30, "40", 40),
    ("--workers", 4, "0", 0),
    ("--gamma", 0.1, "0.5", 0.5),
    ("--momentum", 0.9, "0", 0.0),
    ("--weight-decay", 1e-4, "5e-4", 5e-4),
    ("--dataset", "food", "food", "food"),
]


def actions() -> list:
    return make_parser()._actions


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


def test_the_released_schedule_takes_several_epochs():
    assert parse_args(["--schedule", "5", "10", "20"]).schedule == [5, 10, 20]


def test_the_released_data_folder_is_the_default():
    assert parse_args([]).data_root is None
    assert FOLDERS["food"] == "./data/food"
    assert parse_args(["--data-root", "elsewhere"]).data_root == "elsewhere"


def test_the_released_checkpoint_flag_is_a_name_for_out():
    assert parse_args([]).out is None
    args = parse_args(["--checkpoint", "here"])
    assert (args.out, args.checkpoint) == ("here", None)
    assert parse_args(["--checkpoint", "here", "--out", "there"]).out == "there"


def test_the_released_devices_are_those_cuda_sees(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    digits = [
        "--dataset",
        "digits",
        "--limit_train",
        "8",
        "--train-batch",
        "8",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    train.main([*digits, "--out", str(tmp_path / "all")])
    assert train.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    train.main([*digits, "--device_ids", "0,3", "--out", str(tmp_path / "two")])
    assert train.os.environ["CUDA_VISIBLE_DEVICES"] == "0,3"


def test_help_exits_0_and_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [option for action in actions() for option in action.option_strings if option not in text] == []


# the weights of the losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "mixed", "plain"),
    [
        ([], 1.5, 0.5),
        (["--weight-mixed", "2"], 2.0, 0.5),
        (["--weight-plain", "0"], 1.5, 0.0),
        (["--lam", "0.75"], 1.5, 0.5),
        (["--lam", "1"], 2.0, 0.0),
        (["--lam", "0"], 0.0, 2.0),
        (["--lam", "0.25", "--lam-scale", "1"], 0.25, 0.75),
        (["--lam-scale", "1"], 1.5, 0.5),
        (["--weight-naive", "3"], 3.0, 0.5),
        (["--weight-afm", "3"], 1.5, 3.0),
        (["--weight-naive", "0", "--weight-afm", "1"], 0.0, 1.0),
        (["--weight-naive", "3", "--weight-plain", "1"], 3.0, 1.0),
    ],
)
def test_the_weights_of_the_losses(argv, mixed, plain):
    for fidelity in ("paper", "released"):
        args = parse_args([*argv, "--fidelity", fidelity])
        assert (args.weight_mixed, args.weight_plain) == (mixed, plain)


def test_ways_to_say_the_same_are_the_same_run():
    said = [
        ["--lam", "0.5"],
        ["--weight-mixed", "1", "--weight-plain", "1"],
        ["--weight-naive", "1", "--weight-afm", "1"],
    ]
    assert len({str(vars(parse_args(argv))) for argv in said}) == 1


def test_the_swapped_names_say_so_once(capsys):
    parse_args(["--weight-naive", "1.5", "--weight-afm", "0.5"])
    mixed, plain = capsys.readouterr().out.splitlines()
    assert "--weight-naive scales the mixed loss" in mixed and "--weight-mixed" in mixed
    assert "--weight-afm scales the plain loss" in plain and "--weight-plain" in plain
    parse_args(["--weight-mixed", "1.5"])
    assert capsys.readouterr().out == ""


def test_a_run_says_it_once(tmp_path, capsys):
    digits = [
        "--dataset",
        "digits",
        "--limit_train",
        "8",
        "--train-batch",
        "8",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    train.main([*digits, "--weight-naive", "1", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("--weight-naive scales") == 1


# presets and settled defaults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.read_presets(PRESETS))
def test_every_preset_parses_and_its_values_arrive(name):
    section = cli.read_presets(PRESETS)[name]
    found = vars(parse_args(["--preset", name]))
    assert section
    expected = {flag.replace("-", "_"): value for flag, value in section.items()}
    if "lam" in expected:
        lam = expected.pop("lam")
        expected |= {"weight_mixed": 2 * lam, "weight_plain": 2 * (1 - lam)}
    if "epochs" in expected:
        expected["num_epochs"] = expected.pop("epochs")
    assert {flag: found.get(flag) for flag in expected} == expected


def test_a_typed_flag_wins_over_the_presets():
    args = parse_args(["--lr", "0.2", "--preset", "embedded/digits-sym0.5/afm-k3", "--group-size", "4"])
    assert (args.lr, args.group_size, args.dataset) == (0.2, 4, "digits")


PAPER = {"attention": "relu-sigmoid", "mix_target": "soft", "group_order": "random", "group_rounds": 4}
PAPER |= {"pair_chunks": 1, "sync_bn": True}
RELEASE = {"attention": "complement", "mix_target": "both", "group_order": "halves", "group_rounds": 1}
RELEASE |= {"pair_chunks": 1, "sync_bn": False}
MIXUP = "--mix-at input --weights random --lam 1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", PAPER),
        ("--fidelity paper", PAPER),
        ("--fidelity released", RELEASE),
        ("--fidelity released --attention sigmoid", RELEASE | {"attention": "sigmoid"}),
        ("--mix-target soft --fidelity released", RELEASE | {"mix_target": "soft"}),
        ("--fidelity released --pair-chunks 8", RELEASE | {"pair_chunks": 8}),
        ("--fidelity released --sync-bn", RELEASE | {"sync_bn": True}),
        ("--fidelity released --group-rounds 3", RELEASE | {"group_rounds": 3}),
        (
            "--attention complement --mix-target both --no-sync-bn --group-order halves --group-rounds 1",
            RELEASE,
        ),
        (MIXUP, PAPER | {"group_order": "halves", "group_rounds": 1}),
        (f"{MIXUP} --group-rounds 1", PAPER | {"group_order": "halves", "group_rounds": 1}),
    ],
)
def test_fidelity_decides_unless_a_flag_is_typed(words, expected):
    args = vars(parse_args(words.split()))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("fidelity", "chunks"), [("paper", 1), ("released", 8)])
def test_under_torchrun_the_releases_pairs_are_inside_each_processs_piece(fidelity, chunks, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert parse_args(["--fidelity", fidelity]).pair_chunks == chunks
    assert parse_args(["--fidelity", fidelity, "--group-order", "random"]).pair_chunks == 1
    halves = ["--group-order", "halves", "--pair-chunks", "2"]
    assert parse_args(["--fidelity", fidelity, *halves]).pair_chunks == 2


@pytest.mark.parametrize(
    ("argv", "pretrained"),
    [
        ([], "imagenet"),
        (["--dataset", "clothing1m"], "imagenet"),
        (["--dataset", "cifar10"], "none"),
        (["--dataset", "digits"], "none"),
        (["--pretrained", "none"], "none"),
        (["--dataset", "cifar10", "--pretrained", "here.pt"], "here.pt"),
    ],
)
def test_initial_weights_follow_the_data_set_unless_typed(argv, pretrained):
    assert parse_args(argv).pretrained == pretrained


@pytest.mark.parametrize(
    ("argv", "noise_type"),
    [
        ([], "given"),
        (["--dataset", "clothing1m"], "given"),
        (["--dataset", "digits"], "symmetric"),
        (["--dataset", "digits", "--noise_file", "labels.npy"], "given"),
    ],
)
def test_the_noise_of_files_is_given(argv, noise_type):
    assert parse_args(argv).noise_type == noise_type


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "AFM (K=2)"),
        (["--group-size", "3"], "AFM (K=3)"),
        (["--lam", "0"], "CE"),
        (["--weights", "uniform"], "feature mixup, uniform weights (K=2)"),
        (["--weights", "random", "--group-size", "4"], "feature mixup, random weights (K=4)"),
        (["--detach-target", "--interaction", "concat"], "AFM (K=2, detach_target True, interaction concat)"),
        (
            ["--attention", "sigmoid", "--group-order", "halves", "--group-rounds", "1"],
            "AFM (K=2, attention sigmoid, group_order halves, group_rounds 1)",
        ),
        (
            ["--weights", "uniform", "--group-rounds", "2"],
            "feature mixup, uniform weights (K=2, group_rounds 2)",
        ),
        (["--fidelity", "released", "--group-rounds", "4"], "AFM (K=2, group_rounds 4)"),
        (["--fidelity", "released"], "AFM (K=2)"),
        (["--fidelity", "released", "--mix-target", "soft"], "AFM (K=2, mix_target soft)"),
        (["--weights", "random", "--lam", "1", "--mix-at", "input"], "mixup"),
    ],
)
def test_the_method_is_named_after_what_is_left_of_it(argv, name):
    assert method(parse_args(argv)) == name


def test_the_readme_names_the_presets_it_shows():
    text = (PRESETS.parent / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"--preset ([a-z0-9/.+-]+)", text))
    assert shown
    assert shown <= set(cli.read_presets(PRESETS))


# the learning rate and the name of the directory ------------------------------------------------------------------------


def test_the_learning_rate_of_the_release_and_of_fine_tuning():
    rates = [train.learning_rate(parse_args([]), epoch) for epoch in range(1, 31)]
    assert rates == pytest.approx([0.01] * 15 + [0.001] * 10 + [0.0001] * 5)
    args = parse_args(["--preset", "clothing1m/noisy+clean/afm", "--finetune-lr", "0.5"])
    rates = [train.learning_rate(args, epoch) for epoch in range(1, 21)]
    assert rates == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.0001] * 5 + [0.5] * 5)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "dataset_food-seed_0"),
        (["--dataset", "digits", "--seed", "3"], "dataset_digits-noise_type_symmetric-noise_rate_0.5-seed_3"),
        (["--fidelity", "released"], "dataset_food-fidelity_released-seed_0"),
        (["--dataset", "clothing1m", "--lr", "0.1"], "dataset_clothing1m-train_on_noisy-seed_0-lr_0.1"),
    ],
)
def test_the_run_directory_says_what_was_run(argv, name):
    assert train.directory_name(parse_args(argv)) == name


def test_the_place_of_the_data_is_no_part_of_what_was_run(tmp_path):
    here, there = (parse_args(["--data-root", str(tmp_path / name)]) for name in ("a", "b"))
    assert train.directory_name(here) == train.directory_name(there) == "dataset_food-seed_0"


# refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--group-size 1", "--group-size: .*at least 2.*got 1"),
        ("--group-size 3 --fidelity released", "--group-size: .*got 3.*--attention relu-sigmoid"),
        ("--group-size 3 --attention complement", "--group-size: .*got 3"),
        ("--train-on noisy+clean", "--train-on: .*clothing1m.*digits"),
        ("--train-on clean", "--train-on: .*clean.*choose from"),
        (
            "--dataset clothing1m --train-on noisy+clean --finetune-epochs 1",
            "--finetune-epochs: .*below --epochs 1",
        ),
        ("--lam 0.5 --weight-mixed 1", "--lam: .*--weight-mixed"),
        ("--lam 0.5 --weight-afm 1", "--lam: .*--weight-plain"),
        ("--lam 1.1", "--lam: .*got 1.1"),
        ("--lam-scale 0", "--lam-scale: .*got 0"),
        ("--weight-naive 1 --weight-mixed 1", "--weight-naive: .*--weight-mixed"),
        ("--weight-afm 1 --weight-plain 1", "--weight-afm: .*--weight-plain"),
        ("--weight-mixed 0 --weight-plain 0", "--weight-plain: .*both"),
        ("--weight-mixed -1", "--weight-mixed: .*got -1"),
        ("--mix-at input", "--mix-at: .*--weights random"),
        ("--mix-at input --weights random", "--mix-at: .*--lam 1"),
        ("--mix-at input --weights random --lam 1 --group-size 3", "--mix-at: .*--group-size 2"),
        ("--mix-alpha 0", "--mix-alpha: .*got 0"),
        ("--interaction max", "--interaction: .*max.*choose from .*sum.*concat.*mul"),
        ("--attention tanh", "--attention: .*tanh.*choose from .*sigmoid"),
        ("--mix-target hard", "--mix-target: .*hard.*choose from .*soft.*both"),
        ("--weights equal", "--weights: .*equal.*choose from .*attentive"),
        ("--group-order quarters", "--group-order: .*quarters.*choose from .*halves"),
        ("--pair-chunks 0", "--pair-chunks: .*got 0"),
        ("--pair-chunks 2", "--pair-chunks: 2 pieces .*--group-order halves"),
        (f"{MIXUP} --group-rounds 2", "--mix-at: .*--group-rounds 2"),
        (f"{MIXUP} --group-order random", "--mix-at: .*--group-order random"),
        ("--network resnet20", "--network: .*resnet20.*choose from .*resnet18.*preact_resnet18"),
        (
            "--network preact_resnet18 --pretrained imagenet",
            "--pretrained imagenet: .*--network preact_resnet18; use a path or none",
        ),
        (
            "--network preact_narrow --pretrained imagenet",
            "--pretrained imagenet: .*--network preact_narrow; use a path or none",
        ),
        ("--noise-rate nan", "--noise-rate: .*got nan"),
        ("--noise-type web", "--noise-type: .*web.*choose from"),
        ("--noise-type given", "--noise-type given: .*--noise_file"),
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy"),
        ("--dataset nosuch", "nosuch"),
        ("--dataset food --data-root /nosuch", "/nosuch"),
        ("--train-batch 0", "--train-batch: .*got 0"),
        ("--train-batch 33", "--train-batch 33: there are only 32"),
        ("--schedule 0", "--schedule: .*got 0"),
        ("--schedule ten", "--schedule: .*got ten"),
        ("--gamma 0", "--gamma: .*got 0"),
        ("--lr inf", "--lr: .*got inf"),
        ("--momentum 2", "--momentum: .*got 2"),
        ("--epochs 0", "--epochs: .*got 0"),
        ("--workers -1", "--workers: .*got -1"),
        ("--on_bad_image ignore", "--on_bad_image: .*ignore.*choose from"),
        ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        ("--fidelity both", "--fidelity: .*both.*choose from"),
        ("--weight-deca 1", "unrecognized arguments: --weight-deca"),
        ("--seed 4294967296", "--seed: .*got 4294967296"),
        ("--pretrained nosuch.pt", "--pretrained nosuch.pt: no such file"),
        pytest.param(
            "--pretrained imagenet",
            "--pretrained imagenet",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_status_2_and_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what would end soon if it were not refused
    small = ["--limit_train", "32", "--train-batch", "32", "--epochs", "1"]
    argv = ["--dataset", "digits", *small, "--device", "cpu", "--out", "run"]
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(train.main, [*argv, *words.split()])
    assert stop.value.code == 2
    assert re.fullmatch(rf"[^\n]*error: [^\n]*{line}[^\n]*\n", capsys.readouterr().err)
    assert not Path("run").exists()


def test_mixup_of_inputs_is_refused_under_torchrun(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        parse_args(["--mix-at", "input", "--weights", "random", "--lam", "1"])
    assert stop.value.code == 2
    assert "runs in one process" in capsys.readouterr().err
