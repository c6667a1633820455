"""What is wrong with the rows, or worth knowing about them: refused, or noted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.audit.texts.content import alike_in_words
from fulltune.audit.texts.flaw import RE, masked
from fulltune.data.contamination import KnownTexts
from fulltune.data.encode import NEW_LABEL, Dropped, Encoded, Loss
from fulltune.data.groups import problems_of, time_in_words
from fulltune.data.sources import SourceName, is_mixed
from fulltune.data.split import HELD_OUT, SPLITS, Split, held_out_rows, largest_group
from fulltune.data.written import kept_rows
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import shared_content
from fulltune.records.data import SplitName
from fulltune.tasks import Target
from fulltune.text import counted, first_few

MOST_DROPPED = 0.05
"""Share of a file's rows that may be unusable; more points to a wrong column or a broken export."""
UNDECODABLE_IMAGE = "undecodable image"
FEW_EVAL_ROWS = 50
_FEW_OF_A_CLASS = 5
"""One right answer more or less then moves its recall by 20 points or more."""


def refuse_secret_names(target: Target, where: str) -> None:
    """Refuse passwords, keys and numbers of cards, accounts or people as names of labels and columns, which nothing can
    hide from who reads the finished model."""
    names = [("column", name) for name in target.columns.values()] + [("label", name) for name in target.labels]
    secret = [f"{kind} {masked(name)}" for kind, name in names if RE["never_a_name"].search(masked_text(name))]
    if secret:
        raise DataError(
            f"{where}: names of labels and columns stand in reports and in the model's config.json, and there are "
            f"secrets or numbers of people in them: {first_few(secret)}; rename them in the file"
        )


def refuse_unusable(recipe: Recipe, encoded: Mapping[SourceName, Encoded]) -> None:
    """Raises a `DataError` for too many unusable rows, too long ones where that is an error, and broken images."""
    strategy = recipe.data.truncation_strategy
    # Rows that the user asked to drop, or that are mixed in only where they suit, are not held against the file.
    allowed = {UNDECODABLE_IMAGE, NEW_LABEL, *(("too long", "answer cut off") if strategy == "drop" else ())}
    problems: list[str] = []
    for name, whole in encoded.items():
        where, tally = whole.where, whole.tally
        broken = tally.counts["unfit", UNDECODABLE_IMAGE]
        if broken and recipe.data.undecodable_images == "error":
            problems += [f"{place}: {reason}" for place, reason in tally.first["unfit", UNDECODABLE_IMAGE]]
            problems.append(
                f"{where}: {counted(broken, 'image')} cannot be decoded; repair or remove what is named, or set "
                "data.undecodable_images: drop"
            )
        if not is_mixed(name):
            problems += problems_of(recipe.data, tally, whole.num_rows, where)
        problems += _too_many(whole, "unusable", (), whole.num_read)
        problems += _too_many(whole, "unfit", allowed, whole.num_read - tally.of("unusable").total())
        if strategy == "error" and (count := tally.of("too long").total()):
            problems.append(
                f"{where}: {counted(count, 'row')} of {name} longer than data.max_length; raise it, or set "
                "data.truncation_strategy to truncate or drop"
            )
    if problems:
        raise DataError(problems)


def _too_many(whole: Encoded, loss: Loss, allowed: Collection[str], num_rows: int) -> list[str]:
    """Dropping a few rows is worth a note, more than one in twenty would ruin the run in silence: a line for it."""
    counts = Counter({check: count for check, count in whole.tally.of(loss).items() if check not in allowed})
    total = counts.total()
    # One row is never many: an eval file of ten rows may have a bad one as well as a train file of thousands.
    if total <= max(1, MOST_DROPPED * num_rows) and (total < num_rows or not total):
        return []
    check = next(iter(counts))
    place, reason = whole.tally.first[loss, check][0]
    remedy = (
        "Raise data.max_length, shorten these rows, or drop them with data.truncation_strategy: drop"
        if check == "answer cut off"
        else "Remove or repair these rows, or name another column in the recipe"
    )
    by_check = ", ".join(f"{count} x {check}" for check, count in counts.most_common())
    return [
        f"{whole.where}: {total:,} of {counted(num_rows, 'row')} cannot be used ({by_check}); first: {place}, "
        f"{masked_text(reason)}. {remedy}"
    ]


