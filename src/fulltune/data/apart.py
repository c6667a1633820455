"""What is noted of rows that must be kept apart: whose they are, when they came, and what they must not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from fulltune.data.contamination import KnownTexts
from fulltune.data.encode import Dropped, Encoded
from fulltune.data.marks import kind_of_time, time_in_words
from fulltune.data.sources import SourceName, SourceRows, is_mixed
from fulltune.data.split import HELD_OUT, SPLITS, Split, held_out_rows, largest_group
from fulltune.data.written import kept_rows
from fulltune.recipe.data import DataBlock
from fulltune.records.data import SplitName
from fulltune.text import counted

STANDS_EARLIER = "stands in an earlier split"
_SHOWN = 3


def late_rows(splits: Mapping[SplitName, Split]) -> np.ndarray:
    """The rows of the train file that are in no split, because their group begins in an earlier one: bool [rows]."""
    train = splits["train"]
    taken = [split.rows for split in splits.values() if split.source is train.source]
    return ~np.logical_or.reduce(taken)


def listed_late(block: DataBlock, train: Encoded, late: np.ndarray) -> Iterator[Dropped]:
    """These rows, one by one, as they are written down."""
    same = f"its text, or its '{block.group}'," if block.group else "its text"
    reason = f"{same} also stands in rows before the boundary of a split by '{block.time}'"
    for _, place, row in kept_rows(train, late):
        yield Dropped("train", place, STANDS_EARLIER, reason, row)


def notes_apart(block: DataBlock, splits: Mapping[SplitName, Split]) -> list[str]:
    """How rows were split by `data.time` and `data.group`, and what files of their own share with train."""
    by_time = [] if block.time is None else [_split_by_time(block, splits)]
    return [*by_time, *([] if block.group is None else _of_groups(block, block.group, splits))]


def _split_by_time(block: DataBlock, splits: Mapping[SplitName, Split]) -> str:
    train = splits["train"]
    kind = kind_of_time(train.source.found)
    spans = []
    for name in SPLITS:
        if (split := splits[name]).source is train.source:
            times = train.source.times[split.rows]
            first, last = (time_in_words(kind, float(time)) for time in (times.min(), times.max()))
            spans.append(f"{name} {first} to {last}")
    said = f"split by '{block.time}': {', '.join(spans)}"
    if count := int(late_rows(splits).sum()):
        same = f"text, or '{block.group}'," if block.group else "text"
        verb, whose = ("is", "its") if count == 1 else ("are", "their")
        said += (
            f"; {count:,} of {counted(train.source.num_rows, 'row')} {verb} left out, for {whose} {same} also stands "
            "in an earlier split (data/dropped.jsonl)"
        )
    return said


def _of_groups(block: DataBlock, column: str, splits: Mapping[SplitName, Split]) -> list[str]:
    train, remarks = splits["train"], []
    whole = train.source
    own = {name: splits[name] for name in SPLITS if splits[name].source is whole}
    if len(own) > 1:
        # By texts, values hang together.
        values, sides = (len(np.unique(numbers)) for numbers in (whole.values, whole.sides))
        joined = f", {counted(sides, 'group')} where these share texts" if sides < values else ""
        remarks.append(
            f"kept on one side of the split by '{column}': {counted(values, 'value')}{joined}, the largest of "
            f"{counted(largest_group(whole.sides), 'row')}"
        )
    for name in HELD_OUT if block.time is None else ():
        asked = held_out_rows(whole.num_rows, block.eval_fraction if name == "eval" else block.test_fraction)
        if name in own and abs(own[name].num_rows - asked) > 0.1 * asked + 1:
            remarks.append(
                f"{counted(own[name].num_rows, f'{name} row')} where data.{name}_fraction asks for {asked:,}: rows of "
                f"one '{column}' are taken together"
            )
    pairs: tuple[tuple[SplitName, SplitName, str], ...] = (
        ("eval", "train", ": their scores flatter the model"),
        ("test", "train", ": their scores flatter the model"),
        ("test", "eval", ", which choose the checkpoint"),
    )
    for name, other, why in pairs:
        split = splits[name]
        if count := int(np.isin(split.values, splits[other].values).sum()):
            verb = "shares its" if count == 1 else "share their"
            remarks.append(f"{count:,} of {split.num_rows:,} {name} rows {verb} '{column}' with {other} rows{why}")
    return remarks


def notes_on_known(
    known: KnownTexts | None,
    train: Split,
    encoded: Mapping[SourceName, Encoded],
    sources: Mapping[SourceName, SourceRows],
    lost: list[Dropped],
) -> list[str]:
    """Notes on trained rows that hold a text of `data.contamination`."""
    if known is None:
        return []
    remarks = [_on_known(known, train.source, train.source.holds_known & train.rows, train.num_rows, "train rows")]
    for name in filter(is_mixed, encoded):
        whole, places = encoded[name], {item.place for item in lost if item.split == name}
        rows = whole.holds_known.copy()
        if places and rows.any():
            rows[[number for number, place, _ in kept_rows(whole, rows) if place in places]] = False
        kind = f"rows of {sources[name].where}, which is mixed in,"
        remarks.append(_on_known(known, whole, rows, whole.num_rows - len(places), kind))
    return remarks


def _on_known(known: KnownTexts, whole: Encoded, rows: np.ndarray, total: int, kind: str) -> str:
    if not (count := int(rows.sum())):
        return f"none of {total:,} {kind} holds one of {known.source} (data.contamination)"
    places = [place for _, place, _ in islice(kept_rows(whole, rows), _SHOWN)]
    more = f" and {count - len(places):,} more" if count > len(places) else ""
    verb = "holds" if count == 1 else "hold"
    return (
        f"{count:,} of {total:,} {kind} {verb} one of {known.source} (data.contamination), or much of it: "
        f"{', '.join(places)}{more}; scores on these texts flatter the model: remove the rows, or do not report them"
    )
