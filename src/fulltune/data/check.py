"""What is wrong with the rows, or worth knowing about them: refused, or noted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.audit.texts.flaw import masked
from fulltune.audit.texts.names import alike_in_words
from fulltune.data.contamination import KnownTexts
from fulltune.data.encode import NEW_LABEL, Dropped, DropTally, Encoded
from fulltune.data.marks import kind_of_time, problems_of, time_in_words
from fulltune.data.sources import SourceName, SourceRows, is_mixed
from fulltune.data.split import HELD_OUT, SPLITS, Split, held_out_rows, largest_group
from fulltune.data.written import kept_rows
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import shared_by
from fulltune.records.data import SplitName
from fulltune.tasks import Target
from fulltune.text import counted, first_few

MOST_DROPPED = 0.05
"""Share of a file's rows that may be unusable; more points to a wrong column or a broken export."""
UNDECODABLE_IMAGE = "undecodable image"
FEW_EVAL_ROWS = 50
_FEW_OF_A_CLASS = 5
"""One right answer more or less then moves its recall by 20 points or more."""


_NEVER_NAMES = re.compile(r"\[(?:SECRET|CARD|IBAN|SSN)\]")
"""What masks a password, a key or a number of somebody's: no class is called so for a reason."""


def refuse_secret_names(target: Target, where: str) -> list[str]:
    """Refuse passwords, keys and numbers of cards, accounts or people as names of labels and columns; note addresses:
    nothing can hide them from who reads the rows or the finished model."""
    problems, notes = list[str](), list[str]()
    columns = (("column", name) for name in target.columns.values())
    for kind, name in (*columns, *(("label", name) for name in target.labels)):
        if (shown := masked_text(name)) != name:
            (problems if _NEVER_NAMES.search(shown) else notes).append(f"{kind} {masked(name)} ({shown})")
    told = "stand in summaries, reports and the model's config.json, where nothing masks them"
    if problems:
        raise DataError(f"{where}: names of labels and columns {told}: {first_few(problems)}; rename them in the file")
    return [f"personal data in names of labels or columns, which {told}: {first_few(notes)}"] if notes else []


def refuse_unusable(
    recipe: Recipe, encoded: Mapping[SourceName, Encoded], sources: Mapping[SourceName, SourceRows]
) -> None:
    """Raises a `DataError` for too many unusable rows, too long ones where that is an error, and broken images."""
    strategy = recipe.data.truncation_strategy
    # Rows that the user asked to drop, or that are mixed in only where they suit, are not held against the file.
    allowed = {UNDECODABLE_IMAGE, NEW_LABEL, *(("too long", "answer cut off") if strategy == "drop" else ())}
    problems: list[str] = []
    for name, whole in encoded.items():
        where, unusable, unfit = sources[name].where, whole.dropped["unusable"], whole.dropped["unfit"]
        broken = unfit.counts[UNDECODABLE_IMAGE]
        if broken and recipe.data.undecodable_images == "error":
            problems += [f"{item.place}: {item.reason}" for item in unfit.first[UNDECODABLE_IMAGE]]
            them = "it" if broken == 1 else "them"
            problems.append(
                f"{where}: {counted(broken, 'image')} cannot be decoded; repair {them}, or drop {them} with "
                "data.undecodable_images: drop"
            )
        problems += problems_of(recipe.data, whole.found, whole.num_rows, where)
        problems += _too_many(unusable, (), whole.num_read, where)
        problems += _too_many(unfit, allowed, whole.num_read - unusable.counts.total(), where)
        if strategy == "error" and whole.num_too_long:
            verb = "is" if whole.num_too_long == 1 else "are"
            problems.append(
                f"{where}: {counted(whole.num_too_long, 'row')} of {name} {verb} longer than "
                "data.max_length; raise it, or set data.truncation_strategy to truncate or drop"
            )
    if problems:
        raise DataError(problems)


def _too_many(dropped: DropTally, allowed: Collection[str], num_rows: int, where: str) -> list[str]:
    """Dropping a few rows is worth a note, more than one in twenty would ruin the run in silence: a line for it."""
    counts = Counter({check: count for check, count in dropped.counts.items() if check not in allowed})
    total = counts.total()
    # One row is never many: an eval file of ten rows may have a bad one as well as a train file of thousands.
    if total <= max(1, MOST_DROPPED * num_rows) and (total < num_rows or not total):
        return []
    first = dropped.first[next(iter(counts))][0]
    remedy = (
        "Raise data.max_length, shorten these rows, or drop them with data.truncation_strategy: drop"
        if first.check == "answer cut off"
        else "Remove or repair these rows, or name another column in the recipe"
    )
    by_check = ", ".join(f"{count} x {check}" for check, count in counts.most_common())
    return [
        f"{where}: {total:,} of {counted(num_rows, 'row')} cannot be used ({by_check}); first: {first.place}, "
        f"{masked_text(first.reason)}. {remedy}"
    ]


def refuse_new_labels(block: DataBlock, splits: Mapping[SplitName, Split]) -> None:
    """Raises a `DataError` for classes that train lacks: they cannot be learned, and scoring them is a silent loss."""
    train = splits["train"].label_counts()
    problems = [
        f"{splits[name].where}: label '{label}' ({counted(count, 'row')} of {name}) never occurs in train"
        f"{'; add rows to train or remove them here' if splits[name].is_file else _why_new(block, name)}"
        for name in HELD_OUT
        for label, count in sorted(splits[name].label_counts().items())
        if label not in train
    ]
    if problems:
        raise DataError(problems)


