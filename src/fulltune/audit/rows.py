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

from fulltune.audit.languages import OTHER_LANGUAGE, ColumnLanguages, add_languages, detect_foreign_language
from fulltune.audit.texts import (
    ROLES_AND_CHECKS,
    find_flaws,
    iterate_texts,
    join_texts_by_column,
    masked_text,
    select_checks,
)
from fulltune.audit.texts.content import group_similar_names
from fulltune.data.groups import character_5grams, hash_to_number, jaccard_similarity, join_near_duplicates, minhash
from fulltune.data.patch import Decisions, PatchedRows, load_patch, next_row_hash
from fulltune.data.remote.fetch import load_sources
from fulltune.data.sources import find_source_files, read_source_rows
from fulltune.inference.store import read_original_rows, row_id
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
    """Reads prepared rows, with the columns of the data files."""

    folder: Path
    task: Task
    target: Target
    recipe: Recipe
    packed: bool
    """Whether the train rows are packed, and thus reread from their files."""

    @property
    def has_texts(self) -> bool:
        return "image" not in self.target.columns

    def read(self, split: SplitName) -> Iterator[Row]:
        """Yield each row of a split once."""
        if self.packed and split == "train":
            yield from self._reread_packed_rows()
            return
        for _, examples in groupby(read_original_rows(self.folder / split), key=itemgetter(PLACE)):
            yield next(examples)

    def all_rows(self) -> Iterator[tuple[SplitName, Row]]:
        for split in SPLITS:
            yield from ((split, row) for row in self.read(split))

    def _reread_packed_rows(self) -> Iterator[Row]:
        """Read train rows from their files, because packing loses their columns."""
        block, files = self.recipe.data, find_source_files(self.recipe, load_sources(self.folder.parent))["train"]
        patched = PatchedRows(load_patch(Path(block.patch)), "train") if block.patch else None
        held_out = {row[PLACE] for split in ("eval", "test") if not getattr(block, split) for row in self.read(split)}
        for place, row in read_source_rows(self.recipe, files, None, patched).rows(None):
            if place not in held_out and self.task.why_unusable(row, self.target) is None:
                yield {**row, PLACE: place}

    def masked_start(self, row: Row, max_characters: int) -> str:
        """Return the beginning of a row's texts on one line, with secrets masked."""
        texts = (cell for part in ROLES_AND_CHECKS for _, cell in iterate_texts(row, self.target.columns, part))
        return " | ".join(" ".join(masked_text(text).split()) for text in texts)[:max_characters]

    def source_of(self, split: SplitName) -> str:
        """Return the split whose data file holds a split's rows."""
        return split if getattr(self.recipe.data, split) else "train"

    def issue(
        self, check: str, item: tuple[SplitName, Row], reason: str, remedy: Remedy | None = None, score: float = 0.0
    ) -> RowIssue:
        """Create an issue about a row. The default remedy drops the row. Issues with high scores come first."""
        split, row = item
        return RowIssue(
            check=check,
            split=split,
            source=self.source_of(split),
            place=str(row[PLACE]),
            row=row_id(row),
            reason=reason,
            text=self.masked_start(row, _MAX_SHOWN_CHARACTERS),
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
    keys: array[int] = field(default_factory=lambda: array("Q"))
    content_hashes: array[int] = field(default_factory=lambda: array("q"))
    signatures: np.ndarray = field(default_factory=lambda: minhash([]))
    """MinHash of each row's input: uint16 [rows, 128]."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """Index of each row's labels in `names`, or -1 without labels."""
    names: dict[tuple[str, ...], int] = field(default_factory=dict)
    languages: dict[str, ColumnLanguages] = field(default_factory=dict)


def scan_rows(rows: AuditedRows, expected_rows: int, listener: Listener) -> RowScan:
    """Check the texts of all rows, and compute the hashes that `find_repeated_rows` compares."""
    scan, checks = RowScan(), select_checks(rows.target.columns)
    signed: list[np.ndarray] = []
    learned = [column for role, column in rows.target.columns.items() if role not in _IN_KEY]
    for split in SPLITS:
        before, keys = len(scan.keys), list[str]()
        for row in rows.read(split):
            key = rows.task.group_key(row, rows.target)
            keys.append(key if rows.has_texts else "")
            labels = tuple(rows.task.row_labels(row, rows.target))
            scan.ids.append(int(row_id(row), 16))
            scan.keys.append(hash_to_number(0, key))
            content = (key, *(normalised(as_text(row.get(column))) for column in learned))
            scan.content_hashes.append(hash("\0".join(content)))
            scan.labels.append(scan.names.setdefault(labels, len(scan.names)) if labels else -1)
            for part, names in checks.items():
                for column, text in iterate_texts(row, rows.target.columns, part):
                    for flaw in find_flaws(text, names):
                        # A turn of a conversation is not a cell, so it cannot be replaced.
                        repairable = flaw.fixed is not None and isinstance(row[column], str)
                        remedy = Remedy(action="replace", column=column, value=flaw.fixed) if repairable else None
                        reason = f"column '{column}': {flaw.reason}"
                        scan.issues.append(rows.issue(flaw.check, (split, row), reason, remedy))
            if (turns := rows.target.columns.get("messages")) and (
                faults := chat_faults(chat.clean_messages(row[turns]))
            ):
                reason = masked_text(first_few(faults))
                scan.issues.append(rows.issue(CHAT_FAULT, (split, row), reason, score=float(len(faults))))
            add_languages(scan.languages, row, rows.target.columns)
            if len(keys) == _AT_ONCE:
                done = len(scan.keys)
                listener(RowsRead(name="auditing", done=done, total=max(expected_rows, done)))
                signed.append(minhash(keys))
                keys.clear()
        signed.append(minhash(keys))
        scan.counts[split] = len(scan.keys) - before
    listener(RowsRead(name="auditing", done=len(scan.keys), total=len(scan.keys)))
    scan.signatures = np.concatenate(signed)
    return scan


def number_equal_rows(rows: AuditedRows, scan: RowScan, issues: list[RowIssue], decisions: Decisions) -> list[RowIssue]:
    """Return the issues, with numbers appended to shared hashes. Rows dropped by `decisions` count too."""
    values, counts = np.unique(np.array(scan.ids, np.uint64), return_counts=True)
    several = {f"{value:016x}" for value in values[counts > 1].tolist()}
    several |= {row.partition("-")[0] for _, row in decisions}
    # The rows are read again only if that can change a name.
    named_rows = identify_rows(rows, decisions, several) if any(issue.row in several for issue in issues) else ()
    names = {(split, str(row[PLACE])): name for split, row, name in named_rows}
    return [issue.model_copy(update={"row": names.get((issue.split, issue.place), issue.row)}) for issue in issues]


def identify_rows(
    rows: AuditedRows, decisions: Decisions, only_hashes: Collection[str] | None = None
) -> Iterator[tuple[SplitName, Row, str]]:
    """Yield split, row and hash of each row (of `only_hashes`, if set). Hashes of several rows get a number."""
    times = Counter[tuple[str, str]]()
    for split, row in rows.all_rows():
        key = rows.source_of(split), row_id(row)
        if only_hashes is None or key[1] in only_hashes:
            yield split, row, next_row_hash(times, key, decisions)


def find_misspelt_classes(rows: AuditedRows, scan: RowScan) -> list[RowIssue]:
    """Return issues for rows whose class may be misspelt; each remedy is the most frequent similar class."""
    of_number, counts = Counter(scan.labels), Counter[str]()
    for names, number in scan.names.items():
        counts.update(dict.fromkeys(names, of_number[number]))
    instead = {name: names[0] for names in group_similar_names(counts) for name in names[1:]}
    issues, column = list[RowIssue](), rows.target.columns.get("label", "")
    for split, row in rows.all_rows() if instead else ():
        labels = rows.task.row_labels(row, rows.target)
        if column in row and (doubtful := [label for label in labels if label in instead]):
            new = list(dict.fromkeys(instead.get(label, label) for label in labels))
            is_list = rows.target.form.several_labels
            remedy = Remedy(action="replace", column=column, value=new if is_list else new[0])
            reason = f"class {doubtful[0]!a} may be another spelling of {instead[doubtful[0]]!a}"
            issues.append(rows.issue(CLASS_NAMES, (split, row), reason, remedy))
    return issues


def find_foreign_language_rows(rows: AuditedRows, scan: RowScan) -> list[RowIssue]:
    """Return issues for rows in a language that is rare in their column."""
    issues = list[RowIssue]()
    suspects = {column: languages.suspects() for column, languages in scan.languages.items()}
    main = {column: languages.main_languages() for column, languages in scan.languages.items()}
    for position, (split, row) in enumerate(rows.all_rows() if any(suspects.values()) else ()):
        for column, text in join_texts_by_column(row, rows.target.columns).items():
            foreign = detect_foreign_language(text, main[column]) if position in suspects.get(column, ()) else None
            if foreign is not None:
                reason = f"column '{column}': {foreign[0]}, but nearly all rows are {', '.join(main[column])}"
                issues.append(rows.issue(OTHER_LANGUAGE, (split, row), reason, score=foreign[1]))
    return issues


# ---- repeated rows: in train, with other labels, or among held-out rows ----------------------------------------------

DUPLICATE, LEAK, NEAR_LEAK, CONFLICT = "duplicate", "leak", "near leak", "conflicting labels"
MIN_LEAK_SIMILARITY = 0.8
_CANDIDATE = 0.7
_MAX_QUOTED = 80
_MAX_COMPARED = 5000
_MAX_READ = 10


def find_repeated_rows(rows: AuditedRows, scan: RowScan) -> list[RowIssue]:
    """Return issues for train rows that occur earlier, in held-out splits, or elsewhere with other labels."""
    keys, contents, labels = (np.frombuffer(one, np.int64) for one in (scan.keys, scan.content_hashes, scan.labels))
    train = np.arange(len(keys)) < scan.counts["train"]
    repeats = train.copy()
    repeats[np.unique(np.where(train, contents, 0), return_index=True)[1]] = False
    leaks = train & np.isin(keys, keys[~train])
    near = keys
    if rows.has_texts:
        near = join_near_duplicates(keys.view(np.uint64), scan.signatures, _CANDIDATE).view(np.int64)
    twins = _find_similar_held_out_rows(scan, train, leaks, near)
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
    for position, row in zip(range(scan.counts["train"]), rows.read("train"), strict=True):
        if not wanted[position]:
            continue
        others = [held_out[other] for other in twins.get(position, ())]
        issue = partial(rows.issue, item=("train", row))
        if repeats[position]:
            issues.append(issue(DUPLICATE, reason="the same row, including its answer, occurs earlier in train"))
        if leaks[position]:
            issues.append(issue(LEAK, reason=f"a held-out row has the same text: {others[0][1]}"))
        elif others:
            mine = character_5grams(rows.task.group_key(row, rows.target))
            shares = [jaccard_similarity(mine, character_5grams(other[0])) for other in others]
            if (share := max(shares)) >= MIN_LEAK_SIMILARITY:
                shown = others[shares.index(share)][1]
                issues.append(issue(NEAR_LEAK, reason=f"a held-out row has nearly the same text: {shown}", score=share))
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


def _find_similar_held_out_rows(
    scan: RowScan, is_train: np.ndarray, is_leak: np.ndarray, near_groups: np.ndarray
) -> dict[int, list[int]]:
    """Map each train row, by position, to similar held-out rows of its near group (where `is_leak`: the equal one)."""
    groups, first = dict[int, list[int]](), dict[int, int]()
    for position in np.flatnonzero(~is_train & np.isin(near_groups, near_groups[is_train])).tolist():
        groups.setdefault(int(near_groups[position]), []).append(position)
        first.setdefault(scan.keys[position], position)
    of_group = {group: scan.signatures[others[:_MAX_COMPARED]] for group, others in groups.items()}
    twins: dict[int, list[int]] = {}
    for position in np.flatnonzero(is_train & np.isin(near_groups, near_groups[~is_train])).tolist():
        if is_leak[position]:
            twins[position] = [first[scan.keys[position]]]
            continue
        group = int(near_groups[position])
        shared = (scan.signatures[position] == of_group[group]).sum(axis=1, dtype=np.uint8)
        nearest = np.argsort(shared, kind="stable")[::-1][:_MAX_READ]
        least = _CANDIDATE * scan.signatures.shape[1]
        if candidates := [groups[group][index] for index in nearest.tolist() if shared[index] >= least]:
            twins[position] = candidates
    return twins


def _read_held_out(rows: AuditedRows, scan: RowScan, positions: set[int]) -> dict[int, tuple[str, str]]:
    """Return, by position, the text of each held-out row in `positions`, and its location with a quotation."""
    held_out = chain(rows.read("eval"), rows.read("test")) if positions else ()
    return {
        position: (rows.task.group_key(row, rows.target), f"{row[PLACE]}: '{rows.masked_start(row, _MAX_QUOTED)}'")
        for position, row in enumerate(held_out, start=scan.counts["train"])
        if position in positions
    }


def _conflicting_label_counts(keys: np.ndarray, labels: np.ndarray) -> dict[int, Counter[int]]:
    """Map each key that has several labels to the number of rows of each label."""
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
_MIN_IDENTICAL_CHARACTERS = 40


def chat_faults(turns: Sequence[Turn]) -> list[str]:
    """Describe the faults of a conversation. Turns are numbered from 1."""
    return [*_describe_turn_order_faults(turns), *_describe_empty_or_repeated_turns(turns)]


def _describe_turn_order_faults(turns: Sequence[Turn]) -> Iterator[str]:
    """Describe turns in an impossible order, such as two user turns in a row."""
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
        yield f"the chat ends with a {turns[-1]['role']} turn without an answer"


def _describe_empty_or_repeated_turns(turns: Sequence[Turn]) -> Iterator[str]:
    """Describe empty turns, and long assistant turns that occur twice."""
    first_turn: dict[str, int] = {}
    for number, turn in enumerate(turns, start=1):
        text, role = turn["content"].strip(), turn["role"]
        # This is a tool call, or text outside the content, such as reasoning.
        has_more = any(turn[key] for key in turn.keys() - {"role", "content", "name", "from", "value", "id"})
        # A tool may have nothing to say, and an empty system turn keeps a template from writing its own.
        if not text and role not in (*_SYSTEM, *_TOOL) and not has_more:
            yield f"turn {number} ({role}) is empty"
        if role == "assistant" and len(text) >= _MIN_IDENTICAL_CHARACTERS and not turn.get("tool_calls"):
            if text in first_turn:
                yield f"turns {first_turn[text]} and {number} of the assistant are identical"
            first_turn.setdefault(text, number)
