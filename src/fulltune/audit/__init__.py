"""What is wrong with single rows of a data set: pure functions of their texts, with a repair where there is one."""

from fulltune.audit.flaw import Flaw, TextCheck
from fulltune.audit.texts import OF_ANSWERS, OF_TEXTS, flaws, masked_text, missing, repaired

__all__ = ["OF_ANSWERS", "OF_TEXTS", "Flaw", "TextCheck", "flaws", "masked_text", "missing", "repaired"]
