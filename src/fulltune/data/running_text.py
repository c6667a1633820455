"""Where running text stands in a row, and which checks it gets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from fulltune.audit import OF_ANSWERS, OF_TEXTS, Flaw, TextCheck, flaws
from fulltune.tasks import Row
from fulltune.tasks.columns import as_text

READ = ("text", "text_pair", "prompt", "source", "question", "context", "messages", "tokens")
WRITTEN = ("completion", "target")
"""Roles of columns with running text: what a model reads, and what it learns to write."""
_CHECKS: dict[tuple[str, ...], tuple[TextCheck, ...]] = {READ: OF_TEXTS, WRITTEN: OF_ANSWERS}
CHEAP: tuple[TextCheck, ...] = (
    "broken encoding",
    "control characters",
    "markup",
    "placeholder",
    "chat tokens",
    "refusal",
)
"""Made on each row of each run: together they take a tenth of the tokenising, or less."""


def checks_of(
    columns: Mapping[str, str], wanted: Collection[str] | None = None
) -> dict[tuple[str, ...], list[TextCheck]]:
    """Roles to the checks that are made on their texts, where there are any.

    Args:
        columns: Role to column.
        wanted: Only these; None: all.
    """
    found = {
        roles: [one for one in of if wanted is None or one in wanted]
        for roles, of in _CHECKS.items()
        if set(roles) & set(columns)
    }
    return {roles: of for roles, of in found.items() if of}


def cells(row: Row, columns: Mapping[str, str], roles: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Columns with running text, and what stands in them; of a conversation all turns, of a sentence its words."""
    for column in filter(None, map(columns.get, roles)):
        cell = row.get(column)
        if isinstance(cell, str):
            yield column, cell
        elif isinstance(cell, list):
            yield column, " ".join(map(_said, cell))


def _said(one: object) -> str:
    """A word, or what a turn says, also in ShareGPT's form."""
    if not isinstance(one, dict):
        return as_text(one)
    return as_text(one.get("value") if one.get("content") is None else one["content"])


def flawed(
    row: Row, columns: Mapping[str, str], checks: Mapping[tuple[str, ...], Sequence[TextCheck]]
) -> Iterator[tuple[str, Flaw]]:
    """What is wrong with a row's texts, and in which column."""
    for roles, of in checks.items():
        for column, text in cells(row, columns, roles):
            yield from ((column, flaw) for flaw in flaws(text, of))
