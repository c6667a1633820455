"""Which row belongs to which split: rows are split off train without separating duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fulltune.data.encode import Encoded
from fulltune.data.readers.text_files import SECTION_CHARACTERS
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.records.data import SplitName
from fulltune.text import counted

SPLITS: tuple[SplitName, ...] = ("train", "eval", "test")
HELD_OUT: tuple[SplitName, ...] = ("eval", "test")
MOST_HELD_OUT_ROWS = 2_000


@dataclass(frozen=True)
class Split:
    """The rows of a split: those of its own file, or some of the train file's; or of a mixed source."""

    source: Encoded
    rows: np.ndarray
    """Whether the split has a row of the source: bool [rows]."""
    is_file: bool
    """It has all usable rows of a file of its own."""

    @property
    def num_rows(self) -> int:
        """How many it has."""
        return int(self.rows.sum())

    @cached_property
    def examples(self) -> np.ndarray:
        """Whether it has an example of the source: bool [examples]."""
        return self.rows[self.source.row_of]

    @property
    def values(self) -> np.ndarray:
        """Hash of the `data.group` column of each of its rows: uint64 [its rows]; empty where no such column is set."""
        return self.source.values[self.rows] if len(self.source.values) else self.source.values

    @property
    def groups(self) -> np.ndarray:
        """The group of each of its rows: uint64 [its rows]."""
        return self.source.groups[self.rows]

    def label_counts(self, times: np.ndarray | None = None) -> Counter[str]:
        """How often each label occurs, each row of the source counted so many times: once if it is in the split."""
        sets, counts = self.source.label_sets, Counter[str]()
        numbers = np.bincount(self.source.labels, self.rows if times is None else times, len(sets))
        for names, count in zip(sets, numbers, strict=True):
            counts.update(dict.fromkeys(names, int(count)) if count else {})
        return counts


def assign(recipe: Recipe, encoded: Mapping[str, Encoded]) -> dict[SplitName, Split]:
    """The rows of each split: all of its own file, or some split off train. Raises `DataError` for a split of fewer
    than 2 rows, or when nearly all rows belong to one group."""
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
    asked = {name: share for name, share in fractions.items() if name not in splits}
    if block.time is None:
        taken = _drawn(train, _strata(train, block.group is not None), asked)
    else:
        wanted = {name: max(1, held_out_rows(train.num_rows, share)) for name, share in asked.items()}
        taken = split_by_time(train.times, train.sides, wanted)
    splits |= {name: Split(train, rows, is_file=name == "train") for name, rows in taken.items()}
    _refuse_small(recipe, splits, sum(held_out_rows(train.num_rows, share) for share in asked.values()))
    return splits


def held_out_rows(rows: int, fraction: float) -> int:
    """How many of so many rows a fraction asks for."""
    return min(MOST_HELD_OUT_ROWS, round(fraction * rows))


def _drawn(train: Encoded, strata: np.ndarray, fractions: Mapping[SplitName, float]) -> dict[SplitName, np.ndarray]:
    """Which rows each split takes off train, and what is left for train: bool [rows]."""
    taken, left = dict[SplitName, np.ndarray](), np.ones(train.num_rows, bool)
    for name, fraction in fractions.items():
        rest = np.flatnonzero(left)
        # The second split takes its share of all rows, not of those that the first one left.
        share = min(0.5, fraction * train.num_rows / max(1, len(rest)))
        rows = np.zeros(train.num_rows, bool)
        rows[rest[split_off(train.sides[rest], strata[rest], share)]] = True
        left &= ~rows
        taken[name] = rows
    return {**taken, "train": left}


def split_off(groups: np.ndarray, strata: np.ndarray, fraction: float) -> np.ndarray:
    """Choose rows to hold out.

    Whole groups are chosen, so that a text and its duplicates stay on one side. Within each stratum (class) about the
    same share is chosen, at least one group where the stratum has two or more, so that each class can be measured.
    """
    fraction = min(fraction, MOST_HELD_OUT_ROWS / max(1, len(groups)))
    if not len(groups):
        return np.zeros(0, bool)
    # Sorted by the drawn number, which is the pseudo-random order in which groups are taken.
    _, first, member_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    stratum_of = strata[first]
    chosen = np.zeros(len(first), bool)
    by_stratum = np.argsort(stratum_of, kind="stable")
    for members in np.split(by_stratum, np.flatnonzero(np.diff(stratum_of[by_stratum])) + 1):
        wanted = round(int(sizes[members].sum()) * fraction)
        if len(members) > 1:
            wanted = max(1, wanted)
        chosen[members[_filling(sizes[members].tolist(), wanted)]] = True
    return chosen[member_of]


