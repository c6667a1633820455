"""What `fulltune predict` reads and how it answers. Layer 4."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulltune.errors import DataError, SetupError


def rows_of(file: Path, image: str | None) -> list[dict[str, Any]]:
    """Rows of a table; as in training, paths in the column `image` start at the table's folder."""
    from fulltune.data import locate

    source = replace(locate([str(file)]), image_paths=image is not None, image_column=image)
    problems: list[str] = []
    rows = [row for _, row in source.rows(problems)]
    if problems:
        raise DataError(problems)
    return rows


def lines(file: Path | None) -> list[str]:
    """Lines of a text file, or of stdin."""
    if file is None and sys.stdin.isatty():
        raise SetupError("predict: give a text, --file, or texts on stdin")
    if file is not None and not file.exists():
        raise DataError(f"{file}: no such file")
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8; save it as UTF-8"
        raise DataError(f"{file or 'stdin'}: cannot be read: {reason}") from None
    return text.splitlines()


def in_words(answer: dict[str, Any]) -> str:
    """One line for people."""
    if "answer" in answer:
        return str(answer["answer"])
    if "entities" in answer:
        found = [f"{entity['text']} ({entity['type']} {entity['probability']:.1%})" for entity in answer["entities"]]
        return ", ".join(found) or "(none)"
    if "value" in answer:
        return f"{answer['value']:.4g}"
    if "labels" in answer:
        return ", ".join(f"{name} ({answer['probabilities'][name]:.1%})" for name in answer["labels"]) or "(none)"
    return f"{answer['text'] if 'index' in answer else answer['label']} ({answer['probability']:.1%})"
