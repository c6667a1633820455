"""All checks of single texts, in the order in which their repairs follow each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from fulltune.audit import content, encoding, leftovers, personal
from fulltune.audit.flaw import Flaw, TextCheck
from fulltune.audit.refusal import refusal
from fulltune.audit.secret import secret

_CHECKS: Mapping[TextCheck, Callable[[str], Flaw | None]] = {
    "broken encoding": encoding.broken_encoding,
    "control characters": encoding.control_characters,
    "empty": content.empty,
    "no words": content.no_words,
    "markup": leftovers.markup,
    "placeholder": leftovers.placeholder,
    "chat tokens": leftovers.chat_tokens,
    "repetition": content.repetition,
    "secret": secret,
    "personal data": personal.personal_data,
    "phone number": personal.phone_number,
    "refusal": refusal,
}
OF_TEXTS: tuple[TextCheck, ...] = tuple(check for check in _CHECKS if check != "refusal")
"""What can be wrong with a text that a model reads."""
OF_ANSWERS: tuple[TextCheck, ...] = tuple(check for check in _CHECKS if check != "no words")
"""With one that it learns to write: `42` is an answer, and a refusal is a bad one."""


def missing() -> dict[TextCheck, str]:
    """Checks whose package is not installed, with the extra that brings it: leave them out of `checks`, and say so."""
    return {} if personal.knows_phone_numbers() else {"phone number": "audit"}


def flaws(text: str, checks: Collection[TextCheck] = OF_TEXTS) -> list[Flaw]:
    """What is wrong with a text, one entry a check.

    Args:
        text: As it stands in its row.
        checks: Which to make: `OF_TEXTS`, `OF_ANSWERS`, or some of them.

    Raises:
        SetupError: When a check's package is missing; `missing` tells beforehand.
    """
    return [flaw for check in checks if (flaw := _CHECKS[check](text)) is not None]


def repaired(text: str, checks: Collection[TextCheck]) -> str:
    """The text after the repairs of these checks, each on what the one before it left."""
    for check, find in _CHECKS.items():
        if check in checks and (flaw := find(text)) is not None and flaw.fixed is not None:
            text = flaw.fixed
    return text
