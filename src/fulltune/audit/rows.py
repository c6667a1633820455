"""Reads the prepared rows once for an audit, and compares them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.audit.languages import OTHER_LANGUAGE, ColumnLanguages, add_languages, foreign_language
from fulltune.audit.texts import PARTS, cells, checks_of, flaws, masked_text, whole_texts
from fulltune.audit.texts.content import similar_names
from fulltune.audit.texts.flaw import Flaw
from fulltune.data.groups import draw, grams, jaccard, join_near, signatures
from fulltune.data.patch import Decisions, PatchedRows, load_patch, numbered
from fulltune.data.sources import find_files, read_rows
from fulltune.inference.store import row_id, texts
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import Remedy, RowIssue
from fulltune.records.data import SplitName
from fulltune.records.events import Listener, RowsRead
from fulltune.tasks import PLACE, Row, Target, Task, chat
from fulltune.tasks.columns import as_text, normalised
from fulltune.text import first_few

CHAT_FAULT, CLASS_NAMES = "chat fault", "class names"
SPLITS: tuple[SplitName, ...] = ("train", "eval", "test")
_MAX_SHOWN_CHARACTERS = 300
_AT_ONCE = 1000
_IN_KEY = ("image", "text", "text_pair", "prompt", "source")


@dataclass(frozen=True)
class AuditedRows:
    """Reads the prepared rows, in the user's own columns."""

    folder: Path
    task: Task
    target: Target
    own_files: frozenset[str]
    """Splits with their own files."""
    packed: Recipe | None
    """Recipe of packed rows, whose files are read again; otherwise None."""

    @property
    def has_texts(self) -> bool:
        return "image" not in self.target.columns

    def of(self, split: SplitName) -> Iterator[Row]:
        """Yield each row of a split once."""
        if self.packed is not None and split == "train":
            yield from self._reread_train_rows(self.packed)
            return
        for _, examples in groupby(texts(self.folder / split), key=itemgetter(PLACE)):
            yield next(examples)

    def all(self) -> Iterator[tuple[SplitName, Row]]:
        for split in SPLITS:
            yield from ((split, row) for row in self.of(split))

    def _reread_train_rows(self, recipe: Recipe) -> Iterator[Row]:
        block, files = recipe.data, find_files(recipe)["train"]
        patched = PatchedRows(load_patch(Path(block.patch)), "train") if block.patch else None
        held_out = {row[PLACE] for split in ("eval", "test") if not getattr(block, split) for row in self.of(split)}
        for place, row in read_rows(recipe, files, None, patched).rows(None):
            if place not in held_out and self.task.refuse(row, self.target) is None:
                yield {**row, PLACE: place}

    def beginning(self, row: Row, most_characters: int) -> str:
        """Return the masked beginning of a row's texts on one line."""
        texts = (cell for part in PARTS for _, cell in cells(row, self.target.columns, part))
        return " | ".join(" ".join(masked_text(text).split()) for text in texts)[:most_characters]

    def source_of(self, split: SplitName) -> str:
        """Return the split whose file contains a split's rows."""
        return split if split in self.own_files else "train"

    def content(self, row: Row, key: str) -> str:
        """Return everything in a row that a model learns from, as one text."""
        columns = [column for role, column in self.target.columns.items() if role not in _IN_KEY]
        return "\0".join([key, *(normalised(as_text(row.get(column))) for column in columns)])

    def issue(
        self, check: str, of: tuple[SplitName, Row], reason: str, remedy: Remedy | None = None, score: float = 0.0
    ) -> RowIssue:
        """Describe a problem of a row, which is dropped by default. `with_numbers` numbers equal rows later."""
        split, row = of
        return RowIssue(
            check=check,
            split=split,
            source=self.source_of(split),
            place=str(row[PLACE]),
            row=row_id(row),
            reason=reason,
            text=self.beginning(row, _MAX_SHOWN_CHARACTERS),
            label=", ".join(self.task.row_labels(row, self.target)) or None,
            remedy=remedy or Remedy(action="drop"),
            score=score,
        )


@dataclass
class RowScan:
    """Results of reading all rows once, split by split."""

    issues: list[RowIssue] = field(default_factory=list)
    counts: dict[SplitName, int] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("Q"))
    """`row_id` of each row, as a number."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    content_hashes: array[int] = field(default_factory=lambda: array("q"))
    """Hash of each row's content, valid only in this process."""
    signed: np.ndarray = field(default_factory=lambda: signatures([]))
    """MinHash of each row's input: uint16 [rows, hashes]; meaningless for images."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Index in `names` of each row's labels, or -1 without labels."""
    names: dict[tuple[str, ...], int] = field(default_factory=dict)
    languages: dict[str, ColumnLanguages] = field(default_factory=dict)


