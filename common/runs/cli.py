"""The command line all scripts share: one-line errors, number types, the flags of our own, presets.

A preset is a named section of a paper's `presets.toml`, a set of flags. `--preset NAME` reads as if those
flags stood first on the command line, so every value is checked like a typed one and whatever the user types
after it wins.
"""

import argparse
import errno
import functools
import math
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from common.runs.files import REMEDIES, WriteError, cannot_write

SHARED_MEMORY = "give a container more with --shm-size, or use --workers 0"


class UserError(Exception):
    """A mistake the user can mend. Its text is the one line to print: it names the value and the remedy."""

    status = 2  # of the process


class MachineError(UserError):
    """What the machine refused. A run that was under way adds from where it resumes."""


class WorkerDied(MachineError):
    """A worker process ended before its work."""

    status = 1


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show: not for switches, nor where the help text explains None."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False  # 0 is one
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, no abbreviated flags, and every default shown in the help.

    A flag can be typed with hyphens or underscores: --noise-file is read as --noise_file, --bn_mode as --bn-mode.
    """

    def __init__(self, **options):
        options.setdefault("formatter_class", _Help)
        # the first line of a module's docstring; python -OO leaves none
        options["description"] = (options.get("description") or "").partition("\n")[0] or None
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]  # argparse declares overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse, each flag in its own spelling; words after a bare -- are no flags."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        found, rest = super().parse_known_args(
            [*map(self._own_spelling, words[:end]), *words[end:]], namespace
        )
        found._places = tuple(sorted({action.dest for action in self._actions if action.type is place}))
        return found, rest

    def _own_spelling(self, word: str) -> str:
        """The word, its flag in the spelling that this parser knows; unknown flags and values stay as typed."""
        flag, equals, value = word.partition("=")
        known = self._option_string_actions
        if flag in known or not flag.startswith("--"):
            return word
        own = {option.replace("_", "-"): option for option in known}.get(flag.replace("_", "-"), flag)
        return own + equals + value

    def error(self, message: str):
        """Print one line on standard error and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


# what the script that is running gives back at its end
_ends: ContextVar[ExitStack | None] = ContextVar("_ends", default=None)


def script(main: Callable) -> Callable:
    """Decorate a script's main(argv): however it ends, what `at_end` was told is given back, so that it can be called again.

    Errors of the operating system and dead workers become a MachineError.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> Any:
        with ExitStack() as stack:
            token = _ends.set(stack)
            try:
                result = main(argv)
                sys.stdout.flush()
                return result
            except (OSError, RuntimeError) as error:
                told = machine_error(error)
                if told is None:
                    raise
                raise told from error
            finally:
                _ends.reset(token)

    return run


def at_end(end: Callable[..., Any]) -> None:
    """Have end(error type, error, traceback) called when the running script ends, last told first; not without a script."""

    def leave(*error: Any) -> None:  # whatever `end` returns, the error goes on
        end(*error)

    stack = _ends.get()
    if stack is not None:
        stack.push(leave)


def machine_error(error: OSError | RuntimeError) -> MachineError | None:
    """The error as the line to print; None if it does not come from the operating system or from a dead worker."""
    if isinstance(error, RuntimeError):
        # torch raises this at any moment of the main thread
        return worker_died(str(error)) if str(error).startswith("DataLoader worker") else None
    if error.errno is None or isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, WriteError) or error.errno in (*REMEDIES, errno.EROFS):
        refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        path = error.filename or "the output"
        return MachineError(cannot_write(path, error, "make it writable" if refused else "check the disk"))
    path = f"{error.filename}: " if error.filename else ""
    return MachineError(f"{path}{error.strerror}")


def worker_died(reason: str) -> MachineError:
    """A worker's end as the line to print. reason: torch's message."""
    first = reason.splitlines()[0].partition(". ")[0].strip(" .")
    if "Bus error" in first:
        return MachineError(f"{first}: /dev/shm is too small, {SHARED_MEMORY}")
    return WorkerDied(f"{first}: out of memory? use fewer --workers")


def exit_cleanly(main: Callable, argv: Sequence[str] | None = None) -> None:
    """Call main(argv); a UserError becomes its one line on standard error and its exit status, 2 for most.

    So do errors of the operating system. Ctrl-C exits 130, and a reader of the output that is gone (as with `| head`) 141,
    both in silence. Characters that a terminal cannot show are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        script(main)(argv)
    except UserError as error:
        _discard_output()
        path = Path(sys.argv[0])
        name = path.parent.name if path.name == "__main__.py" else path.name
        with suppress(OSError):
            sys.stderr.write(f"{name}: error: {error}\n")  # at once: lines of several processes stay whole
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()
        sys.exit(141)


