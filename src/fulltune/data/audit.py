"""What is wrong with the rows, row by row: listed with the reason and with what could be done; nothing is changed.

The prepared rows are read, so that each has its split; short texts that share a row are read from their files, without
those that are held out. Kept of each row are two hashes and the number of its label;
rows that share one of them with others are read a second time, to be written down.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.audit import Flaw, TextCheck, missing, repaired
from fulltune.data.near import joined, signatures
from fulltune.data.patch import Patched, load_patch
from fulltune.data.rephrased import HELD_OUT, ComparedTexts, Rephrased
from fulltune.data.running_text import READ, WRITTEN, cells, checks_of, flawed
from fulltune.data.sampling import draw
from fulltune.data.sources import find_files, read_rows
from fulltune.errors import SetupError
from fulltune.files import replacing
from fulltune.inference.store import row_id, texts
from fulltune.probe.label_errors import Suspected
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import AUDIT, ISSUES, Audit, CheckFound, LabelErrors, Remedy, RowIssue
from fulltune.records.data import DataSummary, SplitName
from fulltune.tasks import PLACE, Row, Target, Task
from fulltune.tasks.columns import as_text, normalised
from fulltune.text import counted

DUPLICATE, LEAK, NEAR_LEAK, CONFLICT = "duplicate", "leak", "near leak", "conflicting labels"
PARAPHRASE = "paraphrase leak"
LEAKS = (LEAK, NEAR_LEAK, PARAPHRASE)
LABEL, DOUBT = "label error", "doubtful label"
NEAR = 0.8
"""Share of the runs of five letters that texts have in common which are nearly the same."""
_SPLITS: tuple[SplitName, ...] = ("train", "eval", "test")
_TEXT = 300
"""Characters of a row that are written down."""
_EXAMPLES = 10
_BEGINNING = 80
"""Characters of the held-out row that a train row repeats in other words."""
_PRIVATE: tuple[TextCheck, ...] = ("secret", "personal data")
"""Masked where a reason quotes another row."""
_AT_ONCE = 1000
Judged = tuple[np.ndarray, Suspected]
"""Positions of train rows, and what is known of their labels."""
Judge = Callable[[], Judged | str]
"""Judges the labels of train rows; or says why they cannot be judged."""
Compare = Callable[[], ComparedTexts | str]
"""Compares the texts of train rows with those of held-out ones; or says why they cannot be compared."""
Progress = Callable[[int, int], None]


def audit(
    recipe: Recipe,
    folder: Path,
    summary: DataSummary,
    task: Task,
    judge: Judge | None,
    compare: Compare | None,
    progress: Progress,
) -> Audit:
    """Look at all rows of a run.

    Args:
        recipe: The checked recipe.
        folder: The run's `data` folder. `issues.jsonl` is written there, and `audit.json` last; where it is of the same
            rows, nothing is looked at again.
        summary: Of the prepared rows.
        task: The task module.
        judge: None: the rows have no single label each, or are not judged.
        compare: None: the rows are no texts to classify, or are not compared.
        progress: Told how many rows of how many were looked at.
    """
    try:
        if (earlier := Audit.load(folder / AUDIT)).fingerprint == summary.fingerprint:
            return earlier
    except (OSError, SetupError):
        pass
    began = time.monotonic()
    rows = _Rows(folder, task, Target.of(summary), recipe if summary.packed else None)
    seen = _look(rows, sum(split.rows for split in summary.splits.values()), progress)
    issues = [*seen.issues, *_repeated(rows, seen)]
    made = {
        *rows.checks,
        DUPLICATE,
        LEAK,
        *([NEAR_LEAK] if rows.has_texts else []),
        *([CONFLICT] if seen.names else []),
    }
    not_run: dict[str, str] = {check: f"needs the extra '{extra}'" for check, extra in missing().items()}
    if compare is not None:
        compared = compare()
        if isinstance(compared, str):
            not_run[PARAPHRASE] = compared
        else:
            made.add(PARAPHRASE)
            issues += _in_other_words(rows, compared.found, {one.place for one in issues if one.check in LEAKS})
            if compared.left_out:
                not_run[PARAPHRASE] = f"{counted(compared.left_out, 'row')} that were not drawn to be read"
    labels = None
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
    issues = [one for one in issues if one.row not in decided]
    issues.sort(key=lambda one: (one.check, -one.score))
    with replacing(folder / ISSUES) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{one.model_dump_json(exclude_defaults=True)}\n" for one in issues)
    done = Audit(
        fingerprint=summary.fingerprint,
        rows=seen.counts,
        checks=_by_check(issues),
        clean=tuple(sorted(made - {one.check for one in issues})),
        labels=labels,
        not_run=not_run,
        seconds=round(time.monotonic() - began, 1),
    )
    done.save(folder / AUDIT)  # last
    return done


def _by_check(issues: Sequence[RowIssue]) -> tuple[CheckFound, ...]:
    """What each check found, the one that found most first.

    Args:
        issues: By check, of each the surest first.
    """
    found = [(check, list(them)) for check, them in groupby(issues, key=lambda one: one.check)]
    return tuple(
        CheckFound(check=check, rows=len({(one.split, one.place) for one in them}), examples=tuple(them[:_EXAMPLES]))
        for check, them in sorted(found, key=lambda one: -len(one[1]))
    )


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

    def whole(self, row: Row, key: str) -> str:
        """All that a row gives to learn; of an image its key says everything."""
        columns = [column for role, column in self.target.columns.items() if role != "image"]
        return "\0".join([key, *(normalised(as_text(row.get(column))) for column in columns)])

    def issue(
        self, check: str, split: SplitName, row: Row, reason: str, remedy: Remedy | None = None, score: float = 0.0
    ) -> RowIssue:
        """A row as it is listed; without a remedy it would be dropped."""
        return RowIssue(
            check=check,
            split=split,
            place=str(row[PLACE]),
            row=row_id(row),
            reason=reason,
            text=" | ".join(cell for _, cell in cells(row, self.target.columns, (*READ, *WRITTEN)))[:_TEXT],
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
    wholes: list[int] = field(default_factory=list)
    """The same of all that it gives to learn."""
    signed: list[np.ndarray] = field(default_factory=list)
    """MinHash of the same texts, some at a time: uint16 [rows, hashes]; empty for images."""
    labels: list[int] = field(default_factory=list)
    """The number of its labels in `names`; -1: it has none."""
    names: dict[tuple[str, ...], int] = field(default_factory=dict)


def _look(rows: _Rows, total: int, progress: Progress) -> _Seen:
    """All rows, once: what is wrong with their texts, and what tells them apart."""
    seen, checks = _Seen(), checks_of(rows.target.columns, rows.checks)
    for split in _SPLITS:
        before, keys = len(seen.keys), list[str]()
        for row in rows.of(split):
            key = rows.task.group_key(row, rows.target)
            keys.append(key if rows.has_texts else "")
            names = tuple(rows.task.row_labels(row, rows.target))
            seen.keys.append(draw(0, key))
            seen.wholes.append(draw(0, rows.whole(row, key)))
            seen.labels.append(seen.names.setdefault(names, len(seen.names)) if names else -1)
            found = flawed(row, rows.target.columns, checks)
            seen.issues += [_flawed(rows, split, row, column, flaw) for column, flaw in found]
            if len(keys) == _AT_ONCE:
                progress(len(seen.keys), max(total, len(seen.keys)))
                seen.signed.append(signatures(keys))
                keys.clear()
        seen.signed.append(signatures(keys))
        seen.counts[split] = len(seen.keys) - before
    progress(len(seen.keys), len(seen.keys))
    return seen


def _flawed(rows: _Rows, split: SplitName, row: Row, column: str, flaw: Flaw) -> RowIssue:
    # A turn of a conversation is no cell that could be replaced.
    repairable = flaw.fixed is not None and isinstance(row[column], str)
    remedy = Remedy(action="replace", column=column, value=flaw.fixed) if repairable else None
    return rows.issue(flaw.check, split, row, f"column '{column}': {flaw.reason}", remedy)


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
    near = joined(keys.view(np.uint64), np.concatenate(seen.signed), NEAR) if rows.has_texts else keys
    nearly = train & np.isin(near, near[~train]) & ~leaks
    votes = _votes(keys[train & (labels >= 0)], labels[train & (labels >= 0)])
    torn = train & np.isin(keys, np.fromiter(votes, np.int64, len(votes)))
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
            issues.append(tell(LEAK, reason="its text stands among the eval or test rows, too: their scores flatter"))
        if nearly[position]:
            issues.append(tell(NEAR_LEAK, reason="nearly the same text stands among the eval or test rows"))
        if torn[position]:
            counts = votes[int(keys[position])]
            shown = ", ".join(f"'{', '.join(names[label])}' {count:,} times" for label, count in counts.most_common(3))
            (best, most), *_ = counts.most_common(1)
            remedy = None
            if 2 * most > counts.total() and column is not None:
                value = list(names[best]) if is_list else names[best][0]
                is_best = best == labels[position]
                remedy = Remedy(action="keep") if is_best else Remedy(action="replace", column=column, value=value)
            score = float(counts.total() - counts[int(labels[position])])
            issues.append(
                tell(CONFLICT, reason=f"the same text has several labels: {shown}", remedy=remedy, score=score)
            )
    return issues


def _votes(keys: np.ndarray, labels: np.ndarray) -> dict[int, Counter[int]]:
    """Of each key with more than one label, how often it has each."""
    pairs = np.unique(np.stack([keys, labels]), axis=1)
    several, counts = np.unique(pairs[0], return_counts=True)
    torn = np.isin(keys, several[counts > 1])
    votes: dict[int, Counter[int]] = {}
    for key, label in zip(keys[torn].tolist(), labels[torn].tolist(), strict=True):
        votes.setdefault(key, Counter())[label] += 1
    return votes


def _in_other_words(rows: _Rows, found: Sequence[Rephrased], leaked: Collection[str]) -> list[RowIssue]:
    """Train rows that say what a held-out row says, but for those that were found to leak already, by their places."""
    by_position = {one.position: one for one in found}
    chosen = [(by_position[at], row) for at, row in enumerate(rows.of("train")) if at in by_position]
    chosen = [(one, row) for one, row in chosen if str(row[PLACE]) not in leaked]
    wanted = {(one.split, one.held_out) for one, _ in chosen}
    held_out: Mapping[tuple[SplitName, int], Row] = {
        (split, at): row for split in HELD_OUT for at, row in enumerate(rows.of(split)) if (split, at) in wanted
    }
    issues: list[RowIssue] = []
    for one, row in chosen:
        other = held_out[one.split, one.held_out]
        said = repaired(as_text(other[rows.target.columns["text"]]), _PRIVATE)
        cut = f"{said[:_BEGINNING]} …" if len(said) > _BEGINNING else said
        reason = f"says in other words what {one.split} row {other[PLACE]} says: '{cut}'"
        issues.append(rows.issue(PARAPHRASE, "train", row, reason, score=round(one.cosine, 4)))
    return issues


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
