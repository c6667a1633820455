"""Was it worth it? One sentence, made from the scores on the test rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records import Estimate, Scores
from fulltune.report import words


@dataclass(frozen=True)
class Verdict:
    """The headline of the report."""

    kind: Literal["better", "worse", "unresolved", "alone", "none"]
    """`alone`: scored, with nothing to compare to. `none`: the trained model was not scored."""
    sentence: str
    note: str = ""
    """Which trial the headline is about, when there are several."""
    warning: str = ""

    @property
    def label(self) -> str:
        return {
            "better": "Better than without training",
            "worse": "Worse than without training",
            "unresolved": "Difference not resolved",
            "alone": "Nothing to compare with",
            "none": "No verdict",
        }[self.kind]


@dataclass(frozen=True)
class Ruling:
    """The headline of a proof card."""

    kind: Literal["full", "peft", "equivalent", "undecided"]
    label: str
    """The verdict itself, with the method it names."""
    sentence: str
    note: str = ""
    """On what terms it holds."""
    warning: str = ""
    """That there are marks, to be read before it is believed."""


def headline_row(scores: Sequence[Scores]) -> Scores | None:
    """The trained row that the headline is about: the first trial by name.

    Choosing the best one on the test rows would make the headline better than the truth.
    """
    return min((row for row in scores if row.kind == "trained"), key=lambda row: row.name, default=None)


def strongest_untrained(scores: Sequence[Scores], metric: str, greater_is_better: bool) -> Scores | None:
    """The best baseline, or the model before training: the highest bar that the trained model has to pass."""
    rows = [row for row in scores if row.kind != "trained" and metric in row.metrics]
    rows = [row for row in rows if math.isfinite(row.metrics[metric].value)]
    sign = 1 if greater_is_better else -1
    return max(rows, key=lambda row: sign * row.metrics[metric].value, default=None)


def judge(scores: Sequence[Scores], why_unscored: str = "") -> Verdict:
    """Compare the trained model with the best row that needed no training.

    Args:
        scores: All rows, in any order.
        why_unscored: What to say when no trained model was scored.

    Returns:
        The headline; `better` or `worse` only when the two intervals do not touch.
    """
    row = headline_row(scores)
    if row is None:
        reason = f": {why_unscored}" if why_unscored else "."
        return Verdict("none", f"No trained model was scored on the test rows{reason}")
    others = sum(other.kind == "trained" for other in scores) - 1
    note = ""
    if others:
        note = (
            f"This is the first of {others + 1} trained trials by name, {row.name}: picking the best one on the test "
            "rows would flatter it. The table has all of them."
        )
    name = row.main_metric
    mine = row.metrics.get(name)
    if mine is None or not _finite(mine):
        return Verdict("none", f"{row.name} has no finite {words.metric_name(name)} on the test rows.", note)
    direction = "" if row.greater_is_better else " (smaller is better)"
    measured = f"{words.metric_name(name)} {words.estimate(name, mine)}{direction}"
    claim = f"{row.name} has {measured} on {words.counted(row.rows, 'test row')}"
    bar = strongest_untrained(scores, name, row.greater_is_better)
    if bar is None:
        return Verdict("alone", f"{claim}; no baseline was scored to compare it with.", note)
    theirs = bar.metrics[name]
    elsewhere = "" if bar.rows == row.rows else f" on {words.counted(bar.rows, 'row')}"
    which = "the model before training" if bar.kind == "untouched" else f"the best baseline, {bar.name}"
    claim = f"{claim}, against {words.estimate(name, theirs)}{elsewhere} for {which}"
    level = f"{100 * row.confidence:g}%"
    if theirs.low <= mine.high and mine.low <= theirs.high:
        ending = f"the {level} intervals overlap, so the difference is not resolved by this many rows."
        return Verdict("unresolved", f"{claim}; {ending}", note)
    won = (mine.value > theirs.value) == row.greater_is_better
    if won:
        return Verdict("better", f"{claim}; the {level} intervals are apart.", note)
    ending = "training made it worse" if bar.kind == "untouched" else "the baseline needs no training"
    return Verdict("worse", f"{claim}; the {level} intervals are apart, and {ending}.", note)


def _finite(estimate: Estimate) -> bool:
    return all(math.isfinite(value) for value in (estimate.value, estimate.low, estimate.high))