def refuse_new_labels(block: DataBlock, splits: Mapping[SplitName, Split]) -> None:
    """Raises a `DataError` for classes that train lacks: they cannot be learned, and scoring them is a silent loss."""
    train = splits["train"].label_counts()
    columns = {"time": block.time, "group": block.group}
    by = "".join(f" by '{column}' (data.{role})" for role, column in columns.items() if column)
    why = f": its rows are held out{by}; add rows of it, remove these, or split otherwise (data.split_seed)"
    problems = [
        f"{splits[name].source.where}: label '{label}' ({counted(count, 'row')} of {name}) never occurs in train"
        f"{'; add rows to train or remove them here' if splits[name].is_file else why}"
        for name in HELD_OUT
        for label, count in sorted(splits[name].label_counts().items())
        if label not in train
    ]
    if problems:
        raise DataError(problems)


# ---- notes -----------------------------------------------------------------------------------------------------


def notes(splits: Mapping[SplitName, Split], target: Target, near: bool = False) -> list[str]:
    """Few rows to choose by, held-out rows that share what is asked with others, classes that may be one."""
    dev, remarks = splits["eval"], list[str]()
    if dev.num_rows < FEW_EVAL_ROWS:
        remarks.append(f"only {counted(dev.num_rows, 'eval row')}: hardly enough to tell which weights are better")
    remarks += _shared(splits, "groups", shared_content(target.columns), " (equal, or nearly so)" if near else "")
    of_classes = sum((Counter(split.label_counts()) for split in splits.values()), Counter[str]())
    if "label" not in target.columns:
        return remarks
    if told := alike_in_words(of_classes):
        remarks.append(told)
    if lost := [f"'{name}'" for name in target.labels if name not in of_classes]:
        remarks.append(
            f"classes of which no row can be used, so that nothing trains their outputs: {first_few(lost)}; repair or "
            "remove their rows (data/dropped.jsonl)"
        )
    return remarks


def _shared(
    splits: Mapping[SplitName, Split], of: Literal["groups", "values"], what: str, nearly: str = ""
) -> list[str]:
    """Notes on held-out rows whose groups, or values of `data.group`, are also those of another split's."""
    overlaps: tuple[tuple[SplitName, SplitName], ...] = (("eval", "train"), ("test", "train"), ("test", "eval"))
    return [
        f"{count:,} of {splits[name].num_rows:,} {name} rows have a {what} that also stands in {other}{nearly}"
        f"{': their scores flatter the model' if other == 'train' else ', which chooses the checkpoint'}"
        for name, other in overlaps
        if (count := num_shared(splits[name], splits[other], of))
    ]


def note_on_flaws(sources: Iterable[Encoded]) -> list[str]:
    """What the cheap checks found in the rows' texts."""
    found = sum((source.tally.of("flaw") for source in sources), Counter[str]())
    shown = ", ".join(f"{check} in {counted(count, 'row')}" for check, count in found.most_common())
    return [f"texts that look wrong: {shown}; the audit of 'fulltune data' lists them"] if found else []


def num_shared(split: Split, other: Split, of: Literal["groups", "values"] = "groups") -> int:
    """Rows of a split whose text, or prompt, also stands in another one; or whose value of `data.group` does."""
    return int(np.isin(getattr(split, of), getattr(other, of)).sum())


def unmeasured(train: Split, test: Split) -> list[str]:
    """Classes of train that no test row has, or hardly any: their quality is not known."""
    in_train, in_test = train.label_counts(), test.label_counts()
    scarce = sorted((in_test[name], name) for name in in_train if in_test[name] < _FEW_OF_A_CLASS)
    # Of few test rows in all, that is plain to see.
    if not scarce or (scarce[0][0] and test.num_rows < FEW_EVAL_ROWS):
        return []
    shown = ", ".join(f"'{name}' ({count})" for count, name in scarce[:3])
    return [
        f"classes with fewer than {_FEW_OF_A_CLASS} of the {test.num_rows:,} test rows, so that their scores are close "
        f"to chance, or nothing measures them: {len(scarce)} of {len(in_train)}: {shown}"
    ]


