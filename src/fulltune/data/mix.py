"""Rows that are mixed into the train rows by weight: which of them may be, and how many an epoch has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from fulltune.data.encode import Dropped, Encoded, Job, join_near
from fulltune.data.limits import pack
from fulltune.data.sources import SourceName, SourceRows, is_mixed, mixed_names
from fulltune.data.split import HELD_OUT, Split
from fulltune.data.written import examples, kept_rows, list_dropped, previews, summarise
from fulltune.errors import DataError
from fulltune.inference.store import MIXED, Rows, RowWriter
from fulltune.recipe.data import rows_per_epoch
from fulltune.recipe.fields import Recipe
from fulltune.records.data import MixedSummary, SplitName
from fulltune.tasks import Target, task_named
from fulltune.text import counted


def mix_in(
    recipe: Recipe,
    folder: Path,
    job: Job,
    encoded: Mapping[SourceName, Encoded],
    sources: Mapping[SourceName, SourceRows],
    targets: Mapping[SourceName, Target],
    splits: Mapping[SplitName, Split],
    packed: bool,
) -> tuple[tuple[MixedSummary, ...], list[Dropped]]:
    """Write the rows of all mixed sources, source after source, beside those of the splits. Raises `DataError` for each
    source of which no row is left, or whose weight comes to no row."""
    if not recipe.data.mixed_files:
        return (), []
    mixed, lost = _without_scored(join_near(encoded, recipe.data.near_duplicates), sources, splits, recipe.data.group)
    list_dropped(folder, lost)
    task, found = task_named(job.task), []
    drawn = _drawn_rows(recipe, len(Rows(folder / "train")))
    ends = [0]
    with RowWriter(folder / MIXED) as writer:
        for split in mixed.values():
            ends.append(ends[-1])
            parts = examples(split, task)
            for part in pack(parts, job.max_length) if packed else parts:
                writer.write(part)
                ends[-1] += len(part)
    rows = Rows(folder / MIXED)
    for (name, split), (start, end) in zip(mixed.items(), pairwise(ends), strict=True):
        counts = summarise(split, rows["length"][start:end])
        found.append(
            MixedSummary(
                where=split.where,
                weight=mixed_names(recipe)[name].weight,
                rows_per_epoch=drawn[name],
                kind=targets[name].form.kind,
                counts=counts.model_copy(update={"dropped_rows": split.source.num_read - split.num_rows}),
                previews=previews(folder / MIXED, task, targets[name], job.tokenizer, range(start, end), 1),
            )
        )
    return tuple(found), lost


def _without_scored(
    encoded: Mapping[SourceName, Encoded],
    sources: Mapping[SourceName, SourceRows],
    splits: Mapping[SplitName, Split],
    group: str | None,
) -> tuple[dict[SourceName, Split], list[Dropped]]:
    """Each mixed source's rows that are in no held-out split, and all its others."""
    scored = {
        name: encoded[name if splits[name].is_file else "train"].groups[splits[name].rows]
        for name in reversed(HELD_OUT)
    }
    mixed: dict[SourceName, Split] = {}
    lost: list[Dropped] = []
    problems = []
    for name in filter(is_mixed, encoded):
        whole, where = encoded[name], sources[name].where
        also_in = {split: np.isin(whole.groups, groups) for split, groups in scored.items()}
        if (
            group is not None
        ):  # the values of scored rows have no gap, so that a mixed row without one is not among them
            also_in = {split: rows | np.isin(whole.values, splits[split].values) for split, rows in also_in.items()}
        mixed[name] = Split(whole, ~np.logical_or.reduce(list(also_in.values())), where, is_file=True)
        here = _scored_rows(name, whole, also_in, group)
        lost += here
        if not mixed[name].examples.any():
            checks = Counter(item.check for item in here)
            for tally in whole.dropped.values():
                checks.update(tally.counts)
            reasons = ", ".join(f"{count:,} x {check}" for check, count in checks.most_common())
            problems.append(
                f"{where}: no row can be mixed in ({reasons}), expected some; give other rows, or remove it from "
                "data.train"
            )
    if problems:
        raise DataError(problems)
    return mixed, lost


def _scored_rows(
    name: SourceName, whole: Encoded, also_in: Mapping[SplitName, np.ndarray], group: str | None
) -> list[Dropped]:
    """The rows of a mixed source that are also scored on; one in both splits is listed once."""
    lost: list[Dropped] = []
    same = f"what it asks, its text, or its '{group}'," if group else "what it asks, or its text,"
    for number, place, row in kept_rows(whole, np.logical_or.reduce(list(also_in.values()))):
        split = next(split for split, rows in also_in.items() if rows[number])
        reason = f"{same} also stands in {split}, which is never trained on"
        lost.append(Dropped(name, place, f"also in {split}", reason, row))
    return lost


def _drawn_rows(recipe: Recipe, task_rows: int) -> dict[SourceName, int]:
    """Number of rows of each mixed source in an epoch, which has all of the task's train rows."""
    files = mixed_names(recipe)
    numbers = rows_per_epoch(task_rows, [one.weight for one in files.values()])
    drawn = dict(zip(files, numbers, strict=True))
    none = [
        f"data.train: {files[name].path}: a weight of {files[name].weight:g} beside {counted(task_rows, 'train row')} "
        "comes to no row; give it more weight, or remove it"
        for name, number in drawn.items()
        if not number
    ]
    if none:
        raise DataError(none)
    return drawn
