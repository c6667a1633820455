"""Checks that the rows can be learned from; what cannot is refused or left out and written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fulltune.errors import DataError
from fulltune.records.data import SplitName

MOST_LEFT_OUT = 0.05
"""Share of a file's rows that may be unusable; more points to a wrong column or a broken export."""
UNDECODABLE_IMAGE = "undecodable image"
_PLACES_SHOWN = 10


@dataclass(frozen=True)
class Dropped:
    """A row that was left out."""

    split: str
    place: str
    check: str
    reason: str
    row: dict[str, Any]
    """Empty for a further lost part of a row that stands before it."""


@dataclass
class LeftOut:
    """How many rows were left out by which check, and the first few of each; all of them are in `dropped.jsonl`."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[Dropped]] = field(default_factory=dict)

    def add(self, item: Dropped) -> None:
        self.counts[item.check] += 1
        shown = self.first.setdefault(item.check, [])
        if len(shown) < _PLACES_SHOWN:
            shown.append(item)

    def without(self, checks: Collection[str]) -> LeftOut:
        """The same, but for some checks."""
        return LeftOut(
            Counter({check: count for check, count in self.counts.items() if check not in checks}),
            {check: items for check, items in self.first.items() if check not in checks},
        )


def too_many(left_out: LeftOut, num_rows: int, where: str) -> list[str]:
    """Leaving out a few rows is worth a note, more than one in twenty would ruin the run in silence: a line for it."""
    total = left_out.counts.total()
    # One row is never many: an eval file of ten rows may have a bad one as well as a train file of thousands.
    if total <= max(1, MOST_LEFT_OUT * num_rows) and (total < num_rows or not total):
        return []
    first = next(iter(left_out.first.values()))[0]
    remedy = (
        "Raise data.max_length, shorten these rows, or leave them out with data.truncation_strategy: drop"
        if first.check == "answer cut off"
        else "Remove or repair these rows, or name another column in the recipe"
    )
    counts = ", ".join(f"{count} x {check}" for check, count in left_out.counts.most_common())
    return [
        f"{where}: {total} of {num_rows} rows cannot be used ({counts}); first: {first.place}, {first.reason}. {remedy}"
    ]


def undecodable(left_out: LeftOut, where: str) -> list[str]:
    """Images that cannot be decoded are left out only when the recipe says so: the first ten and their number."""
    count = left_out.counts[UNDECODABLE_IMAGE]
    if not count:
        return []
    return [
        *(f"{item.place}: {item.reason}" for item in left_out.first[UNDECODABLE_IMAGE]),
        f"{where}: {count} images cannot be decoded; repair them, or leave them out with data.undecodable_images: drop",
    ]


def labels_only_held_out(
    train_labels: Counter[str], held_out: Mapping[SplitName, Counter[str]], where: Mapping[SplitName, str]
) -> None:
    """A class that train does not have cannot be learned, so scoring it would be a silent loss.

    Raises:
        DataError: Naming each such label and its number of rows.
    """
    problems = []
    for split, counts in held_out.items():
        for label in sorted(set(counts) - set(train_labels)):
            problems.append(
                f"{where[split]}: label '{label}' ({counts[label]} rows of {split}) never occurs in train; "
                "add rows to train or remove them here"
            )
    if problems:
        raise DataError(problems)
