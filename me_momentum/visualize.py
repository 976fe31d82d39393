"""How the confident set grows: `python -m me_momentum.visualize RUN [RUN ...] [--out FIGURE.png]`.

A column for each setting (data set and noise). Above, test accuracy by epoch: the mean of each method over the runs given,
with the range over seeds. Below, round by round for the first run that extracted confident examples: what the set is like, and
the test accuracy that was reached by training on it.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import figures
from common.runs.cli import Parser, UserError, exit_cleanly

# columns of log.csv that are shown by round, with their names in the figure and the factor that makes them percent
SHOWN = {
    "confident_share": ("share of the training part", 100),
    "confident_precision": ("right labels in the set (precision)", 100),
    "confident_recall": ("right labels that are in the set (recall)", 100),
    "hard_share": ("hard examples in the set", 100),
    "test_accuracy": ("test accuracy, end of the round", 1),
}


class RunResult(NamedTuple):
    """What is read of a run directory."""

    folder: Path
    curve: figures.Curve
    rounds: list[dict[str, str]]  # the last row of each phase that was trained on a confident set


def read_run(folder: Path) -> RunResult:
    """Curve and rounds of a run directory. UserError: it is none, or not of Me-Momentum."""
    curve = figures.read_curve(folder)
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    phase = "round" if rows and "round" in rows[0] else "inner"
    if not rows or not {"outer", phase, "confident_size"} <= set(rows[0]):
        raise UserError(f"{folder / 'log.csv'} is not of Me-Momentum: it has no rounds")
    last = {(row["outer"], row[phase]): row for row in rows if row["confident_size"]}
    return RunResult(folder, curve, list(last.values()))


def setting(run: RunResult) -> str:
    """Data set and noise of a run, in words."""
    arguments = run.curve.arguments
    if "noise_type" not in arguments:
        return "Clothing1M"
    noise = f"{arguments['noise_type']} noise, rate {arguments['noise_rate']}"
    return f"{arguments['dataset']}, {'given labels' if arguments['noise_type'] == 'given' else noise}"


def draw_rounds(axes, run: RunResult) -> None:
    """What the confident set is like, by round; a dotted line where a fresh network begins."""
    numbers = np.arange(1, len(run.rounds) + 1)
    for column, (label, factor) in SHOWN.items():
        values = [row.get(column) or "nan" for row in run.rounds]
        values = factor * np.array([float(value) for value in values])
        if not np.isnan(values).all():
            axes.plot(numbers, values, marker=".", label=label)
    for number, before, row in zip(numbers[1:], run.rounds, run.rounds[1:], strict=False):
        if row["outer"] != before["outer"]:
            axes.axvline(number - 0.5, color="gray", linestyle=":")
    axes.set(xlabel=f"phase on a confident set ({run.folder.name})", ylabel="percent", ylim=(0, 102))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.14), fontsize=7)
    axes.grid(alpha=0.3)


def draw(runs: list[RunResult], out: Path) -> None:
    """Write the figure of the given runs."""
    settings: dict[str, list[RunResult]] = {}
    for run in runs:
        settings.setdefault(setting(run), []).append(run)
    figure = figures.plt.figure(figsize=(1 + 5 * len(settings), 8), layout="constrained")
    grid = figure.subplots(2, len(settings), squeeze=False)
    for (title, members), upper, lower in zip(settings.items(), *grid, strict=True):
        figures.draw_curves(upper, [(run.curve.method, run.curve.accuracy) for run in members])
        upper.set_title(title, fontsize=10)
        selecting = [run for run in members if run.rounds]
        if selecting:
            draw_rounds(lower, selecting[0])
        else:
            lower.axis("off")
    figures.write(figure, out)


def main(argv=None) -> None:
    """Parse the command line and draw."""
    parser = Parser(prog="python -m me_momentum.visualize", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of main.py or Clothing.py")
    parser.add_argument(
        "--out", default="me_momentum.png", metavar="FILE", help="the figure to write (.png, .pdf or .svg)"
    )
    args = parser.parse_args(argv)
    out = figures.checked_path(args.out)
    draw([read_run(Path(run)) for run in args.runs], out)
    print(f"figure in {out}")


if __name__ == "__main__":
    exit_cleanly(main)
