"""The command line of all scripts: one-line errors, number types, the shared flags, presets.

A preset is a named section of a paper's `presets.toml`, a set of flags. `--preset NAME` puts these flags first on the command
line. So every value is checked like a typed one, and a flag that the user types wins.
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

DEVICES = ("auto", "cpu", "cuda", "mps")  # of --device
SHARED_MEMORY = "give a container more with --shm-size, or use --workers 0"


class UserError(Exception):
    """A mistake that the user can correct. Its text is the line to print, with the value and the remedy."""

    status = 2  # exit status of the process


class MachineError(UserError):
    """An error of the machine. A started run adds where it resumes."""


class WorkerDied(MachineError):
    """A worker process ended before its work."""

    status = 1


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except False and None."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False  # 0 is a default
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
        """As argparse, with hyphens and underscores of flags normalised; words after a bare -- are no flags."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        args_read, rest = super().parse_known_args(
            [*map(self._own_spelling, words[:end]), *words[end:]], namespace
        )
        args_read._places = tuple(sorted({action.dest for action in self._actions if action.type is place}))
        return args_read, rest

    def _own_spelling(self, word: str) -> str:
        """The word with its flag in this parser's spelling; unknown flags and values stay as typed."""
        flag, equals, value = word.partition("=")
        flags = self._option_string_actions
        if flag in flags or not flag.startswith("--"):
            return word
        own = {option.replace("_", "-"): option for option in flags}.get(flag.replace("_", "-"), flag)
        return own + equals + value

    def error(self, message: str):
        """Print one line on standard error and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


# callbacks of `at_end` for the running script
_ends: ContextVar[ExitStack | None] = ContextVar("_ends", default=None)


def script(main: Callable) -> Callable:
    """Decorate a script's main(argv): the callbacks of `at_end` run however it ends, so that it can be called again.

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
                line = machine_error(error)
                if line is None:
                    raise
                raise line from error
            finally:
                _ends.reset(token)

    return run


def at_end(end: Callable[..., Any]) -> None:
    """Call end(error type, error, traceback) when the running script ends, in reverse order; does nothing without a script."""

    def leave(*error: Any) -> None:  # the error propagates, whatever `end` returns
        end(*error)

    stack = _ends.get()
    if stack is not None:
        stack.push(leave)


def machine_error(error: OSError | RuntimeError) -> MachineError | None:
    """The error with the line to print; None unless it comes from the operating system or from a dead worker."""
    if isinstance(error, RuntimeError):
        # torch raises this anywhere in the main thread
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
    """The error of a dead worker, with the line to print. reason: torch's message."""
    first = reason.splitlines()[0].partition(". ")[0].strip(" .")
    if "Bus error" in first:
        return MachineError(f"{first}: /dev/shm is too small, {SHARED_MEMORY}")
    return WorkerDied(f"{first}: out of memory? use fewer --workers")


def add_cuda_graphs_flag(group: Any, batches: str) -> None:
    """Add --cuda_graphs. batches: which of them are recorded."""
    group.add_argument(
        "--cuda_graphs",
        action="store_true",
        default=None,  # so that runs from before there was the flag are resumed
        help=f"on CUDA, replay recorded passes of {batches}, which saves launching each kernel; the first 20 steps are checked "
        "against eager ones; not with --compile",
    )