def scan_rows(rows: AuditedRows, total: int, listener: Listener) -> RowScan:
    """Check the texts of all rows, and compute the hashes that `repeated` compares."""
    scan, checks = RowScan(), checks_of(rows.target.columns)
    signed: list[np.ndarray] = []
    for split in SPLITS:
        before, keys = len(scan.keys), list[str]()
        for row in rows.of(split):
            key = rows.task.group_key(row, rows.target)
            keys.append(key if rows.has_texts else "")
            names = tuple(rows.task.row_labels(row, rows.target))
            scan.ids.append(int(row_id(row), 16))
            scan.keys.append(draw(0, key))
            scan.content_hashes.append(hash(rows.content(row, key)))
            scan.labels.append(scan.names.setdefault(names, len(scan.names)) if names else -1)
            for part, part_checks in checks.items():
                for column, text in cells(row, rows.target.columns, part):
                    scan.issues += [_flaw_issue(rows, split, row, column, flaw) for flaw in flaws(text, part_checks)]
            if (turns := rows.target.columns.get("messages")) and (
                faults := chat_faults(chat.clean_messages(row[turns]))
            ):
                reason = masked_text(first_few(faults))
                scan.issues.append(rows.issue(CHAT_FAULT, (split, row), reason, score=float(len(faults))))
            add_languages(scan.languages, row, rows.target.columns)
            if len(keys) == _AT_ONCE:
                done = len(scan.keys)
                listener(RowsRead(name="auditing", done=done, total=max(total, done)))
                signed.append(signatures(keys))
                keys.clear()
        signed.append(signatures(keys))
        scan.counts[split] = len(scan.keys) - before
    listener(RowsRead(name="auditing", done=len(scan.keys), total=len(scan.keys)))
    scan.signed = np.concatenate(signed)
    return scan


def with_numbers(rows: AuditedRows, scan: RowScan, issues: list[RowIssue], decided: Decisions) -> list[RowIssue]:
    """Return the issues with equal rows numbered; rows that a patch dropped are counted too."""
    values, counts = np.unique(np.array(scan.ids, np.uint64), return_counts=True)
    several = {f"{value:016x}" for value in values[counts > 1].tolist()}
    several |= {row.partition("-")[0] for _, row in decided}
    # The rows are read again only if that can change a name.
    named_rows = named(rows, decided, several) if any(issue.row in several for issue in issues) else ()
    names = {(split, str(row[PLACE])): name for split, row, name in named_rows}
    return [issue.model_copy(update={"row": names.get((issue.split, issue.place), issue.row)}) for issue in issues]


def named(
    rows: AuditedRows, decided: Decisions, among: Collection[str] | None = None
) -> Iterator[tuple[SplitName, Row, str]]:
    """Yield split, row and identity of each row; equal rows get numbered identities. `among` limits the rows to some
    hashes."""
    times = Counter[tuple[str, str]]()
    for split, row in rows.all():
        key = rows.source_of(split), row_id(row)
        if among is not None and key[1] not in among:
            continue
        times[key] += 1
        # Rows that a patch dropped count as well.
        while (decision := decided.get((key[0], numbered(key[1], times[key])))) and decision.remedy.action == "drop":
            times[key] += 1
        yield split, row, numbered(key[1], times[key])


def _flaw_issue(rows: AuditedRows, split: SplitName, row: Row, column: str, flaw: Flaw) -> RowIssue:
    # A turn of a conversation is not a cell, so it cannot be replaced.
    repairable = flaw.fixed is not None and isinstance(row[column], str)
    remedy = Remedy(action="replace", column=column, value=flaw.fixed) if repairable else None
    return rows.issue(flaw.check, (split, row), f"column '{column}': {flaw.reason}", remedy)


def in_similar_classes(rows: AuditedRows, scan: RowScan) -> list[RowIssue]:
    """Return issues for rows of classes that may be misspelt; the remedy is the similar class that is more frequent."""
    of_number, counts = Counter(scan.labels), Counter[str]()
    for names, number in scan.names.items():
        counts.update(dict.fromkeys(names, of_number[number]))
    instead = {name: names[0] for names in similar_names(counts) for name in names[1:]}
    issues, column = list[RowIssue](), rows.target.columns.get("label", "")
    for split, row in rows.all() if instead else ():
        labels = rows.task.row_labels(row, rows.target)
        if column in row and (doubtful := [label for label in labels if label in instead]):
            new = list(dict.fromkeys(instead.get(label, label) for label in labels))
            is_list = rows.target.form.several_labels
            remedy = Remedy(action="replace", column=column, value=new if is_list else new[0])
            reason = f"class {doubtful[0]!a} may mean {instead[doubtful[0]]!a}"
            issues.append(rows.issue(CLASS_NAMES, (split, row), reason, remedy))
    return issues


