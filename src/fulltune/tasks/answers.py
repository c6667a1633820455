"""Cells with the answers to a question: where each of them stands in the context."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fulltune.tasks.columns import literal

Answer = tuple[str, int]
"""A text and its first character in the context."""


class NotInContext(ValueError):
    """An answer that does not stand where it should; its message says which."""


def accepted(cell: Any, context: str) -> list[Answer]:
    """The accepted answers to a question; none when it cannot be answered from the context.

    The cell is as in SQuAD, `{"text": [...], "answer_start": [...]}` or a list of such objects; or it holds texts, each
    taken at its first place in the context. Raises `NotInContext` when an answer does not stand where it should.
    """
    given = list(_parts(_parsed(cell)))
    found = []
    for text, start in given:
        if start is None:
            place = _first_place(text, context)
            if place is not None:
                found.append((text, place))
        elif context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if start >= 0 else ""
            raise NotInContext(f"at character {start} of the context stands {there!r}, not the answer {text!r}")
        else:
            found.append((text, start))
    if given and not found:
        raise NotInContext(f"the answer {given[0][0]!r} does not stand in the context")
    return found


def _parsed(cell: Any) -> Any:
    """A csv cell can hold a list or an object as JSON, or as Python writes it."""
    if not isinstance(cell, str) or cell.strip()[:1] + cell.strip()[-1:] not in ("[]", "{}"):
        return cell.tolist() if hasattr(cell, "tolist") else cell
    parsed = literal(cell)
    return cell if parsed is None else parsed


def _parts(cell: Any) -> Iterator[tuple[str, int | None]]:
    """Texts that are not empty, each with its start where one is given."""
    match cell:
        case None:
            return
        case {"text": texts, **more}:
            texts, starts = _listed(texts), _listed(more.get("answer_start"))
            if starts and len(starts) != len(texts):
                raise NotInContext(f"{len(texts)} answers have {len(starts)} values of answer_start")
            for text, start in zip(texts, starts or [None] * len(texts), strict=True):
                if str(text).strip():
                    yield str(text), None if start is None else _place(start)
        case dict():
            if cell:
                raise NotInContext(f"an object with 'text' and 'answer_start' was expected, found {sorted(cell)}")
        case list() | tuple():
            for part in cell:
                yield from _parts(part)
        case float() if cell != cell:  # pandas' empty cell
            return
        case _:
            if str(cell).strip():
                yield str(cell).strip(), None


def _place(start: Any) -> int:
    """A character's place; pandas writes whole numbers as floats where some are missing."""
    try:
        return int(start)
    except (ValueError, TypeError, OverflowError):
        raise NotInContext(f"answer_start is {start!r}, expected the number of a character") from None


def _listed(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _first_place(text: str, context: str) -> int | None:
    """Whole words first: `he` is not the beginning of `hello`."""
    whole = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context)
    place = whole.start() if whole else context.find(text)
    return place if place >= 0 else None
