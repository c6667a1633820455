from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.audit.texts.content import note_similar_names
from fulltune.audit.texts.flaw import RE, mask_secret
from fulltune.data.contamination import ForbiddenTexts
from fulltune.data.encode import NEW_LABEL, DropKind, DroppedRow, EncodedSource
from fulltune.data.groups import format_time, group_and_time_problems
from fulltune.data.sources import SourceName, is_mixed
from fulltune.data.split import HELD_OUT, SPLITS, Split, held_out_rows, largest_group
from fulltune.data.written import iterate_stored_rows
from fulltune.errors import DataError
from fulltune.inference.store import Rows
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import ALSO_OCCURS, shared_content
from fulltune.records.data import SplitName
from fulltune.tasks import Target
from fulltune.text import counted, first_few

MAX_UNUSABLE_SHARE = 0.05
UNDECODABLE_IMAGE = "undecodable image"
FEW_EVAL_ROWS = 50
_FEW_OF_A_CLASS = 5
"""With fewer rows, one answer changes a class's recall by over 20 points."""


def refuse_secrets_in_names(target: Target, file_name: str) -> None:
    """Raise `DataError` if a column or label name contains a secret."""
    names = [("column", name) for name in target.columns.values()] + [("label", name) for name in target.labels]
    secret = [f"{kind} {mask_secret(name)}" for kind, name in names if RE["never_a_name"].search(masked_text(name))]
    if secret:
        raise DataError(
            f"{file_name}: label and column names appear in reports and in the model's config.json, but some contain "
            f"secrets or personal numbers: {first_few(secret)}; rename them in the file"
        )


def refuse_unusable_rows(recipe: Recipe, encoded: Mapping[SourceName, EncodedSource]) -> None:
    """Raise `DataError` for bad groups or times, for too many unusable rows and, if the recipe forbids them, for
    undecodable images or overlong rows."""
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
            problems += group_and_time_problems(recipe.data, tally, source.num_rows, where)
        problems += _too_many_dropped_problem(source, "unusable", (), source.num_read)
        problems += _too_many_dropped_problem(source, "unfit", allowed, source.num_read - tally.of("unusable").total())
        if strategy == "error" and (count := tally.of("too long").total()):
            problems.append(
                f"{where}: {counted(count, 'row')} of {name} exceed data.max_length; raise it, or set "
                "data.truncation_strategy to truncate or drop"
            )
    if problems:
        raise DataError(problems)


def _too_many_dropped_problem(
    source: EncodedSource, kind: DropKind, allowed_checks: Collection[str], num_checked: int
) -> list[str]:
    """Return a list with one error message if too many of the `num_checked` rows failed checks of this kind other than
    `allowed_checks`, else an empty list."""
    counts = Counter({check: count for check, count in source.tally.of(kind).items() if check not in allowed_checks})
    total = counts.total()
    # A single row is never too many, even in a file of ten.
    if total <= max(1, MAX_UNUSABLE_SHARE * num_checked) and (total < num_checked or not total):
        return []
    check = next(iter(counts))
    place, reason = source.tally.first[kind, check][0]
    remedy = (
        "Raise data.max_length, shorten these rows, or drop them with data.truncation_strategy: drop"
        if check == "answer cut off"
        else "Remove or repair these rows, or choose another column in the recipe"
    )
    by_check = ", ".join(f"{check}: {count}" for check, count in counts.most_common())
    return [
        f"{source.where}: {total:,} of {counted(num_checked, 'row')} cannot be used ({by_check}). The first is "
        f"{place}: {masked_text(reason)}. {remedy}"
    ]


def refuse_labels_not_in_train(block: DataBlock, splits: Mapping[SplitName, Split]) -> None:
    """Raise `DataError` if eval or test contains a label that train lacks."""
    train = splits["train"].label_counts()
    columns = {"time": block.time, "group": block.group}
    by = "".join(f" by '{column}' (data.{role})" for role, column in columns.items() if column)
    why = f": all its rows were held out{by}; add rows with this label, remove these rows, or change data.split_seed"
    problems = [
        f"{splits[name].source.where}: label '{label}' ({counted(count, 'row')} of {name}) never occurs in train"
        f"{'; add such rows to train, or remove these' if splits[name].has_own_file else why}"
        for name in HELD_OUT
        if not (block.folds and name == "test")  # a note tells of rare classes
        for label, count in sorted(splits[name].label_counts().items())
        if label not in train
    ]
    if problems:
        raise DataError(problems)


# ---- notes -----------------------------------------------------------------------------------------------------


