from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fulltune.audit.texts import content, private
from fulltune.audit.texts.flaw import RE, Flaw, is_installed

_CHECKS: Mapping[str, Callable[[str], Flaw | None]] = {
    "broken encoding": content.check_encoding,
    "control characters": content.check_control_characters,
    "empty": content.check_empty,
    "no words": content.check_no_words,
    "markup": content.check_markup,
    "placeholder": content.check_placeholders,
    "chat tokens": content.check_chat_tokens,
    "repetition": content.check_repetition,
    "secret": partial(private.check_known_forms, "secret", RE["maybe_secret"]),
    "personal data": partial(private.check_known_forms, "personal data", RE["maybe_personal"]),
    "phone number": private.check_phone_number,
    "refusal": content.check_refusal,
}
"""Checks in the order in which their repairs are applied."""
CHECKS_OF_READ_TEXTS: tuple[str, ...] = tuple(check for check in _CHECKS if check != "refusal")
CHECKS_OF_WRITTEN_TEXTS: tuple[str, ...] = tuple(check for check in _CHECKS if check != "no words")
_PRIVATE: tuple[str, ...] = ("secret", "personal data", "phone number")
_UNCOVERING: tuple[str, ...] = ("broken encoding", "control characters", "markup")


def checks_without_package() -> list[str]:
    """Return the names of the checks whose package is not installed."""
    packages = {"broken encoding": "ftfy", "phone number": "phonenumbers"}
    return [check for check, package in packages.items() if not is_installed(package)]


def masked_text(text: str) -> str:
    """Return a text with secrets and personal data replaced. Call this before shortening it."""
    shown = repair_text(text, _PRIVATE)
    whole = repair_text(RE["unseen"].sub("", shown), _UNCOVERING)
    if whole == shown == text:
        return text
    hidden = repair_text(whole, _PRIVATE)
    return shown if hidden == whole else hidden


def masked_cells(cell: Any) -> Any:
    """Apply `masked_text` to all texts in a cell, at any depth."""
    if isinstance(cell, dict):
        return {masked_text(str(name)): masked_cells(inner) for name, inner in cell.items()}
    if isinstance(cell, (list, tuple)):
        return list(map(masked_cells, cell))
    text = str(cell) if isinstance(cell, int) else cell  # a card number may be an int
    return masked if isinstance(text, str) and (masked := masked_text(text)) != text else cell


def found_by(text: str, checks: Collection[str]) -> list[str]:
    return [check for check in checks if _CHECKS[check](text) is not None]


def find_flaws(text: str, checks: Collection[str] = CHECKS_OF_READ_TEXTS) -> list[Flaw]:
    """Return the flaws that the checks detect, with secrets masked."""
    results = [flaw for check in checks if (flaw := _CHECKS[check](text)) is not None]
    masked = masked_text(text) if results else text
    # If nothing was masked, repairs uncover nothing private either, because `masked_text` tries them.
    return [_mask_flaw(flaw, masked) for flaw in results] if masked != text else results


def _mask_flaw(flaw: Flaw, masked: str) -> Flaw:
    again = flaw if flaw.check in _PRIVATE else _CHECKS[flaw.check](masked)
    reason = again.reason if again is not None else "in masked text"
    return replace(flaw, reason=reason, fixed=flaw.fixed and masked_text(flaw.fixed))


def repair_text(text: str, checks: Collection[str]) -> str:
    """Return the text after applying these checks' repairs in order."""
    absent = checks_without_package()
    for check, find in _CHECKS.items():
        if check in checks and check not in absent and (flaw := find(text)) is not None and flaw.fixed is not None:
            text = flaw.fixed
    return text


# ---- running text in a row, and its checks ---------------------------------------------------------------------------

_READ_ROLES = ("text", "text_pair", "prompt", "input", "source", "question", "context", "messages", "tokens")
_WRITTEN_ROLES = ("completion", "target", "messages")
TextUse = Literal["read", "written"]
ROLES_AND_CHECKS: Mapping[TextUse, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read": (_READ_ROLES, CHECKS_OF_READ_TEXTS),
    "written": (_WRITTEN_ROLES, CHECKS_OF_WRITTEN_TEXTS),
}
CHEAP_CHECKS = ("broken encoding", "control characters", "markup", "placeholder", "chat tokens", "refusal")
"""Checks that run on every row. Tokenising short texts takes seven times as long."""
MAX_CHECKED = 100_000


def select_checks(columns: Mapping[str, str], wanted: Collection[str] = tuple(_CHECKS)) -> dict[TextUse, list[str]]:
    """Return the installed checks for texts that the model reads (`read`) or learns to write (`written`)."""
    possible = [check for check in wanted if check not in checks_without_package()]
    return {
        part: [check for check in of if check in possible]
        for part, (roles, of) in ROLES_AND_CHECKS.items()
        if set(roles) & set(columns)
    }


def iterate_texts(row: Mapping[str, object], columns: Mapping[str, str], use: TextUse) -> Iterator[tuple[str, str]]:
    """Yield the column and text of each cell that the model reads (`read`) or learns to write (`written`)."""
    for role in ROLES_AND_CHECKS[use][0]:
        column = columns.get(role, "")
        cell = row.get(column)
        if column and isinstance(cell, str):
            yield column, cell
        elif column and isinstance(cell, list):
            turns = cell if role != "messages" else [turn for turn in cell if _is_answer(turn) == (use == "written")]
            if turns:
                yield column, " ".join(map(_part_to_text, turns))


def join_texts_by_column(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, str]:
    """Map each text column to all its running text in a row."""
    whole = {columns[role]: "" for roles, _ in ROLES_AND_CHECKS.values() for role in roles if role in columns}
    for part in ROLES_AND_CHECKS:
        for column, text in iterate_texts(row, columns, part):
            whole[column] = text if whole[column] in ("", text) else f"{whole[column]} {text}"
    return whole


def _is_answer(turn: object) -> bool:
    return isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("assistant", "gpt", "model", "bot")


def _part_to_text(part: object) -> str:
    """Return a chat message's content, or another part as text."""
    if isinstance(part, dict):
        part = part.get("value") if part.get("content") is None else part["content"]
    return "" if part is None else str(part)
