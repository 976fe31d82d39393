"""What SFA selects, and how its centroids move: `python -m sfa.visualize RUN [RUN ...] [--out FIGURE.png]`.

Above: test accuracy by epoch for each setting (data, long tail and noise). Lines are the mean of each method over the runs
given, bands the range over seeds. In the middle: clean probabilities by observed class of one run's last selection, clean
against mislabelled if the true labels are known. It is the first finished run that selected by stochastic feature averaging,
or else by small losses. Below: the path of its drawn centroids; for all runs of its setting the accuracy of every class by its
number of samples, and the selection by epoch.
"""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m sfa.visualize", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, of SFA or of a baseline")
    parser.add_argument(
        "--out", default="sfa.png", metavar="FILE", help="the figure to write (.png, .pdf or .svg)"
    )
    return parser


cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
from matplotlib.artist import Artist
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA

from common.datasets.arrays import is_integer, read_npz
from common.noise import POSTERIOR_TYPES
from common.runs import figures
from common.runs.cli import UserError
from common.runs.figures import RunResult, naming
from sfa.evaluation import shots

PAPER = "sfa"
WEBVISION = {"selection": "sfa", "warm_up": 1}  # what Train_webvision.py has no flags for
IN_A_ROW, ROWS = 5, 2  # classes shown of a selection
WITH_TRUTH, WITHOUT_TRUTH = {"clean": "tab:blue", "mislabelled": "tab:orange"}, {"truth unknown": "tab:gray"}
MARKS = {"many": "o", "medium": "s", "few": "^"}  # of the shots
NOISE = {
    "imb": "{rate:.4g} % noise by class size",
    "sym": "{rate:.4g} % symmetric noise",
    **dict.fromkeys(POSTERIOR_TYPES, "{rate:.4g} % {kind} noise"),
    "given": "given labels",
    "real": "labels of the search",
}
QUALITIES = {"net1_auc": "AUC of the clean probabilities", "net1_selected": "samples selected"}


class History(NamedTuple):
    """What log.csv and noise.json say of a run's K classes and E epochs."""

    counts: np.ndarray  # observed samples of each class, int [K]
    accuracy: np.ndarray  # of each class in percent, float [K, E]; NaN where no test sample is of it
    quality: dict[str, np.ndarray]  # by the names of QUALITIES, float [E]; NaN if it is unknown


class Shown(NamedTuple):
    """The run of which the selection is shown: N samples, K classes."""

    run: RunResult
    probability: np.ndarray  # float [N]: clean probability by network 1 at the last selection
    observed: np.ndarray  # int [N]
    clean: np.ndarray | None  # true labels, int [N], None if they are unknown
    classes: np.ndarray  # those shown, int, the most frequent first
    centroids: np.ndarray | None  # float [selections, K, D]: drawn ones of network 1, where it draws any


# reading --------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> RunResult:
    """A run of this directory's scripts or of a baseline. UserError: it is none, damaged, or of another paper."""
    with naming(folder):
        run = figures.read_run(folder)
    description = json.loads((folder / "args.json").read_text())
    paper = description.get("paper")
    if paper != PAPER:
        raise UserError(f"{folder} is a run of {paper or 'an unknown paper'}, not of {PAPER}")
    if not len(run.epochs):
        raise UserError(f"{folder / 'log.csv'} has no epoch yet")
    with naming(folder / "args.json"):
        arguments = run.curve.arguments | {"setting": setting(run.curve.arguments, description["cell"])}
        if "num_class" in arguments:  # of the paper's scripts, no baseline
            arguments = WEBVISION | arguments
            arguments |= {name: float(arguments[name]) for name in ("warm_up", "p_threshold")}
    return run._replace(curve=run.curve._replace(arguments=arguments))


def setting(arguments: dict, cell: dict) -> str:
    """Data set, long tail and label noise of a run, in two lines; cell: as in a result row, which a baseline has too."""
    kind, rate, factor = cell["noise_type"], 100 * (cell["noise_rate"] or 0), cell["imb_factor"]
    words, subset = [cell["dataset"]], cell["profile"].partition("+limit_train=")[2].partition("+")[0]
    if "num_class" in arguments and "dataset" not in arguments:  # of WebVision
        words.append(f"{arguments['num_class']} classes")
    if subset:
        words.append(f"{subset} images")
    if factor and factor != 1:
        words.append(f"imbalance {1 / factor:.4g}{' in steps' * (arguments.get('imb_type') == 'step')}")
    return f"{', '.join(words)}\n{NOISE.get(kind, 'labels of {kind}').format(rate=rate, kind=kind)}"


