"""Rows that stand more than once: in train, with other labels, or among the rows that are scored on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from fulltune.audit.rows import AuditedRows, SeenRows
from fulltune.data.groups import grams, jaccard, joined
from fulltune.records.audit import Remedy, RowIssue
from fulltune.tasks import PLACE

DUPLICATE, LEAK, NEAR_LEAK, CONFLICT = "duplicate", "leak", "near leak", "conflicting labels"
NEAR = 0.8
"""Share of the runs of five letters that texts have in common which are nearly the same."""
_CANDIDATE = 0.7
"""The same as signatures estimate it, with an error of 3.5 points at 0.8: of 400 rows at the bound one is below."""
_QUOTED = 80
"""Characters of the row that is scored on."""
_MOST_COMPARED = 5000
"""Held-out rows of a group whose signatures a train row's is compared with: more than are ever split off."""
_MOST_READ = 10
"""Of these how many are read, those first that seem nearest."""


@dataclass(frozen=True)
class HeldOut:
    """A row that is scored on."""

    key: str
    """What it asks."""
    shown: str
    """Where it stands, and how it begins."""


def repeated(rows: AuditedRows, seen: SeenRows) -> list[RowIssue]:
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
        tell = partial(rows.issue, split="train", row=row)
        if again[position]:
            issues.append(tell(DUPLICATE, reason="stands in train already, its label or answer included"))
        if leaks[position]:
            issues.append(tell(LEAK, reason=f"the same text is scored on: {others[0].shown}"))
        elif others:
            mine = grams(rows.task.group_key(row, rows.target))
            shares = [jaccard(mine, grams(other.key)) for other in others]
            if (share := max(shares)) >= NEAR:
                shown = others[shares.index(share)].shown
                issues.append(tell(NEAR_LEAK, reason=f"nearly the same text is scored on: {shown}", score=share))
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


def stands_before(wholes: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Train rows whose number stands in train before: bool [rows]."""
    again = train.copy()
    again[np.unique(np.where(train, wholes, 0), return_index=True)[1]] = False
    return again


def _scored_on(seen: SeenRows, train: np.ndarray, leaks: np.ndarray, near: np.ndarray) -> dict[int, list[int]]:
    """Positions of train rows to a held-out row that is equal, or to those that are themselves as near as `NEAR`."""
    groups, first = dict[int, list[int]](), dict[int, int]()
    for position in np.flatnonzero(~train & np.isin(near, near[train])).tolist():
        groups.setdefault(int(near[position]), []).append(position)
        first.setdefault(seen.keys[position], position)
    of_group = {group: seen.signed[others[:_MOST_COMPARED]] for group, others in groups.items()}
    found: dict[int, list[int]] = {}
    for position in np.flatnonzero(train & np.isin(near, near[~train])).tolist():
        if leaks[position]:
            found[position] = [first[seen.keys[position]]]
            continue
        group = int(near[position])
        shared = (seen.signed[position] == of_group[group]).sum(axis=1, dtype=np.uint8)
        nearest = np.argsort(shared, kind="stable")[::-1][:_MOST_READ]
        least = _CANDIDATE * seen.signed.shape[1]
        if candidates := [groups[group][one] for one in nearest.tolist() if shared[one] >= least]:
            found[position] = candidates
    return found


def _held_out(rows: AuditedRows, seen: SeenRows, wanted: set[int]) -> dict[int, HeldOut]:
    """Held-out rows by their positions."""
    found: dict[int, HeldOut] = {}
    position = seen.counts["train"]
    for split in ("eval", "test") if wanted else ():
        for row in rows.of(split):
            if position in wanted:
                shown = f"{row[PLACE]}: '{rows.beginning(row, _QUOTED)}'"
                found[position] = HeldOut(rows.task.group_key(row, rows.target), shown)
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
