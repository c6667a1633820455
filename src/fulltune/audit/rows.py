"""The prepared rows as an audit reads them: once, with what is wrong with their texts, and what tells rows apart."""

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

from fulltune.audit.languages import OTHER_LANGUAGE, ColumnLanguages, add_languages, elsewhere
from fulltune.audit.texts import PARTS, cells, checks_of, flaws, masked_text, whole_texts
from fulltune.audit.texts.content import alike
from fulltune.audit.texts.flaw import Flaw
from fulltune.data.groups import draw, grams, jaccard, joined, signatures
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
_TEXT = 300
"""Characters of a row that are written down."""
_AT_ONCE = 1000
_IN_KEY = ("image", "text", "text_pair", "prompt", "source")
"""Roles of columns whose cells a row's group key holds as a whole."""


@dataclass(frozen=True)
class AuditedRows:
    """The prepared rows, in the user's own columns."""

    folder: Path
    task: Task
    target: Target
    own_files: frozenset[str]
    """Splits with files of their own."""
    packed: Recipe | None
    """Of rows that share a block: what names their files. None: each row lies beside its features."""

    @property
    def has_texts(self) -> bool:
        return "image" not in self.target.columns

    def of(self, split: SplitName) -> Iterator[dict[str, Any]]:
        """Each row of a split once, also where it gave several examples."""
        if self.packed is not None and split == "train":
            yield from self._of_files(self.packed)
            return
        for _, examples in groupby(texts(self.folder / split), key=itemgetter(PLACE)):
            yield next(examples)

    def all(self) -> Iterator[tuple[SplitName, dict[str, Any]]]:
        """Each row once, of one split after the other."""
        for split in SPLITS:
            yield from ((split, row) for row in self.of(split))

    def _of_files(self, recipe: Recipe) -> Iterator[dict[str, Any]]:
        """The train rows as the data stage read them."""
        block, files = recipe.data, find_files(recipe)["train"]
        patched = PatchedRows(load_patch(Path(block.patch)), "train") if block.patch else None
        held_out = {row[PLACE] for split in ("eval", "test") if not getattr(block, split) for row in self.of(split)}
        for place, row in read_rows(recipe, files, None, patched).rows(None):
            if place not in held_out and self.task.refuse(row, self.target) is None:
                yield {**row, PLACE: place}

    def beginning(self, row: Row, most: int) -> str:
        """How a row's texts begin, on one line, with what must not be shown masked."""
        texts = (cell for part in PARTS for _, cell in cells(row, self.target.columns, part))
        return " | ".join(" ".join(masked_text(text).split()) for text in texts)[:most]

    def source_of(self, split: SplitName) -> str:
        """Whose file a split's rows stand in."""
        return split if split in self.own_files else "train"

    def whole(self, row: Row, key: str) -> str:
        """All that a row gives to learn."""
        columns = [column for role, column in self.target.columns.items() if role not in _IN_KEY]
        return "\0".join([key, *(normalised(as_text(row.get(column))) for column in columns)])

    def issue(
        self, check: str, of: tuple[SplitName, Row], reason: str, remedy: Remedy | None = None, score: float = 0.0
    ) -> RowIssue:
        """A row `of` a split as it is listed; without a remedy it would be dropped. Equal rows are numbered later."""
        split, row = of
        return RowIssue(
            check=check,
            split=split,
            source=self.source_of(split),
            place=str(row[PLACE]),
            row=row_id(row),
            reason=reason,
            text=self.beginning(row, _TEXT),
            label=", ".join(self.task.row_labels(row, self.target)) or None,
            remedy=remedy or Remedy(action="drop"),
            score=score,
        )


@dataclass
class RowScan:
    """What is known when all rows have passed by once."""

    issues: list[RowIssue] = field(default_factory=list)
    counts: dict[SplitName, int] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("Q"))
    """`row_id` of each row, as a number."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of what each row asks: its text, prompt or passage. All splits, one after the other."""
    wholes: array[int] = field(default_factory=lambda: array("q"))
    """A hash of all that it gives to learn, which is another one in the next process."""
    signed: np.ndarray = field(default_factory=lambda: signatures([]))
    """MinHash of what each row asks: uint16 [rows, hashes]; of images without meaning."""
    labels: array[int] = field(default_factory=lambda: array("q"))
    """The number of its labels in `names`; -1: it has none."""
    names: dict[tuple[str, ...], int] = field(default_factory=dict)
    heard: dict[str, ColumnLanguages] = field(default_factory=dict)
    """Column to its languages; empty where they cannot be told."""


