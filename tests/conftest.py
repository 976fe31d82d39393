"""Where the golden cases are: the folder of the environment variable GOLDEN, else the shared one beside the clone, else ours."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests import pretend_card

if pretend_card.usable():
    pretend_card.let_autograd_believe()  # before any test's backward pass

ROOT = Path(__file__).resolve().parents[1]


def golden_folder() -> Path | None:
    """The first of the three folders that there is; None where there is none. A GOLDEN that names no folder is an error."""
    if "GOLDEN" in os.environ:
        folder = Path(os.environ["GOLDEN"])
        if not folder.is_dir():
            raise pytest.UsageError(f"GOLDEN={folder}: no such folder")
        return folder
    folders = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden")
    return next((folder for folder in folders if folder.is_dir()), None)


class Golden:
    """One golden case: its arrays by name, and its description."""

    def __init__(self, description: Path):
        self.name = description.stem
        self.description = json.loads(description.read_text())
        arrays = description.with_suffix(".npz")
        self.arrays = dict(np.load(arrays, allow_pickle=False)) if arrays.exists() else {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


@pytest.fixture
def golden():
    """golden(paper, kind): every case of that kind. Skips without a golden folder; fails where the folder has no such case."""

    def cases(paper: str, kind: str) -> list[Golden]:
        folder = golden_folder()
        if folder is None:
            pytest.skip("no golden cases: neither GOLDEN nor ../shared/golden nor tests/golden is there")
        descriptions = sorted((folder / paper).glob("*.json"))
        found = [Golden(d) for d in descriptions if json.loads(d.read_text())["kind"] == kind]
        assert found, f"no golden case of kind {kind} in {folder / paper}"
        return found

    return cases


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    from common.runs import figures  # noqa: PLC0415  (matplotlib, which most tests do without)

    written = []
    monkeypatch.setattr(figures, "write", lambda figure, out: written.append(figure))
    yield written
    figures.plt.close("all")
