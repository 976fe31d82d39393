"""Which cells there are: the sections of the papers' presets.toml, by profile, with the command that runs each."""

import sys
from pathlib import Path
from typing import NamedTuple

from common.cli import UserError, read_presets

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("embedded", "short", "paper")


class Paper(NamedTuple):
    """How a paper's cells are run."""

    script: str  # relative to the repository
    short: tuple[str, ...]  # flags that shorten the published schedule, for the profile short


PAPERS = {
    "sfa": Paper("sfa/Train_cifar.py", ("--num_epochs", "40", "--warm_up", "10", "--lr_drop", "30")),
}


class Cell(NamedTuple):
    """One cell of a paper's tables, to be run once per seed."""

    paper: str
    preset: str
    flags: tuple[str, ...]  # beyond the preset's own

    def command(self, seed: int, out: Path, extra: list[str]) -> list[str]:
        """The command line that runs the cell with one seed into the run directory `out`."""
        words = [sys.executable, PAPERS[self.paper].script, "--preset", self.preset, *self.flags]
        return [*words, "--seed", str(seed), "--out", str(out), *extra]


def cells(paper: str, profile: str, names: list[str] | None = None) -> list[Cell]:
    """The cells of a paper in a profile; names picks some by preset.

    The presets under embedded/ are the embedded profile; all others are the published protocol, or with the paper's
    shortening flags the profile short. UserError: a name that is no preset of the profile.
    """
    presets = read_presets(ROOT / paper / "presets.toml")
    found = [name for name in presets if name.startswith("embedded/") == (profile == "embedded")]
    unknown = [name for name in names or [] if name not in found]
    if unknown:
        raise UserError(
            f"no cell {unknown[0]} in profile {profile} of {paper}: choose from {', '.join(found)}"
        )
    flags = PAPERS[paper].short if profile == "short" else ()
    return [Cell(paper, name, flags) for name in names or found]
