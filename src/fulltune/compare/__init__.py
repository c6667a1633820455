"""Full fine-tuning against its cheaper rivals on the same rows: fair, counted and with a verdict."""

from fulltune.compare.lint import lint as find_unfair
from fulltune.compare.sequential import look
from fulltune.compare.verdict import ArmItems, decide

__all__ = ["ArmItems", "decide", "find_unfair", "look"]
