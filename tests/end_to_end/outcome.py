"""What two runs of the same command must have in common, whatever happened to them on the way."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from common.runs.label_quality import COLUMNS, NAME


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


def label_quality(folder: Path) -> pd.DataFrame:
    """label_quality.csv of a run, with the checks that hold for every method."""
    found = pd.read_csv(folder / NAME)
    assert tuple(found) == COLUMNS
    assert found["index"].tolist() == np.load(folder / "train_index.npy").tolist()
    assert found.given_label.tolist() == np.load(folder / "noisy_labels.npy").tolist()
    for name in ("score", "predicted_probability"):
        assert found[name].between(0, 1).all(), name
    assert found.selected.dropna().isin((0, 1)).all() and found.ood_score.dropna().between(0, 1).all()
    return found


def auroc(found: pd.DataFrame) -> float:
    """Of the score as a detector of right labels."""
    return roc_auc_score(found.given_label == found.true_label, found.score)
