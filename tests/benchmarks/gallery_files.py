"""A made-up run directory for benchmarks.gallery."""

import csv
import json
from pathlib import Path

from common.runs.label_quality import COLUMNS, NAME


def make_run(folder: Path, rows, names=None, classes: int = 10, paper: str = "sfa", **arguments) -> Path:
    """A run directory with a label_quality.csv. rows: dicts of its columns; the names of the classes are added to them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            own = {kind: row.get(f"{kind}_label", "") for kind in ("given", "predicted")}
            words = {f"{kind}_class": "" if v == "" else names[v] if names else v for kind, v in own.items()}
            writer.writerow(words | row)
    content = {"paper": paper, "method": "SFA", "command": "x"}
    content |= {"arguments": {"dataset": "digits", "data_path": "./data", **arguments}}
    (folder / "args.json").write_text(json.dumps(content))
    (folder / "noise.json").write_text(json.dumps({"observed_counts": [1] * classes}))
    return folder


def row(index: int, given: int, score, predicted="", probability="", **more) -> dict:
    """A line of label_quality.csv."""
    own = {"index": index, "given_label": given, "score": score}
    return own | {"predicted_label": predicted, "predicted_probability": probability} | more
