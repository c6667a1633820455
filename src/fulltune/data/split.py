from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fulltune.data.encode import EncodedSource
from fulltune.data.readers.text_files import SECTION_CHARACTERS
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.records.data import SplitName
from fulltune.text import counted

SPLITS: tuple[SplitName, ...] = ("train", "eval", "test")
HELD_OUT: tuple[SplitName, ...] = ("eval", "test")
MAX_HELD_OUT_ROWS = 2_000


@dataclass(frozen=True)
class Split:
    """Rows of a source that belong to a split or are mixed in."""

    source: EncodedSource
    rows: np.ndarray
    """True for the source's rows in this split: bool [source rows]."""
    has_own_file: bool

    @property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    @cached_property
    def examples(self) -> np.ndarray:
        """True for the source's examples in this split: bool [source examples]."""
        return self.rows[self.source.row_of]

    @property
    def group_values(self) -> np.ndarray:
        """Hash of each row's `data.group` cell: uint64 [split rows]; empty if not set."""
        return self.source.group_values[self.rows] if len(self.source.group_values) else self.source.group_values

    @property
    def groups(self) -> np.ndarray:
        return self.source.groups[self.rows]

    def label_counts(self, row_repeats: np.ndarray | None = None) -> Counter[str]:
        """Count the rows of each label. `row_repeats` holds how often each source row counts (default: once for rows in
        this split)."""
        sets, counts = self.source.label_sets, Counter[str]()
        numbers = np.bincount(self.source.labels, self.rows if row_repeats is None else row_repeats, len(sets))
        for names, count in zip(sets, numbers, strict=True):
            counts.update(dict.fromkeys(names, int(count)) if count else {})
        return counts


def assign_splits(recipe: Recipe, encoded: Mapping[str, EncodedSource]) -> dict[SplitName, Split]:
    """Assign the rows to splits. Raises `DataError` if a split has fewer than 2 rows or one group is too large."""
    block, train = recipe.data, encoded["train"]
    splits = {
        name: Split(encoded[name], np.ones(encoded[name].num_rows, bool), True) for name in HELD_OUT if name in encoded
    }
    few = [
        f"{split.source.where}: {counted(split.num_rows, 'usable row')} for {name}; expected at least 2"
        for name, split in splits.items()
        if split.num_rows < 2
    ]
    if few:
        raise DataError(few)
    fractions: dict[SplitName, float] = {"test": block.test_fraction, "eval": block.eval_fraction}
    fractions = {name: share for name, share in fractions.items() if name not in splits}
    rows_of: dict[SplitName, np.ndarray] = {}
    if block.time is None:
        strata, left = _row_strata(train, block.group is not None), np.ones(train.num_rows, bool)
        if block.folds:
            del fractions["test"]
            if (num_groups := len(np.unique(train.split_groups))) < block.folds:
                raise DataError(
                    f"{train.where}: {counted(num_groups, 'group')} of rows that stay together, expected at least one "
                    f"for each of the {block.folds} folds; add rows, or lower data.folds"
                )
            rows_of["test"] = assign_folds(train.split_groups, strata, block.folds) == (block.fold or 1)
            left &= ~rows_of["test"]
        for name, fraction in fractions.items():
            rest = np.flatnonzero(left)
            # The second split gets its share of all rows, not of the remaining ones.
            share = min(0.5, fraction * train.num_rows / max(1, len(rest)))
            rows_of[name] = np.zeros(train.num_rows, bool)
            rows_of[name][rest[hold_out_groups(train.split_groups[rest], strata[rest], share)]] = True
            left &= ~rows_of[name]
        rows_of["train"] = left
    else:
        wanted = {name: max(1, held_out_rows(train.num_rows, share)) for name, share in fractions.items()}
        rows_of = split_by_time(train.times, train.split_groups, wanted)
    splits |= {name: Split(train, rows, has_own_file=name == "train") for name, rows in rows_of.items()}
    _refuse_small_splits(recipe, splits, sum(held_out_rows(train.num_rows, share) for share in fractions.values()))
    return splits


def assign_folds(groups: np.ndarray, strata: np.ndarray, num_folds: int) -> np.ndarray:
    """Return each row's fold, from 1: int64 [rows]. Whole groups, the largest first, are dealt to the fold with the
    fewest rows of their stratum (class)."""
    _, first, member_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    fold_of, rows, of_stratum = np.zeros(len(first), np.int64), [0] * num_folds, Counter[tuple[int, int]]()
    # Groups of one size are in the pseudo-random order of their drawn numbers.
    for group in np.lexsort((-sizes, strata[first])).tolist():
        stratum, size = int(strata[first[group]]), int(sizes[group])
        fold = min(range(num_folds), key=lambda number: (of_stratum[stratum, number], rows[number]))
        of_stratum[stratum, fold] += size
        rows[fold] += size
        fold_of[group] = fold + 1
    return fold_of[member_of]


def held_out_rows(rows: int, fraction: float) -> int:
    return min(MAX_HELD_OUT_ROWS, round(fraction * rows))


def hold_out_groups(groups: np.ndarray, strata: np.ndarray, fraction: float) -> np.ndarray:
    """Mark the rows to hold out, bool [rows]: whole groups, with about the same share of each stratum.

    At least one group of each stratum (class) with two or more groups is held out.
    """
    fraction = min(fraction, MAX_HELD_OUT_ROWS / max(1, len(groups)))
    if not len(groups):
        return np.zeros(0, bool)
    # Groups are in the pseudo-random order of their drawn numbers.
    _, first, member_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    stratum_of = strata[first]
    is_held_out = np.zeros(len(first), bool)
    by_stratum = np.argsort(stratum_of, kind="stable")
    for members in np.split(by_stratum, np.flatnonzero(np.diff(stratum_of[by_stratum])) + 1):
        wanted = round(int(sizes[members].sum()) * fraction)
        if len(members) > 1:
            wanted = max(1, wanted)
        is_held_out[members[_choose_groups(sizes[members].tolist(), wanted)]] = True
    return is_held_out[member_of]


