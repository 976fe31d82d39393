"""Write one self-contained HTML page of all results: every table, published figures beside ours, curves, logs, wall times.

    python -m benchmarks.report                       # benchmarks/reference/*.csv, results/*.csv and results/runs, if any
    python -m benchmarks.report a.csv b.csv --runs results/runs --out report.html

The page needs no network and no server. A difference to a published figure is coloured if the row has the profile `paper`
and the figure's source could be read. Otherwise it is grey and says why; an unconfirmed figure gets none. A run directory is
shown with a row if it has the same figures, so a later run of the same command is not.
"""

import csv
import hashlib
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import CLAIMS, PAPERS, ROOT, cells, log_name, presets_of
from benchmarks.pages import render
from benchmarks.published import SETTING as PUBLISHED_SETTING
from benchmarks.published import read_published
from benchmarks.results import (
    CONDITION,
    CROSS,
    NUMERIC,
    Sample,
    make_folder,
    normalised,
    number_or_nan,
    plain,
    read_results,
    summarise,
    welch_interval,
    write_text,
)
from benchmarks.tables import METRICS, REFERENCE
from benchmarks.verdicts import CLAIMS_CSV, HEADING, lines, outcomes, read_claims
from common.runs.cli import Parser, UserError, exit_cleanly
from common.runs.figures import naming
from common.runs.results import COLUMNS

RESULTS, RUNS, OUT = Path("results"), Path("results/runs"), Path("results/report.html")
ORIGIN_REFERENCE, ORIGIN_OWN = "reference", "this machine"
RUN_DIRECTORIES = "run directories"  # in place of a file's name, of runs that no result file has
BASELINE = "CE"
SETTING = ("paper", "table", "cell", "dataset", "noise_type", "noise_rate", "imb_factor", "ood_ratio")
KEY = [*SETTING, *CONDITION, "method", "fidelity"]
FIGURES = ("best", "last")  # a row and a run with the same figures are the same
MEASURED = ("seconds", "images_per_second", "peak_memory_mb")
FACTS = (*MEASURED, "device", "precision", "torch", "git", "command")
ACCURACIES = ("test_accuracy", "knn_accuracy")  # columns of a log: of training, of pre-training
# what published tables call a method of ours, in small letters and digits alone
ALIASES = {
    "ce": ("crossentropy", "crossentropyresnet50", "resnet50crossentropy", "softmaxcrossentropy"),
    "afmk2": ("afm",),
    "dividemix": ("dividemixpreactresnet18", "dividemixvanillaasquotedbyaugdesc"),
}
FIGURE = ("table", "method", "metric", "value", "std", "status", "source")
STATUSES = ("confirmed", "secondary", "unconfirmed")


class Source(NamedTuple):
    """A result file, or the runs that no result file has."""

    name: str
    origin: str
    rows: pd.DataFrame


class RunDirectory(NamedTuple):
    """A run: its folder, what result.json says (None: not finished), its command, its log."""

    path: Path
    result: dict | None
    command: str
    log: dict


# reading --------------------------------------------------------------------------------------------------------------


