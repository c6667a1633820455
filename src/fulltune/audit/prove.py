"""Whether cleaning helps: linear classifiers on the untouched model, fitted with and without each cleaning step."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import norm

from fulltune.audit.rows import LEAK, NEAR_LEAK
from fulltune.audit.stage import load_issues
from fulltune.audit.untouched import Reader
from fulltune.data.patch import numbered
from fulltune.errors import SetupError
from fulltune.inference.store import row_id, texts
from fulltune.probe.linear import Items, NoProbe, best, fits, wrong
from fulltune.records.audit import HIGH_LOSS, PROOFS, Proof, Proofs, Remedy, RowDecision, RowIssue
from fulltune.records.data import DataSummary
from fulltune.stats.intervals import SURPRISES
from fulltune.text import counted

TIMES, LEFT_OUT = 5, 0.2
"""How often so large a part of the train rows is left out."""
LEAST_EVAL_ROWS = 50
_RESAMPLES = 1000
Action = Literal["drop", "replace"]
ALPHA = 0.05
"""Intervals of all steps together are wrong in so many cases (Bonferroni)."""


def refuse_prove(summary: DataSummary) -> None:
    """Raises a `SetupError` for rows without a single label each, or too few eval rows."""
    if not summary.form.one_label:
        raise SetupError(
            "--prove: these rows have no single label each, and only by such can cleaning be compared in seconds; "
            "compare it by trainings instead: --trainings 3"
        )
    if (count := summary.splits["eval"].rows) < LEAST_EVAL_ROWS:
        raise SetupError(
            f"--prove: {count} eval rows tell nothing, expected {LEAST_EVAL_ROWS} at least; give more, in a file "
            "(data.eval) or as a larger part of the train rows (data.eval_fraction)"
        )


def prove(reader: Reader) -> Proofs:
    """Fit with and without each cleaning step, compare on the unchanged eval rows, and write `proofs.json`."""
    folder, summary = reader.folder, reader.summary
    try:
        train, positions = reader.items("train")
        held_out, _ = reader.items("eval")
        _, strength, _ = best(train, held_out, fits, wrong)
        names = list(ids(folder / "train"))
        place = {names[position]: at for at, position in enumerate(positions)}
        numbers = {name: number for number, name in enumerate(summary.labels)}

        def changed(step: CleaningStep) -> tuple[np.ndarray, np.ndarray]:
            """Rows that classifiers have, and labels, but not other texts."""
            kept, labels = np.ones(len(train.labels), bool), train.labels.copy()
            for one in (one for one in step.issues if one.row in place):
                if step.action == "drop":
                    kept[place[one.row]] = False
                elif one.remedy.column == summary.columns.get("label"):
                    labels[place[one.row]] = numbers[one.remedy.value]
            return kept, labels

        left_out = list[str]()
        proofs = list(_compared(train, held_out, cleaning_steps(load_issues(folder)), changed, strength, left_out))
    except NoProbe as no:
        raise SetupError(f"--prove: nothing can be compared: {no}") from None
    found = Proofs(
        fingerprint=summary.fingerprint,
        eval_rows=len(held_out.labels),
        times=TIMES,
        proofs=tuple(proofs),
        left_out=tuple(left_out),
    )
    found.save(folder / PROOFS)
    return found


@dataclass(frozen=True)
class CleaningStep:
    """One thing that could be done with all train rows that a check found."""

    check: str
    action: Action
    issues: tuple[RowIssue, ...]

    def __str__(self) -> str:
        done = "left out" if self.action == "drop" else "changed as proposed"
        return f"{self.check}, {counted(len(self.issues), 'row')} {done}"

    @property
    def name(self) -> str:
        """As a file's name, another one for other decisions."""
        told = "".join(one.model_dump_json() for one in self.decisions)
        return f"{self.check.replace(' ', '-')}-{self.action}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    @property
    def decisions(self) -> list[RowDecision]:
        """As lines of a patch file."""
        return [one.decided(Remedy(action="drop") if self.action == "drop" else one.remedy) for one in self.issues]


def cleaning_steps(issues: Sequence[RowIssue]) -> list[CleaningStep]:
    """Each check's train rows dropped, and where something is proposed, replaced by it; leaks and high losses aside."""
    steps = []
    for check in dict.fromkeys(one.check for one in issues if one.check not in (LEAK, NEAR_LEAK, HIGH_LOSS)):
        # Of a row with several faults of a kind, such as in both texts of a pair, the first is taken.
        of_row = {one.key: one for one in reversed(issues) if one.check == check and one.split == "train"}
        them = list(reversed(of_row.values()))
        changed = [one for one in them if one.remedy.action == "replace"]
        both: tuple[tuple[Action, list[RowIssue]], ...] = (("drop", them), ("replace", changed))
        steps += [CleaningStep(check, action, tuple(rows)) for action, rows in both if rows]
    return steps


Changed = Callable[[CleaningStep], tuple[np.ndarray, np.ndarray]]
"""From a step to whether each row is kept, bool [rows], and the label that it has then."""


def ids(folder: Path) -> Iterator[str]:
    """The identity of each of a split's rows, as issues and patches have it."""
    times = Counter[str]()
    for row in texts(folder):
        name = row_id(row)
        times[name] += 1
        yield numbered(name, times[name])


def _compared(
    train: Items,
    held_out: Items,
    steps: Sequence[CleaningStep],
    changed: Changed,
    strength: float,
    left_out: list[str],
) -> Iterator[Proof]:
    """Each step's proof; one that leaves nothing to fit is put among what is left out."""
    fitted = partial(_right, held_out=held_out, strength=strength)
    drawn = np.random.default_rng(0)
    parts = [drawn.random(len(train.labels)) >= LEFT_OUT for _ in range(TIMES)]
    before = np.mean([fitted(train.part(part)) for part in parts], axis=0)
    samples = drawn.integers(0, len(before), (_RESAMPLES, len(before)))
    tails = ALPHA / max(1, len(steps)) / 2
    for step in steps:
        kept, labels = changed(step)
        if kept.all() and (labels == train.labels).all():
            continue
        items = replace(train, labels=labels)
        try:
            after = np.mean([fitted(items.part(part & kept)) for part in parts], axis=0)
        except NoProbe:  # hardly anything is left, or a single class
            left_out.append(str(step))
            continue
        moved = after - before
        low, high = np.quantile(moved[samples].mean(axis=1), [tails, 1 - tails])
        # No row that differs among these does not prove that none would among others.
        unseen = float(norm.isf(tails)) * math.sqrt(SURPRISES) / len(before)
        yield Proof(
            check=step.check,
            action=step.action,
            rows=int((~kept).sum() if step.action == "drop" else (labels != train.labels).sum()),
            before=float(before.mean()),
            difference=float(moved.mean()),
            low=float(moved.mean() - math.hypot(moved.mean() - low, unseen)),
            high=float(moved.mean() + math.hypot(high - moved.mean(), unseen)),
        )


def _right(items: Items, held_out: Items, strength: float) -> np.ndarray:
    """Whether each eval row is answered right: float64 [rows]."""
    [(_, found)] = fits(items, strengths=(strength,))
    return (found(held_out.features).argmax(axis=1) == held_out.labels).astype(np.float64)
