from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fulltune.errors import DataError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview
from fulltune.tasks import (
    Predictions,
    Refused,
    Row,
    RowAnswer,
    RowExamples,
    RowFeatures,
    Target,
    Tokenizer,
    classes,
)
from fulltune.tasks.columns import CHOICE_NAMES, as_text, find_column, missing_column, normalised
from fulltune.tasks.labels import is_empty, label_name, parse_list
from fulltune.tasks.labels import row_labels as labels_of_row
from fulltune.tasks.padding import TEXT_LENGTHS, join_rows, pad_texts, split_texts, tokenise_and_cut

FACTS = recipe_tasks.FACTS["multiple-choice"]
row_labels, config_changes, collate = labels_of_row, classes.config_changes, pad_texts
loss, count_items, reduce_logits = classes.loss, classes.count_items, classes.reduce_logits
metrics, metrics_from_sums, chance_loss = classes.metrics, classes.metrics_from_sums, classes.chance_loss


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return the target with the most common number of choices, or raise `DataError` for unusable labels."""
    column = columns["label"]
    sizes: Counter[int] = Counter()
    one_too_high = 0
    for row in rows:
        texts, value = choice_texts(row, Target("choice", columns)), row.get(column)
        if len(texts) < 2 or is_empty(value):
            continue
        sizes[len(texts)] += 1
        one_too_high += label_name(value) == str(len(texts)) and index_of_right_choice(row, columns, texts) is None
    if not sizes:
        raise DataError(f"{file}: no row has at least two choices and a label in column '{column}'")
    number = sizes.most_common(1)[0][0]
    if one_too_high:
        raise DataError(
            f"{file}: column '{column}' counts choices from 1 ({one_too_high} labels equal the number of choices), "
            f"expected 0 to {number - 1}. Subtract 1 from all labels, or write letters (A, B ...) or the choice's text"
        )
    return Target("choice", columns, num_choices=number)


def why_unusable(row: Row, target: Target) -> Refused | None:
    """Return the reason to drop a row with unusable choices or label, else None."""
    if (refused := why_unanswerable(row, target)) is not None:
        return refused
    texts, column = choice_texts(row, target), target.columns["label"]
    value = row.get(column)
    if is_empty(value):
        return Refused("no label", f"column '{column}' is empty")
    if index_of_right_choice(row, target.columns, texts) is None:
        return Refused(
            "no right choice",
            f"column '{column}' holds {value!r}, expected 0 to {len(texts) - 1}, a letter or the text of one choice",
        )
    return None


def why_unanswerable(row: Row, target: Target) -> Refused | None:
    """Return why the model cannot answer a row (an empty choice or an unexpected number of choices), or None."""
    texts = choice_texts(row, target)
    if len(texts) != target.num_choices:
        return Refused("other number of choices", f"{len(texts)} choices, expected {target.num_choices}")
    return None if all(text.strip() for text in texts) else Refused("empty choice", "a choice is empty")


def group_key(row: Row, target: Target) -> str:
    """Return the normalised passage or, without a passage, the question and the sorted choices."""
    passage = as_text(row.get(target.columns["context"])) if "context" in target.columns else ""
    if passage.strip():
        return normalised(passage)
    return normalised(" \0 ".join([question_text(row, target), *sorted(choice_texts(row, target))]))


def with_placeholder_answer(row: Row, target: Target) -> Row:
    return row  # `encode` takes a missing label as the first choice


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise each choice with its question. The choices of a row are concatenated in one example."""
    choices = [choice_texts(row, target) for row in rows]
    questions = [question_text(row, target) for row in rows]
    texts = [[text for row in choices for text in row]]
    if any(questions):
        texts.insert(0, [question for question, row in zip(questions, choices, strict=True) for _ in row])
    tokens, names, is_cut = tokenise_and_cut(tokenizer, texts, max_length)
    # Only rows to predict have no right choice.
    right = [index_of_right_choice(row, target.columns, of) or 0 for row, of in zip(rows, choices, strict=True)]
    return join_rows({name: tokens[name] for name in names}, is_cut, map(len, choices), right)


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    """Decode each choice with its question, and add the right choice's number."""
    parts = [tokenizer.decode(ids.tolist()) for ids in split_texts(features)]
    text = "\n".join(f"({place}) {part}" for place, part in enumerate(parts))
    return Preview.labelled(text, str(np.ravel(features["labels"])[-1]))


