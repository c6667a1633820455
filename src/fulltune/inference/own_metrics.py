"""Metrics that are the user's own functions, named in the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.inference.store import Rows, read_original_rows
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import IMPORTED, is_own
from fulltune.system.memory import call_own
from fulltune.tasks import PLACE, Predictions, Row, Target, task_named
from fulltune.tasks.classes import predict_labels

_ADVICE = "it must return a number, or a list with one number per row, for any selection of rows; correct the function"


def own_metric_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the user's metrics; one that selects the checkpoint is the first."""
    chosen = [recipe.evaluate.metric] if is_own(recipe.evaluate.metric) else []
    return tuple(dict.fromkeys([*chosen, *recipe.evaluate.metrics]))


def own_scores(
    names: Sequence[str], answers: Sequence[Any], expected: Sequence[Any], rows: Sequence[Row]
) -> dict[str, np.ndarray]:
    """Return each own metric's values: float64 [rows] by name. A single number is repeated for every row.

    `answers` and `expected` are texts, names of labels, or numbers. Raises `SetupError`, with the row, if a function
    fails or returns anything but finite numbers. `import_functions` must have been called in this process.
    """
    return {name: np.full(len(rows), own_values(name, answers, expected, rows), np.float64) for name in names}


def label_words(labels: np.ndarray, target: Target) -> list[Any]:
    """Return predicted or true labels as words: each row's label, list of labels, number, or number of a choice."""
    if target.form.several_labels:
        return [[name for name, on in zip(target.labels, row, strict=True) if on >= 0.5] for row in labels]
    return [target.labels[int(label)] for label in labels] if target.labels else labels.tolist()


def score_labels(recipe: Recipe, predictions: Predictions, target: Target, split: Path) -> dict[str, np.ndarray]:
    """Return the own metrics of a classifier's predictions for a split's rows, or {} for other tasks."""
    if not (names := own_metric_names(recipe)) or target.form.writes_answers:
        return {}
    answers = label_words(predict_labels(predictions["logits"], target), target)
    return own_scores(names, answers, label_words(predictions["labels"], target), list(read_original_rows(split)))


def try_own_metrics(recipe: Recipe, target: Target, data: Path) -> None:
    """Call the own metrics with the expected answers of two eval rows. Raise `SetupError` if one fails, or is a single
    number that cannot decide a comparison."""
    if not (names := own_metric_names(recipe)):
        return
    rows = list(islice(read_original_rows(data / "eval"), 2))
    if target.form.writes_answers:
        expected: list[Any] = [task_named(recipe.task).answer_text(row, target) for row in rows]
    else:
        expected = label_words(np.array([row["labels"] for row in Rows(data / "eval")[: len(rows)]]), target)
    for name in names:
        values = own_values(name, expected, expected, rows)
        if recipe.methods and name == recipe.evaluate.metric and isinstance(values, float):
            raise SetupError(f"evaluate.metric: '{name}' returns one number; a comparison needs one for each row")


def own_values(name: str, answers: Sequence[Any], expected: Sequence[Any], rows: Sequence[Row]) -> float | np.ndarray:
    """Return what an own metric returns: a number, or float64 [rows]. Raise `SetupError` if it is anything else."""
    places, returned = [str(row.get(PLACE, "a row")) for row in rows], _call(name, answers, expected, rows)
    values = np.asarray(returned, object)
    if values.ndim and len(values) != len(rows):
        raise SetupError(f"'{name}': returned {len(values)} values for {len(rows)} rows ({places[0]} ...); {_ADVICE}")
    for place, value in zip(places if values.ndim else [f"{len(rows)} rows"], np.atleast_1d(values), strict=True):
        if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)) or not math.isfinite(value):
            raise SetupError(f"'{name}': returned {value!r:.60} for {place}, not a finite number; {_ADVICE}")
    return values.astype(np.float64) if values.ndim else float(returned)


def _call(name: str, answers: Sequence[Any], expected: Sequence[Any], rows: Sequence[Row]) -> Any:
    """Call an own metric. If it fails, raise `SetupError` with the first row on which it fails alone, if any."""
    plain = [{column: value for column, value in row.items() if column != PLACE} for row in rows]
    try:
        return call_own(f"'{name}': the function", IMPORTED[name].call, list(answers), list(expected), plain)
    except SetupError as error:
        for place in range(len(rows)) if len(rows) > 1 else ():
            _call(name, answers[place : place + 1], expected[place : place + 1], rows[place : place + 1])
        where = f"{len(rows)} rows together" if len(rows) != 1 else rows[0].get(PLACE, "a row")
        raise SetupError(f"{error} on {where}; {_ADVICE}") from error
