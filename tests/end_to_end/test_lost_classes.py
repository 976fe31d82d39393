"""A class that no selection takes: the log counts it, a warning names it once, also after a run was killed and resumed."""

from shlex import split

import pytest

from common.runs import selection_report
from manifold_dividemix import train_semisup
from me_momentum import main as me_momentum
from sfa import Train_cifar
from tests.end_to_end.runs import log_without_seconds, table

pytestmark = pytest.mark.slow

LOST = 3  # the class
WARNING = f"warning: class {LOST} has had no selected sample"
DATA = split("--dataset digits --device cpu --limit_train 160")
SFA = [*DATA, *split("--imb_type none --selection gmm --warm_up 1 --num_epochs 6 --batch_size 64")]
MANIFOLD = split("--pretrained none --ood-ratio 0.2 --warmup-epoch 1 --epochs 3 --batch-size 32")
ME_MOMENTUM = split("--data_percent 0.5 --n_epoch 2 --max_outer_loop 3 --max_inner_loop 2 --noise_rate 0.2")
IN_A_ROW = "for 3 selections in a row"
# script, flags, when it warns with which remedy, the note on its warm-up, epochs without a selection
RUNS = {
    "sfa": (Train_cifar, SFA, f"{IN_A_ROW} by network 1: try a longer --warm_up", "2 steps (--warm_up 1)", 1),
    "manifold_dividemix": (
        *(train_semisup, [*DATA, *MANIFOLD], "in the only selection: try a longer --warmup-epoch"),
        *("5 steps (--warmup-epoch 1)", 1),
    ),
    "me_momentum": (me_momentum, [*DATA, *ME_MOMENTUM], f"{IN_A_ROW}: try a larger --es_limit", "", 2),
}


def warnings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"warning: class {LOST} ")]


@pytest.fixture
def losing(monkeypatch):
    """Selections that count as ones without any sample of the class."""
    unselected = selection_report.unselected

    def without(selected, num_classes=None):
        lost = unselected(selected, num_classes)
        lost[LOST] = True
        return lost

    monkeypatch.setattr(selection_report, "unselected", without)


@pytest.mark.parametrize("paper", RUNS)
def test_a_lost_class_is_logged_in_each_epoch_and_warned_about_once(paper, losing, tmp_path, capsys):
    script, words, when, note, warm_up = RUNS[paper]
    script.main([*words, "--out", str(tmp_path / "run")])
    streams = capsys.readouterr()
    (line,) = warnings_of(streams.err)
    assert line.startswith(f"{WARNING} {when}") and line.endswith(", with another --out")
    assert (f"note: warm-up of {note}, below 300: " in streams.out) == bool(note)
    rows = table(tmp_path / "run")
    for name in ("classes_unselected", "right_selected_min"):
        assert [row[name] != "" for row in rows] == [False] * warm_up + [True] * (len(rows) - warm_up)
    assert all(int(row["classes_unselected"]) > 0 for row in rows[warm_up:])


def test_a_resumed_run_warns_about_the_class_once(losing, tmp_path, capsys, monkeypatch):
    class Failing(Train_cifar.Run):
        def log(self, epoch, **values):
            if epoch == 4:  # before the third selection is counted
                raise LookupError("killed here")
            super().log(epoch, **values)

    with monkeypatch.context() as patched, pytest.raises(LookupError, match="killed here"):
        patched.setattr(Train_cifar, "Run", Failing)
        Train_cifar.main([*SFA, "--out", str(tmp_path / "resumed")])
    capsys.readouterr()
    for starts in (1, 0):  # the second one finds it finished
        Train_cifar.main([*SFA, "--out", str(tmp_path / "resumed")])
        assert len(warnings_of(capsys.readouterr().err)) == starts
    Train_cifar.main([*SFA, "--out", str(tmp_path / "whole")])
    assert log_without_seconds(tmp_path / "resumed") == log_without_seconds(tmp_path / "whole")


def test_without_a_selection_there_is_no_note(tmp_path, capsys):
    Train_cifar.main([*SFA, *split("--selection none --num_epochs 1 --out"), str(tmp_path / "run")])
    assert "note: warm-up of" not in capsys.readouterr().out
    assert {table(tmp_path / "run")[0][name] for name in ("classes_unselected", "right_selected_min")} == {""}
