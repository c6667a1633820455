from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.audit.languages import OTHER_LANGUAGE, PACKAGE, why_languages_unchecked
from fulltune.audit.pretrained import NEIGHBOURS, OUT_OF_MEMORY, JudgedLabels, RowReader, find_outliers, judge_labels
from fulltune.audit.rows import (
    CHAT_FAULT,
    CLASS_NAMES,
    CONFLICT,
    DUPLICATE,
    LEAK,
    NEAR_LEAK,
    AuditedRows,
    RowScan,
    find_foreign_language_rows,
    find_misspelt_classes,
    find_repeated_rows,
    identify_rows,
    number_equal_rows,
    scan_rows,
)
from fulltune.audit.texts import checks_without_package, select_checks
from fulltune.audit.texts.flaw import is_installed
from fulltune.data.patch import load_patch
from fulltune.errors import SetupError
from fulltune.files import replace_atomically
from fulltune.inference.store import read_original_rows
from fulltune.probe.linear import NoProbe
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import AUDIT, HIGH_LOSS, ISSUES, LOSSES, Audit, Remedy, RowIssue
from fulltune.records.data import DataSummary, SplitName
from fulltune.tasks import PLACE, Target, task_named
from fulltune.text import counted

LABEL, DOUBTFUL, OUTLIER = "label error", "doubtful label", "outlier"
SKIPPED = "skipped by --no-labels"
VERSION = 5
_EXAMPLES = 10
MAX_LOSSES, MAX_LOSS_SHARE = 100, 0.1


def checks_that_need_model(summary: DataSummary) -> set[str]:
    checks = {LABEL} if summary.form.one_label else set[str]()
    return checks | {OUTLIER} if summary.form.labels_rows or summary.form.is_number else checks


def audit_rows(reader: RowReader, uses_model: bool) -> Audit:
    """Check all rows, with the pretrained model only if `uses_model`; write `issues.jsonl` and `audit.json`."""
    recipe, folder, summary = reader.recipe, reader.folder, reader.summary
    wanted = checks_that_need_model(summary) if uses_model else set[str]()
    if (earlier := _load_complete_audit(folder, summary, wanted)) is not None:
        return earlier
    start = time.monotonic()
    rows = AuditedRows(folder, task_named(recipe.task), Target.of(summary), recipe, summary.packed)
    scan = scan_rows(rows, sum(split.rows for split in summary.splits.values()), reader.listener)
    issues = [*scan.issues, *find_repeated_rows(rows, scan), *find_misspelt_classes(rows, scan)]
    issues += find_foreign_language_rows(rows, scan)
    checks = _checks_without_model(rows, scan)
    not_run = dict.fromkeys(checks_without_package(), "needs the extra 'audit'")
    if rows.has_texts and (why := why_languages_unchecked(scan.languages)) is not None:
        not_run[OTHER_LANGUAGE] = why
    not_run |= dict.fromkeys(checks_that_need_model(summary) - wanted, SKIPPED)
    not_run |= {} if LABEL in checks_that_need_model(summary) else {LABEL: "needs rows with exactly one label"}
    labels = None
    try:
        if OUTLIER in wanted:
            issues += _outlier_issues(rows, reader, scan, not_run)
            checks.add(OUTLIER)
    except NoProbe as error:
        not_run[OUTLIER] = str(error)
    try:
        if LABEL in wanted:
            positions, judged = judge_labels(reader)
            issues += _label_issues(rows, positions, judged)
            labels = judged.about
            checks |= {LABEL, DOUBTFUL}
    except NoProbe as error:
        not_run[LABEL] = str(error)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    issues = number_equal_rows(rows, scan, issues, decided)
    if _load_audit_of_same_rows(folder, summary) is not None and (folder / ISSUES).exists():
        issues += [issue for issue in load_issues(folder) if issue.check == HIGH_LOSS]  # losses are not read again
    issues = [issue for issue in issues if issue.key not in decided or decided[issue.key].is_open]
    save_issues(folder, issues)
    result = Audit(
        fingerprint=summary.fingerprint,
        version=checks_version(),
        rows=scan.counts,
        **count_issues_by_check(issues),
        clean=tuple(sorted(checks - {issue.check for issue in issues})),
        labels=labels,
        languages={column: dict(languages.counts.most_common()) for column, languages in scan.languages.items()},
        not_run=not_run,
        seconds=round(time.monotonic() - start, 1),
    )
    result.save(folder / AUDIT)  # last
    return result


