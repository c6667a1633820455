"""Several tasks on one base: what a full model for each costs against parts side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulltune.errors import RecipeError
from fulltune.records.comparison import Comparison, ManyTasks, MethodOverTasks
from fulltune.records.scores import Estimate
from fulltune.report.comparison.content import label
from fulltune.report.format import words
from fulltune.report.format.blocks import Element, Paragraph, Section, Table, TableRow, untrusted
from fulltune.report.format.pages import section_in_markdown
from fulltune.report.format.words import NOTHING, Writer, ratio
from fulltune.text import counted, format_bytes, format_seconds, is_share

RECORD, PAGE = "tasks.json", "tasks.md"
_MARGIN = 0.01
"""How exactly differences are written."""


def many_tasks(comparisons: Mapping[str, Comparison]) -> ManyTasks:
    """Put finished comparisons of one pretrained model together, each by the name of its task."""
    rows = {task: {row.method: row for row in one.rows} for task, one in comparisons.items()}
    first = next(iter(comparisons.values()))
    full = next(row.method for row in first.rows if row.kind == "full")
    methods = [
        row.method
        for row in first.rows
        if row.kind not in ("base", "full") and all(row.method in r for r in rows.values())
    ]
    if not methods:
        raise RecipeError("--budget: too short to train one method beside full for every task; give more time")
    # A full model's file is the base with a small head.
    base = min(one[full].saved_bytes for one in rows.values())

    def way(method: str) -> MethodOverTasks:
        found = {task: one[method] for task, one in rows.items()}
        stored, kind = sum(row.saved_bytes for row in found.values()), found[next(iter(found))].kind
        return MethodOverTasks(
            method=method,
            kind=kind,
            stored_bytes=stored + (0 if kind in ("full", "variant") else base),  # a variant is a whole model, too
            bytes_per_task=round(stored / len(found)),
            train_seconds=round(sum(row.train_seconds for row in found.values()), 1),
            scores={task: row.metric for task, row in found.items()},
            behind=None if method == full else _behind(method, list(comparisons.values())),
        )

    return ManyTasks(
        model=first.model,
        base_bytes=base,
        tasks={task: one.decision for task, one in comparisons.items()},
        methods=tuple(map(way, (full, *methods))),
    )


def _behind(method: str, comparisons: Sequence[Comparison]) -> Estimate | None:
    """Mean over the tasks, where all metrics are shares; the squares of their independent half intervals add up."""
    found = [one.decision.difference(method) for one in comparisons]
    if not all(is_share(one.decision.metric) for one in comparisons) or not all(one.seeds_known for one in found):
        return None
    mean = statistics.mean(one.estimate for one in found)
    halves = (max(one.estimate - one.adjusted_low, one.adjusted_high - one.estimate) for one in found)
    half = math.hypot(*halves) / len(found)
    return Estimate(value=mean, low=mean - half, high=mean + half)


def write_tasks(folder: Path, found: ManyTasks) -> tuple[Path, ...]:
    """Write `tasks.md` and `tasks.json` into a folder; returns their paths."""
    found.save(folder / RECORD)
    words.write_sanitized(folder / PAGE, section_in_markdown(on_one_base(found)))
    return folder / PAGE, folder / RECORD


def on_one_base(found: ManyTasks) -> Section:
    """What the tasks come to together: sentences, and a table of methods, of tasks and of scores."""
    write, totals, scores, tasks = (
        Writer("accuracy", _MARGIN),
        list[TableRow](),
        list[TableRow](),
        list[TableRow](),
    )
    for method in found.methods:
        apart = "reference" if method.kind == "full" else NOTHING
        if method.behind:
            apart = write.interval(method.behind.value, method.behind.low, method.behind.high)
        costs = (
            format_bytes(method.stored_bytes),
            format_bytes(method.bytes_per_task),
            format_seconds(method.train_seconds),
        )
        totals.append((untrusted(method.method), *costs, apart))
    for task, decision in found.tasks.items():
        name, metric = untrusted(task), Writer(decision.metric, _MARGIN)
        tasks.append((name, untrusted(label(decision)), metric.name))
        scores.append((name, *(metric.estimate(method.scores[task]) for method in found.methods)))
    cost = ("method", "stored", "one more task", "training", "full is better by [points], mean over the tasks")
    header = ("task", *(method.method for method in found.methods))
    blocks: tuple[Element, ...] = (
        Paragraph(words.file_name(found.model)),
        *map(Paragraph, _summary(found)),
        Table("Methods, for all tasks together", cost, tuple(totals), frozenset(range(1, len(cost)))),
        Table("Tasks", ("task", "verdict", "metric"), tuple(tasks)),
        Table("Scores on each task's test rows", header, tuple(scores), frozenset(range(1, len(header)))),
    )
    return Section("tasks", f"{counted(len(found.tasks), 'task')} on one base", blocks)


def _summary(found: ManyTasks) -> list[str]:
    full, *others = found.methods
    # A head alone decides nothing; of the rest those that are not known to be worse.
    on_base = [method for method in others if method.kind != "variant"]
    fair = [method for method in on_base if method.kind != "head" and (method.behind is None or method.behind.low <= 0)]
    smallest = min(fair or on_base, key=lambda method: method.stored_bytes, default=None)
    said = [
        f"A full model for each of {counted(len(found.tasks), 'task')}: {format_bytes(full.stored_bytes)} of weights, "
        "on disk and, with all loaded, in memory."
    ]
    if smallest is not None:
        said[0] += (
            f" One base ({format_bytes(found.base_bytes)}) with {smallest.method} for each: "
            f"{format_bytes(smallest.stored_bytes)}, {ratio(smallest.stored_bytes / full.stored_bytes)}; each "
            f"further task adds {format_bytes(smallest.bytes_per_task)} instead of {format_bytes(full.bytes_per_task)}."
        )
    if all(method.behind is None for method in others):
        said.append("The tasks' metrics cannot be averaged, or one seed says too little: see each task's report.")
    return said
