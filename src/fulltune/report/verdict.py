"""Was it worth it? One sentence, made from the scores on the test rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fulltune.records.scores import Estimate, Scores
from fulltune.report.format import words
from fulltune.text import is_share

Kind = Literal["better", "worse", "unresolved", "unpaired", "alone", "none"]


@dataclass(frozen=True)
class Verdict:
    """The headline of the report."""

    kind: Kind
    """`unpaired`: there is no difference on the same rows. `alone`: scored, with nothing to compare to. `none`: the
    trained model was not scored."""
    sentence: str
    brief: str
    """The same without the figures that stand in the table above it in a terminal."""
    note: str = ""
    """Which trial the headline is about, when there are several."""
    warning: str = ""

    @property
    def label(self) -> str:
        return {
            "better": "Better than without training",
            "worse": "Worse than without training",
            "unresolved": "Difference not resolved",
            "unpaired": "Difference not known",
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
        The headline; `better` or `worse` only when the interval of the difference on the same rows leaves out 0.
        Whether two intervals overlap says little: both models are asked the same rows, easy and hard ones alike.
    """
    row = headline_row(scores)
    if row is None:
        said = f"No trained model was scored on the test rows{f': {why_unscored}' if why_unscored else '.'}"
        return Verdict("none", said, said)
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
        said = f"{row.name} has no finite {words.metric_name(name)} on the test rows."
        return Verdict("none", said, said, note)
    direction = "" if row.greater_is_better else " (smaller is better)"
    measured = f"{words.metric_name(name)} {words.estimate(name, mine)}{direction}"
    claim = f"{row.name} has {measured} on {words.counted(row.rows, 'test row')}"
    bar = strongest_untrained(scores, name, row.greater_is_better)
    if bar is None:
        said = "no baseline was scored to compare it with."
        return Verdict("alone", f"{claim}; {said}", said.capitalize(), note)
    elsewhere = "" if bar.rows == row.rows else f" on {words.counted(bar.rows, 'row')}"
    which = "the model before training" if bar.kind == "untouched" else f"the best baseline, {bar.name}"
    claim = f"{claim}, against {words.estimate(name, bar.metrics[name])}{elsewhere} for {which}"
    ahead = row.differences.get(bar.name)
    if ahead is None or not _finite(ahead):
        said = _LONE.format(mine.lone) if mine.lone else _UNPAIRED if bar.rows == row.rows else _OTHER_ROWS
        return Verdict("unpaired", f"{claim}. {said}", said, note)
    kind = _kind(ahead, row.greater_is_better)
    bounds = f"{100 * row.confidence:g}% interval: {_bounds(name, ahead)}"
    compared = f"the {words.metric_name(name)} of {row.name} is {_difference(name, ahead)}"
    than = "as" if ahead.value == 0 else "than"
    brief = f"On the same {words.counted(row.rows, 'test row')}, {compared} {than} that of {which}; {bounds}"
    ending = _ending(kind, bar)
    return Verdict(
        kind,
        f"{claim}. On the same rows, {compared} ({bounds}){ending}.",
        f"{brief}{ending if kind == 'unresolved' else ''}.",
        note,
    )


_UNPAIRED = (
    "Their difference on the same rows was not measured; runs of older versions lack it. To have it, delete the run's "
    "folder 'scores', then give the run's folder to 'fulltune run'."
)
_LONE = "The test rows are {}: more of them, on other texts, are needed to tell a difference from chance."
_OTHER_ROWS = "They were not scored on the same rows, so that their difference is not known."


def _kind(ahead: Estimate, greater_is_better: bool) -> Kind:
    if ahead.low <= 0 <= ahead.high:
        return "unresolved"
    return "better" if (ahead.value > 0) == greater_is_better else "worse"


def _ending(kind: Kind, bar: Scores) -> str:
    match kind:
        case "unresolved":
            return "; these rows do not tell which is better"
        case "worse":
            return ", and training made it worse" if bar.kind == "untouched" else ", and the baseline needs no training"
        case _:
            return ""


def _difference(metric: str, found: Estimate) -> str:
    """`13.0 points lower`."""
    return "the same" if found.value == 0 else f"{_amount(metric, found.value)} {_side(found.value)}"


def _bounds(metric: str, found: Estimate) -> str:
    """`6.5 to 19.5 points lower`, `from 2.0 points lower to 4.1 points higher`."""
    if found.low <= 0 <= found.high:
        return f"from {_amount(metric, found.low)} lower to {_amount(metric, found.high)} higher"
    nearer, farther = sorted((abs(found.low), abs(found.high)))
    return f"{_number(metric, nearer)} to {_amount(metric, farther)} {_side(found.low)}"


def _side(value: float) -> str:
    return "lower" if value < 0 else "higher"


def _number(metric: str, value: float) -> str:
    return f"{100 * abs(value):.1f}" if is_share(metric) else words.number(abs(value))


def _amount(metric: str, value: float) -> str:
    shown = _number(metric, value)
    return f"{shown} {'point' if shown == '1.0' else 'points'}" if is_share(metric) else shown


def _finite(estimate: Estimate) -> bool:
    return all(math.isfinite(value) for value in (estimate.value, estimate.low, estimate.high))
