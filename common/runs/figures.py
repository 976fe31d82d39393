"""Figures of all papers: accuracy curves of run directories, atomic writes."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from common.runs.cli import UserError
from common.runs.files import cannot_write, write_atomic

SUFFIXES = (".png", ".pdf", ".svg")
COLORS = plt.colormaps["tab10"].colors  # type: ignore[attr-defined]
LINES = ("-", "--", "-.")  # in turn, if there are more methods than colours
WIDTH = 12  # inches, of a figure that has panels of curves
IN_A_ROW = 3  # panels in a row, at most


class Curve(NamedTuple):
    """Method, arguments and accuracy of a run directory."""

    method: str  # with its fidelity, if it is not the paper's
    arguments: dict
    accuracy: np.ndarray  # test accuracy in percent by epoch


class RunResult(NamedTuple):
    """A run of a training script, or of a pre-training script that measures kNN accuracy.

    The curve of a pre-training run is its measured kNN accuracy; its method names the data set too.
    """

    folder: Path
    curve: Curve
    epochs: np.ndarray  # of the curve, from 1
    pretraining: bool


class PanelGrid(NamedTuple):
    """The layout of panels of curves, each with a legend below it."""

    rows: int
    columns: int
    in_legend: int  # entries side by side
    height: float  # inches, of all rows


# reading --------------------------------------------------------------------------------------------------------------


def read_curve(folder: Path) -> Curve:
    """The method, the arguments and the test accuracy of a run directory. UserError: no run directory, or a damaged one."""
    try:
        description = json.loads((folder / "args.json").read_text())
        with (folder / "log.csv").open(newline="") as file:
            accuracy = np.array([float(row["test_accuracy"]) for row in csv.DictReader(file)])
        arguments, method = description["arguments"], description["method"]
        released = arguments.get("fidelity") == "released"
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is no run directory: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error})") from None
    return Curve(method + (" (released)" if released else ""), arguments, accuracy)


def read_run(folder: Path) -> RunResult:
    """A run of training or pre-training. UserError: no run directory, or a damaged one."""
    if measures_knn(folder):
        return read_pretraining(folder)
    curve = read_curve(folder)
    return RunResult(folder, curve, np.arange(1, len(curve.accuracy) + 1), False)


def measures_knn(folder: Path) -> bool:
    """Whether a run's log has a kNN accuracy, as common.pretraining.simclr writes it."""
    try:
        with (folder / "log.csv").open(newline="") as file:
            return "knn_accuracy" in next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def read_pretraining(folder: Path) -> RunResult:
    """A run of pre-training, without the epochs without a kNN accuracy. UserError: it is damaged."""
    try:
        description = json.loads((folder / "args.json").read_text())
        with (folder / "log.csv").open(newline="") as file:
            measured = [row for row in csv.DictReader(file) if row["knn_accuracy"]]
        accuracy = np.array([float(row["knn_accuracy"]) for row in measured])
        epochs = np.array([int(row["epoch"]) for row in measured])
        arguments = description["arguments"]
        curve = Curve(f"{description['method']} on {arguments['dataset']}", arguments, accuracy)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no run directory: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error})") from None
    if not measured:
        raise UserError(f"{folder} has measured no kNN accuracy yet")
    return RunResult(folder, curve, epochs, True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make every error from a damaged file a UserError that names the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error.args[0]}") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())})") from None


# drawing --------------------------------------------------------------------------------------------------------------


