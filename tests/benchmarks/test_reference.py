"""The figures we publish: well-formed, reproducible from their commands, and the same in the texts as in the files."""

import statistics
from pathlib import Path

import pytest

from benchmarks.compare import against, read_results

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "benchmarks" / "reference"
FILES = sorted(REFERENCE.glob("*.csv"))


def summary(file: str, method: str, metric: str, scale: int = 1) -> str:
    """mean ± standard deviation over seeds, as the texts print it."""
    rows = read_results(REFERENCE / file)
    values = [scale * row["value"] for row in rows if row["method"] == method and row["metric"] == metric]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_reference_row_was_measured_at_a_commit_by_a_command_that_names_no_folder_of_a_machine(file):
    for row in read_results(file):
        assert row["command"].startswith(("python sfa/Train_cifar.py ", "python -m benchmarks.baseline "))
        assert not any(word.startswith(("/", "~")) for word in row["command"].split())
        assert row["git"] and not row["git"].endswith("+")
        assert row["torch"] and row["device"] and float(row["seconds"]) > 0
    assert f"`{file.name}`" in (REFERENCE / "README.md").read_text()


def test_sfa_beats_cross_entropy_on_digits_by_the_margin_we_claim():
    (line,) = against(read_results(REFERENCE / "sfa.csv"), "CE", ["last"]).lines
    assert line.a.n == line.b.n == 3
    assert line.difference >= 5


@pytest.mark.parametrize("page", ["README.md", "sfa/README.md"])
@pytest.mark.parametrize("metric", ["best", "last", "last10"])
def test_the_accuracies_in_the_texts_are_those_of_the_files(page, metric):
    text = (ROOT / page).read_text()
    for file, method in (("sfa.csv", "SFA"), ("sfa.csv", "CE"), ("sfa_released.csv", "SFA")):
        assert summary(file, method, metric) in text, f"{file} {method} {metric}"


def test_the_quality_of_the_selection_in_the_text_is_that_of_the_files():
    text = (ROOT / "sfa" / "README.md").read_text()
    for file in ("sfa.csv", "sfa_released.csv"):
        assert summary(file, "SFA", "last_net1_auc", scale=100) in text, file
