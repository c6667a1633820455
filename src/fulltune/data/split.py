"""Which row belongs to which split: rows are split off train without separating duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fulltune.data.encode import Encoded
from fulltune.data.groups import rarest_of_group, split_by_time
from fulltune.data.readers.plain_text import SECTION_CHARACTERS
from fulltune.data.sources import SourceName, SourceRows
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
    where: str
    """The file."""
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
        """Whose each of its rows is: uint64 [its rows]; without any where no column says so."""
        return self.source.values[self.rows] if len(self.source.values) else self.source.values

    @property
    def groups(self) -> np.ndarray:
        """The group of each of its rows: uint64 [its rows]."""
        return self.source.groups[self.rows]

    def label_counts(self, times: np.ndarray | None = None) -> Counter[str]:
        """How often each label occurs, each row of the source counted so many times: once if it is in the split."""
        numbers, sizes = self.source.label_numbers, np.diff(self.source.label_ends)
        weights = np.repeat(self.rows if times is None else times, sizes)
        counts = np.bincount(numbers, weights=weights, minlength=len(self.source.names))
        return Counter({name: int(counts[number]) for name, number in self.source.names.items() if counts[number]})


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


def assign(
    recipe: Recipe, encoded: Mapping[SourceName, Encoded], sources: Mapping[SourceName, SourceRows]
) -> dict[SplitName, Split]:
    """The rows of each split: all of its own file, or some split off train. Raises `DataError` for a split of fewer
    than 2 rows, or rows that nearly all hang together."""
    train, where = encoded["train"], sources["train"].where
    splits = {
        name: Split(encoded[name], np.ones(encoded[name].num_rows, bool), sources[name].where, True)
        for name in SPLITS
        if name in encoded
    }
    fractions = {name: fraction for name, fraction in _fractions(recipe).items() if name not in sources}
    if recipe.data.group is not None and recipe.data.time is None:
        _refuse_one_group(recipe, train, where, fractions)
    if recipe.data.time is None:
        strata = _strata(train)
        if recipe.data.group is not None:
            strata = rarest_of_group(strata, train.names, train.sides)
        taken = _drawn(train, strata, fractions)
    else:
        wanted = {name: max(1, held_out_rows(train.num_rows, fraction)) for name, fraction in fractions.items()}
        taken = split_by_time(train.times, train.sides, wanted)
    splits |= {name: Split(train, rows, where, is_file=name == "train") for name, rows in taken.items()}
    few = [
        f"{split.where}: {counted(split.num_rows, 'usable row')} for {name}; expected at least 2"
        for name, split in splits.items()
        if split.is_file and split.num_rows < 2 and name != "train"
    ]
    if few:
        raise DataError(few)
    _refuse_small(recipe, train, where, splits)
    return splits


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


def _refuse_small(recipe: Recipe, train: Encoded, where: str, splits: Mapping[SplitName, Split]) -> None:
    """Raises a `DataError` for splits that cannot be measured, or learned from."""
    block = recipe.data
    small = [f"{name} has {splits[name].num_rows}" for name in SPLITS if splits[name].num_rows < 2]
    if small and block.time is not None:
        times, sides = len(np.unique(train.times)), len(np.unique(train.sides))
        raise DataError(
            f"{where}: {counted(train.num_read, 'row')} cannot be split by '{block.time}' (data.time) into splits of "
            f"at least 2 rows ({', '.join(small)}): {counted(times, 'different time')} in "
            f"{counted(sides, 'group')} of rows that stay together, and of a group that reaches over a boundary only "
            "the rows before it are kept; give more rows, finer times, files for eval and test, or groups that "
            "begin at different times"
        )
    if small and block.group is not None:
        raise DataError(
            f"{where}: {counted(train.num_read, 'row')} in {counted(len(np.unique(train.sides)), 'group')} that stay "
            f"together by '{block.group}' (data.group) and by their texts: too few for three splits of at least 2 rows "
            f"({', '.join(small)}); give rows of more values of '{block.group}', or files for eval and test"
        )
    if small:
        strata = _strata(train)
        different = len(np.unique(train.groups))
        alike = f" (only {different} of them different)" if different < train.num_read else ""
        # A label is shared out among the splits by itself: no fraction helps where none has a row for each of them.
        of_each = np.bincount(np.unique(np.stack([strata + 1, train.groups.view(np.int64)]), axis=1)[0])
        parts = 1 + sum(not split.is_file for split in splits.values())
        scarce = len(train.names) > 1 and of_each.max() < parts
        of_labels = f" of {counted(len(train.names), 'label')}" if scarce else ""
        ways = [f"give more rows of each label, at least {parts} different ones" if scarce else "give more rows"]
        ways += ["files for eval and test"]
        if different >= 2 * len(SPLITS) and not scarce:
            ways += ["larger data.eval_fraction and data.test_fraction"]
        raise DataError(
            f"{where}: {counted(train.num_read, 'row')}{alike}{of_labels}: too few for three splits of at least 2 rows "
            f"({', '.join(small)}); {', '.join(ways[:-1])}, or {ways[-1]}{_sections(recipe)}"
        )


def _refuse_one_group(recipe: Recipe, train: Encoded, where: str, fractions: Mapping[SplitName, float]) -> None:
    """Rows that nearly all hang together cannot be split: the ones that do not are too few to be measured on."""
    column, rows = recipe.data.group, train.num_rows
    asked = sum(held_out_rows(rows, fraction) for fraction in fractions.values())
    largest, others = largest_group(train.sides), rows - largest_group(train.sides)
    if not fractions or 2 * others >= asked:
        return
    near = recipe.data.near_duplicates < 1
    of_texts = "equal or nearly equal texts" if near else "equal texts"
    raise DataError(
        f"{where}: {largest:,} of {counted(rows, 'row')} hang together, and the other {others:,} are too few for the "
        f"{asked:,} that {' and '.join(fractions)} ask for: chains of rows with the same '{column}' (data.group; the "
        f"most frequent value has {counted(largest_group(train.values), 'row')}) or {of_texts} (at most "
        f"{largest_group(train.groups):,} alike) must not be on two sides. Remove rows with texts that many share, "
        f"{'raise data.near_duplicates, ' if near else ''}name a finer column, or give files for eval and test"
    )


def largest_group(numbers: np.ndarray) -> int:
    """Rows in the largest group; 0 where there are none."""
    return int(np.unique(numbers, return_counts=True)[1].max(initial=0))


def held_out_rows(rows: int, fraction: float) -> int:
    """How many of so many rows a fraction asks for."""
    return min(MOST_HELD_OUT_ROWS, round(fraction * rows))


def _fractions(recipe: Recipe) -> dict[SplitName, float]:
    """In the order in which they are split off."""
    return {"test": recipe.data.test_fraction, "eval": recipe.data.eval_fraction}


def asked_rows(recipe: Recipe, splits: Mapping[SplitName, Split]) -> dict[SplitName, int]:
    """What the fraction asks for, of splits taken off train that have clearly more rows.

    That is so where labels have so few rows that their share would be none.
    """
    rows = splits["train"].source.num_rows
    asked = {name: held_out_rows(rows, _fractions(recipe)[name]) for name in HELD_OUT}
    return {
        name: few for name, few in asked.items() if not splits[name].is_file and splits[name].num_rows > 1.1 * few + 1
    }


def _sections(recipe: Recipe) -> str:
    """A text file with blank lines gives far fewer rows than it has paragraphs."""
    if recipe.data.text_rows != "auto" or not any(file.lower().endswith(".txt") for file in recipe.train_files()):
        return ""
    return (
        f"; paragraphs of a .txt are joined into rows of about {SECTION_CHARACTERS:,} characters: for one row a "
        "paragraph set data.text_rows: paragraph"
    )


def _strata(whole: Encoded) -> np.ndarray:
    """Each row's class: int64 [rows]; of several labels the rarest one: combinations would be too many to share out."""
    numbers, ends = whole.label_numbers, whole.label_ends
    sizes = np.diff(ends)
    strata = np.full(whole.num_rows, -1, np.int64)
    labelled = np.flatnonzero(sizes)
    if len(labelled):
        widest = int(sizes.max()) + 1
        place = np.arange(len(numbers)) - np.repeat(ends[:-1], sizes)
        # The smallest key of a row is that of its rarest label, of equally rare ones the first.
        keys = np.bincount(numbers)[numbers].astype(np.int64) * widest + place
        rarest = np.minimum.reduceat(keys, ends[:-1][labelled]) % widest
        strata[labelled] = numbers[ends[:-1][labelled] + rarest]
    return strata
