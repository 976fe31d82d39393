"""The command lines of both scripts: names, defaults and types, what depends on what, and what is refused."""

import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import datasets, noise
from common.datasets.image_cache import build_caches
from common.gpu import processes
from common.runs import cli
from common.runs.cli import UserError
from sfa import Train_cifar, Train_webvision, flags, learners, losses, robust_losses, webvision
from tests.common.small_file_data import make_webvision

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

SHARED = [
    *(("out", None), ("seed", 123), ("device", "auto"), ("precision", "auto"), ("compile", False)),
    *(("fidelity", "paper"), ("preset", None), ("noise_file", None), ("resume", "auto")),
    *(("limit_train", None), ("limit_test", None), ("full_test_at_end", False)),
]
# frozen: names, defaults, and the order in which run directories are named
FLAGS = {
    Train_cifar: [
        *(("help", "==SUPPRESS=="), ("dataset", "cifar10"), ("data_path", "./data"), ("imb_type", "exp")),
        *(("imb_factor", 0.01), ("noise_mode", "imb"), ("noise_ratio", 0.5), ("posterior", None)),
        *(("num_class", 10), ("batch_size", 64), ("lr", 0.02), ("lr_drop", 150), ("num_epochs", 200)),
        *(("warm_up", 30), ("alpha", 4), ("lambda_u", 25), ("T", 0.5), ("arch", "resnet18"), ("gpuid", 0)),
        *(("loss", "ce"), ("ldam_margin", 0.5), ("ldam_scale", 30), ("gce_q", 0.7), ("sce_ce", None)),
        *(("sce_rce", None), ("adjustment_tau", 1), ("selection", "sfa"), ("p_threshold", 0.5)),
        *(("beta", 0.99), ("phi", 1.005), ("sample_rate", 1), ("min_draw_count", None)),
        *(("ema_mode", None), ("mixture", "em"), ("image_size", 32), ("test_split", 0.2)),
        *(("on_bad_image", "error"), ("workers", 4), *SHARED),
    ],
    Train_webvision: [
        *(("help", "==SUPPRESS=="), ("dataset", "webvision"), ("test_split", 0.2)),
        *(("data_path", "./webvision/"), ("imagenet", None), ("num_class", 50)),
        *(("imb_type", "exp"), ("imb_factor", 1), ("image_size", 299), ("on_bad_image", "error")),
        *(("image_cache", None), ("workers", 8), ("network", "inception_resnet_v2"), ("feat_size", 1536)),
        *(("batch_size", 32), ("lr", 0.01), ("lr_drop", 50), ("num_epochs", 100), ("alpha", 0.5)),
        *(("lambda_u", 0), ("T", 0.5), ("reset_momentum", None), ("gpuid1", 0), ("gpuid2", 1)),
        *(("parallel", None), ("p_threshold", 0.5), ("beta", 0.9), ("phi", 1.005), ("sample_rate", 1)),
        *(("min_draw_count", 0), ("ema_mode", None), *SHARED),
    ],
}
LONGER = {"lr": ["--lr", "--learning_rate"], "warm_up": ["-w", "--warm_up"], "resume": ["-r", "--resume"]}
TYPES = {
    cli.count: "batch_size feat_size image_size limit_test limit_train lr_drop num_class num_epochs sample_rate warm_up",
    cli.count_or_zero: "gpuid gpuid1 gpuid2 min_draw_count workers",
    cli.positive: "T adjustment_tau alpha gce_q imb_factor ldam_margin ldam_scale lr phi",
    cli.non_negative: "lambda_u sce_ce sce_rce",
    cli.fraction: "beta noise_ratio p_threshold test_split",
    cli.place: "data_path image_cache imagenet noise_file out posterior",
    cli.seed: "seed",
}
CHOICES = {
    Train_cifar: {
        "imb_type": ["exp", "step", "none"],
        "noise_mode": ["imb", "sym", *noise.POSTERIOR_TYPES, "given"],
        "arch": ["resnet18", "narrow"],
        "loss": ["ce", "ldam", "gce", "sce", "logit_adjusted", "balanced_softmax"],
        "selection": ["sfa", "gmm", "none"],
        "mixture": ["em", "sklearn"],
    },
    Train_webvision: {
        "dataset": ["webvision", "folder"],
        "imb_type": ["exp", "step"],
        "network": ["inception_resnet_v2", "resnet50", "resnet18"],
        "reset_momentum": ["yes", "no"],
        "parallel": ["none", "networks", "data"],
    },
}
RELEASED = {
    Train_cifar: "dataset data_path imb_type imb_factor noise_mode noise_ratio num_class batch_size lr num_epochs warm_up "
    "alpha lambda_u T arch gpuid p_threshold beta phi sample_rate",
    Train_webvision: "data_path num_class feat_size batch_size lr num_epochs alpha lambda_u T gpuid1 gpuid2 p_threshold",
}
PRESETS = cli.read_presets(flags.PRESETS)
each_script = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)


