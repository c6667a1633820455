"""What is wrong with the rows, row by row: listed with the reason and with what could be done; nothing is changed.

The prepared rows are read, so that each has its split; short texts that share a row are read from their files, without
those that are held out. Kept of each row are two hashes, the number of its label and of each text's language;
rows that share one of them with others are read a second time, to be written down.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.audit import Flaw, missing, repaired
from fulltune.audit.conversation import chat_faults
from fulltune.audit.flaw import listed
from fulltune.data.languages import OTHER_LANGUAGE, Heard, listen, not_told, strangers
from fulltune.data.near import joined, signatures
from fulltune.data.patch import Patched, load_patch, numbered
from fulltune.data.running_text import PARTS, cells, checks_of, flawed, private
from fulltune.data.sampling import draw
from fulltune.data.sources import find_files, read_rows
from fulltune.errors import SetupError
from fulltune.files import replacing
from fulltune.inference.store import row_id, texts
from fulltune.probe.label_errors import Suspected
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import AUDIT, ISSUES, Audit, CheckFound, LabelErrors, Remedy, RowIssue
from fulltune.records.data import DataSummary, SplitName
from fulltune.tasks import PLACE, Row, Target, Task, chat
from fulltune.tasks.columns import as_text, normalised

DUPLICATE, LEAK, NEAR_LEAK, CONFLICT = "duplicate", "leak", "near leak", "conflicting labels"
CHAT_FAULT = "chat fault"
LABEL, DOUBT = "label error", "doubtful label"
NOT_ASKED = "left out by --no-labels"
NEAR = 0.8
"""Share of the runs of five letters that texts have in common which are nearly the same."""
_SPLITS: tuple[SplitName, ...] = ("train", "eval", "test")
_TEXT = 300
"""Characters of a row that are written down."""
_EXAMPLES, _QUOTED = 10, 80
_MOST_COMPARED = 200
"""Held-out rows of a group that a train row is compared with."""
_AT_ONCE = 1000
Judged = tuple[np.ndarray, Suspected]
"""Positions of train rows, and what is known of their labels."""
Judge = Callable[[], Judged | str]
"""Judges the labels of train rows; or says why they cannot be judged."""
Progress = Callable[[int, int], None]


def audit(
    recipe: Recipe, folder: Path, summary: DataSummary, task: Task, judge: Judge | None, progress: Progress
) -> Audit:
    """Look at all rows of a run.

    Args:
        recipe: The checked recipe.
        folder: The run's `data` folder. `issues.jsonl` is written there, and `audit.json` last; where it is of the same
            rows, nothing is looked at again.
        summary: Of the prepared rows.
        task: The task module.
        judge: None: labels are not to be judged, or the rows have no single label each.
        progress: Told how many rows of how many were looked at.
    """
    try:
        earlier = Audit.load(folder / AUDIT)
        is_judged = earlier.labels is not None or earlier.not_run.get(LABEL) != NOT_ASKED
        if earlier.fingerprint == summary.fingerprint and (is_judged or judge is None):
            return earlier
    except (OSError, SetupError):
        pass
    began = time.monotonic()
    own = frozenset(split for split in _SPLITS if getattr(recipe.data, split))
    rows = _Rows(folder, task, Target.of(summary), own, recipe if summary.packed else None)
    seen = _look(rows, sum(split.rows for split in summary.splits.values()), progress)
    issues = [*seen.issues, *_repeated(rows, seen), *_in_other_languages(rows, seen)]
    made = {
        *rows.checks,
        DUPLICATE,
        LEAK,
        *([NEAR_LEAK] if rows.has_texts else []),
        *([CONFLICT] if seen.names else []),
        *([CHAT_FAULT] if "messages" in rows.target.columns else []),
        *([OTHER_LANGUAGE] if any(one.why_not() is None for one in seen.heard.values()) else []),
    }
    not_run: dict[str, str] = {check: f"needs the extra '{extra}'" for check, extra in missing().items()}
    if rows.has_texts and (why := not_told(seen.heard)) is not None:
        not_run[OTHER_LANGUAGE] = why
    labels = None
    if judge is None:
        is_single = summary.problem_type == "single_label"
        not_run[LABEL] = NOT_ASKED if is_single else "only rows with one label each are judged"
    if judge is not None:
        judged = judge()
        if isinstance(judged, str):
            not_run[LABEL] = judged
        else:
            made |= {LABEL, DOUBT}
            issues += _mislabelled(rows, *judged)
            labels = _about_labels(*judged, of_rows=seen.counts["train"])
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    # What was looked at and kept is not asked again.
    issues = [one for one in _numbered(rows, seen, issues) if one.key not in decided]
    issues.sort(key=lambda one: (one.check, -one.score))
    with replacing(folder / ISSUES) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{one.model_dump_json(exclude_defaults=True)}\n" for one in issues)
    found = [(check, list(them)) for check, them in groupby(issues, key=lambda one: one.check)]
    done = Audit(
        fingerprint=summary.fingerprint,
        rows=seen.counts,
        checks=tuple(
            CheckFound(
                check=check, rows=len({(one.split, one.place) for one in them}), examples=tuple(them[:_EXAMPLES])
            )
            for check, them in sorted(found, key=lambda one: -len(one[1]))
        ),
        clean=tuple(sorted(made - {check for check, _ in found})),
        labels=labels,
        languages=tuple(one.about(column) for column, one in seen.heard.items()),
        not_run=not_run,
        seconds=round(time.monotonic() - began, 1),
    )
    done.save(folder / AUDIT)  # last
    return done


def load_issues(folder: Path) -> list[RowIssue]:
    """What the audit of a run's `data` folder found, by check, of each the surest first."""
    with (folder / ISSUES).open(encoding="utf-8") as file:
        return [RowIssue.model_validate(json.loads(line)) for line in file]


