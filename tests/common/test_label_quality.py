"""label_quality.csv: its columns, what is left empty, when it is written."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.datasets.file_lists import make_split
from common.runs.label_quality import COLUMNS, NAME, Estimate, save_label_quality, to_csv
from common.runs.run import Labels

LABELS = Labels(np.array([7, 2, 5]), np.array([1, 0, 1]), np.array([1, 1, 0]), 2)
PROBABILITIES = torch.tensor([[0.25, 0.75], [0.625, 0.375], [0.5, 0.5]])


def test_a_row_per_image_in_their_order_with_what_is_known():
    paths = ["data/a, b.jpg", "data/c.jpg", "data/é.jpg"]
    selected, ood = torch.tensor([1, 0, -1]), torch.tensor([0.0, 0.1, 1.0])
    score = torch.tensor([1 + 1e-12, 0.5, float("nan")], dtype=torch.float64)
    content = to_csv(LABELS, Estimate(PROBABILITIES, score, selected, ood), paths, ("cat", "dog"))
    assert list(csv.reader(content.decode().splitlines())) == [
        list(COLUMNS),
        ["7", "data/a, b.jpg", "1", "dog", "1", "1", "1", "dog", "0.75", "0", "1"],
        ["2", "data/c.jpg", "1", "dog", "0.5", "0", "0", "cat", "0.625", "0.1", "0"],
        ["5", "data/é.jpg", "0", "cat", "", "", "0", "cat", "0.5", "1", "1"],
    ]


def column(content: bytes, name: str) -> list[str]:
    return [row[name] for row in csv.DictReader(content.decode().splitlines())]


def test_without_a_score_it_is_the_probability_of_the_given_label_and_what_is_unknown_is_empty():
    probabilities = torch.cat([PROBABILITIES[:2], torch.full((1, 2), torch.nan)])
    found = to_csv(LABELS._replace(clean=None), Estimate(probabilities))
    assert column(found, "score") == ["0.75", "0.375", ""]
    assert column(found, "predicted_label") == ["1", "0", ""]
    assert column(found, "predicted_probability")[2] == ""
    for name in ("path", "given_class", "predicted_class", "selected", "ood_score", "true_label"):
        assert column(found, name) == [""] * 3
    flags = to_csv(LABELS, Estimate(PROBABILITIES, selected=torch.tensor([True, False, True])))
    assert column(flags, "selected") == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("estimate", "named"),
    [
        (Estimate(PROBABILITIES[:2]), "probabilities"),
        (Estimate(PROBABILITIES[:, :1]), "probabilities"),
        (Estimate(PROBABILITIES, torch.tensor([0, 1, 1.1])), "score"),
        (Estimate(PROBABILITIES, torch.tensor([0, 1, -0.1])), "score"),
        (Estimate(PROBABILITIES, torch.zeros(2)), "score"),
        (Estimate(PROBABILITIES, selected=torch.ones(2)), "selected"),
        (Estimate(PROBABILITIES, ood_score=torch.full((3,), 2.0)), "ood_score"),
    ],
)
def test_estimates_of_other_images_and_scores_that_are_none_are_refused(estimate, named):
    with pytest.raises(ValueError, match=named):
        to_csv(LABELS, estimate)
    with pytest.raises(ValueError, match="1 paths of 3 images"):
        to_csv(LABELS, Estimate(PROBABILITIES), ["a"])


def test_it_is_written_unless_a_finished_run_has_it_and_true_labels_can_be_others(tmp_path):
    asked, path = [], tmp_path / NAME
    run = SimpleNamespace(folder=tmp_path, labels=LABELS, finished=False)
    run.is_finished = lambda: run.finished
    run.save_file = lambda name, content: (tmp_path / name).write_bytes(content)

    def estimate() -> Estimate:
        asked.append(None)
        return Estimate(PROBABILITIES)

    for finished, there, times in ((False, False, 1), (False, True, 2), (True, True, 2), (True, False, 3)):
        run.finished = finished
        if not there:
            path.unlink(missing_ok=True)
        save_label_quality(run, estimate, true_labels=np.array([1, 0, -1]))
        assert len(asked) == times, (finished, there)
    assert column(path.read_bytes(), "true_label") == ["1", "0", "-1"]
    run.finished = False
    save_label_quality(run, estimate, files=make_split(Path("d"), ["a", "b", "c"], [0, 0, 0]))
    assert column(path.read_bytes(), "path") == ["d/a", "d/b", "d/c"]
    save_label_quality(run, estimate, paths=[f"{i}.png" for i in range(9)])  # by position in the training set
    assert column(path.read_bytes(), "path") == ["7.png", "2.png", "5.png"]
