"""Measure the suite: change the code in small ways, and count how many of the changes the tests notice.

    python tests/mutants.py --count 300 --jobs 2 --csv mutants.csv

A mutant is one changed operator, comparison or constant in `common` or in a paper's directory. The seed draws them. A mutant is
killed if the tests of its module fail or take over three times as long. Every worker changes its own copy of the checkout.
"""

import argparse
import ast
import csv
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CODE = ["common", "afm", "sfa", "me_momentum", "manifold_dividemix", "sanm"]
SWAPS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
    "//": "*",
}
SWAPS |= {
    "%": "*",
    "**": "*",
    "@": "*",
    "&": "|",
    "|": "&",
    "and": "or",
    "or": "and",
    "is": "is not",
    "is not": "is",
}
SWAPS |= {"in": "not in", "not in": "in"}
OPERATOR = re.compile(r"\b(?:is\s+not|not\s+in|is|in|and|or)\b|<=|>=|==|!=|//|\*\*|[<>+\-*/%@&|]")


class Mutant(NamedTuple):
    """A change: the bytes from `start` to `end` of a file become `new`."""

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str


def mutants(path: str, source: bytes) -> Iterator[Mutant]:
    """Every change of a file that this script knows."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.BinOp):
            pairs = [(node.left, node.right)]
        elif isinstance(node, ast.BoolOp):
            pairs = zip(node.values, node.values[1:], strict=False)
        elif isinstance(node, ast.Compare):
            pairs = zip([node.left, *node.comparators], node.comparators, strict=False)
        for left, right in pairs:
            begin = starts[left.end_lineno - 1] + left.end_col_offset
            gap = source[begin : starts[right.lineno - 1] + right.col_offset].decode()
            match = OPERATOR.search(gap)
            if match and (old := " ".join(match[0].split())) in SWAPS:
                first = begin + len(gap[: match.start()].encode())
                yield Mutant(path, left.end_lineno, first, first + len(match[0]), old, SWAPS[old])
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            value = node.value
            new = str(
                not value
                if isinstance(value, bool)
                else value + 1
                if isinstance(value, int)
                else value * 2 + 0.5
            )
            yield Mutant(path, node.lineno, begin, end, source[begin:end].decode(), new)


def tests_of(path: str) -> list[str]:
    """The test files of a module's folder, and of all scripts, that import it, its own file first; else all of the folder."""
    package, stem = path.removesuffix(".py").rpartition("/")[::2]
    dotted, folder = package.replace("/", "."), package.partition("/")[0]
    imports = re.compile(
        rf"import {re.escape(dotted)}\.{stem}\b|from {re.escape(dotted)}\.{stem} import|"
        rf"from {re.escape(dotted)} import (\([^)]*\b{stem}\b|.*\b{stem}\b)"
    )
    found = [
        file
        for file in sorted(
            [*(ROOT / "tests" / folder).glob("test_*.py"), *(ROOT / "tests").glob("test_*.py")]
        )
        if imports.search(file.read_text("utf-8"))
    ]
    found.sort(key=lambda file: file.stem != f"test_{stem}")
    return [str(file.relative_to(ROOT)) for file in found] or [f"tests/{folder}"]


def run_tests(clone: Path, tests: list[str], limit: float) -> bool:
    """Whether tests pass within a limit in seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limit) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write a row per mutant")
    args = parser.parse_args()

    files = sorted(str(file.relative_to(ROOT)) for folder in CODE for file in (ROOT / folder).rglob("*.py"))
    every = [mutant for file in files for mutant in mutants(file, (ROOT / file).read_bytes())]
    drawn = random.Random(args.seed).sample(every, min(args.count, len(every)))
    with tempfile.TemporaryDirectory() as folder:
        clones: Queue[Path] = Queue()
        for job in range(args.jobs):
            clone = Path(folder) / str(job)
            shutil.copytree(
                ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "results", "data", "__pycache__")
            )
            clones.put(clone)
        durations: dict[tuple[str, ...], float] = {}

        def try_one(mutant: Mutant) -> dict:
            clone, tests = clones.get(), tests_of(mutant.path)
            try:
                if tuple(tests) not in durations:
                    begin = time.monotonic()
                    if not run_tests(clone, tests, 3600):
                        raise SystemExit(f"{' '.join(tests)}: fail without any change")
                    durations[tuple(tests)] = time.monotonic() - begin
                source = (ROOT / mutant.path).read_bytes()
                (clone / mutant.path).write_bytes(
                    source[: mutant.start] + mutant.new.encode() + source[mutant.end :]
                )
                survived = run_tests(clone, tests, 3 * durations[tuple(tests)] + 30)
                (clone / mutant.path).write_bytes(source)
            finally:
                clones.put(clone)
            return {
                "file": mutant.path,
                "line": mutant.line,
                "old": mutant.old,
                "new": mutant.new,
                "killed": int(not survived),
            }

        rows = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(try_one, drawn):
                rows.append(row)
                if not row["killed"]:
                    print(f"survived: {row['file']}:{row['line']}: {row['old']} -> {row['new']}", flush=True)
    killed = sum(row["killed"] for row in rows)
    print(
        f"{killed} of {len(rows)} killed ({100 * killed / len(rows):.1f} %), of {len(every)} possible mutants, seed {args.seed}"
    )
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
