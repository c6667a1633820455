"""Checks single texts, with repairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from fulltune.audit.texts import content, private
from fulltune.audit.texts.flaw import RE, Flaw, is_installed

_CHECKS: Mapping[str, Callable[[str], Flaw | None]] = {
    "broken encoding": content.broken_encoding,
    "control characters": content.control_characters,
    "empty": content.empty,
    "no words": content.no_words,
    "markup": content.markup,
    "placeholder": content.placeholder,
    "chat tokens": content.chat_tokens,
    "repetition": content.repetition,
    "secret": private.secret,
    "personal data": private.personal_data,
    "phone number": private.phone_number,
    "refusal": content.refusal,
}
"""Checks in the order of their repairs."""
OF_TEXTS: tuple[str, ...] = tuple(check for check in _CHECKS if check != "refusal")
"""Checks of texts that a model reads."""
OF_ANSWERS: tuple[str, ...] = tuple(check for check in _CHECKS if check != "no words")
"""Checks of texts that a model learns to write: `42` is fine, a refusal is not."""
_PRIVATE: tuple[str, ...] = ("secret", "personal data", "phone number")
_UNCOVERING: tuple[str, ...] = ("broken encoding", "control characters", "markup")
"""Repairs that may restore a secret broken by a zero-width space or a tag."""


def missing() -> list[str]:
    """Return checks whose package is not installed."""
    packages = {"broken encoding": "ftfy", "phone number": "phonenumbers"}
    return [check for check, package in packages.items() if not is_installed(package)]


def masked_text(text: str) -> str:
    """Return a text without secrets and personal data. Call it before shortening."""
    shown = repaired(text, _PRIVATE)
    whole = repaired(RE["unseen"].sub("", shown), _UNCOVERING)
    if whole == shown == text:
        return text
    hidden = repaired(whole, _PRIVATE)
    return shown if hidden == whole else hidden


def masked_cells(cell: Any) -> Any:
    """Apply `masked_text` to all texts in a cell."""
    if isinstance(cell, dict):
        return {masked_text(str(name)): masked_cells(inner) for name, inner in cell.items()}
    if isinstance(cell, (list, tuple)):
        return list(map(masked_cells, cell))
    text = str(cell) if isinstance(cell, int) else cell  # a card's number may be one
    return masked if isinstance(text, str) and (masked := masked_text(text)) != text else cell


def found_by(text: str, checks: Collection[str]) -> list[str]:
    return [check for check in checks if _CHECKS[check](text) is not None]


def flaws(text: str, checks: Collection[str] = OF_TEXTS) -> list[Flaw]:
    """Return the flaws of a text, with secrets masked."""
    results = [flaw for check in checks if (flaw := _CHECKS[check](text)) is not None]
    masked = masked_text(text) if results else text
    # If nothing is masked, no repair uncovers anything private either: `masked_text` tries them.
    return [_shown(flaw, masked) for flaw in results] if masked != text else results


def _shown(flaw: Flaw, masked: str) -> Flaw:
    """Mask other private data in a flaw's reason and repair."""
    again = flaw if flaw.check in _PRIVATE else _CHECKS[flaw.check](masked)
    reason = again.reason if again is not None else "in masked text"
    return replace(flaw, reason=reason, fixed=flaw.fixed and masked_text(flaw.fixed))


def repaired(text: str, checks: Collection[str]) -> str:
    """Apply the repairs of these checks in order."""
    absent = missing()
    for check, find in _CHECKS.items():
        if check in checks and check not in absent and (flaw := find(text)) is not None and flaw.fixed is not None:
            text = flaw.fixed
    return text


# ---- where running text stands in a row, and which checks it gets ----------------------------------------------------

_READ = ("text", "text_pair", "prompt", "input", "source", "question", "context", "messages", "tokens")
_WRITTEN = ("completion", "target", "messages")
"""Roles of running text that a model reads, or learns to write."""
TextUse = Literal["read", "written"]
PARTS: Mapping[TextUse, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read": (_READ, OF_TEXTS),
    "written": (_WRITTEN, OF_ANSWERS),
}
CHEAP = ("broken encoding", "control characters", "markup", "placeholder", "chat tokens", "refusal")
"""Checks of every row in every run: 15 % of the time of tokenising short texts, a third with `refusal`."""
MAX_CHECKED = 100_000
"""Characters of a text checked in each run, at several times their memory."""


def checks_of(columns: Mapping[str, str], wanted: Collection[str] = tuple(_CHECKS)) -> dict[TextUse, list[str]]:
    """Return the possible checks for read and for written texts."""
    possible = [check for check in wanted if check not in missing()]
    return {
        part: [check for check in of if check in possible]
        for part, (roles, of) in PARTS.items()
        if set(roles) & set(columns)
    }


def cells(row: Mapping[str, object], columns: Mapping[str, str], part: TextUse) -> Iterator[tuple[str, str]]:
    """Yield columns with their running text of this use; of conversations some turns."""
    for role in PARTS[part][0]:
        column = columns.get(role, "")
        cell = row.get(column)
        if column and isinstance(cell, str):
            yield column, cell
        elif column and isinstance(cell, list):
            turns = cell if role != "messages" else [turn for turn in cell if _is_answer(turn) == (part == "written")]
            if turns:
                yield column, " ".join(map(_text_of, turns))


def whole_texts(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, str]:
    """Return each column's running text."""
    whole = {columns[role]: "" for roles, _ in PARTS.values() for role in roles if role in columns}
    for part in PARTS:
        for column, text in cells(row, columns, part):
            whole[column] = text if whole[column] in ("", text) else f"{whole[column]} {text}"
    return whole


def _is_answer(turn: object) -> bool:
    return isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("assistant", "gpt", "model", "bot")


def _text_of(part: object) -> str:
    if isinstance(part, dict):
        part = part.get("value") if part.get("content") is None else part["content"]
    return "" if part is None else str(part)