def look(rows: AuditedRows, total: int, listener: Listener) -> RowScan:
    """All rows, once: what is wrong with their texts, and what tells them apart."""
    seen, checks = RowScan(), checks_of(rows.target.columns)
    signed: list[np.ndarray] = []
    for split in SPLITS:
        before, keys = len(seen.keys), list[str]()
        for row in rows.of(split):
            key = rows.task.group_key(row, rows.target)
            keys.append(key if rows.has_texts else "")
            names = tuple(rows.task.row_labels(row, rows.target))
            seen.ids.append(int(row_id(row), 16))
            seen.keys.append(draw(0, key))
            seen.wholes.append(hash(rows.whole(row, key)))
            seen.labels.append(seen.names.setdefault(names, len(seen.names)) if names else -1)
            for part, of in checks.items():
                for column, text in cells(row, rows.target.columns, part):
                    seen.issues += [_flawed(rows, split, row, column, flaw) for flaw in flaws(text, of)]
            if (turns := rows.target.columns.get("messages")) and (found := chat_faults(chat.clean(row[turns]))):
                reason = masked_text(first_few(found))
                seen.issues.append(rows.issue(CHAT_FAULT, (split, row), reason, score=float(len(found))))
            add_languages(seen.heard, row, rows.target.columns)
            if len(keys) == _AT_ONCE:
                done = len(seen.keys)
                listener(RowsRead(name="auditing", done=done, total=max(total, done)))
                signed.append(signatures(keys))
                keys.clear()
        signed.append(signatures(keys))
        seen.counts[split] = len(seen.keys) - before
    listener(RowsRead(name="auditing", done=len(seen.keys), total=len(seen.keys)))
    seen.signed = np.concatenate(signed)
    return seen


def with_numbers(rows: AuditedRows, seen: RowScan, issues: list[RowIssue], decided: Decisions) -> list[RowIssue]:
    """The issues, with which one of several equal rows of a source each is about, those counted that a patch drops."""
    values, counts = np.unique(np.array(seen.ids, np.uint64), return_counts=True)
    several = {f"{one:016x}" for one in values[counts > 1].tolist()} | {row.partition("-")[0] for _, row in decided}
    # The rows are read once more only where that can change a name.
    found = named(rows, decided, several) if any(one.row in several for one in issues) else ()
    names = {(split, str(row[PLACE])): name for split, row, name in found}
    return [one.model_copy(update={"row": names.get((one.split, one.place), one.row)}) for one in issues]


def named(
    rows: AuditedRows, decided: Decisions, among: Collection[str] | None = None
) -> Iterator[tuple[SplitName, Row, str]]:
    """Each row (those with some hashes) with its identity: of several equal rows of a source the second has `-2`."""
    times = Counter[tuple[str, str]]()
    for split, row in rows.all():
        key = rows.source_of(split), row_id(row)
        if among is not None and key[1] not in among:
            continue
        times[key] += 1
        # Those that a patch has dropped are counted.
        while (one := decided.get((key[0], numbered(key[1], times[key])))) and one.remedy.action == "drop":
            times[key] += 1
        yield split, row, numbered(key[1], times[key])


def _flawed(rows: AuditedRows, split: SplitName, row: Row, column: str, flaw: Flaw) -> RowIssue:
    # A turn of a conversation is no cell that could be replaced.
    repairable = flaw.fixed is not None and isinstance(row[column], str)
    remedy = Remedy(action="replace", column=column, value=flaw.fixed) if repairable else None
    return rows.issue(flaw.check, (split, row), f"column '{column}': {flaw.reason}", remedy)


def in_classes_alike(rows: AuditedRows, seen: RowScan) -> list[RowIssue]:
    """Rows of a class that is perhaps meant to be a more frequent one, whose name would replace theirs."""
    of_number, counts = Counter(seen.labels), Counter[str]()
    for names, number in seen.names.items():
        counts.update(dict.fromkeys(names, of_number[number]))
    instead = {name: them[0] for them in alike(counts) for name in them[1:]}
    issues, column = list[RowIssue](), rows.target.columns.get("label", "")
    for split, row in rows.all() if instead else ():
        labels = rows.task.row_labels(row, rows.target)
        if column in row and (found := [one for one in labels if one in instead]):
            new = list(dict.fromkeys(instead.get(one, one) for one in labels))
            is_list = rows.target.form.several_labels
            remedy = Remedy(action="replace", column=column, value=new if is_list else new[0])
            reason = f"class {found[0]!a} is perhaps {instead[found[0]]!a}"
            issues.append(rows.issue(CLASS_NAMES, (split, row), reason, remedy))
    return issues


