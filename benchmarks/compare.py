"""Result files side by side with a first one, cell by cell, or every method of one file beside a baseline.

    python -m benchmarks.compare a.csv b.csv [c.csv ...] [--metric best last] [--csv OUT.csv] [--markdown OUT.md]
    python -m benchmarks.compare a.csv --against CE
    python -m benchmarks.compare reference.csv new.csv --metric last --fail-below 1      # status 1 where new.csv is worse

Means and standard deviations are over seeds; the interval is Welch's, of the difference of the two means.
Only runs of the same profile and the same number of epochs are compared; what is left out is listed.
"""

import csv
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student_t

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs.cli import Parser, UserError, exit_cleanly, non_negative
from common.runs.files import cannot_write, write_atomic
from common.runs.results import COLUMNS, to_csv

NUMERIC = {"noise_rate", "imb_factor", "ood_ratio", "epochs", "seed"}
CONFIDENCE = 0.95
CROSS = "cross"  # the table of all methods (benchmarks.cross), in which `paper` is the method's
LINE_LENGTH = 110


class Key(NamedTuple):
    """What is measured: one metric of one method in one table cell. Numbers stand in their shortest form."""

    paper: str
    table: str
    cell: str
    method: str
    dataset: str
    noise_type: str
    noise_rate: str
    imb_factor: str
    ood_ratio: str
    fidelity: str
    metric: str


class Condition(NamedTuple):
    """What two runs must share to be compared."""

    profile: str
    epochs: str


class Sample(NamedTuple):
    """One key over its seeds, in the metric's unit (percent for accuracy). std is None for n = 1."""

    n: int
    mean: float
    std: float | None


class Line(NamedTuple):
    """One comparison. difference is b - a; low and high bound it, or are None where a sample has one seed.

    key_a and key_b are equal between two files; against a baseline they differ in method and fidelity.
    """

    key_a: Key
    key_b: Key
    condition: Condition
    a: Sample
    b: Sample
    difference: float
    low: float | None
    high: float | None


class Mismatch(NamedTuple):
    """A key that is in a and in b under different conditions, and so is not compared."""

    key_a: Key
    key_b: Key
    condition_a: Condition
    condition_b: Condition


class Unpaired(NamedTuple):
    """A key and condition with no counterpart on the other side."""

    key: Key
    condition: Condition


CSV_NUMBERS = ("n_a", "mean_a", "std_a", "n_b", "mean_b", "std_b", "difference", "low", "high")
CSV_COLUMNS = (
    *(*Key._fields, *Condition._fields, "baseline", "baseline_fidelity", *CSV_NUMBERS),
    *("file", "status"),
)
NUMBERS = ("n a", "mean a", "std a", "n b", "mean b", "std b", "b - a", f"{CONFIDENCE:.0%} interval")


class Comparison(NamedTuple):
    """Everything found on either side: compared, not comparable, or on one side only."""

    lines: list[Line]
    mismatches: list[Mismatch]
    only_a: list[Unpaired]
    only_b: list[Unpaired]


Groups = dict[Key, dict[Condition, dict[str, float]]]


