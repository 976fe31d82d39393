"""When a phase ends, which weights are kept and what comes next, on sequences of validation accuracies made by hand."""

import math
from itertools import chain, repeat

import numpy as np
import pytest

from me_momentum.alternation import Limits, Place, advance, learning_rate, name_of

NAN = math.nan


def walk(values, limits: Limits, place: Place | None = None) -> list:
    """(place, following, verdict) of each epoch until the run is done or the values end."""
    place, steps = place or Place(), []
    for value in values:
        following, verdict = advance(place, value, limits)
        steps.append((place, following, verdict))
        place = following
        if place.done:
            break
    return steps


def phases(steps: list) -> list[tuple[int, int, int]]:
    """(outer loop, round, epochs) of each phase."""
    found = {}
    for place, _, _ in steps:
        found[place.outer, place.round] = found.get((place.outer, place.round), 0) + 1
    return [(*phase, epochs) for phase, epochs in found.items()]


def kept(steps: list) -> list[int]:
    return [number for number, (_, _, verdict) in enumerate(steps) if verdict.keep]


def new_bests(steps: list) -> list[int]:
    return [number for number, (_, _, verdict) in enumerate(steps) if verdict.new_best]


# early stopping ---------------------------------------------------------------------------------------------------------


def test_the_20th_failure_in_a_row_ends_early_stopping_and_the_19th_does_not():
    limits = Limits(100, 3, 20)
    steps = walk([50.0, *[40.0] * 20], limits)
    assert phases(steps) == [(0, 0, 21)]
    assert steps[19][1] == steps[19][0]._replace(epoch=20, margin=steps[19][1].margin)
    following = steps[20][1]
    assert (following.outer, following.round, following.epoch, following.best) == (0, 1, 0, 50.0)


def test_a_success_makes_the_margin_start_again():
    limits = Limits(100, 3, 20)
    steps = walk([50.0, *[40.0] * 19, 60.0, *[40.0] * 20], limits)
    assert kept(steps) == [0, 20]
    assert steps[20][1].margin == 0
    assert phases(steps) == [(0, 0, 41)]
    assert steps[-1][1].round == 1


def test_each_failure_makes_the_hurdle_a_tenth_of_a_point_higher():
    limits = Limits(100, 3, 20)
    for failures in range(20):
        place = walk([50.0, *[50.0] * failures], limits)[-1][1]
        assert place.margin == pytest.approx(failures / 10)
        just_below, just_above = 50 + failures / 10 - 0.01, 50 + failures / 10 + 0.01
        assert not advance(place, just_below, limits)[1].keep
        assert advance(place, just_above, limits)[1].keep
    assert not advance(walk([50.0], limits)[-1][1], 50.0, limits)[1].keep  # an equal one is no better


def test_a_failure_above_the_best_but_not_above_the_hurdle_leaves_the_best_alone():
    limits = Limits(100, 3, 20)
    steps = walk([50.0, 50.0, 50.0, 50.15], limits)
    assert kept(steps) == [0]
    place = steps[-1][1]
    assert (place.best, place.epoch) == (50.0, 4)
    assert place.margin == pytest.approx(0.3)
    assert not advance(place, 50.29, limits)[1].keep
    assert advance(place, 50.31, limits)[1].keep


@pytest.mark.parametrize(
    ("step", "limit", "failures"), [(0.1, 2.0, 20), (0.5, 2.0, 5), (1.0, 0.0, 1), (0.25, 0.6, 3)]
)
def test_step_and_limit_of_the_margin(step, limit, failures):
    steps = walk([50.0, *repeat(10.0, failures)], Limits(100, 3, 20, step, limit))
    assert [following.round for _, following, _ in steps] == [0] * failures + [1]


def test_early_stopping_ends_with_the_last_epoch_at_the_latest_and_never_sets_the_best_of_the_run():
    steps = walk(np.arange(1, 8) * 10.0, Limits(7, 3, 20))
    assert phases(steps) == [(0, 0, 7)]
    assert kept(steps) == list(range(7)) and new_bests(steps) == []
    following = steps[-1][1]
    assert following == Place(round=1, best=70.0)


