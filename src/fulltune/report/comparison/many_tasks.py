from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulltune.errors import RecipeError
from fulltune.records.comparison import Comparison, ManyTasks, MethodOverTasks
from fulltune.records.scores import Estimate
from fulltune.report.comparison.content import format_verdict
from fulltune.report.format import words
from fulltune.report.format.blocks import Element, Paragraph, Section, Table, TableRow, untrusted
from fulltune.report.format.pages import render_section
from fulltune.report.format.words import NOTHING, MetricFormatter
from fulltune.text import counted, format_bytes, format_seconds, is_share

RECORD, PAGE = "tasks.json", "tasks.md"
_MARGIN = 0.01


def combine_tasks(comparisons: Mapping[str, Comparison]) -> ManyTasks:
    """Combine comparisons by task name. Raise `RecipeError` if they share no method but full fine-tuning."""
    rows = {task: {row.method: row for row in one.rows} for task, one in comparisons.items()}
    first = next(iter(comparisons.values()))
    full = next(row.method for row in first.rows if row.kind == "full")
    methods = [
        row.method
        for row in first.rows
        if row.kind not in ("base", "full") and all(row.method in r for r in rows.values())
    ]
    if not methods:
        raise RecipeError("--budget: too short to train full and one other method for every task; give more time")
    # A full model's file holds the base and a small head.
    base = min(one[full].saved_bytes for one in rows.values())

    def sum_over_tasks(method: str) -> MethodOverTasks:
        task_rows = {task: one[method] for task, one in rows.items()}
        stored, kind = sum(row.saved_bytes for row in task_rows.values()), task_rows[next(iter(task_rows))].kind
        return MethodOverTasks(
            method=method,
            kind=kind,
            stored_bytes=stored + (0 if kind in ("full", "variant") else base),  # a variant is a whole model as well
            bytes_per_task=round(stored / len(task_rows)),
            train_seconds=round(sum(row.train_seconds for row in task_rows.values()), 1),
            scores={task: row.metric for task, row in task_rows.items()},
            behind=None if method == full else _mean_lead_of_full(method, list(comparisons.values())),
        )

    return ManyTasks(
        model=first.model,
        tasks={task: one.decision for task, one in comparisons.items()},
        methods=tuple(map(sum_over_tasks, (full, *methods))),
    )


def _mean_lead_of_full(method: str, comparisons: Sequence[Comparison]) -> Estimate | None:
    """Average full's lead over `method` over all tasks; None with one seed or a metric that is no share."""
    gaps = [one.decision.difference(method) for one in comparisons]
    if not all(is_share(one.decision.metric) for one in comparisons) or not all(gap.seeds_known for gap in gaps):
        return None
    mean = statistics.mean(one.estimate for one in gaps)
    halves = (max(one.estimate - one.adjusted_low, one.adjusted_high - one.estimate) for one in gaps)
    half = math.hypot(*halves) / len(gaps)
    return Estimate(value=mean, low=mean - half, high=mean + half)


def write_tasks_report(folder: Path, record: ManyTasks) -> tuple[Path, ...]:
    """Write `tasks.md` and `tasks.json` into a folder and return their paths."""
    record.save(folder / RECORD)
    words.write_sanitized(folder / PAGE, render_section(build_tasks_section(record)))
    return folder / PAGE, folder / RECORD


def build_tasks_section(record: ManyTasks) -> Section:
    """Build the section that compares the methods' costs and scores over all tasks."""
    write = MetricFormatter("accuracy", _MARGIN)
    totals, scores = list[TableRow](), list[TableRow]()
    for method in record.methods:
        apart = "reference" if method.kind == "full" else NOTHING
        if method.behind:
            apart = write.interval(method.behind.value, method.behind.low, method.behind.high)
        costs = (
            format_bytes(method.stored_bytes),
            format_bytes(method.bytes_per_task),
            format_seconds(method.train_seconds),
        )
        totals.append((untrusted(method.method), *costs, apart))
    for task, decision in record.tasks.items():
        metric, verdict = MetricFormatter(decision.metric, _MARGIN), untrusted(format_verdict(decision))
        estimates = (metric.estimate(method.scores[task]) for method in record.methods)
        scores.append((untrusted(task), verdict, metric.name, *estimates))
    cost = ("method", "stored", "each additional task", "training", "full is better by [points], averaged over tasks")
    stored = "Totals over all tasks, by method. Stored: weights on disk, with a shared pretrained model counted once"
    header = ("task", "verdict", "metric", *(method.method for method in record.methods))
    blocks: tuple[Element, ...] = (
        Paragraph(words.strip_folders(record.model)),
        Table(stored, cost, tuple(totals), frozenset(range(1, len(cost)))),
        Table("Verdict and scores on each task's test rows", header, tuple(scores), frozenset(range(3, len(header)))),
    )
    return Section("tasks", f"{counted(len(record.tasks), 'task')} with one pretrained model", blocks)