STANDS_EARLIER = "stands in an earlier split"


def late_rows(splits: Mapping[SplitName, Split]) -> np.ndarray:
    """The rows of the train file that are in no split, because their group begins in an earlier one: bool [rows]."""
    return ~np.logical_or.reduce([split.rows for split in splits.values() if split.source is splits["train"].source])


def listed_late(block: DataBlock, train: Encoded, late: np.ndarray) -> Iterator[Dropped]:
    """These rows, one by one, as they are written down."""
    same = f"its text, or its '{block.group}'," if block.group else "its text"
    reason = f"{same} also stands in rows before the boundary of a split by '{block.time}'"
    for _, place, row in kept_rows(train, late):
        yield Dropped("train", place, STANDS_EARLIER, reason, row)


def notes_on_sides(recipe: Recipe, splits: Mapping[SplitName, Split]) -> list[str]:
    """How rows were split by `data.time` and `data.group`, and what files of their own share with train."""
    block, whole, remarks = recipe.data, splits["train"].source, list[str]()
    own = {name: splits[name] for name in SPLITS if splits[name].source is whole}
    if block.time is not None:
        remarks.append(_split_by_time(block, own, int(late_rows(splits).sum())))
    elif own.keys() - {"train"}:
        # Of files of their own, none was asked for.
        asked = {"eval": block.eval_fraction, "test": block.test_fraction}
        for name in filter(own.__contains__, HELD_OUT):
            rows, wanted = own[name].num_rows, held_out_rows(whole.num_rows, asked[name])
            if abs(rows - wanted) > 0.1 * wanted + 1:
                remarks.append(
                    f"{counted(rows, f'{name} row')} where data.{name}_fraction asks for {wanted:,}: rows that hang "
                    "together are taken together, and each label that has several texts gives at least one"
                )
    if block.group is None:
        return remarks
    if len(own) > 1:
        # By texts, values hang together.
        values, sides = (len(np.unique(numbers)) for numbers in (whole.values, whole.sides))
        joined = f", {counted(sides, 'group')} where these share texts" if sides < values else ""
        remarks.append(
            f"kept on one side of the split by '{block.group}': {counted(values, 'value')}{joined}, the largest of "
            f"{counted(largest_group(whole.sides), 'row')}"
        )
    return remarks + _shared(splits, "values", f"'{block.group}'")


def _split_by_time(block: DataBlock, own: Mapping[SplitName, Split], late: int) -> str:
    """Which times each split has that was taken off the train file."""
    whole = own["train"].source
    kind = next(iter(whole.tally.of("kind of time")))
    spans = []
    for name, split in own.items():
        times = whole.times[split.rows]
        first, last = (time_in_words(kind, float(time)) for time in (times.min(), times.max()))
        spans.append(f"{name} {first} to {last}")
    said = f"split by '{block.time}': {', '.join(spans)}"
    if late:
        same = f"text, or '{block.group}'," if block.group else "text"
        said += (
            f"; {late:,} of {counted(whole.num_rows, 'row')} left out: the same {same} also stands in an earlier split "
            "(data/dropped.jsonl)"
        )
    return said


def notes_on_known(known: KnownTexts | None, train: Split, mixed: Mapping[SourceName, Split]) -> list[str]:
    """Notes on trained rows that hold a text that must not be trained on."""
    if known is None:
        return []
    remarks = []
    for name, split in {"train": train, **mixed}.items():
        rows = split.source.holds_known & split.rows
        kind = "train rows" if name == "train" else f"rows of {split.source.where}, which is mixed in,"
        if not (count := int(rows.sum())):
            remarks.append(f"none of {split.num_rows:,} {kind} holds one of {known.source}")
            continue
        places = [place for _, place, _ in kept_rows(split.source, rows)]
        remarks.append(
            f"{count:,} of {split.num_rows:,} {kind} hold one of {known.source}, or much of it: "
            f"{first_few(places)}; scores on these texts flatter the model: "
            "remove the rows, or do not report them"
        )
    return remarks
