"""Read CoNLL files: a word and its tag on each line, a blank line after each sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulltune.recipe.data import UTF_8
from fulltune.text import counted

_SPACES = re.compile(r"[ \t]+")  # not \s: a no-break space can be a word


def rows(file: Path, encoding: str = UTF_8) -> Iterator[tuple[int, dict[str, Any] | str]]:
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
        found = f"{counted(len(columns), 'column')}, expected {expected} as in the first line"
        if columns[0].startswith("#"):
            return f"{found}; remove lines with comments"
        return f"{found}; write a word and its tag on each line, all separated by tabs or all by spaces"
    if len(columns) < 2:
        return "1 column, expected a word and its tag; write both on each line"
    if not columns[-1].strip():
        return f"the word '{columns[0]}' has no tag, expected one; write O where there is no entity"
    return None
