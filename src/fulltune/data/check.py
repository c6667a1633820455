"""Checks that the rows can be learned from; what cannot is refused or left out and written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.errors import DataError
from fulltune.records import SplitName

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


def too_many(dropped: Sequence[Dropped], num_rows: int, where: str) -> list[str]:
    """Leaving out a few rows is worth a note, more than one in twenty would ruin the run in silence: a line for it."""
    if not dropped:
        return []
    # One row is never many: an eval file of ten rows may have a bad one as well as a train file of thousands.
    if len(dropped) <= max(1, MOST_LEFT_OUT * num_rows) and len(dropped) < num_rows:
        return []
    first = dropped[0]
    remedy = (
        "Raise data.max_length, shorten these rows, or leave them out with data.truncation_strategy: drop"
        if first.check == "answer cut off"
        else "Remove or repair these rows, or name another column in the recipe"
    )
    counts = ", ".join(f"{count} x {check}" for check, count in Counter(item.check for item in dropped).most_common())
    return [
        f"{where}: {len(dropped)} of {num_rows} rows cannot be used ({counts}); first: {first.place}, {first.reason}. "
        f"{remedy}"
    ]


def undecodable(broken: Sequence[Dropped]) -> list[str]:
    """Images that cannot be decoded are left out only when the recipe says so: the first ten and their number."""
    if not broken:
        return []
    return [
        *(f"{item.place}: {item.reason}" for item in broken[:_PLACES_SHOWN]),
        f"{len(broken)} images cannot be decoded; repair them, or leave them out with data.undecodable_images: drop",
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
