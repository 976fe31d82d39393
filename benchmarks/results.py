"""Result files as pandas DataFrames: reading, checking, means over seeds, intervals of differences.

A DataFrame of results has the columns of `common.runs.results.COLUMNS` and a row per metric, method and seed.
"""

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import t as student_t

from common.runs.cli import UserError
from common.runs.files import cannot_write, write_atomic
from common.runs.results import COLUMNS

# what is measured: one metric of one method in one table cell
KEY = ["paper", "table", "cell", "method", "dataset", "noise_type", "noise_rate", "imb_factor", "ood_ratio"]
KEY += ["fidelity", "metric"]
CONDITION = ["profile", "epochs"]  # what two runs must share to be compared
NUMERIC = {"noise_rate", "imb_factor", "ood_ratio", "epochs", "seed"}
CROSS = "cross"  # the table of all methods (benchmarks.cross), in which `paper` is the method's
CONFIDENCE = 0.95


class Sample(NamedTuple):
    """One metric over its seeds, in the metric's unit (percent for accuracy). std is NaN for n = 1."""

    n: int
    mean: float
    std: float


def read_results(path: str | Path) -> pd.DataFrame:
    """The rows of a result file: text as in the file, `value` as a finite float.

    UserError: the file cannot be read, is empty, lacks a column, or has a row that is cut short, a value that is not a
    finite number, or the same seed twice.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            heading = next(reader, None)
            lines = [(reader.line_num, fields) for fields in reader if fields]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path of the result file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a readable result CSV") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV ({error}): give a result file of benchmarks.run") from None
    if heading is None:
        raise UserError(f"{path} is empty: give a result file of benchmarks.run")
    if missing := ", ".join(name for name in COLUMNS if name not in heading):
        raise UserError(f"{path} lacks the columns {missing}: its first line must name all of them")
    if not lines:
        raise UserError(f"{path} has a heading and no results: give a file with at least one row")
    for number, fields in lines:
        if len(fields) != len(heading):
            raise UserError(f"{path}, line {number}: not as many fields as columns; fix or remove the line")
        if not math.isfinite(number_or_nan(text := fields[heading.index("value")])):
            fault = f"value is {text!r}; it must be a finite number: fix or remove the line"
            raise UserError(f"{path}, line {number}: {fault}")
    rows = pd.DataFrame([fields for _, fields in lines], columns=heading).astype({"value": float})
    keyed(rows, str(path))
    return rows


def number_or_nan(text: Any) -> float:
    """The number that a text stands for; NaN if it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def plain(value: Any, numeric: bool = False) -> str:
    """A field as text that compares: "0.50" and 0.5 become "0.5" if the column is numeric; None becomes ""."""
    text = "" if pd.isna(value) else " ".join(str(value).split())
    return f"{number:.15g}" if numeric and math.isfinite(number := number_or_nan(text)) else text


def normalised(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with keys, conditions and seeds as text that compares."""
    names = [*KEY, *CONDITION, "seed"]
    return rows.assign(**{name: [plain(value, name in NUMERIC) for value in rows[name]] for name in names})


def keyed(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """The normalised rows. UserError: they have the same seed twice; it names the source."""
    rows = normalised(rows)
    for row in rows[rows.duplicated([*KEY, *CONDITION, "seed"])].to_dict("records"):
        twice = f"seed {row['seed'] or '(blank)'} stands twice for {label(row)}"
        raise UserError(f"{source}: {twice}: keep one row")
    return rows


def label(row: dict, common: dict = {}) -> str:  # noqa: B006 (never changed)
    """A key and condition in words, without blank fields and without those that equal `common`."""
    names = [name for name in (*KEY, *CONDITION) if name in row and row[name] != common.get(name, "")]
    return ", ".join(f"{name} {row[name] or '(blank)'}" for name in names)


def over_seeds(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """n, mean and std by key and condition, in file order. UserError: the same seed twice."""
    groups = keyed(rows, source).groupby([*KEY, *CONDITION], sort=False)["value"]
    return groups.agg(n="size", mean=statistics.fmean, std=deviation).reset_index()


def deviation(values: Iterable[float]) -> float:
    """Sample standard deviation (n - 1 in the denominator); NaN for one value."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else math.nan


def summarise(values: Iterable[float]) -> Sample:
    """Count, mean and standard deviation of at least one value."""
    values = list(values)
    return Sample(len(values), statistics.fmean(values), deviation(values))


def figure(values: Iterable[float], width: str = "") -> str:
    """Mean, padded to the width, and, of several seeds, the standard deviation, as text; "" without values."""
    values = list(values)
    spread = f" ± {deviation(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{width}.2f}{spread}" if values else ""


def markdown_table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table as lines of Markdown."""
    heading = list(heading)
    return [
        f"| {' | '.join(heading)} |",
        "|---" * len(heading) + "|",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]


def welch_interval(a: Sample, b: Sample) -> tuple[float, float]:
    """Two-sided interval of b.mean - a.mean at CONFIDENCE, with Welch-Satterthwaite degrees of freedom.

    NaN, NaN if a sample has one value; the difference itself, twice, if neither sample varies.
    """
    difference = b.mean - a.mean
    part_a, part_b = a.std**2 / a.n, b.std**2 / b.n
    variance = part_a + part_b
    if math.isnan(variance) or variance == 0:
        return difference + variance, difference + variance
    freedom = 1 / ((part_a / variance) ** 2 / (a.n - 1) + (part_b / variance) ** 2 / (b.n - 1))
    margin = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return difference - margin, difference + margin


def make_folder(out: Path) -> None:
    """Make the folder of the file of --out. UserError: it cannot be made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: {out.parent} cannot be made ({error.strerror}): name another file"
        ) from None


def write_text(text: str, path: str | Path, flag: str) -> None:
    """Write a file whole or not at all. UserError, which names the flag: it cannot be written."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: give {flag} the name of a file in an existing folder")
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(cannot_write(path, error, f"give {flag} a writable folder")) from None
