"""What the figures of all papers share: accuracy curves of run directories, and a figure written whole."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.cli import UserError

SUFFIXES = (".png", ".pdf", ".svg")


class Curve(NamedTuple):
    """What a run directory says of its run."""

    method: str  # with its fidelity, if it is not the paper's
    arguments: dict
    accuracy: np.ndarray  # test accuracy in percent by epoch


def read_curve(folder: Path) -> Curve:
    """The method, the arguments and the test accuracy of a run directory. UserError: it is none, or damaged."""
    try:
        description = json.loads((folder / "args.json").read_text())
        with (folder / "log.csv").open(newline="") as file:
            accuracy = np.array([float(row["test_accuracy"]) for row in csv.DictReader(file)])
        arguments, method = description["arguments"], description["method"]
        released = arguments.get("fidelity") == "released"
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is no run directory: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error})") from None
    return Curve(method + (" (released)" if released else ""), arguments, accuracy)


def draw_curves(axes: Axes, curves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Mean test accuracy by epoch of each method, shaded from the worst to the best run; curves: (method, accuracy)."""
    by_method: dict[str, list[np.ndarray]] = {}
    for method, accuracy in curves:
        by_method.setdefault(method, []).append(accuracy)
    for method, accuracies in by_method.items():
        length = min(map(len, accuracies))
        stacked = np.stack([accuracy[:length] for accuracy in accuracies])
        epochs = np.arange(1, length + 1)
        (line,) = axes.plot(epochs, stacked.mean(axis=0), label=f"{method}, {len(stacked)} run(s)")
        axes.fill_between(epochs, stacked.min(axis=0), stacked.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def checked_path(text: str) -> Path:
    """Where --out says that a figure goes. UserError: no kind of figure, or no folder that is there."""
    out = Path(text)
    if out.suffix not in SUFFIXES or not out.parent.is_dir():
        raise UserError(f"--out {out}: name a .png, .pdf or .svg file in a folder that is there")
    return out


def write(figure: Figure, out: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, dpi=110, format=out.suffix.lstrip("."))
    plt.close(figure)
    temporary.replace(out)
