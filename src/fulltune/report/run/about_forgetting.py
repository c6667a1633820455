"""The section about what the model could do before."""

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
    """How far generic text has moved while training, and how a budget was kept."""
    plan, found = view.plan, view.budget
    points, errors = (view.history.evaluation.get(name, ()) for name in ("drift", "drift_error"))
    if not points or plan is None or view.summary is None:
        return None
    writes, kept = view.summary.form.reads_any_text, view.outcome.best_step if view.outcome else None
    title = "rise of the loss on generic text" if writes else "change of the hidden states on generic text"
    figures = [learning_curve(title, points, "drift", kept)]
    source = next((one.value for one in plan.settings if one.name == "preserve.probe"), BUNDLED)
    texts = (
        f"{plan.generic.texts_per_evaluation} generic texts"
        if plan.generic.budget is None
        else "some of the selection texts"
    )
    said = in_words(points, dict(errors), kept, writes)
    moved = Paragraph(f"While training: {said} Measured on {texts} (preserve.probe: {source}).")
    if found is None:
        return Section("forgetting", "Forgetting", (moved, Figures(tuple(figures))))
    title = f"{words.metric_name(found.metric)} by drift on generic text"
    tried = PointSeries("tried", tuple((point.drift.mean, point.metric) for point in found.points))
    kept_at = PointSeries("kept", ((found.choice.drift.mean, found.choice.metric),), filled=True)
    across = "drift on generic text; dashed: the budget"
    figures.append(series_plot(title, (tried, kept_at), found.metric, across, found.limit, "see the points below."))
    evidence, helps = budget_advice(found)
    held = f" {helps[0].upper()}{helps[1:]}." if evidence else ""
    folded = Folded("all points between the untouched and the trained model", (_points(found),))
    blocks = (Paragraph(f"{verdict(found)}{held}"), moved, Figures(tuple(figures)), folded)
    return Section("forgetting", "Forgetting", blocks)


def in_words(points: Sequence[Point], errors: Mapping[int, float], kept: int | None, writes: bool) -> str:
    """What a curve of the drift says, of the weights that were kept."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if not known:
        return "No drift on generic text is known: none of its values was finite."
    step, value = next((point for point in known if point[0] == kept), known[-1])
    error = errors.get(step, 0.0)
    if abs(value) <= BEYOND_CHANCE * error:
        return f"Generic text has not moved as far as can be told ({_size(value, error, writes)}) at step {step:,}."
    if value < 0:
        return f"Generic text got more likely by step {step:,}: {_size(value, error, writes)}."
    half = next(at for at, so_far in known if so_far >= value / 2)
    when = f", half of it by step {half:,}" if half < step else ""
    if writes:
        share = format_percent(-math.expm1(-value))
        return f"A token of generic text got {share} less likely by step {step:,} ({_size(value, error, True)}){when}."
    return f"Hidden states of generic text have changed by {_size(value, error, False)} by step {step:,}{when}."


def _size(value: float, error: float, writes: bool) -> str:
    size = f"{format_number(value)} ± {format_number(error)}"
    if writes:
        return f"{size} nats a token; ±: standard error"
    return f"{size} (1 - cosine: 0 is as before, 1 has nothing in common with it; ±: standard error)"


def verdict(found: BudgetResult) -> str:
    """Whether the budget was kept, by the texts that were sealed, and what that cost."""
    budget = format_percent(found.budget) if found.budget >= 0.001 else f"{100 * found.budget:.2g}%"
    sealed, trained, name = found.sealed, found.end, words.metric_name(found.metric)
    lead = f"Forgetting, budget {budget}: "
    if sealed is None or not found.is_feasible:
        start, end = (format_metric(found.metric, point.metric) for point in (found.start, trained))
        drift = words.as_share(trained.drift.mean, found.is_language_model)
        why = f"the trained model has {drift}, and no point within the budget is better than the untouched model"
        if is_within(trained.drift, found.limit):
            why = f"the trained model is within it ({drift}); training made the eval rows no better"
        on = f"({name} {end} trained, {start} untouched, on eval rows)"
        return f"{lead}infeasible: {why} {on}. The untouched model is what is kept."
    lead += "PASS" if found.passed else "FAIL"
    by, upper = (words.as_share(one, False) for one in (sealed.mean, sealed.upper))
    what = f"generic text changed by {by} (1 - cosine; with 95% certainty at most {upper})"
    if found.is_language_model:
        most = f"{'least' if sealed.upper < 0 else 'most'} {_likelier(sealed.upper)}"
        what = f"a token of generic text got {_likelier(sealed.mean)} (with 95% certainty at {most})"
    if len(found.opening_times) > 1:
        lead += f" (sealed texts read {len(found.opening_times)} times, because the model was trained anew)"
    gain, whole = found.gain_of(found.choice), found.gain_of(trained)
    share = f", {format_percent(gain / whole)} of the trained model's gain" if whole > 0 and gain < whole else ""
    more = f" But {found.weak_texts_reason}." if found.weak_texts_reason else ""
    return (
        f"{lead}: {what}, on {counted(sealed.texts, 'text')} that nothing had read before. "
        f"Kept: {words.way(found.choice.share)}, {name} {format_metric(found.metric, found.choice.metric)} on eval "
        f"rows{share}.{more}"
    )


def _likelier(rise: float) -> str:
    """What a rise of the loss makes of a token."""
    return f"{words.as_share(abs(math.expm1(-rise)), False)} {'more' if rise < 0 else 'less'} likely"


def budget_advice(found: BudgetResult | None) -> tuple[str, str]:
    """What a budget for forgetting has kept a model from, and what helps; empty where most of the learned was kept."""
    if found is None:
        return "", ""
    if (limit := limit_for_most_gain(found)) is not None:
        share = _rounded_up(105 * (-math.expm1(-limit) if found.is_language_model else limit))
        kept = "the untouched model" if found.choice.is_start else words.way(found.choice.share)
        return (
            f"the budget for forgetting (preserve.budget) keeps {kept}",
            f"{MOST_GAIN:.0%} of what was learned takes a budget of about {share}: --set "
            f"preserve.budget={share}; or more texts in the probe, where their error is large beside the budget",
        )
    if found.choice.is_start:
        evidence = "training made the eval rows no better, within the budget (preserve.budget) or without one"
        return evidence, "train without a budget first, and give it to a run that learns"
    return "", ""


def _rounded_up(percent: float) -> str:
    """In two digits, and below 100 %."""
    places = 1 - math.floor(math.log10(percent))
    return f"{min(math.ceil(percent * 10**places) / 10**places, 99):g}%"


def _points(found: BudgetResult) -> Table:
    rows: tuple[TableRow, ...] = tuple(
        (
            words.way(point.share),
            # Equal models differ by rounding.
            " ± ".join(format_number(round(one, 9) + 0.0) for one in (point.drift.mean, point.drift.error)),
            format_metric(found.metric, point.metric),
        )
        for point in found.points
    )
    header = ("point", "drift", words.metric_name(found.metric))
    unit = "nats a token" if found.is_language_model else "1 - cosine"
    title = f"Points that were tried; drift in {unit} on {counted(found.start.drift.texts, 'text')}, ±: error"
    return Table(title, header, rows, frozenset(range(1, len(header))))
