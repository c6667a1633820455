"""Refuses rows that cannot be trained on, and writes notes about the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.audit.texts.content import note_similar_names
from fulltune.audit.texts.flaw import RE, masked
from fulltune.data.contamination import ForbiddenTexts
from fulltune.data.encode import NEW_LABEL, DropKind, Dropped, EncodedSource
from fulltune.data.groups import column_problems, format_time
from fulltune.data.sources import SourceName, is_mixed
from fulltune.data.split import HELD_OUT, SPLITS, Split, held_out_rows, largest_group
from fulltune.data.written import stored_rows
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import ALSO_OCCURS, shared_content
from fulltune.records.data import SplitName
from fulltune.tasks import Target
from fulltune.text import counted, first_few

MAX_DROPPED = 0.05
"""Largest share of unusable rows; more suggest a wrong column or broken export."""
UNDECODABLE_IMAGE = "undecodable image"
FEW_EVAL_ROWS = 50
_FEW_OF_A_CLASS = 5
"""With fewer rows, one answer changes a class's recall by over 20 points."""


def refuse_secret_names(target: Target, where: str) -> None:
    """Raise `DataError` if a column or label name, which the finished model shows, contains a secret."""
    names = [("column", name) for name in target.columns.values()] + [("label", name) for name in target.labels]
    secret = [f"{kind} {masked(name)}" for kind, name in names if RE["never_a_name"].search(masked_text(name))]
    if secret:
        raise DataError(
            f"{where}: names of labels and columns appear in reports and in the model's config.json, and some contain "
            f"secrets or personal numbers: {first_few(secret)}; rename them in the file"
        )


def refuse_unusable(recipe: Recipe, encoded: Mapping[SourceName, EncodedSource]) -> None:
    """Raise `DataError` for too many unusable rows, rows longer than allowed, and undecodable images."""
    strategy = recipe.data.truncation_strategy
    # Rows dropped as the recipe asks, and mixed-in rows of unknown labels, do not suggest a broken file.
    allowed = {UNDECODABLE_IMAGE, NEW_LABEL, *(("too long", "answer cut off") if strategy == "drop" else ())}
    problems: list[str] = []
    for name, source in encoded.items():
        where, tally = source.where, source.tally
        broken = tally.counts["unfit", UNDECODABLE_IMAGE]
        if broken and recipe.data.undecodable_images == "error":
            problems += [f"{place}: {reason}" for place, reason in tally.first["unfit", UNDECODABLE_IMAGE]]
            problems.append(
                f"{where}: {counted(broken, 'image')} cannot be decoded; repair or remove the files above, or set "
                "data.undecodable_images: drop"
            )
        if not is_mixed(name):
            problems += column_problems(recipe.data, tally, source.num_rows, where)
        problems += _problem_of_many_dropped(source, "unusable", (), source.num_read)
        problems += _problem_of_many_dropped(source, "unfit", allowed, source.num_read - tally.of("unusable").total())
        if strategy == "error" and (count := tally.of("too long").total()):
            problems.append(
                f"{where}: data.max_length is less than the length of {counted(count, 'row')} of {name}; raise it, or "
                "set data.truncation_strategy to truncate or drop"
            )
    if problems:
        raise DataError(problems)


def _problem_of_many_dropped(
    source: EncodedSource, kind: DropKind, allowed: Collection[str], num_rows: int
) -> list[str]:
    """Return an error message if too many rows were dropped, not counting `allowed` checks; else an empty list."""
    counts = Counter({check: count for check, count in source.tally.of(kind).items() if check not in allowed})
    total = counts.total()
    # A single row is never too many, even in a file of ten.
    if total <= max(1, MAX_DROPPED * num_rows) and (total < num_rows or not total):
        return []
    check = next(iter(counts))
    place, reason = source.tally.first[kind, check][0]
    remedy = (
        "Raise data.max_length, shorten these rows, or drop them with data.truncation_strategy: drop"
        if check == "answer cut off"
        else "Remove or repair these rows, or name another column in the recipe"
    )
    by_check = ", ".join(f"{count} x {check}" for check, count in counts.most_common())
    return [
        f"{source.where}: {total:,} of {counted(num_rows, 'row')} cannot be used ({by_check}); first: {place}, "
        f"{masked_text(reason)}. {remedy}"
    ]


