"""What is wrong with the texts of a row: pure functions of single texts, with a repair where there is one."""

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
"""In the order in which their repairs follow each other."""
OF_TEXTS: tuple[str, ...] = tuple(check for check in _CHECKS if check != "refusal")
"""What can be wrong with a text that a model reads."""
OF_ANSWERS: tuple[str, ...] = tuple(check for check in _CHECKS if check != "no words")
"""With one that it learns to write: `42` is an answer, and a refusal is a bad one."""
_PRIVATE: tuple[str, ...] = ("secret", "personal data", "phone number")
_UNCOVERING: tuple[str, ...] = ("broken encoding", "control characters", "markup")
"""Repairs that may make a secret whole: of one with a zero-width space or a tag inside."""


def missing() -> list[str]:
    """Checks that need the extra `audit` where it is not installed: leave them out of `checks`, and say so."""
    packages = {"broken encoding": "ftfy", "phone number": "phonenumbers"}
    return [check for check, package in packages.items() if not is_installed(package)]


def masked_text(text: str) -> str:
    """A text as it may be shown or listed, before it is shortened: without secrets, personal data, phone numbers."""
    shown = repaired(text, _PRIVATE)
    whole = repaired(RE["unseen"].sub("", shown), _UNCOVERING)
    if whole == shown == text:
        return text
    hidden = repaired(whole, _PRIVATE)
    return shown if hidden == whole else hidden


def masked_cells(cell: Any) -> Any:
    """A row, or a cell of one, with all its texts as `masked_text` has them."""
    if isinstance(cell, dict):
        return {masked_text(str(name)): masked_cells(inner) for name, inner in cell.items()}
    if isinstance(cell, (list, tuple)):
        return list(map(masked_cells, cell))
    text = str(cell) if isinstance(cell, int) else cell  # a card's number may be one
    return masked if isinstance(text, str) and (masked := masked_text(text)) != text else cell


def found_by(text: str, checks: Collection[str]) -> list[str]:
    """The checks that find something in a text."""
    return [check for check in checks if _CHECKS[check](text) is not None]


def flaws(text: str, checks: Collection[str] = OF_TEXTS) -> list[Flaw]:
    """What is wrong with a text, one entry a check: as it may be shown, in its reason and in what is proposed."""
    found = [flaw for check in checks if (flaw := _CHECKS[check](text)) is not None]
    masked = masked_text(text) if found else text
    # Where nothing is masked nothing is private, nor in what a repair gives: `masked_text` has looked behind each.
    return [_shown(flaw, masked) for flaw in found] if masked != text else found


def _shown(flaw: Flaw, masked: str) -> Flaw:
    """A flaw without what is private elsewhere in its text: a reason may quote it, and a repair keeps it."""
    again = flaw if flaw.check in _PRIVATE else _CHECKS[flaw.check](masked)
    reason = again.reason if again is not None else "in what is masked"
    return replace(flaw, reason=reason, fixed=flaw.fixed and masked_text(flaw.fixed))


def repaired(text: str, checks: Collection[str]) -> str:
    """The text after the repairs of these checks that can be made, each on what the one before it left."""
    absent = missing()
    for check, find in _CHECKS.items():
        if check in checks and check not in absent and (flaw := find(text)) is not None and flaw.fixed is not None:
            text = flaw.fixed
    return text


# ---- where running text stands in a row, and which checks it gets ----------------------------------------------------

_READ = ("text", "text_pair", "prompt", "input", "source", "question", "context", "messages", "tokens")
_WRITTEN = ("completion", "target", "messages")
"""Roles of columns with running text: what a model reads, and what it learns to write. Of a conversation the latter are
the assistant's turns."""
Part = Literal["read", "written"]
PARTS: Mapping[Part, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read": (_READ, OF_TEXTS),
    "written": (_WRITTEN, OF_ANSWERS),
}
CHEAP = ("broken encoding", "control characters", "markup", "placeholder", "chat tokens", "refusal")
"""Made on each row of each run: together they take 15 % of the tokenising of short texts, and a third of it with
`refusal`, which answers alone get."""
LOOKED_AT = 100_000
"""Characters of a text in each run: a check takes several times their memory."""


def checks_of(columns: Mapping[str, str], wanted: Collection[str] = tuple(_CHECKS)) -> dict[Part, list[str]]:
    """The checks (all, or those wanted) that can be made on what is read, and on what is written, if there is any."""
    possible = [check for check in wanted if check not in missing()]
    return {
        part: [check for check in of if check in possible]
        for part, (roles, of) in PARTS.items()
        if set(roles) & set(columns)
    }


def cells(row: Mapping[str, Any], columns: Mapping[str, str], part: Part) -> Iterator[tuple[str, str]]:
    """Columns with running text, and what stands in them; of a conversation some turns, of a sentence its words."""
    for role in PARTS[part][0]:
        column = columns.get(role, "")
        cell = row.get(column)
        if column and isinstance(cell, str):
            yield column, cell
        elif column and isinstance(cell, list):
            turns = cell if role != "messages" else [one for one in cell if _is_answer(one) == (part == "written")]
            if turns:
                yield column, " ".join(map(_said, turns))


def whole_texts(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Column to all its running text, of each column in which some may stand."""
    found = {columns[role]: "" for roles, _ in PARTS.values() for role in roles if role in columns}
    for part in PARTS:
        for column, text in cells(row, columns, part):
            found[column] = text if found[column] in ("", text) else f"{found[column]} {text}"
    return found


def _is_answer(turn: Any) -> bool:
    """Whether a turn of a conversation is the model's; of any of the usual forms."""
    return isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("assistant", "gpt", "model", "bot")


def _said(one: object) -> str:
    """A word, or what a turn says, also in ShareGPT's form."""
    said = (one.get("value") if one.get("content") is None else one["content"]) if isinstance(one, dict) else one
    return "" if said is None else str(said)