def run_to_show(runs: list[RunResult]) -> RunResult | None:
    """The first finished run that selected by stochastic feature averaging, or else by small losses."""
    files = ("result.json", "clean_probability.npz")
    finished = [run for run in runs if all((run.folder / name).is_file() for name in files)]
    selecting = [run for run in finished if run.curve.arguments.get("selection", "none") != "none"]
    return min(selecting, key=lambda run: run.curve.arguments["selection"] != "sfa", default=None)


def read_history(folder: Path) -> History:
    """Accuracies and selections of every epoch; K = 0 if the log has no classes. UserError: log.csv or noise.json is damaged."""
    path = folder / "log.csv"
    with naming(path), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        classes = sum(name.startswith("class_") for name in rows[0])
        accuracy = np.array([[float(row[f"class_{k}"] or "nan") for row in rows] for k in range(classes)])
        quality = {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in QUALITIES}
    path = folder / "noise.json"
    with naming(path):
        counts = np.array(json.loads(path.read_text())["observed_counts"] if classes else [], int)
        if counts.shape != (classes,):
            raise ValueError(f"its observed_counts are not of the {classes} classes in log.csv")
    return History(counts, accuracy, quality)


def read_histories(runs: list[RunResult]) -> dict[str, list[History]]:
    """By method, the runs of one setting whose log has classes. UserError: damaged, or of other classes."""
    by_method, num_classes = {}, 0
    for run in runs:
        history = read_history(run.folder)
        classes = len(history.counts)
        if num_classes and classes not in (0, num_classes):
            raise UserError(
                f"{run.folder} has {classes} classes, the runs before it have {num_classes}: other data"
            )
        if classes:
            by_method.setdefault(run.curve.method, []).append(history)
            num_classes = classes
    return by_method


def classes_to_show(counts: np.ndarray) -> np.ndarray:
    """At most ten classes, evenly spaced by their rank in observed samples, int [K], the most frequent first."""
    ranked = np.argsort(-counts, kind="stable")[: (counts > 0).sum()]
    ranks = np.linspace(0, len(ranked) - 1, min(ROWS * IN_A_ROW, len(ranked)))
    return ranked[ranks.round().astype(int)]


def read_shown(run: RunResult) -> Shown:
    """The last selection of a run, and its centroids. UserError: damaged."""
    counts, path = read_history(run.folder).counts, run.folder / "clean_probability.npz"
    with naming(path):
        arrays = read_npz(path)
        probability, observed, clean = arrays["net1"], arrays["observed"], arrays.get("clean")
        labels = [observed] if clean is None else [observed, clean]
        if {array.shape for array in (probability, *labels)} != {(counts.sum(),)}:
            raise ValueError(f"its arrays are not of the {counts.sum()} samples in noise.json")
        if not all(is_integer(array) and 0 <= array.min() <= array.max() < len(counts) for array in labels):
            raise ValueError("observed or clean is not labels")
        if not np.array_equal(np.bincount(observed, minlength=len(counts)), counts):
            raise ValueError("observed is not of the labels that noise.json counts")
        if probability.dtype.kind != "f" or not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError("net1 is not probabilities")
    return Shown(run, probability, observed, clean, classes_to_show(counts), read_centroids(run, len(counts)))


def read_centroids(run: RunResult, classes: int) -> np.ndarray | None:
    """Drawn centroids of network 1, float64 [selections, classes, D]; None where it draws none. UserError: damaged."""
    path = run.folder / "centroids.npz"
    if not path.is_file():
        return None
    with naming(path):
        centroids = read_npz(path)["net1"]
        if centroids.ndim != 3 or centroids.shape[1] != classes or centroids.shape[2] < 2:
            raise ValueError(f"net1 of shape {centroids.shape} is not centroids of the {classes} classes")
        if not 1 <= len(centroids) <= len(run.epochs):
            raise ValueError(f"{len(centroids)} selections in {len(run.epochs)} epochs")
        if centroids.dtype.kind != "f" or not np.isfinite(centroids).all():
            raise ValueError("net1 is not finite numbers")
    return centroids.astype(np.float64)


# drawing --------------------------------------------------------------------------------------------------------------


def class_colors(classes: np.ndarray) -> np.ndarray:
    """A colour for each of the classes shown, float [classes, 4], from the most frequent to the rarest."""
    return figures.plt.colormaps["viridis"](np.linspace(0, 0.8, len(classes)))


