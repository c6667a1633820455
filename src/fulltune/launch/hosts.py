"""The hosts file of `--ssh`: one machine a line, `[user@]host[:port]`; the first one is machine 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fulltune.errors import SetupError
from fulltune.text import counted

_LINE = re.compile(
    r"""
    (?:(?P<user>[A-Za-z_][\w.-]*\$?)@)?
    (?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\] | (?P<host>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?))
    (?::(?P<port>\d+))?
    """,
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Host:
    """A machine to log in to."""

    name: str
    user: str | None = None
    port: int | None = None

    @property
    def address(self) -> str:
        """As it stands before a port."""
        return f"[{self.name}]" if ":" in self.name else self.name


def read_hosts(file: Path, num_machines: int) -> list[Host]:
    """The machines of a hosts file.

    Args:
        file: One machine a line; what follows `#` and empty lines are left out.
        num_machines: How many there have to be.

    Raises:
        SetupError: Naming each bad line with its number, or that there are too many or too few.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text in UTF-8" if isinstance(error, ValueError) else str(error.strerror).lower()
        raise SetupError(f"--ssh: {file} cannot be read ({reason}); expected a file with one host a line") from None
    hosts: list[Host] = []
    seen: dict[tuple[str, int | None], int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = _host_of(text)
        if host is None:
            problems.append(f"{file}:{number}  '{text}': expected [user@]host[:port], with an IPv6 address in brackets")
            continue
        if (place := (host.name.lower(), host.port)) in seen:
            problems.append(f"{file}:{number}  '{text}': stands in line {seen[place]} already; remove one")
        seen.setdefault(place, number)
        hosts.append(host)
    if not problems and len(hosts) != num_machines:
        problems.append(
            f"{file}: has {counted(len(hosts), 'host')}, but train.num_machines is {num_machines}; give as many lines "
            f"as machines, or --set train.num_machines={max(1, len(hosts))} with a train.num_processes that they share"
        )
    if problems:
        raise SetupError(problems)
    return hosts


def _host_of(text: str) -> Host | None:
    found = _LINE.fullmatch(text)
    if found is None or (found["port"] and not 1 <= int(found["port"]) <= 65535):
        return None
    if found["six"] and found["six"].count(":") < 2:
        return None
    return Host(found["six"] or found["host"], found["user"], int(found["port"]) if found["port"] else None)
