"""Run directories as the figures read them, made by hand; and spoilt."""

import json
from pathlib import Path

import numpy as np

from tests.lines import refused


def write_run(
    folder: Path, paper: str, method: str, values, column: str = "test_accuracy", cell=None, **arguments
) -> Path:
    """A run directory as far as curves are read of it."""
    folder.mkdir(parents=True)
    content = {"paper": paper, "method": method, "arguments": arguments} | ({"cell": cell} if cell else {})
    (folder / "args.json").write_text(json.dumps(content))
    rows = [f"{epoch},{value}" for epoch, value in enumerate(values, start=1)]
    (folder / "log.csv").write_text("\n".join([f"epoch,{column}", *rows]) + "\n")
    return folder


def change(path: Path, **arrays) -> None:
    """Replace arrays of an .npz file; None takes one out."""
    with np.load(path) as file:
        content = {name: value for name, value in {**file, **arrays}.items() if value is not None}
    np.savez(path, **content)


def change_json(path: Path, **values) -> None:
    """Replace what a JSON file says, arguments of a run among it; None takes one out."""
    content = json.loads(path.read_text())
    part = content["arguments"] if values.keys() <= content.get("arguments", {}).keys() else content
    part |= values
    for name in [name for name, value in values.items() if value is None]:
        del part[name]
    path.write_text(json.dumps(content))


def assert_refused(visualize, run: Path, name: str, content, line: str, tmp_path: Path, capsys) -> None:
    """A figure of a run with one spoilt file is refused in one line, and an older figure left as it is.

    content: bytes of the file, None: it is missing; a dictionary: arrays or values that change in it.
    """
    path, figure = run / name, tmp_path / "figure.png"
    if isinstance(content, dict):
        (change if path.suffix == ".npz" else change_json)(path, **content)
    else:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    figure.write_bytes(b"older")
    before = sorted(tmp_path.iterdir())
    text = refused(capsys, visualize.main, run, "--out", figure)
    assert line in text and str(run) in text
    assert sorted(tmp_path.iterdir()) == before and figure.read_bytes() == b"older"
