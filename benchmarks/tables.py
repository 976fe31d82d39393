"""Write benchmarks/README.md: what this project measured for every table of the papers, and every cell with its command.

    make tables                                  # or python -m benchmarks.tables
    python -m benchmarks.tables --check          # status 1 where a page is not what the files say

The short table of the claims in the README of the repository is written, too.

Figures come from reference/*.csv alone, cells from the papers' presets.toml. Nothing is run.
"""

import csv
import shlex
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import PAPERS, ROOT, cells
from benchmarks.compare import CROSS, read_results
from benchmarks.verdicts import CLAIMS_CSV, outcomes, read_claims, short_table, whole_table
from common.runs.cli import Parser, UserError, exit_cleanly
from common.runs.files import write_atomic

REFERENCE, PAGE = ROOT / "benchmarks" / "reference", ROOT / "benchmarks" / "README.md"
# of the repository; what is generated of it stands between two comments
FRONT = ROOT / "README.md"
MARKS = ("<!-- claims, written by make tables -->", "<!-- end of claims -->")
METRICS = {
    "best": "best",
    "last": "last",
    "last10": "mean of last 10",
    "at_best_validation": "at best validation",
}
HEAD = """# Benchmarks

This page is written by `make tables` from the files that it names; a test fails where it is out of date.

## Regenerate a table

    make reproduce-sfa                                              # the embedded cells of a paper: digits, minutes, no data
    python -m benchmarks.run sfa --profile paper --table grid       # a table by the published protocol, data under ./data
    python -m benchmarks.run sfa --profile short --cells grid/cifar10-if0.01-imb0.5/sfa --seeds 1
    python -m benchmarks.run sfa --profile paper --dry-run          # only print the commands

A cell is a section of the paper's `presets.toml`; its name is table/setting/method. It is run once per seed (`--seeds`, by
default 1 2 3), each time as a process started by the command line that the CSV then names. What is finished by its own
`result.json` is not done again, what was cut short goes on from its last epoch, and a failed run is named and makes the command
fail. Profiles: `embedded`, digits on a CPU; `short`, the paper's data on a shortened schedule; `paper`, the published protocol.
Further flags are handed on to the script and become part of the names of the run directories.

### On several machines

    python -m benchmarks.run sfa --engine ray                       # starts Ray on this machine, or joins that of RAY_ADDRESS
    python -m benchmarks.run sfa --profile paper --engine ray --ray_address HOST:6379 --gpus_per_cell 0.5
    sbatch benchmarks/slurm/ray.sbatch sfa --profile paper          # Slurm: several machines, one Ray
    sbatch --array=1-5 benchmarks/slurm/array.sbatch sfa --profile paper    # Slurm without Ray: a job per seed

`--engine local`, the default, needs nothing. Ray (`pip install "ray>=2.50"`, the extra `ray`; `make setup` has it) is told what
each run is to get (`--cpus_per_cell`, `--gpus_per_cell`). A run whose worker is lost goes on elsewhere from its last
checkpoint, up to `--retries` times; a script that fails by itself is not run again. The results are those of the local engine.
The clone, its Python and `--out` stand at the same path on a file system that all machines share. Recent Ray protects a cluster
with a token in your home: where an address is given, set `RAY_AUTH_MODE=token` on both sides. Tested on one machine, with
workers killed; not yet on several machines, with GPUs, or under Slurm.

### As one page

    make report                                                     # results/report.html

One HTML file without network or server: every row, here and in `results/`, beside what is published, with seeds, command, curves
and log, wall times and environment.

## Read one

Test accuracy in percent, mean ± standard deviation over seeds. best: the highest of all epochs, which is seen on the test set
and no estimate of anything; last: after the last epoch; mean of last 10: over the last ten; at best validation: at the epoch
that is best on validation samples, where a method has some. SimCLR's rows are the accuracy of nearest neighbours in its
features. A profile with `+limit_train=N` is of a subset. One with `+limit_test=N` was tested on a seeded subset of N test
images with the proportions of the classes. `--full_test_at_end` then adds the metric `full_test`, the accuracy on all test images
after the last epoch (Me-Momentum: of the reported network), and `full_test_images`, how many these are.
`python -m benchmarks.compare a.csv b.csv` lines up two files (`--markdown`, `--csv`, and `--fail-below POINTS` for use in CI);
runs of different profiles or numbers of epochs are never compared. Machines, dates and commands are in
[`reference/README.md`](reference/README.md), published figures in [`reported`](reported).
"""


