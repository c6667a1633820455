"""Detects rows that contain forbidden texts, such as benchmarks, by common runs of 8 words. Only hashes stay in
memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from fulltune.data.groups import draw, rehash
from fulltune.data.readers.files import data_files, is_data, reading
from fulltune.data.readers.read import DataFiles, PlacedRow
from fulltune.data.readers.text_files import has_blank_lines
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import normalised
from fulltune.text import counted

NUM_WORDS = 8
MAX_TEXTS = 100
"""A run of words that more texts have comes from a template and is ignored."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_hash_word = lru_cache(maxsize=50_000)(partial(draw, 0))
_NOT_COMPARED = ("label", "tags", "tools", "context")
"""Prefixes of roles that are not compared: labels, and passages that many questions share."""
_ANSWERS = ("completion", "target", "answers", "choice", "messages")
"""Prefixes of roles whose short cells (`yes`) are often equal by chance."""


@dataclass(frozen=True)
class ForbiddenTexts:
    """Hashes of texts that must not be trained on."""

    source: str
    """Number and origin of the texts, for messages."""
    whole: frozenset[int]
    num_runs: np.ndarray
    """Number of different runs of 8 words in each text: int32 [texts]."""
    runs: np.ndarray
    """Sorted hashes of all texts' runs, without those of more than `MAX_TEXTS` texts: uint64 [runs]."""
    text_of: np.ndarray
    """Index of each run's text: int32 [runs]."""

    def occur_in(self, text: str, is_input: bool) -> bool:
        """Return whether `text` equals a forbidden text or shares half of the word runs of the shorter text.

        Short texts are compared in inputs only, because short answers are often equal.
        """
        words = text.split()
        if ((is_input and words) or len(words) >= NUM_WORDS) and draw(0, text) in self.whole:
            return True
        runs = _hash_word_runs(words)
        starts, ends = (np.searchsorted(self.runs, runs, side) for side in ("left", "right"))
        hits = [self.text_of[start:end] for start, end in zip(starts, ends, strict=True) if start < end]
        if not hits:
            return False
        texts, shared = np.unique(np.concatenate(hits), return_counts=True)
        return bool((2 * shared >= np.minimum(self.num_runs[texts], len(runs))).any())


def _hash_word_runs(words: list[str]) -> np.ndarray:
    count = len(words) - NUM_WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    numbers = np.fromiter(map(_hash_word, words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for place in range(NUM_WORDS):
        hashes = hashes * _BASE + numbers[place : place + count]
    return np.unique(rehash(hashes))


# ---- the texts here --------------------------------------------------------------------------------------------


def forbidden_files(recipe: Recipe) -> tuple[Path, ...]:
    """Return the files of forbidden texts. Raises `DataError` if the setting matches no file."""
    return tuple(
        file for setting, path in recipe.texts_not_trained_on.items() for file in _files_with_texts(setting, path)
    )


def _files_with_texts(setting: str, path: str) -> Sequence[Path]:
    try:
        with reading(Path(path)):
            if not Path(path).is_dir():
                return data_files(Path(path))
            files = sorted(
                file
                for file in Path(path).rglob("*")
                if is_data(file)
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            )
    except DataError as error:
        raise DataError([f"{setting}: {problem}" for problem in error.problems]) from None
    if not files:
        raise DataError(
            f"{setting}: {path}: no text file or table in this folder; expected txt, csv, jsonl or similar: "
            "name another folder, or a file"
        )
    return files


def read_texts(names: Mapping[str, str], files: Iterable[Path]) -> ForbiddenTexts:
    """Hash the texts of all files. Raises `DataError` for broken files, or if there is no text."""
    whole: set[int] = set()
    runs, num_runs, problems = [np.empty(0, np.uint64)], list[int](), list[str]()
    for file in files:
        kind = file.suffix.lower()
        rows = DataFiles((file,), str(file), "paragraph" if kind == ".txt" and has_blank_lines(file) else "line")
        for _, row in rows.rows(problems):
            for text in filter(None, map(normalised, cell_texts(row))):
                if (number := draw(0, text)) not in whole:
                    whole.add(number)
                    runs.append(_hash_word_runs(text.split()))
                    num_runs.append(len(runs[-1]))
    if problems:
        raise DataError([f"{' and '.join(names)}: {problem}" for problem in problems])
    if not whole:
        raise DataError(f"{' and '.join(names)}: no text was found; name a file or a folder with texts")
    sources = [f"{os.path.basename(path)} ({setting})" for setting, path in names.items()]  # noqa: PTH119  # as written
    hashes = np.concatenate(runs)
    order = np.argsort(hashes, kind="stable")
    _, which, counts = np.unique(hashes[order], return_inverse=True, return_counts=True)
    order = order[counts[which] <= MAX_TEXTS]
    return ForbiddenTexts(
        source=f"{counted(len(whole), 'text')} of {' and '.join(sources)}",
        whole=frozenset(whole),
        num_runs=np.array(num_runs, np.int32),
        runs=hashes[order],
        text_of=np.repeat(np.arange(len(num_runs), dtype=np.int32), num_runs)[order],
    )


def cell_texts(cell: object) -> Iterator[str]:
    """Yield all texts in a cell, also nested ones. A list of single words is one text."""
    parts = cell.values() if isinstance(cell, Mapping) else cell if isinstance(cell, (list, tuple)) else ()
    if isinstance(cell, str):
        yield cell
    elif not isinstance(cell, Mapping) and len(parts) > 1 and all(map(_is_word, parts)):
        yield " ".join(parts)
    else:
        for part in parts:
            yield from cell_texts(part)


def _is_word(part: object) -> bool:
    return isinstance(part, str) and len(part.split()) == 1


# ---- the rows --------------------------------------------------------------------------------------------------


def rows_with_forbidden(
    forbidden: ForbiddenTexts | None, keys: Sequence[str], rows: Sequence[PlacedRow], target: Target
) -> np.ndarray:
    """Mark rows that contain a forbidden text: bool [rows], empty if no texts are forbidden. `keys` are the rows' group
    keys."""
    if forbidden is None:
        return np.zeros(0, bool)
    columns = {role: column for role, column in target.columns.items() if not role.startswith(_NOT_COMPARED)}

    def contains_forbidden(key: str, row: Row) -> bool:
        return ("context" not in target.columns and forbidden.occur_in(key, is_input=True)) or any(
            forbidden.occur_in(text, is_input=not role.startswith(_ANSWERS))
            for role, column in columns.items()
            for text in dict.fromkeys(map(normalised, cell_texts(row.get(column))))
            if text != key
        )

    return np.array([contains_forbidden(key, row) for key, (_, row) in zip(keys, rows, strict=True)], bool)