def _choose_groups(sizes: Sequence[int], wanted: int) -> list[int]:
    """Return positions of groups with about `wanted` rows in total, never all groups."""
    positions: list[int] = []
    num_rows = 0
    for position, size in enumerate(sizes):
        if num_rows == wanted:
            break
        if num_rows + size <= wanted and len(positions) < len(sizes) - 1:
            positions.append(position)
            num_rows += size
    if not positions and wanted and len(sizes) > 1:
        positions = [min(range(len(sizes)), key=sizes.__getitem__)]
    return positions


def _row_strata(source: EncodedSource, by_group: bool) -> np.ndarray:
    """Return each row's class (the rarest of its labels or, if `by_group`, of its group's): int64 [rows], -1 without
    labels."""
    counts = Split(source, np.ones(source.num_rows, bool), has_own_file=True).label_counts()
    places = {name: place for place, name in enumerate(source.names)}
    rarest = [places[min(names, key=lambda name: (counts[name], name))] if names else -1 for names in source.label_sets]
    strata = np.array(rarest, np.int64)[source.labels]
    return rarest_class_in_group(strata, source.split_groups) if by_group else strata


def rarest_class_in_group(strata: np.ndarray, split_groups: np.ndarray) -> np.ndarray:
    """Return the rarest class of each row's group: int64 [rows]."""
    _, group_of = np.unique(split_groups, return_inverse=True)
    kinds, kind, counts = np.unique(strata, return_inverse=True, return_counts=True)
    smallest = np.full(len(strata), np.iinfo(np.int64).max)
    np.minimum.at(smallest, group_of, counts[kind] * len(kinds) + kind)
    return np.asarray(kinds[smallest[group_of] % len(kinds)]) if len(strata) else strata


def split_by_time(
    times: np.ndarray, split_groups: np.ndarray, wanted: Mapping[SplitName, int]
) -> dict[SplitName, np.ndarray]:
    """Mark the rows of each split, without separating groups: bool [rows]. `wanted` maps held-out splits to row counts;
    the first gets the newest rows."""
    numbers, group = np.unique(split_groups, return_inverse=True)
    starts = np.full(len(numbers), np.inf)
    np.minimum.at(starts, group, times)
    oldest = starts[group]  # oldest time in each row's group
    rows_of: dict[SplitName, np.ndarray] = {}
    before = np.ones(len(times), bool)
    for name, count in wanted.items():
        start = _choose_split_time(oldest[before], count)
        rows_of[name] = before & (oldest >= start)
        before &= times < start
    return {**rows_of, "train": before}


def _choose_split_time(oldest: np.ndarray, wanted: int) -> float:
    """Return a split time with about `wanted` rows at or after it, or infinity if all groups start together.

    `oldest` is the first time of each row's group.
    """
    starts, counts = np.unique(oldest, return_counts=True)
    if len(starts) < 2:
        return np.inf
    since = np.cumsum(counts[:0:-1])  # rows of groups that begin at the newest time, the two newest ...
    place = max(1, int(np.searchsorted(since, wanted, side="right")))
    return float(starts[-place])


def _refuse_small_splits(recipe: Recipe, splits: Mapping[SplitName, Split], num_held_out: int) -> None:
    """Raise `DataError` if a split has fewer than 2 rows, or one group is too large."""
    block, train = recipe.data, splits["train"].source
    small = [f"{name} has {splits[name].num_rows}" for name in SPLITS if splits[name].num_rows < 2]
    largest = largest_group(train.split_groups)
    is_one = block.group is not None and block.time is None and 2 * (train.num_rows - largest) < num_held_out
    if not small and not is_one:
        return
    columns = {"time": block.time, "group": block.group}
    by = [*(f"'{column}' (data.{role})" for role, column in columns.items() if column), "their texts"]
    of_labels = f" of {counted(len(train.names), 'label')}" if train.names else ""
    groups = counted(len(np.unique(train.split_groups)), "group")
    # A text file with blank lines has far fewer rows than paragraphs.
    sections = ""
    if recipe.data.text_rows == "auto" and any(file.lower().endswith(".txt") for file in recipe.data.task_files):
        sections = (
            f"; paragraphs of a .txt file are joined into rows of about {SECTION_CHARACTERS:,} characters, so set "
            "data.text_rows: paragraph for one row per paragraph"
        )
    each = f", at least {sum(not split.has_own_file for split in splits.values()) + 1} different ones of each label"
    raise DataError(
        f"{train.where}: {counted(train.num_read, 'row')}{of_labels} cannot be split into train, eval and test of at "
        f"least 2 rows each ({', '.join(small) or f'{num_held_out:,} are to be held out'}). Groups by "
        f"{' and '.join(by)} stay together ({groups}; the largest has {counted(largest, 'row')}). Add rows"
        f"{each if train.names else ''}, raise data.eval_fraction and data.test_fraction, or set data.eval and "
        f"data.test{sections}"
    )


def largest_group(numbers: np.ndarray) -> int:
    return int(np.unique(numbers, return_counts=True)[1].max(initial=0))