CLAIMS_HEAD = """## Claims

    make claims                                                     # on digits: no data, 2 CPU cores
    make claims DATA=DIR                                            # also MNIST, CIFAR-10 and CIFAR-10N, as far as DIR has them
    python -m benchmarks.claims --only real --data_path DIR --jobs 2 --seeds 1
    python -m benchmarks.claims --collect                           # run nothing, write the table of what is finished

Each paper claims that its method does something. [`claims.toml`](claims.toml) states these claims in our words, with their
source, and the runs that test them. `make claims` runs what is not finished and writes `results/claims.csv` (the rows of all
runs), `results/claims.md` (this table), `results/claims.png` and the logs in `results/claims_logs/`. `--engine ray` works as
[above](#on-several-machines). A test whose data are missing is listed as not run. Human labels are read from
`DIR/cifar10n_worse_label.npy`, feature-dependent labels from `DIR/plc_cifar10_pmd1_035.npy` (one label for each of the first
45,000 training images).

A test compares a metric of two methods, or a metric of one method with a bound. Figures are means ± standard deviations over
seeds, with the number of seeds, in percent. The difference is in points, less the bound if there is one; its 95 % interval is
Welch's (Student's for one method). The verdict follows from the interval alone:

- **holds**: the interval lies on the side that the claim names;
- **contradicted**: the interval lies on the other side;
- **undecided**: the interval contains 0, or there is one seed.

A verdict is about these data, sizes and seeds. The sizes are small: they are what 2 CPU cores can do, and they were fixed before
the first run. With three seeds an interval is wide, so small effects stay undecided. No correction is made for the number of
tests.
"""


CROSS_SETTINGS = ROOT / "benchmarks" / "cross.toml"
CROSS_HEAD = """## All methods on the same data

    make cross                                                      # digits, on a CPU
    python -m benchmarks.cross --dataset cifar10 --data_path ./data # 7 settings, CIFAR-10N's human labels among them

The same images, observed labels and backbone (one PreAct ResNet) and the same number of epochs, pre-training and rounds
included, for all. Schedules follow from the presets by a rule; no value is chosen by an accuracy. Me-Momentum may end earlier,
and validates on a part of the images, as its protocol requires. [`cross.toml`](cross.toml) has the settings and every flag. An
epoch is not the same work in each method: the last table of a file says how long they take.
"""


SPEED = REFERENCE / "speed" / "steps.csv"
SPEED_HEAD = """## Speed

    make speed                                                      # training steps, and how fast images are read and augmented

A training step of every method on images of 32 pixels with its ResNet-18, ours (views of whole batches on the device) beside a
plain path in the same run (views by PIL in the workers of a DataLoader, float32, no recorded graphs), epoch by epoch in turn. The
parts are shares of the step; an image is a sample of the (labelled) batch, and what else a step goes through is its cost. Images
per second are the median over steps, the ratio is the median over pairs of passes: of few of them the two may disagree. An epoch
trains on as many images as its selection takes. Memory is that of the process, without the plain path's workers. On a CPU
batches are a sixteenth of the papers'.
"""


class Row(NamedTuple):
    """One method in one setting under one condition."""

    table: str
    cell: str
    noise_type: str
    noise_rate: str
    profile: str
    fidelity: str
    epochs: str
    method: str
    file: str


def measured() -> dict[str, dict[Row, dict[str, list[float]]]]:
    """The values over seeds by paper, row and metric, of all reference files in the order of their names.

    Without the table of all methods, which is no paper's.
    """
    found: dict[str, dict[Row, dict[str, list[float]]]] = {}
    for path in result_files():
        for row in read_results(path):
            if row["metric"] in METRICS and row["table"] != CROSS:
                key = Row(*(row[name] for name in Row._fields[:-1]), path.name)
                metrics = found.setdefault(row["paper"], {}).setdefault(key, {})
                metrics.setdefault(row["metric"], []).append(row["value"])
    return found


def result_files() -> list[Path]:
    """The reference files, without that of the claims, whose rows other files may have, too."""
    return [path for path in sorted(REFERENCE.glob("*.csv")) if path.name != CLAIMS_CSV]


