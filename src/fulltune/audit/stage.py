"""What is wrong with the rows, row by row: listed with the reason and with what could be done; nothing is changed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.audit.languages import OTHER_LANGUAGE, PACKAGE, not_told
from fulltune.audit.rows import (
    CHAT_FAULT,
    CLASS_NAMES,
    CONFLICT,
    DUPLICATE,
    LEAK,
    NEAR_LEAK,
    SPLITS,
    AuditedRows,
    RowScan,
    in_classes_alike,
    in_other_languages,
    look,
    named,
    repeated,
    with_numbers,
)
from fulltune.audit.texts import checks_of, missing
from fulltune.audit.texts.flaw import is_installed
from fulltune.audit.untouched import NEIGHBOURS, OUT_OF_MEMORY, JudgedLabels, Reader, judge, outliers
from fulltune.data.patch import load_patch
from fulltune.errors import SetupError
from fulltune.files import replacing
from fulltune.inference.store import texts
from fulltune.probe.linear import NoProbe
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import (
    AUDIT,
    HIGH_LOSS,
    ISSUES,
    LOSSES,
    Audit,
    Remedy,
    RowIssue,
)
from fulltune.records.data import DataSummary, SplitName
from fulltune.tasks import PLACE, Target, task_named
from fulltune.text import counted

LABEL, DOUBTFUL, OUTLIER = "label error", "doubtful label", "outlier"
NOT_ASKED = "left out by --no-labels"
VERSION = 4
"""Of the checks: raised when they find other rows, so that an audit by earlier ones is made anew."""
_EXAMPLES = 10
MAX_LOSSES, MAX_LOSS_SHARE = 100, 0.1
"""Rows of a split that are listed for their loss: so many, and at most this share."""


def by_model(summary: DataSummary) -> set[str]:
    """Checks for which the untouched model reads the rows; outliers where it reads each row as a whole."""
    checks = {LABEL} if summary.form.one_label else set[str]()
    return checks | {OUTLIER} if summary.task in ("text-classification", "image-classification") else checks


def audit(reader: Reader, reads_rows: bool) -> Audit:
    """Look at all prepared rows, once, and write `issues.jsonl` and `audit.json` into the `data` folder."""
    recipe, folder, summary = reader.recipe, reader.folder, reader.summary
    asked = by_model(summary) if reads_rows else set[str]()
    if (earlier := _earlier(folder, summary, asked)) is not None:
        return earlier
    began = time.monotonic()
    own = frozenset(split for split in SPLITS if getattr(recipe.data, split))
    rows = AuditedRows(folder, task_named(recipe.task), Target.of(summary), own, recipe if summary.packed else None)
    seen = look(rows, sum(split.rows for split in summary.splits.values()), reader.listener)
    issues = [*seen.issues, *repeated(rows, seen), *in_classes_alike(rows, seen), *in_other_languages(rows, seen)]
    made = _made(rows, seen)
    not_run = dict.fromkeys(missing(), "needs the extra 'audit'")
    if rows.has_texts and (why := not_told(seen.heard)) is not None:
        not_run[OTHER_LANGUAGE] = why
    not_run |= dict.fromkeys(by_model(summary) - asked, NOT_ASKED)
    not_run |= {} if LABEL in by_model(summary) else {LABEL: "only rows with one label each are judged"}
    labels = None
    try:
        if OUTLIER in asked:
            issues += _outlying(rows, reader, seen, not_run)
            made.add(OUTLIER)
    except NoProbe as no:
        not_run[OUTLIER] = str(no)
    try:
        if LABEL in asked:
            positions, judged = judge(reader)
            issues += _mislabelled(rows, positions, judged)
            labels = judged.about
            made |= {LABEL, DOUBTFUL}
    except NoProbe as no:
        not_run[LABEL] = str(no)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    # What was looked at and kept is not asked again.
    issues = with_numbers(rows, seen, issues, decided)
    if _of_same_rows(folder, summary) is not None and (folder / ISSUES).exists():
        issues += [one for one in load_issues(folder) if one.check == HIGH_LOSS]  # by losses, which are not read again
    issues = [one for one in issues if one.key not in decided or decided[one.key].is_open]
    save_issues(folder, issues)
    done = Audit(
        fingerprint=summary.fingerprint,
        version=version(),
        rows=seen.counts,
        **by_check(issues),
        clean=tuple(sorted(made - {one.check for one in issues})),
        labels=labels,
        languages={column: dict(one.counts.most_common()) for column, one in seen.heard.items()},
        not_run=not_run,
        seconds=round(time.monotonic() - began, 1),
    )
    done.save(folder / AUDIT)  # last
    return done


def _made(rows: AuditedRows, seen: RowScan) -> set[str]:
    """Checks that need no model and are made on these rows."""
    further = {
        NEAR_LEAK: rows.has_texts,
        CONFLICT: bool(seen.names),
        CLASS_NAMES: "label" in rows.target.columns and bool(seen.names),
        CHAT_FAULT: "messages" in rows.target.columns,
        OTHER_LANGUAGE: any(one.why_not() is None for one in seen.heard.values()),
    }
    of_texts = chain.from_iterable(checks_of(rows.target.columns).values())
    return {*of_texts, DUPLICATE, LEAK, *(check for check, is_made in further.items() if is_made)}


def _earlier(folder: Path, summary: DataSummary, asked: set[str]) -> Audit | None:
    """An audit of the same rows that is whole; None: there is none."""
    found = _of_same_rows(folder, summary) if (folder / ISSUES).exists() else None
    if found is None or found.version != version():
        return None
    return found if all(found.not_run.get(check) not in (NOT_ASKED, OUT_OF_MEMORY) for check in asked) else None


def version() -> str:
    """Of the checks, with the extras that are not installed and bring further ones."""
    audit = ", no audit" if missing() else ""
    languages = "" if is_installed(PACKAGE) else ", no languages"
    return f"{VERSION}{audit}{languages}"


def _of_same_rows(folder: Path, summary: DataSummary) -> Audit | None:
    try:
        found = Audit.load(folder / AUDIT)
    except (OSError, SetupError):
        return None
    return found if found.fingerprint == summary.fingerprint else None


def by_check(issues: Sequence[RowIssue]) -> dict[str, Any]:
    """Of an audit what each check found, the one that found most first; last what claims nothing. Issues are in
    order."""
    found = [(check, list(them)) for check, them in groupby(issues, key=lambda one: one.check)]
    found.sort(key=lambda one: (one[0] == HIGH_LOSS, -len(one[1])))
    checks = {check: len({(one.split, one.place) for one in them}) for check, them in found}
    return {"checks": checks, "examples": tuple(one for _, them in found for one in them[:_EXAMPLES])}


def save_issues(folder: Path, issues: list[RowIssue]) -> None:
    """Bring what was found into the order of `load_issues`, and write it."""
    issues.sort(key=lambda one: (one.check, -one.score))
    with replacing(folder / ISSUES, private=True) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{one.model_dump_json(exclude_defaults=True)}\n" for one in issues)


def load_issues(folder: Path) -> list[RowIssue]:
    """What the audit of a run's `data` folder found, by check, of each the surest first."""
    try:
        with (folder / ISSUES).open(encoding="utf-8") as file:
            return [RowIssue.model_validate(json.loads(line)) for line in file]
    except (OSError, ValueError):
        raise SetupError(
            f"{folder / ISSUES}: cannot be read; delete it, and 'fulltune data' looks at all rows again"
        ) from None


