"""What is wrong with a text, and how places in it are named, masked and replaced."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fulltune.text import first_few

PATTERNS: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("checks.toml").read_text(encoding="utf-8"))
"""What checks look for, as data."""
ABOUT: Mapping[str, str] = PATTERNS["about"]
"""Each check, and what it finds; the one whose rows cost most comes first."""


@cache
def is_installed(package: str) -> bool:
    """Whether a package that a check needs is installed: asked before each text."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class Flaw:
    """What one check found in a text."""

    check: str
    reason: str
    """For a reader; of secrets and personal data only the beginning is quoted."""
    fixed: str | None = None
    """The text as it would be after this repair or redaction alone; None: there is none."""


def compiled(pattern: str) -> re.Pattern[str]:
    """An expression of `PATTERNS`, with what its words stand for."""
    for word, meaning in PATTERNS["words"].items():
        pattern = pattern.replace(f"<{word}>", meaning)
    return re.compile(pattern)


RE = {name: compiled(pattern) for name, pattern in PATTERNS["expressions"].items()}


def redacted(check: str, text: str, hits: Iterable[tuple[int, int, str, str]]) -> Flaw | None:
    """A flaw that names each place and masks it, and whose repair puts a word in its stead; None without places.

    Args:
        hits: Where each place begins and ends, what it is (`e-mail address`), and what is put there (`[EMAIL]`).
    """
    pieces, named, place = list[str](), list[str](), 0
    for start, end, what, instead in sorted(hits, key=lambda hit: (hit[0], -hit[1])):
        # A token in a password's place is found twice.
        if start >= place:
            pieces += [text[place:start], instead]
            named.append(f"{what} {masked(text[start:end])} at character {start + 1:,}")
            place = end
    return Flaw(check, first_few(named), "".join(pieces) + text[place:]) if named else None


def masked(value: str) -> str:
    """The beginning of what must not be quoted: four characters, or of short ones fewer: `'AKIA…'`, `'jo…'`."""
    return f"'{value[: min(4, len(value) // 6)]}…'"


def quoted(text: str, most_characters: int = 40) -> str:
    """A piece of a text on one line, in quotes, cut where it is long."""
    line = " ".join(text.split())
    return f"'{line[: most_characters - 1]}…'" if len(line) > most_characters else f"'{line}'"
