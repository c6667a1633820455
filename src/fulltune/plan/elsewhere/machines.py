"""Several machines as a person writes them: `4x 8x A100-80GB` are four of eight GPUs."""

from __future__ import annotations

import re

from fulltune.errors import RecipeError
from fulltune.plan import gpus
from fulltune.plan.gpus import Fleet

_COUNT = r"\s*(\d+)\s*[x×*]\s*"


def machines_in(words: str) -> tuple[int, str]:
    """How many machines, and the words for one of them: a count before that of the GPUs; without it 1.

    Raises:
        RecipeError: When there are no machines, or three counts.
    """
    found = re.match(f"{_COUNT}(?={_COUNT})", words, re.IGNORECASE)
    if found is None:
        return 1, words
    number, rest = int(found[1]), words[found.end() :]
    first = words.partition(",")[0].strip()
    if re.match(f"{_COUNT}{_COUNT}", rest, re.IGNORECASE):
        raise RecipeError(f"--for: '{first}' has too many counts; write machines, then GPUs of each: 4x 8x A100-80GB")
    if number == 0:
        raise RecipeError(f"--for: '{first}' has no machine; write 1x or more")
    return number, rest


def fleet_of(words: str) -> Fleet:
    """The hardware that `--for` names.

    Raises:
        RecipeError: Naming every part that cannot be read.
    """
    number, rest = machines_in(words)
    return gpus.parse(rest, number)