def draw_means(axes: Axes, curves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Mean by epoch of each method, shaded from the lowest to the highest run; curves: (method, values by epoch, from 1)."""
    by_method: dict[str, list[np.ndarray]] = {}
    for method, values in curves:
        by_method.setdefault(method, []).append(values)
    for method, members in by_method.items():
        length = min(map(len, members))
        stacked = np.stack([values[:length] for values in members])
        epochs, mean = np.arange(1, length + 1), stacked.mean(axis=0)
        single = np.isfinite(mean).sum() == 1  # a line of one point is invisible
        (line,) = axes.plot(
            epochs, mean, marker="." if single else None, label=f"{method}, {len(stacked)} run(s)"
        )
        axes.fill_between(epochs, stacked.min(axis=0), stacked.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch")
    axes.grid(alpha=0.3)


def draw_curves(axes: Axes, curves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Test accuracy by epoch of each method, as `draw_means`; curves: (method, accuracy in percent)."""
    draw_means(axes, curves)
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
    axes.legend(loc="lower right")


def panels(runs: list[RunResult], title: Callable[[RunResult], str]) -> dict[str, list[RunResult]]:
    """The runs of each panel by its title: training runs of the same title are in one panel, pre-training comes last."""
    by_title: dict[str, list[RunResult]] = {}
    for run in sorted(runs, key=lambda run: run.pretraining):
        key = "Pre-training without labels: kNN accuracy" if run.pretraining else title(run)
        by_title.setdefault(key, []).append(run)
    return by_title


def panel_grid(by_title: dict[str, list[RunResult]]) -> PanelGrid:
    """The layout of the panels: as many in a row as the longest method name in the legend permits."""
    methods = [{run.curve.method for run in runs} for runs in by_title.values()]
    entry = 1.15 + 0.06 * max(len(name) for names in methods for name in names)  # inches, at 8 points
    columns = max(1, min(len(by_title), IN_A_ROW, int(WIDTH / entry)))
    rows, in_legend = -(-len(by_title) // columns), max(1, int(WIDTH / columns / entry))
    lines = -(-(1 + max(map(len, methods))) // in_legend)
    return PanelGrid(rows, columns, in_legend, rows * (3.5 + 0.17 * lines))


def method_styles(by_title: dict[str, list[RunResult]]) -> dict[str, dict]:
    """Colour and line style of each method, the same in all panels."""
    training = [run for members in by_title.values() for run in members if not run.pretraining]
    methods = dict.fromkeys(run.curve.method for run in training)
    return {
        method: {
            "color": COLORS[number % len(COLORS)],
            "linestyle": LINES[number // len(COLORS) % len(LINES)],
        }
        for number, method in enumerate(methods)
    }


def set_styles(axes: Axes, methods: Iterable[str], styles: dict[str, dict]) -> None:
    """Set the styles of the next lines; styles: of `method_styles`."""
    chosen = [styles[method] for method in methods]
    axes.set_prop_cycle(**{name: [style[name] for style in chosen] for name in ("color", "linestyle")})


def draw_setting(axes: Axes, runs: list[RunResult], styles: dict[str, dict], warm_up: str) -> None:
    """Test accuracy by epoch of the runs of one setting, and the end of their warm-up if it is the same.

    styles: of `method_styles`. warm_up: name of the argument with the length of the warm-up.
    """
    set_styles(axes, dict.fromkeys(run.curve.method for run in runs), styles)
    draw_curves(axes, [(run.curve.method, run.curve.accuracy) for run in runs])
    split = [run.curve.arguments for run in runs if run.curve.arguments.get("selection", "none") != "none"]
    ends = {arguments.get(warm_up) for arguments in split}
    end = ends.pop() if len(ends) == 1 else None
    if end is not None:
        axes.axvline(end + 0.5, color="gray", linestyle=":", label="end of the warm-up")


def draw_pretraining(axes: Axes, runs: list[RunResult]) -> None:
    """kNN accuracy by epoch of each data set's pre-training: mean and range over runs at epochs that all of them measured."""
    by_data: dict[str, list[RunResult]] = {}
    for run in runs:
        by_data.setdefault(run.curve.method, []).append(run)
    for method, members in by_data.items():
        epochs = sorted(set.intersection(*({*run.epochs.tolist()} for run in members)))
        values = np.stack([run.curve.accuracy[np.isin(run.epochs, epochs)] for run in members])
        label = f"{method}, {len(members)} run(s)"
        (line,) = axes.plot(epochs, values.mean(axis=0), marker=".", markersize=4, label=label)
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="kNN accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)


def draw_panels(figure: SubFigure, by_title: dict[str, list[RunResult]], warm_up: str) -> None:
    """The panels of curves, legends below them; a method has one colour throughout. warm_up: as of `draw_setting`."""
    styles = method_styles(by_title)
    rows, columns, in_legend, _ = panel_grid(by_title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, members) in zip(grid, by_title.items(), strict=False):
        if members[0].pretraining:
            draw_pretraining(axes, members)
        else:
            draw_setting(axes, members, styles, warm_up)
        axes.set_title(title, fontsize=10)
        legend_below(axes, ncols=in_legend, fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[len(by_title) :]:
        axes.axis("off")


def legend_below(axes: Axes, **options) -> None:
    """A legend below the label of the horizontal axis, for panels of any height."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.8}
    axes.legend(**place, frameon=False, **options)


# writing --------------------------------------------------------------------------------------------------------------


def checked_path(text: str) -> Path:
    """The path of a figure from --out. UserError: an unknown suffix, or a missing folder."""
    out = Path(text)
    if out.suffix not in SUFFIXES or not out.parent.is_dir():
        raise UserError(f"--out {out}: name a .png, .pdf or .svg file in a folder that is there")
    return out


def write_parts(parts: Sequence[tuple[float, Callable[[SubFigure], None]]], out: Path) -> None:
    """Write a figure of parts below each other: for each its height in inches and its drawing function."""
    heights = [height for height, _ in parts]
    engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout=engine)
    rows = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (_, draw) in zip(rows, parts, strict=True):
        draw(row)
    write(figure, out)


def write(figure: Figure, out: Path) -> None:
    """Write a figure atomically, and close it. UserError: it cannot be written."""
    content = io.BytesIO()  # in memory: Pillow's error does not say why a write fails
    try:
        figure.savefig(content, dpi=110, format=out.suffix.lstrip("."))
        write_atomic(out, content.getvalue())
    except OSError as error:
        raise UserError(cannot_write(f"--out {out}", error, "name another file")) from None
    finally:
        plt.close(figure)
