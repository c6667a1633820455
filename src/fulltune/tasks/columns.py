"""Find the column for a role: the one the recipe names, or one with a usual name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from fulltune.errors import DataError

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "content", "review", "comment", "question", "utterance", "query", "title", "body"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "label": (
        "label",
        "labels",
        "category",
        "class",
        "intent",
        "target",
        "sentiment",
        "topic",
        "tag",
        "score",
        "rating",
    ),
    "messages": ("messages", "conversation", "conversations", "chat", "dialogue"),
    "prompt": ("prompt", "question", "instruction", "input", "query"),
    "completion": ("completion", "answer", "response", "output", "chosen", "target"),
    "tools": ("tools",),
    "context": ("context", "passage", "paragraph", "document"),
    "question": ("question", "query"),
    "answers": ("answers", "answer"),
    "source": ("source", "document", "article", "input", "text", "dialogue", "src"),
    "target": ("target", "summary", "highlights", "output", "translation", "tgt"),
    "image": ("image", "images", "image_path", "img", "img_path", "picture", "photo", "file_name", "filename", "path"),
    "choices": ("choices", "options", "endings", "candidates"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "bio_tags", "iob_tags"),
}


def named(role: str, given: str | None, columns: Sequence[str], where: str) -> str | None:
    """The column that the recipe names for a role, or one with a usual name, or None.

    Raises:
        DataError: When the recipe names a column that is not there.
    """
    if given is not None:
        if given not in columns:
            near = difflib.get_close_matches(given, columns, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"columns here: {', '.join(columns)}"
            raise DataError(f"{where}: no column '{given}' (data.{role}); {hint}")
        return given
    by_lower = {column.lower().strip(): column for column in columns}
    return next((by_lower[name] for name in USUAL_NAMES[role] if name in by_lower), None)


def required(
    role: str, given: str | None, columns: Sequence[str], where: str, besides: Collection[str | None] = ()
) -> str:
    """Like `named`, for a role that the task cannot do without; `besides` are columns that have another role."""
    column = named(role, given, [column for column in columns if column not in besides], where)
    if column is None:
        raise DataError(
            f"{where}: no column found for data.{role}; name it in the recipe (columns here: {', '.join(columns)})"
        )
    return column


def as_text(value: object) -> str:
    """A cell as text; a missing one is empty."""
    return "" if value is None else str(value)


def normalised(text: str) -> str:
    """Case and white space do not make a different row."""
    return " ".join(text.lower().split())
