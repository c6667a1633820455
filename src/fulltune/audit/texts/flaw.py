"""What is wrong with a text, and how places in it are named, masked and replaced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

TextCheck = Literal[
    "broken encoding",
    "control characters",
    "empty",
    "no words",
    "markup",
    "placeholder",
    "chat tokens",
    "repetition",
    "secret",
    "personal data",
    "phone number",
    "refusal",
]

_MOST_NAMED = 3


@dataclass(frozen=True)
class Flaw:
    """What one check found in a text."""

    check: TextCheck
    reason: str
    """For a reader; of secrets and personal data only the beginning is quoted."""
    fixed: str | None = None
    """The text as it would be after this repair or redaction alone; None: there is none."""


@dataclass(frozen=True)
class Hit:
    """A place in a text that must not be quoted whole."""

    start: int
    end: int
    what: str
    """`e-mail address`."""
    instead: str
    """What a redaction puts there: `[EMAIL]`."""


def redacted(check: TextCheck, text: str, hits: Iterable[Hit]) -> Flaw | None:
    """A flaw that names each place and masks it, and whose repair puts a word in its stead; None without places."""
    kept: list[Hit] = []
    for hit in sorted(hits, key=lambda hit: (hit.start, -hit.end)):
        # A token in a password's place is found twice.
        if not kept or hit.start >= kept[-1].end:
            kept.append(hit)
    if not kept:
        return None
    pieces, place = list[str](), 0
    for hit in kept:
        pieces += [text[place : hit.start], hit.instead]
        place = hit.end
    named = [f"{hit.what} {masked(text[hit.start : hit.end])} at character {hit.start + 1:,}" for hit in kept]
    return Flaw(check, listed(named), "".join(pieces) + text[place:])


def masked(value: str) -> str:
    """The beginning of what must not be quoted: four characters, or of short ones fewer: `'AKIA…'`, `'jo…'`."""
    return f"'{value[: min(4, len(value) // 6)]}…'"


def listed(names: list[str]) -> str:
    """The first three, and how many more there are."""
    shown, more = ", ".join(names[:_MOST_NAMED]), len(names) - _MOST_NAMED
    return f"{shown} and {more:,} more" if more > 0 else shown


def quoted(text: str, most_characters: int = 40) -> str:
    """A piece of a text on one line, in quotes, cut where it is long."""
    line = " ".join(text.split())
    return f"'{line[: most_characters - 1]}…'" if len(line) > most_characters else f"'{line}'"