def _why_new(block: DataBlock, name: SplitName) -> str:
    """Why rows that were split off have a label that the others lack, and what to do."""
    if block.time is not None:
        return (
            f": its first row is newer than all that are trained on ('{block.time}', data.time); give a smaller "
            f"data.{name}_fraction, so that some are, remove these rows, or split without data.time"
        )
    if block.group is not None:
        return (
            f": its rows hang together by '{block.group}' (data.group) or their texts, so that all are held out; add "
            f"rows of other values of '{block.group}', remove these, or draw anew with another data.split_seed"
        )
    return "; add rows to train or remove them here"


# ---- notes -----------------------------------------------------------------------------------------------------


def notes(splits: Mapping[SplitName, Split], target: Target, near: bool = False) -> list[str]:
    """Few rows to choose by, rows that stand twice or share what is asked with others, classes that may be one."""
    train, dev, test = (splits[name] for name in ("train", "eval", "test"))
    remarks = []
    nearly = " (equal, or nearly so)" if near else ""
    shared = shared_by(target.columns)
    # Long raw texts are cut, short ones packed: the rows that are trained and shown are others than those of the file.
    unit = "text" if set(target.columns) == {"text"} else "row"
    if dev.num_rows < FEW_EVAL_ROWS:
        remarks.append(
            f"only {counted(dev.num_rows, f'eval {unit}')}: they hardly tell which weights are better; more {unit}s "
            "would"
        )
    wholes = train.source.wholes[train.rows]
    if repeated := train.num_rows - len(np.unique(wholes)):
        verb = "repeats" if repeated == 1 else "repeat"
        remarks.append(f"{_part(repeated, train, 'train')} {verb} another train row, answer or label included")
    # Questions about the same passage belong together; that is how such rows are, and nothing to note.
    if shared != "passage" and (count := _num_with_others(train.groups, wholes)):
        side = "" if dev.is_file and test.is_file else "; kept on one side of the split"
        verb = "shares its" if count == 1 else "share their"
        remarks.append(f"{_part(count, train, 'train')} {verb} {shared} with another one{nearly}{side}")
    flatters = f"train{nearly}: their scores flatter the model"
    chooses = f"eval{nearly}, which chooses the checkpoint"
    overlaps: tuple[tuple[SplitName, Split, str], ...] = (
        ("eval", train, flatters),
        ("test", train, flatters),
        ("test", dev, chooses),
    )
    for name, other, where in overlaps:
        if count := num_shared(splits[name], other):
            verb = "has" if count == 1 else "have"
            remarks.append(f"{_part(count, splits[name], name)} {verb} a {shared} that also stands in {where}")
    of_classes = sum((Counter(split.label_counts()) for split in splits.values()), Counter[str]())
    if "label" in target.columns and (told := alike_in_words(of_classes)):
        remarks.append(told)
    return remarks


def note_on_flaws(sources: Iterable[Encoded]) -> list[str]:
    """What the cheap checks found in the rows' texts."""
    found = sum((source.flaws for source in sources), Counter[str]())
    if not found:
        return []
    shown = ", ".join(f"{check} in {counted(count, 'row')}" for check, count in found.most_common())
    return [f"texts that look wrong: {shown}; 'fulltune data' lists them"]


def _part(count: int, split: Split, name: SplitName) -> str:
    return f"{count:,} of {split.num_rows:,} {name} rows"


def _num_with_others(groups: np.ndarray, wholes: np.ndarray) -> int:
    """Rows in whose group stands another row that is not the same as a whole."""
    different = np.unique(np.stack([groups, wholes]), axis=1)[0]
    names, counts = np.unique(different, return_counts=True)
    return int(np.isin(groups, names[counts > 1]).sum())


def num_shared(split: Split, other: Split) -> int:
    """Rows of a split whose text, or prompt, also stands in another one."""
    return int(np.isin(split.groups, other.groups).sum())


def unmeasured(train: Split, test: Split) -> list[str]:
    """Classes of train that no test row has, or hardly any: their quality is not known."""
    in_train, in_test = train.label_counts(), test.label_counts()
    remarks = []
    if missing := sorted(in_train.keys() - in_test.keys(), key=lambda name: (in_train[name], name)):
        shown = ", ".join(f"'{name}' ({counted(in_train[name], 'train row')})" for name in missing[:3])
        verb, them = ("has", "it") if len(missing) == 1 else ("have", "them")
        remarks.append(
            f"{len(missing)} of {len(in_train)} classes {verb} no test row, so nothing measures {them}: {shown}"
        )
    scarce = sorted((count, name) for name, count in in_test.items() if count < _FEW_OF_A_CLASS)
    # Of few test rows in all, that is plain to see.
    if scarce and test.num_rows >= FEW_EVAL_ROWS:
        shown = ", ".join(f"'{name}' ({count})" for count, name in scarce[:3])
        remarks.append(
            f"classes with fewer than {_FEW_OF_A_CLASS} of the {test.num_rows:,} test rows, so that their scores are "
            f"close to chance: {len(scarce)} of {len(in_train)}: {shown}"
        )
    return remarks


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
