"""The nested loops of Me-Momentum (README, section 4): which phase is next, when it ends, which weights are kept.

    confident = all training samples
    for outer in range(outer_loops):
        network = fresh weights
        train on `confident` until early stopping                  # round 0, `_early_stopping`
        for round in 1, ..., rounds:                               # the inner loop, `_fine_tuning`
            network = the best weights of this outer loop
            confident = training samples whose observed label the network predicts
            fine-tune on `confident` for `epochs` epochs
            if round > 1 and the best of this outer loop is not better than after the round before: break
    report the test accuracy of the best fine-tuning epoch of the run

"Best" is by balanced accuracy on the noisy validation part, after every epoch. `advance` takes one step of these loops, so that
a run can stop and resume at any epoch. `main.py` does what a phase begins with (`begin_phase`) and trains.
"""

from typing import NamedTuple


class Limits(NamedTuple):
    """The bounds of the loops."""

    epochs: int  # of a round; of the early-stopping phase at most
    outer_loops: int
    rounds: int  # of an inner loop, at most
    margin_step: float = 0.1  # percentage points that a failure adds to the margin
    margin_limit: float = 2.0  # early stopping ends when the margin is above it


class Place(NamedTuple):
    """Where a run is, before an epoch. All accuracies are balanced validation accuracies in percent."""

    outer: int = 0
    round: int = 0  # 0: early stopping
    epoch: int = 0  # of the round
    best_of_loop: float = 0.0  # over all epochs of this outer loop
    margin: float = 0.0  # by which an epoch of early stopping must beat best_of_loop
    best_before_round: float = 0.0  # best_of_loop when the last successful round ended
    best_of_run: float = 0.0  # over the fine-tuning epochs of all outer loops
    done: bool = False


class Verdict(NamedTuple):
    """What an epoch's weights are."""

    best_of_loop: bool  # they extract the next confident examples
    best_of_run: bool  # theirs is the test accuracy to report


def advance(place: Place, validation: float, limits: Limits) -> tuple[Place, Verdict]:
    """The place after an epoch that reached this validation accuracy, and what its weights are; NaN is never the best."""
    if place.round == 0:
        return _early_stopping(place, validation, limits)
    return _fine_tuning(place, validation, limits)


def _early_stopping(place: Place, validation: float, limits: Limits) -> tuple[Place, Verdict]:
    best = validation > place.best_of_loop + place.margin
    # failures add up as in the release: in floating point twenty times 0.1 are above 2 and end the phase
    margin = 0.0 if best else place.margin + limits.margin_step
    place = place._replace(best_of_loop=validation if best else place.best_of_loop, margin=margin)
    if place.margin > limits.margin_limit or place.epoch + 1 == limits.epochs:
        place = _next_round(place, limits)
    else:
        place = place._replace(epoch=place.epoch + 1)
    return place, Verdict(best_of_loop=best, best_of_run=False)


def _fine_tuning(place: Place, validation: float, limits: Limits) -> tuple[Place, Verdict]:
    best_of_loop = validation > place.best_of_loop
    best_of_run = best_of_loop and validation > place.best_of_run
    if best_of_loop:
        place = place._replace(best_of_loop=validation)
    if best_of_run:
        place = place._replace(best_of_run=validation)
    if place.epoch + 1 < limits.epochs:
        place = place._replace(epoch=place.epoch + 1)
    elif place.best_of_loop > place.best_before_round:
        place = _next_round(place._replace(best_before_round=place.best_of_loop), limits)
    else:
        place = _next_outer_loop(place, limits)
    return place, Verdict(best_of_loop, best_of_run)


def _next_round(place: Place, limits: Limits) -> Place:
    if place.round < limits.rounds:
        return place._replace(round=place.round + 1, epoch=0)
    return _next_outer_loop(place, limits)


def _next_outer_loop(place: Place, limits: Limits) -> Place:
    following = Place(outer=place.outer + 1, best_of_run=place.best_of_run)
    return following._replace(done=following.outer == limits.outer_loops)


def name_of(place: Place) -> str:
    """The phase in words."""
    return f"outer loop {place.outer + 1}, {f'round {place.round}' if place.round else 'early stopping'}"


def learning_rate(place: Place, lr: float) -> float:
    """`lr` in early stopping; in each round it drops by 10x at epoch 40 and again at epoch 80."""
    for milestone in (40, 80) if place.round > 0 else ():
        if place.epoch >= milestone:
            lr *= 0.1
    return lr