def shown_path(path: Path) -> str:
    """A path relative to the repository or the working directory if it is in one of them."""
    path = path.resolve()
    for base in (ROOT, Path.cwd().resolve()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return str(path)


def read_source(path: Path) -> Source:
    """A result file. UserError as of read_results."""
    reference = path.resolve().parent == REFERENCE.resolve()
    return Source(shown_path(path), ORIGIN_REFERENCE if reference else ORIGIN_OWN, read_results(path))


def default_files() -> tuple[list[Path], list[Path], list[str]]:
    """The reference files and the user's own: result files, speed files, and notes about files that are neither."""
    own, speed, other = [], [], []
    for path in sorted(RESULTS.glob("*.csv")):
        with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
            heading = next(csv.reader(file), [])
        if set(COLUMNS) <= set(heading):
            own.append(path)
        elif heading[:1] == ["what"]:
            speed.append(path)
        else:
            other.append(f"{shown_path(path)} is left out: it is no result file")
    return sorted(REFERENCE.glob("*.csv")) + own, sorted((REFERENCE / "speed").glob("*.csv")) + speed, other


def read_table(path: Path) -> dict:
    """Any CSV as {name, columns, rows}, numbers as numbers of six digits. UserError: it is damaged."""
    with naming(path), path.open(newline="", encoding="utf-8-sig") as file:
        columns, *lines = csv.reader(file, strict=True)
        if any(len(line) != len(columns) for line in lines):
            raise ValueError("not every line has as many fields as the first")
    rows = [[_plain(field) for field in line] for line in lines]
    return {"name": shown_path(path), "columns": columns, "rows": rows}


def _plain(text: str) -> float | int | str | None:
    """A field of a CSV: a number rounded to six digits; None if it is empty; text if it is no finite number."""
    number = number_or_nan(text)
    if not math.isfinite(number):
        return text or None
    return int(number) if number.is_integer() and abs(number) < 1e15 else six_digits(number)


def six_digits(number: float) -> float:
    """The number rounded to six digits, as logs have it."""
    return float(f"{number:.6g}")


def read_run_directory(folder: Path) -> RunDirectory:
    """A run directory with an args.json. UserError: one of its files is damaged."""
    path = folder / "args.json"
    with naming(path):
        command = str(json.loads(path.read_text())["command"])
    result, path = None, folder / "result.json"
    if path.exists():
        with naming(path):
            result = json.loads(path.read_text())
            result = {name: result[name] for name in (*KEY, "seed", "command")} | result
            result["figures"] = {name: float(result["metrics"][name]) for name in FIGURES}
    log = read_table(folder / "log.csv") if (folder / "log.csv").exists() else {"columns": [], "rows": []}
    return RunDirectory(folder, result, command, log)


def read_runs(runs: Path) -> tuple[list[RunDirectory], list[str]]:
    """All run directories below a folder in the order of their names, and a note about each damaged one."""
    found, damaged = [], []
    for path in sorted(runs.rglob("args.json")):
        try:
            found.append(read_run_directory(path.parent))
        except UserError as error:  # the page names a damaged run and shows the others
            damaged.append(str(error))
    return found, damaged


# rows -----------------------------------------------------------------------------------------------------------------


def finite(value: object) -> float | None:
    """A number, or None if it is none or not finite: JSON has no NaN."""
    number = number_or_nan(value)
    return number if math.isfinite(number) else None


def grouped(sources: Sequence[Source]) -> list[dict]:
    """One entry for each method, setting, condition and file: metrics over seeds, and the facts of each run.

    Runs without a result file are apart if their commands differ in more than the seed and the directories named by it, or
    if they have the same seed.
    """
    frames = [normalised(source.rows).assign(origin=source.origin, file=source.name) for source in sources]
    if not frames:
        return []
    rows = pd.concat(frames, ignore_index=True)
    alone = rows["file"] == RUN_DIRECTORIES
    rows["apart"] = rows["command"].where(alone, "").map(_without_seed)
    identity = ["origin", "file", *KEY, "apart"]
    first = rows.groupby([*identity, "seed"], sort=False)["command"].transform("first")
    rows["further"] = rows["command"].where(alone & (rows["command"] != first), "")
    return [_entry(key, own) for key, own in rows.groupby([*identity, "further"], sort=False)]


def _entry(identity: Sequence[str], rows: pd.DataFrame) -> dict:
    """An entry of `grouped`. identity: origin, file, KEY, and what sets runs without a file apart."""
    key = dict(zip(KEY, identity[2:-2], strict=True))
    runs = [
        run | {name: finite(run[name]) for name in MEASURED} | {"folder": None, "log": None}
        for run in rows.drop_duplicates("seed")[["seed", *FACTS]].to_dict("records")
    ]
    values = {name: own.set_index("seed")["value"] for name, own in rows.groupby("metric", sort=False)}
    metrics = {name: {**_of_sample(summarise(own)), "values": own.to_dict()} for name, own in values.items()}
    identity = identity if identity[-1] else identity[:-1]
    entry: dict[str, Any] = {"id": _short_hash(identity), "origin": identity[0], "file": identity[1], **key}
    entry |= {"noise": noise_text(key), "metrics": metrics, "runs": runs}
    means = {name: [run[name] for run in runs if run[name] is not None] for name in MEASURED}
    return entry | {name: statistics.fmean(known) if known else None for name, known in means.items()}


def _of_sample(sample: Sample) -> dict:
    return {**sample._asdict(), "std": finite(sample.std)}


def _short_hash(identity: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()[:10]


def _without_seed(command: str) -> str:
    """A command without its seed and run directory; in other paths `seed` stands for any of the seeds."""
    words = shlex.split(re.sub(r"(--[a-z_]+)=", r"\1 ", command))
    left = [w for i, w in enumerate(words) if not {w, *words[max(i - 1, 0) : i]} & {"--seed", "--out"}]
    return shlex.join(re.sub(r"seed\d+", "seed", word) for word in left)


def noise_text(key: dict[str, str]) -> str:
    """The noise of a setting in words."""
    words = {"imbalance": key["imb_factor"], "OOD": key["ood_ratio"]}
    parts = [f"{key['noise_type']} {key['noise_rate']}".strip()]
    parts += [f"{word} {value}" for word, value in words.items() if value]
    return ", ".join(filter(None, parts))


def add_baselines(rows: list[dict]) -> None:
    """Set every row's `against`: its differences to cross-entropy in the same setting, profile and number of epochs.

    Cross-entropy of the same file and paper comes first, then that of another file of the same origin. A row of run
    directories that no preset names has none, and a panel of its own: only its command knows its setting.
    """
    baselines: dict[str, list[dict]] = {}
    for row in rows:
        row |= {"panel": _short_hash(condition(row)), "against": None}
        if row["method"] == BASELINE:
            baselines.setdefault(row["panel"], []).append(row)
    for row in rows:
        candidates = baselines.get(row["panel"], [])
        if candidates and row["method"] != BASELINE:
            nearest = min(candidates, key=lambda b: (b["file"] != row["file"], b["paper"] != row["paper"]))
            gains = differences(nearest["metrics"], row["metrics"])
            row["against"] = {"row": nearest["id"], "file": nearest["file"], "metrics": gains}


def condition(row: dict) -> tuple[str, ...]:
    """What rows that are compared must share; in the table `cross` all but the paper, which there is the method's."""
    blank = {"paper": ""} if row["table"] == CROSS else {}
    shared = tuple((row | blank)[name] for name in ("origin", *SETTING, *CONDITION))
    return shared if row["file"] != RUN_DIRECTORIES or row["table"] else (*shared, row["id"])


def differences(a: dict, b: dict) -> dict[str, dict]:
    """By metric of accuracy that both have: b - a with its Welch interval, None if one of them has one seed."""
    found = {}
    for name in [name for name in METRICS if name in a and name in b]:
        low, high = map(finite, welch_interval(_sample(a[name]), _sample(b[name])))
        found[name] = {"difference": b[name]["mean"] - a[name]["mean"], "low": low, "high": high}
    return found


def _sample(metric: dict) -> Sample:
    return Sample(metric["n"], metric["mean"], math.nan if metric["std"] is None else metric["std"])


# published figures ----------------------------------------------------------------------------------------------------


def same_method(ours: str, published: str) -> bool:
    """Whether a published figure and one of our rows are of the same method; papers vary capitals, blanks and signs."""
    ours, published = (re.sub(r"[^a-z0-9]", "", name.lower()) for name in (ours, published))
    return ours == published or published in ALIASES.get(ours, ())


def metric_of(published: str) -> str | None:
    """Which of our metrics a published one is: its name, "" if the source does not say, None if it is another."""
    text = published.lower()
    kinds = {"top-5": None, "last 10": "last10", "best": "best", "peak": "best", "highest": "best"}
    kinds |= {"final": "last", "last": "last"}
    return next((kind for word, kind in kinds.items() if word in text), "")


def add_published(rows: list[dict]) -> list[dict]:
    """Set every row's `published`: the figures of its setting and of its own method, as places in the list that is returned."""
    figures = [
        {"paper": paper, "setting": tuple(figure[name] for name in PUBLISHED_SETTING)}
        | {name: figure[name] for name in FIGURE}
        for paper in PAPERS
        for figure in read_published(paper)
    ]
    for row in rows:
        settings = PAPERS[row["paper"]].published if row["paper"] in PAPERS else {}
        setting = settings.get(f"{row['table']}/{row['cell']}")
        own = {
            place: figure
            for place, figure in enumerate(figures)
            if setting and figure["paper"] == row["paper"] and figure["setting"][: len(setting)] == setting
        }
        row["published"] = {"figures": list(own)} | beside(row, own)
    return figures


def beside(row: dict, figures: dict[int, dict]) -> dict:
    """Which published figure to show beside a row, `shown`; with which of our metrics it is compared, `ours`; the difference.

    A figure whose source could be read comes first; an unconfirmed one gets no difference. Then comes one that names its
    epoch; others are compared with the epoch best on validation if the row has it, else with the last.
    comparable: whether the row is of the published protocol; `why` says what limits the comparison.
    """
    own = [
        (STATUSES.index(figure["status"]), said == "", place, said)
        for place, figure in figures.items()
        if same_method(row["method"], figure["method"]) and (said := metric_of(figure["metric"])) is not None
    ]
    *_, place, said = min(own, default=(None, ""))
    found = {"shown": place, "ours": None, "difference": None, "comparable": False, "why": ""}
    if place is None:
        return found
    if figures[place]["status"] == "unconfirmed":
        return found | {"why": "unconfirmed, so not compared"}
    ours = said or ("at_best_validation" if "at_best_validation" in row["metrics"] else "last")
    if ours not in row["metrics"]:
        return found
    comparable = row["profile"] == "paper"
    why = [] if comparable else [f"profile {row['profile'] or '(blank)'}, not the published protocol"]
    why += [] if said else ["the source does not say of which epoch"]
    difference = row["metrics"][ours]["mean"] - float(figures[place]["value"])
    return found | {"ours": ours, "difference": difference, "comparable": comparable, "why": "; ".join(why)}


def not_measured(rows: list[dict]) -> list[dict]:
    """Entries without metrics for the cells of the published protocols without a row of the profile paper."""
    known = {
        (row["paper"], preset)
        for row in rows
        if row["profile"] == "paper"
        for run in row["runs"]
        for preset in re.findall(r"--preset[ =](\S+)", run["command"])
    }
    found = []
    for paper in PAPERS:
        presets = presets_of(ROOT / paper / "presets.toml")
        for cell in cells(paper, "paper"):
            if (paper, cell.preset) in known:
                continue
            table, setting, method = cell.preset.split("/")
            command = ["python", "-m", "benchmarks.run", paper, "--profile", "paper", "--cells", cell.preset]
            key = dict.fromkeys(KEY, "") | {"paper": paper, "table": table, "cell": setting}
            key |= {"dataset": str(presets[cell.preset].get("dataset", table)), "method": method}
            key |= {"profile": "paper", "id": _short_hash(("not measured", paper, cell.preset))}
            found.append(
                {**key, "origin": "", "file": "", "noise": "", "metrics": {}, "runs": [], "against": None}
                | {**dict.fromkeys(MEASURED), "command": shlex.join(command)}
            )
    return found


# runs and their rows --------------------------------------------------------------------------------------------------


def add_runs(rows: list[dict], runs: list[RunDirectory], logs: list[dict]) -> list[RunDirectory]:
    """Give every run of the rows the directory with the same figures; returns the finished directories without a row.

    The directory has the row's command or, if none has, its setting, method and seed. A row of the table `cross` names the
    setting differently from its runs, so there the command alone decides. logs: this list is filled with the logs, and a run
    gets its place in it. A run inside the directory of a row's run, such as its pre-training, belongs to that run.
    """
    places: dict[object, list[RunDirectory]] = {}
    for run in runs:
        if run.result is not None:
            for place in (run.result["command"], _run_key(run.result)):
                places.setdefault(place, []).append(run)
    used = set()
    for row in rows:
        for entry in row["runs"]:
            key = _run_key(row | {"seed": entry["seed"]})
            candidates = [*places.get(entry["command"], []), *places.get(key, [])]
            found = [r for r in candidates if _same_figures(row, entry["seed"], r.result["figures"])]
            if found:
                run = found[0]
                used.update(other.path for other in found)
                _attach(entry, shown_path(run.path), run.log, logs)
                entry["realised_rate"] = (run.result.get("noise") or {}).get("realised_rate")
                entry["best_epoch"] = run.result.get("best_epoch")
    left = [run for run in runs if run.result is not None and run.path not in used]
    return [run for run in left if used.isdisjoint(run.path.parents)]


def _run_key(values: dict) -> tuple[str, ...]:
    return tuple(plain(values[name], name in NUMERIC) for name in (*KEY, "seed"))


def _same_figures(row: dict, seed: str, figures: dict, rounded: Callable[[float], float] = float) -> bool:
    """rounded: as the other figures are."""
    ours = [row["metrics"].get(name, {}).get("values", {}).get(seed) for name in FIGURES]
    pairs = zip(ours, (figures[name] for name in FIGURES), strict=True)
    return None not in ours and all(abs(rounded(a) - b) < 1e-6 for a, b in pairs)


def _attach(entry: dict, name: str, log: dict, logs: list[dict]) -> None:
    entry["folder"] = name
    if log["rows"]:
        entry["log"] = len(logs)
        logs.append({"columns": log["columns"], "rows": log["rows"]})


def add_reference_logs(rows: list[dict], folder: Path, logs: list[dict]) -> list[str]:
    """Give the reference rows their logs, by the paper in the file's name and by the figures; returns notes on the others.

    Logs in the folder claims/ are of rows of the table claims, and have their preset and seed in their names.
    """
    notes = []
    for path in sorted(folder.rglob("*.csv")):
        log = read_table(path)
        if "test_accuracy" not in log["columns"]:
            notes.append(f"{shown_path(path)} is left out: it has no test_accuracy")
            continue
        place = log["columns"].index("test_accuracy")
        curve = [line[place] for line in log["rows"] if line[place] is not None]
        fitting = [
            entry
            for row in rows
            if row["origin"] == ORIGIN_REFERENCE
            and path.name.startswith(row["paper"] + "_")
            and (row["table"] == CLAIMS) is (path.parent.name == CLAIMS)
            for entry in row["runs"]
            if curve
            and (path.parent.name != CLAIMS or path.stem == _claims_log(row, entry))
            and _same_figures(row, entry["seed"], {"best": max(curve), "last": curve[-1]}, six_digits)
        ]
        if len(fitting) == 1:
            _attach(fitting[0], log["name"], log, logs)
        else:
            notes.append(f"{log['name']} is left out: {len(fitting)} rows have its figures")
    return notes


def _claims_log(row: dict, entry: dict) -> str:
    """The name that benchmarks.claims gives to the log of a run; "" without a preset."""
    preset = re.search(r"--preset[ =](\S+)", entry["command"])
    return log_name(row["paper"], preset[1], f"seed{entry['seed']}") if preset else ""


# pivot, environment ---------------------------------------------------------------------------------------------------


def pivot(rows: list[dict]) -> dict:
    """The rows of the table `cross`: settings down, methods across. Each line has, by metric, the best column, if any.

    A second row of the same method in a setting, such as one of another file, gets a line of its own.
    """
    of_method = ("paper", "method", "fidelity")
    of_setting = ("origin", "cell", "dataset", "noise", "imb_factor", "profile", "epochs")
    columns: dict[tuple, int] = {}
    lines: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        if row["table"] == CROSS and row["metrics"]:
            column = columns.setdefault(tuple(row[name] for name in of_method), len(columns))
            setting = tuple(row[name] for name in of_setting)
            taken = column in lines.get((*setting, ""), {})
            lines.setdefault((*setting, row["file"] if taken else ""), {})[column] = row
    return {
        "columns": [dict(zip(of_method, column, strict=True)) for column in columns],
        "lines": [
            dict(zip((*of_setting, "file"), line, strict=True))
            | {"cells": {column: row["id"] for column, row in members.items()}}
            | {"best": {metric: best_column(members, metric) for metric in METRICS}}
            for line, members in lines.items()
        ],
    }


def best_column(members: dict[int, dict], metric: str) -> int | None:
    """The column with the highest mean, if the Welch interval of its lead over the runner-up is above zero; else None."""
    samples = {c: _sample(row["metrics"][metric]) for c, row in members.items() if metric in row["metrics"]}
    ranked = sorted(samples, key=lambda column: -samples[column].mean)
    if len(ranked) < 2:
        return None
    return ranked[0] if welch_interval(samples[ranked[1]], samples[ranked[0]])[0] > 0 else None


def environment(rows: list[dict]) -> list[dict]:
    """The devices, precisions, versions of torch and commits of the rows, with the number of runs of each."""
    runs = pd.DataFrame({"origin": row["origin"], **run} for row in rows for run in row["runs"])
    names = ["origin", "device", "precision", "torch", "git"]
    return runs.groupby(names, sort=False).size().reset_index(name="runs").to_dict("records")


def claims_of(source: Source) -> dict:
    """The file of the claims' runs as every claim with the lines of its tests, in the columns of HEADING."""
    claims = read_claims()
    found = outcomes(claims, source.rows)
    tables = [
        {"paper": claim.paper, "source": claim.source, "lines": lines(claim, found[claim.name])}
        for claim in claims
    ]
    return {"name": source.name, "origin": source.origin, "claims": tables}


# the page -------------------------------------------------------------------------------------------------------------


def collect(files: Sequence[str], runs: Path | None) -> dict:
    """Everything on the page, as plain data. files: result files; without any, the reference and the user's own.

    runs: the folder of run directories, None for none. UserError: a file that is missing or damaged, or no rows at all.
    """
    paths, speed, notes = ([Path(name) for name in files], [], []) if files else default_files()
    sources = [read_source(path) for path in dict.fromkeys(paths)]
    directories, damaged = read_runs(runs) if runs is not None else ([], [])
    notes += damaged
    logs: list[dict] = []
    of_claims = {source.name: source for source in sources if Path(source.name).name == CLAIMS_CSV}
    # other files have the rows of the claims' runs that are of another table, too
    alone = {name: source.rows[source.rows["table"] == CLAIMS] for name, source in of_claims.items()}
    rows = grouped([source._replace(rows=alone.get(source.name, source.rows)) for source in sources])
    others = add_runs(rows, directories, logs)
    if others and not files:
        own = pd.concat([read_results(run.path / "result.csv") for run in others], ignore_index=True)
        further = grouped([Source(RUN_DIRECTORIES, ORIGIN_OWN, own)])
        add_runs(further, others, logs)
        rows += further
    if not rows:
        raise UserError("there are no results: give a result file, or run make reproduce-afm first")
    unplaced = add_reference_logs(rows, REFERENCE / "logs", logs)
    notes += [] if files else unplaced
    add_baselines(rows)
    rows += not_measured(rows)
    figures = add_published(rows)
    order = {paper: place for place, paper in enumerate(PAPERS)}
    tables = list(dict.fromkeys((row["paper"], row["table"]) for row in rows))
    rows.sort(key=lambda r: (order.get(r["paper"], len(order)), tables.index((r["paper"], r["table"]))))
    return {
        "metrics": METRICS,
        "papers": {row["paper"]: title(row["paper"]) for row in rows},
        "files": [{"name": source.name, "origin": source.origin} for source in sources],
        "runs": None if runs is None else shown_path(runs),
        "unfinished": [
            {"folder": shown_path(run.path), "epochs": len(run.log["rows"]), "command": run.command}
            for run in directories
            if run.result is None
        ],
        "accuracies": ACCURACIES,
        "rows": rows,
        "figures": figures,
        "logs": logs,
        "cross": pivot(rows),
        "claims": [claims_of(source) for source in of_claims.values()],
        "claims_heading": HEADING,
        "environment": environment(rows),
        "speed": [read_table(path) for path in speed],
        "notes": notes,
    }


def title(paper: str) -> str:
    """The heading of a paper's README, or the name of its directory without a README."""
    path = ROOT / paper / "README.md"
    if paper not in PAPERS or not path.is_file():
        return paper or "(no paper)"
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.report", description=__doc__)
    files = f"result files; without any, the reference files and those in {RESULTS}/ if there are any"
    parser.add_argument("files", nargs="*", metavar="FILE.csv", help=files)
    parser.add_argument("--runs", metavar="DIR", help=f"folder of run directories; {RUNS} if it exists")
    parser.add_argument("--out", default=str(OUT), metavar="FILE.html", help="the page")
    return parser


def runs_folder(given: str | None) -> Path | None:
    """The folder of --runs, or the default one if it exists. UserError: the given one is no folder."""
    if given is None:
        return RUNS if RUNS.is_dir() else None
    if not Path(given).is_dir():
        raise UserError(f"--runs {given} is no folder: give the one that holds the run directories")
    return Path(given)


def main(argv=None) -> None:
    """Collect and write the page."""
    args = make_parser().parse_args(argv)
    out = Path(args.out)
    if out.suffix.lower() not in (".html", ".htm"):  # so it cannot be one of the files to read
        raise UserError(f"--out {out}: give the page a name that ends in .html")
    data = collect(args.files, runs_folder(args.runs))
    for note in data["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if out == OUT:
        make_folder(out)
    write_text(render("report", data), out, "--out")
    measured = [row for row in data["rows"] if row["metrics"]]
    print(f"{out}: {len(measured)} rows of {len(data['files'])} files, {len(data['logs'])} logs")


if __name__ == "__main__":
    exit_cleanly(main)