# ---- rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
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

    @property
    def checks(self) -> set[str]:
        """Checks of single texts that are made on these rows."""
        absent = missing()
        return {one for of in checks_of(self.target.columns).values() for one in of if one not in absent}

    def of(self, split: SplitName) -> Iterator[dict[str, Any]]:
        """Each row of a split once, also where it gave several examples."""
        if self.packed is not None and split == "train":
            yield from self._of_files(self.packed)
            return
        before: dict[str, Any] | None = None
        for row in texts(self.folder / split):
            if row is not before:
                yield row
            before = row

    def _of_files(self, recipe: Recipe) -> Iterator[dict[str, Any]]:
        """The train rows as the data stage read them."""
        block, files = recipe.data, find_files(recipe)["train"]
        patched = Patched(load_patch(Path(block.patch)), "train") if block.patch else None
        held_out = {row[PLACE] for split in ("eval", "test") if not getattr(block, split) for row in self.of(split)}
        for place, row in read_rows(recipe, files, None, patched).rows(None):
            if place not in held_out and self.task.refuse(row, self.target) is None:
                yield {**row, PLACE: place}

    def beginning(self, row: Row, most: int) -> str:
        """How a row's texts begin, on one line, with what must not be shown masked."""
        texts = (cell for part in PARTS for _, cell in cells(row, self.target.columns, part))
        return " | ".join(" ".join(repaired(text, private()).split()) for text in texts)[:most]

    def source_of(self, split: SplitName) -> str:
        """Whose file a split's rows stand in."""
        return split if split in self.own_files else "train"

    def whole(self, row: Row, key: str) -> str:
        """All that a row gives to learn; of an image its key says everything."""
        columns = [column for role, column in self.target.columns.items() if role != "image"]
        return "\0".join([key, *(normalised(as_text(row.get(column))) for column in columns)])

    def issue(
        self, check: str, split: SplitName, row: Row, reason: str, remedy: Remedy | None = None, score: float = 0.0
    ) -> RowIssue:
        """A row as it is listed; without a remedy it would be dropped. `row` is numbered later where rows are equal."""
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
class _Seen:
    """What is known when all rows have passed by once."""

    issues: list[RowIssue] = field(default_factory=list)
    counts: dict[SplitName, int] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    """A hash of what each row asks: its text, prompt or passage. All splits, one after the other."""
    ids: array[int] = field(default_factory=lambda: array("Q"))
    """`row_id` of each row, as a number."""
    wholes: list[int] = field(default_factory=list)
    """The same of all that it gives to learn."""
    signed: list[np.ndarray] = field(default_factory=list)
    """MinHash of the same texts, some at a time: uint16 [rows, hashes]; empty for images."""
    labels: list[int] = field(default_factory=list)
    """The number of its labels in `names`; -1: it has none."""
    names: dict[tuple[str, ...], int] = field(default_factory=dict)
    heard: dict[str, Heard] = field(default_factory=dict)
    """Column to its languages; empty where they cannot be told."""


