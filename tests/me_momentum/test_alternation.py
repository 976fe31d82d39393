"""When a phase ends, which weights are kept and what comes next, on sequences of validation accuracies made by hand."""

import math
from itertools import chain, repeat

import numpy as np
import pytest

from me_momentum.alternation import Limits, Place, advance, learning_rate, name_of

NAN = math.nan
RELEASE = Limits(100, 3, 19)


def walk(values, limits: Limits) -> list:
    """(place, following, verdict) of each epoch until the run is done or the values end."""
    place, steps = Place(), []
    for value in values:
        following, verdict = advance(place, value, limits)
        steps.append((place, following, verdict))
        place = following
        if place.done:
            break
    return steps


def phases(steps: list) -> list[tuple[int, int, int]]:
    """(outer loop, round, epochs) of each phase."""
    counts = {}
    for place, _, _ in steps:
        counts[place.outer, place.round] = counts.get((place.outer, place.round), 0) + 1
    return [(*phase, epochs) for phase, epochs in counts.items()]


def kept(steps: list) -> list[int]:
    return [number for number, (_, _, verdict) in enumerate(steps) if verdict.best_of_loop]


def new_bests(steps: list) -> list[int]:
    return [number for number, (_, _, verdict) in enumerate(steps) if verdict.best_of_run]


# early stopping ---------------------------------------------------------------------------------------------------------


def test_the_20th_failure_in_a_row_ends_early_stopping_and_the_19th_does_not():
    steps = walk([50.0, *[40.0] * 20], RELEASE)
    assert phases(steps) == [(0, 0, 21)]
    assert (steps[19][1].round, steps[19][1].epoch) == (0, 20)
    assert steps[20][1] == Place(round=1, best_of_loop=50.0, margin=steps[20][1].margin)


def test_a_success_makes_the_margin_start_again():
    steps = walk([50.0, *[40.0] * 19, 60.0, *[40.0] * 20], RELEASE)
    assert kept(steps) == [0, 20] and steps[20][1].margin == 0
    assert phases(steps) == [(0, 0, 41)] and steps[-1][1].round == 1


def test_each_failure_makes_the_hurdle_a_tenth_of_a_point_higher():
    for failures in range(20):
        place = walk([50.0, *[50.0] * failures], RELEASE)[-1][1]  # an equal one is no better
        assert (place.best_of_loop, place.epoch) == (50.0, failures + 1)
        assert place.margin == pytest.approx(failures / 10)
        assert not advance(place, 50 + failures / 10 - 0.01, RELEASE)[1].best_of_loop
        assert advance(place, 50 + failures / 10 + 0.01, RELEASE)[1].best_of_loop


@pytest.mark.parametrize(
    ("step", "limit", "failures"), [(0.1, 2.0, 20), (0.5, 2.0, 5), (1.0, 0.0, 1), (0.25, 0.6, 3)]
)
def test_step_and_limit_of_the_margin(step, limit, failures):
    steps = walk([50.0, *repeat(10.0, failures)], Limits(100, 3, 19, step, limit))
    assert [following.round for _, following, _ in steps] == [0] * failures + [1]


def test_early_stopping_ends_with_the_last_epoch_at_the_latest_and_never_sets_the_best_of_the_run():
    steps = walk(np.arange(1, 8) * 10.0, Limits(7, 3, 19))
    assert kept(steps) == list(range(7)) and new_bests(steps) == []
    assert steps[-1][1] == Place(round=1, best_of_loop=70.0)


# fine-tuning ------------------------------------------------------------------------------------------------------------


def test_in_a_round_there_is_no_margin():
    place = Place(round=1, best_of_loop=50.0, margin=1.5)
    following, verdict = advance(place, 50.01, Limits(9, 3, 19))
    assert verdict.best_of_loop and following.best_of_loop == 50.01
    assert not advance(place, 50.0, Limits(9, 3, 19))[1].best_of_loop


