"""Read CoNLL files: a word and its tag on each line, a blank line after each sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulltune.data.readers.text_tables import first_few
from fulltune.errors import DataError

_SPACES = re.compile(r"[ \t]+")  # not \s: a no-break space can be a word


def rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sentences of a file.

    The first column is the word, the last one the tag; those between are left out. Columns are separated by tabs when
    the first line holds a tab, else by spaces. A blank line or a line `-DOCSTART-` ends a sentence.

    Args:
        file: A UTF-8 file.

    Yields:
        The number of the sentence's first line, and `{"tokens": [...], "tags": [...]}`.

    Raises:
        DataError: After the last line, naming the lines whose number of columns differs from the first one's.
        UnicodeDecodeError: When the file is not UTF-8.
    """
    problems: list[str] = []
    sentence: dict[str, Any] = {"tokens": [], "tags": []}
    separator, expected, first = _SPACES, 0, 0
    with file.open(encoding="utf-8-sig") as stream:
        for line, text in enumerate(stream, start=1):
            content = text.rstrip("\r\n")
            if not content.strip(" \t") or content.startswith("-DOCSTART-"):
                if sentence["tokens"]:
                    yield first, sentence
                    sentence = {"tokens": [], "tags": []}
                continue
            if not expected:
                separator = re.compile("\t") if "\t" in content else _SPACES
                expected = len(_columns(content, separator))
            columns = _columns(content, separator)
            problem = _problem(columns, expected)
            if problem:
                problems.append(f"{file}:{line}: {problem}")
                continue
            if not sentence["tokens"]:
                first = line
            sentence["tokens"].append(columns[0])
            sentence["tags"].append(columns[-1])
    if sentence["tokens"]:
        yield first, sentence
    if problems:
        raise DataError(first_few(problems, file))


def _columns(content: str, separator: re.Pattern[str]) -> list[str]:
    # Spaces at the ends separate nothing; a tab at an end has an empty cell beside it.
    return separator.split(content.strip(" ") if separator is _SPACES else content)


def _problem(columns: list[str], expected: int) -> str | None:
    """What is wrong with a line."""
    if len(columns) != expected:
        found = f"{len(columns)} column{'s' * (len(columns) != 1)}, expected {expected} as in the first line"
        if columns[0].startswith("#"):
            return f"{found}; remove lines with comments"
        return f"{found}; write a word and its tag on each line, all separated by tabs or all by spaces"
    if len(columns) < 2:
        return "1 column, expected a word and its tag; write both on each line"
    if not columns[-1].strip():
        return f"the word '{columns[0]}' has no tag, expected one; write O where there is no entity"
    return None