def draw_class(axes, shown: Shown, k: int) -> None:
    """Clean probabilities of the samples that are labelled k, clean ones below the others; and the threshold."""
    members = shown.observed == k
    kinds, colors = [members], WITHOUT_TRUTH
    if shown.clean is not None:
        kinds, colors = [members & (shown.clean == k), members & (shown.clean != k)], WITH_TRUTH
    groups = [shown.probability[kind] for kind in kinds]
    axes.hist(groups, np.linspace(0, 1, 21), stacked=True, color=list(colors.values()))
    axes.axvline(shown.run.curve.arguments["p_threshold"], color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=8)


def grid_of(classes: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the classes shown."""
    return -(-len(classes) // IN_A_ROW), min(IN_A_ROW, len(classes))


def draw_selection(figure, shown: Shown) -> None:
    """A histogram for each of the classes shown, titled in the colour of its centroid below."""
    grid = figure.subplots(*grid_of(shown.classes), squeeze=False).ravel()
    for axes, k, color in zip(grid, shown.classes, class_colors(shown.classes), strict=False):
        draw_class(axes, shown, k)
        axes.set_title(f"class {k}: {(shown.observed == k).sum()} samples", fontsize=9, color=color)
    for axes in grid[len(shown.classes) :]:
        axes.axis("off")
    arguments, colors = shown.run.curve.arguments, WITHOUT_TRUTH if shown.clean is None else WITH_TRUTH
    marks: list[Artist] = [Patch(color=color, label=name) for name, color in colors.items()]
    label = f"selected above {arguments['p_threshold']:g}"
    marks.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label=label))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)
    words = ", ".join([shown.run.curve.method, *arguments["setting"].split("\n")])
    title = f"Clean probability by observed class: network 1, last selection, seed {arguments.get('seed')}"
    figure.suptitle(f"{title} ({words})", fontsize=10)


def project(centroids: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions of centroids [E, K, D] in the plane of their principal components over all epochs and the classes present.

    present: bool [K]. The selection does not depend on lengths. Returns points [E, K, 2] and the fractions of the variance
    that the components explain [2].
    """
    directions = centroids / np.linalg.norm(centroids, axis=2, keepdims=True).clip(1e-12)
    size = directions.shape[2]
    pca = PCA(2, svd_solver="covariance_eigh").fit(directions[:, present].reshape(-1, size))
    points = pca.transform(directions.reshape(-1, size)).reshape(*directions.shape[:2], 2)
    return points, pca.explained_variance_ratio_


def draw_centroids(axes, shown: Shown) -> None:
    """The path of the centroid of each class shown, from faint to strong, marked at its end."""
    present = np.bincount(shown.observed, minlength=shown.centroids.shape[1]) > 0
    points, explained = project(shown.centroids, present)
    for k, color in zip(shown.classes, class_colors(shown.classes), strict=True):
        way = points[:, k]
        shades = [to_rgba(color, alpha) for alpha in np.linspace(0.15, 1, len(way))[1:]]
        steps = np.stack([way[:-1], way[1:]], axis=1)
        axes.add_collection(LineCollection(list(steps), colors=shades, linewidths=1.2))
        axes.scatter(*way[-1], s=24, color=color, zorder=3)
        style = {"color": color, "fontsize": 8, "path_effects": [withStroke(linewidth=2, foreground="white")]}
        axes.annotate(str(k), way[-1], (4, 4), textcoords="offset points", zorder=4, **style)
    low, high = (edge(points[:, shown.classes], axis=(0, 1)) for edge in (np.min, np.max))
    middle, half = (low + high) / 2, 0.61 * (high - low).max() or 1
    axes.set_box_aspect(1)  # with limits as wide as high, so that lengths compare
    axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
    for i, (axis, fraction) in enumerate(zip((axes.xaxis, axes.yaxis), explained, strict=True), start=1):
        axis.set_label_text(f"principal component {i} ({100 * fraction:.0f} % of variance)")
    last = shown.run.epochs[-1]
    axes.set_title(f"Directions of the drawn centroids\n{span(last + 1 - len(points), last)}", fontsize=9)


def span(first: int, last: int) -> str:
    """Epochs in words."""
    return f"epoch {last}" if first == last else f"epochs {first} to {last}"


def draw_classes(axes, histories: dict[str, list[History]], styles: dict[str, dict]) -> None:
    """Accuracy of each class at the last epoch by its observed samples: mean of each method; lines: mean of a shot."""
    lasts, shown = set(), []
    for method, members in histories.items():
        last = min(history.accuracy.shape[1] for history in members)
        counts = np.mean([history.counts for history in members], axis=0)
        accuracy = np.mean([history.accuracy[:, last - 1] for history in members], axis=0)
        for shot, classes in shots(counts).items():
            measured = classes & (counts > 0) & np.isfinite(accuracy)
            x, y, style = counts[measured], accuracy[measured], styles[method]
            axes.scatter(x, y, s=16, marker=MARKS[shot], color=style["color"], alpha=0.7, linewidth=0)
            if len(x):
                axes.plot([x.min(), x.max()], [y.mean()] * 2, **style)
            shown.extend(x)
        lasts.add(last)
    axes.set_xscale("log")
    ticks = sorted({float(f"{x:.2g}") for x in np.geomspace(min(shown), max(shown), 5)}) if shown else []
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="observed samples of the class", ylabel="test accuracy of the class (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    epochs = span(min(lasts), max(lasts))
    axes.set_title(f"Accuracy by class after {epochs}\nlines: mean of a shot", fontsize=9)


def draw_quality(axes, histories: dict[str, list[History]], name: str, styles: dict[str, dict]) -> None:
    """One of QUALITIES by epoch: mean of each method that has it, and the range over its runs."""
    values = [(method, history.quality[name]) for method, members in histories.items() for history in members]
    values = [(method, quality) for method, quality in values if np.isfinite(quality).any()]
    figures.set_styles(axes, dict.fromkeys(method for method, _ in values), styles)
    figures.draw_means(axes, values)
    axes.set(ylabel=QUALITIES[name], xlim=(0, 1 + max(len(quality) for _, quality in values)))
    axes.set_title("Selection by network 1\nmean and range over runs", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)


def lower_panels(shown: Shown | None, histories: dict[str, list[History]], styles: dict) -> list[Callable]:
    """The functions that draw the panels of the lowest row: centroids if there are two or more, classes, selection."""
    panels: list[Callable] = [partial(draw_classes, histories=histories, styles=styles)]
    if shown is not None and shown.centroids is not None and len(shown.centroids) * len(shown.classes) > 1:
        panels.insert(0, partial(draw_centroids, shown=shown))
    runs = [history for members in histories.values() for history in members]
    logged = [name for name in QUALITIES if any(np.isfinite(run.quality[name]).any() for run in runs)]
    if logged:
        panels.append(partial(draw_quality, histories=histories, name=logged[0], styles=styles))
    return panels


def draw_lower(figure, panels: list[Callable], styles: dict[str, dict]) -> None:
    """The panels beside each other, with one legend of methods and shots; styles: of the methods in it."""
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
    marks = [Line2D([], [], label=method, **style) for method, style in styles.items()]
    for shot, mark in MARKS.items():
        marks.append(Line2D([], [], color="black", marker=mark, linestyle="", label=f"{shot} shot", ms=4))
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def draw(runs: list[RunResult], shown: Shown | None, histories: dict[str, list[History]], out: Path) -> None:
    """Write the figure: the curves of the runs, the selection of one of them, and classes and selections of its setting."""
    curves = figures.panels(runs, lambda run: f"Test accuracy: {run.curve.arguments['setting']}")
    upper = partial(figures.draw_panels, by_title=curves, warm_up="warm_up")
    parts = [(figures.panel_grid(curves).height, upper)]
    if shown is not None:
        parts.append((1 + 1.5 * grid_of(shown.classes)[0], partial(draw_selection, shown=shown)))
    if histories:
        styles = {m: style for m, style in figures.method_styles(curves).items() if m in histories}
        panels = lower_panels(shown, histories, styles)
        height = 4 + 0.17 * -(-(len(styles) + len(MARKS)) // 4)
        parts.append((height, partial(draw_lower, panels=panels, styles=styles)))
    figures.write_parts(parts, out)


def main(argv=None) -> None:
    """Parse the command line and draw."""
    args = make_parser().parse_args(argv)
    out = figures.checked_path(args.out)
    runs = [read_run(Path(run)) for run in args.runs]
    run = run_to_show(runs)
    first = run or next((run for run in runs if "selection" in run.curve.arguments), runs[0])
    same = [other for other in runs if other.curve.arguments["setting"] == first.curve.arguments["setting"]]
    draw(runs, None if run is None else read_shown(run), read_histories(same), out)
    print(f"figure in {out}")


if __name__ == "__main__":
    cli.exit_cleanly(main)