def _look(rows: _Rows, total: int, progress: Progress) -> _Seen:
    """All rows, once: what is wrong with their texts, and what tells them apart."""
    seen, checks = _Seen(), checks_of(rows.target.columns, rows.checks)
    for split in _SPLITS:
        before, keys = len(seen.keys), list[str]()
        for row in rows.of(split):
            key = rows.task.group_key(row, rows.target)
            keys.append(key if rows.has_texts else "")
            names = tuple(rows.task.row_labels(row, rows.target))
            seen.ids.append(int(row_id(row), 16))
            seen.keys.append(draw(0, key))
            seen.wholes.append(draw(0, rows.whole(row, key)))
            seen.labels.append(seen.names.setdefault(names, len(seen.names)) if names else -1)
            found = flawed(row, rows.target.columns, checks)
            seen.issues += [_flawed(rows, split, row, column, flaw) for column, flaw in found]
            if "messages" in rows.target.columns:
                seen.issues += _chat_issues(rows, split, row)
            listen(seen.heard, row, rows.target.columns, split)
            if len(keys) == _AT_ONCE:
                progress(len(seen.keys), max(total, len(seen.keys)))
                seen.signed.append(signatures(keys))
                keys.clear()
        seen.signed.append(signatures(keys))
        seen.counts[split] = len(seen.keys) - before
    progress(len(seen.keys), len(seen.keys))
    return seen


def _numbered(rows: _Rows, seen: _Seen, issues: list[RowIssue]) -> list[RowIssue]:
    """The issues, with which one of several equal rows of a source each is about."""
    ids = np.array(seen.ids, np.uint64)
    values, counts = np.unique(ids, return_counts=True)
    several = {f"{one:016x}" for one in values[counts > 1].tolist()}
    places: dict[tuple[str, str], int] = {}
    if any(one.row in several for one in issues):
        times = Counter[tuple[str, str]]()
        for split in _SPLITS:
            for row in rows.of(split):
                if (found := row_id(row)) in several:
                    times[rows.source_of(split), found] += 1
                    places[split, str(row[PLACE])] = times[rows.source_of(split), found]
    return [one.model_copy(update={"row": numbered(one.row, places.get((one.split, one.place), 1))}) for one in issues]


def _chat_issues(rows: _Rows, split: SplitName, row: Row) -> list[RowIssue]:
    columns = rows.target.columns
    tools = chat.parsed(row.get(columns["tools"])) if "tools" in columns else None
    found = chat_faults(chat.clean(row[columns["messages"]]), tools)
    return [rows.issue(CHAT_FAULT, split, row, listed(found), score=float(len(found)))] if found else []


def _flawed(rows: _Rows, split: SplitName, row: Row, column: str, flaw: Flaw) -> RowIssue:
    # A turn of a conversation is no cell that could be replaced.
    repairable = flaw.fixed is not None and isinstance(row[column], str)
    fixed = repaired(row[column], private()) if repairable and flaw.check in private() else flaw.fixed
    remedy = Remedy(action="replace", column=column, value=fixed) if repairable else None
    return rows.issue(flaw.check, split, row, f"column '{column}': {flaw.reason}", remedy)


def _in_other_languages(rows: _Rows, seen: _Seen) -> list[RowIssue]:
    return [
        rows.issue(OTHER_LANGUAGE, one.split, one.row, f"column '{one.column}': {one.reason}", score=one.confidence)
        for one in strangers(seen.heard, rows.target.columns, rows.of)
    ]


# ---- rows that stand more than once ----------------------------------------------------------------------------