def in_other_languages(rows: AuditedRows, scan: RowScan) -> list[RowIssue]:
    """Return issues for rows in a language that is rare in their column."""
    issues = list[RowIssue]()
    suspects = {column: languages.suspects() for column, languages in scan.languages.items()}
    main = {column: languages.main_languages() for column, languages in scan.languages.items()}
    for position, (split, row) in enumerate(rows.all() if any(suspects.values()) else ()):
        for column, text in whole_texts(row, rows.target.columns).items():
            if position in suspects.get(column, ()) and (foreign := foreign_language(text, main[column])) is not None:
                reason = f"column '{column}': {foreign[0]}, but nearly all rows are {', '.join(main[column])}"
                issues.append(rows.issue(OTHER_LANGUAGE, (split, row), reason, score=foreign[1]))
    return issues


# ---- repeated rows: in train, with other labels, or among held-out rows ----------------------------------------------

DUPLICATE, LEAK, NEAR_LEAK, CONFLICT = "duplicate", "leak", "near leak", "conflicting labels"
NEAR = 0.8
"""Minimum share of common 5-grams for texts to count as nearly the same."""
_CANDIDATE = 0.7
"""Minimum estimated share for texts to be compared exactly."""
_MAX_QUOTED = 80
_MAX_COMPARED = 5000
"""Maximum number of a group's held-out rows that are compared with a train row."""
_MAX_READ = 10
"""Maximum number of held-out rows whose texts are read for a train row."""


def repeated(rows: AuditedRows, scan: RowScan) -> list[RowIssue]:
    """Return issues for train rows that occur earlier, are also held out, or have different labels elsewhere."""
    keys, contents, labels = (np.frombuffer(one, np.int64) for one in (scan.keys, scan.content_hashes, scan.labels))
    train = np.arange(len(keys)) < scan.counts["train"]
    repeats = occurs_earlier(contents, train)
    leaks = train & np.isin(keys, keys[~train])
    near = keys
    if rows.has_texts:
        near = join_near(keys.view(np.uint64), scan.signed, _CANDIDATE).view(np.int64)
    twins = _held_out_twins(scan, train, leaks, near)
    votes = _conflicting_label_counts(keys[train & (labels >= 0)], labels[train & (labels >= 0)])
    conflicting = train & np.isin(keys, np.fromiter(votes, np.int64, len(votes)))
    # Rows with the majority label have no conflict.
    for position in np.flatnonzero(conflicting).tolist():
        conflicting[position] = _majority_label(votes[int(keys[position])]) != labels[position]
    held_out = _read_held_out(rows, scan, set(chain.from_iterable(twins.values())))
    names = {number: labels for labels, number in scan.names.items()}
    column, is_list = rows.target.columns.get("label"), rows.target.form.several_labels
    issues: list[RowIssue] = []
    wanted = repeats | conflicting
    wanted[list(twins)] = True
    for position, row in zip(range(scan.counts["train"]), rows.of("train"), strict=True):
        if not wanted[position]:
            continue
        others = [held_out[other] for other in twins.get(position, ())]
        issue = partial(rows.issue, of=("train", row))
        if repeats[position]:
            issues.append(issue(DUPLICATE, reason="the same row, label or answer included, occurs earlier in train"))
        if leaks[position]:
            issues.append(issue(LEAK, reason=f"the same text is held out: {others[0][1]}"))
        elif others:
            mine = grams(rows.task.group_key(row, rows.target))
            shares = [jaccard(mine, grams(other[0])) for other in others]
            if (share := max(shares)) >= NEAR:
                shown = others[shares.index(share)][1]
                issues.append(issue(NEAR_LEAK, reason=f"nearly the same text is held out: {shown}", score=share))
        if conflicting[position]:
            counts = votes[int(keys[position])]
            times = ((", ".join(names[label]), count) for label, count in counts.most_common(3))
            shown = ", ".join(f"'{name}' {'once' if count == 1 else f'{count:,} times'}" for name, count in times)
            remedy, best = None, _majority_label(counts)
            if best is not None and column is not None:
                remedy = Remedy(action="replace", column=column, value=[*names[best]] if is_list else names[best][0])
            score = float(counts.total() - counts[int(labels[position])])
            reason = f"the same text has several labels: {shown}"
            issues.append(issue(CONFLICT, reason=reason, remedy=remedy, score=score))
    return issues


