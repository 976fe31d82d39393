"""Run the cells of a paper, each method and the cross-entropy baseline, with several seeds; write one CSV and one figure.

    python -m benchmarks.run afm                                     # the embedded profile: digits, minutes on a laptop
    python -m benchmarks.run sfa --profile paper --table grid --seeds 123 --data_path ./data --fidelity released

Every run is a separate process, started by its command line as a user would. Flags that are not listed here go to the
paper's script. A run whose result.json says that the same command finished is not run again; an interrupted run resumes. If
any run fails, this command fails.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import PAPERS, PROFILES, ROOT, Cell, cells
from benchmarks.compare import against, compare, format_table
from benchmarks.engines import Task, add_engine_flags, print_commands, run_all
from benchmarks.published import beside
from benchmarks.results import read_results
from common.runs import cli
from common.runs.results import write_results

METRICS = ("best", "last", "last10")


def make_task(
    cell: Cell, seed: int, runs: Path, data_path: Path, extra: list[str], baseline: bool = True
) -> Task:
    """The run directories and command lines of a cell with a seed; extra flags are part of the directories' names.

    baseline: also run cross-entropy on the same labels, if the paper has a baseline.
    """
    suffix = re.sub(r"[^A-Za-z0-9_.-]+", "_", "".join(f"-{word.lstrip('-')}" for word in extra))
    folder, encoder = (
        runs / preset.split("/", 1)[1] / f"seed{seed}{suffix}" if preset else None
        for preset in (cell.preset, cell.encoder)
    )
    paper, data = PAPERS[cell.paper], from_root(data_path)
    words = [cell.script.data_flag, data, *extra]
    if encoder is not None:
        words += ["--pretrained", from_root(encoder / "encoder.safetensors")]
    commands = [(folder, cell.command(seed, from_root(folder), words))]
    if baseline and paper.baseline == cell.preset.rpartition("/")[2] and cell.script == paper.scripts[""]:
        # the baseline runs on the same device
        shared = ["--data_path", data, *_only(extra, ("--device", "--precision"))]
        words = [sys.executable, "-m", "benchmarks.baseline", "--like", from_root(folder), *shared]
        commands.append((folder / "baseline", words))
    return Task(f"{cell.preset} seed {seed}", folder, tuple(commands))


def from_root(path: Path) -> str:
    """A path as the runs get it: relative to the repository if it is in it, so that commands can be shared."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _only(words: list[str], flags: tuple[str, ...]) -> list[str]:
    """The given flags and their values, out of a list of command-line words."""
    return [w for i, w in enumerate(words) if w.split("=")[0] in flags or (i > 0 and words[i - 1] in flags)]


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.run", description=__doc__)
    profiles = "digits; the paper's data on a shortened schedule; the published protocol"
    only_cells = "these cells only; by default all of the profile"
    only_table = "the cells of this table only: the first part of their names"
    parser.add_argument("paper", choices=list(PAPERS), help="whose cells")
    parser.add_argument("--profile", choices=PROFILES, default="embedded", help=profiles)
    parser.add_argument("--cells", nargs="+", metavar="PRESET", help=only_cells)
    parser.add_argument("--table", metavar="NAME", help=only_table)
    seeds: dict[str, Any] = {"nargs": "+", "type": cli.seed, "default": [1, 2, 3]}
    parser.add_argument("--seeds", **seeds, metavar="N", help="one run each")
    parser.add_argument("--data_path", default="./data", metavar="DIR", help="where the data sets are")
    parser.add_argument("--out", default="results", metavar="DIR", help="for the CSV, the figure and runs/")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    add_engine_flags(parser)
    return parser


def report(paper: str, chosen: list[Cell], rows: pd.DataFrame, out: Path) -> None:
    """Print the methods against the baseline, this file against the reference CSV, and the published figures, if any."""
    write_results(out / f"{paper}.csv", rows.to_dict("records"))
    rows = read_results(out / f"{paper}.csv")
    further = "at_best_validation"  # of methods that validate
    metrics = (*METRICS, further) if (rows["metric"] == further).any() else METRICS
    print(f"\n{out / paper}.csv: every method against cross-entropy (CE), accuracy in percent\n")
    if (rows["method"] == "CE").any():
        print(format_table(against(rows, "CE", metrics), "CE", "the method"))
    else:
        print("cross-entropy is not among these cells")
    reference = ROOT / "benchmarks" / "reference" / f"{paper}.csv"
    if reference.is_file():
        print(f"\nthis run against {reference.relative_to(ROOT)}, measured by this project\n")
        print(format_table(compare(read_results(reference), rows, metrics), "the reference", "this run"))
    for line in beside(chosen, rows):
        print(line)


def main(argv=None) -> None:
    """Run, collect, compare, draw."""
    args, extra = make_parser().parse_known_args(argv)
    out, data_path = Path(args.out).resolve(), Path(args.data_path).resolve()
    chosen = cells(args.paper, args.profile, args.cells, args.table)
    runs = out / "runs" / args.paper / args.profile
    makers, seeds = {cell.encoder for cell in chosen}, dict.fromkeys(args.seeds)
    # the runs that make encoders come first
    ordered = sorted(chosen, key=lambda cell: cell.preset not in makers)
    waves = [
        [make_task(cell, seed, runs, data_path, extra) for cell in wave for seed in seeds]
        for _, wave in itertools.groupby(ordered, key=lambda cell: cell.preset in makers)
    ]
    if args.dry_run:
        print_commands(itertools.chain(*waves))
        for line in beside(chosen, None):
            print(f"# {line}".strip())
        return
    # small networks gain nothing from threads, and with one thread each the figures do not depend on the number of cores
    embedded = args.profile == "embedded"
    folders = [folder for tasks in waves for folder in run_all(tasks, args, one_thread=embedded)]
    report(args.paper, chosen, collect(folders), out)
    figure = [sys.executable, "-m", f"{args.paper}.visualize", *map(str, folders)]
    drawn = subprocess.run([*figure, "--out", str(out / f"{args.paper}.png")], cwd=ROOT, check=False)
    sys.exit(drawn.returncode)


def collect(folders: list[Path]) -> pd.DataFrame:
    """The result rows of finished run directories, as text."""
    files = [pd.read_csv(folder / "result.csv", dtype=str, keep_default_na=False) for folder in folders]
    return pd.concat(files, ignore_index=True) if files else pd.DataFrame()


if __name__ == "__main__":
    cli.exit_cleanly(main)
