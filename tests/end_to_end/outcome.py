"""What two runs of the same command must have in common, whatever happened to them on the way."""

import json
from pathlib import Path


def log_without_seconds(folder: Path) -> list[str]:
    """The lines of log.csv but for their last column."""
    lines = (folder / "log.csv").read_text().splitlines()
    assert lines[0].endswith(",seconds")
    return [line.rpartition(",")[0] for line in lines]


def result_without_time_and_place(folder: Path) -> dict:
    """result.json but for timing, command and commit."""
    result = json.loads((folder / "result.json").read_text())
    del result["timing"], result["command"]
    del result["environment"]["git"]  # a commit may come between two runs
    return result
