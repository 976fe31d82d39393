"""What runs learned: `python -m sfa.visualize RUN [RUN ...] [--out FIGURE.png]`.

Above, test accuracy by epoch: the mean of each method over the runs given, with the range over seeds. Below, for the first
run that made a selection, the clean probabilities of its last epoch in each observed class: clean against mislabelled.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import figures
from common.cli import Parser, exit_cleanly

PANELS = 10


def draw_histograms(grid, arrays: dict[str, np.ndarray]) -> None:
    """One panel per observed class (at most ten, evenly spaced): clean probabilities, clean against mislabelled."""
    observed, is_clean = arrays["observed"], arrays["observed"] == arrays["clean"]
    classes = np.unique(observed)
    shown = classes[np.linspace(0, len(classes) - 1, min(PANELS, len(classes))).round().astype(int)]
    bins = np.linspace(0, 1, 21)
    for axes, k in zip(grid, shown, strict=False):
        members = observed == k
        groups = [arrays["net1"][members & is_clean], arrays["net1"][members & ~is_clean]]
        axes.hist(
            groups, bins, stacked=True, color=["tab:blue", "tab:orange"], label=["clean", "mislabelled"]
        )
        axes.set_title(f"class {k}, {members.sum()} samples", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    grid[0].legend(fontsize=7)


def draw(runs: list[Path], out: Path) -> None:
    """Write the figure of the given runs."""
    figure = figures.plt.figure(figsize=(11, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1])
    curves = [figures.read_curve(folder) for folder in runs]
    figures.draw_curves(upper.subplots(), [(curve.method, curve.accuracy) for curve in curves])
    selecting = [folder for folder in runs if (folder / "clean_probability.npz").is_file()]
    if selecting:
        with np.load(selecting[0] / "clean_probability.npz", allow_pickle=False) as file:
            arrays = dict(file)
        lower.suptitle("clean probability by observed class, network 1, last epoch", fontsize=10)
        draw_histograms(lower.subplots(2, PANELS // 2).ravel(), arrays)
    figures.write(figure, out)


def main(argv=None) -> None:
    """Parse the command line and draw."""
    parser = Parser(prog="python -m sfa.visualize", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, of SFA or of a baseline")
    parser.add_argument(
        "--out", default="sfa.png", metavar="FILE", help="the figure to write (.png, .pdf or .svg)"
    )
    args = parser.parse_args(argv)
    out = figures.checked_path(args.out)
    draw([Path(run) for run in args.runs], out)
    print(f"figure in {out}")


if __name__ == "__main__":
    exit_cleanly(main)
