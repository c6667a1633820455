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
ABOUT: Mapping[str, str] = PATTERNS["about"]


@cache
def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class Flaw:
    """A problem that a check found in a text."""

    check: str
    reason: str
    fixed: str | None = None
    """The text after the check's repair, if any."""


def to_regex(pattern: str) -> re.Pattern[str]:
    """Compile a pattern after replacing each `<name>` with the pattern of that name in `PATTERNS`."""
    for word, meaning in PATTERNS["words"].items():
        pattern = pattern.replace(f"<{word}>", meaning)
    return re.compile(pattern)


RE = {name: to_regex(pattern) for name, pattern in PATTERNS["expressions"].items()}


def redact_hits(check: str, text: str, hits: Iterable[tuple[int, int, str, str]]) -> Flaw | None:
    """Mask all hits (start, end, kind, replacement) in a text, and return one flaw that lists them, or None."""
    pieces, named, place = list[str](), list[str](), 0
    for start, end, what, instead in sorted(hits, key=lambda hit: (hit[0], -hit[1])):
        # A token used as a password matches twice.
        if start >= place:
            pieces += [text[place:start], instead]
            named.append(f"{what} {mask_secret(text[start:end])} at character {start + 1:,}")
            place = end
    return Flaw(check, first_few(named), "".join(pieces) + text[place:]) if named else None


def mask_secret(value: str) -> str:
    """Return at most the first four characters of a secret: `'AKIA…'`, `'jo…'`."""
    return f"'{value[: min(4, len(value) // 6)]}…'"


def quote_start(text: str, max_characters: int = 40) -> str:
    """Quote the beginning of a text on one line."""
    line = " ".join(text.split())
    return f"'{line[: max_characters - 1]}…'" if len(line) > max_characters else f"'{line}'"