def read_results(path: str | Path) -> list[dict]:
    """The rows of a result file as dicts of text, `value` as a finite float.

    Raises UserError for a file that cannot be read, is empty, lacks a column of the schema, or has a row that
    is cut short, a value that is not a finite number, or the same seed twice.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _parse(file, path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path of the result file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a readable result CSV") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} is not a CSV ({error}): give a result file that benchmarks.run wrote"
        ) from None
    _group(rows, str(path))
    return rows


def _parse(lines: Iterable[str], path: str | Path) -> list[dict]:
    reader = csv.DictReader(lines, strict=True)
    if reader.fieldnames is None:
        raise UserError(f"{path} is empty: give a result file that benchmarks.run wrote")
    missing = [name for name in COLUMNS if name not in reader.fieldnames]
    if missing:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}: its first line must name all of the schema"
        )
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise UserError(
                f"{path}, line {reader.line_num}: not as many fields as columns; mend or remove the line"
            )
        row["value"] = _finite(row["value"], path, reader.line_num)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has a heading and no results: give a file with at least one row")
    return rows


def _finite(text: str, path: str | Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{path}, line {line}: value is {text!r}; it must be a finite number: mend or remove the line"
        )
    return value


def _cell(row: dict, column: str) -> str:
    """A field as text that compares: "0.50" and 0.5 alike become "0.5"; None becomes ""."""
    text = "" if row[column] is None else " ".join(str(row[column]).split())
    if column not in NUMERIC:
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    return f"{number:.15g}" if math.isfinite(number) else text


def _group(rows: Iterable[dict], source: str) -> Groups:
    """The values by key, condition and seed, in file order."""
    groups: Groups = {}
    for row in rows:
        key = Key(*(_cell(row, name) for name in Key._fields))
        condition = Condition(*(_cell(row, name) for name in Condition._fields))
        values = groups.setdefault(key, {}).setdefault(condition, {})
        seed = _cell(row, "seed")
        if seed in values:
            twice = f"seed {seed or '(blank)'} stands twice for {_label({}, key, condition)}"
            raise UserError(f"{source}: {twice}: keep one row")
        values[seed] = float(row["value"])
    return groups


def compare(
    rows_a: Sequence[dict], rows_b: Sequence[dict], metrics: Sequence[str] | None = None
) -> Comparison:
    """Line up the rows of two result files (dicts of the schema, as from read_results).

    metrics: the ones to compare, in this order; None for all there are, in file order.
    Raises UserError for a metric that neither file has and for a seed that stands twice.
    """
    groups_a, groups_b = _group(rows_a, "the first results"), _group(rows_b, "the second results")
    return _line_up(groups_a, groups_b, metrics, lambda key: key)


def against(rows: Sequence[dict], baseline_method: str, metrics: Sequence[str] | None = None) -> Comparison:
    """Line up every other method of one result file (b) with the baseline method (a) in the same cell.

    The fidelity of the two may differ: it is part of a method's name here; so is the paper in the table of all methods.
    metrics: as in compare.
    Raises UserError for a method or metric that the file lacks and for a seed that stands twice.
    """
    groups = _group(rows, "the results")
    methods = list(dict.fromkeys(key.method for key in groups))
    if baseline_method not in methods:
        raise UserError(f"no method {baseline_method!r} in the results: choose from {', '.join(methods)}")
    baseline = {key: runs for key, runs in groups.items() if key.method == baseline_method}
    others = {key: runs for key, runs in groups.items() if key.method != baseline_method}
    return _line_up(baseline, others, metrics, _without_method)


def _without_method(key: Key) -> Key:
    return key._replace(method="", fidelity="", paper="" if key.table == CROSS else key.paper)


def _line_up(
    groups_a: Groups, groups_b: Groups, metrics: Sequence[str] | None, shared: Callable[[Key], Key]
) -> Comparison:
    """Pair the keys of a and b whose shared part is equal, then their conditions."""
    metrics = _chosen(metrics, [*groups_a, *groups_b])
    groups_a, groups_b = _only_metrics(groups_a, metrics), _only_metrics(groups_b, metrics)
    partners: dict[Key, list[Key]] = {}
    for key in groups_a:
        partners.setdefault(shared(key), []).append(key)
    pairs = [(key_a, key_b) for key_b in groups_b for key_a in partners.get(shared(key_b), [])]
    # in the order of a, so that the table follows the first file
    order = {key: place for place, key in enumerate(groups_a)}
    lines, mismatches = [], []
    for key_a, key_b in sorted(pairs, key=lambda pair: order[pair[0]]):
        runs_a, runs_b = groups_a[key_a], groups_b[key_b]
        lines += [_line(key_a, key_b, both, runs_a[both], runs_b[both]) for both in runs_a if both in runs_b]
        left, right = [c for c in runs_a if c not in runs_b], [c for c in runs_b if c not in runs_a]
        mismatches += [Mismatch(key_a, key_b, *conditions) for conditions in product(left, right)]
    listed_a = {(x.key_a, x.condition) for x in lines} | {(x.key_a, x.condition_a) for x in mismatches}
    listed_b = {(x.key_b, x.condition) for x in lines} | {(x.key_b, x.condition_b) for x in mismatches}
    return Comparison(lines, mismatches, _unlisted(groups_a, listed_a), _unlisted(groups_b, listed_b))


def _chosen(metrics: Sequence[str] | None, keys: Iterable[Key]) -> list[str]:
    present = list(dict.fromkeys(key.metric for key in keys))
    if metrics is None:
        return present
    for metric in metrics:
        if metric not in present:
            raise UserError(f"no metric {metric!r} in the results: choose from {', '.join(present)}")
    return list(dict.fromkeys(metrics))


def _only_metrics(groups: Groups, metrics: Sequence[str]) -> Groups:
    return {key: groups[key] for metric in metrics for key in groups if key.metric == metric}


def _unlisted(groups: Groups, listed: set[tuple[Key, Condition]]) -> list[Unpaired]:
    return [Unpaired(key, run) for key, runs in groups.items() for run in runs if (key, run) not in listed]


def _line(key_a: Key, key_b: Key, condition: Condition, a: dict[str, float], b: dict[str, float]) -> Line:
    a, b = summarise(a.values()), summarise(b.values())
    low, high = welch_interval(a, b) or (None, None)
    return Line(key_a, key_b, condition, a, b, b.mean - a.mean, low, high)


def summarise(values: Iterable[float]) -> Sample:
    """Count, mean and sample standard deviation (n - 1 in the denominator) of at least one value."""
    values = list(values)
    return Sample(
        len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    )


def welch_interval(a: Sample, b: Sample) -> tuple[float, float] | None:
    """Two-sided interval of b.mean - a.mean at CONFIDENCE, with Welch-Satterthwaite degrees of freedom.

    None where a sample has one value; the difference itself, twice, where neither sample varies.
    """
    if a.std is None or b.std is None:
        return None
    difference = b.mean - a.mean
    part_a, part_b = a.std**2 / a.n, b.std**2 / b.n
    variance = part_a + part_b
    if variance == 0:
        return difference, difference
    freedom = 1 / ((part_a / variance) ** 2 / (a.n - 1) + (part_b / variance) ** 2 / (b.n - 1))
    margin = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return difference - margin, difference + margin


def format_table(comparison: Comparison, name_a: str, name_b: str, markdown: bool = False) -> str:
    """The comparison as text, without a last line break: a table, then what was not compared and why.

    markdown: as Markdown, the table with bars and the rest as lists.
    """
    labels = [_labels(line) for line in comparison.lines]
    # the metric stays in every line and in every listed key, so that none is ever without a name
    varying = {name for label in labels for name in label if label[name] != labels[0][name]} | {"metric"}
    common = {name: text for name, text in (labels[0] if labels else {}).items() if name not in varying}
    stated = ", ".join(f"{name} {text}" for name, text in common.items() if text)
    text = [f"a: {name_a}", *([""] if markdown else []), f"b: {name_b}"]
    if stated:
        stated = f"the same in every line: {stated}"
        text += ["", stated] if markdown else textwrap.wrap(stated, LINE_LENGTH, subsequent_indent="  ")
    table = _markdown_table if markdown else _table
    text += ["", *(table(*_columns(comparison.lines, labels, varying)) if labels else ["no line to compare"])]
    text += _mismatch_text(comparison.mismatches, common, "- " if markdown else "  ")
    unpaired = [(name_a, only) for only in comparison.only_a] + [(name_b, only) for only in comparison.only_b]
    if unpaired:
        text.append("")
    only_in = "- only in" if markdown else "only in"
    text += [f"{only_in} {name}: {_label(common, only.key, only.condition)}" for name, only in unpaired]
    return "\n".join(text)


def _labels(line: Line) -> dict[str, str]:
    """The text columns of a line. The baseline columns are blank between two files."""
    same = line.key_a == line.key_b
    return {
        **line.key_b._asdict(),
        **line.condition._asdict(),
        "baseline": "" if same else line.key_a.method,
        "baseline_fidelity": "" if same else line.key_a.fidelity,
    }


def _label(common: dict[str, str], *parts: Key | Condition) -> str:
    """A key in words, without the blanks and without what stands above the table already."""
    fields = [field for part in parts for field in part._asdict().items()]
    return ", ".join(f"{name} {text or '(blank)'}" for name, text in fields if text != common.get(name, ""))


def _columns(
    lines: Sequence[Line], labels: Sequence[dict[str, str]], varying: set[str]
) -> tuple[list[tuple[str, ...]], int]:
    """The columns of the table, each with its heading first, and how many of them are words; the others are numbers."""
    names = [name for name in labels[0] if name in varying]
    cells = [
        [label[name] for name in names] + _numbers(line) for line, label in zip(lines, labels, strict=True)
    ]
    return list(zip([*names, *NUMBERS], *cells, strict=True)), len(names)


def _table(columns: list[tuple[str, ...]], words: int) -> list[str]:
    padded = [_pad(column, str.ljust) for column in columns[:words]]
    padded += [_pad(column, str.rjust) for column in columns[words:]]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def _markdown_table(columns: list[tuple[str, ...]], words: int) -> list[str]:
    heading, *rows = zip(*columns, strict=True)
    rule = ["---"] * words + ["---:"] * (len(columns) - words)
    return [
        f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in (heading, rule, *rows)
    ]


def _pad(column: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [justify(text, width) for text in column]


def _numbers(line: Line) -> list[str]:
    interval = "" if line.low is None else f"[{line.low:+.2f}, {line.high:+.2f}]"
    return [*_sample_text(line.a), *_sample_text(line.b), f"{line.difference:+.2f}", interval]


def _sample_text(sample: Sample) -> list[str]:
    return [str(sample.n), f"{sample.mean:.2f}", "" if sample.std is None else f"{sample.std:.2f}"]


def _mismatch_text(mismatches: Sequence[Mismatch], common: dict[str, str], indent: str) -> list[str]:
    """The keys under the reason they share."""
    reasons: dict[str, list[str]] = {}
    for mismatch in mismatches:
        reasons.setdefault(_differing(mismatch), []).append(_label(common, mismatch.key_b))
    text = []
    for reason, keys in reasons.items():
        text += ["", f"not compared: {reason}", *(f"{indent}{key}" for key in dict.fromkeys(keys))]
    return text


def _differing(mismatch: Mismatch) -> str:
    columns = zip(Condition._fields, mismatch.condition_a, mismatch.condition_b, strict=True)
    return ", ".join(f"{name} {a or '(blank)'} against {b or '(blank)'}" for name, a, b in columns if a != b)


def regressions(comparison: Comparison, points: float) -> list[str]:
    """What is worse in b than in a: each line whose mean is lower by more than `points`, and each cell that b lacks."""
    found = [
        f"{_label({}, line.key_b, line.condition)}: {line.a.mean:.2f} to {line.b.mean:.2f} ({line.difference:+.2f})"
        for line in comparison.lines
        if line.difference < -points
    ]
    found += [f"{_label({}, only.key, only.condition)}: missing" for only in comparison.only_a]
    return found + [
        f"{_label({}, x.key_a, x.condition_a)}: missing under this condition" for x in comparison.mismatches
    ]


def write_csv(comparisons: Iterable[tuple[str, Comparison]], path: str | Path) -> None:
    """Everything found as a CSV, numbers unrounded; a file already there is replaced whole or not at all.

    comparisons: each with the name of b, a column of its own. status: compared, or why there are no numbers: under which
    conditions the two stand, or on which side alone. Raises UserError where the file cannot be written.
    """
    rows = [row | {"file": file} for file, found in comparisons for row in _csv_rows(found)]
    write_text(to_csv(rows, CSV_COLUMNS), path, "--csv")


def write_text(text: str, path: str | Path, flag: str) -> None:
    """A file written whole or not at all. Raises UserError, which names the flag, where it cannot be written."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: give {flag} the name of a file in an existing folder")
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(cannot_write(path, error, f"give {flag} a writable folder")) from None


