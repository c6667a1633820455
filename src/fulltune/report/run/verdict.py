"""Was it worth it? One sentence, made from the scores on the test rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fulltune.records.scores import Estimate, Scores
from fulltune.report.format import words
from fulltune.report.format.blocks import Headline
from fulltune.report.run.read import trained_row
from fulltune.text import counted, is_share

_LABELS = {
    "better": "Better than without training",
    "contested": "Generated answers are no better",
    "worse": "Worse than without training",
    "unresolved": "Difference not resolved",
    "unpaired": "Difference not known",
    "alone": "Nothing to compare with",
    "none": "No verdict",
}
"""Kind of verdict to what stands above it. `contested`: better by its loss alone. `unpaired`: there is no
difference on the same rows. `alone`: scored, with nothing to compare to. `none`: the trained model was not scored."""
OF_ANSWERS = ("rougeL", "chrf", "exact_match", "bleu")
"""Metrics of generated answers: the first that was computed says whether they are better."""
_UNPAIRED = (
    "Their difference on the same rows was not measured; runs of older versions lack it. To have it, delete the run's "
    "folder 'scores', then give the run's folder to 'fulltune run'."
)
_LONE = "The test rows are {}: more of them, on other texts, are needed to tell a difference from chance."
_OTHER_ROWS = "They were not scored on the same rows, so their difference is not known."


def strongest_untrained(scores: Sequence[Scores], metric: str, greater_is_better: bool) -> Scores | None:
    """The best baseline, or the model before training: the highest bar that the trained model has to pass."""
    rows = [row for row in scores if row.kind != "trained" and metric in row.metrics]
    rows = [row for row in rows if math.isfinite(row.metrics[metric].value)]
    sign = 1 if greater_is_better else -1
    return max(rows, key=lambda row: sign * row.metrics[metric].value, default=None)


def judge(scores: Sequence[Scores], why_unscored: str = "") -> Headline:
    """Compare the trained model with the best row without training: better or worse only if the interval excludes 0."""
    row = trained_row(scores)
    if row is None:
        return _headline(
            "none", f"No trained model was scored on the test rows{why_unscored and ': '}{why_unscored or '.'}"
        )
    name = row.main_metric
    mine = row.metrics.get(name)
    if mine is None or not _finite(mine):
        return _headline("none", f"{row.name} has no finite {words.metric_name(name)} on the test rows.")
    direction = "" if row.greater_is_better else " (smaller is better)"
    measured = f"{words.metric_name(name)} {words.estimate(name, mine)}{direction}"
    claim = f"{row.name} has {measured} on {counted(row.rows, 'test row')}"
    bar = strongest_untrained(scores, name, row.greater_is_better)
    if bar is None:
        return _headline("alone", f"{claim}; no baseline was scored to compare it with.")
    elsewhere = "" if bar.rows == row.rows else f" on {counted(bar.rows, 'row')}"
    which = "the model before training" if bar.kind == "untouched" else f"the best baseline, {bar.name}"
    claim = f"{claim}, against {words.estimate(name, bar.metrics[name])}{elsewhere} for {which}"
    ahead = row.differences.get(bar.name)
    if ahead is None or not _finite(ahead):
        said = _LONE.format(mine.lone) if mine.lone else _UNPAIRED if bar.rows == row.rows else _OTHER_ROWS
        return _headline("unpaired", f"{claim}. {said}")
    kind = "better" if (ahead.value > 0) == row.greater_is_better else "worse"
    if ahead.low <= 0 <= ahead.high:
        kind = "unresolved"
    compared = f"its {words.metric_name(name)} differs by {difference(name, ahead, row.confidence)}"
    answers = _answers_no_better(row, scores) if kind == "better" else ""
    ending = "; these rows do not tell which is better" if kind == "unresolved" else ""
    if kind == "worse":
        ending = ", and training made it worse" if bar.kind == "untouched" else ", and the baseline needs no training"
    sentence = f"{claim}. On the same rows, {compared}{ending}.{answers}"
    return _headline("contested" if answers else kind, sentence)


def _headline(kind: str, sentence: str) -> Headline:
    return Headline(kind, _LABELS[kind], sentence)


def _answers_no_better(row: Scores, scores: Sequence[Scores]) -> str:
    """That generated answers are worse than without training, or all empty, in a sentence; empty where they are not."""
    name = next((name for name in OF_ANSWERS if name in row.metrics and row.answers), "")
    bar = strongest_untrained(scores, name, greater_is_better=True)
    if bar is None:
        return ""
    mine, theirs = row.metrics[name], bar.metrics[name]
    says_something = any(answer.predicted.strip() for answer in row.answers)
    if mine.value > theirs.value or (mine.value == theirs.value and says_something):
        return ""
    them = "generated answers are no better" if says_something else "generated answers are all empty"
    values = f"{words.metric_name(name)} {words.estimate(name, mine)}, against {words.estimate(name, theirs)}"
    return f" But its {them}: {values} for {bar.name}."


def difference(metric: str, found: Estimate, confidence: float) -> str:
    """`+10.9 points (95% interval: +8.0 to +14.0)`."""
    size, digits, unit = (100.0, ".1f", " points") if is_share(metric) else (1.0, ".3g", "")
    value, low, high = (f"{size * one + 0.0:+{digits}}" for one in (found.value, found.low, found.high))
    return f"{value}{unit} ({100 * confidence:g}% interval: {low} to {high})"


def _finite(estimate: Estimate) -> bool:
    return all(math.isfinite(value) for value in (estimate.value, estimate.low, estimate.high))
