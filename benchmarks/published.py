"""Published figures beside ours, each with its status; unconfirmed ones are shown as such, never compared.

`reported/<paper>.csv` has a figure per line: paper, table, dataset, noise_type, noise_rate, imbalance, method, metric, value,
std, status, source. status: `confirmed`, read in the paper's own table; `secondary`, read in another publication's or
project's table (`paper` then says whose); `unconfirmed`, remembered and found in no source we could read.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.cells import ROOT, Cell
from benchmarks.results import figure

FOLDER = ROOT / "benchmarks" / "reported"
METRICS = ("best", "at_best_validation", "last")
ACCURACIES = ("test accuracy", "top-1 accuracy", "test_acc")  # names that do not say which epoch
SETTING = ["dataset", "noise_type", "noise_rate"]


def read_published(paper: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """The published figures of a paper's tables as text; none without a file."""
    path = folder / f"{paper}.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.is_file() else []


def beside(cells: Sequence[Cell], rows: pd.DataFrame | None) -> list[str]:
    """For each published setting among the cells: our figures from result rows, if any, then the published ones, as lines.

    A published line names its source up to the first comma; the file has all of it.
    """
    settings = dict.fromkeys(cell.published for cell in cells if cell.published)
    figures = read_published(cells[0].paper) if settings else []
    lines = []
    for setting in settings:
        lines += ["", f"{', '.join(setting)}: accuracy in percent"]
        own = ["/".join(cell.preset.split("/")[:2]) for cell in cells if cell.published == setting]
        lines += _ours(rows[(rows["table"] + "/" + rows["cell"]).isin(own)]) if rows is not None else []
        lines += [_theirs(f) for f in figures if tuple(f[n] for n in SETTING)[: len(setting)] == setting]
    return lines


def _theirs(published: dict[str, str]) -> str:
    metric = published["metric"].removesuffix(" (%)")
    which = "" if metric in ACCURACIES else f"{metric}, "
    value = f"{published['value']} ± {published['std']}" if published["std"] else published["value"]
    source = f"{published['status']}: {published['source'].split(',')[0]}"
    return f"  {value:>6}  {published['method']}, {which}published [{source}]"


def _ours(rows: pd.DataFrame) -> list[str]:
    """Mean and standard deviation over seeds by method, metric and condition."""
    names = ["method", "metric", "profile", "fidelity", "epochs"]
    groups = rows[rows["metric"].isin(METRICS)].groupby(names, sort=False)["value"]
    return [
        f"  {figure(values, '6')}  {method}, ours, {metric} (profile {profile}, {fidelity}, {epochs} epochs)"
        for (method, metric, profile, fidelity, epochs), values in groups
    ]
