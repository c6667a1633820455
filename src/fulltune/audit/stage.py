"""What is wrong with the rows, row by row: listed with the reason and with what could be done; nothing is changed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from fulltune.audit.labels import Suspected
from fulltune.audit.languages import OTHER_LANGUAGE, knows_languages, not_told
from fulltune.audit.repeated import CONFLICT, DUPLICATE, LEAK, NEAR_LEAK, repeated
from fulltune.audit.rows import (
    CHAT_FAULT,
    CLASS_NAMES,
    SPLITS,
    AuditedRows,
    SeenRows,
    in_classes_alike,
    in_other_languages,
    look,
    next_number,
    with_numbers,
)
from fulltune.audit.texts import masked_text, missing
from fulltune.audit.untouched import NEIGHBOURS, OUT_OF_MEMORY, Reader, judge, outliers
from fulltune.data.patch import load_patch, numbered
from fulltune.errors import SetupError
from fulltune.files import replacing
from fulltune.inference.store import row_id, texts
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import (
    AUDIT,
    HIGH_LOSS,
    ISSUES,
    LOSSES,
    Audit,
    CheckFound,
    LabelErrors,
    Remedy,
    RowIssue,
    RowLoss,
)
from fulltune.records.data import DataSummary, SplitName
from fulltune.tasks import PLACE, Row, Target, task_named
from fulltune.tasks.labels import label_list
from fulltune.tasks.tags import strict, words_and_tags
from fulltune.text import counted

LABEL, DOUBT, OUTLIER = "label error", "doubtful label", "outlier"
NOT_ASKED = "left out by --no-labels"
VERSION = 3
"""Of the checks: raised when they find other rows, so that an audit by earlier ones is made anew."""
_EXAMPLES = 10
MOST_LOSSES, MOST_LOSS_SHARE = 100, 0.1
"""Rows of a split that are listed for their loss: so many, and at most this share."""
_SHOWN = 3
"""Words, or labels, of a row that are named one by one."""


def by_model(summary: DataSummary) -> set[str]:
    """Checks for which the untouched model reads the rows; outliers where it reads each row as a whole."""
    checks = {LABEL} if summary.form.has_classes else set[str]()
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
    not_run: dict[str, str] = {check: f"needs the extra '{extra}'" for check, extra in missing().items()}
    if rows.has_texts and (why := not_told(seen.heard)) is not None:
        not_run[OTHER_LANGUAGE] = why
    if OUTLIER in by_model(summary):
        found, why = _outlying(rows, reader, seen) if reads_rows else (None, NOT_ASKED)
        if found is not None:
            made.add(OUTLIER)
            issues += found
        if why is not None:
            not_run[OUTLIER] = why
    labels = None
    if LABEL not in by_model(summary):
        not_run[LABEL] = "only rows with labels or tags are judged"
    elif not reads_rows:
        not_run[LABEL] = NOT_ASKED
    elif isinstance(judged := judge(reader), str):
        not_run[LABEL] = judged
    else:
        made |= {LABEL, DOUBT}
        issues += _mislabelled(rows, *judged)
        labels = _about_labels(rows.target, judged[1], of_rows=seen.counts["train"])
    decided = load_patch(Path(recipe.data.patch)) if recipe.data.patch else {}
    # What was looked at and kept is not asked again.
    found_now = [*with_numbers(rows, seen, issues, decided), *_high_losses(folder, summary)]
    issues = [one for one in found_now if one.key not in decided or decided[one.key].is_open]
    save_issues(folder, issues)
    done = Audit(
        fingerprint=summary.fingerprint,
        version=VERSION,
        absent=absent(),
        rows=seen.counts,
        checks=by_check(issues),
        clean=tuple(sorted(made - {one.check for one in issues})),
        labels=labels,
        languages=tuple(one.about(column) for column, one in seen.heard.items()),
        not_run=not_run,
        seconds=round(time.monotonic() - began, 1),
    )
    done.save(folder / AUDIT)  # last
    return done


def _made(rows: AuditedRows, seen: SeenRows) -> set[str]:
    """Checks that need no model and are made on these rows."""
    further = {
        NEAR_LEAK: rows.has_texts,
        CONFLICT: bool(seen.names),
        CLASS_NAMES: "label" in rows.target.columns and bool(seen.names),
        CHAT_FAULT: "messages" in rows.target.columns,
        OTHER_LANGUAGE: any(one.why_not() is None for one in seen.heard.values()),
    }
    return {*rows.checks, DUPLICATE, LEAK, *(check for check, is_made in further.items() if is_made)}


def _earlier(folder: Path, summary: DataSummary, asked: set[str]) -> Audit | None:
    """An audit of the same rows that is whole; None: there is none."""
    found = _of_same_rows(folder, summary) if (folder / ISSUES).exists() else None
    if found is None or found.version != VERSION or found.absent != absent():
        return None
    return found if all(found.not_run.get(check) not in (NOT_ASKED, OUT_OF_MEMORY) for check in asked) else None


def absent() -> tuple[str, ...]:
    """Extras that are not installed, and bring further checks."""
    return (*sorted({*missing().values()}), *(() if knows_languages() else ("languages",)))


def _of_same_rows(folder: Path, summary: DataSummary) -> Audit | None:
    try:
        found = Audit.load(folder / AUDIT)
    except (OSError, SetupError):
        return None
    return found if found.fingerprint == summary.fingerprint else None


def _high_losses(folder: Path, summary: DataSummary) -> list[RowIssue]:
    """What the trained model's losses have listed of the same rows: another audit does not know it."""
    is_known = _of_same_rows(folder, summary) is not None and (folder / ISSUES).exists()
    return [one for one in load_issues(folder) if one.check == HIGH_LOSS] if is_known else []


