"""Lists problems of the rows, with reasons and remedies."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.audit.languages import OTHER_LANGUAGE, PACKAGE, languages_obstacle
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
    in_other_languages,
    in_similar_classes,
    named,
    repeated,
    scan_rows,
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
SKIPPED = "skipped by --no-labels"
VERSION = 5
"""Version of the checks. Audits by other versions are repeated."""
_EXAMPLES = 10
MAX_LOSSES, MAX_LOSS_SHARE = 100, 0.1
"""Maximum number and share of a split's rows that are listed for their loss."""


def by_model(summary: DataSummary) -> set[str]:
    """Return the names of the checks that need the pretrained model."""
    checks = {LABEL} if summary.form.one_label else set[str]()
    return checks | {OUTLIER} if summary.task in ("text-classification", "image-classification") else checks


def audit(reader: Reader, reads_rows: bool) -> Audit:
    """Check all prepared rows; write `issues.jsonl` and `audit.json` into `data`."""
    recipe, folder, summary = reader.recipe, reader.folder, reader.summary
    wanted = by_model(summary) if reads_rows else set[str]()
    if (earlier := _load_complete_audit(folder, summary, wanted)) is not None:
        return earlier
    start = time.monotonic()
    own = frozenset(split for split in SPLITS if getattr(recipe.data, split))
    rows = AuditedRows(folder, task_named(recipe.task), Target.of(summary), own, recipe if summary.packed else None)
    scan = scan_rows(rows, sum(split.rows for split in summary.splits.values()), reader.listener)
    issues = [*scan.issues, *repeated(rows, scan), *in_similar_classes(rows, scan), *in_other_languages(rows, scan)]
    checks = _text_checks(rows, scan)
    not_run = dict.fromkeys(missing(), "needs the extra 'audit'")
    if rows.has_texts and (why := languages_obstacle(scan.languages)) is not None:
        not_run[OTHER_LANGUAGE] = why
    not_run |= dict.fromkeys(by_model(summary) - wanted, SKIPPED)
    not_run |= {} if LABEL in by_model(summary) else {LABEL: "needs rows with exactly one label"}
    labels = None
    try:
        if OUTLIER in wanted:
            issues += _outlier_issues(rows, reader, scan, not_run)
            checks.add(OUTLIER)
    except NoProbe as error:
        not_run[OUTLIER] = str(error)
    try:
        if LABEL in wanted:
            positions, judged = judge(reader)
            issues += _label_issues(rows, positions, judged)
            labels = judged.about
            checks |= {LABEL, DOUBTFUL}
    except NoProbe as error:
        not_run[LABEL] = str(error)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    issues = with_numbers(rows, scan, issues, decided)
    if _load_audit_of_same_rows(folder, summary) is not None and (folder / ISSUES).exists():
        issues += [issue for issue in load_issues(folder) if issue.check == HIGH_LOSS]  # losses are not read again
    issues = [issue for issue in issues if issue.key not in decided or decided[issue.key].is_open]
    save_issues(folder, issues)
    result = Audit(
        fingerprint=summary.fingerprint,
        version=version(),
        rows=scan.counts,
        **by_check(issues),
        clean=tuple(sorted(checks - {issue.check for issue in issues})),
        labels=labels,
        languages={column: dict(languages.counts.most_common()) for column, languages in scan.languages.items()},
        not_run=not_run,
        seconds=round(time.monotonic() - start, 1),
    )
    result.save(folder / AUDIT)  # last
    return result


def _text_checks(rows: AuditedRows, scan: RowScan) -> set[str]:
    further = {
        NEAR_LEAK: rows.has_texts,
        CONFLICT: bool(scan.names),
        CLASS_NAMES: "label" in rows.target.columns and bool(scan.names),
        CHAT_FAULT: "messages" in rows.target.columns,
        OTHER_LANGUAGE: any(column.obstacle() is None for column in scan.languages.values()),
    }
    of_texts = chain.from_iterable(checks_of(rows.target.columns).values())
    return {*of_texts, DUPLICATE, LEAK, *(check for check, applies in further.items() if applies)}


def _load_complete_audit(folder: Path, summary: DataSummary, wanted: set[str]) -> Audit | None:
    """Load the saved audit if it covers the same rows, this version and all `wanted` checks; otherwise return None."""
    earlier = _load_audit_of_same_rows(folder, summary) if (folder / ISSUES).exists() else None
    if earlier is None or earlier.version != version():
        return None
    return earlier if all(earlier.not_run.get(check) not in (SKIPPED, OUT_OF_MEMORY) for check in wanted) else None


def version() -> str:
    """Return the version of the checks and the missing extras."""
    audit = ", no audit" if missing() else ""
    languages = "" if is_installed(PACKAGE) else ", no languages"
    return f"{VERSION}{audit}{languages}"


def _load_audit_of_same_rows(folder: Path, summary: DataSummary) -> Audit | None:
    try:
        earlier = Audit.load(folder / AUDIT)
    except (OSError, SetupError):
        return None
    return earlier if earlier.fingerprint == summary.fingerprint else None


def by_check(issues: Sequence[RowIssue]) -> dict[str, Any]:
    """Return the number and examples of sorted issues for each check, most frequent first."""
    of_check = {check: list(group) for check, group in groupby(issues, key=lambda issue: issue.check)}
    order = sorted(of_check, key=lambda check: (check == HIGH_LOSS, -len(of_check[check])))
    counts = {check: len({(issue.split, issue.place) for issue in of_check[check]}) for check in order}
    return {"checks": counts, "examples": tuple(issue for check in order for issue in of_check[check][:_EXAMPLES])}


