"""The command line of Train_webvision.py: the release's flags, ours, how processes share the work, and what is refused."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import datasets
from common.datasets.image_cache import build_caches
from common.gpu import processes
from common.runs import cli
from common.runs.cli import UserError
from sfa import Train_webvision, webvision
from sfa.flags import PRESETS
from sfa.flags import webvision_cell as cell
from sfa.flags import webvision_directory as directory_name
from sfa.learners import start_two_processes as start_both
from sfa.Train_webvision import make_parser, parse_args
from tests.common.small_file_data import image_files, make_webvision, plant

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

# frozen: a change of a name or a default is a change for every user
FLAGS = [
    (("-h", "--help"), "==SUPPRESS=="),
    (("--data_path",), "./webvision/"),
    (("--imagenet",), None),
    (("--num_class",), 50),
    (("--imb_type",), "exp"),
    (("--imb_factor",), 1),
    (("--image_size",), 299),
    (("--on_bad_image",), "error"),
    (("--image_cache",), None),
    (("--workers",), 8),
    (("--network",), "inception_resnet_v2"),
    (("--feat_size",), 1536),
    (("--batch_size",), 32),
    (("--lr", "--learning_rate"), 0.01),
    (("--lr_drop",), 50),
    (("--num_epochs",), 100),
    (("--alpha",), 0.5),
    (("--lambda_u",), 0),
    (("--T",), 0.5),
    (("--reset_momentum",), None),
    (("--gpuid1",), 0),
    (("--gpuid2",), 1),
    (("--parallel",), None),
    (("--p_threshold",), 0.5),
    (("--beta",), 0.9),
    (("--phi",), 1.005),
    (("--sample_rate",), 1),
    (("--min_draw_count",), 0),
    (("--ema_mode",), None),
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
    ("--batch_size", 32, "16", 16),
    ("--lr", 0.01, "0.1", 0.1),
    ("--learning_rate", 0.01, "0.1", 0.1),
    ("--alpha", 0.5, "4", 4.0),
    ("--lambda_u", 0, "25", 25.0),
    ("--p_threshold", 0.5, "0.6", 0.6),
    ("--T", 0.5, "0.3", 0.3),
    ("--num_epochs", 100, "3", 3),
    ("--seed", 123, "7", 7),  # untyped in the release
    ("--gpuid1", 0, "2", 2),
    ("--gpuid2", 1, "3", 3),
    ("--num_class", 50, "10", 10),
    ("--data_path", "./webvision/", "elsewhere", "elsewhere"),
    ("--feat_size", 1536, "512", 512),
]

QUICK = (
    "--num_class 3 --network resnet18 --image_size 64 --batch_size 2 --num_epochs 1 --device cpu --workers 0"
)


SCRIPT = "Train_webvision.py"


def actions() -> list:
    return make_parser()._actions


@pytest.fixture(autouse=True)
def by_python_without_a_card(monkeypatch):
    """As on a machine without cards, where nobody started torchrun."""
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    cards(monkeypatch, 0)


def cards(monkeypatch, count: int) -> None:
    """As on a machine with so many cards."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def by_torchrun(monkeypatch, count: int) -> None:
    """As one of so many processes."""
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", str(count)), ("RANK", "0")):
        monkeypatch.setenv(name, value)


# the command line -----------------------------------------------------------------------------------------------------


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


OURS = [name for name, section in cli.read_presets(PRESETS).items() if section.get("script") == SCRIPT]


@pytest.mark.parametrize("name", OURS)
def test_every_preset_of_the_script_parses_and_its_values_arrive(name):
    section = cli.read_presets(PRESETS)[name]
    args = vars(parse_args(["--preset", name]))
    assert section.pop("script") == SCRIPT
    assert {flag: args.get(flag) for flag in section} == section


@pytest.mark.parametrize(
    ("words", "ema_mode", "reset_momentum"),
    [
        ("", "persist", "no"),
        ("--fidelity paper", "persist", "no"),
        ("--fidelity released", "released", "yes"),
        ("--fidelity released --ema_mode persist", "persist", "yes"),
        ("--reset_momentum no --fidelity released", "released", "no"),
        ("--ema_mode released", "released", "no"),
        ("--reset_momentum yes", "persist", "yes"),
    ],
)
def test_fidelity_decides_what_is_not_typed(words, ema_mode, reset_momentum):
    args = parse_args(words.split())
    assert (args.ema_mode, args.reset_momentum) == (ema_mode, reset_momentum)


