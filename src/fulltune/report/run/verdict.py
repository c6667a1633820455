from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fulltune.records.plan import Plan
from fulltune.records.scores import Confusion, Estimate, Scores
from fulltune.records.training import Outcome
from fulltune.report.format import words
from fulltune.report.format.blocks import Headline
from fulltune.report.run.about_forgetting import describe_budget_cost
from fulltune.report.run.about_training import collect_curves, judge_fit_from_curves
from fulltune.report.run.read import RunView, trained_row
from fulltune.stats.curves import Curves, Fit, final_loss_if_falling, judge_final_loss, without_cause
from fulltune.text import counted, format_metric, format_number, is_share, listed

_LABELS = {
    "better": "Better than every baseline",
    "contested": "Generated answers are no better",
    "loss-only": "Lower loss; answers not measured",
    "worse": "Worse than the best baseline",
    "unresolved": "Difference inconclusive",
    "unpaired": "Difference unknown",
    "alone": "Nothing to compare with",
    "none": "No verdict",
}
"""Headlines by verdict. `contested`: better by loss only. `loss-only`: better by loss, and answers do not tell.
`unpaired`: the difference on the same rows is unknown."""
_TO_MEASURE = "set evaluate.generate_rows above 0 and, if one answer is right, evaluate.metric: exact_match."
_NOT_MEASURED = "Their difference on the same rows was not measured."
_LONE = "The test rows are {}: more rows with other texts are needed to distinguish a difference from chance."


def find_best_untrained(scores: Sequence[Scores], metric: str, greater_is_better: bool) -> Scores | None:
    """Return the best finite score without training (a baseline's or the pretrained model's), or None."""
    rows = [row for row in scores if row.kind != "trained" and metric in row.metrics]
    rows = [row for row in rows if math.isfinite(row.metrics[metric].value)]
    sign = 1 if greater_is_better else -1
    return max(rows, key=lambda row: sign * row.metrics[metric].value, default=None)


def judge_scores(scores: Sequence[Scores], why_unscored: str = "", writes_answers: bool = False) -> Headline:
    """Return a headline that compares the trained model with the best untrained one. A clear verdict needs a difference
    whose interval excludes 0. Of a model that `writes_answers`, a loss alone says nothing about them."""
    row = trained_row(scores)
    if row is None:
        return _build_headline(
            "none", f"No trained model was scored on the test rows{why_unscored and ': '}{why_unscored or '.'}"
        )
    name = row.main_metric
    mine = row.metrics.get(name)
    if mine is None or not _is_finite(mine):
        return _build_headline("none", f"{row.name} has no finite {words.metric_name(name)} on the test rows.")
    measured = f"{words.metric_name(name)} {words.format_estimate(name, mine)}"
    measured += "" if row.greater_is_better else " (smaller is better)"
    claim = f"{row.name} has {measured} on {counted(row.metrics[name].rows or row.rows, 'test row')}"
    bar = find_best_untrained(scores, name, row.greater_is_better)
    if bar is None:
        return _build_headline("alone", f"{claim}; no baseline was scored to compare it with.")
    which = "the pretrained model" if bar.kind == "untouched" else f"the best baseline, {bar.name}"
    claim = f"{claim}, against {words.format_estimate(name, bar.metrics[name])} for {which}"
    ahead = row.differences.get(bar.name)
    if ahead is None or not _is_finite(ahead):
        note = _LONE.format(mine.no_interval_reason) if mine.no_interval_reason else _NOT_MEASURED
        return _build_headline("unpaired", f"{claim}. {note}")
    note = f"{claim}. On the same rows the difference in {words.metric_name(name)} is "
    note += format_difference(name, ahead, row.confidence)
    if ahead.low <= 0 <= ahead.high:
        shown = "these rows do not show which is better" if ahead.value else "their scores are equal"
        return _build_headline("unresolved", f"{note}; {shown}.")
    if (ahead.value > 0) != row.greater_is_better:
        why = "training made it worse" if bar.kind == "untouched" else "the baseline needs no training"
        return _build_headline("worse", f"{note}, and {why}.")
    kind, answers = _judge_answers(row, scores, writes_answers)
    return _build_headline(kind, f"{note}.{answers}")


def _build_headline(kind: str, sentence: str) -> Headline:
    return Headline(kind, _LABELS[kind], sentence)


def _judge_answers(row: Scores, scores: Sequence[Scores], writes_answers: bool) -> tuple[str, str]:
    """Return the kind of a better score's verdict, and a warning if generated answers are empty, no better than without
    training, or not measured while the score is a loss."""
    by_loss, unknown = row.main_metric in ("loss", "perplexity"), " Whether its answers are better is not measured: "
    name = next((name for name in words.OF_ANSWERS if name in row.metrics and row.answers), "")
    bar = find_best_untrained(scores, name, greater_is_better=True)
    if bar is None:
        return ("loss-only", unknown + _TO_MEASURE) if by_loss and writes_answers else ("better", "")
    mine, theirs = row.metrics[name], bar.metrics[name]
    says_something = any(answer.predicted.strip() for answer in row.answers)
    if mine.value == theirs.value and says_something and by_loss:
        equal = f"{words.metric_name(name)} is {format_metric(name, mine.value)} with and without training"
        return "loss-only", f"{unknown}{equal}. Add a metric that fits, such as a function in evaluate.metrics."
    if mine.value > theirs.value or (mine.value == theirs.value and says_something):
        return "better", ""
    them = "generated answers are no better" if says_something else "generated answers are all empty"
    shown, others = words.format_estimate(name, mine), words.format_estimate(name, theirs)
    return "contested", f" But its {them}: {words.metric_name(name)} {shown}, against {others} for {bar.name}."