# fine-tuning ------------------------------------------------------------------------------------------------------------


def test_a_round_has_all_its_epochs_whatever_they_bring():
    steps = walk(chain([50.0, 51.0, 52.0], [10.0] * 3), Limits(3, 1, 20))
    assert phases(steps) == [(0, 0, 3), (0, 1, 3)]


def test_in_a_round_there_is_no_margin():
    place = Place(round=1, best=50.0, margin=1.5)
    following, verdict = advance(place, 50.01, Limits(9, 3, 20))
    assert verdict.keep and following.best == 50.01
    assert not advance(place, 50.0, Limits(9, 3, 20))[1].keep


def test_the_first_round_counts_as_progress_even_without_a_gain():
    limits = Limits(2, 2, 20)
    steps = walk([60.0, 61.0, *[10.0] * 4], limits)
    assert phases(steps) == [(0, 0, 2), (0, 1, 2), (0, 2, 2)]
    # the second brought nothing either, and the outer loop is over
    assert steps[-1][1] == Place(outer=1)


def test_a_round_without_gain_ends_the_outer_loop():
    limits = Limits(2, 2, 20)
    gaining = [60.0, 61.0, 62.0, 10.0, 10.0, 63.0, 64.0, 65.0]
    steps = walk([*gaining, 65.0, 64.9], limits)
    assert phases(steps) == [(0, 0, 2), (0, 1, 2), (0, 2, 2), (0, 3, 2), (0, 4, 2)]
    assert steps[-2][1].outer == 0 and steps[-1][1].outer == 1


def test_rounds_go_on_as_long_as_each_gains():
    steps = walk(np.arange(1, 200) / 100, Limits(2, 1, 20))
    assert phases(steps) == [(0, number, 2) for number in range(20)]
    assert steps[-1][1].done


@pytest.mark.parametrize("inner_loops", [1, 2, 3, 5])
def test_max_inner_loop_is_one_more_than_the_rounds(inner_loops):
    steps = walk(np.arange(1, 1000) / 100, Limits(3, 2, inner_loops))
    assert phases(steps) == [(outer, number, 3) for outer in range(2) for number in range(inner_loops)]
    assert steps[-1][1].done and not any(following.done for _, following, _ in steps[:-1])


def test_the_best_of_the_run_survives_outer_loops_and_the_best_of_the_outer_loop_does_not():
    limits = Limits(2, 2, 3)
    first = [50.0, 50.0, 70.0, 60.0, 60.0, 60.0]
    second = [40.0, 40.0, 69.0, 70.0, 70.01, 60.0]
    steps = walk([*first, *second], limits)
    assert phases(steps) == [(o, r, 2) for o in range(2) for r in range(3)]
    assert kept(steps) == [0, 2, 6, 8, 9, 10]
    assert new_bests(steps) == [2, 10]
    assert steps[6][0] == Place(outer=1, best_of_run=70.0)
    assert steps[-1][1] == Place(outer=2, best_of_run=70.01, done=True)


def test_early_stopping_above_the_best_of_the_run_changes_nothing_for_it():
    steps = walk([90.0, 91.0, 92.0], Limits(1, 1, 4))
    assert kept(steps) == [0, 1, 2] and new_bests(steps) == [1, 2]


# odd sequences ----------------------------------------------------------------------------------------------------------


def test_nan_never_wins():
    limits = Limits(30, 1, 5)
    steps = walk(repeat(NAN), limits)
    assert kept(steps) == new_bests(steps) == []
    # twenty failures end early stopping, one round without gain ends the rest
    assert phases(steps) == [(0, 0, 20), (0, 1, 30)]
    assert all(following.best == 0 and following.best_of_run == 0 for _, following, _ in steps)
    place = Place(round=2, best=10.0, before=10.0, best_of_run=10.0)
    following, verdict = advance(place, NAN, limits)
    assert following.best == 10.0 and verdict == (False, False)


