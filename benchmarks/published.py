"""Published figures beside ours, each with what is known of its source; unconfirmed ones are shown as such, never compared.

`reported/<paper>.csv` has a figure per line: paper, table, dataset, noise_type, noise_rate, imbalance, method, metric, value,
std, status, source. status: `confirmed`, read in the paper's own table; `secondary`, read in another publication's or project's
table (`paper` then says whose); `unconfirmed`, remembered by somebody and found in no source we could read.
"""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import PAPERS, ROOT, Cell

FOLDER = ROOT / "benchmarks" / "reported"
METRICS = ("best", "at_best_validation", "last")


def read_published(paper: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """The published figures of a paper's tables; none where there is no file of them."""
    path = folder / f"{paper}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def beside(cells: Sequence[Cell], rows: Sequence[dict]) -> list[str]:
    """Lines of text: for each published setting among the cells, our figures from result rows, then the published ones.

    The whole of each source stands in the file.
    """
    published = PAPERS[cells[0].paper].published
    settings = dict.fromkeys(published[cell.preset] for cell in cells if cell.preset in published)
    figures = read_published(cells[0].paper) if settings else []
    lines = []
    for setting in settings:
        presets = [cell.preset for cell in cells if published.get(cell.preset) == setting]
        lines += ["", f"{', '.join(setting)}: accuracy in percent"]
        lines += [f"  {text}" for text in _ours({tuple(p.split("/")[:2]) for p in presets}, rows)]
        lines += [
            f"  {_with_spread(row):>6}  {row['method']}, {_which(row)}published [{row['status']}: {row['source'].split(',')[0]}]"
            for row in figures
            if (row["dataset"], row["noise_type"], row["noise_rate"])[: len(setting)] == setting
        ]
    return lines


def _which(figure: dict[str, str]) -> str:
    """What of a run the figure is, where it is said: its peak, its end, the mean of its last epochs."""
    metric = figure["metric"].removesuffix(" (%)")
    return "" if metric in ("test accuracy", "top-1 accuracy", "test_acc") else f"{metric}, "


def _with_spread(figure: dict[str, str]) -> str:
    return f"{figure['value']} ± {figure['std']}" if figure["std"] else figure["value"]


def _ours(places: set[tuple[str, ...]], rows: Sequence[dict]) -> list[str]:
    """Mean and standard deviation over seeds of each method's metrics, of the result rows of these (table, cell) places."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        if (row["table"], row["cell"]) in places and row["metric"] in METRICS:
            condition = f"profile {row['profile']}, {row['fidelity']}, {row['epochs']} epochs"
            found.setdefault((row["method"], row["metric"], condition), []).append(float(row["value"]))
    lines = []
    for (method, metric, condition), values in found.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"{statistics.mean(values):6.2f}{spread}  {method}, ours, {metric} ({condition})")
    return lines
