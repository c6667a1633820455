from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fulltune.forgetting.budget import MOST_GAIN, is_within, limit_for_most_gain
from fulltune.recipe.model import BUNDLED
from fulltune.records.forgetting import BudgetResult
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Figures,
    Folded,
    Paragraph,
    Section,
    Table,
    TableRow,
)
from fulltune.report.format.plots import PointSeries, learning_curve, series_plot
from fulltune.report.run.read import RunView
from fulltune.stats.curves import BEYOND_CHANCE, Point
from fulltune.text import counted, format_metric, format_number, format_percent


def section(view: RunView) -> Section | None:
    """Build the section on forgetting, or return None if drift was not measured."""
    plan, result = view.plan, view.budget
    points, errors = (view.history.evaluation.get(name, ()) for name in ("drift", "drift_error"))
    if not points or plan is None or view.summary is None:
        return None
    writes, kept_step = view.summary.form.reads_any_text, view.outcome.best_step if view.outcome else None
    title = "rise of the loss on generic text" if writes else "change of the hidden states on generic text"
    figures = [learning_curve(title, points, "drift", kept_step)]
    source = next((one.value for one in plan.settings if one.name == "preserve.probe"), BUNDLED)
    texts = (
        f"{plan.generic.texts_per_evaluation} generic texts"
        if plan.generic.budget is None
        else "some of the selection texts"
    )
    drift_words = in_words(points, dict(errors), kept_step, writes)
    drift = Paragraph(f"While training: {drift_words} Measured on {texts} (preserve.probe: {source}).")
    if result is None:
        return Section("forgetting", "Forgetting", (drift, Figures(tuple(figures))))
    title = f"{words.metric_name(result.metric)} by drift on generic text"
    tried = PointSeries("tried", tuple((point.drift.mean, point.metric) for point in result.points))
    kept_at = PointSeries("kept", ((result.choice.drift.mean, result.choice.metric),), filled=True)
    across = "drift on generic text; dashed: the budget"
    figures.append(series_plot(title, (tried, kept_at), result.metric, across, result.limit, "see the points below."))
    evidence, helps = budget_advice(result)
    advice = f" {helps[0].upper()}{helps[1:]}." if evidence else ""
    folded = Folded("all points between the untouched and the trained model", (_points_table(result),))
    blocks = (Paragraph(f"{verdict(result)}{advice}"), drift, Figures(tuple(figures)), folded)
    return Section("forgetting", "Forgetting", blocks)


