"""The command line that all scripts share: number types, one-line errors, presets."""

import argparse
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.runs import cli
from common.runs.files import WriteError

ROOT = Path(__file__).resolve().parents[2]

PRESETS = """
["table/cell"]
lr = 0.5
name = "from the preset"
verbose = true

["table/other"]
epochs = 1
"""


def make_parser(prog: str = "script.py") -> cli.Parser:
    parser = cli.Parser(prog=prog)
    parser.add_argument("--lr", type=cli.positive, default=0.1, help="learning rate")
    parser.add_argument("--epochs", type=cli.count, default=10, help="epochs")
    parser.add_argument("--name", help="any text")
    parser.add_argument("--verbose", action="store_true", help="a switch")
    parser.add_argument("--preset", help="a section of the presets")
    return parser


@pytest.fixture
def presets(tmp_path):
    path = tmp_path / "presets.toml"
    path.write_text(PRESETS)
    return path


def refusal(capsys, function, *arguments, status: int = 2) -> str:
    """The one line on standard error that a call ends the process with, and nothing on standard output."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == status
    streams = capsys.readouterr()
    assert streams.out == "" and re.fullmatch(r"[^\n]+\n", streams.err), streams
    return streams.err[:-1]


SPELLINGS = cli.Parser(prog="script.py")
SPELLINGS.add_argument("--noise_file")
SPELLINGS.add_argument("--bn-mode", choices=["train", "frozen"])
SPELLINGS.add_argument("--drop_last", action=argparse.BooleanOptionalAction)
SPELLINGS.add_argument("rest", nargs="*")


ACCEPTED = {
    cli.fraction: {"0": 0.0, "1": 1.0, "5e-1": 0.5},
    cli.positive: {"1e-300": 1e-300, "25": 25.0},
    cli.non_negative: {"0": 0.0, "2.5": 2.5},
    cli.count: {"1": 1},
    cli.count_or_zero: {"0": 0, "7": 7},
    cli.seed: {"0": 0, "4294967295": 2**32 - 1},
}


@pytest.mark.parametrize("number", ACCEPTED, ids=lambda number: number.__name__)
def test_numbers_within_the_range_are_accepted_at_their_type(number):
    for text, value in ACCEPTED[number].items():
        accepted = number(text)
        assert accepted == value and type(accepted) is type(value)


@pytest.mark.parametrize(
    ("number", "text", "rule"),
    [
        *((cli.fraction, text, "between 0 and 1") for text in ("-0.1", "1.0001", "2")),
        *((cli.positive, text, "> 0") for text in ("0", "-0.0", "-1")),
        *((cli.non_negative, text, ">= 0") for text in ("-1e-9", "-3")),
        *((cli.count, text, "at least 1") for text in ("0",)),
        *((t, "-1", ">= 0") for t in (cli.count, cli.count_or_zero, cli.seed)),
        *((t, "1.5", "whole number") for t in (cli.count, cli.count_or_zero, cli.seed)),
        (cli.seed, "4294967296", r"below 2\^32"),
        *((t, text, "finite") for t in (cli.fraction, cli.positive, cli.non_negative) for text in ("nan", "inf")),
        *((t, text, "whole number") for t in (cli.count, cli.count_or_zero, cli.seed) for text in ("nan", "inf")),
        *((t, text, "a number") for t in (cli.fraction, cli.positive, cli.non_negative) for text in ("", "ten")),
        *((t, text, "whole number") for t in (cli.count, cli.count_or_zero, cli.seed) for text in ("", "ten")),
    ],
    ids=lambda value: getattr(value, "__name__", value) or "empty",
)  # fmt: skip
def test_other_numbers_are_refused_with_the_rule_and_the_value(number, text, rule):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be .*{rule}.*, got {text}$"):
        number(text)


@pytest.mark.parametrize(
    ("parser", "argv", "named"),
    [
        (make_parser(), ["--lr", "nan"], "argument --lr: must be a finite number, got nan"),
        (make_parser(), ["--nosuch", "3"], "--nosuch 3"),
        (make_parser(), ["--epoch", "3"], "--epoch 3"),  # no abbreviated flags
        (SPELLINGS, ["--noise-file"], "argument --noise_file: expected one argument"),
        (SPELLINGS, ["--bn_mode", "off"], "argument --bn-mode: invalid choice: 'off'"),
        (SPELLINGS, ["--no-such_flag=x_y"], "unrecognized arguments: --no-such_flag=x_y"),
    ],
)
def test_a_bad_command_line_ends_in_one_line_and_status_2(parser, argv, named, capsys):
    line = refusal(capsys, parser.parse_args, argv)
    assert line.startswith("script.py: error: ") and named in line


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--noise_file", "a-b_c"], "noise_file", "a-b_c"),
        (["--noise-file", "a-b_c"], "noise_file", "a-b_c"),
        (["--noise-file=a-b_c=d"], "noise_file", "a-b_c=d"),
        (["--bn_mode", "frozen"], "bn_mode", "frozen"),
        (["--bn_mode=frozen"], "bn_mode", "frozen"),
        (["--drop-last"], "drop_last", True),
        (["--no-drop-last"], "drop_last", False),
        (["--no_drop-last"], "drop_last", False),
        (["--", "--noise-file"], "rest", ["--noise-file"]),
    ],
)
def test_hyphens_and_underscores_of_a_flag_are_the_same(argv, name, value, monkeypatch):
    assert getattr(SPELLINGS.parse_args(argv), name) == value
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    assert getattr(SPELLINGS.parse_args(), name) == value


DEAD = "DataLoader worker (pid 7) is killed by signal: "


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (cli.UserError("x.npy is no file"), 2, "x.npy is no file"),
        (WriteError(errno.ENOSPC, "full", "a.csv"), 2, "a.csv cannot be written (full): make room"),
        (OSError(errno.EDQUOT, "quota"), 2, "the output cannot be written (quota): make room"),
        (OSError(errno.EROFS, "read-only", "a"), 2, "a cannot be written (read-only): make it writable"),
        (WriteError(errno.EIO, "I/O", "a.csv"), 2, "a.csv cannot be written (I/O): check the disk"),
        (FileNotFoundError(errno.ENOENT, "missing", "b"), 2, "b: missing"),
        (RuntimeError(f"{DEAD}Killed. "), 1, f"{DEAD}Killed: out of memory? use fewer --workers"),
        (RuntimeError(f"{DEAD}Bus error. It is possible that"), 2,
         f"{DEAD}Bus error: /dev/shm is too small, {cli.SHARED_MEMORY}"),
    ],
)  # fmt: skip
def test_an_error_of_the_user_or_the_machine_becomes_one_line(error, status, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/folder/script.py"])

    def main(argv):
        raise error

    assert refusal(capsys, cli.exit_cleanly, main, [], status=status) == f"script.py: error: {line}"


@pytest.mark.parametrize(
    "error", [OSError("no number"), RuntimeError("another"), BrokenPipeError(32, "gone")]
)
def test_an_error_of_our_own_is_none_of_the_machines(error):
    assert cli.machine_error(error) is None


def run_python(program: str, *options: str, **settings) -> subprocess.CompletedProcess:
    words = [sys.executable, *options, "-c", program]
    return subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, check=False, **settings)


def test_output_on_a_full_disk_is_a_users_error():
    program = "import sys; from common.runs import cli; cli.exit_cleanly(lambda _: print('text'), [])"
    with open("/dev/full", "w") as full:
        process = run_python(program, stdout=full)
    assert process.returncode == 2
    words = rb"the output cannot be written \(No space left on device\): make room"
    assert re.fullmatch(rb"[^\n]*%b[^\n]*\n" % words, process.stderr)


def test_what_a_script_took_is_given_back_last_first_and_once():
    ended = []

    @cli.script
    def main(argv):
        for name in "abc":
            cli.at_end(lambda kind, *_, name=name: ended.append((name, kind)))
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main([])
    assert ended == [(name, KeyboardInterrupt) for name in "cba"] * 2
    cli.at_end(lambda *_: ended.append("never"))  # no script
    assert "never" not in ended


def test_every_script_that_makes_a_run_is_one():
    scripts = [path for path in ROOT.glob("*/*.py") if re.search(r"\bRun\(\n? *args", path.read_text())]
    assert len(scripts) >= 10
    for path in scripts:
        text = path.read_text()
        assert "\ndef main(" not in text or "\n@cli.script\ndef main(" in text, path


def test_the_help_shows_the_defaults_where_there_is_one(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "learning rate (default: 0.1)" in text
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize("form", [["--preset", "table/cell"], ["--preset=table/cell"]])
def test_a_preset_sets_its_flags_true_is_a_switch_and_a_typed_flag_wins(form, presets, monkeypatch):
    args = vars(cli.parse_args(make_parser(), form, presets))
    del args["_places"]
    expected = {"lr": 0.5, "epochs": 10, "name": "from the preset", "verbose": True, "preset": "table/cell"}
    assert args == expected
    for argv in ([*form, "--lr", "0.25"], ["--lr", "0.25", *form]):
        args = cli.parse_args(make_parser(), argv, presets)
        assert (args.lr, args.name) == (0.25, "from the preset")
    monkeypatch.setattr(sys, "argv", ["script.py", *form])  # without words: the command line of the process
    assert cli.parse_args(make_parser(), None, presets).lr == 0.5


@pytest.mark.parametrize("key", ["noise_file", "noise-file"])
@pytest.mark.parametrize("typed", ["--noise_file", "--noise-file"])
def test_a_preset_and_a_typed_flag_can_have_either_spelling(key, typed, presets):
    parser = make_parser()
    parser.add_argument("--noise_file")
    presets.write_text(f'["table/cell"]\n{key} = "preset.npy"\n')
    argv = ["--preset", "table/cell"]
    assert cli.parse_args(parser, argv, presets).noise_file == "preset.npy"
    assert cli.parse_args(parser, [*argv, typed, "typed.npy"], presets).noise_file == "typed.npy"


SCRIPTS = '[plain]\nlr = 1\n[web]\nscript = "Other.py"\nlr = 2\n'


@pytest.mark.parametrize(
    ("prog", "content", "preset", "words"),
    [
        ("script.py", PRESETS, "table/nosuch", ["table/nosuch", "table/cell", "table/other"]),
        ("script.py", "[bad]\nlr = nan", "bad", ["argument --lr: must be a finite number, got nan"]),
        ("script.py", "[bad]\nnosuch = 3", "bad", ["--nosuch 3"]),
        ("main.py", SCRIPTS, "web", ["preset web is for Other.py, not for main.py"]),
        (
            "Other.py",
            SCRIPTS,
            "plain",
            ["preset plain is for another script of this paper, not for Other.py"],
        ),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(prog, content, preset, words, presets, capsys):
    presets.write_text(content)
    line = refusal(capsys, cli.parse_args, make_parser(prog), ["--preset", preset], presets)
    assert line.startswith(f"{prog}: error: ") and all(word in line for word in words)


@pytest.mark.parametrize(("prog", "preset", "lr"), [("main.py", "plain", 1), ("Other.py", "web", 2)])
def test_a_preset_of_this_script_or_without_a_script_is_taken(prog, preset, lr, presets):
    presets.write_text(SCRIPTS)
    assert cli.parse_args(make_parser(prog), ["--preset", preset], presets).lr == lr


@pytest.mark.parametrize(
    ("options", "before", "status", "said"),
    [
        (["-OO"], "", 0, b"the authors' flags"),
        ([], "import sys; sys.platform = 'win32'", 2, b"error: Windows is not supported: use Linux"),
        ([], "", 0, b"a \\xb1 b"),
    ],
    ids=["without docstrings", "Windows", "a terminal of ASCII"],
)
def test_other_interpreters_systems_and_terminals(options, before, status, said):
    program = f"""{before}
from common.runs import cli
parser = cli.Parser(prog="x", description=__doc__)
parser.add_argument("--a", help="the authors' flags")
def main(_):
    print("a \\xb1 b")
    parser.parse_args(["--help"])
cli.exit_cleanly(main)"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run_python(program, *options, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
