"""The claims of the papers (claims.toml), tested on result rows: intervals, verdicts, tables.

holds: the 95 % interval of the difference is on the side of the bound that the claim names. contradicted: it is on the other
side. undecided: it contains the bound, or there is one seed. not run: a cell has no row. For a difference of two means over
seeds the interval is Welch's; for a difference to a value it is Student's.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.cells import PAPERS, ROOT, presets_of
from benchmarks.results import Sample, figure, markdown_table, summarise, welch_interval
from common.runs.cli import UserError

CLAIMS, CLAIMS_CSV = ROOT / "benchmarks" / "claims.toml", "claims.csv"
DIRECTIONS = ("above", "below", "differs")
HOLDS, CONTRADICTED, UNDECIDED, NOT_RUN = "holds", "contradicted", "undecided", "not run"
VERDICTS = (HOLDS, CONTRADICTED, UNDECIDED, NOT_RUN)
IN_PERCENT = ("best", "last", "last10", "full_test", "at_best_validation")
ALL = "all"  # in place of a paper, of claims about several


class ClaimTest(NamedTuple):
    """One test of a claim: a metric of a cell against that of another cell, or against a value."""

    data: str  # in words
    metric: str
    direction: str  # on which side the difference is according to the claim: one of DIRECTIONS
    value: float  # the bound of the metric, or of the difference of two cells; in the unit of the rows
    cell: str  # paper/preset
    than: str | None
    seeds: tuple[int, ...]
    second: bool = False  # the same test with other seeds

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells that it compares."""
        return (self.cell,) if self.than is None else (self.than, self.cell)

    @property
    def embedded(self) -> bool:
        """Whether it needs no data: all its cells use digits."""
        return all(preset_of(cell)["dataset"] == "digits" for cell in self.cells)

    @property
    def scale(self) -> float:
        """The factor from the metric's unit to percent: 1 for accuracies, 100 for shares and areas under curves."""
        return 1.0 if self.metric in IN_PERCENT or self.metric.endswith("_accuracy") else 100.0


class Claim(NamedTuple):
    """A claim of a paper, in our words, with its source."""

    name: str
    paper: str
    sentence: str
    source: str
    tests: tuple[ClaimTest, ...]


class Outcome(NamedTuple):
    """The result of a test. Figures are in percent; difference, low and high in points above the bound of the claim.

    values and than: the metric's values over seeds, of the cell and of the other one, none if not run or if there is no other.
    difference, low and high are NaN if they do not exist.
    """

    test: ClaimTest
    values: list[float]
    than: list[float]
    difference: float
    low: float
    high: float
    verdict: str


# the claims -----------------------------------------------------------------------------------------------------------


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of claims.toml. ValueError: an entry is misspelt, missing, or names no preset."""
    description = tomllib.loads(path.read_text(encoding="utf-8"))
    usual = {"direction": "above", "value": 0, "than": None, "seeds": description["seeds"], "second": False}
    claims = []
    for name, claim in description["claims"].items():
        shared = {key: value for key, value in claim.items() if key in ClaimTest._fields}
        texts = {key: value for key, value in claim.items() if key not in (*ClaimTest._fields, "tests")}
        if texts.keys() != {"paper", "claim", "source"} or texts["paper"] not in (*PAPERS, ALL):
            raise ValueError(f"claim {name}: paper, claim and source are needed, and nothing else: {texts}")
        tests = []
        for entries in claim["tests"]:
            tests.append(_test(name, usual | shared | entries | {"second": False}))
            if entries.get("second"):
                words = f"{tests[-1].data} (second experiment, other seeds)"
                seeds = tuple(description["second_seeds"])
                tests.append(tests[-1]._replace(data=words, seeds=seeds, second=True))
        claims.append(Claim(name, texts["paper"], texts["claim"], texts["source"], tuple(tests)))
    return claims


def _test(name: str, entries: dict) -> ClaimTest:
    if entries.keys() != set(ClaimTest._fields) or entries["direction"] not in DIRECTIONS:
        raise ValueError(f"claim {name}: a test needs {', '.join(ClaimTest._fields)}: {entries}")
    test = ClaimTest(**entries | {"value": float(entries["value"]), "seeds": tuple(entries["seeds"])})
    for cell in test.cells:
        preset_of(cell)
    return test


def preset_of(cell: str) -> dict:
    """The section of a cell's preset. ValueError: it does not exist."""
    paper, _, name = cell.partition("/")
    sections = presets_of(ROOT / paper / "presets.toml") if paper in PAPERS else {}
    if name not in sections:
        raise ValueError(f"{cell} is no paper/preset of a presets.toml")
    return sections[name]


def chosen(
    claims: Sequence[Claim], names: Sequence[str] | None, only: str | None, *, second: bool = False
) -> list[Claim]:
    """The named claims, all by default. only: keep the tests on digits ("embedded") or on other data ("real").

    second: keep the same tests with other seeds. UserError: no claim has this name.
    """
    known = [claim.name for claim in claims]
    if unknown := [name for name in names or () if name not in known]:
        raise UserError(f"no claim {unknown[0]}: choose from {', '.join(known)}")
    kinds = (True, False) if only is None else (only == "embedded",)
    kept = [claim for claim in claims if not names or claim.name in names]
    tests = [tuple(t for t in c.tests if t.embedded in kinds and t.second <= second) for c in kept]
    kept = [claim._replace(tests=own) for claim, own in zip(kept, tests, strict=True)]
    return [claim for claim in kept if claim.tests]


