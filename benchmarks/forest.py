"""A forest plot of the claims: the difference of every test with its interval, coloured by verdict."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.verdicts import CONTRADICTED, HOLDS, UNDECIDED, Claim, Outcome
from common.runs.figures import write

COLOURS = {HOLDS: "tab:blue", CONTRADICTED: "tab:orange", UNDECIDED: "0.5"}
LINE_HEIGHT = 0.2  # inches


def draw(claims: Sequence[Claim], found: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Write the figure: accuracies on the left, shares and areas under curves on the right. Nothing if no test was run."""
    tests = [(claim, one) for claim in claims for one in found[claim.name] if not math.isnan(one.difference)]
    kinds = [[pair for pair in tests if (pair[1].test.scale == 1) is accuracy] for accuracy in (True, False)]
    if not tests:
        return
    height = LINE_HEIGHT * max(len(kind) + len({claim.name for claim, _ in kind}) for kind in kinds)
    figure, panels = plt.subplots(1, 2, figsize=(16, height + 1.2), layout="constrained")
    titles = ("accuracy", "shares and areas under curves")
    for axes, kind, title in zip(panels, kinds, titles, strict=True):
        axes.set_visible(bool(kind))
        if kind:
            draw_panel(axes, kind)
        axes.set_title(title)
        axes.set_xlabel("points above the bound of the claim, 95 % interval")
    marks = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    write(figure, path)


def draw_panel(axes: Axes, tests: Sequence[tuple[Claim, Outcome]]) -> None:
    """The tests from top to bottom, each claim's below its name."""
    labels, place, before = {}, 0, None
    for claim, one in tests:
        if claim.name != before:
            labels[place] = claim.name
            place, before = place + 1, claim.name
        labels[place] = one.test.data
        ends = (one.difference, one.difference) if math.isnan(one.low) else (one.low, one.high)
        axes.plot(ends, (place, place), color=COLOURS[one.verdict], linewidth=1.8)
        axes.plot(one.difference, place, color=COLOURS[one.verdict], marker="o", markersize=4)
        place += 1
    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    names = {claim.name for claim, _ in tests}
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in names else "normal")
    axes.set_ylim(place - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