def note_split_problems(splits: Mapping[SplitName, Split], target: Target, near_duplicates: bool = False) -> list[str]:
    """Return notes on too few eval rows, texts that occur in several splits, similar class names, and classes without
    rows.

    If `near_duplicates` is set, near duplicates count as one text.
    """
    dev, remarks = splits["eval"], list[str]()
    if dev.num_rows < FEW_EVAL_ROWS:
        remarks.append(f"only {counted(dev.num_rows, 'eval row')}, which is too few to compare checkpoints reliably")
    remarks += _note_values_in_two_splits(
        splits, "groups", shared_content(target.columns), " (equal, or nearly so)" if near_duplicates else ""
    )
    counts = sum((Counter(split.label_counts()) for split in splits.values()), Counter[str]())
    if "label" not in target.columns:
        return remarks
    if similar_names := note_similar_names(counts):
        remarks.append(similar_names)
    if unused := [f"'{name}'" for name in target.labels if name not in counts]:
        remarks.append(
            f"classes without a usable row, which cannot be learned: {first_few(unused)}; repair or remove their rows "
            "(data/dropped.jsonl)"
        )
    return remarks


def _note_values_in_two_splits(
    splits: Mapping[SplitName, Split], attribute: Literal["groups", "group_values"], shown_as: str, suffix: str = ""
) -> list[str]:
    """Return a note for each pair of splits whose rows share values of `attribute`, which the notes call `shown_as`."""
    overlaps: tuple[tuple[SplitName, SplitName], ...] = (("eval", "train"), ("test", "train"), ("test", "eval"))
    return [
        f"{count:,} of {splits[name].num_rows:,} {name} rows have a {shown_as} that {ALSO_OCCURS} {other}{suffix}"
        f"{', so scores on them are optimistic' if other == 'train' else ', which is used to choose the checkpoint'}"
        for name, other in overlaps
        if (count := num_shared(splits[name], splits[other], attribute))
    ]


def notes_on_texts(sources: Collection[EncodedSource]) -> Iterator[str]:
    """Yield notes on how many rows have text flaws, and thinking parts of answers that are trained or not."""
    for kind, title in (("flaw", "suspicious texts"), ("thinking", "thinking parts of answers")):
        counts = sum((source.tally.of(kind) for source in sources), Counter[str]())
        shown = ", ".join(f"{what} in {counted(count, 'row')}" for what, count in counts.most_common())
        remedy = "; 'fulltune data' lists them" if kind == "flaw" else ""
        if any("dropped" in what for what in counts):
            remedy = "; to train these, set data.chat_template"
        if counts:
            yield f"{title}: {shown}{remedy}"


def num_shared(split: Split, other: Split, attribute: Literal["groups", "group_values"] = "groups") -> int:
    """Count rows of `split` whose group (or `data.group` value) also occurs in `other`."""
    return int(np.isin(getattr(split, attribute), getattr(other, attribute)).sum())


def note_rarely_tested_classes(train: Split, test: Split) -> list[str]:
    """Return a note on train classes with fewer than five test rows, or an empty list."""
    in_train, in_test = train.label_counts(), test.label_counts()
    scarce = sorted((in_test[name], name) for name in in_train if in_test[name] < _FEW_OF_A_CLASS)
    # With few test rows in total, the note would be obvious.
    if not scarce or (scarce[0][0] and test.num_rows < FEW_EVAL_ROWS):
        return []
    shown = ", ".join(f"'{name}' ({count})" for count, name in scarce[:3])
    return [
        f"{len(scarce)} of {counted(len(in_train), 'class', 'classes')} have fewer than {_FEW_OF_A_CLASS} of the "
        f"{test.num_rows:,} test rows, which is too few for a reliable score: {shown}"
    ]


IN_EARLIER_SPLIT = "also in an earlier split"


def rows_in_no_split(splits: Mapping[SplitName, Split]) -> np.ndarray:
    """Mark rows that a time split drops, because their text or group is also in an earlier split: bool [source
    rows]."""
    return ~np.logical_or.reduce([split.rows for split in splits.values() if split.source is splits["train"].source])


def rows_dropped_by_time_split(block: DataBlock, train: EncodedSource, is_dropped: np.ndarray) -> Iterator[DroppedRow]:
    """Yield a `DroppedRow` for each row that is marked in `is_dropped`."""
    same = f"its text, or its '{block.group}'," if block.group else "its text"
    reason = f"{same} also occurs in an earlier split by '{block.time}'"
    for _, place, row in iterate_stored_rows(train, is_dropped):
        yield DroppedRow("train", place, IN_EARLIER_SPLIT, reason, row)