def refuse_new_labels(block: DataBlock, splits: Mapping[SplitName, Split]) -> None:
    """Raise `DataError` for classes that train lacks, because they cannot be learned."""
    train = splits["train"].label_counts()
    columns = {"time": block.time, "group": block.group}
    by = "".join(f" by '{column}' (data.{role})" for role, column in columns.items() if column)
    why = f": all its rows were held out{by}; add rows with this label, remove these rows, or change data.split_seed"
    problems = [
        f"{splits[name].source.where}: label '{label}' ({counted(count, 'row')} of {name}) never occurs in train"
        f"{'; add rows to train or remove them here' if splits[name].has_own_file else why}"
        for name in HELD_OUT
        for label, count in sorted(splits[name].label_counts().items())
        if label not in train
    ]
    if problems:
        raise DataError(problems)


# ---- notes -----------------------------------------------------------------------------------------------------


def notes(splits: Mapping[SplitName, Split], target: Target, near: bool = False) -> list[str]:
    """Return notes on few eval rows, groups in several splits, and classes with similar names or no usable rows."""
    dev, remarks = splits["eval"], list[str]()
    if dev.num_rows < FEW_EVAL_ROWS:
        remarks.append(f"only {counted(dev.num_rows, 'eval row')}: too few to tell reliably which weights are better")
    remarks += _note_shared_groups(
        splits, "groups", shared_content(target.columns), " (equal, or nearly so)" if near else ""
    )
    counts = sum((Counter(split.label_counts()) for split in splits.values()), Counter[str]())
    if "label" not in target.columns:
        return remarks
    if similar_names := note_similar_names(counts):
        remarks.append(similar_names)
    if unused := [f"'{name}'" for name in target.labels if name not in counts]:
        remarks.append(
            f"classes without a usable row, so nothing trains their outputs: {first_few(unused)}; repair or remove "
            "their rows (data/dropped.jsonl)"
        )
    return remarks


def _note_shared_groups(
    splits: Mapping[SplitName, Split], of: Literal["groups", "group_values"], what: str, nearly: str = ""
) -> list[str]:
    overlaps: tuple[tuple[SplitName, SplitName], ...] = (("eval", "train"), ("test", "train"), ("test", "eval"))
    return [
        f"{count:,} of {splits[name].num_rows:,} {name} rows have a {what} that {ALSO_OCCURS} {other}{nearly}"
        f"{': scores on them are optimistic' if other == 'train' else ', which is used to choose the checkpoint'}"
        for name, other in overlaps
        if (count := num_shared(splits[name], splits[other], of))
    ]


def note_on_flaws(sources: Iterable[EncodedSource]) -> list[str]:
    """Report how many rows have each text flaw."""
    counts = sum((source.tally.of("flaw") for source in sources), Counter[str]())
    shown = ", ".join(f"{check} in {counted(count, 'row')}" for check, count in counts.most_common())
    return [f"texts that look wrong: {shown}; 'fulltune data' lists them"] if counts else []


def num_shared(split: Split, other: Split, of: Literal["groups", "group_values"] = "groups") -> int:
    """Count rows of `split` whose group (or `data.group` value) also occurs in `other`."""
    return int(np.isin(getattr(split, of), getattr(other, of)).sum())


def note_unmeasured(train: Split, test: Split) -> list[str]:
    """Return a note on train classes with fewer than five test rows."""
    in_train, in_test = train.label_counts(), test.label_counts()
    scarce = sorted((in_test[name], name) for name in in_train if in_test[name] < _FEW_OF_A_CLASS)
    # With few test rows in total, the note would be obvious.
    if not scarce or (scarce[0][0] and test.num_rows < FEW_EVAL_ROWS):
        return []
    shown = ", ".join(f"'{name}' ({count})" for count, name in scarce[:3])
    return [
        f"{len(scarce)} of {counted(len(in_train), 'class', 'classes')} with fewer than {_FEW_OF_A_CLASS} of the "
        f"{test.num_rows:,} test rows, too few to measure: {shown}"
    ]


