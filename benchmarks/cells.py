"""Which cells there are: the sections of the papers' presets.toml, by profile, with the command that runs each."""

import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.runs.cli import UserError, read_presets

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("embedded", "short", "paper")
CLAIMS = "claims"  # the presets of claims.toml that are of no profile: sized to test a claim on a CPU


class Script(NamedTuple):
    """What runs a cell."""

    path: str  # relative to the repository
    short: tuple[str, ...]  # flags that shorten the published schedule, for the profile short
    data_flag: str = "--data_path"


class Paper(NamedTuple):
    """How a paper's cells are run: see cells.toml."""

    scripts: dict[str, Script]
    published: dict[str, tuple[str, ...]]
    baseline: str


def _paper(scripts: dict, published: dict, baseline: str = "") -> Paper:
    settings = {cell: tuple(setting) for cell, setting in published.items()}
    made = {name: Script(**script | {"short": tuple(script["short"])}) for name, script in scripts.items()}
    return Paper(made, settings, baseline)


PAPERS = {
    name: _paper(**paper)
    for name, paper in tomllib.loads((ROOT / "benchmarks" / "cells.toml").read_text("utf-8")).items()
}


class Cell(NamedTuple):
    """One cell of a paper's tables, to be run once per seed."""

    paper: str
    preset: str
    flags: tuple[str, ...]  # beyond the preset's own
    script: Script
    encoder: str | None = None  # the preset, also a cell, whose run with the same seed makes its encoder

    @property
    def published(self) -> tuple[str, ...] | None:
        """The setting of its published figures, if there are any."""
        return PAPERS[self.paper].published.get("/".join(self.preset.split("/")[:2]))

    def command(self, seed: int, out: str, extra: list[str]) -> list[str]:
        """The command line that runs the cell with one seed into the run directory `out`."""
        words = [sys.executable, self.script.path, "--preset", self.preset]
        return [*words, *self.flags, "--seed", str(seed), "--out", out, *extra]


@cache
def presets_of(file: Path) -> dict[str, dict]:
    """The sections of a presets.toml, shared by all callers."""
    return read_presets(file)


def cells(paper: str, profile: str, names: list[str] | None = None, table: str | None = None) -> list[Cell]:
    """The cells of a paper in a profile. names: only these presets; table: only presets that begin with it.

    Presets under embedded/ are the profile `embedded`. Those under short/ are in `short` alone: the paper has no protocol
    for their data. Those under claims/ are in CLAIMS, which stands in place of a profile. All others are the published
    protocol, and with shortening flags the profile `short`. A cell that starts from another cell's encoder brings that
    cell along, before it. UserError: no such table, or a name that is no preset of the profile.
    """
    presets = presets_of(ROOT / paper / "presets.toml")
    folders = {name: name.split("/")[0] for name in presets}
    others = {name for name, folder in folders.items() if folder not in (*PROFILES, CLAIMS)}
    every = [n for n in presets if folders[n] == profile or (n in others and profile in ("short", "paper"))]
    tables = list(dict.fromkeys(folders[name] for name in every))
    if table is not None and table not in tables:
        raise UserError(f"no table {table} in profile {profile} of {paper}: choose from {', '.join(tables)}")
    every = [name for name in every if table in (None, folders[name])]
    if unknown := [name for name in names or () if name not in every]:
        choices = ", ".join(every)
        raise UserError(f"no cell {unknown[0]} in profile {profile} of {paper}: choose from {choices}")
    wanted = [own for name in names or every for own in (presets[name].get("encoder"), name) if own]
    chosen = []
    for name in dict.fromkeys(wanted):
        script = PAPERS[paper].scripts[presets[name].get("script", "")]
        flags = script.short if profile == "short" and name in others else ()
        chosen.append(Cell(paper, name, flags, script, presets[name].get("encoder")))
    return chosen


def log_name(paper: str, preset: str, run: str) -> str:
    """The name, without suffix, of a log in reference/logs/claims. run: the run directory's name, such as seed1."""
    return "_".join([paper, *preset.split("/")[1:], run])