def in_words(points: Sequence[Point], errors: Mapping[int, float], kept_step: int | None, writes: bool) -> str:
    """Describe the drift at the saved step, and when it had reached half of that."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return "The drift on generic text is unknown: none of its values was finite."
    step, value = next((point for point in finite if point[0] == kept_step), finite[-1])
    error = errors.get(step, 0.0)
    if abs(value) <= BEYOND_CHANCE * error:
        return (
            f"There is no measurable drift on generic text at step {step:,} ({_drift_in_words(value, error, writes)})."
        )
    if value < 0:
        return f"Generic text became more likely by step {step:,}: {_drift_in_words(value, error, writes)}."
    half = next(at for at, so_far in finite if so_far >= value / 2)
    when = f", half of it by step {half:,}" if half < step else ""
    if writes:
        share = format_percent(-math.expm1(-value))
        size = _drift_in_words(value, error, True)
        return f"A token of generic text became {share} less likely by step {step:,} ({size}){when}."
    return f"Hidden states of generic text changed by {_drift_in_words(value, error, False)} by step {step:,}{when}."


def _drift_in_words(value: float, error: float, writes: bool) -> str:
    size = f"{format_number(value)} ± {format_number(error)}"
    if writes:
        return f"{size} nats per token; ±: standard error"
    return f"{size} (1 - cosine: 0 is unchanged, 1 is unrelated; ±: standard error)"


def verdict(result: BudgetResult) -> str:
    """Describe whether the budget was met on the sealed texts, and which weights and score were kept."""
    budget = format_percent(result.budget) if result.budget >= 0.001 else f"{100 * result.budget:.2g}%"
    sealed, trained, name = result.sealed, result.end, words.metric_name(result.metric)
    lead = f"Forgetting, budget {budget}: "
    if sealed is None or not result.is_feasible:
        start, end = (format_metric(result.metric, point.metric) for point in (result.start, trained))
        drift = words.as_share(trained.drift.mean, result.is_language_model)
        why = f"the trained model has {drift}, and no point within the budget is better than the untouched model"
        if is_within(trained.drift, result.limit):
            why = f"the trained model is within it ({drift}), but training did not improve the eval rows"
        on = f"({name} {end} trained, {start} untouched, on eval rows)"
        return f"{lead}infeasible: {why} {on}. The untouched model is kept."
    lead += "PASS" if result.passed else "FAIL"
    by, upper = (words.as_share(one, False) for one in (sealed.mean, sealed.upper))
    what = f"generic text changed by {by} (1 - cosine; with 95% confidence at most {upper})"
    if result.is_language_model:
        most = f"{'least' if sealed.upper < 0 else 'most'} {_change_of_likelihood(sealed.upper)}"
        what = f"a token of generic text became {_change_of_likelihood(sealed.mean)} (with 95% confidence at {most})"
    if len(result.opening_times) > 1:
        lead += f" (sealed texts read {len(result.opening_times)} times, because the model was trained again)"
    gain, whole = result.gain_of(result.choice), result.gain_of(trained)
    share = f", {format_percent(gain / whole)} of the trained model's gain" if whole > 0 and gain < whole else ""
    more = f" But {result.weak_texts_reason}." if result.weak_texts_reason else ""
    return (
        f"{lead}: {what}, on {counted(sealed.texts, 'sealed text')}. "
        f"Kept: {words.way(result.choice.share)}, {name} {format_metric(result.metric, result.choice.metric)} on eval "
        f"rows{share}.{more}"
    )


def _change_of_likelihood(rise: float) -> str:
    return f"{words.as_share(abs(math.expm1(-rise)), False)} {'more' if rise < 0 else 'less'} likely"


def budget_advice(result: BudgetResult | None) -> tuple[str, str]:
    """Return what the forgetting budget prevented and what would help, or two empty strings if little was lost."""
    if result is None:
        return "", ""
    if (limit := limit_for_most_gain(result)) is not None:
        share = _rounded_up(105 * (-math.expm1(-limit) if result.is_language_model else limit))
        weights = "the untouched model" if result.choice.is_start else words.way(result.choice.share)
        return (
            f"the budget for forgetting (preserve.budget) keeps {weights}",
            f"{MOST_GAIN:.0%} of the gain needs a budget of about {share}: --set preserve.budget={share}; or more "
            "probe texts, if their error is large compared with the budget",
        )
    if result.choice.is_start:
        evidence = "training did not improve the eval rows, with or without the budget (preserve.budget)"
        return evidence, "train without a budget first, and add one to a run that learns"
    return "", ""


def _rounded_up(percent: float) -> str:
    places = 1 - math.floor(math.log10(percent))
    return f"{min(math.ceil(percent * 10**places) / 10**places, 99):g}%"


def _points_table(result: BudgetResult) -> Table:
    rows: tuple[TableRow, ...] = tuple(
        (
            words.way(point.share),
            # Rounded, because equal models differ by rounding errors.
            " ± ".join(format_number(round(one, 9) + 0.0) for one in (point.drift.mean, point.drift.error)),
            format_metric(result.metric, point.metric),
        )
        for point in result.points
    )
    header = ("point", "drift", words.metric_name(result.metric))
    unit = "nats per token" if result.is_language_model else "1 - cosine"
    title = f"Points tried; drift in {unit} on {counted(result.start.drift.texts, 'text')}, ±: standard error"
    return Table(title, header, rows, frozenset(range(1, len(header))))
