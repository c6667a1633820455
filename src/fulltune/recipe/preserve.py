"""The recipe's block `preserve`: what the model could do before."""

from __future__ import annotations

from fulltune.recipe.block import Block


class PreserveBlock(Block):
    """What the model could do before training is watched: full fine-tuning moves every weight, also those that other
    abilities rest on."""

    drift: bool = True
    """At each evaluation, measure how far the model has moved away on generic text: for language models by how much
    its loss rose, for others how far its hidden states have turned. Costs about 1 % of the training."""
    probe: str | None = None
    """A text file of what the model could do before: one text a line, or paragraphs. Left out: docstrings of Python's
    standard library."""
