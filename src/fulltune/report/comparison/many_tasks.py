"""Several tasks on one base as `tasks.md` and `tasks.json`, and in the words of both files and terminal."""

from __future__ import annotations

from pathlib import Path

from fulltune.records.comparison import ManyTasks, Way
from fulltune.report.comparison.sentences import NOTHING, Writer, ratio
from fulltune.report.format import words
from fulltune.report.format.markdown import escaped, table
from fulltune.text import counted, format_bytes, format_seconds

RECORD, PAGE = "tasks.json", "tasks.md"
_MARGIN = 0.01
"""How exactly differences are written."""
TASK_HEADER = ("task", "train rows", "verdict", "metric")
WAY_HEADER = ("method", "stored", "one more task", "training", "full better by [points]")


def write_tasks(folder: Path, found: ManyTasks) -> tuple[Path, ...]:
    """Write `tasks.md` and `tasks.json` into a folder; returns their paths."""
    found.save(folder / RECORD)
    words.write_harmless(folder / PAGE, _markdown(found))
    return folder / PAGE, folder / RECORD


def _markdown(found: ManyTasks) -> str:
    scores = []
    for place, task in enumerate(found.tasks):
        write = Writer(task.metric, _MARGIN)
        scores.append([words.harmless(task.name), *(write.estimate(way.scores[place]) for way in found.ways)])
    lines = [
        f"# {counted(len(found.tasks), 'task')} on one base",
        "",
        escaped(words.file_name(found.model)),
        "",
        *summary(found),
        "",
        table(WAY_HEADER, way_rows(found), frozenset(range(1, len(WAY_HEADER)))),
        "",
        table(TASK_HEADER, task_rows(found), frozenset({1})),
        "",
        table(("task", *(way.arm for way in found.ways)), scores, frozenset(range(1, len(found.ways) + 1))),
    ]
    return "\n".join(lines) + "\n"


def summary(found: ManyTasks) -> list[str]:
    """What the tables come to."""
    full, *others = found.ways
    # A head alone decides nothing; of the rest those that are not known to be worse.
    on_base = [way for way in others if way.kind != "variant"]
    fair = [way for way in on_base if way.kind != "head" and (way.behind is None or way.behind.low <= 0)]
    smallest = min(fair or on_base, key=lambda way: way.stored_bytes, default=None)
    count = counted(len(found.tasks), "task")
    said = [
        f"A full model for each of {count}: {format_bytes(full.stored_bytes)} of weights, on disk and, with all "
        "loaded, in memory."
    ]
    if smallest is not None:
        said[0] += (
            f" One base ({format_bytes(found.base_bytes)}) with {smallest.arm} for each: "
            f"{format_bytes(smallest.stored_bytes)}, {ratio(smallest.stored_bytes / full.stored_bytes)}; each "
            f"further task adds {format_bytes(smallest.bytes_per_task)} instead of {format_bytes(full.bytes_per_task)}."
        )
    for way in others:
        if way.behind is None:
            continue
        low, high = way.behind.low, way.behind.high
        lost = "full is better" if low > 0 else f"{way.arm} is better" if high < 0 else "no difference is certain"
        said.append(f"Full minus {way.arm}: {_behind(way)} points, mean over the tasks: {lost}.")
    if all(way.behind is None for way in others):
        said.append("The tasks' metrics cannot be averaged, or one seed says too little: see each task's report.")
    return said


def way_rows(found: ManyTasks) -> list[list[str]]:
    """By `WAY_HEADER`."""
    return [
        [
            words.harmless(way.arm),
            format_bytes(way.stored_bytes),
            format_bytes(way.bytes_per_task),
            format_seconds(way.train_seconds),
            "reference" if way.kind == "full" else _behind(way),
        ]
        for way in found.ways
    ]


def task_rows(found: ManyTasks) -> list[list[str]]:
    """By `TASK_HEADER`."""
    rows = []
    for task in found.tasks:
        take = f": {words.harmless(task.recommended)}" if task.verdict in ("PEFT", "VARIANT", "EQUIVALENT") else ""
        verdict, metric = f"{task.verdict}{take}", words.metric_name(task.metric)
        rows.append([words.harmless(task.name), f"{task.train_rows:,}", verdict, metric])
    return rows


def _behind(way: Way) -> str:
    if way.behind is None:
        return NOTHING
    write = Writer("accuracy", _MARGIN)
    low, high = write.difference(way.behind.low), write.difference(way.behind.high)
    return f"{write.difference(way.behind.value)} [{low}, {high}]"
