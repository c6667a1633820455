"""The section about what the model could do before."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fulltune.recipe.tasks import LANGUAGE_MODELS
from fulltune.records.plan import Plan
from fulltune.report.format.blocks import Block, Figure, Figures, Paragraph, Section, first_open, unless_empty
from fulltune.report.format.plots import Point, curve_in_words, learning_curve
from fulltune.report.run.read import RunView
from fulltune.text import format_number, format_percent

ERRORS = 2.0
"""Standard errors below which a drift is none."""


def forgetting(view: RunView) -> Section | None:
    """How far generic text has moved while training."""
    return unless_empty("Forgetting", first_open((trial, _drift_of(view, trial)) for trial in view.trials))


def _drift_of(view: RunView, trial: str) -> list[Block]:
    history, outcome, plan = view.history_of(trial), view.outcome_of(trial), view.plan_of(trial)
    points = history.evaluation.get("drift", ())
    if not points or plan is None or view.summary is None:
        return []
    writes = view.summary.problem_type in LANGUAGE_MODELS
    kept = outcome.best_step if outcome else None
    title = "rise of the loss on generic text" if writes else "turn of the hidden states on generic text"
    figure = Figure(learning_curve(title, points, "drift", kept), title, curve_in_words(points, "drift", kept))
    errors = dict(history.evaluation.get("drift_error", ()))
    return [Paragraph(" ".join((in_words(points, errors, kept, writes), _about(plan)))), Figures((figure,))]


def _about(plan: Plan) -> str:
    return f"Measured on {plan.drift_texts} texts that have nothing to do with the task (preserve.probe)."


def in_words(points: Sequence[Point], errors: dict[int, float], kept: int | None, writes: bool) -> str:
    """What a curve of the drift says, of the weights that were kept.

    Args:
        points: Step and mean drift: nats a token, or 1 - cosine.
        errors: Step to the standard error of that mean.
        kept: Step whose weights were kept; None: the last one.
        writes: Whether the model is a language model.
    """
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if not known:
        return "No drift on generic text is known: none of its values was finite."
    step, value = next((point for point in known if point[0] == kept), known[-1])
    error = errors.get(step, 0.0)
    if abs(value) <= ERRORS * error:
        return f"Generic text has not moved as far as can be told ({_size(value, error, writes)}) at step {step:,}."
    if value < 0:
        return f"Generic text got more likely by step {step:,}: {_size(value, error, writes)}."
    half = next(at for at, so_far in known if so_far >= value / 2)
    when = f", half of it by step {half:,}" if half < step else ""
    if writes:
        share = format_percent(-math.expm1(-value))
        return f"A token of generic text got {share} less likely by step {step:,} ({_size(value, error, True)}){when}."
    return f"Hidden states of generic text have turned by {_size(value, error, False)} by step {step:,}{when}."


def _size(value: float, error: float, writes: bool) -> str:
    number = f"{format_number(value)} ± {format_number(error)}"
    if writes:
        return f"{number} nats a token; ±: standard error"
    return f"{number} (1 - cosine: 0 is as before, 1 has nothing in common with it; ±: standard error)"