def test_the_run_directory_is_named_after_what_differs(monkeypatch):
    assert directory_name(parse_args([])) == "webvision-seed_123"
    released = parse_args(["--fidelity", "released", "--T", "0.4", "--seed", "3"])
    assert directory_name(released) == "webvision-fidelity_released-seed_3-T_0.4"
    kept = parse_args(["--fidelity", "released", "--reset_momentum", "no"])
    assert directory_name(kept) == "webvision-fidelity_released-seed_123-reset_momentum_no"
    # not after the processes or cards, so that a run can go on with others
    cards(monkeypatch, 4)
    assert directory_name(parse_args(["--gpuid1", "2", "--gpuid2", "3"])) == "webvision-seed_123"
    by_torchrun(monkeypatch, 2)
    assert directory_name(parse_args(["--parallel", "networks"])) == "webvision-seed_123"


def test_the_profile_is_that_of_the_paper_only_where_nothing_is_shortened():
    assert cell(parse_args([])) == {
        "dataset": "webvision", "noise_type": "real", "noise_rate": None, "imb_factor": None, "ood_ratio": None,
        "profile": "paper",
    }  # fmt: skip
    for words in (
        "--T 0.4",
        "--num_epochs 101",
        "--fidelity released",
        "--image_size 331",
        "--imb_type step",
    ):
        assert cell(parse_args(words.split()))["profile"] == "paper", words
    for words in ("--num_epochs 99", "--num_class 49", "--image_size 298", "--network resnet50"):
        assert cell(parse_args(words.split()))["profile"] == "short", words
    long_tailed = cell(parse_args(["--imb_factor", "0.1", "--noise_file", "a/own.npy"]))
    assert (long_tailed["imb_factor"], long_tailed["profile"]) == (0.1, "short")
    assert long_tailed["noise_type"] == "own.npy"


# how processes share the work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words", "parallel"),
    [
        (0, "", "none"),
        (1, "", "none"),
        (2, "", "networks"),
        (2, "--device cuda", "networks"),
        (2, "--device cpu", "none"),
        (2, "--gpuid2 2", "none"),
        (2, "--gpuid1 2 --gpuid2 0", "none"),
        (4, "--gpuid1 3 --gpuid2 2", "networks"),
        (4, "--gpuid1 1", "none"),  # twice the same
        (2, "--parallel none", "none"),
        (0, "--parallel networks", "networks"),
        (1, "--parallel networks --device cpu", "networks"),
    ],
)
def test_each_of_two_cards_trains_a_network_if_both_are_there(count, words, parallel, monkeypatch):
    cards(monkeypatch, count)
    assert parse_args(words.split()).parallel == parallel


@pytest.mark.parametrize(("words", "parallel"), [("", "data"), ("--parallel networks", "networks")])
def test_under_torchrun_all_processes_train_both_networks_unless_asked(words, parallel, monkeypatch):
    by_torchrun(monkeypatch, 2)
    cards(monkeypatch, 2)
    assert parse_args(words.split()).parallel == parallel


def test_a_single_process_of_torchrun_is_one_process(monkeypatch):
    by_torchrun(monkeypatch, 1)
    assert parse_args([]).parallel == "none"


def executed(monkeypatch, *argv: str) -> tuple[str, list[str], dict[str, str]]:
    """What `start_both` becomes."""
    seen = []
    monkeypatch.setattr(os, "execve", lambda *arguments: seen.append(arguments))
    start_both(parse_args(list(argv)), list(argv))
    [(program, command, environment)] = seen
    return program, command, environment


def test_two_processes_are_started_by_this_command_under_torchrun(monkeypatch):
    cards(monkeypatch, 2)
    argv = ["--lr", "0.02", "--data_path", "a folder/"]
    program, command, environment = executed(monkeypatch, *argv)
    script = Path(Train_webvision.__file__).resolve()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert program == sys.executable
    assert command == [*launcher, str(script), *argv]
    assert environment == {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    ("visible", "count", "words", "expected"),
    [
        (None, 2, "", "0,1"),
        (None, 4, "--gpuid1 3 --gpuid2 1", "3,1"),
        ("5,2,7", 3, "", "5,2"),
        ("5,2,7", 3, "--gpuid1 2 --gpuid2 0", "7,5"),
        ("GPU-ab,GPU-cd", 2, "--gpuid1 1 --gpuid2 0", "GPU-cd,GPU-ab"),
        # what is hidden stays hidden, where the processes are to run on the CPU
        ("", 0, "--parallel networks", ""),
        ("-1", 0, "--parallel networks", "-1"),
        ("3", 1, "--parallel networks --device cpu", "3"),
    ],
)
def test_the_two_cards_are_those_of_gpuid1_and_gpuid2_among_the_visible_ones(
    visible, count, words, expected, monkeypatch
):
    cards(monkeypatch, count)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert executed(monkeypatch, *words.split())[2]["CUDA_VISIBLE_DEVICES"] == expected


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> Path:
    """mini-WebVision of 12 images of three classes; two of each class in both test sets."""
    make_webvision(tmp_path / "data", classes=3, per_class=4)
    return tmp_path / "data"


