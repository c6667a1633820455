"""Metrics that are the user's own functions, named in the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.inference.store import Rows, read_original_rows
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import import_functions, is_own, load_function
from fulltune.recipe.tasks import FACTS
from fulltune.system.memory import call_own
from fulltune.tasks import PLACE, Predictions, Row, Target, question_answering, task_named, token_classification
from fulltune.tasks.classes import predict_labels
from fulltune.tasks.multiple_choice import choice_texts

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


def label_words(labels: np.ndarray, target: Target, rows: Sequence[Row]) -> list[Any]:
    """Return predicted or true labels as words: each row's label, list of labels, number, or text of a choice."""
    if target.form.is_number:
        return [float(value) for value in labels]
    if target.num_choices:
        return [choice_texts(row, target)[int(choice)] for row, choice in zip(rows, labels, strict=True)]
    if target.form.several_labels:
        return [[name for name, on in zip(target.labels, row, strict=True) if on >= 0.5] for row in labels]
    return [target.labels[int(label)] for label in labels]


def score_labels(
    recipe: Recipe, predictions: Predictions, target: Target, split: Path, positions: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Return the own metrics of a classifier's predictions for a split's rows (default: all), or {} for other tasks."""
    names = own_metric_names(recipe)
    if not names or FACTS[recipe.task].scored_by != "classifiers":
        return {}
    import_functions(recipe.own_functions, recipe.functions)
    rows = list(read_original_rows(split))
    rows = rows if positions is None else [rows[position] for position in positions]
    answers = label_words(predict_labels(predictions["logits"], target), target, rows)
    return own_scores(names, answers, label_words(predictions["labels"], target, rows), rows)


def try_own_metrics(recipe: Recipe, target: Target, data: Path) -> None:
    """Call the own metrics with the expected answers of two eval rows. Raise `SetupError` with all problems."""
    if not (names := own_metric_names(recipe)):
        return
    kind, problems = FACTS[recipe.task].scored_by, list[str]()
    rows, expected = list(islice(read_original_rows(data / "eval"), 2)), list[Any]()
    match kind:
        case "classifiers":
            labels = np.array([row["labels"] for row in Rows(data / "eval")[: len(rows)]])
            expected = label_words(labels, target, rows)
        case "tagging":
            expected = [token_classification.words_and_tags(row, target.columns)[1] for row in rows]
        case "spans":
            expected = [[text for text, _ in question_answering.accepted_answers(row, target)] for row in rows]
        case "language":
            expected = [task_named(recipe.task).answer_text(row, target) for row in rows]
    answers = [one[0] if one else "" for one in expected] if kind == "spans" else expected
    for name in names:
        setting = recipe.own_functions[name]
        try:
            values = own_values(name, answers, expected, rows)
        except SetupError as error:
            problems += [f"{setting}: {problem}" for problem in error.problems]
            continue
        if recipe.methods and name == recipe.evaluate.metric and isinstance(values, float):
            problems.append(f"{setting}: '{name}' returns one number, but a comparison needs one for each row")
    if problems:
        raise SetupError(problems)


def own_values(name: str, answers: Sequence[Any], expected: Sequence[Any], rows: Sequence[Row]) -> float | np.ndarray:
    """Return what an own metric returns: a number, or float64 [rows]. Raise `SetupError` if it is anything else."""
    places, function = [str(row.get(PLACE, "a row")) for row in rows], load_function(name)
    plain = [{column: value for column, value in row.items() if column != PLACE} for row in rows]
    arguments = [list(answers), list(expected), plain]
    try:
        returned = call_own(f"'{name}': the function", function, *arguments)
    except SetupError as error:
        raise SetupError(f"{error} on {_first_failing(function, arguments, places)}; {_ADVICE}") from error
    try:
        values = np.asarray(returned)
    except ValueError:  # lists of different lengths
        values = np.asarray(None)
    numbers = np.atleast_1d(values).tolist()
    if values.ndim and len(numbers) != len(rows):
        raise SetupError(f"'{name}': returned {len(numbers)} values for {len(rows)} rows ({places[0]} ...); {_ADVICE}")
    for place, number in zip(places if values.ndim else [f"{len(rows)} rows"], numbers, strict=True):
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise SetupError(f"'{name}': returned {number!r:.60} for {place}, not a finite number; {_ADVICE}")
    return values.astype(np.float64) if values.ndim else float(values)


def _first_failing(function: Callable[..., Any], arguments: Sequence[list[Any]], places: Sequence[str]) -> str:
    """Return the location of the first row on which the function fails alone, or the number of rows."""
    for number, place in enumerate(places):
        try:
            function(*(values[number : number + 1] for values in arguments))
        except Exception:  # the caller reports the error
            return place
    return f"{len(places)} rows together"