def figure(values: Sequence[float]) -> str:
    """Mean and, of several seeds, the standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(rows: dict[Row, dict[str, list[float]]]) -> list[str]:
    """The measured rows of a paper as Markdown, without the metrics that none of them has."""
    metrics = [name for name in METRICS if any(name in values for values in rows.values())]
    heading = [
        "setting",
        "noise",
        "method",
        "profile",
        "epochs",
        "seeds",
        *(METRICS[m] for m in metrics),
        "rows",
    ]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for row, values in rows.items():
        released = ", as released" if row.fidelity == "released" else ""
        seeds = len(next(iter(values.values())))
        noise = f"{row.noise_type} {row.noise_rate}".strip()
        cells_of_row = [row.cell, noise, row.method + released, row.profile, row.epochs, str(seeds)]
        cells_of_row += [figure(values.get(metric, [])) for metric in metrics]
        lines.append(f"| {' | '.join(cells_of_row)} | [`{row.file}`](reference/{row.file}) |")
    return lines


def claims_section() -> list[str]:
    """Every claim with its tests and verdicts."""
    path, claims = REFERENCE / CLAIMS_CSV, read_claims()
    if not path.is_file():
        return [CLAIMS_HEAD, "Not measured yet.", ""]
    table = whole_table(claims, outcomes(claims, read_results(path)))
    figure = f"![Differences and intervals of all tests](reference/{Path(CLAIMS_CSV).stem}.png)"
    source = f"[`{CLAIMS_CSV}`](reference/{CLAIMS_CSV})"
    return [
        CLAIMS_HEAD,
        f"{source}, with the commands, seeds, times and the commit of each run:",
        "",
        figure,
        "",
        *table,
    ]


def front() -> str:
    """The README of the repository with the table of the claims as the files say. UserError: its marks are not there."""
    text = FRONT.read_text(encoding="utf-8") if FRONT.is_file() else ""
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise UserError(f"{FRONT} must have each of these lines once: {', '.join(MARKS)}")
    path, claims = REFERENCE / CLAIMS_CSV, read_claims()
    table = ["Not measured yet."]
    if path.is_file():
        table = short_table(claims, outcomes(claims, read_results(path)))
    before, rest = text.split(MARKS[0])
    return "\n".join([f"{before}{MARKS[0]}", *table, f"{MARKS[1]}{rest.split(MARKS[1])[1]}"])


def cross_rows() -> dict[str, list[dict]]:
    """The rows of the table of all methods by the name of their reference file."""
    found = {}
    for path in result_files():
        rows = [row for row in read_results(path) if row["table"] == CROSS]
        if rows:
            found[path.name] = rows
    return found


def cross_section(files: Mapping[str, Sequence[dict]]) -> list[str]:
    """What was measured of the table of all methods, file by file, and what of it was not."""
    described = tomllib.loads(CROSS_SETTINGS.read_text(encoding="utf-8"))
    wanted = [
        f"{data}-{name}" for data in described if data != "settings" for name in described[data]["settings"]
    ]
    lines = [CROSS_HEAD]
    for file, rows in files.items():
        lines += [f"[`{file}`](reference/{file}), after the last epoch:", "", *cross_table(rows), ""]
        lines += ["At the best epoch, which is seen on the test set:", "", *cross_table(rows, "best"), ""]
        minutes = cross_table(rows, column="seconds", scale=1 / 60)
        lines += ["Minutes of a run, pre-training included:", "", *minutes, ""]
    whole = {row["cell"] for rows in files.values() for row in rows if "+limit_" not in row["profile"]}
    missing = [cell for cell in wanted if cell not in whole]
    return [*lines, f"Not measured yet in full: {', '.join(missing)}.", ""] if missing else lines


def cross_table(
    rows: Sequence[dict], metric: str = "last", column: str = "value", scale: float = 1
) -> list[str]:
    """Result rows of benchmarks.cross as Markdown: settings down, methods across; in the cells a column of a metric's rows."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["metric"] == metric:
            key = (row["cell"], row["profile"], row["epochs"])
            values.setdefault(key, {}).setdefault(row["method"], []).append(scale * float(row[column]))
    lines = [
        f"| setting | profile | epochs | seeds | {' | '.join(methods)} |",
        "|---" * (4 + len(methods)) + "|",
    ]
    for key, own in values.items():
        seeds = max(map(len, own.values()))
        lines.append(
            f"| {' | '.join(key)} | {seeds} | {' | '.join(figure(own.get(m, [])) for m in methods)} |"
        )
    return lines