def refused(argv: list[str], capsys) -> str:
    """The one line that the script ends with, and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(Train_webvision.main, argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--num_class 1", "--num_class: WebVision has 1000 classes, 2 at least are needed, got 1 "),
        ("--num_class 1001", "--num_class: WebVision has 1000 classes, 2 at least are needed, got 1001"),
        ("--imb_factor 2", "--imb_factor: must be at most 1, got 2"),
        ("--imb_factor 0", "--imb_factor: must be > 0, got 0"),
        ("--imb_type linear", "--imb_type: .*linear.*choose from .*exp.*step"),
        ("--image_size 32", "--image_size: must be at least 33 for resnet18, got 32"),
        ("--image_size 32 --network resnet50", "--image_size: must be at least 33 for resnet50, got 32"),
        (
            "--image_size 106 --network inception_resnet_v2",
            "--image_size: must be at least 107 for inception_resnet_v2, got 106",
        ),
        ("--network resnet34", "--network: .*resnet34.*choose from .*inception_resnet_v2.*resnet50.*resnet18"),
        ("--on_bad_image guess", "--on_bad_image: .*guess.*choose from .*error.*skip"),
        ("--workers -1", "--workers: must be >= 0, got -1"),
        ("--feat_size 0", "--feat_size: must be at least 1, got 0"),
        ("--batch_size 0", "--batch_size: must be at least 1, got 0"),
        ("--lr 0", "--lr.*: must be > 0, got 0"),
        ("--lr inf", "--lr.*: .*got inf"),
        ("--lr_drop 0", "--lr_drop: must be at least 1, got 0"),
        ("--num_epochs 0", "--num_epochs: must be at least 1, got 0"),
        ("--alpha 0", "--alpha: must be > 0, got 0"),
        ("--lambda_u -1", "--lambda_u: must be >= 0, got -1"),
        ("--T 0", "--T: must be > 0, got 0"),
        ("--reset_momentum maybe", "--reset_momentum: .*maybe.*choose from .*yes.*no"),
        ("--gpuid1 -1", "--gpuid1: must be >= 0, got -1"),
        ("--gpuid2 x", "--gpuid2: must be a whole number, got x"),
        ("--parallel all", "--parallel: .*all.*choose from .*none.*networks.*data"),
        ("--parallel data", "--parallel: data needs several processes: start the script with torchrun"),
        ("--p_threshold 1.5", "--p_threshold: must be between 0 and 1, got 1.5"),
        ("--beta -0.1", "--beta: must be between 0 and 1, got -0.1"),
        ("--phi 0", "--phi: must be > 0, got 0"),
        ("--sample_rate 0", "--sample_rate: must be at least 1, got 0"),
        ("--min_draw_count -1", "--min_draw_count: must be >= 0, got -1"),
        ("--ema_mode none", "--ema_mode: .*none.*choose from .*persist.*released"),
        ("--seed -1", "--seed: .*got -1"),
        ("--fidelity both", "--fidelity: .*both.*choose from .*paper.*released"),
        ("--resume 30", "--resume: .*30.*choose from .*auto.*never"),
        ("--preset nosuch", "preset nosuch: choose from "),
        ("--preset embedded/digits-if0.1-imb0.5/sfa", "is for another script of this paper, not for Train_webvision.py"),
        ("--warm_up 2", "unrecognized arguments: --warm_up 2"),
        # what only the data tell
        ("--data_path nosuch", r"webvision not found in .*; looked in .*nosuch for info/train_filelist_google.txt, info/val"),
        ("--imagenet nosuch", r"looked in .*nosuch/val for a folder of each of 3 classes of ILSVRC12.*--imagenet none"),
        ("--num_class 4", "data/imagenet/val for a folder of each of 4 classes.*3 is missing"),
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--noise_file long.npy", "--noise_file long.npy: holds 13 labels, the training set needs 12"),
        ("--noise_file wide.npy", "--noise_file wide.npy: label 3 at position 9 is outside 0..2"),
        ("--image_cache nosuch", "no image cache in nosuch"),
        ("--image_cache caches/64", "image cache in caches/64/train holds 12 images of another list or size"),
        ("--gpuid1 99 --device cuda", "--device cuda: there is no CUDA device 99"),
    ],
)  # fmt: skip
def test_what_cannot_be_ends_in_status_2_and_one_line_naming_it(words, line, root, capsys, monkeypatch):
    monkeypatch.chdir(root.parent)
    np.save("long.npy", np.arange(13) % 3)
    np.save("wide.npy", np.arange(12) // 3)
    if "caches" in words:
        build_caches("caches/64", datasets.load_webvision("data", 3), size=64)
    before = sorted(root.parent.rglob("*"))
    capsys.readouterr()
    found = refused(f"{QUICK} --data_path data --out run {words}".split(), capsys)
    assert re.search(line, found), found
    assert sorted(root.parent.rglob("*")) == before


@pytest.mark.parametrize(("folder", "part"), [("google", "train"), ("val_images_256", "test")])
def test_a_missing_image_is_refused_before_anything_is_written(folder, part, root, capsys):
    plant(image_files(root / folder)[1], "missing")
    before = sorted(root.parent.rglob("*"))
    found = refused([*QUICK.split(), "--data_path", str(root), "--out", str(root.parent / "run")], capsys)
    assert f"of the {part} list" in found and "or use --on_bad_image skip" in found
    assert sorted(root.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("count", "words", "line"),
    [
        (2, "--parallel none", "--parallel: none is one process: start the script with python, not with torchrun"),
        (3, "--parallel networks", "--parallel: networks needs two processes, torchrun started 3"),
        (1, "--parallel data", "--parallel: data needs several processes: start the script with torchrun"),
    ],
)  # fmt: skip
def test_processes_that_do_not_fit_are_refused(count, words, line, tmp_path, capsys, monkeypatch):
    by_torchrun(monkeypatch, count)
    found = refused(f"{QUICK} --out {tmp_path / 'run'} {words}".split(), capsys)
    assert line in found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "words", "which"),
    [
        (1, "--device auto", "0 and 1"),
        (1, "--device cuda", "0 and 1"),
        (0, "--device cuda", "0 and 1"),
        (2, "--device auto --gpuid1 1", "1 and 1"),
        (2, "--device auto --gpuid2 2", "0 and 2"),
    ],
)
def test_two_networks_need_two_cards_where_there_is_one(count, words, which, tmp_path, capsys, monkeypatch):
    """One process would take a card and the other a CPU, and they would never meet."""
    cards(monkeypatch, count)
    found = refused(f"{QUICK} --out {tmp_path / 'run'} --parallel networks {words}".split(), capsys)
    expected = (
        f"--parallel: networks needs two CUDA devices, {which} by --gpuid1 and --gpuid2 (found {count})"
    )
    assert expected in found
    assert not list(tmp_path.iterdir())


def test_what_processes_cannot_share_is_refused(root, monkeypatch):
    for name in ("world", "planned"):
        monkeypatch.setattr(processes, name, lambda: 2)
    args = parse_args([*QUICK.split(), "--data_path", str(root)])
    args.parallel = "data"
    assert len(webvision.load_files(args).positions) == 12
    args.batch_size = 3
    with pytest.raises(UserError, match="--batch_size 3: cannot be cut into equal pieces for 2 processes"):
        webvision.load_files(args)
    args.parallel = "networks"  # each has whole batches
    assert len(webvision.load_files(args).positions) == 12
    args.limit_train = 1
    with pytest.raises(UserError, match="1 training images are too few for 2 processes"):
        webvision.load_files(args)


def test_data_that_are_not_there_are_told_before_two_processes_are_started(root, capsys, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started"))
    argv = [*QUICK.split(), "--parallel", "networks", "--out", str(root.parent / "run")]
    assert "webvision not found" in refused([*argv, "--data_path", str(root / "nosuch")], capsys)
    words = ["--data_path", str(root), "--image_cache", str(root / "nosuch")]
    assert "no image cache in" in refused([*argv, *words], capsys)
    assert not (root.parent / "run").exists()