def _outlying(rows: AuditedRows, reader: Reader, seen: RowScan, not_run: dict[str, str]) -> list[RowIssue]:
    far, usual, left_out = outliers(reader, np.array(seen.keys[: seen.counts["train"]], np.uint64), seen.counts)
    issues: list[RowIssue] = []
    for split, distances in far.items():
        for position, row in enumerate(rows.of(split) if distances else ()):
            if (distance := distances.get(position)) is None:
                continue
            reason = (
                f"the {NEIGHBOURS} nearest train rows have a mean cosine of {1 - distance:.2f} with it; of three train "
                f"rows in four at least {1 - usual:.2f}"
            )
            issues.append(rows.issue(OUTLIER, (split, row), reason, score=round(distance, 4)))
    if left_out:
        not_run[OUTLIER] = f"{counted(left_out, 'row')} that were not drawn to be read"
    return issues


def _mislabelled(rows: AuditedRows, positions: np.ndarray, found: JudgedLabels) -> list[RowIssue]:
    issues, column = list[RowIssue](), rows.target.columns.get("label")
    listed = {int(positions[at]): at for at in np.flatnonzero(found.suspects | found.doubtful)}
    for position, row in enumerate(rows.of("train")):
        if position not in listed:
            continue
        at = listed[position]
        other, margin = rows.target.labels[int(found.other[at])], float(found.margins[at])
        check = LABEL if found.suspects[at] else DOUBTFUL
        # Of a folder per class the label is no column: such an image can only be left out.
        remedy = None if column is None or column not in row else Remedy(action="replace", column=column, value=other)
        reason = f"'{other}' is likelier, by {-100 * margin:.0f} points of probability"
        issues.append(rows.issue(check, ("train", row), reason, remedy, -margin))
    return issues


