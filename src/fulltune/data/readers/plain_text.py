"""Rows of a plain text file: lines, paragraphs, or sections of several paragraphs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fulltune.recipe.fields import TextRows

SECTION_CHARACTERS = 4_000
"""About a thousand tokens: long enough to be read as a whole, short enough that a book can be split."""
_LINES_LOOKED_AT = 10_000


def rows(file: Path, text_rows: TextRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of the line where a text begins and `{"text": ...}`.

    `auto` takes sections where blank lines separate paragraphs (a book, a play), else every line is a row.
    """
    if text_rows == "auto":
        text_rows = "section" if _has_blank_lines(file) else "line"
    with file.open(encoding="utf-8-sig") as stream:
        if text_rows == "line":
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, {"text": line.rstrip("\n")}
            return
        held: list[str] = []
        start, size = 1, 0
        for number, paragraph in _paragraphs(stream):
            if held and (text_rows == "paragraph" or size + len(paragraph) > SECTION_CHARACTERS):
                yield start, {"text": "\n\n".join(held)}
                held, size = [], 0
            if not held:
                start = number
            held.append(paragraph)
            size += len(paragraph)
        if held:
            yield start, {"text": "\n\n".join(held)}


def _has_blank_lines(file: Path) -> bool:
    """Whether blank lines stand between texts."""
    with file.open(encoding="utf-8-sig") as stream:
        marks = "".join("x" if line.strip() else " " for line in islice(stream, _LINES_LOOKED_AT))
    return " " in marks.strip()


def _paragraphs(stream: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, with the line each begins on."""
    start, lines = 1, list[str]()
    for number, line in enumerate(stream, start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line.rstrip("\n"))
        elif lines:
            yield start, "\n".join(lines)
            lines = []
    if lines:
        yield start, "\n".join(lines)
