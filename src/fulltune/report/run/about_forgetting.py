from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fulltune.forgetting.budget import MOST_GAIN, is_within, limit_for_most_gain
from fulltune.recipe.model import BUNDLED
from fulltune.records.forgetting import BudgetResult
from fulltune.report.format import words
from fulltune.report.format.blocks import Figures, Paragraph, Section, Table, TableRow
from fulltune.report.format.plots import draw_learning_curve
from fulltune.report.run.read import RunView
from fulltune.stats.curves import CHANCE_STANDARD_ERRORS, Point
from fulltune.text import counted, format_metric, format_number, format_percent


def build_forgetting_section(view: RunView) -> Section | None:
    """Build the section on forgetting, or None if drift was not measured."""
    plan, result = view.plan, view.budget
    points, errors = (view.history.evaluation.get(name, ()) for name in ("drift", "drift_error"))
    if not points or plan is None or view.summary is None:
        return None
    writes, saved_step = view.summary.form.reads_any_text, view.outcome.best_step if view.outcome else None
    title = "rise of the loss on generic text" if writes else "change of the hidden states on generic text"
    figures = Figures((draw_learning_curve(title, points, "drift", saved_step),))
    source = next((one.value for one in plan.settings if one.name == "preserve.probe"), BUNDLED)
    texts = (
        f"{plan.generic.texts_per_evaluation} generic texts"
        if plan.generic.budget is None
        else "some of the texts used for selection"
    )
    drift_words = describe_drift(points, dict(errors), saved_step, writes)
    drift = Paragraph(f"During training: {drift_words} Drift was measured on {texts} (preserve.probe: {source}).")
    if result is None:
        return Section("forgetting", "Forgetting", (drift, figures))
    evidence, helps = describe_budget_cost(result)
    advice = f" {helps[0].upper()}{helps[1:]}." if evidence else ""
    first = Paragraph(f"{describe_budget_result(result)}{advice}")
    return Section("forgetting", "Forgetting", (first, _build_interpolation_table(result), drift, figures))


def describe_drift(points: Sequence[Point], errors: Mapping[int, float], saved_step: int | None, in_nats: bool) -> str:
    """Describe the drift at `saved_step` (by default the last). `errors` holds standard errors by step."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return "The drift on generic text is unknown, because none of its values is finite."
    step, value = next((point for point in finite if point[0] == saved_step), finite[-1])
    error = errors.get(step, 0.0)
    unit = "nats per token; ±: standard error"
    unit = unit if in_nats else "(1 - cosine: 0 is unchanged, 1 is unrelated; ±: standard error)"
    size = f"{format_number(value)} ± {format_number(error)} {unit}"
    if abs(value) <= CHANCE_STANDARD_ERRORS * error:
        return f"There is no measurable drift on generic text at step {step:,} ({size})."
    if value < 0:
        return f"Generic text became more likely by step {step:,}: {size}."
    if in_nats:
        share = format_percent(-math.expm1(-value))
        return f"A token of generic text became {share} less likely by step {step:,} ({size})."
    return f"The hidden states of generic text changed by {size} by step {step:,}."


def describe_budget_result(result: BudgetResult) -> str:
    """Describe whether drift on the held-out texts stayed within the budget, and which weights were saved."""
    budget = format_percent(result.budget) if result.budget >= 0.001 else f"{100 * result.budget:.2g}%"
    sealed, trained, name = result.sealed, result.end, words.metric_name(result.metric)
    lead = f"Forgetting (budget {budget}): "
    if sealed is None or result.choice.is_start:
        start, end = (format_metric(result.metric, point.metric) for point in (result.start, trained))
        drift = words.format_drift(trained.drift.mean, result.is_language_model)
        why = f"the trained model drifts by {drift}, and no point within the budget beats the pretrained model"
        if is_within(trained.drift, result.limit):
            why = f"the trained model is within the budget ({drift}), but training did not improve the eval score"
        on = f"({name} on the eval rows: {end} trained, {start} pretrained)"
        return f"{lead}infeasible, because {why} {on}. The run keeps the pretrained model."
    lead += "PASS" if result.passed else "FAIL"
    by, upper = (words.format_drift(one, False) for one in (sealed.mean, sealed.upper))
    what = f"the hidden states of generic text changed by {by} (1 - cosine; with 95% confidence at most {upper})"
    if result.is_language_model:
        most = f"{'least' if sealed.upper < 0 else 'most'} {_change_of_likelihood(sealed.upper)}"
        what = f"a token of generic text became {_change_of_likelihood(sealed.mean)} (with 95% confidence at {most})"
    if len(result.opening_times) > 1:
        lead += f" (the held-out texts were read {len(result.opening_times)} times, because training was repeated)"
    gain, whole = result.metric_gain(result.choice), result.metric_gain(trained)
    share = f", {format_percent(gain / whole)} of the trained model's gain" if whole > 0 and gain < whole else ""
    score = f"{name} {format_metric(result.metric, result.choice.metric)} on the eval rows{share}"
    more = f" But {result.weak_texts_reason}." if result.weak_texts_reason else ""
    return (
        f"{lead}: {what}, on {counted(sealed.texts, 'held-out text')}. "
        f"Saved weights: {words.describe_weights(result.choice.share)} ({score}).{more}"
    )


def _change_of_likelihood(rise: float) -> str:
    return f"{words.format_drift(abs(math.expm1(-rise)), False)} {'more' if rise < 0 else 'less'} likely"


def describe_budget_cost(result: BudgetResult | None) -> tuple[str, str]:
    """Return how the forgetting budget limited the gain and what would help, or two empty strings if the gain was
    hardly limited."""
    if result is None:
        return "", ""
    if (limit := limit_for_most_gain(result)) is not None:
        percent = 105 * (-math.expm1(-limit) if result.is_language_model else limit)
        places = 1 - math.floor(math.log10(percent))
        share = f"{min(math.ceil(percent * 10**places) / 10**places, 99):g}%"
        weights = "the pretrained model" if result.choice.is_start else words.describe_weights(result.choice.share)
        return (
            f"the forgetting budget (preserve.budget) limits the weights to {weights}",
            f"to keep {MOST_GAIN:.0%} of the gain, set a budget of about {share} (--set preserve.budget={share}), or "
            "use more probe texts if the standard error of the drift is large compared with the budget",
        )
    if result.choice.is_start:
        evidence = "training did not improve the eval score, with or without the budget (preserve.budget)"
        return evidence, "train without a budget first, and add a budget once the eval score improves"
    return "", ""


def _build_interpolation_table(result: BudgetResult) -> Table:
    rows: tuple[TableRow, ...] = tuple(
        (
            words.describe_weights(point.share),
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
