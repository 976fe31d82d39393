"""The alternation of Me-Momentum (Sec. 4): which phase comes next, when it ends, which weights are kept.

An outer loop begins with a fresh network, trained on the current set until early stopping (round 0). Its inner loop then
goes round by round: extract confident examples with the best weights so far, fine-tune those weights on them (rounds 1, 2,
...), as long as a round brings a better validation accuracy. The last confident set is what the next outer loop begins with.
"""

from typing import NamedTuple


class Limits(NamedTuple):
    """The flags that bound the loops."""

    epochs: int  # of a round; of the early-stopping phase at most
    outer_loops: int
    inner_loops: int  # one more than the rounds that are run, as in the release
    margin_step: float = 0.1  # points that a failure adds to the margin
    margin_limit: float = 2.0  # early stopping ends when the margin is above it


class Place(NamedTuple):
    """Where a run is, before an epoch. All accuracies are balanced validation accuracies in percent."""

    outer: int = 0
    round: int = 0  # 0: early stopping
    epoch: int = 0  # of the round
    best: float = 0.0  # of this outer loop
    margin: float = 0.0  # by which early stopping wants the best to be beaten
    before: float = 0.0  # the best when the last round ended
    best_of_run: float = 0.0  # over fine-tuning epochs alone
    done: bool = False


class Verdict(NamedTuple):
    """What an epoch's weights are."""

    keep: bool  # the best of this outer loop: they make the next selection
    new_best: bool  # the best of the run: theirs is the test accuracy to report


def advance(place: Place, validation: float, limits: Limits) -> tuple[Place, Verdict]:
    """The place after an epoch that reached this validation accuracy, and what its weights are; NaN never wins."""
    if place.round == 0:
        return _early_stopping(place, validation, limits)
    return _fine_tuning(place, validation, limits)


def _early_stopping(place: Place, validation: float, limits: Limits) -> tuple[Place, Verdict]:
    keep = validation > place.best + place.margin
    # failures add up as in the release: twenty times 0.1 are a little more than 2, and end the phase
    margin = 0.0 if keep else place.margin + limits.margin_step
    place = place._replace(best=validation if keep else place.best, margin=margin)
    if place.margin > limits.margin_limit or place.epoch + 1 == limits.epochs:
        place = _next_round(place, limits)
    else:
        place = place._replace(epoch=place.epoch + 1)
    return place, Verdict(keep, new_best=False)


def _fine_tuning(place: Place, validation: float, limits: Limits) -> tuple[Place, Verdict]:
    keep = validation > place.best
    new_best = keep and validation > place.best_of_run
    if keep:
        place = place._replace(best=validation)
    if new_best:
        place = place._replace(best_of_run=validation)
    if place.epoch + 1 < limits.epochs:
        place = place._replace(epoch=place.epoch + 1)
    elif place.best > place.before:
        place = _next_round(place._replace(before=place.best), limits)
    else:
        place = _next_outer_loop(place, limits)
    return place, Verdict(keep, new_best)


def _next_round(place: Place, limits: Limits) -> Place:
    if place.round + 1 < limits.inner_loops:
        return place._replace(round=place.round + 1, epoch=0)
    return _next_outer_loop(place, limits)


def _next_outer_loop(place: Place, limits: Limits) -> Place:
    following = Place(outer=place.outer + 1, best_of_run=place.best_of_run)
    return following._replace(done=following.outer == limits.outer_loops)


def name_of(place: Place) -> str:
    """The phase in words."""
    return f"outer loop {place.outer + 1}, {f'round {place.round}' if place.round else 'early stopping'}"


def learning_rate(place: Place, lr: float) -> float:
    """Constant until early stopping; in each round a tenth from epoch 40 on, a hundredth from epoch 80 on."""
    for milestone in (40, 80) if place.round > 0 else ():
        if place.epoch >= milestone:
            lr *= 0.1
    return lr
