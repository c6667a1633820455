"""Sections about the training: curves, facts, settings, recipe, environment."""

from __future__ import annotations

import math

from fulltune.records.plan import Plan
from fulltune.records.training import Moved, Outcome
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Facts,
    Figure,
    Figures,
    Folded,
    Paragraph,
    Row,
    Section,
    Table,
    unless_empty,
)
from fulltune.report.format.plots import curve_in_words, learning_curve
from fulltune.report.run.read import RunView

_TRAIN_TITLES = {"loss": "train loss", "learning_rate": "learning rate", "grad_norm": "gradient norm"}
_JOURNAL_OPEN = 10
_MOST_EVALUATIONS = 20


def curves(view: RunView) -> Section | None:
    """What was measured while training, one drawing per series."""
    blocks: list[Block] = []
    for trial in view.trials:
        figures = _curves_of(view, trial)
        if not figures:
            continue
        restarts = view.history_of(trial).restarts
        drawn: list[Block] = [Figures(figures)]
        if restarts:
            at = words.listed([words.count(step) for step in restarts])
            drawn.append(
                Paragraph(f"One curve over {len(restarts) + 1} attempts; tick on the axis: continued, at step {at}.")
            )
        drawn += _other_metrics(view, trial)
        first = not blocks
        blocks += drawn if first else [Folded(f"the same for {trial}", tuple(drawn))]
    return unless_empty("Learning curves", blocks)


def _other_metrics(view: RunView, trial: str) -> list[Block]:
    """Every metric of the eval rows as numbers: most of them follow the one that is drawn."""
    plan, series = view.plan_of(trial), view.history_of(trial).evaluation
    if plan is None or set(series) <= {plan.metric, "loss"}:
        return []
    names = sorted(series, key=lambda name: name != plan.metric)
    by_step: dict[int, dict[str, float]] = {}
    for name, points in series.items():
        for step, value in points:
            by_step.setdefault(step, {})[name] = value
    steps = sorted(by_step)
    every = math.ceil(len(steps) / _MOST_EVALUATIONS)
    shown = sorted({*steps[::every], steps[-1]})
    rows: list[Row] = [
        (
            words.count(step),
            *(words.metric(name, by_step[step][name]) if name in by_step[step] else "-" for name in names),
        )
        for step in shown
    ]
    header = ("step", *(words.metric_name(name) for name in names))
    which = "each evaluation" if every == 1 else f"every {words.ordinal(every)} evaluation and the last one"
    table = Table(f"On the eval rows, {which}", header, tuple(rows), frozenset(range(1, len(header))))
    return [Folded("all metrics on the eval rows", (table,))]


def _curves_of(view: RunView, trial: str) -> tuple[Figure, ...]:
    history, outcome, plan = view.history_of(trial), view.outcome_of(trial), view.plan_of(trial)
    kept = outcome.best_step if outcome else None
    drawn_ones = (plan.metric, "loss") if plan else tuple(history.evaluation)
    drawn = [(name, _TRAIN_TITLES[name], points, None) for name, points in history.train.items()]
    scored = [
        (name, f"{words.metric_name(name)} on the eval rows", points, kept)
        for name, points in history.evaluation.items()
        if name in drawn_ones
    ]
    return tuple(
        Figure(learning_curve(title, points, name, step, history.restarts), title, curve_in_words(points, name, step))
        for name, title, points, step in (*drawn, *scored)
    )


def training(view: RunView) -> Section | None:
    """How every attempt ended, what it cost, what it changed, and what happened on the way."""
    blocks: list[Block] = []
    if view.attempts:
        blocks += [_attempts(view), *_changes(view)]
    for trial in view.trials:
        outcome = next((attempt.outcome for attempt in reversed(view.attempts_of(trial)) if attempt.outcome), None)
        if outcome is None:
            continue
        shown = _facts(outcome, view.plan_of(trial))
        first = not any(isinstance(block, Facts) for block in blocks)
        blocks += shown if first else [Folded(f"the same for {trial}", tuple(shown))]
    blocks += _journal(view)
    return unless_empty("Training", blocks)


def _attempts(view: RunView) -> Table:
    header = ("attempt", "status", "steps", "time of the process", "tokens/s", "peak memory", "why it ended")
    rows: list[Row] = []
    for attempt in view.attempts:
        outcome = attempt.outcome
        if outcome is None:
            steps = words.count(attempt.steps)
            rows.append((attempt.name, "no outcome", steps, *("-",) * 3, "its process wrote no outcome.json"))
            continue
        rows.append(
            (
                attempt.name,
                outcome.status.replace("_", " "),
                words.count(attempt.steps),
                words.duration(outcome.train_seconds),
                words.number(outcome.tokens_per_second) if outcome.tokens_per_second else "-",
                words.size(outcome.peak_memory_bytes) if outcome.peak_memory_bytes else "-",
                Cell(outcome.reason, foreign=True),
            )
        )
    return Table("Attempts; each is a fresh process", header, tuple(rows), numeric=frozenset(range(2, 6)))


