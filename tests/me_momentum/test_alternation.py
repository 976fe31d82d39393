"""When a phase ends, which weights are kept and what comes next, on sequences of validation accuracies made by hand."""

import math
from itertools import repeat

import numpy as np
import pytest

from me_momentum.alternation import Limits, Place, advance, name_of

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


SIX = [(outer, number, 2) for outer in range(2) for number in range(3)]
# accuracies; limits; phases; epochs whose weights are kept, and those that set the best of the run; place after the last epoch
WALKS = {
    "the 20th failure in a row ends early stopping": (
        ([50.0, *[40.0] * 20], RELEASE, [(0, 0, 21)]),
        ([0], [], Place(round=1, best_of_loop=50.0)),
    ),
    "a success makes the margin start again": (
        ([50.0, *[40.0] * 19, 60.0, *[40.0] * 20], RELEASE, [(0, 0, 41)]),
        ([0, 20], [], Place(round=1, best_of_loop=60.0)),
    ),
    "early stopping ends with the last epoch at the latest": (
        (np.arange(1, 8) * 10.0, Limits(7, 3, 19), [(0, 0, 7)]),
        ([*range(7)], [], Place(round=1, best_of_loop=70.0)),
    ),
    "the first round counts as progress even without a gain and the second does not": (
        ([60.0, 61.0, *[10.0] * 4], Limits(2, 2, 19), [(0, 0, 2), (0, 1, 2), (0, 2, 2)]),
        ([0, 1], [], Place(outer=1)),
    ),
    "a round without gain ends the outer loop": (
        ([60.0, 61, 62, NAN, NAN, 63, 64, 65, 65, 64.9], Limits(2, 2, 19), [(0, r, 2) for r in range(5)]),
        ([0, 1, 2, 5, 6, 7], [2, 5, 6, 7], Place(outer=1, best_of_run=65.0)),
    ),
    "the best of the run survives outer loops and that of the outer loop does not": (
        ([50.0, 50, 70, 60, 60, 60, 40, 40, 69, 70, 70.01, 60], Limits(2, 2, 2), SIX),
        ([0, 2, 6, 8, 9, 10], [2, 10], Place(outer=2, best_of_run=70.01, done=True)),
    ),
    "early stopping never sets the best of the run": (
        ([90.0, 91.0, 92.0], Limits(1, 1, 3), [(0, 0, 1), (0, 1, 1), (0, 2, 1)]),
        ([0, 1, 2], [1, 2], Place(round=3, best_of_loop=92.0, best_before_round=92.0, best_of_run=92.0)),
    ),
    "NaN never wins": (
        (repeat(NAN), Limits(30, 1, 4), [(0, 0, 20), (0, 1, 30)]),
        ([], [], Place(outer=1, done=True)),
    ),
    "an accuracy of 0 wins nothing, and a first round that leaves the best at 0 is no progress": (
        ([0.0, 0.0, 0.0], Limits(1, 3, 1), [(0, 0, 1), (0, 1, 1), (1, 0, 1)]),
        ([], [], Place(outer=1, round=1)),
    ),
    "without selection there is one phase, and without a margin its best epoch is kept": (
        ([50.0, *[10.0] * 98, 50.01], Limits(100, 1, 0, margin_step=0), [(0, 0, 100)]),
        ([0, 99], [], Place(outer=1, done=True)),
    ),
}


@pytest.mark.parametrize("name", WALKS)
def test_phases_and_the_weights_that_are_kept(name):
    (values, limits, expected), (kept, new_bests, last) = WALKS[name]
    steps = walk(values, limits)
    assert phases(steps) == expected
    verdicts = [verdict for _, _, verdict in steps]
    assert [i for i, verdict in enumerate(verdicts) if verdict.best_of_loop] == kept
    assert [i for i, verdict in enumerate(verdicts) if verdict.best_of_run] == new_bests
    assert steps[-1][1]._replace(margin=0.0) == last


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


def test_in_a_round_there_is_no_margin():
    place = Place(round=1, best_of_loop=50.0, margin=1.5)
    following, verdict = advance(place, 50.01, Limits(9, 3, 19))
    assert verdict.best_of_loop and following.best_of_loop == 50.01
    assert not advance(place, 50.0, Limits(9, 3, 19))[1].best_of_loop


@pytest.mark.parametrize("rounds", [0, 1, 2, 4, 19])
def test_while_each_round_gains_all_rounds_are_run(rounds):
    steps = walk(np.arange(1, 1000) / 100, Limits(3, 2, rounds))
    assert phases(steps) == [(outer, number, 3) for outer in range(2) for number in range(rounds + 1)]
    assert steps[-1][1].done


def test_the_phases_have_names():
    assert name_of(Place()) == "outer loop 1, early stopping"
    assert name_of(Place(outer=2, round=5, epoch=7)) == "outer loop 3, round 5"
