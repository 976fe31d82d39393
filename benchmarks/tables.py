"""Write benchmarks/README.md: what this project measured for every table of the papers, and every cell with its command.

    make tables                                  # or python -m benchmarks.tables
    python -m benchmarks.tables --check          # status 1 if a page is not what the files say

Also writes the short tables of the claims and of label errors in the README of the repository.

Figures come from reference/*.csv alone, cells from the papers' presets.toml, the text from readme.md.jinja. Nothing is run.
"""

import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import PAPERS, ROOT, cells
from benchmarks.label_errors import format_table
from benchmarks.results import CROSS, figure, markdown_table, read_results
from benchmarks.verdicts import CLAIMS_CSV, outcomes, read_claims, short_table, whole_table
from common.runs.cli import Parser, UserError, exit_cleanly
from common.runs.files import write_atomic

REFERENCE, PAGE = ROOT / "benchmarks" / "reference", ROOT / "benchmarks" / "README.md"
TEMPLATE, CROSS_SETTINGS = ROOT / "benchmarks" / "readme.md.jinja", ROOT / "benchmarks" / "cross.toml"
FRONT = ROOT / "README.md"  # each table stands between two comments
MARKS = {
    name: (f"<!-- {name}, written by make tables -->", f"<!-- end of {name} -->")
    for name in ("claims", "label errors")
}
LABEL_ERRORS = "label_errors.csv"  # written by benchmarks.label_errors
METRICS = {
    "best": "best",
    "last": "last",
    "last10": "mean of last 10",
    "at_best_validation": "at best validation",
}
ROW = ["table", "cell", "noise_type", "noise_rate", "profile", "fidelity", "epochs", "method", "file"]
PARTS = ("augment", "forward", "backward", "optimiser", "rest")


def reference_rows() -> pd.DataFrame:
    """All rows of the reference files, with the file's name."""
    files = [read_results(path).assign(file=path.name) for path in sorted(REFERENCE.glob("*.csv"))]
    return pd.concat(files, ignore_index=True)


def table(rows: pd.DataFrame) -> list[str]:
    """The measured rows of a paper as Markdown, without the metrics that none of them has."""
    metrics = [name for name in METRICS if (rows["metric"] == name).any()]
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
    lines = []
    for key, own in rows[rows["metric"].isin(metrics)].groupby(ROW, sort=False):
        row = dict(zip(ROW, key, strict=True))
        seeds = (own["metric"] == own["metric"].iloc[0]).sum()
        method = row["method"] + (", as released" if row["fidelity"] == "released" else "")
        noise = f"{row['noise_type']} {row['noise_rate']}".strip()
        figures = [figure(own["value"][own["metric"] == metric]) for metric in metrics]
        link = f"[`{row['file']}`](reference/{row['file']})"
        lines.append([row["cell"], noise, method, row["profile"], row["epochs"], str(seeds), *figures, link])
    return markdown_table(heading, lines)


def cross_table(
    rows: pd.DataFrame,
    metric: str = "last",
    column: str = "value",
    scale: float = 1,
    further: Sequence[str] = ("profile", "epochs"),
) -> list[str]:
    """Rows of benchmarks.cross as Markdown: settings down, methods across; in the cells a column of a metric's rows.

    further: columns that set lines of a setting apart.
    """
    methods, names = rows["method"].unique(), ["cell", *further]
    own = rows[rows["metric"] == metric]
    own = own.assign(shown=scale * own[column].astype(float))
    lines = []
    for key, group in own.groupby(names, sort=False):
        shown = [group["shown"][group["method"] == method] for method in methods]
        seeds = sorted({len(values) for values in shown if len(values)})
        lines.append([*key, " to ".join(map(str, {seeds[0]: None, seeds[-1]: None})), *map(figure, shown)])
    return markdown_table(["setting", *further, "seeds", *methods], lines)


def speed_rows(name: str) -> list[dict]:
    """The rows of a file of reference/speed; none if it is not there."""
    file = REFERENCE / "speed" / f"{name}.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records") if file.is_file() else []


def columns_table(columns: dict[str, str], rows: list[dict]) -> list[str]:
    """Columns of rows as Markdown: columns maps each heading to the name of its column."""
    return markdown_table(list(columns), [[row[name] for name in columns.values()] for row in rows])


def speed_table(rows: list[dict]) -> list[str]:
    """What benchmarks.speed steps measured, as Markdown: each method beside the plain path."""
    heading = [
        "method",
        "path",
        "images/s",
        "quartiles",
        *(f"{part} %" for part in PARTS),
        "selection s",
        "epoch s",
    ]
    heading += ["images per epoch", "steps timed", "memory MiB", "of matmul %", "ours / plain", "range"]
    return markdown_table(heading, map(_speed_line, rows))


def _speed_line(row: dict[str, str]) -> list[str]:
    def number(name: str) -> float:
        return float(row[name])

    line = [row["method"], row["path"], f"{number('median_images_per_second'):.2f}"]
    line += [f"{number('q1'):.2f} to {number('q3'):.2f}"]
    line += [f"{100 * number(f'{part}_ms') / number('step_ms'):.1f}" for part in PARTS]
    line += [f"{number(name):.2f}" for name in ("one_selection_seconds", "seconds_per_epoch")]
    line += [row["images_trained_per_epoch"], row["timed_steps"], f"{number('peak_memory_mb'):.0f}"]
    line += [f"{100 * number('share_of_matmul'):.1f}"]
    if row["path"] != "ours":
        return [*line, "", ""]
    low, middle, high = (number(f"ours_over_plain_{which}") for which in ("min", "median", "max"))
    return [*line, f"{middle:.2f}", f"{low:.2f} to {high:.2f}, {row['pairs']} pairs"]