def _repeated(rows: _Rows, seen: _Seen) -> list[RowIssue]:
    """Train rows that are there already, that are scored on, or that have another label elsewhere."""
    keys, wholes = (np.array(one, np.uint64).view(np.int64) for one in (seen.keys, seen.wholes))
    labels = np.array(seen.labels, np.int64)
    train = np.arange(len(keys)) < seen.counts["train"]
    _, first = np.unique(np.where(train, wholes, 0), return_index=True)
    again = train.copy()
    again[first] = False
    leaks = train & np.isin(keys, keys[~train])
    near = keys
    if rows.has_texts:
        near = joined(keys.view(np.uint64), np.concatenate(seen.signed), NEAR).view(np.int64)
    held = _scored_on(seen, train, leaks, near)
    nearly = train & ~leaks
    nearly[nearly] = np.isin(np.flatnonzero(nearly), list(held))
    votes = _votes(keys[train & (labels >= 0)], labels[train & (labels >= 0)])
    torn = train & np.isin(keys, np.fromiter(votes, np.int64, len(votes)))
    # Rows with the label of most stay.
    for position in np.flatnonzero(torn).tolist():
        torn[position] = _most(votes[int(keys[position])]) != labels[position]
    held_out = _places(rows, seen, set(held.values()))
    names = {number: of for of, number in seen.names.items()}
    column, is_list = rows.target.columns.get("label"), rows.target.problem_type == "multi_label"
    issues: list[RowIssue] = []
    wanted = again | leaks | nearly | torn
    for position, row in zip(range(seen.counts["train"]), rows.of("train"), strict=True):
        if not wanted[position]:
            continue
        tell = partial(rows.issue, split="train", row=row)
        if again[position]:
            issues.append(tell(DUPLICATE, reason="stands in train already, its label or answer included"))
        if leaks[position]:
            issues.append(tell(LEAK, reason=f"the same text is scored on: {held_out[held[position]]}"))
        if nearly[position]:
            issues.append(tell(NEAR_LEAK, reason=f"nearly the same text is scored on: {held_out[held[position]]}"))
        if torn[position]:
            counts = votes[int(keys[position])]
            times = ((", ".join(names[label]), count) for label, count in counts.most_common(3))
            shown = ", ".join(f"'{name}' {'once' if count == 1 else f'{count:,} times'}" for name, count in times)
            remedy, best = None, _most(counts)
            if best is not None and column is not None:
                value = list(names[best]) if is_list else names[best][0]
                remedy = Remedy(action="replace", column=column, value=value)
            score = float(counts.total() - counts[int(labels[position])])
            issues.append(
                tell(CONFLICT, reason=f"the same text has several labels: {shown}", remedy=remedy, score=score)
            )
    return issues


def _scored_on(seen: _Seen, train: np.ndarray, leaks: np.ndarray, near: np.ndarray) -> dict[int, int]:
    """Positions of train rows to the held-out row that each is equal to, or nearest to and as near as `NEAR`.

    Rows of one group are near each other along a chain; what counts is whether they are near by themselves.
    """
    groups: dict[int, list[int]] = {}
    for position in np.flatnonzero(~train & np.isin(near, near[train])).tolist():
        groups.setdefault(int(near[position]), []).append(position)
    signed = np.concatenate(seen.signed) if seen.signed else np.empty((0, 1), np.uint16)
    found: dict[int, int] = {}
    for position in np.flatnonzero(train & np.isin(near, near[~train])).tolist():
        others = groups[int(near[position])]
        if leaks[position]:
            found[position] = next(one for one in others if seen.keys[one] == seen.keys[position])
            continue
        shared = (signed[position] == signed[others[:_MOST_COMPARED]]).mean(axis=1)
        if shared.max() >= NEAR:
            found[position] = others[int(shared.argmax())]
    return found


def _places(rows: _Rows, seen: _Seen, wanted: set[int]) -> dict[int, str]:
    """Positions of held-out rows to where they stand, and how they begin."""
    found: dict[int, str] = {}
    position = seen.counts["train"]
    for split in ("eval", "test") if wanted else ():
        for row in rows.of(split):
            if position in wanted:
                found[position] = f"{row[PLACE]}: '{rows.beginning(row, _QUOTED)}'"
            position += 1
    return found


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


# ---- labels ----------------------------------------------------------------------------------------------------


def _mislabelled(rows: _Rows, positions: np.ndarray, found: Suspected) -> list[RowIssue]:
    column, names = rows.target.columns.get("label"), rows.target.labels
    of_check = {LABEL: found.suspects, DOUBT: found.doubtful}
    places = {int(positions[at]): (check, at) for check, them in of_check.items() for at in np.flatnonzero(them)}
    issues: list[RowIssue] = []
    for position, row in enumerate(rows.of("train")):
        if position not in places:
            continue
        check, at = places[position]
        other = names[int(found.other[at])]
        reason = f"'{other}' is likelier, by {-100 * float(found.margins[at]):.0f} points of probability"
        # Of a folder per class the label is no column: such an image can only be left out.
        remedy = None if column is None or column not in row else Remedy(action="replace", column=column, value=other)
        issues.append(rows.issue(check, "train", row, reason, remedy, -float(found.margins[at])))
    return issues


def _about_labels(positions: np.ndarray, found: Suspected, of_rows: int) -> LabelErrors:
    return LabelErrors(
        judged_rows=len(positions),
        of_rows=of_rows,
        agree=float((found.margins > 0).mean()),
        suspects=int(found.suspects.sum()),
        doubtful=int(found.doubtful.sum()),
        planted=found.planted,
        recall=found.recall,
        precision=found.precision,
        wrong=found.wrong,
    )
