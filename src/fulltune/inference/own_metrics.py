"""Metrics that are the user's own functions, named in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import describe_error, is_own, load_function
from fulltune.system.memory import is_out_of_memory
from fulltune.tasks import PLACE, Row

_ADVICE = "it must return a number, or a list with one number per row, for any selection of rows; correct the function"


def own_metric_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the user's metrics; one that selects the checkpoint is the first."""
    chosen = recipe.evaluate.metric
    first = (chosen,) if is_own(chosen) else ()
    return tuple(dict.fromkeys([*first, *recipe.evaluate.metrics]))


def own_scores(
    names: Sequence[str], answers: Sequence[Any], expected: Sequence[Any], rows: Sequence[Row]
) -> dict[str, np.ndarray]:
    """Return each own metric's values: float64 [rows] by name. A single number is repeated for every row.

    `answers` and `expected` are words: texts, names of labels, or numbers. Raises `SetupError`, with the row, if a
    function fails or returns anything but finite numbers. `import_functions` must have been called in this process.
    """
    return {name: np.full(len(rows), own_values(name, answers, expected, rows), np.float64) for name in names}


def own_values(name: str, answers: Sequence[Any], expected: Sequence[Any], rows: Sequence[Row]) -> float | np.ndarray:
    """Return what an own metric returns: a number, or float64 [rows]. Raise `SetupError` if it is anything else."""
    places, function = [str(row.get(PLACE, "a row")) for row in rows], load_function(name)
    plain = [{column: value for column, value in row.items() if column != PLACE} for row in rows]
    both = [list(answers), list(expected), plain]
    try:
        returned = function(*both)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        row = _first_failing(function, both, places)
        raise SetupError(f"'{name}': failed on {row} with {describe_error(error)}; {_ADVICE}") from error
    try:
        values = np.asarray(returned)
    except ValueError:  # lists of different lengths
        values = np.asarray(None)

    def where(number: int) -> str:
        return places[number] if values.ndim and number < len(places) else f"{len(places)} rows"

    if values.dtype.kind not in "biuf" or values.ndim > 1:
        numbers = values.tolist() if values.ndim else [returned]
        wrong = next((n for n, one in enumerate(numbers) if not isinstance(one, (int, float))), 0)
        raise SetupError(f"'{name}': returned {numbers[wrong]!r:.60} for {where(wrong)}, not a number; {_ADVICE}")
    if values.ndim and len(values) != len(rows):
        raise SetupError(f"'{name}': returned {len(values)} values for {len(rows)} rows ({places[0]} ...); {_ADVICE}")
    if not np.isfinite(values).all():
        wrong = int(np.argmin(np.isfinite(values)))
        raise SetupError(f"'{name}': returned {values.flat[wrong]} for {where(wrong)}, which is not finite; {_ADVICE}")
    return values.astype(np.float64) if values.ndim else float(values)


def _first_failing(function: Callable[..., Any], both: Sequence[list[Any]], places: Sequence[str]) -> str:
    """Return the location of the first row on which the function fails alone, or the number of rows."""
    for number, place in enumerate(places):
        try:
            function(*(values[number : number + 1] for values in both))
        except Exception:  # the caller reports the error
            return place
    return f"{len(places)} rows together"