def speed_section(path: Path) -> list[str]:
    """What was measured by benchmarks.speed steps: each method beside the plain path, wins and losses alike."""
    if not path.is_file():
        return [SPEED_HEAD, "Not measured yet.", ""]
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = ("augment", "forward", "backward", "optimiser", "rest")
    heading = [
        "method",
        "path",
        "images/s",
        "quartiles",
        *(f"{part} %" for part in parts),
        "selection s",
        "epoch s",
    ]
    heading += ["images per epoch", "steps timed", "memory MiB", "of matmul %", "ours / plain", "range"]
    lines = [SPEED_HEAD, f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for row in rows:
        own = row["path"] == "ours"
        text = [row["method"], row["path"], f"{float(row['median_images_per_second']):.2f}"]
        text += [f"{float(row['q1']):.2f} to {float(row['q3']):.2f}"]
        text += [f"{100 * float(row[f'{part}_ms']) / float(row['step_ms']):.1f}" for part in parts]
        text += [f"{float(row[name]):.2f}" for name in ("one_selection_seconds", "seconds_per_epoch")]
        text += [row["images_trained_per_epoch"], row["timed_steps"]]
        text += [f"{float(row['peak_memory_mb']):.0f}", f"{100 * float(row['share_of_matmul']):.1f}"]
        text += [f"{float(row['ours_over_plain_median']):.2f}" if own else ""]
        low, high = (row[f"ours_over_plain_{end}"] for end in ("min", "max"))
        text += [f"{float(low):.2f} to {float(high):.2f}, {row['pairs']} pairs" if own else ""]
        lines.append(f"| {' | '.join(text)} |")
    first = rows[0]
    where = (
        f"{first['device']} with {first['cpu_count']} cores, torch {first['torch']}, commit {first['git']}"
    )
    return [*lines, "", f"[`{path.name}`](reference/speed/{path.name}): `{first['command']}` on {where}.", ""]


def commands(paper: str) -> list[str]:
    """Every cell of a paper by the command that runs it, those of the published tables by their protocol."""
    short = [cell for cell in cells(paper, "short") if cell.preset.startswith("short/")]
    every = [*cells(paper, "embedded"), *short, *cells(paper, "paper")]
    return [f"    {shlex.join(['python', cell.script.path, '--preset', cell.preset])}" for cell in every]


def not_measured(paper: str, rows: dict[Row, dict[str, list[float]]]) -> list[str]:
    """For each table of the published protocol how many of its settings have no row of the profile paper yet."""
    known = {(row.table, row.cell) for row in rows if row.profile == "paper"}
    settings: dict[str, set[str]] = {}
    for cell in cells(paper, "paper"):
        name, setting = cell.preset.split("/")[:2]
        settings.setdefault(name, set()).add(setting)
    return [
        f"- {paper}, {name}: {len(all_of_it) - sum((name, cell) in known for cell in all_of_it)} of {len(all_of_it)} settings"
        for name, all_of_it in settings.items()
    ]


def page() -> str:
    """The whole of benchmarks/README.md."""
    found = {paper: {} for paper in PAPERS} | measured()
    lines = [HEAD, *claims_section(), "## Measured", ""]
    for paper in PAPERS:
        lines += [f"### [{paper}](../{paper}/README.md)", "", *table(found[paper]), ""]
    lines += [*cross_section(cross_rows()), *speed_section(SPEED)]
    lines += [
        "## Not measured yet",
        "",
        "Settings of the published protocols without a run by that protocol:",
        "",
    ]
    lines += [line for paper in PAPERS for line in not_measured(paper, found[paper])]
    lines += ["", "Nothing has been measured on a GPU yet.", ""] if not _on_cards() else [""]
    lines += [
        "## Every cell",
        "",
        "`benchmarks.run` adds `--seed`, `--out`, the data's folder, and `--pretrained` to cells that begin from an encoder.",
        "`python -m benchmarks.claims --dry-run` prints the commands of the cells under `claims/`, which are not listed here.",
        "",
    ]
    for paper in PAPERS:
        own = commands(paper)
        lines += [
            "<details>",
            f"<summary>{paper}: {len(own)} cells</summary>",
            "",
            *own,
            "",
            "</details>",
            "",
        ]
    return "\n".join(lines)


def _on_cards() -> bool:
    return any(row["device"] != "cpu" for path in REFERENCE.glob("*.csv") for row in read_results(path))


def main(argv=None) -> None:
    """Write the page, or look whether it is up to date."""
    parser = Parser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with status 1 where a page is out of date"
    )
    args = parser.parse_args(argv)
    old = []
    for path, text in ((PAGE, page()), (FRONT, front())):
        if not args.check:
            write_atomic(path, text.encode())
            print(f"{path.relative_to(ROOT)} is written")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(ROOT)} is out of date: run make tables", file=sys.stderr)
            old.append(path)
    sys.exit(1 if old else 0)


if __name__ == "__main__":
    exit_cleanly(main)
