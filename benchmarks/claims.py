"""Test what the papers claim: run the cells that claims.toml compares, and print for each claim whether it holds.

    make claims                                           # digits: no data, no GPU
    make claims DATA=DIR                                  # also MNIST, CIFAR-10 and CIFAR-10N, if DIR has them
    python -m benchmarks.claims --claims afm-attention sfa-rare-classes --seeds 1 2 3 4 5
    python -m benchmarks.claims --second                  # also the undecided tests again, with other seeds

A finished run is not run again, a killed run resumes; a cell that several claims name is run once per seed. Tests whose data
are missing are listed as not run. claims.csv (rows), claims.md (table), claims.png (figure) and claims_logs/ are of all
finished runs in --out, also of claims that this command does not name.
"""

import itertools
import re
import sys
import tomllib
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cross
from benchmarks.cells import CLAIMS as CELLS
from benchmarks.cells import Cell, cells, log_name
from benchmarks.cross import Setting
from benchmarks.engines import Task, add_engine_flags, is_finished, print_commands, run_all
from benchmarks.run import collect, make_task
from benchmarks.verdicts import (
    CLAIMS,
    CLAIMS_CSV,
    Claim,
    chosen,
    outcomes,
    plain_table,
    preset_of,
    read_claims,
    whole_table,
)
from common.runs import cli
from common.runs.cli import UserError
from common.runs.files import write_atomic
from common.runs.results import write_results

# columns of a log that benchmarks.report draws
DRAWN = re.compile(
    r"^epoch$|(accuracy|precision|recall|auc|auroc|selected|labelled|removed|_size|_share|_ood|attention_(right|wrong))$"
)


class Prepared(NamedTuple):
    """A random part of a data set, drawn for each seed, with labels of a file."""

    setting: Setting
    limit: int


class CellRun(NamedTuple):
    """A cell with a seed."""

    cell: Cell
    seed: int
    task: Task

    @property
    def setting(self) -> str:
        """Its data and noise, as its preset names them."""
        return self.cell.preset.split("/")[1]


def read_prepared(path: Path = CLAIMS) -> dict[str, Prepared]:
    """The settings of claims.toml by their names."""
    found = {}
    for name, entries in tomllib.loads(path.read_text(encoding="utf-8"))["settings"].items():
        limit, data = entries.pop("limit_train"), entries.pop("data")
        found[name] = Prepared(Setting(data, name.removeprefix(f"{data}-"), **entries), limit)
    return found


# data -----------------------------------------------------------------------------------------------------------------


@cache
def is_there(name: str, data_path: Path) -> bool:
    """Whether a data set can be loaded."""
    from common import datasets  # noqa: PLC0415  (imports torch)

    try:
        datasets.load(name, data_path)
    except UserError:
        return False
    return True


def missing(cell: str, prepared: dict[str, Prepared], data_path: Path) -> list[str]:
    """The data sets and label files that a cell reads and that are missing."""
    from common import datasets  # noqa: PLC0415  (imports torch)

    section, setting = preset_of(cell), cell.split("/")[2]
    names = [section["dataset"], *[name for name in [section.get("corruption")] if name in datasets.NAMES]]
    labels = [prepared[setting].setting.labels] if setting in prepared else []
    lacking = [name for name in names if not is_there(name, data_path)]
    return lacking + [file for file in labels if not (data_path / file).is_file()]


def prepare(runs: Iterable[CellRun], prepared: dict[str, Prepared], out: Path, data_path: Path) -> None:
    """Write the data sets that unfinished runs read."""
    todo = [run for run in runs if not all(is_finished(*one) for one in run.task.commands)]
    for name, seed in dict.fromkeys((run.setting, run.seed) for run in todo if run.setting in prepared):
        own = prepared[name]
        inputs = cross.inputs_of(own.setting, seed, out, data_path, own.limit)
        cross.prepare(own.setting, seed, inputs, data_path, own.limit)


# runs -----------------------------------------------------------------------------------------------------------------


def cells_of(claims: Iterable[Claim]) -> dict[str, list[Cell]]:
    """By the name paper/preset of each cell that tests compare: the cell, before it the one that makes its encoder."""
    names = dict.fromkeys(name for claim in claims for test in claim.tests for name in test.cells)
    parts = {name: (name.split("/", 1), name.split("/")[1]) for name in names}
    return {name: cells(paper, profile, [preset]) for name, ((paper, preset), profile) in parts.items()}


def runs_of(claims: Iterable[Claim], prepared: dict[str, Prepared], args: Namespace) -> list[CellRun]:
    """Every cell once with each of its seeds: all cells with their first seed, then all with the second."""
    out, data_path = Path(args.out).resolve(), Path(args.data_path).resolve()
    named = cells_of(claims)
    wanted = {
        (cell, seed): place
        for claim in claims
        for test in claim.tests
        for name, (place, seed) in itertools.product(test.cells, enumerate(test.seeds))
        for cell in named[name]
    }
    runs = []
    for cell, seed in sorted(wanted, key=lambda run: wanted[run]):
        data, own = data_path, prepared.get(cell.preset.split("/")[1])
        if own is not None:
            data = cross.inputs_of(own.setting, seed, out, data_path, own.limit).folder
        task = make_task(cell, seed, folder_of(cell, out), data, [], baseline=False)
        for _, command in task.commands:
            command.extend(["--precision", args.precision] if args.precision else [])
        runs.append(CellRun(cell, seed, task))
    return runs


def with_seeds(claim: Claim, seeds: Sequence[int]) -> Claim:
    """The claim with its tests on other seeds; second experiments keep theirs."""
    return claim._replace(tests=tuple(t if t.second else t._replace(seeds=tuple(seeds)) for t in claim.tests))


