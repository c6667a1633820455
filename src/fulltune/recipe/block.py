"""What all blocks of a recipe have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run or a method may be called: it becomes the name of a folder."""


class Block(BaseModel):
    """Base of all blocks: frozen, unknown keys refused, the string under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
