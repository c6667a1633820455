"""The section that holds the plan to account: memory, time and disk as planned and as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fulltune.records.events import PhaseBegan
from fulltune.records.plan import BASELINES, DRY_RUN, PROBE, TRAINED, Plan
from fulltune.report.format import words
from fulltune.report.format.blocks import Block, Paragraph, Row, Section, Table, first_open, unless_empty
from fulltune.report.run.read import RunView
from fulltune.text import format_bytes, format_seconds

_HEADER = ("what", "planned", "after the dry-run step", "actual", "error of the plan", "error of the dry run")
_MEMORY = "memory of the training process, beyond the libraries"
_TIME = "time of the training steps, with evaluations and checkpoints"


def resources(view: RunView) -> Section | None:
    """What the plan said against what was measured, with the error in percent."""
    parts = [(plan.trial, [*_kinds(plan), *_comparison(view, plan)]) for plan in view.plans]
    return unless_empty("Plan and actual", first_open(parts))


def _kinds(plan: Plan) -> list[Block]:
    need = plan.memory
    if need is None:
        return []
    row: Row = (*(format_bytes(size) for size in need.kinds.values()), format_bytes(need.phases["step"]))
    table = Table(
        f"Planned memory at the peak of a step, micro batch of {plan.micro_batch_size}",
        (*need.kinds, "together"),
        (row,),
        numeric=frozenset(range(len(row))),
    )
    sent = words.sent(plan)
    sent = f" {sent[0].upper()}{sent[1:]}: by arithmetic, not measured." if sent else ""
    return [table, Paragraph(f"{words.at_the_peak(need.kinds)}.{sent}")]


def _comparison(view: RunView, plan: Plan) -> list[Block]:
    """The last attempt against the plan; a plan is made for a whole run, so a resumed one has no planned time."""
    attempt = next(reversed(view.attempts_of(plan.trial)), None)
    outcome = attempt.outcome if attempt else None
    if attempt is None or outcome is None:
        return []
    phases = {event.name: event.seconds for event in attempt.events if isinstance(event, PhaseBegan)}
    resumed = any(entry.event == "resume" for entry in attempt.journal)
    time = None if resumed else plan.time
    rows: list[Row] = []
    if plan.memory or outcome.memory_growth_bytes:
        planned = plan.memory.peak if plan.memory else 0
        actual = max((outcome.memory_growth_bytes, *outcome.growth_of_processes))
        rows.append(_row(_MEMORY, planned, outcome.dry_run_growth_bytes, actual, format_bytes))
    if outcome.forecast or time:
        planned_seconds = time.total_seconds if time else 0.0
        forecast = outcome.forecast.total_seconds if outcome.forecast else 0.0
        # From the first step to the last; 0 when it did not get there.
        trained = phases.get("saving the model", 0.0) - phases["training"] if "training" in phases else 0.0
        rows.append(_row(_TIME, planned_seconds, forecast, max(0.0, trained), format_seconds))
    if time is not None:
        around = _around(view, plan, phases)
        rows += [_row(part.name, part.seconds, 0, around.get(part.name, 0.0), format_seconds) for part in time.around]
        if time.around and view.command and not view.searched:  # which takes several runs
            rows.append(_row("the whole command", time.whole_seconds, 0, view.command.seconds, format_seconds))
    if plan.disk or outcome.disk_bytes:
        rows.append(_row("disk", plan.disk.total if plan.disk else 0, 0, outcome.disk_bytes, format_bytes))
    if not rows:
        return []
    caption = f"Attempt {outcome.attempt}: plan and actual; +10% means that 10% too much was planned"
    blocks: list[Block] = [Table(caption, _HEADER, tuple(rows), numeric=frozenset(range(1, 6)))]
    if outcome.status != "done" or outcome.steps != plan.total_steps:
        done = f"{outcome.steps:,} of {plan.total_steps:,} steps"
        blocks.append(Paragraph(f"The attempt ended after {done}; planned times are those of all steps."))
    return blocks


def _row(what: str, planned: float, tried: float, actual: float, shown: Callable[[Any], str]) -> Row:
    def cell(value: float) -> str:
        return shown(value) if value else "-"

    def error(value: float) -> str:
        return f"{round(value / actual - 1, 2) or 0:+.0%}" if value and actual else "-"

    return (what, cell(planned), cell(tried), cell(actual), error(planned), error(tried))


def _around(view: RunView, plan: Plan, phases: dict[str, float]) -> dict[str, float]:
    """Seconds of the command's other parts, by the names that the plan has for them."""
    began = next((seconds for name, seconds in phases.items() if name.startswith("checking")), None)
    probed = next((seconds for name, seconds in phases.items() if name.startswith("fitting a linear probe")), None)
    return {
        PROBE: began - probed if began is not None and probed is not None else 0.0,
        DRY_RUN: phases["training"] - began if began is not None and "training" in phases else 0.0,
        BASELINES: sum(row.seconds for row in view.scores if row.kind != "trained"),
        TRAINED: next((row.seconds for row in view.scores if row.name == plan.trial), 0.0),
    }
