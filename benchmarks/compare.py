"""Result files side by side with a first one, cell by cell, or every method of one file beside a baseline.

    python -m benchmarks.compare a.csv b.csv [c.csv ...] [--metric best last] [--csv OUT.csv] [--markdown OUT.md]
    python -m benchmarks.compare a.csv --against CE
    python -m benchmarks.compare reference.csv new.csv --metric last --fail-below 1      # status 1 if new.csv is worse

Means and standard deviations are over seeds; the interval is Welch's, of the difference of the two means.
Only runs of the same profile and the same number of epochs are compared; the rest is listed.
"""

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import (
    CONDITION,
    CONFIDENCE,
    CROSS,
    KEY,
    Sample,
    label,
    over_seeds,
    read_results,
    welch_interval,
    write_text,
)
from common.runs.cli import Parser, UserError, exit_cleanly, non_negative

WORDS = [*KEY, *CONDITION, "baseline", "baseline_fidelity"]
NUMBERS = ["n_a", "mean_a", "std_a", "n_b", "mean_b", "std_b", "difference", "low", "high"]
HEADINGS = ["n a", "mean a", "std a", "n b", "mean b", "std b", "b - a", f"{CONFIDENCE:.0%} interval"]
# status of a row; the second says why, or it is "only in a"
COMPARED, NOT_COMPARED = "compared", "not compared: "
LINE_LENGTH = 110


