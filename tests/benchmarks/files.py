"""Result files for the tests of benchmarks."""

import csv
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from common.runs.results import COLUMNS


def write(path: Path, rows: Iterable[dict], columns: Iterable[str] = COLUMNS) -> Path:
    """A CSV of the rows; fields that a row lacks are blank."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def frame(rows: Iterable[dict]) -> pd.DataFrame:
    """The rows as read_results gives them."""
    return pd.DataFrame([dict.fromkeys(COLUMNS, "") | row for row in rows]).astype({"value": float})
