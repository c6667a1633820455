"""Run the real command line inside this process: the entry point with its mapping of errors to exit codes."""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from unittest import mock

from fulltune.cli import app as cli
from fulltune.system import signals

FACTS = re.compile(
    r"""
    '[^']*'                                                      # what stands in the user's file or is to be written
    | (?<!\w)--[a-z][a-z-]*                                      # an option
    | (?<![\w./])(?:model|method|data|train|evaluate|compare|search)\.[a-z_]+(?![\w.]*:\d)   # a setting
    | [\w./{}<>-]*[\w}>](?:\.\w+)?:\d+(?::\d+)?                  # a place: file and line
    | (?<!\w)/[\w./-]+                                           # a path
    | (?<![\w.])-?\d[\d,]*(?:\.\d+)?                             # a number
    """,
    re.VERBOSE,
)


def facts(message: str) -> list[str]:
    """What a message must say whatever its words are: places, numbers, settings, options, names in quotes."""
    return sorted(FACTS.findall(message))


def assert_same_facts(said: Sequence[str], expected: Sequence[str]) -> None:
    """Each problem names the facts of the expected one; where that has none, its words count."""
    assert len(said) == len(expected), said
    for problem, words in zip(said, expected, strict=True):
        missing = Counter(facts(words)) - Counter(facts(problem))
        assert not missing, f"{problem!r} does not name {list(missing)}"
        assert facts(words) or problem == words


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """The lines on stderr that are no progress."""
        progress = ("run folder", "resuming", "reading the data", "planning")
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith(progress)]


def fulltune(*arguments: object, stdin: str = "") -> Result:
    """Call `fulltune ARGUMENTS`; an exception that reaches the interpreter becomes a traceback and code 1."""
    out, err = StringIO(), StringIO()
    code: object = 0
    argv = ["fulltune", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in signals.STOPPING}
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
        finally:  # a command takes signals as the one of its process
            signals.restore_handlers(handlers)
    return Result(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
