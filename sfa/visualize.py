"""What runs learned: `python -m sfa.visualize RUN [RUN ...] [--out FIGURE.png]`.

Above, test accuracy by epoch: the mean of each method over the runs given, with the range over seeds. Below, for the first
run that made a selection, the clean probabilities of its last epoch in each observed class: clean against mislabelled.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, exit_cleanly

PANELS = 10


def read_curve(folder: Path) -> tuple[str, np.ndarray]:
    """Method (with its fidelity, if it is not the paper's) and test accuracy per epoch of a run directory."""
    try:
        description = json.loads((folder / "args.json").read_text())
        with (folder / "log.csv").open(newline="") as file:
            accuracy = [float(row["test_accuracy"]) for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no run directory: {Path(error.filename).name} is missing") from None
    released = description["arguments"].get("fidelity") == "released"
    return description["method"] + (" (released)" if released else ""), np.array(accuracy)


def draw_curves(axes, runs: list[Path]) -> None:
    """Mean test accuracy by epoch of each method, shaded from the worst to the best run."""
    curves: dict[str, list[np.ndarray]] = {}
    for folder in runs:
        method, accuracy = read_curve(folder)
        curves.setdefault(method, []).append(accuracy)
    for method, accuracies in curves.items():
        length = min(map(len, accuracies))
        stacked = np.stack([a[:length] for a in accuracies])
        epochs = np.arange(1, length + 1)
        (line,) = axes.plot(epochs, stacked.mean(axis=0), label=f"{method}, {len(stacked)} run(s)")
        axes.fill_between(epochs, stacked.min(axis=0), stacked.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


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
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1])
    draw_curves(upper.subplots(), runs)
    selecting = [folder for folder in runs if (folder / "clean_probability.npz").is_file()]
    if selecting:
        with np.load(selecting[0] / "clean_probability.npz", allow_pickle=False) as file:
            arrays = dict(file)
        lower.suptitle("clean probability by observed class, network 1, last epoch", fontsize=10)
        draw_histograms(lower.subplots(2, PANELS // 2).ravel(), arrays)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, dpi=110, format=out.suffix.lstrip(".") or "png")
    temporary.replace(out)


def main(argv=None) -> None:
    """Parse the command line and draw."""
    parser = Parser(prog="python -m sfa.visualize", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, of SFA or of a baseline")
    parser.add_argument(
        "--out", default="sfa.png", metavar="FILE", help="the figure to write (.png, .pdf or .svg)"
    )
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in (".png", ".pdf", ".svg") or not out.parent.is_dir():
        raise UserError(f"--out {out}: name a .png, .pdf or .svg file in a folder that is there")
    draw([Path(run) for run in args.runs], out)
    print(f"figure in {out}")


if __name__ == "__main__":
    exit_cleanly(main)
