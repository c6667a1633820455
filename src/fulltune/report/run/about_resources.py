"""The section that holds the plan to account: memory, time and disk as planned and as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fulltune.records.plan import BASELINES, DRY_RUN, TRAINED, Plan
from fulltune.records.training import Outcome
from fulltune.report.format import words
from fulltune.report.format.blocks import Block, Folded, Paragraph, Row, Section, Table, unless_empty
from fulltune.report.run.read import Attempt, RunView

_HEADER = ("what", "planned", "after the dry-run step", "actual", "error of the plan", "error of the dry run")
_MEMORY = "memory of the training process, beyond the libraries"
_TIME = "time of the training steps, with evaluations and checkpoints"


def resources(view: RunView) -> Section | None:
    """What the plan said against what was measured, with the error in percent."""
    blocks: list[Block] = []
    for plan in view.plans:
        attempts = view.attempts_of(plan.trial)
        last = attempts[-1] if attempts else None
        shown = [*_kinds(plan), *(_comparison(view, plan, last) if last and last.outcome else [])]
        first = not blocks
        blocks += shown if first else [Folded(f"the same for {plan.trial}", tuple(shown))]
    return unless_empty("Plan and actual", blocks)


def _kinds(plan: Plan) -> list[Block]:
    need = plan.memory
    if need is None:
        return []
    row: Row = (*(words.size(size) for size in need.kinds.values()), words.size(need.phases["step"]))
    table = Table(
        f"Planned memory at the peak of a step, {plan.micro_batch_size} rows a forward pass",
        (*need.kinds, "together"),
        (row,),
        numeric=frozenset(range(len(row))),
    )
    return [table, Paragraph(f"{words.AT_THE_PEAK}: {words.moment(need.kinds)}.")]


def _comparison(view: RunView, plan: Plan, attempt: Attempt) -> list[Block]:
    """The last attempt against the plan; a plan is made for a whole run, so a resumed one has no planned time."""
    outcome = attempt.outcome
    assert outcome is not None
    resumed = any(line.get("event") == "resume" for line in attempt.journal)
    time = None if resumed else plan.time
    rows: list[Row] = []
    if plan.memory or outcome.memory_growth_bytes:
        planned = plan.memory.peak if plan.memory else 0
        rows.append(_row(_MEMORY, planned, outcome.dry_run_growth_bytes, outcome.memory_growth_bytes, words.size))
    if outcome.forecast or time:
        planned_seconds = time.total_seconds if time else 0.0
        forecast = outcome.forecast.total_seconds if outcome.forecast else 0.0
        rows.append(_row(_TIME, planned_seconds, forecast, _trained_seconds(attempt), words.duration))
    if time is not None:
        around = _around(view, plan, attempt)
        rows += [_row(part.name, part.seconds, 0, around.get(part.name, 0.0), words.duration) for part in time.around]
        if time.around and view.command:
            rows.append(_row("the whole command", time.whole_seconds, 0, view.command.seconds, words.duration))
    if plan.disk or outcome.disk_bytes:
        rows.append(_row("disk", plan.disk.total if plan.disk else 0, 0, outcome.disk_bytes, words.size))
    if not rows:
        return []
    caption = f"Attempt {outcome.attempt}: plan and actual; +10% is planned a tenth too high"
    return [Table(caption, _HEADER, tuple(rows), numeric=frozenset(range(1, 6))), *_stopped_early(outcome, plan)]


def _stopped_early(outcome: Outcome, plan: Plan) -> list[Block]:
    if outcome.status == "done" and outcome.steps == plan.total_steps:
        return []
    done = f"{words.count(outcome.steps)} of {words.count(plan.total_steps)} steps"
    return [Paragraph(f"The attempt ended after {done}; planned times are those of all steps.")]


def _row(what: str, planned: float, tried: float, actual: float, shown: Callable[[Any], str]) -> Row:
    def cell(value: float) -> str:
        return shown(value) if value else "-"

    def error(value: float) -> str:
        return f"{round(value / actual - 1, 2) or 0:+.0%}" if value and actual else "-"

    return (what, cell(planned), cell(tried), cell(actual), error(planned), error(tried))


def _around(view: RunView, plan: Plan, attempt: Attempt) -> dict[str, float]:
    """Seconds of the command's other parts, by the names that the plan has for them."""
    scored = {row.name: row.seconds for row in view.scores}
    at = {line["name"]: float(line["seconds"]) for line in attempt.lines if line.get("kind") == "phase"}
    began = next((seconds for name, seconds in at.items() if name.startswith("checking")), None)
    checked = at["training"] - began if began is not None and "training" in at else 0.0
    return {
        DRY_RUN: checked,
        BASELINES: sum(row.seconds for row in view.scores if row.kind != "trained"),
        TRAINED: scored.get(plan.trial, 0.0),
    }


def _trained_seconds(attempt: Attempt) -> float:
    """Seconds from the first step to the last, evaluations and checkpoints included; 0 when it did not get there."""
    at = {line["name"]: float(line["seconds"]) for line in attempt.lines if line.get("kind") == "phase"}
    return at["saving the model"] - at["training"] if {"training", "saving the model"} <= at.keys() else 0.0
