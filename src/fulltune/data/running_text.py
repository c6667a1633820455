"""Where running text stands in a row, and which checks it gets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from fulltune.audit.texts import OF_ANSWERS, OF_TEXTS, missing
from fulltune.tasks import Row
from fulltune.tasks.columns import as_text

_READ = ("text", "text_pair", "prompt", "input", "source", "question", "context", "messages", "tokens")
_WRITTEN = ("completion", "target", "messages")
"""Roles of columns with running text: what a model reads, and what it learns to write. Of a conversation the latter are
the assistant's turns."""
Part = Literal["read", "written"]
_ROLES: dict[Part, tuple[str, ...]] = {"read": _READ, "written": _WRITTEN}
_CHECKS: dict[Part, tuple[str, ...]] = {"read": OF_TEXTS, "written": OF_ANSWERS}
CHEAP: tuple[str, ...] = (
    "broken encoding",
    "control characters",
    "markup",
    "placeholder",
    "chat tokens",
    "refusal",
)
"""Made on each row of each run: together they take 15 % of the tokenising of short texts, and a third of it with
`refusal`, which answers alone get."""
LOOKED_AT = 100_000
"""Characters of a text in each run: a check takes several times their memory."""
PARTS: tuple[Part, ...] = ("read", "written")


def checks_of(columns: Mapping[str, str], wanted: Collection[str] | None = None) -> dict[Part, list[str]]:
    """The checks (all, or those wanted) that can be made on what is read, and on what is written, if there is any."""
    absent = missing()
    found = {
        part: [one for one in of if one not in absent and (wanted is None or one in wanted)]
        for part, of in _CHECKS.items()
        if set(_ROLES[part]) & set(columns)
    }
    return {part: of for part, of in found.items() if of}


def cells(row: Row, columns: Mapping[str, str], part: Part) -> Iterator[tuple[str, str]]:
    """Columns with running text, and what stands in them; of a conversation some turns, of a sentence its words."""
    for role in _ROLES[part]:
        cell, column = row.get(columns.get(role, "")), columns.get(role)
        if column is None:
            continue
        if isinstance(cell, str):
            yield column, cell
        elif isinstance(cell, list):
            turns = cell if role != "messages" else [one for one in cell if _is_answer(one) == (part == "written")]
            if turns:
                yield column, " ".join(map(_said, turns))


def columns_with_text(columns: Mapping[str, str]) -> list[str]:
    """Those in which running text may stand."""
    found = (columns.get(role) for part in PARTS for role in _ROLES[part])
    return list(dict.fromkeys(column for column in found if column is not None))


def whole_texts(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """Column to all its running text."""
    found: dict[str, str] = {}
    for part in PARTS:
        for column, text in cells(row, columns, part):
            found[column] = f"{found[column]} {text}" if column in found and found[column] != text else text
    return found


def _is_answer(turn: Any) -> bool:
    """Whether a turn of a conversation is the model's; of any of the usual forms."""
    return isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("assistant", "gpt", "model", "bot")


def _said(one: object) -> str:
    """A word, or what a turn says, also in ShareGPT's form."""
    if not isinstance(one, dict):
        return as_text(one)
    return as_text(one.get("value") if one.get("content") is None else one["content"])
