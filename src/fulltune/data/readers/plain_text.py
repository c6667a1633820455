"""Rows of a plain text file: lines, paragraphs, or sections of several paragraphs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from fulltune.recipe.data import UTF_8, TextRows

SECTION_CHARACTERS = 4_000
"""About a thousand tokens: long enough to be read as a whole, short enough that a book can be split."""
_LINES_LOOKED_AT = 10_000


def rows(file: Path, text_rows: TextRows, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of the line where a text begins and `{"text": ...}`.

    `auto` takes sections where blank lines separate paragraphs (a book, a play), else every line is a row.
    """
    if text_rows == "auto":
        text_rows = "section" if has_blank_lines(file, encoding) else "line"
    with file.open(encoding=encoding) as stream:
        lines = ((number, line.rstrip("\n") if line.strip() else "") for number, line in enumerate(stream, start=1))
        for number, text in lines if text_rows == "line" else _paragraphs(lines, text_rows):
            if text:
                yield number, {"text": text}


def has_blank_lines(file: Path, encoding: str = UTF_8) -> bool:
    """Whether blank lines stand between texts."""
    with file.open(encoding=encoding) as stream:
        marks = "".join("x" if line.strip() else " " for line in islice(stream, _LINES_LOOKED_AT))
    return " " in marks.strip()


def _paragraphs(lines: Iterator[tuple[int, str]], text_rows: TextRows) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, or sections of several, with the line each begins on."""
    start, size, held = 1, 0, list[str]()
    for number, paragraph in _runs(lines):
        if held and (text_rows == "paragraph" or size + len(paragraph) > SECTION_CHARACTERS):
            yield start, "\n\n".join(held)
            size, held = 0, []
        start = start if held else number
        held.append(paragraph)
        size += len(paragraph)
    yield start, "\n\n".join(held)


def _runs(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for has_text, run in groupby(lines, key=lambda line: bool(line[1])):
        if has_text:
            numbered = list(run)
            yield numbered[0][0], "\n".join(text for _, text in numbered)
