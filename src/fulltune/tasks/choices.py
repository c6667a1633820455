"""What a multiple-choice row holds: its choices, the question, and which choice is right, in the usual forms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import as_text, missing_column, named
from fulltune.tasks.labels import is_empty, label_name, parsed_list

NAMES = {
    "choices": ("choices", "options", "endings", "candidates", "answers"),
    "question": ("question", "query", "stem", "prompt", "goal", "sent2", "text"),
    "context": ("context", "passage", "article", "ctx", "premise", "story", "sent1"),
    "label": (
        "label",
        "answer",
        "answerkey",
        "answer_key",
        "correct",
        "gold",
        "target",
        "correct_answer",
        "answer_idx",
    ),
}
_STEMS = ("choice", "ending", "option", "candidate", "answer", "sol", "alternative", "")
"""Beginnings of numbered columns: `choice0`, `ending_1`, `optionA`; with none it is the letter alone."""


@dataclass(frozen=True)
class Right:
    """Which choice is right, and how the label says so."""

    index: int
    how: Literal["place", "letter", "text", "name"]
    by_text: int | None
    """The choice whose text the label is, whatever else it can mean."""


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str) -> dict[str, str]:
    """Columns for `label`, `choices` (or `choice0`, `choice1` ...) and, where there are, `question` and `context`.
    Raises `DataError` for each role without a column, and when texts are left that may be the question."""
    found: dict[str, str] = {}
    for role in ("choices", "label", "context", "question"):
        rest = [column for column in columns if column not in found.values()]
        column = named(role, getattr(data, role), rest, where, NAMES[role])
        if column is not None:
            found[role] = column
        elif role == "choices":
            found |= {f"choice{number}": column for number, column in enumerate(_numbered(rest))}
    missing = []
    if not any(role.startswith("choice") for role in found):
        missing.append(missing_column("choices (one with lists, or several: choice0, choice1)", columns, where))
    if "label" not in found:
        missing.append(missing_column("label", columns, where))
    rest = [column for column in columns if column not in found.values()]
    if not {"question", "context"} & set(found) and _has_sentences(rest, sample):
        # A question under another name must not be left out in silence.
        missing.append(missing_column("question", columns, where))
    if missing:
        raise DataError(missing)
    return found


def _numbered(columns: Sequence[str]) -> list[str]:
    """Columns such as `ending0` to `ending3`, `option_1` to `option_4` or `A` to `E`, in their order."""
    for stem in _STEMS:
        places: dict[int, str] = {}
        for column in columns:
            match = re.fullmatch(rf"{stem}[ _-]?(\d{{1,2}}|[a-z])", column.lower().strip())
            if match and not (stem == "" and match[1].isdigit()):
                places[int(match[1]) if match[1].isdigit() else ord(match[1]) - ord("a")] = column
        first = min(places, default=0)
        if len(places) >= 2 and first in (0, 1) and sorted(places) == list(range(first, first + len(places))):
            return [places[place] for place in sorted(places)]
    return []


def _has_sentences(columns: Sequence[str], sample: Sequence[Row]) -> bool:
    """True when a column holds words with spaces between them in most rows."""

    def has_words(cell: Any) -> bool:
        return isinstance(cell, str) and " " in cell.strip()

    return any(sum(has_words(row.get(column)) for row in sample) > len(sample) / 2 for column in columns)


def choice_texts(row: Row, target: Target) -> list[str]:
    """The row's choices; empty when the column holds no list."""
    return _texts_and_names(row, target.columns)[0]


def _texts_and_names(row: Row, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Choices, and the names that ARC and CommonsenseQA give them: `{"text": [...], "label": ["A", ...]}`."""
    if "choices" not in columns:
        roles = sorted((role for role in columns if role.startswith("choice")), key=lambda role: int(role[6:]))
        texts = [as_text(row.get(columns[role])) for role in roles]
        while len(texts) > 1 and not texts[-1].strip():  # a row with fewer choices leaves the last cells empty
            texts.pop()
        return texts, []
    value: Any = row.get(columns["choices"])
    names: Any = []
    if isinstance(value, Mapping):
        value, names = value.get("text"), value.get("label") or []
    if isinstance(value, str):
        value = parsed_list(value)
    texts = [as_text(text) for text in value] if isinstance(value, (list, tuple)) else []
    return texts, [str(name) for name in names] if len(names) == len(texts) else []


def question_text(row: Row, target: Target) -> str:
    """Context and question, of which both may be missing."""
    parts = (
        as_text(row.get(target.columns[role])).strip() for role in ("context", "question") if role in target.columns
    )
    return " ".join(part for part in parts if part)


def right_choice(row: Row, columns: Mapping[str, str], texts: Sequence[str]) -> Right | None:
    """The choice that the label names: by the choices' own names, by place (from 0), by letter, or by its text."""
    value = row.get(columns["label"])
    if is_empty(value) or isinstance(value, (list, tuple, Mapping)):
        return None
    name = label_name(value)
    names = _texts_and_names(row, columns)[1]
    same = [place for place, text in enumerate(texts) if text.strip() == name]
    by_text = same[0] if len(same) == 1 else None
    if names:
        return Right(names.index(name), "name", None) if names.count(name) == 1 else None
    if re.fullmatch(r"\d+", name) and int(name) < len(texts):
        return Right(int(name), "place", by_text)
    if re.fullmatch(r"[A-Za-z]", name) and ord(name.lower()) - ord("a") < len(texts):
        return Right(ord(name.lower()) - ord("a"), "letter", by_text)
    return Right(by_text, "text", by_text) if by_text is not None else None