# the verdicts ---------------------------------------------------------------------------------------------------------


def outcomes(claims: Iterable[Claim], rows: pd.DataFrame) -> dict[str, list[Outcome]]:
    """The outcome of every test with its seeds, by claim. A cell's rows are found by the --preset of their command."""
    preset = rows["command"].str.extract(r"--preset[ =](\S+)", expand=False)
    numbers = {"value": rows["value"].astype(float), "seed": rows["seed"].astype(int)}
    rows = rows.assign(cell=rows["paper"] + "/" + preset, **numbers)
    rows = rows[preset.notna()].drop_duplicates(["cell", "metric", "seed"], keep="last")
    groups = rows.groupby(["cell", "metric"], sort=False)
    values = {key: dict(zip(own["seed"], own["value"], strict=True)) for key, own in groups}
    return {claim.name: [outcome(test, values) for test in claim.tests] for claim in claims}


def outcome(test: ClaimTest, values: Mapping[tuple[str, str], Mapping[int, float]]) -> Outcome:
    """One test. values: by (cell, metric), then by seed."""
    found = [values.get((cell, test.metric), {}) for cell in (test.cell, test.than)]
    own, than = ([test.scale * one[seed] for seed in test.seeds if seed in one] for one in found)
    if not own or (test.than and not than):
        return Outcome(test, own, than, math.nan, math.nan, math.nan, NOT_RUN)
    bound = test.scale * test.value
    # a value does not vary: Welch's interval is then Student's, of one sample
    reference, sample = summarise(than) if test.than else Sample(2, 0.0, 0.0), summarise(own)
    low, high = (end - bound for end in welch_interval(reference, sample))
    difference = sample.mean - reference.mean - bound
    return Outcome(test, own, than, difference, low, high, verdict(low, high, test.direction))


def verdict(low: float, high: float, direction: str) -> str:
    """The verdict that an interval around the difference to the bound gives; NaN if there is none.

    A claim that something differs cannot be contradicted: an interval around 0 does not show that nothing differs.
    """
    above, below = low > 0, high < 0
    if direction == "differs":
        return HOLDS if above or below else UNDECIDED
    right, wrong = (above, below) if direction == "above" else (below, above)
    return HOLDS if right else CONTRADICTED if wrong else UNDECIDED


# as text --------------------------------------------------------------------------------------------------------------

HEADING = ("claim", "data", "metric", "compared with", "method", "difference", "95 % interval", "verdict")
DIRECTION_TEXT = {"above": "above", "below": "below", "differs": "different from"}


def lines(claim: Claim, found: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A claim as lines of a table with the columns of HEADING; the sentence is in the first line alone."""
    return [("" if i else claim.sentence, *_line(one)) for i, one in enumerate(found)]


def _line(found: Outcome) -> tuple[str, ...]:
    test = found.test
    bound = test.scale * test.value
    if test.than is None:
        compared = f"{DIRECTION_TEXT[test.direction]} {bound:g}"
    else:
        compared = sample_text(found.than) + (f" {bound:+g}" if bound else "")
    difference = "" if math.isnan(found.difference) else f"{found.difference:+.2f}"
    interval = "" if math.isnan(found.low) else f"[{found.low:+.2f}, {found.high:+.2f}]"
    return (test.data, test.metric, compared, sample_text(found.values), difference, interval, found.verdict)


def sample_text(values: Sequence[float]) -> str:
    """Mean ± standard deviation, and the number of seeds; "" without values."""
    return f"{figure(values)} ({len(values)})" if values else ""


def whole_table(claims: Sequence[Claim], found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Every test as Markdown, paper by paper."""
    text = []
    for paper in dict.fromkeys(claim.paper for claim in claims):
        own = [claim for claim in claims if claim.paper == paper]
        text += [f"### {'All methods' if paper == ALL else f'[{paper}](../{paper}/README.md)'}", ""]
        text += markdown_table(HEADING, [line for claim in own for line in lines(claim, found[claim.name])])
        text += ["", *(f"- {claim.sentence} Source: {claim.source}." for claim in own), ""]
    return text


def plain_table(claims: Sequence[Claim], found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Every test as text for a terminal: each claim, below it its tests in columns that all claims share."""
    rows = [HEADING[1:], *(_line(one) for claim in claims for one in found[claim.name])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    heading, rest, text = padded[0], iter(padded[1:]), []
    for claim in claims:
        text += ["", claim.sentence, *(f"  {next(rest)}".rstrip() for _ in found[claim.name])]
    return [f"  {heading}".rstrip(), *text]


def short_table(claims: Sequence[Claim], found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """A line of Markdown for each claim: its verdicts on digits and on other data, counted."""
    rows = []
    for claim in claims:
        kinds = [[one for one in found[claim.name] if one.test.embedded is kind] for kind in (True, False)]
        rows.append([claim.paper, claim.sentence, *map(counted, kinds)])
    return markdown_table(["paper", "claim", "digits", "other data"], rows)


def counted(found: Iterable[Outcome]) -> str:
    """The verdicts of several tests in words, with their numbers if there are several tests."""
    verdicts = [one.verdict for one in found]
    words = [word for word in VERDICTS if word in verdicts]
    if len(verdicts) <= 1:
        return "".join(words)
    return ", ".join(f"{word} {verdicts.count(word)} of {len(verdicts)}" for word in words)
