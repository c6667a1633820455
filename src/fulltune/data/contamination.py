"""Texts that must not be trained on, such as benchmarks, and which rows hold one (`data.contamination`).

Runs of 8 words are what is compared, like the n-grams by which training data of language models is checked. In memory
are hashes alone: of each run of the texts here, with its text and place. The rows pass by in the workers.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.data.groups import draw, mixed_numbers
from fulltune.data.readers.files import data_files, is_data, reading
from fulltune.data.readers.plain_text import has_blank_lines
from fulltune.data.readers.read import DataFiles
from fulltune.errors import DataError
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import normalised
from fulltune.text import counted

NUM_WORDS = 8
MOST_TEXTS = 100
"""A run that stands in more of the texts is a template's, such as a benchmark's instruction, and says nothing."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_NOT_COMPARED = ("label", "tags", "tools", "context")
"""Roles of columns that hold no text of the row's own; many questions are asked about a passage."""
_ANSWERS = ("completion", "target", "answers", "choice", "messages")
"""How the roles begin whose short cells are equal by chance: `yes`."""


@dataclass(frozen=True)
class KnownTexts:
    """Texts that must not be trained on, as numbers."""

    source: str
    """Where they come from, in words."""
    whole: np.ndarray
    """`draw` of each text, sorted: uint64 [texts]."""
    sizes: np.ndarray
    """Words of each: int32 [texts]."""
    runs: np.ndarray
    """Hash of each run of 8 words, sorted: uint64 [runs]."""
    text_of: np.ndarray
    """The text of each run: int32 [runs]."""
    place_of: np.ndarray
    """Its first word's place there: int32 [runs]."""

    def hold(self, text: str, is_asked: bool) -> bool:
        """Whether a normalised text of a row (if it is no answer, also a short one) is one of these, or shares much."""
        words = text.split()
        if (is_asked and words) or len(words) >= NUM_WORDS:
            place = np.searchsorted(self.whole, number := np.uint64(draw(0, text)))
            if place < len(self.whole) and self.whole[place] == number:
                return True
        return self._shares(_runs(words), len(words))

    def _shares(self, runs: np.ndarray, num_words: int) -> bool:
        starts, ends = (np.searchsorted(self.runs, runs, side) for side in ("left", "right"))
        shared = np.flatnonzero((ends > starts) & (ends - starts <= MOST_TEXTS))
        if not len(shared):
            return False
        hits = np.concatenate([np.arange(starts[place], ends[place]) for place in shared])
        order = np.argsort(self.text_of[hits], kind="stable")
        hits, places = hits[order], np.repeat(shared, ends[shared] - starts[shared])[order]
        texts, first = np.unique(self.text_of[hits], return_index=True)
        for text, start, end in zip(texts, first, [*first[1:], len(hits)], strict=True):
            size = int(self.sizes[text])
            # Counted in the shorter text: what the longer one says twice stands there once.
            covered = _covered(places[start:end] if num_words <= size else self.place_of[hits[start:end]])
            if 2 * covered >= min(num_words, size):
                return True
        return False


def _covered(places: np.ndarray) -> int:
    """Words of a text in its runs that begin at these places."""
    places = np.unique(places)
    return int(np.minimum(np.diff(places), NUM_WORDS).sum()) + NUM_WORDS


@lru_cache(maxsize=50_000)
def _word(word: str) -> int:
    return draw(0, word)


def _runs(words: list[str]) -> np.ndarray:
    """A hash of each run of 8 words: uint64 [words - 7]."""
    count = len(words) - NUM_WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    numbers = np.fromiter(map(_word, words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for place in range(NUM_WORDS):
        hashes = hashes * _BASE + numbers[place : place + count]
    return mixed_numbers(hashes)


# ---- the texts here --------------------------------------------------------------------------------------------


def files_of(path: str) -> tuple[Path, ...]:
    """The files behind `data.contamination`: in a folder all tables and texts; raises a `DataError` when none is."""
    try:
        with reading(Path(path)):
            if not Path(path).is_dir():
                return tuple(data_files(Path(path)))
            found = sorted(
                file
                for file in Path(path).rglob("*")
                if is_data(file)
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            )
    except DataError as error:
        raise DataError([f"data.contamination: {problem}" for problem in error.problems]) from None
    if not found:
        raise DataError(
            f"data.contamination: {path}: no file with texts in this folder; expected txt, csv, jsonl or other tables: "
            "name another folder, or a file"
        )
    return tuple(found)


def read_texts(path: str, files: Iterable[Path]) -> KnownTexts:
    """Read the texts, file by file; raises a `DataError` for each broken file, or when they hold no text."""
    known: dict[int, int] = {}
    sizes, runs, text_of, place_of = (
        array("i"),
        [np.empty(0, np.uint64)],
        [np.empty(0, np.int32)],
        [np.empty(0, np.int32)],
    )
    problems: list[str] = []
    files = tuple(files)
    for file in files:
        kind = file.suffix.lower()
        rows = DataFiles((file,), str(file), "paragraph" if kind == ".txt" and has_blank_lines(file) else "line")
        for _, row in rows.rows(problems):
            for text in filter(None, map(normalised, cell_texts(row))):
                if (number := draw(0, text)) in known:
                    continue
                words = text.split()
                mine = _runs(words)
                runs.append(mine)
                text_of.append(np.full(len(mine), len(known), np.int32))
                place_of.append(np.arange(len(mine), dtype=np.int32))
                sizes.append(len(words))
                known[number] = len(known)
    if problems:
        raise DataError([f"data.contamination: {problem}" for problem in problems])
    if not known:
        raise DataError(f"data.contamination: {path}: holds no text; name a file or a folder with texts")
    hashes = np.concatenate(runs)
    order = np.argsort(hashes, kind="stable")
    return KnownTexts(
        source=f"{counted(len(known), 'text')} of {os.path.basename(path)}",  # noqa: PTH119  # as it is written
        whole=np.sort(np.fromiter(known, np.uint64, len(known))),
        sizes=np.asarray(sizes),
        runs=hashes[order],
        text_of=np.concatenate(text_of)[order],
        place_of=np.concatenate(place_of)[order],
    )


def cell_texts(cell: Any) -> Iterator[str]:
    """All texts in a cell, those in its lists and objects too; a list of single words is one text."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping):
        for inner in cell.values():
            yield from cell_texts(inner)
    elif isinstance(cell, (list, tuple)):
        if len(cell) > 1 and all(isinstance(inner, str) and len(inner.split()) == 1 for inner in cell):
            yield " ".join(cell)
            return
        for inner in cell:
            yield from cell_texts(inner)


# ---- the rows --------------------------------------------------------------------------------------------------


def holds_one(known: KnownTexts, key: str, row: Row, target: Target) -> bool:
    """Whether a row holds one of the texts; its group key is what it asks, as a whole."""
    if "context" not in target.columns and known.hold(key, is_asked=True):
        return True
    return any(
        known.hold(text, is_asked=not role.startswith(_ANSWERS))
        for role, column in target.columns.items()
        if not role.startswith(_NOT_COMPARED)
        for text in dict.fromkeys(map(normalised, cell_texts(row.get(column))))
        if text != key
    )