def save_issues(folder: Path, issues: list[RowIssue]) -> None:
    issues.sort(key=lambda issue: (issue.check, -issue.score))
    with replacing(folder / ISSUES, private=True) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{issue.model_dump_json(exclude_defaults=True)}\n" for issue in issues)


def load_issues(folder: Path) -> list[RowIssue]:
    """Read a run's issues, sorted by check."""
    try:
        with (folder / ISSUES).open(encoding="utf-8") as file:
            return [RowIssue.model_validate(json.loads(line)) for line in file]
    except (OSError, ValueError):
        raise SetupError(f"{folder / ISSUES}: cannot be read; delete it and run 'fulltune data' again") from None


def _outlier_issues(rows: AuditedRows, reader: Reader, scan: RowScan, not_run: dict[str, str]) -> list[RowIssue]:
    """Return an issue for each outlier; `not_run` gets the number of unsampled rows."""
    far, usual, num_unread = outliers(reader, np.array(scan.keys[: scan.counts["train"]], np.uint64), scan.counts)
    issues: list[RowIssue] = []
    for split, distances in far.items():
        for position, row in enumerate(rows.of(split) if distances else ()):
            if (distance := distances.get(position)) is None:
                continue
            reason = (
                f"mean cosine {1 - distance:.2f} to the {NEIGHBOURS} nearest train rows; three quarters of the train "
                f"rows have at least {1 - usual:.2f}"
            )
            issues.append(rows.issue(OUTLIER, (split, row), reason, score=round(distance, 4)))
    if num_unread:
        not_run[OUTLIER] = f"{counted(num_unread, 'row')} not in the sample"
    return issues


def _label_issues(rows: AuditedRows, positions: np.ndarray, judged: JudgedLabels) -> list[RowIssue]:
    issues, column = list[RowIssue](), rows.target.columns.get("label")
    listed = {int(positions[at]): at for at in np.flatnonzero(judged.suspects | judged.doubtful)}
    for position, row in enumerate(rows.of("train")):
        if position not in listed:
            continue
        at = listed[position]
        other, margin = rows.target.labels[int(judged.other[at])], float(judged.margins[at])
        check = LABEL if judged.suspects[at] else DOUBTFUL
        # An image whose label is its folder has no label column, so it can only be dropped.
        remedy = None if column is None or column not in row else Remedy(action="replace", column=column, value=other)
        reason = f"'{other}' is likelier by {-100 * margin:.0f} percentage points"
        issues.append(rows.issue(check, ("train", row), reason, remedy, -margin))
    return issues


def list_losses(
    recipe: Recipe,
    folder: Path,
    summary: DataSummary,
    losses: Mapping[SplitName, tuple[np.ndarray, Sequence[str | None]]],
) -> Audit:
    """Write `losses.jsonl`, and add the rows with the highest loss to the audit."""
    own = frozenset(split for split in SPLITS if getattr(recipe.data, split))
    rows = AuditedRows(folder, task_named(recipe.task), Target.of(summary), own, packed=None)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    issues = [issue for issue in load_issues(folder) if issue.check != HIGH_LOSS]
    of_split = {split: _row_losses(folder / split, *of_examples) for split, of_examples in losses.items()}
    median = {split: float(np.median([loss for loss, *_ in lines] or [0.0])) for split, lines in of_split.items()}
    remaining = {split: iter(lines) for split, lines in of_split.items()}
    with replacing(folder / LOSSES, private=True) as part, part.open("w", encoding="utf-8") as file:
        for split, row, name in named(rows, decided):
            if split not in remaining:
                continue
            loss, items, answer, is_high = next(remaining[split])
            line = {"place": str(row[PLACE]), "row": name, "split": split, "loss": loss, "items": items}
            file.write(json.dumps(line) + "\n")
            earlier = decided.get((rows.source_of(split), name))
            if is_high and (earlier is None or earlier.is_open):
                reason = f"loss {loss:.3g}, median of the {split} rows {median[split]:.3g}"
                reason += f"; the model predicts '{answer}'" if answer is not None else ""
                issues.append(rows.issue(HIGH_LOSS, (split, row), reason, score=loss).model_copy(update={"row": name}))
    save_issues(folder, issues)
    audit = Audit.load(folder / AUDIT).model_copy(update=by_check(issues))
    audit.save(folder / AUDIT)
    return audit


def _row_losses(
    folder: Path, counts: np.ndarray, answers: Sequence[str | None]
) -> list[tuple[float, int, str | None, bool]]:
    """Return each row's mean loss, number of items, predicted answer, and whether its loss is among the highest."""
    losses: list[tuple[float, int, str | None]] = []
    for _, group in groupby(zip(texts(folder), counts, answers, strict=True), key=lambda example: example[0][PLACE]):
        examples = list(group)
        total, items = np.sum([count for _, count, _ in examples], axis=0)
        losses.append((float(total / max(1.0, items)), int(items), examples[0][2]))
    most = min(MAX_LOSSES, int(np.ceil(MAX_LOSS_SHARE * len(losses))))
    highest = {*sorted(range(len(losses)), key=lambda at: -losses[at][0])[:most]}
    return [(*loss, at in highest) for at, loss in enumerate(losses)]