def operators_table(rows: list[dict]) -> list[str]:
    """What benchmarks.speed operators measured, as Markdown."""
    heading = ["step", "network", "pixels", "batch", "step ms", "own operators %", "convolutions %"]
    names = ("step", "network", "image_size", "batch_size", "step_ms")
    shares = ("operators_share", "convolutions_share")
    lines = [[*(row[n] for n in names), *(f"{100 * float(row[n]):.0f}" for n in shares)] for row in rows]
    return markdown_table(heading, lines)


def cross_missing(rows: pd.DataFrame) -> list[str]:
    """The settings of the table of all methods that no row without a subset is of."""
    described = tomllib.loads(CROSS_SETTINGS.read_text(encoding="utf-8"))
    wanted = [f"{d}-{name}" for d in described if d != "settings" for name in described[d]["settings"]]
    complete = set(rows["cell"][~rows["profile"].str.contains("+limit_", regex=False)])
    return [cell for cell in wanted if cell not in complete]


def not_measured(paper: str, rows: pd.DataFrame) -> list[tuple[str, str, int, int]]:
    """For each table of the published protocol: paper, table, settings that have no row, settings.

    Rows of the profile paper count, but for those of cross-entropy, the baseline.
    """
    settings = pd.DataFrame(
        [cell.preset.split("/")[:2] for cell in cells(paper, "paper")], columns=["table", "cell"]
    )
    of_paper = rows[(rows["paper"] == paper) & (rows["profile"] == "paper") & rows["metric"].isin(METRICS)]
    of_paper = of_paper[of_paper["method"] != "CE"]
    known = set(zip(of_paper["table"], of_paper["cell"], strict=True))
    return [
        (paper, name, sum((name, cell) not in known for cell in own), len(own))
        for name, own in settings.drop_duplicates().groupby("table", sort=False)["cell"]
    ]


def commands(paper: str) -> list[str]:
    """Every cell of a paper by the command that runs it, those of the published tables by their protocol."""
    short = [cell for cell in cells(paper, "short") if cell.preset.startswith("short/")]
    every = [*cells(paper, "embedded"), *short, *cells(paper, "paper")]
    return [f"    {shlex.join(['python', cell.script.path, '--preset', cell.preset])}" for cell in every]


def claim_outcomes(render) -> list[str]:
    """The claims and their outcomes as `render` lays them out; no line without a reference file of them."""
    path, claims = REFERENCE / CLAIMS_CSV, read_claims()
    return render(claims, outcomes(claims, read_results(path))) if path.is_file() else []


def label_errors(render: Callable[[list[dict]], list[str]]) -> list[str]:
    """The rows of label errors as `render` lays them out; no line without a reference file of them."""
    path = REFERENCE / LABEL_ERRORS
    return render(read_results(path).to_dict("records")) if path.is_file() else []


def short_label_errors(rows: list[dict]) -> list[str]:
    """Average precision in percent: settings down, methods across."""
    return cross_table(pd.DataFrame(rows), "label_error_average_precision", scale=100, further=())


def page() -> str:
    """The text of benchmarks/README.md."""
    every = reference_rows()
    # other files may have rows of the claims, too
    rows = every[~every["file"].isin([CLAIMS_CSV, LABEL_ERRORS])]
    crossed, own = rows[rows["table"] == CROSS], rows[rows["table"] != CROSS]
    kinds = ("steps", "images", "parts", "launches", "operators")
    speed, images, parts, launches, operators = map(speed_rows, kinds)
    environment = Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        claims=claim_outcomes(whole_table),
        label_errors=label_errors(format_table),
        measured={paper: table(own[own["paper"] == paper]) for paper in PAPERS},
        cross=dict(iter(crossed.groupby("file", sort=False))),
        cross_missing=cross_missing(crossed),
        cross_table=cross_table,
        speed=speed,
        speed_table=speed_table,
        operators=operators,
        operators_table=operators_table,
        images=images,
        images_table=columns_table(
            {
                "source": "source",
                "workers": "workers",
                "images/s": "median_images_per_second",
                "processor µs an image": "least_processor_us_per_image",
            },
            images,
        ),
        parts=parts,
        parts_table=columns_table(
            {
                "step": "part",
                "way": "way",
                "processor µs an image": "processor_us_per_image",
                "largest difference of a pixel": "largest_difference",
            },
            parts,
        ),
        launches=launches,
        launches_table=columns_table({name: name for name in ("step", "operators", "waits")}, launches),
        not_measured=[line for paper in PAPERS for line in not_measured(paper, own)],
        on_cards=(every["device"] != "cpu").any(),
        commands={paper: commands(paper) for paper in PAPERS},
    )


def front() -> str:
    """The README of the repository with its tables as the files say. UserError: their marks are not there."""
    text = FRONT.read_text(encoding="utf-8") if FRONT.is_file() else ""
    tables = {"claims": claim_outcomes(short_table), "label errors": label_errors(short_label_errors)}
    for name, lines in tables.items():
        first, last = MARKS[name]
        if [text.count(mark) for mark in MARKS[name]] != [1, 1]:
            raise UserError(f"{FRONT} must have each of these lines once: {first}, {last}")
        before, rest = text.split(first)
        shown = lines or ["Not measured yet."]
        text = "\n".join([f"{before}{first}", *shown, f"{last}{rest.split(last)[1]}"])
    return text


def main(argv=None) -> None:
    """Write the page, or check that it is up to date."""
    parser = Parser(prog="python -m benchmarks.tables", description=__doc__)
    help_text = "write nothing; exit with status 1 if a page is out of date"
    parser.add_argument("--check", action="store_true", help=help_text)
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