def _changes(view: RunView) -> list[Block]:
    """What was changed after an attempt, and why, as its journal says."""
    found = [
        f"After {attempt.name}: {line.get('detail', '')}"
        for attempt in view.attempts
        for line in attempt.journal
        if line.get("event") == "next attempt"
    ]
    return [Bullets(tuple(found))] if found else []


def _facts(outcome: Outcome, plan: Plan | None) -> list[Block]:
    facts = []
    if plan:
        facts.append(
            (
                "parameters",
                f"{words.count(plan.num_trainable_parameters)} trained of {words.count(plan.num_parameters)}",
            )
        )
    if outcome.best_step is not None:
        best = "" if outcome.best_metric is None else f", {_best(outcome.best_metric, plan)} on the eval rows"
        facts.append(("weights kept from", f"step {words.count(outcome.best_step)}{best}"))
    if outcome.moved:
        facts += _moved(outcome.moved)
    blocks: list[Block] = [Facts(tuple(facts))] if facts else []
    if outcome.moved and outcome.moved.unmoved_tensors:
        names = ", ".join(outcome.moved.unmoved_tensors)
        blocks.append(Paragraph(f"Received a gradient and did not change (at most 20 are named): {names}"))
    if outcome.checks:
        rows = tuple((check.name, "passed" if check.passed else "FAILED", check.result) for check in outcome.checks)
        blocks.append(Table(f"Checks before step 1 of attempt {outcome.attempt}", ("check", "verdict", "found"), rows))
    if outcome.log_tail and outcome.status != "done":
        log = "\n".join(outcome.log_tail)
        blocks.append(Folded("the last lines of its log", (Code(log),)))
    return blocks


def _best(value: float, plan: Plan | None) -> str:
    return f"{words.metric_name(plan.metric)} {words.metric(plan.metric, value)}" if plan else words.number(value)


def _moved(moved: Moved) -> list[tuple[str, str]]:
    return [
        (
            "parameter values that moved",
            f"{words.share(moved.share)} ({words.count(moved.num_values_moved)} of "
            f"{words.count(moved.num_values_with_gradient)} that received a gradient)",
        ),
        (
            "parameter tensors that moved",
            f"{words.count(moved.num_tensors_moved)} of {words.count(moved.num_tensors_with_gradient)}",
        ),
    ]


def _journal(view: RunView) -> list[Block]:
    rows = tuple(
        (
            attempt.name,
            str(line.get("time", "-")),
            str(line.get("event", "-")),
            Cell(str(line.get("detail", "")), foreign=True),
        )
        for attempt in view.attempts
        for line in attempt.journal
    )
    if not rows:
        return []
    warnings = {  # in full: the advice stands at the end of them, and a cell is cut
        f"Warning of {attempt.name}: {line.get('detail', '')}": None
        for attempt in view.attempts
        for line in attempt.journal
        if line.get("event") == "warning"
    }
    shown: list[Block] = [Bullets(tuple(warnings))] if warnings else []
    table = Table("Journal: what happened, in order", ("attempt", "time", "event", "detail"), rows)
    return [*shown, table if len(rows) <= _JOURNAL_OPEN else Folded(f"journal of {len(rows)} events", (table,))]


def settings(view: RunView) -> Section | None:
    """Every setting with its value, who chose it and why."""
    blocks: list[Block] = []
    for plan in view.plans:
        rows = tuple(
            (
                setting.name,
                Cell(words.setting_value(setting.value), foreign=True),
                "fulltune" if setting.chosen else "recipe",
                setting.reason,
            )
            for setting in plan.settings
        )
        if rows:
            table = Table(f"Settings of {plan.trial}", ("setting", "value", "chosen by", "reason"), rows)
            blocks.append(Folded(f"settings of {plan.trial}", (table,)) if blocks else table)
    if view.recipe_text is not None:
        blocks.append(Folded("the recipe as it was given", (Code(view.recipe_text, "yaml"),)))
    return unless_empty("Settings", blocks)


def environment(view: RunView) -> Section | None:
    """Where and with what the run was made."""
    found = view.environment
    if found is None:
        return None
    facts = Facts(
        (
            ("started", found.started),
            ("fulltune", found.fulltune + (f", commit {found.commit}" if found.commit else "")),
            ("Python", found.python),
            ("platform", found.platform),
            ("processor", f"{found.cpu}, {words.counted(found.num_cores, 'core')}"),
            ("memory", words.size(found.memory_bytes)),
            ("devices", words.listed(found.devices) or "none besides the processor"),
        )
    )
    packages = Bullets(tuple(f"{name} {version}" for name, version in sorted(found.packages.items())))
    blocks: tuple[Block, ...] = (facts, Folded("package versions", (packages,))) if found.packages else (facts,)
    return Section("environment", "Environment", blocks)
