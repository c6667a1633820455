from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from fulltune.data.groups import hash_to_number, rehash
from fulltune.data.readers.files import convert_os_errors, has_data_suffix, list_data_files
from fulltune.data.readers.read import DataFiles, LocatedRow
from fulltune.data.readers.text_files import has_blank_lines
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import normalised
from fulltune.text import counted

NUM_WORDS = 8
MAX_TEXTS = 100
"""8-grams in more texts than this probably come from templates and are ignored."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_hash_word = lru_cache(maxsize=50_000)(partial(hash_to_number, 0))
_NOT_COMPARED = ("label", "tags", "tools", "context")
"""Prefixes of column roles that are not compared, such as labels and passages that many questions share."""
_ANSWERS = ("completion", "target", "answers", "choice", "messages")
"""Prefixes of column roles whose short cells (`yes`) are often equal by chance."""


@dataclass(frozen=True)
class ForbiddenTexts:
    """Hashes of texts, such as benchmarks, that must not be trained on."""

    source: str
    whole: frozenset[int]
    num_ngrams: np.ndarray
    """Number of distinct 8-grams in each text: int32 [texts]."""
    ngrams: np.ndarray
    """Sorted hashes of the texts' 8-grams, without frequent ones: uint64 [8-grams]."""
    text_of: np.ndarray
    """Index of the text that contains each 8-gram: int32 [8-grams]."""

    def occur_in(self, text: str, is_input: bool) -> bool:
        """Return whether `text` equals a forbidden text, or shares with one at least half of the word 8-grams of the
        shorter text.

        Texts under 8 words are compared only if `is_input`, because short answers are often equal by chance.
        """
        words = text.split()
        if ((is_input and words) or len(words) >= NUM_WORDS) and hash_to_number(0, text) in self.whole:
            return True
        ngrams = _hash_word_ngrams(words)
        starts, ends = (np.searchsorted(self.ngrams, ngrams, side) for side in ("left", "right"))
        hits = [self.text_of[start:end] for start, end in zip(starts, ends, strict=True) if start < end]
        if not hits:
            return False
        texts, shared = np.unique(np.concatenate(hits), return_counts=True)
        return bool((2 * shared >= np.minimum(self.num_ngrams[texts], len(ngrams))).any())


def _hash_word_ngrams(words: list[str]) -> np.ndarray:
    """Return sorted hashes of a text's distinct word 8-grams: uint64, empty below 8 words."""
    count = len(words) - NUM_WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    numbers = np.fromiter(map(_hash_word, words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for place in range(NUM_WORDS):
        hashes = hashes * _BASE + numbers[place : place + count]
    return np.unique(rehash(hashes))


# ---- forbidden texts -------------------------------------------------------------------------------------------


def list_forbidden_text_files(recipe: Recipe) -> tuple[Path, ...]:
    """List the files whose texts must not be trained on. Raises `DataError` if a configured path has none."""
    return tuple(
        file for setting, path in recipe.excluded_text_paths.items() for file in _list_text_files(setting, path)
    )


def _list_text_files(setting: str, path: str) -> Sequence[Path]:
    """Return the text files and tables at `path` or below. Error messages name `setting`."""
    try:
        with convert_os_errors(Path(path)):
            if not Path(path).is_dir():
                return list_data_files(Path(path))
            files = sorted(
                file
                for file in Path(path).rglob("*")
                if has_data_suffix(file)
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            )
    except DataError as error:
        raise DataError([f"{setting}: {problem}" for problem in error.problems]) from None
    if not files:
        raise DataError(
            f"{setting}: {path}: no text file or table in this folder; expected txt, csv, jsonl or similar: "
            "choose another folder, or a file"
        )
    return files


def hash_forbidden_texts(path_of_setting: Mapping[str, str], files: Iterable[Path]) -> ForbiddenTexts:
    """Hash all texts in `files`. Raises a `DataError` that names the settings if a file is broken or no file contains
    text."""
    whole: set[int] = set()
    ngrams, num_ngrams, problems = [np.empty(0, np.uint64)], list[int](), list[str]()
    for file in files:
        kind = file.suffix.lower()
        rows = DataFiles((file,), str(file), "paragraph" if kind == ".txt" and has_blank_lines(file) else "line")
        for _, row in rows.rows(problems):
            for text in filter(None, map(normalised, texts_in_cell(row))):
                if (number := hash_to_number(0, text)) not in whole:
                    whole.add(number)
                    ngrams.append(_hash_word_ngrams(text.split()))
                    num_ngrams.append(len(ngrams[-1]))
    if problems:
        raise DataError([f"{' and '.join(path_of_setting)}: {problem}" for problem in problems])
    if not whole:
        raise DataError(f"{' and '.join(path_of_setting)}: found no text; choose a file or folder that contains texts")
    sources = [f"{Path(path).absolute().name} ({setting})" for setting, path in path_of_setting.items()]
    hashes = np.concatenate(ngrams)
    order = np.argsort(hashes, kind="stable")
    _, which, counts = np.unique(hashes[order], return_inverse=True, return_counts=True)
    order = order[counts[which] <= MAX_TEXTS]
    return ForbiddenTexts(
        source=f"{counted(len(whole), 'text')} of {' and '.join(sources)}",
        whole=frozenset(whole),
        num_ngrams=np.array(num_ngrams, np.int32),
        ngrams=hashes[order],
        text_of=np.repeat(np.arange(len(num_ngrams), dtype=np.int32), num_ngrams)[order],
    )


def texts_in_cell(cell: object) -> Iterator[str]:
    """Yield all texts in a cell, including nested ones. A list of single words counts as one text."""
    parts = cell.values() if isinstance(cell, Mapping) else cell if isinstance(cell, (list, tuple)) else ()
    if isinstance(cell, str):
        yield cell
    elif not isinstance(cell, Mapping) and len(parts) > 1 and all(map(_is_word, parts)):
        yield " ".join(parts)
    else:
        for part in parts:
            yield from texts_in_cell(part)


def _is_word(part: object) -> bool:
    return isinstance(part, str) and len(part.split()) == 1


# ---- rows that contain them ------------------------------------------------------------------------------------


def mark_rows_with_forbidden_text(
    forbidden: ForbiddenTexts | None, group_keys: Sequence[str], rows: Sequence[LocatedRow], target: Target
) -> np.ndarray:
    """Mark rows that contain a forbidden text: bool [rows], empty if `forbidden` is None. `group_keys` are the rows'
    inputs."""
    if forbidden is None:
        return np.zeros(0, bool)
    columns = {role: column for role, column in target.columns.items() if not role.startswith(_NOT_COMPARED)}

    def contains_forbidden_text(group_key: str, row: Row) -> bool:
        return ("context" not in target.columns and forbidden.occur_in(group_key, is_input=True)) or any(
            forbidden.occur_in(text, is_input=not role.startswith(_ANSWERS))
            for role, column in columns.items()
            for text in dict.fromkeys(map(normalised, texts_in_cell(row.get(column))))
            if text != group_key
        )

    return np.array([contains_forbidden_text(key, row) for key, (_, row) in zip(group_keys, rows, strict=True)], bool)