def test_an_accuracy_of_zero_wins_nothing():
    steps = walk([0.0, 0.0, 0.0], Limits(1, 3, 2))
    assert kept(steps) == []
    # a first round that leaves the best at zero is no progress
    assert phases(steps) == [(0, 0, 1), (0, 1, 1), (1, 0, 1)]


def test_one_epoch_per_phase():
    steps = walk([50.0, 51.0, 51.0, 40.0, 39.0, 38.0], Limits(1, 2, 20))
    assert phases(steps) == [(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 1), (1, 1, 1), (1, 2, 1)]
    assert kept(steps) == [0, 1, 3] and new_bests(steps) == [1]
    assert steps[-1][1].done


def test_without_selection_there_is_one_phase_of_all_epochs():
    """And without a step no margin, so that the best of them is the best however long it takes."""
    steps = walk([50.0, *repeat(10.0, 98), 50.01], Limits(100, 1, 1, margin_step=0))
    assert phases(steps) == [(0, 0, 100)]
    assert kept(steps) == [0, 99]
    assert steps[-1][1].done


# any sequence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_what_holds_for_any_sequence(seed):
    rng = np.random.default_rng(seed)
    limits = Limits(*(int(n) for n in rng.integers((1, 1, 1), (30, 4, 6))))
    values = np.round(50 + 5 * rng.standard_normal(4000).cumsum() / np.sqrt(np.arange(1, 4001)), 2)
    values[rng.random(4000) < 0.05] = NAN
    steps = walk(values.tolist(), limits)
    assert steps[-1][1].done
    found = phases(steps)
    assert [outer for outer, number, _ in found if number == 0] == list(range(limits.outer_loops))
    assert all(number < limits.inner_loops for _, number, _ in found)
    assert all(epochs == limits.epochs for _, number, epochs in found if number)
    assert all(1 <= epochs <= limits.epochs for _, number, epochs in found if not number)
    for outer in range(limits.outer_loops):
        own = [
            (place, value, verdict)
            for (place, _, verdict), value in zip(steps, values, strict=False)
            if place.outer == outer
        ]
        saved = [value for _, value, verdict in own if verdict.keep]
        assert saved == sorted(set(saved))  # ever better
        tuned = [value for place, value, _ in own if place.round and not math.isnan(value)]
        if tuned and saved:
            # early stopping may leave a little on the table, fine-tuning nothing
            assert max(saved) >= max(tuned)
        before = [max([v for p, v, d in own if p.round < r and d.keep], default=0.0) for r in range(7)]
        rounds = max(place.round for place, _, _ in own)
        # all rounds but the last gained; the first is measured against nothing
        assert all(before[r + 1] > (before[r] if r > 1 else 0) for r in range(1, rounds))
    best = 0.0
    for (place, _, verdict), value in zip(steps, values, strict=False):
        expected = place.round > 0 and verdict.keep and value > best
        best = value if expected else best
        assert verdict.new_best == expected
    assert steps[-1][1].best_of_run == best


# learning rates and names -----------------------------------------------------------------------------------------------


def test_the_learning_rate_is_constant_in_early_stopping_and_falls_at_40_and_80_in_every_round():
    for outer in (0, 2):
        assert {learning_rate(Place(outer=outer, epoch=e), 0.01) for e in range(100)} == {0.01}
        for number in (1, 2, 19):
            rates = [learning_rate(Place(outer=outer, round=number, epoch=e), 0.02) for e in range(100)]
            assert rates == pytest.approx([0.02] * 40 + [0.002] * 40 + [0.0002] * 20)


def test_the_phases_have_names():
    assert name_of(Place()) == "outer loop 1, early stopping"
    assert name_of(Place(outer=2, round=5, epoch=7)) == "outer loop 3, round 5"