def occurs_earlier(contents: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Mark train rows whose content hash also occurs earlier in train: bool [rows]."""
    repeats = train.copy()
    repeats[np.unique(np.where(train, contents, 0), return_index=True)[1]] = False
    return repeats


def _held_out_twins(scan: RowScan, train: np.ndarray, leaks: np.ndarray, near: np.ndarray) -> dict[int, list[int]]:
    """Return positions of equal or similar held-out rows by position of train row."""
    groups, first = dict[int, list[int]](), dict[int, int]()
    for position in np.flatnonzero(~train & np.isin(near, near[train])).tolist():
        groups.setdefault(int(near[position]), []).append(position)
        first.setdefault(scan.keys[position], position)
    of_group = {group: scan.signed[others[:_MAX_COMPARED]] for group, others in groups.items()}
    twins: dict[int, list[int]] = {}
    for position in np.flatnonzero(train & np.isin(near, near[~train])).tolist():
        if leaks[position]:
            twins[position] = [first[scan.keys[position]]]
            continue
        group = int(near[position])
        shared = (scan.signed[position] == of_group[group]).sum(axis=1, dtype=np.uint8)
        nearest = np.argsort(shared, kind="stable")[::-1][:_MAX_READ]
        least = _CANDIDATE * scan.signed.shape[1]
        if candidates := [groups[group][index] for index in nearest.tolist() if shared[index] >= least]:
            twins[position] = candidates
    return twins


def _read_held_out(rows: AuditedRows, scan: RowScan, wanted: set[int]) -> dict[int, tuple[str, str]]:
    """Return each wanted held-out row's input, and its location and beginning."""
    held_out = chain(rows.of("eval"), rows.of("test")) if wanted else ()
    return {
        position: (rows.task.group_key(row, rows.target), f"{row[PLACE]}: '{rows.beginning(row, _MAX_QUOTED)}'")
        for position, row in enumerate(held_out, start=scan.counts["train"])
        if position in wanted
    }


def _conflicting_label_counts(keys: np.ndarray, labels: np.ndarray) -> dict[int, Counter[int]]:
    pairs = np.unique(np.stack([keys, labels]), axis=1)
    several, counts = np.unique(pairs[0], return_counts=True)
    conflicting = np.isin(keys, several[counts > 1])
    votes: dict[int, Counter[int]] = {}
    for key, label in zip(keys[conflicting].tolist(), labels[conflicting].tolist(), strict=True):
        votes.setdefault(key, Counter())[label] += 1
    return votes


def _majority_label(counts: Counter[int]) -> int | None:
    (best, most), *_ = counts.most_common(1)
    return best if 2 * most > counts.total() else None


# ---- conversations --------------------------------------------------------------------------------------------------

Turn = Mapping[str, Any]

_SYSTEM = ("system", "developer")
_TOOL = ("tool", "function", "ipython", "observation")
_MIN_IDENTICAL = 40
"""Minimum length of suspicious equal answers, in characters."""


def chat_faults(turns: Sequence[Turn]) -> list[str]:
    """Describe the faults of a conversation, whose turns count from 1."""
    return [*_turn_order_faults(turns), *_empty_or_repeated_turns(turns)]


def _turn_order_faults(turns: Sequence[Turn]) -> Iterator[str]:
    for number, (before, turn) in enumerate(pairwise(turns), start=2):
        role = turn["role"]
        if role in _SYSTEM and before["role"] not in _SYSTEM:
            yield f"turn {number} is a {role} turn that is not first"
        elif role in _TOOL and before["role"] == "user":
            yield f"turn {number} is the result of a tool that was not called"
        # Several tools may answer in a row, and users with names may talk to each other.
        elif role == before["role"] and role not in _TOOL and turn.get("name") == before.get("name"):
            yield f"turns {number - 1} and {number} are both {role} turns"
    if turns and turns[-1]["role"] != "assistant":
        yield f"it ends with a {turns[-1]['role']} turn without an answer"


def _empty_or_repeated_turns(turns: Sequence[Turn]) -> Iterator[str]:
    first_turn: dict[str, int] = {}
    for number, turn in enumerate(turns, start=1):
        text, role = turn["content"].strip(), turn["role"]
        # A tool call, or text outside of the content, such as reasoning.
        has_more = any(turn[key] for key in turn.keys() - {"role", "content", "name", "from", "value", "id"})
        # A tool may have nothing to say, and an empty system turn keeps a template from writing its own.
        if not text and role not in (*_SYSTEM, *_TOOL) and not has_more:
            yield f"turn {number} ({role}) is empty"
        if role == "assistant" and len(text) >= _MIN_IDENTICAL and not turn.get("tool_calls"):
            if text in first_turn:
                yield f"turns {first_turn[text]} and {number} of the assistant are identical"
            first_turn.setdefault(text, number)