def _filling(sizes: Sequence[int], wanted: int) -> list[int]:
    """Groups of together about `wanted` rows, never all; one that is too large for the rest is passed over."""
    chosen: list[int] = []
    taken = 0
    for position, size in enumerate(sizes):
        if taken == wanted:
            break
        if taken + size <= wanted and len(chosen) < len(sizes) - 1:
            chosen.append(position)
            taken += size
    if not chosen and wanted and len(sizes) > 1:
        chosen = [min(range(len(sizes)), key=lambda position: sizes[position])]
    return chosen


def _strata(whole: Encoded, by_side: bool) -> np.ndarray:
    """Each row's class, -1 without one: int64 [rows]. Of several labels, and of all that are on one side, the rarest:
    what is hardest to share out; of equally rare ones the first of the alphabet."""
    counts = Split(whole, np.ones(whole.num_rows, bool), is_file=True).label_counts()
    places = {name: place for place, name in enumerate(whole.names)}
    of_set = [places[min(of, key=lambda name: (counts[name], name))] if of else -1 for of in whole.label_sets]
    strata = np.array(of_set, np.int64)[whole.labels]
    return rarest_of_side(strata, whole.sides) if by_side else strata


def rarest_of_side(strata: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Of each row the rarest class on its side, of equally rare ones the smallest number: int64 [rows]."""
    _, side = np.unique(sides, return_inverse=True)
    kinds, kind, counts = np.unique(strata, return_inverse=True, return_counts=True)
    smallest = np.full(len(strata), np.iinfo(np.int64).max)
    np.minimum.at(smallest, side, counts[kind] * len(kinds) + kind)
    return np.asarray(kinds[smallest[side] % len(kinds)]) if len(strata) else strata


def split_by_time(times: np.ndarray, sides: np.ndarray, wanted: Mapping[SplitName, int]) -> dict[SplitName, np.ndarray]:
    """The rows of each split, bool [rows], the newest of `wanted` first; no time and no group is on two sides."""
    numbers, group = np.unique(sides, return_inverse=True)
    starts = np.full(len(numbers), np.inf)
    np.minimum.at(starts, group, times)
    oldest = starts[group]  # row of the group that each row is in
    chosen: dict[SplitName, np.ndarray] = {}
    before = np.ones(len(times), bool)
    for name, count in wanted.items():
        start = _boundary(oldest[before], count)
        chosen[name] = before & (oldest >= start)
        before &= times < start
    return {**chosen, "train": before}


def _boundary(oldest: np.ndarray, wanted: int) -> float:
    """The time from which on about `wanted` rows are in groups that begin then; infinity: there is none."""
    starts, counts = np.unique(oldest, return_counts=True)
    if len(starts) < 2:
        return np.inf
    since = np.cumsum(counts[:0:-1])  # rows of groups that begin at the newest time, at the two newest ones ...
    place = max(1, int(np.searchsorted(since, wanted, side="right")))
    return float(starts[-place])


def _refuse_small(recipe: Recipe, splits: Mapping[SplitName, Split], asked: int) -> None:
    """Raises a `DataError` when a split has fewer than 2 rows, or one group is so large that the rows outside of it are
    too few to hold out."""
    block, train = recipe.data, splits["train"].source
    small = [f"{name} has {splits[name].num_rows}" for name in SPLITS if splits[name].num_rows < 2]
    largest = largest_group(train.sides)
    is_one = block.group is not None and block.time is None and 2 * (train.num_rows - largest) < asked
    if not small and not is_one:
        return
    columns = {"time": block.time, "group": block.group}
    by = [*(f"'{column}' (data.{role})" for role, column in columns.items() if column), "their texts"]
    of_labels = f" of {counted(len(train.names), 'label')}" if train.names else ""
    groups = counted(len(np.unique(train.sides)), "group")
    # A text file with blank lines gives far fewer rows than it has paragraphs.
    sections = ""
    if recipe.data.text_rows == "auto" and any(file.lower().endswith(".txt") for file in recipe.data.task_files):
        sections = (
            f"; paragraphs of a .txt are joined into rows of about {SECTION_CHARACTERS:,} characters: for one row a "
            "paragraph set data.text_rows: paragraph"
        )
    each = f", at least {sum(not one.is_file for one in splits.values()) + 1} different ones of each label"
    raise DataError(
        f"{train.where}: {counted(train.num_read, 'row')}{of_labels} in {groups} that stay together by "
        f"{' and '.join(by)}, the largest of {largest:,}: too few for three splits of at least 2 rows "
        f"({', '.join(small) or f'{asked:,} are to be held out'}); give more rows{each if train.names else ''}, larger "
        f"data.eval_fraction and data.test_fraction, or files for eval and test{sections}"
    )


def largest_group(numbers: np.ndarray) -> int:
    """Rows in the largest group; 0 where there are none."""
    return int(np.unique(numbers, return_counts=True)[1].max(initial=0))
