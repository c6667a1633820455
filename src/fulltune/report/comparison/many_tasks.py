"""Several tasks on one base: what a full model for each costs against parts side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulltune.errors import RecipeError
from fulltune.records.comparison import Comparison, ManyTasks, Way
from fulltune.records.scores import Estimate
from fulltune.report.comparison.content import label
from fulltune.report.format import words
from fulltune.report.format.blocks import Block, Paragraph, Row, Section, Table, foreign
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

    def way(method: str) -> Way:
        found = {task: one[method] for task, one in rows.items()}
        stored, kind = sum(row.saved_bytes for row in found.values()), found[next(iter(found))].kind
        return Way(
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
        ways=tuple(map(way, (full, *methods))),
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
    words.write_harmless(folder / PAGE, section_in_markdown(on_one_base(found)))
    return folder / PAGE, folder / RECORD


def on_one_base(found: ManyTasks) -> Section:
    """What the tasks come to together: sentences, and a table of methods, of tasks and of scores."""
    write, ways, scores, tasks = Writer("accuracy", _MARGIN), list[Row](), list[Row](), list[Row]()
    for way in found.ways:
        apart = "reference" if way.kind == "full" else NOTHING
        if way.behind:
            apart = write.interval(way.behind.value, way.behind.low, way.behind.high)
        costs = (format_bytes(way.stored_bytes), format_bytes(way.bytes_per_task), format_seconds(way.train_seconds))
        ways.append((foreign(way.method), *costs, apart))
    for task, decision in found.tasks.items():
        name, metric = foreign(task), Writer(decision.metric, _MARGIN)
        tasks.append((name, foreign(label(decision)), metric.name))
        scores.append((name, *(metric.estimate(way.scores[task]) for way in found.ways)))
    cost = ("method", "stored", "one more task", "training", "full is better by [points], mean over the tasks")
    methods = ("task", *(way.method for way in found.ways))
    blocks: tuple[Block, ...] = (
        Paragraph(words.file_name(found.model)),
        *map(Paragraph, _summary(found)),
        Table("Methods, for all tasks together", cost, tuple(ways), frozenset(range(1, len(cost)))),
        Table("Tasks", ("task", "verdict", "metric"), tuple(tasks)),
        Table("Scores on each task's test rows", methods, tuple(scores), frozenset(range(1, len(methods)))),
    )
    return Section("tasks", f"{counted(len(found.tasks), 'task')} on one base", blocks)


def _summary(found: ManyTasks) -> list[str]:
    full, *others = found.ways
    # A head alone decides nothing; of the rest those that are not known to be worse.
    on_base = [way for way in others if way.kind != "variant"]
    fair = [way for way in on_base if way.kind != "head" and (way.behind is None or way.behind.low <= 0)]
    smallest = min(fair or on_base, key=lambda way: way.stored_bytes, default=None)
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
    if all(way.behind is None for way in others):
        said.append("The tasks' metrics cannot be averaged, or one seed says too little: see each task's report.")
    return said