def _csv_rows(comparison: Comparison) -> list[dict]:
    rows = []
    for line in comparison.lines:
        numbers = (*line.a, *line.b, line.difference, line.low, line.high)
        rows.append(_labels(line) | dict(zip(CSV_NUMBERS, numbers, strict=True)) | {"status": "compared"})
    for x in comparison.mismatches:
        status = f"not compared: {_differing(x)}"
        rows.append(x.key_b._asdict() | x.condition_b._asdict() | {"status": status})
    for side, unpaired in (("a", comparison.only_a), ("b", comparison.only_b)):
        rows += [x.key._asdict() | x.condition._asdict() | {"status": f"only in {side}"} for x in unpaired]
    return rows


def parse_args(argv: Sequence[str] | None):
    """The command line. Raises UserError where the number of files does not fit --against."""
    parser = Parser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="two or more result CSVs, of which the first is compared with each; one with --against",
    )
    parser.add_argument(
        "--metric", nargs="+", metavar="NAME", help="metrics to compare; all there are if not given"
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="compare the other methods of one file to this one"
    )
    parser.add_argument(
        "--csv", metavar="OUT.csv", help="also write all that is found to this file, unrounded"
    )
    parser.add_argument(
        "--markdown", metavar="OUT.md", help="also write what is printed to this file, as Markdown"
    )
    parser.add_argument(
        "--fail-below",
        type=non_negative,
        metavar="POINTS",
        help="exit with status 1 where a mean is lower than the first file's (or METHOD's) by more than this, or is missing",
    )
    args = parser.parse_args(argv)
    given = f"{len(args.files)} result file(s) given ({', '.join(args.files)})"
    if (len(args.files) == 1) != (args.against is not None):
        raise UserError(f"{given}: give two or more to compare, or one with --against METHOD")
    for flag, out in (("--csv", args.csv), ("--markdown", args.markdown)):
        if out is not None and any(Path(out).resolve() == Path(file).resolve() for file in args.files):
            raise UserError(f"{flag} {out} is one of the result files: give another name")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison of result files with the first, or of one file's methods with a baseline."""
    args = parse_args(argv)
    first, *others = [read_results(path) for path in args.files]
    if args.against is None:
        name = args.files[0]
        found = [
            (file, compare(first, rows, args.metric))
            for file, rows in zip(args.files[1:], others, strict=True)
        ]
    else:
        name, found = args.against, [("the other methods", against(first, args.against, args.metric))]
    if args.csv is not None:
        write_csv(found, args.csv)
    if args.markdown is not None:
        tables = [format_table(one, name, other, markdown=True) for other, one in found]
        write_text("\n\n".join(tables) + "\n", args.markdown, "--markdown")
    print("\n\n".join(format_table(one, name, other) for other, one in found))
    if args.fail_below is not None:
        worse = [f"{other}: {text}" for other, one in found for text in regressions(one, args.fail_below)]
        for text in worse:
            print(f"worse in {text}", file=sys.stderr)
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    exit_cleanly(main)
