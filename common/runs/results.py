"""The schema of all result CSVs: long format, one row per metric, method and seed; values are numbers."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from common.runs.files import write_atomic

COLUMNS = (
    *("paper", "table", "cell", "method", "dataset", "noise_type", "noise_rate", "imb_factor", "ood_ratio"),
    *("profile", "fidelity", "seed", "epochs", "metric", "value", "reported", "delta"),
    *("seconds", "images_per_second", "peak_memory_mb", "device", "precision", "torch", "git", "command"),
)


def to_csv(rows: Iterable[dict], columns: Iterable[str]) -> str:
    """Rows as CSV text with a heading line; None becomes an empty cell. ValueError: a column that is not in `columns`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_results(path: Path, rows: Iterable[dict]) -> None:
    """Write result rows, atomically."""
    write_atomic(path, to_csv(rows, COLUMNS).encode())
