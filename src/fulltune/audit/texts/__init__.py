"""What is wrong with single texts: pure functions of them, with a repair where there is one."""

from fulltune.audit.texts.checks import (
    OF_ANSWERS,
    OF_TEXTS,
    flaws,
    found_by,
    masked_cells,
    masked_text,
    missing,
    repaired,
)
from fulltune.audit.texts.flaw import Flaw, TextCheck

__all__ = [
    "OF_ANSWERS",
    "OF_TEXTS",
    "Flaw",
    "TextCheck",
    "flaws",
    "found_by",
    "masked_cells",
    "masked_text",
    "missing",
    "repaired",
]