def folder_of(cell: Cell, out: Path) -> Path:
    """The folder that benchmarks.run uses for the cell's profile, so that neither runs a cell again."""
    return out / "runs" / cell.paper / cell.preset.split("/")[0]


def run_waves(runs: list[CellRun], args: Namespace) -> int:
    """Make the encoders, then run what starts from them. Returns 0, or 1 if a run failed; the others run nevertheless."""
    encoders = {(run.cell.paper, run.cell.encoder) for run in runs}
    status = 0
    for first in (True, False):
        wave = [run.task for run in runs if ((run.cell.paper, run.cell.preset) in encoders) is first]
        try:
            run_all(wave, args, one_thread=True)
        except SystemExit as ended:
            if ended.code != 1:  # stopped from outside
                raise
            status = 1
    return status


def finished(claims: Iterable[Claim], out: Path) -> dict[Cell, list[Path]]:
    """The directories of the finished runs of the claims' cells, with any seed."""
    found = {}
    for cell in {cell: None for own in cells_of(claims).values() for cell in own}:
        parent = folder_of(cell, out) / cell.preset.split("/", 1)[1]
        results = sorted(parent.glob("seed*/result.csv"), key=lambda path: (len(path.parent.name), path))
        found[cell] = [path.parent for path in results if path.parent.name[len("seed") :].isdigit()]
    return found


def rows_of(runs: dict[Cell, list[Path]], prepared: dict[str, Prepared]) -> pd.DataFrame:
    """The result rows of finished runs, as text but for the columns of prepared settings."""
    frames = []
    for cell, folders in runs.items():
        own = prepared.get(cell.preset.split("/")[1])
        frames.append(collect(folders).assign(**({} if own is None else cross.columns_of(own.setting))))
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def save_logs(runs: dict[Cell, list[Path]], folder: Path) -> None:
    """Write the logs of the cells that are in no other table: the columns that the report draws, with six digits."""
    for cell, folders in runs.items():
        for run in folders if cell.preset.split("/")[0] == CELLS else ():
            log = pd.read_csv(run / "log.csv", dtype=str, keep_default_na=False)
            if "test_accuracy" not in log:
                continue
            columns = [name for name in log if DRAWN.search(name) and not name.startswith("net2_")]
            text = log[columns].map(lambda value: value and f"{float(value):.6g}")
            name = log_name(cell.paper, cell.preset, run.name)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"{name}.csv", text.to_csv(index=False, lineterminator="\n").encode())


# the command line -----------------------------------------------------------------------------------------------------


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--claims", nargs="+", metavar="NAME", help="these only, as claims.toml names them")
    parser.add_argument("--only", choices=["embedded", "real"], help="tests on digits; tests on other data")
    seeds = "one run each; by default those of claims.toml"
    collecting = "run nothing, write the files of what is finished"
    parser.add_argument("--seeds", nargs="+", type=cli.seed, metavar="N", help=seeds)
    parser.add_argument(
        "--second", action="store_true", help="run also the undecided tests again, with other seeds"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="instead of the cells' own")
    parser.add_argument("--data_path", default="./data", metavar="DIR", help="where the data sets are")
    parser.add_argument("--out", default="results", metavar="DIR", help="for claims.*, cross_data/ and runs/")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    parser.add_argument("--collect", action="store_true", help=collecting)
    add_engine_flags(parser)
    return parser


def write(every: Sequence[Claim], asked: Sequence[Claim], prepared: dict[str, Prepared], out: Path) -> None:
    """The files of all claims; the table of those asked for on the terminal."""
    from benchmarks import forest  # noqa: PLC0415  (imports matplotlib)

    runs = finished(every, out)
    rows = rows_of(runs, prepared)
    if rows.empty:
        print(f"no run of the claims in {out} is finished")
        return
    write_results(out / CLAIMS_CSV, rows.to_dict("records"))
    found = outcomes(every, rows)
    write_atomic(out / "claims.md", "\n".join(whole_table(every, found)).encode())
    forest.draw(every, found, out / "claims.png")
    save_logs(runs, out / "claims_logs")
    print("\n".join(plain_table(asked, outcomes(asked, rows))))
    print(f"\nin {out}: {CLAIMS_CSV}, claims.md, claims.png and claims_logs/ of all finished runs")


def main(argv=None) -> None:
    """Run what is not finished; write and print the verdicts."""
    args = make_parser().parse_args(argv)
    out, data_path = Path(args.out).resolve(), Path(args.data_path).resolve()
    every, prepared = read_claims(), read_prepared()
    if args.seeds:
        every = [with_seeds(claim, args.seeds) for claim in every]
    asked = chosen(every, args.claims, args.only, second=args.second)
    lacking = {name: missing(name, prepared, data_path) for name in cells_of(asked)}
    wanted = {t: {name for cell in t.cells for name in lacking[cell]} for c in asked for t in c.tests}
    possible = [c._replace(tests=tuple(t for t in c.tests if not wanted[t])) for c in asked]
    runs = runs_of(possible, prepared, args)
    if args.dry_run:
        print_commands(run.task for run in runs)
        return
    status = 0
    if not args.collect:
        prepare(runs, prepared, out, data_path)
        status = run_waves(runs, args)
    write(every, asked, prepared, out)
    for name in sorted({name for names in lacking.values() for name in names}):
        each = [name in wanted[test] for claim in asked for test in claim.tests]
        print(f"not run: {sum(each)} of {len(each)} tests, for want of {name} in {data_path}")
    sys.exit(status)


if __name__ == "__main__":
    cli.exit_cleanly(main)