def in_other_languages(rows: AuditedRows, seen: RowScan) -> list[RowIssue]:
    """Rows that are surely in another language than nearly all others of their column."""
    suspects, issues = {column: one.suspects() for column, one in seen.heard.items()}, list[RowIssue]()
    own = {column: one.own() for column, one in seen.heard.items()}
    for position, (split, row) in enumerate(rows.all() if any(suspects.values()) else ()):
        for column, text in whole_texts(row, rows.target.columns).items():
            if position in suspects.get(column, ()) and (found := elsewhere(text, own[column])) is not None:
                reason = f"column '{column}': {found[0]}, where nearly all rows are {', '.join(own[column])}"
                issues.append(rows.issue(OTHER_LANGUAGE, (split, row), reason, score=found[1]))
    return issues


# ---- rows that stand more than once: in train, with other labels, or among the rows that are scored on ---------------

DUPLICATE, LEAK, NEAR_LEAK, CONFLICT = "duplicate", "leak", "near leak", "conflicting labels"
NEAR = 0.8
"""Share of the runs of five letters that texts have in common which are nearly the same."""
_CANDIDATE = 0.7
"""The same as signatures estimate it, with an error of 3.5 points at 0.8: of 400 rows at the bound one is below."""
_QUOTED = 80
"""Characters of the row that is scored on."""
_MAX_COMPARED = 5000
"""Held-out rows of a group whose signatures a train row's is compared with: more than are ever split off."""
_MAX_READ = 10
"""Of these how many are read, those first that seem nearest."""


def repeated(rows: AuditedRows, seen: RowScan) -> list[RowIssue]:
    """Train rows that are there already, that are scored on, or that have another label elsewhere."""
    keys, wholes, labels = (np.frombuffer(one, np.int64) for one in (seen.keys, seen.wholes, seen.labels))
    train = np.arange(len(keys)) < seen.counts["train"]
    again = stands_before(wholes, train)
    leaks = train & np.isin(keys, keys[~train])
    near = keys
    if rows.has_texts:
        near = joined(keys.view(np.uint64), seen.signed, _CANDIDATE).view(np.int64)
    alike = _scored_on(seen, train, leaks, near)
    votes = _votes(keys[train & (labels >= 0)], labels[train & (labels >= 0)])
    torn = train & np.isin(keys, np.fromiter(votes, np.int64, len(votes)))
    # Rows with the label of most stay.
    for position in np.flatnonzero(torn).tolist():
        torn[position] = _most(votes[int(keys[position])]) != labels[position]
    held_out = _held_out(rows, seen, set(chain.from_iterable(alike.values())))
    names = {number: of for of, number in seen.names.items()}
    column, is_list = rows.target.columns.get("label"), rows.target.form.several_labels
    issues: list[RowIssue] = []
    wanted = again | torn
    wanted[list(alike)] = True
    for position, row in zip(range(seen.counts["train"]), rows.of("train"), strict=True):
        if not wanted[position]:
            continue
        others = [held_out[one] for one in alike.get(position, ())]
        tell = partial(rows.issue, of=("train", row))
        if again[position]:
            issues.append(tell(DUPLICATE, reason="stands in train already, its label or answer included"))
        if leaks[position]:
            issues.append(tell(LEAK, reason=f"the same text is scored on: {others[0][1]}"))
        elif others:
            mine = grams(rows.task.group_key(row, rows.target))
            shares = [jaccard(mine, grams(other[0])) for other in others]
            if (share := max(shares)) >= NEAR:
                shown = others[shares.index(share)][1]
                issues.append(tell(NEAR_LEAK, reason=f"nearly the same text is scored on: {shown}", score=share))
        if torn[position]:
            counts = votes[int(keys[position])]
            times = ((", ".join(names[label]), count) for label, count in counts.most_common(3))
            shown = ", ".join(f"'{name}' {'once' if count == 1 else f'{count:,} times'}" for name, count in times)
            remedy, best = None, _most(counts)
            if best is not None and column is not None:
                remedy = Remedy(action="replace", column=column, value=[*names[best]] if is_list else names[best][0])
            score = float(counts.total() - counts[int(labels[position])])
            issues.append(
                tell(CONFLICT, reason=f"the same text has several labels: {shown}", remedy=remedy, score=score)
            )
    return issues


