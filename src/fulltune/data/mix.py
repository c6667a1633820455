"""Rows that are mixed into the train rows by weight: which of them may be, and how many an epoch has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import numpy as np

from fulltune.data.encode import Dropped, Encoded
from fulltune.data.sources import SourceName, SourceRows, is_mixed, mixed_names
from fulltune.data.split import HELD_OUT, Split
from fulltune.errors import DataError
from fulltune.inference.store import WORDS, batches
from fulltune.recipe.data import rows_per_epoch
from fulltune.recipe.fields import Recipe
from fulltune.records.data import SplitName
from fulltune.tasks import PLACE
from fulltune.text import counted


def mixed_rows(
    encoded: Mapping[SourceName, Encoded],
    sources: Mapping[SourceName, SourceRows],
    splits: Mapping[SplitName, Split],
) -> tuple[dict[SourceName, Split], list[Dropped]]:
    """Of each mixed source the rows that are in no split to score on, and all others.

    Args:
        encoded: All sources, with the groups of all of them.
        sources: Their names in words.
        splits: Rows to score on; their groups may be known of the task's sources only.

    Raises:
        DataError: For each source of which no row is left.
    """
    held_out = {
        name: encoded[name if splits[name].is_file else "train"].groups[splits[name].rows]
        for name in reversed(HELD_OUT)
    }
    mixed: dict[SourceName, Split] = {}
    lost: list[Dropped] = []
    problems = []
    for name, whole in encoded.items():
        if not is_mixed(name):
            continue
        also_in = {split: np.isin(whole.groups, groups) for split, groups in held_out.items()}
        left = ~np.logical_or.reduce(list(also_in.values()))
        mixed[name] = Split(whole, left, sources[name].where, is_file=True)
        here = _held_out_rows(name, whole, also_in)
        lost += here
        if not mixed[name].examples.any():
            checks = Counter(item.check for item in here)
            for tally in whole.dropped.values():
                checks.update(tally.counts)
            reasons = ", ".join(f"{count:,} x {check}" for check, count in checks.most_common())
            problems.append(
                f"{sources[name].where}: no row can be mixed in ({reasons}), expected some; give other rows, or remove "
                "it from data.train"
            )
    if problems:
        raise DataError(problems)
    return mixed, lost


def _held_out_rows(name: SourceName, whole: Encoded, also_in: Mapping[SplitName, np.ndarray]) -> list[Dropped]:
    """The rows of a mixed source that are also scored on."""
    lost: list[Dropped] = []
    if not any(rows.any() for rows in also_in.values()):
        return lost
    first = np.zeros(len(whole.row_of), bool)  # whether an example is its row's first one, which has the row's words
    first[np.unique(whole.row_of, return_index=True)[1]] = True
    start = 0
    for batch in batches(whole.folder):
        examples = slice(start, start + len(batch))
        start += len(batch)
        for split, rows in also_in.items():
            mine = rows[whole.row_of[examples]] & first[examples]
            for place in np.flatnonzero(mine):
                row = json.loads(batch.column(WORDS)[int(place)].as_py())
                reason = f"what it asks, or its text, also stands in {split}, which is never trained on"
                lost.append(Dropped(name, row.pop(PLACE), f"also in {split}", reason, row))
            first[examples] &= ~mine  # a row in both is listed once
    return lost


def drawn_rows(recipe: Recipe, task_rows: int) -> dict[SourceName, int]:
    """Rows of each mixed source in an epoch, which has all of the task's train rows.

    Raises:
        DataError: For each weight that comes to no row.
    """
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