def notes_on_splitting(recipe: Recipe, splits: Mapping[SplitName, Split]) -> list[str]:
    """Return notes on how `data.time` and `data.group` split the rows, and on values that occur in two splits."""
    block, train, remarks = recipe.data, splits["train"].source, list[str]()
    own = {name: splits[name] for name in SPLITS if splits[name].source is train}
    if block.time is not None:
        remarks.append(_note_on_time_split(block, own, int(rows_in_no_split(splits).sum())))
    elif own.keys() - {"train"}:
        # The fractions mean nothing for splits with their own files.
        fractions = {"eval": block.eval_fraction, "test": block.test_fraction}
        for name in filter(own.__contains__, HELD_OUT[: 1 if block.folds else 2]):
            rows, wanted = own[name].num_rows, held_out_rows(train.num_rows, fractions[name])
            if abs(rows - wanted) > 0.1 * wanted + 1:
                remarks.append(
                    f"{counted(rows, f'{name} row')} instead of the {wanted:,} that data.{name}_fraction requests, "
                    "because groups are never separated and each label with several texts contributes at least one"
                )
    counts = sorted(splits["train"].label_counts(np.ones(train.num_rows)).items(), key=lambda item: item[1])
    if block.folds and (few := [f"'{name}' ({count})" for name, count in counts if count < block.folds]):
        what = f"{counted(len(few), 'class has', 'classes have')} fewer rows than the {block.folds} folds"
        remarks.append(f"{what}, so some folds do not test them, or do not train them: {first_few(few)}")
    if block.group is None:
        return remarks
    if len(own) > 1:
        # Values that share a text form one group.
        values, groups = (len(np.unique(numbers)) for numbers in (train.group_values, train.split_groups))
        joined = f" in {counted(groups, 'group')}, because some share texts" if groups < values else ""
        remarks.append(
            f"rows with the same '{block.group}' stay in one split: {counted(values, 'value')}{joined}; the largest "
            f"group has {counted(largest_group(train.split_groups), 'row')}"
        )
    return remarks + _note_values_in_two_splits(splits, "group_values", f"'{block.group}'")


def _note_on_time_split(block: DataBlock, splits_of_train: Mapping[SplitName, Split], num_dropped: int) -> str:
    """Describe the first and last time of each split, and the number of rows dropped."""
    train = splits_of_train["train"].source
    kind = next(iter(train.tally.of("kind of time")))
    spans = []
    for name, split in splits_of_train.items():
        times = train.times[split.rows]
        first, last = (format_time(kind, float(time)) for time in (times.min(), times.max()))
        spans.append(f"{name} {first} to {last}")
    note = f"split by '{block.time}': {', '.join(spans)}"
    if num_dropped:
        same = f"text, or '{block.group}'," if block.group else "text"
        note += (
            f"; {num_dropped:,} of {counted(train.num_rows, 'row')} were dropped because the same {same} also occurs "
            "in an earlier split (data/dropped.jsonl)"
        )
    return note


def note_queries_without_relevant(folder: Path) -> list[str]:
    """Return a note on queries without a relevant candidate. Raise `DataError` if a split has no other queries."""
    lacking = list[str]()
    for name in SPLITS:
        ids, grades = np.stack(Rows(folder / name)["labels"]).T
        if not grades.any():
            raise DataError(f"data.{name}: no query has a relevant candidate (a label above 0); add rows with one")
        count = len(np.unique(ids)) - len(np.unique(ids[grades > 0]))
        lacking += [f"{count:,} of {name}"] if count else []
    return [f"queries without a relevant candidate, which no metric counts: {', '.join(lacking)}"] if lacking else []


def note_forbidden_texts(texts: ForbiddenTexts | None, train: Split, mixed_in: Mapping[SourceName, Split]) -> list[str]:
    """Return notes on how many train and mixed-in rows contain a forbidden text."""
    if texts is None:
        return []
    remarks = []
    for name, split in {"train": train, **mixed_in}.items():
        rows = split.source.holds_forbidden & split.rows
        kind = "train rows" if name == "train" else f"mixed-in rows of {split.source.where}"
        if not (count := int(rows.sum())):
            remarks.append(f"none of the {split.num_rows:,} {kind} contains one of {texts.source}")
            continue
        places = [place for _, place, _ in iterate_stored_rows(split.source, rows)]
        remarks.append(
            f"{count:,} of {split.num_rows:,} {kind} contain all or much of one of {texts.source}: "
            f"{first_few(places)}, so scores on these texts would be optimistic; remove the rows, or do not report "
            "these scores"
        )
    return remarks