def _discard_output() -> None:
    """Keep the interpreter's last flush from failing on an output that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def positive(text: str) -> float:
    """argparse type: a finite number > 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def non_negative(text: str) -> float:
    """argparse type: a finite number >= 0."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {text}")
    return value


def place(text: str) -> str:
    """The type of a flag that names a place, not a setting: a resumed run compares what is there, never the path."""
    return text


def count(text: str) -> int:
    """argparse type: a whole number >= 1."""
    value = count_or_zero(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def count_or_zero(text: str) -> int:
    """argparse type: a whole number >= 0."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {text}")
    return value


def seed(text: str) -> int:
    """argparse type: a whole number that every generator takes, 0 to 2^32 - 1."""
    value = count_or_zero(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2^32, got {text}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def add_shared_flags(parser: Parser, default_seed: int) -> None:
    """The flags of our own, the same in every script."""
    group = parser.add_argument_group("shared by all scripts")
    group.add_argument(
        "--out",
        metavar="DIR",
        type=place,
        help="run directory; by default results/runs/PAPER/ and the arguments",
    )
    group.add_argument(
        "--seed", type=seed, default=default_seed, help="seeds label noise, initialisation, everything"
    )
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bfloat16 autocast on CUDA, float32 on CPU and under --fidelity released",
    )
    group.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    group.add_argument(
        "--fidelity",
        choices=["paper", "released"],
        default="paper",
        help="where the paper and the authors' code differ, follow this one",
    )
    group.add_argument(
        "--preset", metavar="NAME", help="a section of presets.toml as the defaults; typed flags win"
    )
    group.add_argument(
        "--noise_file",
        metavar="FILE",
        type=place,
        help="observed labels to use instead of drawn noise (.npy, .npz, .json or .csv, one integer per sample)",
    )
    group.add_argument(
        "-r",
        "--resume",
        choices=["auto", "never"],
        default="auto",
        help="auto: go on from the run directory's checkpoint; never: refuse a directory that holds a run",
    )
    group.add_argument(
        "--limit_train", type=count, metavar="N", help="train on a seeded subset, to try things out"
    )
    group.add_argument(
        "--limit_test",
        type=count,
        metavar="N",
        help="test each epoch on a seeded subset, stratified by class, to save time",
    )
    group.add_argument(
        "--full_test_at_end",
        action="store_true",
        help="with --limit_test: test on all test images after the last epoch too; the result names it full_test",
    )


def add_image_file_flags(group, workers: int, how: str = "") -> None:
    """The flags of a script whose images come from files, to an argument group. how: behind the command that makes a cache."""
    group.add_argument(
        "--on_bad_image",
        choices=["error", "skip"],
        default="error",
        help="images that are missing or damaged: stop, or leave them out from the start",
    )
    group.add_argument(
        "--image_cache",
        metavar="DIR",
        type=place,
        help=f"read images from a cache made by python -m common.datasets cache{how}",
    )
    group.add_argument(
        "--workers",
        type=count_or_zero,
        default=workers,
        help="processes that decode images, for each of the passes",
    )


def read_presets(path: Path) -> dict[str, dict]:
    """The named sections of a presets.toml: {name: {flag: value}}."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def preset_arguments(section: dict) -> list[str]:
    """A preset's section as command-line words; true stands for a switch, false for its absence, a list for several words.

    `script` and `encoder`, the preset whose run makes the encoder to begin from, are no flags.
    """
    words = []
    for flag, value in section.items():
        if value is not False and flag not in ("script", "encoder"):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def parse_args(parser: Parser, argv: Sequence[str] | None, presets: Path) -> argparse.Namespace:
    """Parse argv with the flags of --preset, if one is named, put before it.

    Where a paper has several scripts, `script` in a section names the one it is for; those without are for the first.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = Parser(add_help=False, prog=parser.prog)
    finder.add_argument("--preset")
    name = finder.parse_known_args(argv)[0].preset
    if name is None:
        return _checked(parser, parser.parse_args(argv))
    sections = read_presets(presets)
    if name not in sections:
        parser.error(f"unknown preset {name}: choose from {', '.join(sections)}")
    scripts = {section.get("script") for section in sections.values()}
    script = sections[name].get("script")
    if script != (parser.prog if parser.prog in scripts else None):
        parser.error(
            f"preset {name} is for {script or 'another script of this paper'}, not for {parser.prog}"
        )
    return _checked(parser, parser.parse_args(preset_arguments(sections[name]) + argv))


def _checked(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, once the shared flags fit together."""
    if getattr(args, "full_test_at_end", False) and args.limit_test is None:
        parser.error(
            "argument --full_test_at_end: without --limit_test every test is a full one; leave it out"
        )
    return args