def show_help(module: str, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Print the help and exit if the command line asks a script for it: before the imports that take seconds.

    module: __name__ of the script; nothing happens if it is imported.
    """
    words = sys.argv[1:]
    asked = {"-h", "--help"} & set(words[: words.index("--")] if "--" in words else words)
    if module == "__main__" and asked:
        exit_cleanly(lambda argv: make_parser().parse_args(argv))


def exit_cleanly(main: Callable, argv: Sequence[str] | None = None) -> None:
    """Call main(argv); a UserError becomes one line on standard error and its exit status, mostly 2.

    So do errors of the operating system. Ctrl-C exits with 130, a closed output pipe (as with `| head`) with 141, both without
    a message. Characters that a terminal cannot show are escaped.
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
            sys.stderr.write(
                f"{name}: error: {error}\n"
            )  # one write, so that lines of several processes do not mix
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()
        sys.exit(141)


def _discard_output() -> None:
    """Prevent an error of the interpreter's last flush if the output cannot be written."""
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
    """argparse type: a path. A resumed run compares the content, never the path."""
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
    """Add the flags that all scripts share."""
    group = parser.add_argument_group("shared by all scripts")
    group.add_argument(
        "--out",
        metavar="DIR",
        type=place,
        help="run directory; by default results/runs/PAPER/ and the arguments",
    )
    group.add_argument(
        "--seed", type=seed, default=default_seed, help="seed of label noise, initialisation and training"
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where to train; auto: CUDA if there is a GPU, else the CPU. mps has never been run on an Apple machine: cpu is the "
        "reference",
    )
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
        help="observed labels to use instead of drawn noise (.npy, .npz, .json or .csv, one integer per sample), or the "
        "decisions.csv of benchmarks.gallery, which corrects labels and removes images",
    )
    group.add_argument(
        "-r",
        "--resume",
        choices=["auto", "never", "anyway"],
        default="auto",
        help="auto: resume from the run directory's checkpoint; never: refuse a directory that holds a run; anyway: resume on "
        "another kind of device too, with fresh random generators",
    )
    group.add_argument("--limit_train", type=count, metavar="N", help="train on a seeded subset of N images")
    group.add_argument(
        "--limit_test",
        type=count,
        metavar="N",
        help="test each epoch on a seeded subset of N images, stratified by class",
    )
    group.add_argument(
        "--full_test_at_end",
        action="store_true",
        help="with --limit_test: test on all test images after the last epoch too; the result names it full_test",
    )


def add_image_file_flags(group, workers: int, how: str = "") -> None:
    """Add the flags of scripts with image files to an argument group. how: end of the command that makes a cache."""
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
        help="processes that decode images, for each pass",
    )
    add_decode_flag(group)


def add_decode_flag(group: Any) -> None:
    """Add --decode of scripts with image files to an argument group."""
    group.add_argument(
        "--decode",
        choices=["cpu", "gpu"],
        default="cpu",
        help="where image files are decoded and cropped; gpu: JPEG files by nvJPEG, whose pixels differ a little; it has never "
        "been run on a card",
    )


def read_presets(path: Path) -> dict[str, dict]:
    """The named sections of a presets.toml: {name: {flag: value}}."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def preset_arguments(section: dict) -> list[str]:
    """A preset's section as command-line words: true is a switch, false its absence, a list several words.

    `script` and `encoder` (the preset of the pre-training run) are no flags.
    """
    words = []
    for flag, value in section.items():
        if value is not False and flag not in ("script", "encoder"):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def parse_args(
    parser: Parser, argv: Sequence[str] | None, presets: Path, of_folder: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Parse argv, with the flags of --preset before it.

    `script` in a section names its script; a section without it belongs to the paper's first script. of_folder: the defaults
    that differ for --dataset folder, by name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = Parser(add_help=False, prog=parser.prog)
    finder.add_argument("--preset")
    name = finder.parse_known_args(argv)[0].preset
    if name is None:
        return _checked(parser, argv, of_folder)
    sections = read_presets(presets)
    if name not in sections:
        parser.error(f"unknown preset {name}: choose from {', '.join(sections)}")
    scripts = {section.get("script") for section in sections.values()}
    script = sections[name].get("script")
    if script != (parser.prog if parser.prog in scripts else None):
        parser.error(
            f"preset {name} is for {script or 'another script of this paper'}, not for {parser.prog}"
        )
    return _checked(parser, preset_arguments(sections[name]) + argv, of_folder)


def _checked(parser: Parser, words: list[str], of_folder: dict[str, Any] | None) -> argparse.Namespace:
    """The arguments, with the shared flags checked against each other."""
    args = parser.parse_args(words)
    if of_folder and args.dataset == "folder":
        parser.set_defaults(**of_folder)
        args = parser.parse_args(words)
    if getattr(args, "full_test_at_end", False) and args.limit_test is None:
        parser.error(
            "argument --full_test_at_end: without --limit_test every test is a full one; leave it out"
        )
    return args
