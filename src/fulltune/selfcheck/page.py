"""What a self-check found, as a record and as a page in Markdown that can be given to others."""

from __future__ import annotations

import getpass
import re
import socket
from pathlib import Path
from typing import Literal

from fulltune.records.base import Record

Status = Literal["pass", "fail", "not here"]


class CheckResult(Record):
    """One check on one device."""

    device: str
    check: str
    """What is checked, in a word or two: `precision`, `attention` ..."""
    ran: str
    """What was run."""
    status: Status
    result: str
    """What came out; for `not here` the reason."""
    seconds: float


class Page(Record):
    """Everything that was found. Holds no host name, user name or path."""

    date: str
    environment: dict[str, str]
    findings: tuple[CheckResult, ...]
    seconds: float

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        return tuple(finding for finding in self.findings if finding.status == "fail")

    @property
    def verdict(self) -> str:
        """One line: the counts, and how long it took."""
        counts = {status: sum(finding.status == status for finding in self.findings) for status in _ORDER}
        words = ", ".join(f"{count} {_ORDER[status]}" for status, count in counts.items())
        return f"{words}; {self.seconds:.0f} seconds"


_ORDER: dict[Status, str] = {"pass": "passed", "fail": "failed", "not here": "not here"}
_HEAD = ("| check | what was run | status | result | seconds |", "|---|---|---|---|---:|")


def markdown(page: Page) -> str:
    """The page for an issue, a chat or a file."""
    lines = ["# fulltune selfcheck", "", f"{page.date}: {page.verdict}.", "", "| here | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in page.environment.items()]
    for device in dict.fromkeys(finding.device for finding in page.findings):
        lines += ["", f"## {device}", "", *_HEAD]
        lines += [
            f"| {finding.check} | {_cell(finding.ran)} | {finding.status.replace('fail', '**FAIL**')} | "
            f"{_cell(finding.result)} | {finding.seconds:.1f} |"
            for finding in page.findings
            if finding.device == device
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_PATH = re.compile(r"(?<![\w/])~?(?:/[\w.+@~-]+)+/?")


def without_names(text: str, most: int = 300) -> str:
    """An error's text for a page that others read: no paths but their last part, no host name, no user name."""
    text = " ".join(text.split()).replace(str(Path.home()), "~")
    text = _PATH.sub(lambda found: found.group().rstrip("/").rpartition("/")[2], text)
    for name, instead in ((socket.gethostname(), "HOST"), (_user(), "USER")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text if len(text) <= most else text[: most - 2] + " …"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in some containers
        return ""