def display_text(row: Row, target: Target) -> str:
    choices = (f"({place}) {text}" for place, text in enumerate(choice_texts(row, target)))
    return " ".join(part for part in (question_text(row, target), *choices) if part)


def answers(
    predictions: Predictions, rows: Sequence[Row], examples: RowExamples, target: Target, temperature: float
) -> list[RowAnswer]:
    """Return each row's best choice with all choices' probabilities."""
    return [
        {
            "index": best,
            "text": choice_texts(row, target)[best],
            "probability": chances[best],
            "probabilities": chances,
        }
        for row, (best, chances) in zip(
            rows, classes.classes_with_chances(predictions["logits"], target, temperature), strict=True
        )
    ]


def full_row(target: Target, length: int) -> RowFeatures:
    ids = np.ones(length * target.num_choices, np.int64)
    return {"input_ids": ids, "labels": 0, TEXT_LENGTHS: np.full(target.num_choices, length)}


_STEMS = ("choice", "ending", "option", "candidate", "answer", "sol", "alternative", "")


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    """Map `label`, `choices` (or `choice0`, `choice1` ...) and, if present, `question` and `context` to columns.

    Also raises `DataError` if an unrecognised column may be the question.
    """
    by_role: dict[str, str] = {}
    for role in ("choices", "label", "context", "question"):
        rest = [column for column in columns if column not in by_role.values()]
        column = find_column(role, getattr(data, role), rest, file, CHOICE_NAMES[role])
        if column is not None:
            by_role[role] = column
        elif role == "choices":
            by_role |= {f"choice{number}": column for number, column in enumerate(_numbered_columns(rest))}
    missing = []
    if not any(role.startswith("choice") for role in by_role):
        missing.append(missing_column("choices (one with lists, or several: choice0, choice1)", columns, file))
    if "label" not in by_role:
        missing.append(missing_column("label", columns, file))
    rest = [column for column in columns if column not in by_role.values()]
    if not {"question", "context"} & set(by_role) and _has_sentences(rest, sample):
        # A question under another name must not be ignored silently.
        missing.append(missing_column("question", columns, file))
    if missing:
        raise DataError(missing)
    return by_role


def _numbered_columns(columns: Sequence[str]) -> list[str]:
    """Return columns such as `ending0` to `ending3` or `A` to `E`, in order, or an empty list."""
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
    texts = ([cell for row in sample if isinstance(cell := row.get(column), str)] for column in columns)
    return any(sum(" " in cell.strip() for cell in cells) > len(sample) / 2 for cells in texts)


def choice_texts(row: Row, target: Target) -> list[str]:
    return _choice_texts_and_names(row, target.columns)[0]


def _choice_texts_and_names(row: Row, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return a row's choices and their names, such as `A`. The names are empty except in ARC's format."""
    if "choices" not in columns:
        roles = sorted((role for role in columns if role.startswith("choice")), key=lambda role: int(role[6:]))
        texts = [as_text(row.get(columns[role])) for role in roles]
        while len(texts) > 1 and not texts[-1].strip():  # rows with fewer choices have empty last cells
            texts.pop()
        return texts, []
    value: Any = row.get(columns["choices"])
    names: Any = []
    if isinstance(value, Mapping):
        value, names = value.get("text"), value.get("label") or []
    if isinstance(value, str):
        value = parse_list(value)
    texts = [as_text(text) for text in value] if isinstance(value, (list, tuple)) else []
    return texts, [str(name) for name in names] if len(names) == len(texts) else []


def question_text(row: Row, target: Target) -> str:
    """Join the context and the question with a space."""
    parts = (
        as_text(row.get(target.columns[role])).strip() for role in ("context", "question") if role in target.columns
    )
    return " ".join(part for part in parts if part)


def index_of_right_choice(row: Row, columns: Mapping[str, str], texts: Sequence[str]) -> int | None:
    """Return the index of the only choice that the label matches by name, index, letter or text, or None."""
    value = row.get(columns["label"])
    if is_empty(value) or isinstance(value, (list, tuple, Mapping)):
        return None
    name = label_name(value)
    if names := _choice_texts_and_names(row, columns)[1]:
        return names.index(name) if names.count(name) == 1 else None
    same = [place for place, text in enumerate(texts) if text.strip() == name]
    choice = int(name) if re.fullmatch(r"\d+", name) else len(texts)
    choice = ord(name.lower()) - ord("a") if re.fullmatch(r"[A-Za-z]", name) else choice
    if choice < len(texts):
        return choice if same in ([], [choice]) else None
    return same[0] if len(same) == 1 else None
