"""Several machines in what follows `--for`: `4x 8x A100-80GB` is four machines of eight GPUs each."""

from __future__ import annotations

import re

from fulltune.errors import RecipeError

_MACHINES = re.compile(r"\s*(\d+)\s*[x×*]\s*(\d+\s*[x×*].*)", re.IGNORECASE | re.DOTALL)
"""A count in front of another count."""


def machines_in(words: str) -> tuple[int, str]:
    """How many machines are meant, and what each of them has.

    `fulltune plan --for` and `fulltune launch --for` both read their words with this; what is left is for
    `plan.gpus.parse`. One count alone is of GPUs: `8x A100-80GB` is one machine. Four machines without a GPU are
    `4x 1x cpu`.

    Args:
        words: As given after `--for`.

    Returns:
        The number of machines, and the words without it: `(4, "8x A100-80GB")`.

    Raises:
        RecipeError: For no machine at all.
    """
    found = _MACHINES.fullmatch(words)
    if found is None:
        return 1, words
    if int(found[1]) == 0:
        raise RecipeError(f"--for: '{words}' has no machine; write 1x or more in front, or leave it out")
    return int(found[1]), found[2]
