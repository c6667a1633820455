"""The recipe's block `preserve`: what the model could do before."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from fulltune.recipe.model import Block
from fulltune.text import parse_share

AUTO = "auto"
BUNDLED = "docstrings of Python's standard library"
"""Generic text that every installation has."""


def _a_share(value: Any) -> Any:
    """A share as `text.parse_share` reads it; other types are left to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"expected a share such as 1% or 0.01, found {value}")
    if isinstance(value, (str, int, float)):
        parse_share(value)
    return value


def _a_file(value: Any) -> Any:
    """Other words for nothing are answered."""
    if value is False or (isinstance(value, str) and value.lower() in ("none", "no", "off", "false", "")):
        raise ValueError(f"expected a text file or auto, found '{value}'; for none write null")
    return value


Share = Annotated[str | float, BeforeValidator(_a_share)]
"""Such as `1%` or `0.01`."""


class PreserveBlock(Block):
    """What the model could do before training is watched, and with a budget kept: full fine-tuning moves every weight,
    also those that other abilities rest on."""

    drift: bool = True
    """At each evaluation, measure how far the model has moved away on generic text: for language models by how much
    its loss rose, for others how far its hidden states have changed. Costs about 1 % of the training, more of a very
    short one: at least 8 texts are read."""
    probe: str | None = None
    """A text file of what the model could do before: one text a line, or paragraphs. Left out: docstrings of Python's
    standard library."""
    budget: Share | None = None
    """How far generic text may move at most, such as `1%`: a token of it gets so much less likely (language models),
    or the mean hidden state turns by so much, 1 - cosine (others). Generic text is replayed with a weight that is
    raised as the budget is spent; of the points between the untouched and the trained model the best one within the
    budget is kept, and certified on texts that nothing else has read. For full and lora, also in a comparison."""
    replay: Annotated[str | None, BeforeValidator(_a_file)] = AUTO
    """Where the generic text that is replayed comes from: a text file; `auto`, a part of the probe's texts.
    `null`: none is replayed."""

    @property
    def limit(self) -> float | None:
        """The budget as a share."""
        return None if self.budget is None else parse_share(self.budget)
