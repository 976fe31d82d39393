"""The figure of Me-Momentum's runs: a column per setting, the confident set by round, refusals in one line."""

import json

import numpy as np
import pytest

from common.runs.cli import UserError
from me_momentum import visualize
from me_momentum.visualize import draw_rounds, figures, read_run, setting

COLUMNS = "outer,round,test_accuracy,confident_size,confident_share,confident_precision,hard_share"
# early stopping, two rounds, and a second outer loop's early stopping on the last set
ROWS = [
    *[(1, 0, 50, "", "", "", ""), (1, 0, 60, "", "", "", "")],
    *[(1, 1, 70, 600, 0.6, 0.9, 0.0), (1, 1, 71, 600, 0.6, 0.9, 0.0)],
    *[(1, 2, 80, 700, 0.7, 0.95, 0.125), (2, 0, 65, 700, 0.7, 0.95, 0.125)],
]


def write_run(folder, rows=ROWS, columns=COLUMNS, method="Me-Momentum", **arguments):
    usual = {"dataset": "digits", "noise_type": "symmetric", "noise_rate": 0.4, "fidelity": "paper"}
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"method": method, "arguments": usual | arguments}))
    lines = [",".join(map(str, row)) for row in rows]
    (folder / "log.csv").write_text("\n".join([columns, *lines]) + "\n")
    return folder


def test_a_round_is_what_its_last_epoch_left(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert [(row["outer"], row["round"]) for row in run.rounds] == [("1", "1"), ("1", "2"), ("2", "0")]
    assert [row["test_accuracy"] for row in run.rounds] == ["71", "80", "65"]


def test_the_curves_show_share_precision_and_accuracy_by_round_and_a_fresh_network_by_a_line(tmp_path):
    axes = figures.plt.figure().subplots()
    draw_rounds(axes, read_run(write_run(tmp_path / "run")))
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert np.allclose(drawn[visualize.SHOWN["confident_share"][0]], [60, 70, 70])
    assert np.allclose(drawn[visualize.SHOWN["hard_share"][0]], [0, 12.5, 12.5])
    assert np.allclose(drawn[visualize.SHOWN["test_accuracy"][0]], [71, 80, 65])
    assert visualize.SHOWN["confident_recall"][0] not in drawn, "the log has no such column"
    fresh = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert fresh == [2.5]


def test_a_setting_is_named_by_data_and_noise(tmp_path):
    assert setting(read_run(write_run(tmp_path / "drawn"))) == "digits, symmetric noise, rate 0.4"
    assert setting(read_run(write_run(tmp_path / "given", noise_type="given"))) == "digits, given labels"


def test_the_command_draws_several_settings_and_a_run_without_selection(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", noise_type="instance"),
        write_run(tmp_path / "ce", rows=ROWS[:2], method="CE", noise_type="instance"),
    ]
    out = tmp_path / "figure.png"
    visualize.main([*map(str, runs), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"figure in {out}\n"


def test_what_is_no_run_of_me_momentum_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory: args\.json is missing"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run", rows=[(1, 50)], columns="epoch,test_accuracy")
    with pytest.raises(UserError, match=r"log\.csv is not of Me-Momentum"):
        read_run(folder)