def format_difference(metric: str, difference: Estimate, confidence: float) -> str:
    """Format a difference: `+10.9 points (95% interval: +8.0 to +14.0)`."""
    size, digits, unit = (100.0, ".1f", " points") if is_share(metric) else (1.0, ".3g", "")
    value, low, high = (f"{size * one + 0.0:+{digits}}" for one in (difference.value, difference.low, difference.high))
    return f"{value}{unit} ({100 * confidence:g}% interval: {low} to {high})"


def _is_finite(estimate: Estimate) -> bool:
    return all(math.isfinite(value) for value in (estimate.value, estimate.low, estimate.high))


# ---- what to try next -------------------------------------------------------------------------------------------

_FEW_STEPS = 100
_MOST_TIMES = 10
_FEW_ROWS_OF_A_LABEL = 10
_ONE_CLASS = 0.98
"""Minimum share of rows predicted as one label to warn about it."""
_UNEVEN = 2.0
"""Minimum ratio of the dominant label's rows to the other labels' mean."""


@dataclass(frozen=True)
class RunFacts:
    """Findings on a finished run, used to give advice."""

    verdict: str
    plan: Plan
    outcome: Outcome
    curves: Curves = field(default_factory=Curves)
    fit: Fit = field(default_factory=lambda: Fit("not known"))
    train_rows: int = 0
    labels: int = 0
    """Number of labels if each row has one, else 0."""
    rate_searched: bool = False
    best_untrained_name: str = "the baseline"
    blind: str = ""
    """Sentence saying that all predictions are the same, or an empty string."""
    predicts_majority: bool = False
    budget_advice: tuple[str, str] = ("", "")

    @property
    def recipe_settings(self) -> dict[str, object]:
        return {setting.name: setting.value for setting in self.plan.settings if not setting.is_automatic}


def collect_facts(view: RunView, headline: Headline) -> RunFacts | None:
    """Collect the facts for advice, or return None if scores, plan or outcome are missing."""
    row, plan, outcome = view.trained, view.plan, view.outcome
    if row is None or plan is None or outcome is None:
        return None
    summary = view.summary
    train = summary.splits.get("train") if summary else None
    label, is_usual = _find_dominant_label(row.confusion) if row.confusion else ("", False)
    entities = [row.metrics[name].value for name in ("precision", "recall") if name in row.metrics]
    blind = "The model finds no entity in the test rows" if entities and not any(entities) else ""
    if label:
        blind = f"Nearly every test row gets the same label, '{words.cut_text(label, 40)}'"
    bar = find_best_untrained(view.scores, row.main_metric, row.greater_is_better)
    return RunFacts(
        verdict=headline.kind,
        plan=plan,
        outcome=outcome,
        curves=collect_curves(view, plan),
        fit=judge_fit_from_curves(view),
        train_rows=train.rows if train else 0,
        labels=len(summary.labels) if summary and summary.form.is_calibrated else 0,
        rate_searched=view.searched is not None,
        best_untrained_name="the pretrained model" if bar is None or bar.kind == "untouched" else bar.name,
        blind=blind,
        predicts_majority=is_usual,
        budget_advice=describe_budget_cost(view.budget),
    )


def _find_dominant_label(confusion: Confusion) -> tuple[str, bool]:
    """Return the label that nearly all predictions have (or an empty string), and whether its rows far outnumber the
    other labels'."""
    predicted = [sum(counts) for counts in zip(*confusion.counts, strict=True)]
    expected = [sum(counts) for counts in confusion.counts]
    most, index = max(((count, index) for index, count in enumerate(predicted)), default=(0, 0))
    several = max(expected, default=0) < _ONE_CLASS * sum(expected)
    if not several or most < _ONE_CLASS * max(1, sum(predicted)):
        return "", False
    usual = expected.pop(index)
    return confusion.labels[index], usual >= _UNEVEN * statistics.mean(expected)