def test_the_first_round_counts_as_progress_even_without_a_gain_and_the_second_does_not():
    steps = walk([60.0, 61.0, *[10.0] * 4], Limits(2, 2, 19))
    assert phases(steps) == [(0, 0, 2), (0, 1, 2), (0, 2, 2)]
    assert steps[-1][1] == Place(outer=1)


def test_a_round_without_gain_ends_the_outer_loop():
    steps = walk([60.0, 61.0, 62.0, 10.0, 10.0, 63.0, 64.0, 65.0, 65.0, 64.9], Limits(2, 2, 19))
    assert phases(steps) == [(0, number, 2) for number in range(5)]
    assert steps[-2][1].outer == 0 and steps[-1][1].outer == 1


@pytest.mark.parametrize("rounds", [0, 1, 2, 4, 19])
def test_while_each_round_gains_all_rounds_are_run(rounds):
    steps = walk(np.arange(1, 1000) / 100, Limits(3, 2, rounds))
    assert phases(steps) == [(outer, number, 3) for outer in range(2) for number in range(rounds + 1)]
    assert [following.done for _, following, _ in steps] == [False] * (len(steps) - 1) + [True]


def test_the_best_of_the_run_survives_outer_loops_and_the_best_of_the_outer_loop_does_not():
    first = [50.0, 50.0, 70.0, 60.0, 60.0, 60.0]
    second = [40.0, 40.0, 69.0, 70.0, 70.01, 60.0]
    steps = walk([*first, *second], Limits(2, 2, 2))
    assert phases(steps) == [(o, r, 2) for o in range(2) for r in range(3)]
    assert kept(steps) == [0, 2, 6, 8, 9, 10]
    assert new_bests(steps) == [2, 10]
    assert steps[6][0] == Place(outer=1, best_of_run=70.0)
    assert steps[-1][1] == Place(outer=2, best_of_run=70.01, done=True)


def test_early_stopping_above_the_best_of_the_run_changes_nothing_for_it():
    steps = walk([90.0, 91.0, 92.0], Limits(1, 1, 3))
    assert kept(steps) == [0, 1, 2] and new_bests(steps) == [1, 2]


# odd sequences ----------------------------------------------------------------------------------------------------------


def test_nan_never_wins():
    limits = Limits(30, 1, 4)
    steps = walk(repeat(NAN), limits)
    assert kept(steps) == new_bests(steps) == []
    # twenty failures end early stopping, one round without gain ends the rest
    assert phases(steps) == [(0, 0, 20), (0, 1, 30)]
    place = Place(round=2, best_of_loop=10.0, best_before_round=10.0, best_of_run=10.0)
    following, verdict = advance(place, NAN, limits)
    assert following.best_of_loop == 10.0 and verdict == (False, False)


def test_an_accuracy_of_zero_wins_nothing():
    steps = walk([0.0, 0.0, 0.0], Limits(1, 3, 1))
    assert kept(steps) == []
    # a first round that leaves the best at zero is no progress
    assert phases(steps) == [(0, 0, 1), (0, 1, 1), (1, 0, 1)]


def test_without_selection_there_is_one_phase_of_all_epochs():
    """And without a step no margin, so that the best of them is the best however long it takes."""
    steps = walk(chain([50.0], repeat(10.0, 98), [50.01]), Limits(100, 1, 0, margin_step=0))
    assert phases(steps) == [(0, 0, 100)]
    assert kept(steps) == [0, 99] and steps[-1][1].done


# learning rates and names -----------------------------------------------------------------------------------------------


def test_the_learning_rate_is_constant_in_early_stopping_and_falls_at_40_and_80_in_every_round():
    assert {learning_rate(Place(outer=2, epoch=e), 0.01) for e in range(100)} == {0.01}
    for number in (1, 19):
        rates = [learning_rate(Place(outer=2, round=number, epoch=e), 0.02) for e in range(100)]
        assert rates == pytest.approx([0.02] * 40 + [0.002] * 40 + [0.0002] * 20)


def test_the_phases_have_names():
    assert name_of(Place()) == "outer loop 1, early stopping"
    assert name_of(Place(outer=2, round=5, epoch=7)) == "outer loop 3, round 5"
