"""Texts that must not be trained on, such as benchmarks, and which rows hold one.

Runs of 8 words are what is compared, like the n-grams by which training data of language models is checked. In memory
are hashes alone: of each run of the texts here, with its text and place. The rows pass by in the workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.data.groups import draw, mixed_numbers
from fulltune.data.readers.files import data_files, is_data, reading
from fulltune.data.readers.read import DataFiles, PlacedRow
from fulltune.data.readers.text_files import has_blank_lines
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import normalised
from fulltune.text import counted

NUM_WORDS = 8
MOST_TEXTS = 100
"""A run that stands in more of the texts is a template's, such as a benchmark's instruction, and says nothing."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_word = lru_cache(maxsize=50_000)(partial(draw, 0))
_NOT_COMPARED = ("label", "tags", "tools", "context")
"""Roles of columns that hold no text of the row's own; many questions are asked about a passage."""
_ANSWERS = ("completion", "target", "answers", "choice", "messages")
"""How the roles begin whose short cells are equal by chance: `yes`."""


@dataclass(frozen=True)
class KnownTexts:
    """Texts that must not be trained on, as numbers."""

    source: str
    """Where they come from, in words."""
    whole: frozenset[int]
    """`draw` of each text."""
    num_runs: np.ndarray
    """Different runs of 8 words of each: int32 [texts]."""
    runs: np.ndarray
    """Hash of each run of each text, without those of many texts, sorted: uint64 [runs]."""
    text_of: np.ndarray
    """The text of each run: int32 [runs]."""

    def hold(self, text: str, is_asked: bool) -> bool:
        """Whether a normalised text of a row (if it is no answer, also a short one) is one of these, or has half of the
        different runs in common with one: of the runs of the text that has fewer."""
        words = text.split()
        if ((is_asked and words) or len(words) >= NUM_WORDS) and draw(0, text) in self.whole:
            return True
        runs = _runs(words)
        starts, ends = (np.searchsorted(self.runs, runs, side) for side in ("left", "right"))
        hits = [self.text_of[start:end] for start, end in zip(starts, ends, strict=True) if start < end]
        if not hits:
            return False
        texts, shared = np.unique(np.concatenate(hits), return_counts=True)
        return bool((2 * shared >= np.minimum(self.num_runs[texts], len(runs))).any())


def _runs(words: list[str]) -> np.ndarray:
    """A hash of each different run of 8 words, sorted: uint64."""
    count = len(words) - NUM_WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    numbers = np.fromiter(map(_word, words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for place in range(NUM_WORDS):
        hashes = hashes * _BASE + numbers[place : place + count]
    return np.unique(mixed_numbers(hashes))


# ---- the texts here --------------------------------------------------------------------------------------------


def known_files(recipe: Recipe) -> tuple[Path, ...]:
    """The files with such texts: in a folder all tables and texts; raises a `DataError` when none is."""
    return tuple(file for setting, path in recipe.texts_not_trained_on.items() for file in _files(setting, path))


def _files(setting: str, path: str) -> Sequence[Path]:
    try:
        with reading(Path(path)):
            if not Path(path).is_dir():
                return data_files(Path(path))
            found = sorted(
                file
                for file in Path(path).rglob("*")
                if is_data(file)
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            )
    except DataError as error:
        raise DataError([f"{setting}: {problem}" for problem in error.problems]) from None
    if not found:
        raise DataError(
            f"{setting}: {path}: no file with texts in this folder; expected txt, csv, jsonl or other tables: "
            "name another folder, or a file"
        )
    return found


def read_texts(names: Mapping[str, str], files: Iterable[Path]) -> KnownTexts:
    """Read the texts, file by file; raises a `DataError` for each broken file, or when they hold no text."""
    known: set[int] = set()
    runs, num_runs, problems = [np.empty(0, np.uint64)], list[int](), list[str]()
    for file in files:
        kind = file.suffix.lower()
        rows = DataFiles((file,), str(file), "paragraph" if kind == ".txt" and has_blank_lines(file) else "line")
        for _, row in rows.rows(problems):
            for text in filter(None, map(normalised, cell_texts(row))):
                if (number := draw(0, text)) not in known:
                    known.add(number)
                    runs.append(_runs(text.split()))
                    num_runs.append(len(runs[-1]))
    if problems:
        raise DataError([f"{' and '.join(names)}: {problem}" for problem in problems])
    if not known:
        raise DataError(f"{' and '.join(names)}: no text in it; name a file or a folder with texts")
    written = [f"{os.path.basename(path)} ({setting})" for setting, path in names.items()]  # noqa: PTH119  # as written
    hashes = np.concatenate(runs)
    order = np.argsort(hashes, kind="stable")
    _, which, counts = np.unique(hashes[order], return_inverse=True, return_counts=True)
    order = order[counts[which] <= MOST_TEXTS]
    return KnownTexts(
        source=f"{counted(len(known), 'text')} of {' and '.join(written)}",
        whole=frozenset(known),
        num_runs=np.array(num_runs, np.int32),
        runs=hashes[order],
        text_of=np.repeat(np.arange(len(num_runs), dtype=np.int32), num_runs)[order],
    )


def cell_texts(cell: Any) -> Iterator[str]:
    """All texts in a cell, those in its lists and objects too; a list of single words is one text."""
    parts = cell.values() if isinstance(cell, Mapping) else cell if isinstance(cell, (list, tuple)) else ()
    if isinstance(cell, str):
        yield cell
    elif not isinstance(cell, Mapping) and len(parts) > 1 and all(map(_is_word, parts)):
        yield " ".join(parts)
    else:
        for part in parts:
            yield from cell_texts(part)


def _is_word(part: Any) -> bool:
    return isinstance(part, str) and len(part.split()) == 1


# ---- the rows --------------------------------------------------------------------------------------------------


def holding(known: KnownTexts | None, keys: Sequence[str], rows: Sequence[PlacedRow], target: Target) -> np.ndarray:
    """Whether each row holds one of the texts: bool [rows], without rows where there are none. A row's group key is
    what it asks, as a whole."""
    if known is None:
        return np.zeros(0, bool)
    columns = {role: column for role, column in target.columns.items() if not role.startswith(_NOT_COMPARED)}

    def holds_one(key: str, row: Row) -> bool:
        return ("context" not in target.columns and known.hold(key, is_asked=True)) or any(
            known.hold(text, is_asked=not role.startswith(_ANSWERS))
            for role, column in columns.items()
            for text in dict.fromkeys(map(normalised, cell_texts(row.get(column))))
            if text != key
        )

    return np.array([holds_one(key, row) for key, (_, row) in zip(keys, rows, strict=True)], bool)