def suggest_next_steps(run: RunFacts) -> tuple[str, ...]:
    """Return changes to try one at a time, or an empty tuple if training helped."""
    if run.verdict not in ("worse", "unresolved"):
        return ()
    evidence, helps = run.budget_advice
    if evidence:  # the curves belong to a model that was not kept
        return (f"{_capitalised(evidence)}. {_capitalised(helps)}.",)
    more_rows = "More test rows narrow the interval (four times as many rows halve it)"
    narrower = [more_rows] if run.verdict == "unresolved" else []
    if run.curves.is_at_ceiling and not run.blind:
        value = format_metric(run.curves.metric_name, run.curves.metric[-1][1])
        unless = ", unless harder or more test rows show a difference" if narrower else ""
        advice = f"Keep {run.best_untrained_name}, which needs no training{unless}"
        return (f"{_capitalised(run.curves.on_eval)} is {value}, so there is nothing left to gain. {advice}.",)
    steps = [*_suggest_more_rows(run), *_suggest_settings(run)]
    if not steps:
        others = (
            f"other rates ({_format_rate_option(run, 1 / 3)} or {_format_rate_option(run, 3)}) or "
            if not run.rate_searched
            else ""
        )
        steps.append(f"The curves do not show why. Try {others}more than the {run.train_rows:,} train rows")
    return tuple(f"{one}." for one in [*steps, *narrower])


def _suggest_more_rows(run: RunFacts) -> Iterator[str]:
    is_limited = run.recipe_settings.get("data.max_rows") is not None
    more = "Use more: remove data.max_rows" if is_limited else "Use more if there are any"
    if run.train_rows < _FEW_ROWS_OF_A_LABEL * run.labels:
        yield (
            f"{run.train_rows:,} train rows are about {run.train_rows / run.labels:.2g} for each of {run.labels:,} "
            f"labels, too few to learn most labels well. More rows help more than more epochs. {more}"
        )
    elif is_limited:
        yield f"Only {counted(run.train_rows, 'row')} are used for training. {more}"


def _suggest_settings(run: RunFacts) -> Iterator[str]:
    weights_may_help = run.predicts_majority and "train.class_weights" not in run.recipe_settings
    if weights_may_help:
        yield f"{run.blind}, the most frequent one. Give rare labels more weight: --set train.class_weights=balanced"
    evals = [value for _, value in run.curves.eval_loss]
    high = judge_final_loss(run.curves.losses, evals, run.plan.learning_rate)
    rate, length = "", ""
    if run.fit.kind == "got worse":
        what = "The eval score was best before step 1" if run.fit.turn == 0 else _capitalised(run.fit.evidence)
        rate = f"{what}. Try a lower rate: {_format_rate_option(run, 1 / 10 if run.fit.turn == 0 else 1 / 3)}"
    elif high.action != "go on":
        rate = f"{_capitalised(without_cause(high.reason))}. Try a lower rate: {_format_rate_option(run, 1 / 3)}"
    elif run.fit.kind in ("over-fitted", "over-confident") and run.fit.turn is not None:
        length = (
            f"The model is {run.fit.kind} from step {run.fit.turn:,} on (see 'Learning curves'). "
            f"Stop there: {_format_length_option(run, run.fit.turn / run.plan.total_steps)}"
        )
    elif longer := _reasons_to_train_longer(run):
        times = min(_MOST_TIMES, max(2, math.ceil(_FEW_STEPS / max(1, run.plan.total_steps))))
        length = f"{_capitalised(listed(longer))}. Train for longer: {_format_length_option(run, times)}"
    changes = [one for one in ("" if run.rate_searched else rate, length) if one]
    if run.blind and not weights_may_help:
        rates = f"Try a lower rate, {_format_rate_option(run, 1 / 3)}, or a higher one, {_format_rate_option(run, 3)}"
        changes[:1] = [f"{run.blind}. {changes[0] if changes else rates if not run.rate_searched else 'Use more rows'}"]
    yield from changes


def _reasons_to_train_longer(run: RunFacts) -> list[str]:
    curves, steps = run.curves, run.outcome.steps
    was_better = curves.metric and curves.best[1] != curves.metric[-1][1] and not run.outcome.weights_reason
    if steps < run.plan.total_steps or was_better:
        return []
    reasons = []
    if (last := final_loss_if_falling(curves.losses)) is not None:
        fell = f"{format_number(curves.losses[0])} to {format_number(last)}"
        reasons.append(f"the train loss was still falling at the end ({fell})")
    if len(curves.metric) > 1 and curves.best[0] == curves.metric[-1][0]:
        way = "rising" if curves.greater_is_better else "falling"
        reasons.append(f"{curves.on_eval} was still {way} at the last evaluation")
    if steps < _FEW_STEPS:
        reasons.append(f"the run had only {counted(steps, 'step')}")
    return reasons


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _format_length_option(run: RunFacts, factor: float) -> str:
    """Return the `--set` option for a run that is `factor` times as long."""
    if "train.max_steps" in run.recipe_settings:
        return f"--set train.max_steps={round(factor * run.plan.total_steps)}"
    return f"--set train.num_train_epochs={float(f'{factor * run.plan.num_train_epochs:.2g}'):g}"


def _format_rate_option(run: RunFacts, factor: float) -> str:
    """Return the `--set` option for `factor` times the learning rate."""
    has_method = any(name.startswith("method.") for name in run.recipe_settings)
    kind = "" if has_method else "--set method.kind=full "
    return f"{kind}--set method.learning_rate={float(f'{factor * run.plan.learning_rate:.2g}'):g}"
