"""Rows that are mixed into the train rows by weight: which of them may be, and how many an epoch has."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from fulltune.data.encode import Dropped, Encoded, Job, with_sides
from fulltune.data.limits import pack
from fulltune.data.sources import SourceName, is_mixed, mixed_names
from fulltune.data.split import HELD_OUT, Split
from fulltune.data.written import examples, kept_rows, previews, summarise
from fulltune.errors import DataError
from fulltune.inference.store import MIXED, Rows, RowWriter
from fulltune.recipe.data import rows_per_epoch
from fulltune.recipe.fields import Recipe
from fulltune.records.data import MixedSummary, SplitName
from fulltune.tasks import task_named
from fulltune.text import counted


def without_scored(
    recipe: Recipe, encoded: Mapping[SourceName, Encoded], splits: Mapping[SplitName, Split]
) -> tuple[dict[SourceName, Split], list[Dropped]]:
    """Each mixed source's rows that are in no held-out split, and all its others. Raises `DataError` for each source
    of which no row is left."""
    mixed, lost, problems = dict[SourceName, Split](), list[Dropped](), list[str]()
    if not recipe.data.mixed_files:
        return mixed, lost
    encoded, group = with_sides(encoded, recipe.data.near_duplicates), recipe.data.group
    same = f"what it asks, its text, or its '{group}'," if group else "what it asks, or its text,"
    for name in filter(is_mixed, encoded):
        whole = encoded[name]
        scored_in = np.full(whole.num_rows, -1)
        for number, split in enumerate(HELD_OUT):
            groups = encoded[split if splits[split].is_file else "train"].groups[splits[split].rows]
            scored_in[np.isin(whole.groups, groups)] = number
            if group is not None:  # scored rows have no gap: a mixed row without a value is not among them
                scored_in[np.isin(whole.values, splits[split].values)] = number
        mixed[name] = Split(whole, scored_in < 0, is_file=True)
        checks = whole.tally.of("unusable") + whole.tally.of("unfit") + whole.tally.of("part")
        for number, place, row in kept_rows(whole, scored_in >= 0):
            in_split = HELD_OUT[scored_in[number]]
            reason = f"{same} also stands in {in_split}, which is never trained on"
            lost.append(Dropped(name, place, f"also in {in_split}", reason, row))
            checks[lost[-1].check] += 1
        if not mixed[name].examples.any():
            reasons = ", ".join(f"{count:,} x {check}" for check, count in checks.most_common())
            problems.append(
                f"{whole.where}: no row can be mixed in ({reasons}), expected some; give other rows, or remove it from "
                "data.train"
            )
    if problems:
        raise DataError(problems)
    return mixed, lost


def mix_in(
    recipe: Recipe, folder: Path, job: Job, mixed: Mapping[SourceName, Split], packed: bool
) -> tuple[MixedSummary, ...]:
    """Write the rows of all mixed sources, source after source, beside those of the splits. Raises `DataError` for each
    whose weight comes to no row."""
    if not mixed:
        return ()
    task, found, ends = task_named(job.task), list[MixedSummary](), [0]
    drawn = _drawn_rows(recipe, len(Rows(folder / "train")))
    with RowWriter(folder / MIXED) as writer:
        for split in mixed.values():
            ends.append(ends[-1])
            parts = examples(split, task)
            for part in pack(parts, job.max_length) if packed else parts:
                writer.write(part)
                ends[-1] += len(part)
    lengths = Rows(folder / MIXED)["length"]
    for (name, split), (start, end) in zip(mixed.items(), pairwise(ends), strict=True):
        whole = split.source
        found.append(
            MixedSummary(
                where=whole.where,
                weight=mixed_names(recipe)[name].weight,
                rows_per_epoch=drawn[name],
                kind=whole.target.form.kind,
                counts=summarise(split, lengths[start:end], whole.num_read - split.num_rows),
                previews=previews(folder / MIXED, task, whole.target, job.tokenizer, range(start, end), 1),
            )
        )
    return tuple(found)


def _drawn_rows(recipe: Recipe, task_rows: int) -> dict[SourceName, int]:
    """Number of rows of each mixed source in an epoch, which has all of the task's train rows."""
    files = mixed_names(recipe)
    numbers = rows_per_epoch(task_rows, [one.weight for one in files.values()])
    none = [
        f"data.train: {file.path}: a weight of {file.weight:g} beside {counted(task_rows, 'train row')} comes to no "
        "row; give it more weight, or remove it"
        for file, number in zip(files.values(), numbers, strict=True)
        if not number
    ]
    if none:
        raise DataError(none)
    return dict(zip(files, numbers, strict=True))