@pytest.fixture(autouse=True)
def without_cards(monkeypatch):
    """As on a machine without cards, where nobody started torchrun."""
    cards(monkeypatch, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def cards(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def by_torchrun(monkeypatch, count: int) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "own",
        "WORLD_SIZE": count,
        "RANK": 0,
        "LOCAL_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))


def refused(script, words: str, capsys) -> str:
    """The one line that the script ends in, with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(script.main, words.split())
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", text), text
    return text


# names, defaults, presets ---------------------------------------------------------------------------------------------


@each_script
def test_flags_defaults_types_and_choices_are_the_frozen_ones(script, capsys):
    parser = script.make_parser()
    actions, types = (
        parser._actions,
        {name: type_ for type_, names in TYPES.items() for name in names.split()},
    )
    assert [(action.dest, action.default) for action in actions] == FLAGS[script]
    for action in actions[1:]:
        assert action.option_strings == LONGER.get(action.dest, [f"--{action.dest}"])
        assert action.type is types.get(action.dest), action.dest
        assert action.help.strip() and "\n" not in action.help
    choices = {action.dest: list(action.choices) for action in actions if action.choices}
    shared = {"ema_mode", "on_bad_image", "device", "precision", "fidelity", "resume"}
    assert {name: own for name, own in choices.items() if name not in shared} == CHOICES[script]
    released, further = parser._action_groups[2:4]
    assert (released.title, further.title) == ("of the release", "not in the release")
    assert [action.dest for action in released._group_actions] == RELEASED[script].split()
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(action.option_strings[-1] in text for action in actions)


def test_every_preset_parses_in_its_script_and_is_refused_by_the_other(capsys):
    for name, section in PRESETS.items():
        script, other = Train_cifar, Train_webvision
        if "script" in section:
            script, other = other, script
        args = vars(script.parse_args(["--preset", name]))
        values = {flag: value for flag, value in section.items() if flag != "script"}
        assert {flag: args[flag] for flag in values} == values, name
        if script is Train_cifar and not name.startswith("claims/"):
            loss = f"-{args['loss']}" if args["loss"] != "ce" else ""
            assert name.split("/")[2] == args["selection"] + loss
        with pytest.raises(SystemExit) as stop:
            other.parse_args(["--preset", name])
        assert stop.value.code == 2
        assert (
            f"preset {name} is for {section.get('script', 'another script of this paper')}"
            in capsys.readouterr().err
        )


@each_script
@pytest.mark.parametrize(
    ("words", "ema_mode", "reset_momentum"),
    [
        ("", "persist", "no"),
        ("--fidelity released", "released", "yes"),
        ("--fidelity released --ema_mode persist", "persist", "yes"),
        ("--ema_mode released", "released", "no"),
    ],
)
def test_fidelity_decides_what_is_not_typed(script, words, ema_mode, reset_momentum):
    args = script.parse_args(words.split())
    assert args.ema_mode == ema_mode
    if script is Train_webvision:
        assert args.reset_momentum == reset_momentum
        for value in ("yes", "no"):
            assert script.parse_args([*words.split(), "--reset_momentum", value]).reset_momentum == value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"min_draw_count": 300, "sce_ce": 0.1, "sce_rce": 1, "noise_mode": "imb"}),
        ("--dataset digits", {"min_draw_count": 9, "sce_ce": 0.1, "sce_rce": 1}),
        ("--dataset cifar100", {"min_draw_count": 300, "sce_ce": 6, "sce_rce": 0.1}),
        ("--dataset digits --min_draw_count 0", {"min_draw_count": 0}),
        ("--dataset cifar100 --sce_ce 0", {"sce_ce": 0, "sce_rce": 0.1}),
        ("--dataset cifar100 --sce_rce 0", {"sce_ce": 6, "sce_rce": 0}),
        ("--noise_file labels.npy", {"noise_mode": "given"}),
    ],
)
def test_defaults_follow_the_data_set_unless_they_are_typed(words, expected):
    args = Train_cifar.parse_args(words.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ce", losses.cross_entropy),
        ("ldam --ldam_margin 0.2", partial(robust_losses.ldam, largest_margin=0.2, scale=30)),
        ("ldam --ldam_scale 5", partial(robust_losses.ldam, largest_margin=0.5, scale=5)),
        ("gce", partial(robust_losses.generalised_cross_entropy, q=0.7)),
        ("gce --gce_q 1", partial(robust_losses.generalised_cross_entropy, q=1)),
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
    loss = robust_losses.standard_loss(Train_cifar.parse_args(["--loss", *words.split()]))
    torch.testing.assert_close(loss(*given), expected(*given))


# names of methods, runs and cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("", "SFA"),
        ("--loss sce --ema_mode released", "SFA (ema_mode released) + SCE"),
        ("--fidelity released --ema_mode persist", "SFA (ema_mode persist)"),
        ("--selection gmm --ema_mode released --loss balanced_softmax", "GMM + balanced softmax"),
        ("--selection none --loss gce", "no selection + GCE"),
    ],
)
def test_results_name_the_selection_and_the_loss(words, method):
    assert Train_cifar.method(Train_cifar.parse_args(words.split())) == method


def test_run_directories_are_named_after_what_differs(monkeypatch):
    always = "dataset_cifar100-imb_type_exp-imb_factor_0.01-noise_mode_imb-noise_ratio_0.5-seed_123"
    for words, name in (("--sce_ce 6", ""), ("--selection gmm --loss sce", "-loss_sce-selection_gmm")):
        args = Train_cifar.parse_args(f"--dataset cifar100 {words}".split())
        assert flags.cifar_directory(args) == always + name
    cards(monkeypatch, 4)
    for words, name in (
        ("", "seed_123"),
        ("--fidelity released --T 0.4 --seed 3", "fidelity_released-seed_3-T_0.4"),
        ("--fidelity released --reset_momentum no", "fidelity_released-seed_123-reset_momentum_no"),
        # not after the processes or cards, so that others can resume the run
        ("--gpuid1 2 --gpuid2 3", "seed_123"),
        ("--parallel networks", "seed_123"),
    ):
        args = Train_webvision.parse_args(words.split())
        assert flags.webvision_directory(args) == f"webvision-{name}"


def test_the_profile_of_webvision_is_that_of_the_paper_only_where_nothing_is_shortened():
    def cell(words: str) -> dict:
        return flags.webvision_cell(Train_webvision.parse_args(words.split()))

    paper = {
        "dataset": "webvision",
        "noise_type": "real",
        "noise_rate": None,
        "imb_factor": None,
        "ood_ratio": None,
    }
    assert cell("") == {**paper, "profile": "paper"}
    for words in (
        "--T 0.4",
        "--num_epochs 101",
        "--fidelity released",
        "--image_size 331",
        "--imb_type step",
    ):
        assert cell(words)["profile"] == "paper", words
    for words in ("--num_epochs 99", "--num_class 49", "--image_size 298", "--network resnet50"):
        assert cell(words)["profile"] == "short", words
    long_tail = {"imb_factor": 0.1, "noise_type": "own.npy", "profile": "short"}
    assert cell("--imb_factor 0.1 --noise_file a/own.npy") == paper | long_tail


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ("", 0),
        ("--warm_up 200 --selection gmm", 1),
        ("--warm_up 200 --selection none", 0),
        ("--lr_drop 200 --selection none", 1),
    ],
)
def test_a_schedule_that_does_not_fit_gets_a_note(words, notes, capsys):
    flags.note_schedule(Train_cifar.parse_args(words.split()))
    assert capsys.readouterr().out.count("note: ") == notes


# how processes share the work of WebVision ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words", "parallel"),
    [
        (1, "", "none"),
        (2, "", "networks"),
        (2, "--device cpu", "none"),
        (2, "--gpuid2 2", "none"),
        (2, "--gpuid1 2 --gpuid2 0", "none"),
        (4, "--gpuid1 3 --gpuid2 2", "networks"),
        (4, "--gpuid1 1", "none"),  # twice the same
        (2, "--parallel none", "none"),
        (0, "--parallel networks", "networks"),
    ],
)
def test_each_of_two_cards_trains_a_network_if_both_are_there(count, words, parallel, monkeypatch):
    cards(monkeypatch, count)
    assert Train_webvision.parse_args(words.split()).parallel == parallel


@pytest.mark.parametrize(
    ("world", "words", "parallel"), [(2, "", "data"), (2, "--parallel networks", "networks"), (1, "", "none")]
)
def test_under_torchrun_all_processes_train_both_networks_unless_asked(world, words, parallel, monkeypatch):
    by_torchrun(monkeypatch, world)
    assert Train_webvision.parse_args(words.split()).parallel == parallel


@pytest.mark.parametrize(
    ("visible", "count", "words", "expected"),
    [
        (None, 2, "--lr 0.02 --data_path folder/", "0,1"),
        (None, 4, "--gpuid1 3 --gpuid2 1", "3,1"),
        ("5,2,7", 3, "--gpuid1 2 --gpuid2 0", "7,5"),
        # what is hidden stays hidden, where the processes are to run on the CPU
        ("", 0, "--parallel networks", ""),
        ("3", 1, "--parallel networks --device cpu", "3"),
    ],
)
def test_two_processes_are_this_command_under_torchrun_on_the_cards_asked_for(
    visible, count, words, expected, monkeypatch
):
    cards(monkeypatch, count)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    learners.start_two_processes(Train_webvision.parse_args(words.split()), words.split())
    [(program, command, environment)] = started
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(Path(Train_webvision.__file__).resolve())
    # under torchrun the default is another one: what this process settled on is typed
    assert (program, command) == (
        sys.executable,
        [*launcher, script, *words.split(), "--parallel", "networks"],
    )
    assert environment == {**os.environ, "CUDA_VISIBLE_DEVICES": expected}


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--noise_mode asym", "--noise_mode: .*asym.*choose from .*imb.*sym"),
        ("--noise_mode given", "--noise_mode given: .*--noise_file"),  # digits bring no noisy labels
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy"),
        ("--imb_factor 2", "--imb_factor: must be at most 1, got 2"),
        ("--dataset nosuch", "nosuch: choose from .*cifar10"),
        ("--preset nosuch", "preset nosuch: choose from .*embedded/"),
        ("--gce_q 2", "--gce_q: must be at most 1, got 2"),
    ],
)
def test_a_bad_value_of_cifar_is_named_in_one_line(words, line, tmp_path, capsys):
    # what would end soon if it were not refused
    text = refused(
        Train_cifar, f"--dataset digits --num_epochs 1 --limit_train 32 --out {tmp_path}/run {words}", capsys
    )
    assert re.search(line, text) and not list(tmp_path.iterdir())


QUICK = (
    "--num_class 3 --network resnet18 --image_size 64 --batch_size 2 --num_epochs 1 --device cpu --workers 0"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """mini-WebVision of 12 images of three classes, in `data`; two of each class in both test sets."""
    folder = tmp_path_factory.mktemp("webvision")
    make_webvision(folder / "data", classes=3, per_class=4)
    np.save(folder / "long.npy", np.arange(13) % 3)
    np.save(folder / "wide.npy", np.arange(12) // 3)
    build_caches(folder / "caches" / "64", datasets.load_webvision(folder / "data", 3), size=64)
    return folder


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--num_class 1", "--num_class: WebVision has 1000 classes, 2 at least are needed, got 1 "),
        ("--num_class 1001", "--num_class: WebVision has 1000 classes, 2 at least are needed, got 1001"),
        ("--imb_factor 2", "--imb_factor: must be at most 1, got 2"),
        ("--image_size 32", "--image_size: must be at least 33 for resnet18, got 32"),
        ("--image_size 32 --network resnet50", "--image_size: must be at least 33 for resnet50, got 32"),
        ("--image_size 106 --network inception_resnet_v2", "at least 107 for inception_resnet_v2, got 106"),
        ("--parallel data", "--parallel: data needs several processes: start the script with torchrun"),
        ("--warm_up 2", "unrecognized arguments: --warm_up 2"),
        # what only the data tell
        ("--data_path nosuch", r"webvision not found in .*; looked in .*nosuch for info/train_filelist"),
        ("--imagenet nosuch", r"nosuch/val for a folder of each of 3 classes of ILSVRC12.*--imagenet none"),
        ("--num_class 4", "data/imagenet/val for a folder of each of 4 classes.*3 is missing"),
        ("--noise_file nosuch.npy", "--noise_file nosuch.npy: no such file"),
        ("--noise_file long.npy", "--noise_file long.npy: holds 13 labels, the training set needs 12"),
        ("--noise_file wide.npy", "--noise_file wide.npy: label 3 at position 9 is outside 0..2"),
        ("--image_cache nosuch", "no image cache in nosuch"),
        ("--image_cache caches/64", "image cache in caches/64/train holds 12 images of another list or size"),
        ("--gpuid1 99 --device cuda", "--device cuda: there is no CUDA device 99"),
        # as soon in the process that starts two others
        ("--parallel networks --data_path nosuch", "webvision not found"),
        ("--parallel networks --image_cache nosuch", "no image cache in"),
    ],
)
def test_a_bad_value_of_webvision_is_named_in_one_line(words, line, root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started"))
    before = sorted(root.rglob("*"))
    assert re.search(line, refused(Train_webvision, f"{QUICK} --data_path data --out run {words}", capsys))
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("world", "cuda", "words", "line"),
    [
        (2, 0, "--parallel none", "none is one process: start the script with python, not with torchrun"),
        (3, 0, "--parallel networks", "networks needs two processes, torchrun started 3"),
        (1, 0, "--parallel data", "data needs several processes: start the script with torchrun"),
        # one process would take a card and the other a CPU, and they would never meet
        (
            0,
            1,
            "--parallel networks --device auto",
            "CUDA devices, 0 and 1 by --gpuid1 and --gpuid2 (found 1)",
        ),
        (
            0,
            0,
            "--parallel networks --device cuda",
            "CUDA devices, 0 and 1 by --gpuid1 and --gpuid2 (found 0)",
        ),
        (0, 2, "--parallel networks --device auto --gpuid1 1", "1 and 1 by --gpuid1 and --gpuid2 (found 2)"),
        (0, 2, "--parallel networks --device auto --gpuid2 2", "0 and 2 by --gpuid1 and --gpuid2 (found 2)"),
    ],
)
def test_processes_and_cards_that_do_not_fit_are_refused(
    world, cuda, words, line, tmp_path, capsys, monkeypatch
):
    cards(monkeypatch, cuda)
    if world:
        by_torchrun(monkeypatch, world)
    text = refused(Train_webvision, f"{QUICK} --out {tmp_path}/run {words}", capsys)
    assert "--parallel: " in text and line in text and not list(tmp_path.iterdir())


def test_what_processes_cannot_share_is_refused(root, monkeypatch):
    for name in ("world", "planned"):
        monkeypatch.setattr(processes, name, lambda: 2)
    args = Train_webvision.parse_args([*QUICK.split(), "--data_path", str(root / "data")])
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
