"""Result files for the tests of benchmarks."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import KEY
from common.runs.results import COLUMNS
from tests.lines import message


def mistake(capsys, main: Callable, *words) -> str:
    """The one line of the UserError that a command line ends in; nothing is printed before it."""
    text = message(main, [str(word) for word in words])
    assert capsys.readouterr().out == ""
    return text


def status(main: Callable, *words) -> int:
    """The exit status that a command line ends in."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


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


CELL = {
    **{"paper": "me_momentum", "table": "cifar10", "cell": "cifar10-sym0.2", "method": "Me-Momentum"},
    **{"dataset": "cifar10", "noise_type": "symmetric", "noise_rate": "0.2", "profile": "paper"},
    **{"fidelity": "paper", "epochs": "200", "device": "cpu", "torch": "2.15.0", "git": "abc"},
}


def rows(*values, **changed) -> list[dict]:
    """The metrics best and last of one row per value, seeds 1, 2, ...; best is a point above last."""
    fields = dict.fromkeys(COLUMNS, "") | CELL | {"seconds": "10", "images_per_second": "1000"}
    return [
        fields
        | {"seed": str(seed), "metric": metric, "value": str(value + above)}
        | {"command": f"python x.py --seed {seed} --out runs/{seed}"}
        | changed
        for seed, value in enumerate(values, start=1)
        for metric, above in (("best", 1), ("last", 0))
    ]


def run_directory(folder: Path, result_rows: list[dict], curve: list, **changed) -> None:
    """A finished run directory with the figures of the rows of one seed."""
    folder.mkdir(parents=True)
    first = result_rows[0]
    metrics = {row["metric"]: float(row["value"]) for row in result_rows}
    result = {name: first[name] for name in (*KEY, "seed", "command")}
    result |= {"metrics": metrics, "best_epoch": 2, "noise": {"realised_rate": 0.19}} | changed
    (folder / "args.json").write_text(json.dumps({"command": result["command"]}))
    (folder / "result.json").write_text(json.dumps(result))
    write(folder / "result.csv", result_rows)
    lines = [f"{epoch},{value},0.123456789" for epoch, value in enumerate(curve, start=1)]
    (folder / "log.csv").write_text("\n".join(["epoch,test_accuracy,confident_precision", *lines]) + "\n")
