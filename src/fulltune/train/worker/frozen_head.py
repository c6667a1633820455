"""Another task of the user's, scored by a head that was fitted on what the untouched model made of its texts.

The head is frozen, so that what it says falls only by what the model under it forgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.forgetting.drift import GenericText, measured
from fulltune.probe.layers import NoProbe
from fulltune.probe.linear import Items, Linear, best, fits, loss
from fulltune.records.forgetting import OTHER_TASK, LabelledText, OnTask, OtherTask
from fulltune.text import format_percent
from fulltune.train.worker.context import AttemptContext

PHASE = "fitting a head for the other task (preserve.task)"
ERRORS = 2.0
"""Standard errors by which a head must be better than the most frequent label."""


@dataclass(frozen=True)
class HeadRows:
    """Some rows of the other task, as a model and the frozen head read them."""

    text: GenericText
    labels: np.ndarray
    head: Linear

    def read(self, model: Any, between: Callable[[], None]) -> np.ndarray:
        """The probability of each row's right label, and 1 where it is the likeliest: float64 [rows, 2]."""
        return right(self.head(self.text.read(model, between=between)), self.labels)


@dataclass(frozen=True)
class FrozenHead:
    """The rows that are scored."""

    source: str
    choosing: HeadRows
    sealed: HeadRows
    says_little: str
    """Why they tell nothing; empty: they do."""


def fit_head(attempt: AttemptContext) -> FrozenHead | None:
    """Fit the head on the untouched model, and say how good it is; None: the plan has no other task.

    Raises:
        SetupError: When none can be fitted.
    """
    file = attempt.recipe.preserve.task
    if file is None or attempt.plan.preserving is None or attempt.request.probe:
        return None
    if not attempt.is_main and not attempt.trainer.is_shared:  # the first process alone reads the rows
        return None
    attempt.recorder.phase(PHASE)
    rows, model = OtherTask.load(attempt.data / OTHER_TASK), attempt.trainer.model
    fitting, choosing, sealed = (_part(attempt, part) for part in (rows.fitting, rows.choosing, rows.sealed))

    def items(text: GenericText, labels: np.ndarray) -> Items:
        states = text.read(model, between=attempt.alive).astype(np.float32)
        return Items("single_label", states, labels, np.arange(len(labels)), len(rows.labels))

    try:
        with attempt.journal.during("evaluation"):  # memory as for an evaluation, and the same way out
            held_out = items(*choosing)
            head = best(items(*fitting), held_out, fits, loss)[-1]
    except NoProbe as no:
        raise SetupError(f"preserve.task: {file}: no head can be fitted: {no}; name another task") from None
    if attempt.observed.meter is not None:
        attempt.observed.meter.forget_peak()  # scikit-learn's memory is not the training's
    accuracy = float(right(head(held_out.features), held_out.labels)[:, 1].mean())
    most_frequent = np.bincount(fitting[1]).argmax()
    frequent = float((held_out.labels == most_frequent).mean())
    attempt.journal.write(
        "other task",
        f"{len(rows.fitting):,} rows fit a head, {len(rows.choosing):,} for selection, {len(rows.sealed):,} sealed, "
        f"{rows.left_out:,} are left out (no text or label, or several labels); of the untouched model its accuracy is "
        f"{format_percent(accuracy)} (the most frequent label: {format_percent(frequent)})",
    )
    if why := tells_nothing(accuracy, frequent, len(held_out.labels)):
        attempt.journal.write("warning", why)
        attempt.recorder.warn(why)
    return FrozenHead(file, HeadRows(*choosing, head), HeadRows(*sealed, head), why)


def _part(attempt: AttemptContext, rows: Sequence[LabelledText]) -> tuple[GenericText, np.ndarray]:
    return attempt.drifting.text_of([text for text, _ in rows]), np.array([label for _, label in rows])


def right(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability of each row's right label, and 1 where it is the likeliest: float64 [rows, 2].

    Args:
        outputs: Of the head, [rows, labels].
        labels: The right ones, [rows].
    """
    chances = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return np.stack([chances[np.arange(len(labels)), labels], outputs.argmax(axis=1) == labels], axis=1)


def fallen(before: np.ndarray, after: np.ndarray) -> OnTask:
    """What two models make of the same rows, as `right` gives it: compared row by row."""
    accuracy_before, accuracy = (float(one[:, 1].mean()) for one in (before, after))
    # A rise of what is lost, as of a language model's loss.
    return OnTask(fall=measured(after[:, 0], before[:, 0]), accuracy_before=accuracy_before, accuracy=accuracy)


def tells_nothing(accuracy: float, frequent: float, rows: int) -> str:
    """Why a head is of no use; empty: it is.

    Args:
        accuracy: Of the untouched model with the head, on the selection rows.
        frequent: Of the label that is the most frequent one among the rows that fit it.
        rows: Of these.
    """
    if accuracy - ERRORS * math.sqrt(accuracy * (1 - accuracy) / rows) > frequent:
        return ""
    return (
        f"preserve.task: with a frozen head the untouched model has an accuracy of {format_percent(accuracy)} on "
        f"{rows:,} rows, not clearly more than the most frequent label ({format_percent(frequent)}): the task tells "
        "nothing about forgetting; name one that the untouched model knows, or more rows"
    )
