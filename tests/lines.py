"""What a mistake ends in: one line."""

import re
from collections.abc import Callable

import pytest

from common.runs import cli
from common.runs.cli import UserError


def message(function: Callable, *arguments, **options) -> str:
    """The one line of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def refused(capsys, main: Callable, *words) -> str:
    """The one line that a script ends in, with status 2; warnings before it do not count."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_cleanly(main, list(map(str, words)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines(keepends=True)
    [line] = [line for line in lines if not line.startswith("warning")]
    assert re.fullmatch(r"[^\n]*error: [^\n]*\n", line), line
    return line
