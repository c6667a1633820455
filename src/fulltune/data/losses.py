"""Rows on which a trained model has the highest loss: listed beside what the audit found, without a claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from fulltune.data.audit import by_check, load_issues, save_issues
from fulltune.data.audited_rows import SPLITS, AuditedRows, next_number
from fulltune.data.patch import load_patch, numbered
from fulltune.files import replacing
from fulltune.inference.store import row_id, texts
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import AUDIT, HIGH_LOSS, LOSSES, Audit, RowIssue, RowLoss
from fulltune.records.data import DataSummary, SplitName
from fulltune.tasks import PLACE, Target, Task

MOST, MOST_SHARE = 100, 0.1
"""Rows of a split that are listed: so many, and at most this share."""


def list_losses(
    recipe: Recipe,
    folder: Path,
    summary: DataSummary,
    task: Task,
    losses: Mapping[SplitName, tuple[np.ndarray, Sequence[str | None]]],
) -> Audit:
    """Write `losses.jsonl`, and put the rows of the highest loss into `issues.jsonl` and `audit.json`.

    Args:
        recipe: The checked recipe.
        folder: The run's `data` folder, with an audit of its rows.
        summary: Of the prepared rows, which share no blocks.
        task: The task module.
        losses: Split to the summed loss of each example and its items, float64 [examples, 2]; and what the model says,
            if that is a word.
    """
    own = frozenset(split for split in SPLITS if getattr(recipe.data, split))
    rows = AuditedRows(folder, task, Target.of(summary), own, packed=None)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    dropped = {key for key, one in decided.items() if one.remedy.action == "drop"}
    times, issues = Counter[tuple[str, str]](), [one for one in load_issues(folder) if one.check != HIGH_LOSS]
    with replacing(folder / LOSSES, private=True) as part, part.open("w", encoding="utf-8") as file:
        for split, (counts, said) in losses.items():
            found, listed = _of_rows(folder / split, counts, said), list[RowIssue]()
            ordered = sorted(range(len(found)), key=lambda at: -found[at][0])
            highest = {*ordered[: min(MOST, int(np.ceil(MOST_SHARE * len(found))))]}
            usual = float(np.median([loss for loss, _, _ in found])) if found else 0.0
            for at, (row, (loss, items, answer)) in enumerate(zip(rows.of(split), found, strict=True)):
                source, name = rows.source_of(split), row_id(row)
                name = numbered(name, next_number(times, (source, name), dropped))
                line = RowLoss(place=str(row[PLACE]), row=name, split=split, loss=loss, items=items)
                file.write(line.model_dump_json() + "\n")
                if at in highest and ((source, name) not in decided or decided[source, name].is_open):
                    reason = f"loss {loss:.3g}; of half of the {split} rows at most {usual:.3g}"
                    reason += f"; the model says '{answer}'" if answer is not None else ""
                    issue = rows.issue(HIGH_LOSS, split, row, reason, score=loss)
                    listed.append(issue.model_copy(update={"row": name}))
            issues += listed
    save_issues(folder, issues)
    audit = Audit.load(folder / AUDIT).model_copy(update={"checks": by_check(issues)})
    audit.save(folder / AUDIT)
    return audit


def _of_rows(folder: Path, counts: np.ndarray, said: Sequence[str | None]) -> list[tuple[float, int, str | None]]:
    """Of each row of a split, which may have given several examples: mean loss, items, what the model says."""
    found: list[tuple[float, int, str | None]] = []
    examples = zip(texts(folder), counts, said, strict=True)
    for _, them in groupby(examples, key=lambda one: one[0][PLACE]):
        several = list(them)
        total, items = np.sum([count for _, count, _ in several], axis=0)
        found.append((float(total / max(1.0, items)), int(items), several[0][2]))
    return found