def stands_before(wholes: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Train rows whose number stands in train before: bool [rows]."""
    again = train.copy()
    again[np.unique(np.where(train, wholes, 0), return_index=True)[1]] = False
    return again


def _scored_on(seen: RowScan, train: np.ndarray, leaks: np.ndarray, near: np.ndarray) -> dict[int, list[int]]:
    """Positions of train rows to a held-out row that is equal, or to those that are themselves as near as `NEAR`."""
    groups, first = dict[int, list[int]](), dict[int, int]()
    for position in np.flatnonzero(~train & np.isin(near, near[train])).tolist():
        groups.setdefault(int(near[position]), []).append(position)
        first.setdefault(seen.keys[position], position)
    of_group = {group: seen.signed[others[:_MAX_COMPARED]] for group, others in groups.items()}
    found: dict[int, list[int]] = {}
    for position in np.flatnonzero(train & np.isin(near, near[~train])).tolist():
        if leaks[position]:
            found[position] = [first[seen.keys[position]]]
            continue
        group = int(near[position])
        shared = (seen.signed[position] == of_group[group]).sum(axis=1, dtype=np.uint8)
        nearest = np.argsort(shared, kind="stable")[::-1][:_MAX_READ]
        least = _CANDIDATE * seen.signed.shape[1]
        if candidates := [groups[group][one] for one in nearest.tolist() if shared[one] >= least]:
            found[position] = candidates
    return found


def _held_out(rows: AuditedRows, seen: RowScan, wanted: set[int]) -> dict[int, tuple[str, str]]:
    """Held-out rows by their positions: what each asks, and where it stands and how it begins."""
    held_out = chain(rows.of("eval"), rows.of("test")) if wanted else ()
    return {
        position: (rows.task.group_key(row, rows.target), f"{row[PLACE]}: '{rows.beginning(row, _QUOTED)}'")
        for position, row in enumerate(held_out, start=seen.counts["train"])
        if position in wanted
    }


def _votes(keys: np.ndarray, labels: np.ndarray) -> dict[int, Counter[int]]:
    """Of each key with more than one label, how often it has each."""
    pairs = np.unique(np.stack([keys, labels]), axis=1)
    several, counts = np.unique(pairs[0], return_counts=True)
    torn = np.isin(keys, several[counts > 1])
    votes: dict[int, Counter[int]] = {}
    for key, label in zip(keys[torn].tolist(), labels[torn].tolist(), strict=True):
        votes.setdefault(key, Counter())[label] += 1
    return votes


def _most(counts: Counter[int]) -> int | None:
    """The label of more than half; None: there is none."""
    (best, most), *_ = counts.most_common(1)
    return best if 2 * most > counts.total() else None


# ---- conversations --------------------------------------------------------------------------------------------------

Turn = Mapping[str, Any]

_SYSTEM = ("system", "developer")
_TOOL = ("tool", "function", "ipython", "observation")
_MIN_IDENTICAL = 40
"""Characters from which two equal answers are no mere 'Yes.' or 'You are welcome.'."""


def chat_faults(turns: Sequence[Turn]) -> list[str]:
    """What is wrong with a conversation, in words; turns count from 1."""
    return [*_order(turns), *_emptiness(turns)]


def _order(turns: Sequence[Turn]) -> Iterator[str]:
    for number, (before, turn) in enumerate(pairwise(turns), start=2):
        role = turn["role"]
        if role in _SYSTEM and before["role"] not in _SYSTEM:
            yield f"turn {number} is a {role} turn that is not first"
        elif role in _TOOL and before["role"] == "user":
            yield f"turn {number} is the result of a tool that was not called"
        # Tools answer side by side, and people who have names may talk among themselves.
        elif role == before["role"] and role not in _TOOL and turn.get("name") == before.get("name"):
            yield f"turns {number - 1} and {number} are both {role} turns"
    if turns and turns[-1]["role"] != "assistant":
        yield f"it ends with a {turns[-1]['role']} turn that nothing answers"


def _emptiness(turns: Sequence[Turn]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, turn in enumerate(turns, start=1):
        text, role = turn["content"].strip(), turn["role"]
        # A call, or words of its own beside the content, such as a reasoning.
        has_more = any(turn[key] for key in turn.keys() - {"role", "content", "name", "from", "value", "id"})
        # A tool may have nothing to say, and an empty system turn keeps a template from writing its own.
        if not text and role not in (*_SYSTEM, *_TOOL) and not has_more:
            yield f"turn {number} ({role}) is empty"
        if role == "assistant" and len(text) >= _MIN_IDENTICAL and not turn.get("tool_calls"):
            if text in seen:
                yield f"turns {seen[text]} and {number} of the assistant are identical"
            seen.setdefault(text, number)