IN_EARLIER_SPLIT = "also in an earlier split"


def late_rows(splits: Mapping[SplitName, Split]) -> np.ndarray:
    """Mark the train rows that are used in no split, because their group begins in an earlier split: bool [rows]."""
    return ~np.logical_or.reduce([split.rows for split in splits.values() if split.source is splits["train"].source])


def dropped_late(block: DataBlock, train: EncodedSource, late: np.ndarray) -> Iterator[Dropped]:
    """Yield the train rows marked in `late`, each with the reason why it was dropped."""
    same = f"its text, or its '{block.group}'," if block.group else "its text"
    reason = f"{same} also occurs in an earlier split by '{block.time}'"
    for _, place, row in stored_rows(train, late):
        yield Dropped("train", place, IN_EARLIER_SPLIT, reason, row)


def notes_on_splitting(recipe: Recipe, splits: Mapping[SplitName, Split]) -> list[str]:
    """Report how `data.time` and `data.group` split the rows, and which values occur in more than one split."""
    block, train, remarks = recipe.data, splits["train"].source, list[str]()
    own = {name: splits[name] for name in SPLITS if splits[name].source is train}
    if block.time is not None:
        remarks.append(_note_on_time_split(block, own, int(late_rows(splits).sum())))
    elif own.keys() - {"train"}:
        # The fractions mean nothing for splits with their own files.
        fractions = {"eval": block.eval_fraction, "test": block.test_fraction}
        for name in filter(own.__contains__, HELD_OUT):
            rows, wanted = own[name].num_rows, held_out_rows(train.num_rows, fractions[name])
            if abs(rows - wanted) > 0.1 * wanted + 1:
                remarks.append(
                    f"{counted(rows, f'{name} row')} instead of the {wanted:,} that data.{name}_fraction asks for: "
                    "groups are never separated, and each label with several texts contributes at least one"
                )
    if block.group is None:
        return remarks
    if len(own) > 1:
        # Values that share a text form one group.
        values, groups = (len(np.unique(numbers)) for numbers in (train.group_values, train.split_groups))
        joined = f" in {counted(groups, 'group')}, as some share texts" if groups < values else ""
        remarks.append(
            f"rows with the same '{block.group}' stay in one split: {counted(values, 'value')}{joined}; the largest "
            f"group has {counted(largest_group(train.split_groups), 'row')}"
        )
    return remarks + _note_shared_groups(splits, "group_values", f"'{block.group}'")


def _note_on_time_split(block: DataBlock, own: Mapping[SplitName, Split], late: int) -> str:
    train = own["train"].source
    kind = next(iter(train.tally.of("kind of time")))
    spans = []
    for name, split in own.items():
        times = train.times[split.rows]
        first, last = (format_time(kind, float(time)) for time in (times.min(), times.max()))
        spans.append(f"{name} {first} to {last}")
    note = f"split by '{block.time}': {', '.join(spans)}"
    if late:
        same = f"text, or '{block.group}'," if block.group else "text"
        note += (
            f"; {late:,} of {counted(train.num_rows, 'row')} dropped: the same {same} also occurs in an earlier split "
            "(data/dropped.jsonl)"
        )
    return note


def notes_on_forbidden(texts: ForbiddenTexts | None, train: Split, mixed: Mapping[SourceName, Split]) -> list[str]:
    """Report how many trained rows contain a forbidden text."""
    if texts is None:
        return []
    remarks = []
    for name, split in {"train": train, **mixed}.items():
        rows = split.source.holds_forbidden & split.rows
        kind = "train rows" if name == "train" else f"mixed-in rows of {split.source.where}"
        if not (count := int(rows.sum())):
            remarks.append(f"none of {split.num_rows:,} {kind} contains one of {texts.source}")
            continue
        places = [place for _, place, _ in stored_rows(split.source, rows)]
        remarks.append(
            f"{count:,} of {split.num_rows:,} {kind} contain one of {texts.source}, or much of it: "
            f"{first_few(places)}; scores on these texts will be optimistic: remove the rows, or do not report the "
            "scores"
        )
    return remarks