def list_losses(
    recipe: Recipe,
    folder: Path,
    summary: DataSummary,
    losses: Mapping[SplitName, tuple[np.ndarray, Sequence[str | None]]],
) -> Audit:
    """Write `losses.jsonl`, and add the rows of the highest loss to `issues.jsonl` and `audit.json`."""
    own = frozenset(split for split in SPLITS if getattr(recipe.data, split))
    rows = AuditedRows(folder, task_named(recipe.task), Target.of(summary), own, packed=None)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    issues = [one for one in load_issues(folder) if one.check != HIGH_LOSS]
    found = {split: _of_rows(folder / split, *of) for split, of in losses.items()}
    usual = {split: float(np.median([one[0] for one in them] or [0.0])) for split, them in found.items()}
    waiting = {split: iter(them) for split, them in found.items()}
    with replacing(folder / LOSSES, private=True) as part, part.open("w", encoding="utf-8") as file:
        for split, row, name in named(rows, decided):
            if split not in waiting:
                continue
            loss, items, answer, is_high = next(waiting[split])
            line = {"place": str(row[PLACE]), "row": name, "split": split, "loss": loss, "items": items}
            file.write(json.dumps(line) + "\n")
            earlier = decided.get((rows.source_of(split), name))
            if is_high and (earlier is None or earlier.is_open):
                reason = f"loss {loss:.3g}; of half of the {split} rows at most {usual[split]:.3g}"
                reason += f"; the model says '{answer}'" if answer is not None else ""
                issues.append(rows.issue(HIGH_LOSS, (split, row), reason, score=loss).model_copy(update={"row": name}))
    save_issues(folder, issues)
    audit = Audit.load(folder / AUDIT).model_copy(update=by_check(issues))
    audit.save(folder / AUDIT)
    return audit


def _of_rows(
    folder: Path, counts: np.ndarray, answers: Sequence[str | None]
) -> list[tuple[float, int, str | None, bool]]:
    """Of each row of a split, which may have given several examples: mean loss, items, what the model says, and whether
    the loss is one of the highest."""
    found: list[tuple[float, int, str | None]] = []
    for _, them in groupby(zip(texts(folder), counts, answers, strict=True), key=lambda one: one[0][PLACE]):
        several = list(them)
        total, items = np.sum([count for _, count, _ in several], axis=0)
        found.append((float(total / max(1.0, items)), int(items), several[0][2]))
    most = min(MAX_LOSSES, int(np.ceil(MAX_LOSS_SHARE * len(found))))
    highest = {*sorted(range(len(found)), key=lambda at: -found[at][0])[:most]}
    return [(*one, at in highest) for at, one in enumerate(found)]
