"""A class that no selection takes: the log counts it, a warning names it once, also after a run was killed and resumed."""

import csv
import shutil
from pathlib import Path
from shlex import split

import numpy as np
import pytest
import torch

from manifold_dividemix import train_semisup
from me_momentum import main as me_momentum
from sfa import Train_cifar
from tests.end_to_end.outcome import log_without_seconds

LOST = 3  # the class
DATA = split("--dataset digits --device cpu --limit_train 160")
SFA = [*DATA, *split("--imb_type none --selection gmm --warm_up 1 --num_epochs 6 --batch_size 64")]
WARNING = f"warning: class {LOST} has had no selected sample"


def table(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def warnings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: class ")]


@pytest.fixture
def losing(monkeypatch):
    """SFA's script with a selection of all samples but those of the class."""
    select = Train_cifar.select

    def without(network, moments, num_classes, epoch, s):
        selected = s.labels != LOST
        counts = torch.bincount(s.labels[selected], minlength=num_classes)
        return select(network, moments, num_classes, epoch, s)._replace(selected=selected, counts=counts)

    monkeypatch.setattr(Train_cifar, "select", without)


def test_a_lost_class_is_logged_in_each_epoch_and_warned_about_once_after_three_selections(
    losing, tmp_path, capsys, monkeypatch
):
    Train_cifar.main([*SFA, "--out", str(tmp_path / "whole")])
    streams = capsys.readouterr()
    line = f"{WARNING} for 3 selections in a row by network 1: try a longer --warm_up, with another --out"
    assert warnings_of(streams.err) == [line]
    assert "note: warm-up of 2 steps (--warm_up 1), below 300: " in streams.out
    rows = table(tmp_path / "whole")
    assert [row["classes_unselected"] for row in rows] == ["", *["1"] * 5]
    assert [row["right_selected_min"] for row in rows] == ["", *["0.0"] * 5]

    # killed in the fourth epoch, before the third selection is counted
    logits, calls = Train_cifar.summed_logits, []

    def killing(*words):
        calls.append(words)
        if len(calls) == 4:
            raise LookupError("killed here")
        return logits(*words)

    with monkeypatch.context() as patched, pytest.raises(LookupError, match="killed here"):
        patched.setattr(Train_cifar, "summed_logits", killing)
        Train_cifar.main([*SFA, "--out", str(tmp_path / "killed")])
    capsys.readouterr()
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed")
    Train_cifar.main([*SFA, "--out", str(tmp_path / "resumed")])
    streams = capsys.readouterr()
    assert "going on after epoch 3" in streams.out
    assert warnings_of(streams.err) == [line]
    assert log_without_seconds(tmp_path / "resumed") == log_without_seconds(tmp_path / "whole")

    # once more from its end: nothing is counted twice
    Train_cifar.main([*SFA, "--out", str(tmp_path / "resumed")])
    assert warnings_of(capsys.readouterr().err) == []


def test_without_a_selection_there_is_no_note(tmp_path, capsys):
    Train_cifar.main([*SFA, *split("--selection none --num_epochs 1 --out"), str(tmp_path / "run")])
    assert "note: warm-up of" not in capsys.readouterr().out
    assert {table(tmp_path / "run")[0][name] for name in ("classes_unselected", "right_selected_min")} == {""}


def test_manifold_dividemix_warns_at_its_only_split(tmp_path, capsys, monkeypatch):
    divide, labels = train_semisup.divide, []

    def without(clean, kept, threshold):
        labelled, unlabelled = divide(clean, kept, threshold)
        lost = labels[0][labelled] == LOST
        return labelled[~lost], torch.cat([unlabelled, labelled[lost]]).sort().values

    def embed(network, batches, observed, device):
        labels.append(observed)
        return train_semisup_embed(network, batches, observed, device)

    train_semisup_embed = train_semisup.embed
    monkeypatch.setattr(train_semisup, "divide", without)
    monkeypatch.setattr(train_semisup, "embed", embed)
    words = split("--pretrained none --ood-ratio 0.2 --warmup-epoch 1 --epochs 3 --batch-size 32")
    train_semisup.main([*DATA, *words, "--out", str(tmp_path / "run")])
    streams = capsys.readouterr()
    assert f"{WARNING} in the only selection: try a longer --warmup-epoch, with another --out" in streams.err
    assert "note: warm-up of 5 steps (--warmup-epoch 1), below 300: " in streams.out
    rows = table(tmp_path / "run")
    assert rows[0]["classes_unselected"] == "" and min(int(row["classes_unselected"]) for row in rows[1:]) > 0
    assert [row["right_selected_min"] for row in rows] == ["", "0.0", "0.0"]


def test_me_momentum_counts_the_sets_it_extracts(tmp_path, capsys, monkeypatch):
    sizes = []

    def without(predicted, labels):
        sizes.append(len(labels))
        return (labels != LOST).nonzero()[:, 0]

    monkeypatch.setattr(me_momentum, "confident_examples", without)
    words = split("--data_percent 0.5 --n_epoch 2 --max_outer_loop 3 --max_inner_loop 2 --noise_rate 0.2")
    me_momentum.main([*DATA, *words, "--out", str(tmp_path / "run")])
    (line,) = warnings_of(capsys.readouterr().err)
    assert len(sizes) == 3 and line.startswith(
        f"{WARNING} for 3 selections in a row: try a larger --es_limit"
    )
    rows = table(tmp_path / "run")
    found = [(row["classes_unselected"], row["right_selected_min"]) for row in rows]
    assert found == [("", "")] * 2 + [("1", "0.0")] * 10
    assert np.isfinite(float(rows[-1]["loss"]))