def _checks_without_model(rows: AuditedRows, scan: RowScan) -> set[str]:
    """Return the names of the checks that apply to these rows without the pretrained model."""
    further = {
        NEAR_LEAK: rows.has_texts,
        CONFLICT: bool(scan.names),
        CLASS_NAMES: "label" in rows.target.columns and bool(scan.names),
        CHAT_FAULT: "messages" in rows.target.columns,
        OTHER_LANGUAGE: any(column.why_unchecked() is None for column in scan.languages.values()),
    }
    of_texts = chain.from_iterable(select_checks(rows.target.columns).values())
    return {*of_texts, DUPLICATE, LEAK, *(check for check, applies in further.items() if applies)}


def _load_complete_audit(folder: Path, summary: DataSummary, wanted: set[str]) -> Audit | None:
    """Return the saved audit if it covers the same rows and all `wanted` checks in this version; otherwise None."""
    earlier = _load_audit_of_same_rows(folder, summary) if (folder / ISSUES).exists() else None
    if earlier is None or earlier.version != checks_version():
        return None
    return earlier if all(earlier.not_run.get(check) not in (SKIPPED, OUT_OF_MEMORY) for check in wanted) else None


def checks_version() -> str:
    """Return the version of the checks, followed by the missing extras: "3, no audit"."""
    without_audit = ", no audit" if checks_without_package() else ""
    without_languages = "" if is_installed(PACKAGE) else ", no languages"
    return f"{VERSION}{without_audit}{without_languages}"


def _load_audit_of_same_rows(folder: Path, summary: DataSummary) -> Audit | None:
    """Return the saved audit of these rows by any version, or None."""
    try:
        earlier = Audit.load(folder / AUDIT)
    except (OSError, SetupError):
        return None
    return earlier if earlier.fingerprint == summary.fingerprint else None


def count_issues_by_check(issues: Sequence[RowIssue]) -> dict[str, Any]:
    """Return the audit's fields `checks` (rows per check, largest first) and `examples` (a few issues each)."""
    of_check = {check: list(group) for check, group in groupby(issues, key=lambda issue: issue.check)}
    order = sorted(of_check, key=lambda check: (check == HIGH_LOSS, -len(of_check[check])))
    counts = {check: len({(issue.split, issue.place) for issue in of_check[check]}) for check in order}
    return {"checks": counts, "examples": tuple(issue for check in order for issue in of_check[check][:_EXAMPLES])}


def save_issues(folder: Path, issues: list[RowIssue]) -> None:
    """Sort the issues, and write them to a run's `issues.jsonl`."""
    issues.sort(key=lambda issue: (issue.check, -issue.score))
    with replace_atomically(folder / ISSUES, private=True) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{issue.model_dump_json(exclude_defaults=True)}\n" for issue in issues)


def load_issues(folder: Path) -> list[RowIssue]:
    """Read a run's issues, sorted by check, or raise `SetupError` if the file is damaged."""
    try:
        with (folder / ISSUES).open(encoding="utf-8") as file:
            return [RowIssue.model_validate(json.loads(line)) for line in file]
    except (OSError, ValueError):
        raise SetupError(f"{folder / ISSUES}: cannot be read; delete it and run 'fulltune data' again") from None


