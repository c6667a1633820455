"""Run the real command line inside this process: the entry point with its mapping of errors to exit codes."""

from __future__ import annotations

import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from unittest import mock

from fulltune.cli import app as cli


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """The lines on stderr that are no progress."""
        progress = ("run folder", "continuing", "reading the data", "planning")
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith(progress)]


def fulltune(*arguments: object, stdin: str = "") -> Result:
    """Call `fulltune ARGUMENTS`; an exception that reaches the interpreter becomes a traceback and code 1."""
    out, err = StringIO(), StringIO()
    code: object = 0
    argv = ["fulltune", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "stdin", StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = 1
            traceback.print_exc()
    return Result(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