def by_check(issues: Sequence[RowIssue]) -> tuple[CheckFound, ...]:
    """What each check found, the one that found most first; last what claims nothing. Issues are in order."""
    found = [(check, list(them)) for check, them in groupby(issues, key=lambda one: one.check)]
    return tuple(
        CheckFound(check=check, rows=len({(one.split, one.place) for one in them}), examples=tuple(them[:_EXAMPLES]))
        for check, them in sorted(found, key=lambda one: (one[0] == HIGH_LOSS, -len(one[1])))
    )


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


def _outlying(rows: AuditedRows, reader: Reader, seen: SeenRows) -> tuple[list[RowIssue] | None, str | None]:
    ends = np.cumsum([seen.counts[split] for split in SPLITS])
    far = outliers(reader, dict(zip(SPLITS, np.split(np.array(seen.keys, np.uint64), ends[:-1]), strict=True)))
    if isinstance(far, str):
        return None, far
    issues: list[RowIssue] = []
    for split, distances in far.distances.items():
        for position, row in enumerate(rows.of(split) if distances else ()):
            if (distance := distances.get(position)) is None:
                continue
            reason = (
                f"the {NEIGHBOURS} nearest train rows have a mean cosine of {1 - distance:.2f} with it; of three train "
                f"rows in four at least {1 - far.usual:.2f}"
            )
            issues.append(rows.issue(OUTLIER, split, row, reason, score=round(distance, 4)))
    return issues, f"{counted(far.left_out, 'row')} that were not drawn to be read" if far.left_out else None


def _mislabelled(rows: AuditedRows, positions: np.ndarray, found: Suspected) -> list[RowIssue]:
    target, of_row, issues = rows.target, found.row_of_each, list[RowIssue]()
    column = target.columns.get("tags" if target.form.tags_words else "label")
    listed: dict[int, tuple[str, list[int]]] = {}
    for check, them in ((LABEL, found.suspects), (DOUBT, found.doubtful)):
        for at in np.flatnonzero(them).tolist():
            of_check, parts = listed.setdefault(int(positions[of_row[at]]), (check, []))
            if of_check == check:  # a row with a suspect is not doubtful as well
                parts.append(at)
    for position, row in enumerate(rows.of("train")):
        if position not in listed:
            continue
        check, parts = listed[position]
        reason, value = _proposed(target, row, found, parts)
        # Of a folder per class the label is no column: such an image can only be left out.
        remedy = None if column is None or column not in row else Remedy(action="replace", column=column, value=value)
        issues.append(rows.issue(check, "train", row, reason, remedy, -float(found.margins[parts].min())))
    return issues


def _proposed(target: Target, row: Row, found: Suspected, parts: Sequence[int]) -> tuple[str, str | list[str]]:
    """Why a row's label, or its list of them, is doubted, and what would stand in its place."""
    points, said = [f"by {-100 * float(found.margins[at]):.0f} points of probability" for at in parts], list[str]()
    if found.places is None:
        other = target.labels[int(found.other[parts[0]])]
        return f"'{other}' is likelier, {points[0]}", other
    places = found.places[parts].tolist()
    if target.form.tags_words:
        words, tags = words_and_tags(row, target.columns)
        for place, other, much in zip(places, found.other[parts].tolist(), points, strict=True):
            word = masked_text(words[place])
            said.append(f"word {place + 1} '{word}' is {tags[place]}, {target.labels[other]} is likelier, {much}")
            tags[place] = target.labels[other]
        cell, tags = row[target.columns["tags"]], strict(tags)
        # Beside words between spaces a list would be read otherwise.
        in_spaces = isinstance(cell, str) and not cell.lstrip().startswith("[")
        return _joined(said), " ".join(tags) if in_spaces else tags
    labels = label_list(row[target.columns["label"]])
    for name, much in zip([target.labels[place] for place in places], points, strict=True):
        said.append(f"'{name}' is likelier {'wrong' if name in labels else 'missing'}, {much}")
        labels = [one for one in labels if one != name] if name in labels else [*labels, name]
    return _joined(said), labels


def _joined(said: Sequence[str]) -> str:
    more = len(said) - _SHOWN
    return "; ".join(said[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


def _about_labels(target: Target, found: Suspected, of_rows: int) -> LabelErrors:
    of_row = found.row_of_each
    suspects, doubtful = np.unique(of_row[found.suspects]), np.unique(of_row[found.doubtful])
    return LabelErrors(
        judged_rows=len(np.unique(of_row)),
        of_rows=of_rows,
        parts=None if found.places is None else "words" if target.form.tags_words else "labels",
        agree=float((found.margins > 0).mean()),
        suspects=len(suspects),
        doubtful=len(np.setdiff1d(doubtful, suspects)),
        planted=found.planted,
        recall=found.recall,
        precision=found.precision,
        wrong=found.wrong,
    )


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
    dropped = {key for key, one in decided.items() if one.remedy.action == "drop"}
    times, issues = Counter[tuple[str, str]](), [one for one in load_issues(folder) if one.check != HIGH_LOSS]
    with replacing(folder / LOSSES, private=True) as part, part.open("w", encoding="utf-8") as file:
        for split, (counts, said) in losses.items():
            found, listed = _of_rows(folder / split, counts, said), list[RowIssue]()
            ordered = sorted(range(len(found)), key=lambda at: -found[at][0])
            highest = {*ordered[: min(MOST_LOSSES, int(np.ceil(MOST_LOSS_SHARE * len(found))))]}
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