def _outlier_issues(rows: AuditedRows, reader: RowReader, scan: RowScan, not_run: dict[str, str]) -> list[RowIssue]:
    """Return an issue for each outlier, and note in `not_run` how many rows were not sampled."""
    far, usual, num_unread = find_outliers(reader, np.array(scan.keys[: scan.counts["train"]], np.uint64), scan.counts)
    issues: list[RowIssue] = []
    for split, distances in far.items():
        for position, row in enumerate(rows.read(split) if distances else ()):
            if (distance := distances.get(position)) is None:
                continue
            reason = (
                f"mean cosine {1 - distance:.2f} to the {NEIGHBOURS} nearest train rows; three quarters of the train "
                f"rows have at least {1 - usual:.2f}"
            )
            issues.append(rows.issue(OUTLIER, (split, row), reason, score=round(distance, 4)))
    if num_unread:
        not_run[OUTLIER] = f"{counted(num_unread, 'row')} outside the random sample"
    return issues


def _label_issues(rows: AuditedRows, positions: np.ndarray, judged: JudgedLabels) -> list[RowIssue]:
    issues, column = list[RowIssue](), rows.target.columns.get("label")
    listed = {int(positions[at]): at for at in np.flatnonzero(judged.suspects | judged.doubtful)}
    for position, row in enumerate(rows.read("train")):
        if position not in listed:
            continue
        at = listed[position]
        other, margin = rows.target.labels[int(judged.other[at])], float(judged.margins[at])
        check = LABEL if judged.suspects[at] else DOUBTFUL
        # An image whose label is its folder has no label column, so it can only be dropped.
        remedy = None if column is None or column not in row else Remedy(action="replace", column=column, value=other)
        reason = f"'{other}' is {-100 * margin:.0f} percentage points more likely than the label"
        issues.append(rows.issue(check, ("train", row), reason, remedy, -margin))
    return issues


def write_losses(
    recipe: Recipe,
    folder: Path,
    summary: DataSummary,
    losses_of_split: Mapping[SplitName, tuple[np.ndarray, Sequence[str | None]]],
) -> Audit:
    """Write `losses.jsonl` from loss sums and items [examples, 2] and answers; add the highest to the audit."""
    rows = AuditedRows(folder, task_named(recipe.task), Target.of(summary), recipe, packed=False)
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    issues = [issue for issue in load_issues(folder) if issue.check != HIGH_LOSS]
    of_split = {split: _row_losses(folder / split, *of_examples) for split, of_examples in losses_of_split.items()}
    median = {split: float(np.median([loss for loss, *_ in lines] or [0.0])) for split, lines in of_split.items()}
    remaining = {split: iter(lines) for split, lines in of_split.items()}
    with replace_atomically(folder / LOSSES, private=True) as part, part.open("w", encoding="utf-8") as file:
        for split, row, name in identify_rows(rows, decided):
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
    audit = Audit.load(folder / AUDIT).model_copy(update=count_issues_by_check(issues))
    audit.save(folder / AUDIT)
    return audit


def _row_losses(
    folder: Path, sums: np.ndarray, answers: Sequence[str | None]
) -> list[tuple[float, int, str | None, bool]]:
    """Return each row's mean loss, number of items, predicted answer, and whether the loss is among the highest.

    `sums[examples, 2]` holds loss sums and numbers of items.
    """
    losses: list[tuple[float, int, str | None]] = []
    for _, group in groupby(
        zip(read_original_rows(folder), sums, answers, strict=True), key=lambda example: example[0][PLACE]
    ):
        examples = list(group)
        total, items = np.sum([count for _, count, _ in examples], axis=0)
        losses.append((float(total / max(1.0, items)), int(items), examples[0][2]))
    most = min(MAX_LOSSES, int(np.ceil(MAX_LOSS_SHARE * len(losses))))
    highest = {*sorted(range(len(losses)), key=lambda at: -losses[at][0])[:most]}
    return [(*loss, at in highest) for at, loss in enumerate(losses)]
