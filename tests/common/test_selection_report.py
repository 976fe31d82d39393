"""The columns and warnings about classes that a selection loses."""

import pytest
import torch

from common.runs import selection_report
from common.runs.selection_report import Selected, columns, count, follow, no_streaks

GIVEN = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 4])
RIGHT = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0]).bool()  # of class 4 none, and there is no class 3


def selected(*positions: int, known: bool = True) -> Selected:
    """The samples at these positions of GIVEN."""
    chosen = torch.zeros(len(GIVEN), dtype=torch.bool)
    chosen[list(positions)] = True
    return Selected(chosen, GIVEN, RIGHT if known else None)


@pytest.mark.parametrize(
    ("positions", "share", "classes"),
    [
        (range(9), 1.0, 0),
        ((0, 1, 2, 4, 6, 7), 1.0, 1),  # all right labels; class 4, which has none, is not selected
        ((0, 4, 6, 7, 8), 1 / 3, 0),
        ((0, 1, 5, 6, 7, 8), 0.0, 0),  # of class 1 the wrong label alone
        ((0, 1, 2, 6), 0.0, 2),
        ((), 0.0, 4),
    ],
)
def test_the_lowest_share_of_right_labels_and_the_number_of_lost_classes(positions, share, classes):
    expected = {"right_selected_min": pytest.approx(share), "classes_unselected": classes}
    assert columns([selected(*positions)]) == expected
    by_position = selected()._replace(chosen=torch.tensor([*positions], dtype=torch.int64))
    assert columns([by_position]) == expected
    assert columns([selected(*positions, known=False)]) == expected | {"right_selected_min": None}


def test_of_two_networks_the_lower_share_and_the_larger_number_and_no_share_without_a_right_label():
    found = columns([selected(0, 4, 6, 7, 8), selected(0, 1, 4, 6, 7)])
    assert found == {"right_selected_min": pytest.approx(1 / 3), "classes_unselected": 1}
    assert list(columns([])) == list(columns([selected(0)])) and set(columns([]).values()) == {None}
    nothing_right = selected(*range(9))._replace(right=torch.zeros(len(GIVEN), dtype=torch.bool))
    assert columns([nothing_right]) == {"right_selected_min": None, "classes_unselected": 0}


def test_a_class_is_warned_about_once_after_three_selections_in_a_row(capsys):
    everything, without_4 = selected(*range(9)), selected(*range(8))
    streaks, lines = no_streaks(1, 5), []
    for one in [without_4] * 2 + [everything] + [without_4] * 4 + [everything] + [without_4] * 3:
        streaks = follow(streaks, [one], "a longer --warm_up")
        lines.append(capsys.readouterr().err)
    line = "warning: class 4 has had no selected sample for 3 selections in a row: try a longer --warm_up, with another --out\n"
    assert lines == [*[""] * 5, line, *[""] * 5]


def test_of_two_networks_each_is_counted_and_a_class_warned_about_once(capsys):
    streaks = no_streaks(2, 6)
    everything, without_2 = selected(*range(9)), selected(0, 4, 8)
    for pair in [(everything, without_2), (without_2, everything)] * 2:
        streaks = follow(streaks, pair, "x")
    assert capsys.readouterr().err == "", "no network has lost it three times in a row"
    for _ in range(4):
        streaks = follow(streaks, [without_2, without_2], "x")
    (line,) = capsys.readouterr().err.splitlines()
    assert "class 2 has had no selected sample for 3 selections in a row by network 1: " in line
    assert not streaks[:, [0, 1, 3, 4, 5]].any(), "classes without a given label are not missed"


def test_where_one_selection_is_all_there_is_it_is_warned_about_at_once(capsys):
    streaks, lost = count(no_streaks(1, 5), [selected(*range(8))], patience=1)
    assert lost.tolist() == [[False, False, False, False, True]] and int(streaks.sum()) == 1
    follow(no_streaks(1, 5), [selected(*range(8))], "x", patience=1)
    assert "class 4 has had no selected sample in the only selection: try x" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "noted"), [(299, True), (300, False)])
def test_a_short_warm_up_is_noted(steps, noted, capsys):
    selection_report.note_short_warm_up(steps, "--warm_up 13")
    line = "note: warm-up of 299 steps (--warm_up 13), below 300: classes that it does not learn are lost to the selection\n"
    assert capsys.readouterr().out == (line if noted else "")
