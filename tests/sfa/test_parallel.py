"""How processes share the work of Train_webvision.py: what is settled, started and refused."""

import os
import sys
from pathlib import Path

import pytest
import torch

from common.gpu import processes
from sfa import Train_webvision, learners, webvision
from tests.common.small_file_data import make_webvision
from tests.lines import message, refused

QUICK = "--num_class 3 --network resnet18 --image_size 64 --batch_size 2 --num_epochs 1"
QUICK += " --device cpu --workers 0"


@pytest.fixture
def machine(monkeypatch):
    """machine(cards, world): one with so many cards, where torchrun started so many processes; 0: nobody started it."""

    def make(cards: int, world: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in {"TORCHELASTIC_RUN_ID": "own", "WORLD_SIZE": world, "RANK": 0}.items():
            monkeypatch.setenv(name, str(value)) if world else monkeypatch.delenv(name, raising=False)

    return make


@pytest.mark.parametrize(
    ("cards", "world", "words", "parallel"),
    [
        (1, 0, "", "none"),
        (2, 0, "", "networks"),
        (2, 0, "--device cpu", "none"),
        (2, 0, "--gpuid2 2", "none"),
        (2, 0, "--gpuid1 2 --gpuid2 0", "none"),
        (4, 0, "--gpuid1 3 --gpuid2 2", "networks"),
        (4, 0, "--gpuid1 1", "none"),  # twice the same
        (2, 0, "--parallel none", "none"),
        (0, 0, "--parallel networks", "networks"),
        # under torchrun all processes train both networks unless asked
        (0, 2, "", "data"),
        (0, 2, "--parallel networks", "networks"),
        (0, 1, "", "none"),
    ],
)
def test_each_of_two_cards_trains_a_network_if_both_are_there(cards, world, words, parallel, machine):
    machine(cards, world)
    assert Train_webvision.parse_args(words.split()).parallel == parallel


@pytest.mark.parametrize(
    ("visible", "cards", "words", "expected"),
    [
        (None, 2, "--lr 0.02 --data_path folder/", "0,1"),
        (None, 4, "--gpuid1 3 --gpuid2 1", "3,1"),
        ("5,2,7", 3, "--gpuid1 2 --gpuid2 0", "7,5"),
        # what is hidden stays hidden, where the processes are to run on the CPU
        ("", 0, "--parallel networks", ""),
        ("3", 1, "--parallel networks --device cpu", "3"),
    ],
)
def test_two_processes_are_this_command_under_torchrun(visible, cards, words, expected, machine, monkeypatch):
    machine(cards)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    learners.start_two_processes(Train_webvision.parse_args(words.split()), words.split())
    [(program, command, environment)] = started
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(Path(Train_webvision.__file__).resolve())
    # under torchrun the default is another one: what this process settled on is typed
    typed = [*words.split(), "--parallel", "networks"]
    assert (program, command) == (sys.executable, [*launcher, script, *typed])
    assert environment == {**os.environ, "CUDA_VISIBLE_DEVICES": expected}


@pytest.mark.parametrize(
    ("world", "cards", "words", "line"),
    [
        (2, 0, "none", "none is one process: start the script with python, not with torchrun"),
        (3, 0, "networks", "networks needs two processes, torchrun started 3"),
        (1, 0, "data", "data needs several processes: start the script with torchrun"),
        # one process would take a card and the other a CPU, and they would never meet
        (0, 1, "networks --device auto", "0 and 1 by --gpuid1 and --gpuid2 (found 1)"),
        (0, 0, "networks --device cuda", "0 and 1 by --gpuid1 and --gpuid2 (found 0)"),
        (0, 2, "networks --device auto --gpuid1 1", "1 and 1 by --gpuid1 and --gpuid2 (found 2)"),
        (0, 2, "networks --device auto --gpuid2 2", "0 and 2 by --gpuid1 and --gpuid2 (found 2)"),
    ],
)
def test_processes_and_cards_that_do_not_fit_are_refused(world, cards, words, line, machine, capsys):
    machine(cards, world)
    text = refused(capsys, Train_webvision.main, *f"{QUICK} --parallel {words}".split())
    assert "--parallel: " in text and line in text


def test_what_processes_cannot_share_is_refused(tmp_path, monkeypatch, machine):
    machine(0)
    make_webvision(tmp_path, classes=3, per_class=4)
    for name in ("world", "planned"):
        monkeypatch.setattr(processes, name, lambda: 2)
    args = Train_webvision.parse_args([*QUICK.split(), "--data_path", str(tmp_path)])
    args.parallel = "data"
    assert len(webvision.load_files(args).positions) == 12
    args.batch_size = 3
    line = "--batch_size 3: cannot be cut into equal pieces for 2 processes"
    assert line in message(webvision.load_files, args)
    args.parallel = "networks"  # each has whole batches
    assert len(webvision.load_files(args).positions) == 12
    args.limit_train = 1
    assert "1 training images are too few for 2 processes" in message(webvision.load_files, args)