def compare(a: pd.DataFrame, b: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Line up the rows of two result files, as read_results gives them.

    metrics: the ones to compare, in this order; None for all there are, in file order.
    Returns a row per key and condition: WORDS, NUMBERS (b - a), status. WORDS are those of b if it has the key; with the
    suffix _a or _b they are those of either side. UserError: a metric that neither has, or the same seed twice.
    """
    return _line_up(over_seeds(a, "the first results"), over_seeds(b, "the second results"), metrics, KEY)


def against(rows: pd.DataFrame, baseline: str, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Line up every other method of one result file (b) with the baseline method (a) in the same cell; as compare.

    The fidelity of the two may differ, as it is part of a method's name here; in the table of all methods the paper, too.
    UserError: also for a method that the file lacks.
    """
    runs = over_seeds(rows, "the results")
    methods = runs["method"].unique()
    if baseline not in methods:
        raise UserError(f"no method {baseline!r} in the results: choose from {', '.join(methods)}")
    runs["family"] = runs["paper"].mask(runs["table"] == CROSS, "")
    shared = ["family", *(name for name in KEY if name not in ("paper", "method", "fidelity"))]
    is_baseline = runs["method"] == baseline
    return _line_up(runs[is_baseline], runs[~is_baseline], metrics, shared)


def _line_up(a: pd.DataFrame, b: pd.DataFrame, metrics, shared: list[str]) -> pd.DataFrame:
    """Pair the runs of a and b that are equal in the columns `shared`, then those of the same condition."""
    present = list(pd.concat([a["metric"], b["metric"]]).unique())
    for metric in metrics or ():
        if metric not in present:
            raise UserError(f"no metric {metric!r} in the results: choose from {', '.join(present)}")
    a, b = (_in_order(runs, metrics or present).add_suffix(side) for runs, side in ((a, "_a"), (b, "_b")))
    pairs = a.merge(b, left_on=[f"{name}_a" for name in shared], right_on=[f"{name}_b" for name in shared])
    # in the order of a, so that the table follows the first file
    pairs = pairs.sort_values(["place_a", "key_a", "key_b", "row_a", "row_b"], ignore_index=True)
    same = (pairs["profile_a"] == pairs["profile_b"]) & (pairs["epochs_a"] == pairs["epochs_b"])
    # a run that has its counterpart under the same condition is not set against another condition of it
    served_a = same.groupby([pairs["row_a"], pairs["key_b"]]).transform("any")
    served_b = same.groupby([pairs["row_b"], pairs["key_a"]]).transform("any")
    lines, mismatches = pairs[same], pairs[~served_a & ~served_b]
    only_a = a[~a["row_a"].isin([*lines["row_a"], *mismatches["row_a"]])]
    only_b = b[~b["row_b"].isin([*lines["row_b"], *mismatches["row_b"]])]
    samples = [[Sample(*x) for x in lines[[f"{n}_{s}" for n in Sample._fields]].to_numpy()] for s in "ab"]
    bounds = pd.DataFrame(map(welch_interval, *samples), lines.index, ["low", "high"])
    lines = lines.assign(difference=lines["mean_b"] - lines["mean_a"], status=COMPARED, **bounds)
    if shared != KEY:
        lines = lines.assign(baseline=lines["method_a"], baseline_fidelity=lines["fidelity_a"])
    reasons = [NOT_COMPARED + _differing(row) for row in mismatches.to_dict("records")]
    only = (only_a.assign(status="only in a"), only_b.assign(status="only in b"))
    without = (mismatches.assign(status=reasons), *only)
    found = pd.concat([lines, *(part.drop(columns=NUMBERS, errors="ignore") for part in without)])
    found = found.reset_index(drop=True).reindex(columns=[*dict.fromkeys([*found, *WORDS, *NUMBERS])])
    for name in (*KEY, *CONDITION):
        found[name] = found[f"{name}_b"].fillna(found[f"{name}_a"])
    found[WORDS] = found[WORDS].astype(object).fillna("")
    return found.astype({"n_a": "Int64", "n_b": "Int64"})


def _in_order(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """The runs of the metrics, in their order, then key by key; with the numbers of metric, key and row."""
    runs = runs[runs["metric"].isin(metrics)]
    key = runs.groupby(KEY, sort=False).ngroup()
    runs = runs.assign(place=runs["metric"].map(list(metrics).index), key=key)
    return runs.sort_values(["place", "key"], kind="stable").assign(row=range(len(runs)))


def _differing(row: dict) -> str:
    both = [(name, row[f"{name}_a"], row[f"{name}_b"]) for name in CONDITION]
    return ", ".join(f"{name} {a or '(blank)'} against {b or '(blank)'}" for name, a, b in both if a != b)


def format_table(found: pd.DataFrame, name_a: str, name_b: str, markdown: bool = False) -> str:
    """What compare or against found as text, without a last line break: a table, then what was not compared and why.

    markdown: as Markdown, the table with bars and the rest as lists.
    """
    lines = found[found["status"] == COMPARED]
    # the metric stays in every line and in every listed key, so that none is ever without a name
    words = [name for name in WORDS if name == "metric" or lines[name].nunique() > 1]
    common = {} if lines.empty else {name: lines[name].iloc[0] for name in WORDS if name not in words}
    stated = ", ".join(f"{name} {text}" for name, text in common.items() if text)
    text = [f"a: {name_a}", *([""] if markdown else []), f"b: {name_b}"]
    if stated:
        stated = f"the same in every line: {stated}"
        text += ["", stated] if markdown else textwrap.wrap(stated, LINE_LENGTH, subsequent_indent="  ")
    table = [[*words, *HEADINGS]]
    table += [[*(row[name] for name in words), *_numbers(row)] for row in lines.to_dict("records")]
    laid_out = _markdown_table if markdown else _plain_table
    text += ["", *(laid_out(table, len(words)) if len(lines) else ["no line to compare"])]
    for reason, own in found[found["status"].str.startswith(NOT_COMPARED)].groupby("status", sort=False):
        keys = dict.fromkeys(label(row, common) for row in own[KEY].to_dict("records"))
        text += ["", reason, *(f"{'- ' if markdown else '  '}{key}" for key in keys)]
    only = [
        f"{'- ' if markdown else ''}only in {name}: {label(row, common)}"
        for side, name in (("a", name_a), ("b", name_b))
        for row in found[found["status"] == f"only in {side}"].to_dict("records")
    ]
    return "\n".join([*text, *([""] if only else []), *only])


def _plain_table(table: list[list[str]], words: int) -> list[str]:
    """Words to the left, numbers to the right."""
    formats = [
        f"{'<' if i < words else '>'}{max(map(len, column))}"
        for i, column in enumerate(zip(*table, strict=True))
    ]
    return ["  ".join(map(format, row, formats)).rstrip() for row in table]


def _markdown_table(table: list[list[str]], words: int) -> list[str]:
    rule = ["---"] * words + ["---:"] * len(HEADINGS)
    escaped = ([text.replace("|", "&#124;") for text in row] for row in (table[0], rule, *table[1:]))
    return [f"| {' | '.join(row)} |" for row in escaped]


def _numbers(row: dict) -> list[str]:
    formats = {name: "d" if name.startswith("n_") else ".2f" for name in NUMBERS[:6]} | {"difference": "+.2f"}
    numbers = ["" if pd.isna(row[name]) else format(row[name], how) for name, how in formats.items()]
    return [*numbers, "" if pd.isna(row["low"]) else f"[{row['low']:+.2f}, {row['high']:+.2f}]"]


def regressions(found: pd.DataFrame, points: float) -> list[str]:
    """What is worse in b than in a: each line whose mean is lower by more than `points`, and each cell that b lacks."""
    worse = found[(found["status"] == COMPARED) & (found["difference"] < -points)].to_dict("records")
    texts = [f"{label(x)}: {x['mean_a']:.2f} to {x['mean_b']:.2f} ({x['difference']:+.2f})" for x in worse]
    texts += [f"{label(x)}: missing" for x in found[found["status"] == "only in a"].to_dict("records")]
    of_a = found[found["status"].str.startswith(NOT_COMPARED)][[f"{name}_a" for name in (*KEY, *CONDITION)]]
    rows = of_a.rename(columns=lambda name: name.removesuffix("_a")).to_dict("records")
    return texts + [f"{label(row)}: missing under this condition" for row in rows]


def write_csv(comparisons: Iterable[tuple[str, pd.DataFrame]], path: str | Path) -> None:
    """Write everything found as a CSV, numbers unrounded, whole or not at all. UserError: it cannot be written.

    comparisons: each with the name of b, a column of its own.
    """
    rows = pd.concat([found.assign(file=file) for file, found in comparisons])
    text = rows.to_csv(columns=[*WORDS, *NUMBERS, "file", "status"], index=False, lineterminator="\n")
    write_text(text, path, "--csv")


def parse_args(argv: Sequence[str] | None):
    """The command line. UserError: the number of files does not fit --against, or an output is one of the files."""
    parser = Parser(prog="python -m benchmarks.compare", description=__doc__)
    add = parser.add_argument
    files = "two or more result CSVs, of which the first is compared with each; one with --against"
    add("files", nargs="+", metavar="FILE", help=files)
    add("--metric", nargs="+", metavar="NAME", help="metrics to compare; all there are if not given")
    add("--against", metavar="METHOD", help="compare the other methods of one file to this one")
    add("--csv", metavar="OUT.csv", help="also write all that is found to this file, unrounded")
    add("--markdown", metavar="OUT.md", help="also write what is printed to this file, as Markdown")
    worse = "exit with status 1 if a mean is lower than the first file's (or METHOD's) by more than this, or is missing"
    add("--fail-below", type=non_negative, metavar="POINTS", help=worse)
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
        name, pairs = args.files[0], zip(args.files[1:], others, strict=True)
        found = [(file, compare(first, rows, args.metric)) for file, rows in pairs]
    else:
        name, found = args.against, [("the other methods", against(first, args.against, args.metric))]
    if args.csv is not None:
        write_csv(found, args.csv)
    if args.markdown is not None:
        tables = [format_table(one, name, other, markdown=True) for other, one in found]
        write_text("\n\n".join(tables) + "\n", args.markdown, "--markdown")
    print("\n\n".join(format_table(one, name, other) for other, one in found))
    if args.fail_below is not None:
        worse = [(other, text) for other, one in found for text in regressions(one, args.fail_below)]
        for other, text in worse:
            print(f"worse in {other}: {text}", file=sys.stderr)
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    exit_cleanly(main)
