"""What is wrong with single texts: pure functions of them, with a repair where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from fulltune.audit.texts import content, private
from fulltune.audit.texts.flaw import Flaw

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

_UNSEEN = re.compile(
    "[\u034f\u061c\u17b4\u17b5\u180b-\u180e\ufe00-\ufe0f\U0001d173-\U0001d17a]|<wbr>|<!--.*?-->|&shy;|&#8203;",
    re.DOTALL,
)
"""What else nobody sees, and no check repairs, for it may be meant."""


def missing() -> list[str]:
    """Checks that need the extra `audit` where it is not installed: leave them out of `checks`, and say so."""
    known = {"broken encoding": content.knows_encodings(), "phone number": private.knows_phone_numbers()}
    return [check for check, is_known in known.items() if not is_known]


def masked_text(text: str) -> str:
    """A text as it may be shown or listed, before it is shortened: without secrets, personal data, phone numbers."""
    shown = repaired(text, _PRIVATE)
    whole = repaired(_UNSEEN.sub("", shown), _UNCOVERING)
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
