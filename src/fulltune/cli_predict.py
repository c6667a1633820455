"""What `fulltune predict` reads and how it answers. Layer 4."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulltune.errors import DataError, SetupError


def rows_of(file: Path, image: str | None) -> list[dict[str, Any]]:
    """Rows of a table; as in training, paths in the column `image` start at the table's folder."""
    from fulltune.data import locate

    source = replace(locate([str(file)]), image_paths=image is not None, image_column=image)
    problems: list[str] = []
    rows = [row for _, row in source.rows(problems)]
    if problems:
        raise DataError(problems)
    return rows


def side_by_side(
    runs: list[Path],
    method: str | None,
    texts: list[str],
    file: Path | None,
    by: str | None,
    max_new_tokens: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Answers of several models over one base, with the model's name: all of each row, or the one that the row names.

    Args:
        runs: Run folders, or model folders.
        method: Which of the runs' models.
        texts: Given on the command line.
        file: Else of rows or lines.
        by: Column of the file that names the model of each row, as its folder is called.
        max_new_tokens: Longest answer of a language model.

    Raises:
        SetupError: When the models do not go together.
        DataError: When a row names none of them.
    """
    from fulltune import predict

    names = [run.resolve().name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        same = " and ".join(str(run) for run, name in zip(runs, names, strict=True) if name == twice[0])
        raise SetupError(
            f"--with: two folders are called '{twice[0]}' ({same}), and answers are told apart by that name; rename one"
        )
    is_table = file is not None and file.suffix != ".txt"
    if by is not None and not is_table:
        raise SetupError("--by names a column: give rows with --file")
    given = texts or ([] if is_table else lines(file))
    found = predict.load_side_by_side(dict(zip(names, runs, strict=True)), method)
    answers: dict[int, dict[str, dict[str, Any]]] = {}
    for name, predictor in found.items():
        if file is not None and is_table:
            rows = rows_of(file, predictor.notes["columns"].get("image"))
            _check_names(rows, by, names, file)
        else:
            rows = predict.rows_from_texts(given, predictor.notes)
        mine = [number for number, row in enumerate(rows) if by is None or row[by] == name]
        asked = [rows[number] for number in mine]
        if is_table:
            predict.check_columns(asked, predictor.notes, str(file))
        for number, answer in zip(mine, predictor.predict(asked, max_new_tokens), strict=True):
            answers.setdefault(number, {})[name] = answer
    for number in sorted(answers):
        yield from answers[number].items()


def _check_names(rows: list[dict[str, Any]], by: str | None, names: list[str], file: Path) -> None:
    """Refuse rows that name none of the models.

    Raises:
        DataError: With the first one.
    """
    if by is None:
        return
    if not any(by in row for row in rows):
        raise DataError(f"{file}: has no column '{by}'; it has {', '.join(rows[0]) if rows else 'no rows'}")
    unknown = [(number, row.get(by)) for number, row in enumerate(rows, start=1) if row.get(by) not in names]
    if unknown:
        number, name = unknown[0]
        raise DataError(
            f"{file}: row {number}: {by} is {name!r}, expected one of {', '.join(names)} ({len(unknown)} such rows)"
        )


def no_merge(run: Path, found: Path) -> str:
    """Why a model cannot be merged, and which ones of its run can."""
    from fulltune import predict
    from fulltune.methods import folder

    why = "is a whole model already"
    if folder.is_partial(found):
        kind = folder.notes_of(found)["method"]["kind"]
        why = f"a method of kind {kind} adds to what the model computes and cannot be merged"
    models = predict.models_of(run)
    can = [name for name, one in models.items() if folder.can_be_merged(one)]
    if can:
        return f"{found}: {why}; what can be merged here, with --method: {', '.join(can)}"
    return f"{found}: {why}" + (f"; {run} has no other model that can be" if models else "")


def lines(file: Path | None) -> list[str]:
    """Lines of a text file, or of stdin."""
    if file is None and sys.stdin.isatty():
        raise SetupError("predict: give a text, --file, or texts on stdin")
    if file is not None and not file.exists():
        raise DataError(f"{file}: no such file")
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8; save it as UTF-8"
        raise DataError(f"{file or 'stdin'}: cannot be read: {reason}") from None
    return text.splitlines()


def in_words(answer: dict[str, Any]) -> str:
    """One line for people."""
    if "answer" in answer:
        return str(answer["answer"])
    if "entities" in answer:
        found = [f"{entity['text']} ({entity['type']} {entity['probability']:.1%})" for entity in answer["entities"]]
        return ", ".join(found) or "(none)"
    if "value" in answer:
        return f"{answer['value']:.4g}"
    if "labels" in answer:
        return ", ".join(f"{name} ({answer['probabilities'][name]:.1%})" for name in answer["labels"]) or "(none)"
    return f"{answer['text'] if 'index' in answer else answer['label']} ({answer['probability']:.1%})"
