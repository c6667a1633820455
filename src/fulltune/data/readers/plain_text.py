"""Rows of text files that are no tables: plain text as lines, paragraphs or sections, and CoNLL with a word a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from fulltune.recipe.data import UTF_8, TextRows
from fulltune.text import counted

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


_SPACES = re.compile(r"[ \t]+")  # not \s: a no-break space can be a word


def sentences(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Sentences of a file.

    The first column is the word, the last one the tag; those between are not read. Columns are separated by tabs when
    the first line holds a tab, else by spaces. A blank line or a line `-DOCSTART-` ends a sentence. In place of a
    broken line stands what is wrong with it.
    """
    sentence: dict[str, Any] = {"tokens": [], "tags": []}
    separator, expected, first = _SPACES, 0, 0
    with file.open(encoding=encoding) as stream:
        for line, text in enumerate(stream, start=1):
            content = text.rstrip("\r\n")
            if not content.strip(" \t") or content.startswith("-DOCSTART-"):
                if sentence["tokens"]:
                    yield first, sentence
                    sentence = {"tokens": [], "tags": []}
                continue
            if not expected and "\t" in content:
                separator = re.compile("\t")
            # Spaces at the ends separate nothing; a tab at an end has an empty cell beside it.
            columns = separator.split(content.strip(" ") if separator is _SPACES else content)
            expected = expected or len(columns)
            if problem := _problem(columns, expected):
                yield line, problem
                continue
            if not sentence["tokens"]:
                first = line
            sentence["tokens"].append(columns[0])
            sentence["tags"].append(columns[-1])
    if sentence["tokens"]:
        yield first, sentence


def _problem(columns: list[str], expected: int) -> str | None:
    """What is wrong with a line."""
    if len(columns) != expected:
        return (
            f"{counted(len(columns), 'column')}, expected {expected} as in the first line; write a word and its tag on "
            "each line, all separated by tabs or all by spaces, and no comments"
        )
    if len(columns) < 2:
        return "1 column, expected a word and its tag; write both on each line"
    if not columns[-1].strip():
        return f"the word '{columns[0]}' has no tag, expected one; write O where there is no entity"
    return None
