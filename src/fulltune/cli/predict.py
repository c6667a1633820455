"""What `fulltune predict` reads and how it answers."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from fulltune.cli.stages import err
from fulltune.errors import DataError, InterruptedRun, SetupError
from fulltune.text import counted, listed

if TYPE_CHECKING:
    from fulltune.data.readers.read import DataFiles
    from fulltune.predict import Answered, Predictor

STDIN = "-"
_IN_PLACE = {True: "an 'error' stands in its place", False: "an empty line stands in its place"}
_LISTED = 5
"""Rows without an answer that are named one by one."""


@dataclass(frozen=True)
class Asked:
    """What is to be answered."""

    where: str
    """The file's name, or where texts came from: for messages."""
    placed: Callable[[], Iterator[tuple[str, dict[str, Any]]]]
    """Place of each row, and the row in the user's own columns; those of stdin can be read only once."""
    columns: tuple[str, ...]
    total: int | None
    """How many rows there are; None: nobody knows yet."""
    table: Path | None = None
    """The file, or folder, where the rows have columns of their own; None: they are lines of text."""
    images_in: Path | None = None
    """Where a table's paths of images start, as in training; None: at the current folder."""
    named: tuple[str, ...] | None = None
    """Names that the recipe gave to the columns, where the table has no header line."""

    def rows(self, notes: Mapping[str, Any], own: Iterable[dict[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The user's rows as the model takes them."""
        from fulltune import predict
        from fulltune.data.readers import images

        image, folder = notes["columns"].get("image"), self.images_in
        for row in own:
            if self.table is None:
                yield predict.row_from_text(row["text"], notes)
            else:
                yield row if image is None or folder is None else images.beside(row, folder, image)

    def types(self) -> dict[str, Any]:
        """Types of the columns for parquet: those of the file, if it is one."""
        import pyarrow as pa
        from pyarrow import parquet

        from fulltune.cli.predict_files import arrow_types
        from fulltune.data.readers.columnar import class_names

        if self.table is None:
            return {"text": pa.string()}
        if self.table.suffix.lower() == ".parquet":
            schema = parquet.read_schema(self.table)
            named = class_names(schema.metadata)  # read as texts
            pairs = zip(schema.names, schema.types, strict=True)
            return {name: None if name in named else kind for name, kind in pairs}
        return arrow_types(row for _, row in self.placed())


def asked(texts: Sequence[str], file: Path | None, notes: Mapping[str, Any]) -> Asked:
    """What the command line names: texts, a table (read through once for what is broken), lines of a file, or stdin."""
    reads_stdin = list(texts) == [STDIN] or str(file) == STDIN
    if file is not None and not reads_stdin:
        if file.suffix.lower() != ".txt":
            return _table(file, notes)
        total = sum(1 for _ in _lines(file))
        return Asked(str(file), lambda: _placed(_lines(file), f"{file.name}:"), ("text",), total)
    if texts and not reads_stdin:
        return Asked("predict", lambda: _placed(texts, "text "), ("text",), len(texts))
    if not reads_stdin and sys.stdin.isatty():
        raise SetupError("predict: give a text, --file, or '-' for texts on stdin, one a line")
    return Asked("stdin", lambda: _placed(_lines(None), "stdin:"), ("text",), None)


def _table(file: Path, notes: Mapping[str, Any]) -> Asked:
    from fulltune.data.readers.read import locate

    source = locate([str(file)])
    named = _names_without_header(source, notes)
    source = replace(source, columns=named)
    problems: list[str] = []
    columns: dict[str, None] = {}
    total = 0
    for _, row in source.rows(problems):
        total += 1
        columns |= dict.fromkeys(row)
    if problems:
        raise DataError(problems)
    images_in = source.files[0].parent if source.image_folder is None else None
    return Asked(str(file), source.rows, tuple(columns), total, file, images_in, named)


def _names_without_header(source: DataFiles, notes: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What the columns are called of a table that lacks its header line, as the train file did (`data.columns`).

    A table whose first line names each column that the model reads has one. One with fewer cells lacks those that the
    model does not read, such as the label.
    """
    from fulltune import predict
    from fulltune.data.readers.header import SEPARATED, csv_reader, delimiter_of

    names = tuple(notes.get("table_columns") or ())
    if not names or any(file.suffix.lower() not in SEPARATED for file in source.files):
        return None
    try:
        with csv_reader(source.files[0], delimiter_of(source.files[0])) as reader:
            first: list[str] = next(reader, [])
    except (OSError, ValueError, csv.Error):
        return None  # the reader says what is wrong with the file
    if set(predict.columns_read(notes)) <= set(first):
        return None
    asked = tuple(name for name in names if name not in predict.columns_not_read(notes))
    return asked if len(first) == len(asked) else names


def _placed(texts: Iterable[str], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{place}{number}", {"text": text}) for number, text in enumerate(texts, start=1))


def _lines(file: Path | None) -> Iterator[str]:
    """Lines of a text file, or of stdin, one by one; an empty line is a text like any other."""
    try:
        with contextlib.nullcontext(sys.stdin) if file is None else file.open(encoding="utf-8-sig") as stream:
            for line in stream:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8; save it as UTF-8"
        raise DataError(f"{file or 'stdin'}: cannot be read: {reason}") from None


@dataclass
class Tally:
    """Rows that have been answered, and those that have not."""

    where: str
    is_table: bool
    rows: int = 0
    cut: int = 0
    without: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str, row: Answered) -> str | None:
        """Count a row; why it has no answer, or None."""
        self.rows += 1
        self.cut += row.is_cut
        if row.refused is None:
            return None
        # A line has no column.
        reason = row.refused.reason if self.is_table else row.refused.check
        self.without += 1
        if self.without <= _LISTED:
            self.first.append(f"{place}: {reason}")
        return reason

    def say(self, cut_in_words: str, left: str) -> None:
        """Say what has no answer, with what is `left` in its place, and what was not read whole."""
        for line in self.first:
            _warn(line)
        if self.without > _LISTED:
            _warn(f"... and {self.without - _LISTED:,} more")
        if self.rows and self.without == self.rows:
            raise DataError(f"{self.where}: no row can be answered ({counted(self.rows, 'row')})")
        of = f"of {counted(self.rows, 'row')}"
        if self.without:
            _warn(f"without an answer: {self.without:,} {of}; {left}")
        if self.cut:
            _warn(f"read in part: {self.cut:,} {of}; each {cut_in_words}")


def _warn(line: str) -> None:
    err.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)


def say_names(what: Asked) -> None:
    """Say how the columns of a table without a header line are called."""
    if what.named:
        said = f"{what.where}: no header line; columns as in training: {', '.join(what.named)}"
        err.print(f"[dim]{escape(said)}[/dim]", soft_wrap=True)


def show(predictor: Predictor, what: Asked, max_new_tokens: int, as_json: bool) -> None:
    """Print an answer for each row: a line for people, or an object of JSON with the row's place."""
    tally = Tally(what.where, what.table is not None)
    for place, _, answered in _answered(predictor, what, max_new_tokens):
        typer.echo(_line(place, answered, tally.add(place, answered), as_json))
    tally.say(predictor.cut_in_words(), _IN_PLACE[as_json])


def _answered(
    predictor: Predictor, what: Asked, max_new_tokens: int, watch: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[str, dict[str, Any], Answered]]:
    """Place and own columns of each row, and what became of it."""
    placed, again = tee(what.placed())
    answers = predictor.answer_each(what.rows(predictor.notes, (row for _, row in again)), max_new_tokens, watch)
    for (place, row), answered in zip(placed, answers, strict=True):
        yield place, row, answered


def _line(place: str, answered: Answered, reason: str | None, as_json: bool, **more: Any) -> str:
    """A row's answer as it is printed; an empty line keeps the lines of texts and answers together."""
    if as_json:
        answer = {"error": reason} if answered.answer is None else answered.answer
        return json.dumps({"place": place, **more, **answer}, ensure_ascii=False)
    said = "" if answered.answer is None else in_words(answered.answer)
    return ": ".join([*map(str, more.values()), said])


def write(
    predictor: Predictor,
    what: Asked,
    output: Path,
    escape: bool,
    max_new_tokens: int,
    watch: Callable[[int, int | None], None],
) -> dict[str, Any]:
    """Write each row with its answer into a file, which has its name when all are there; returns the counts."""
    from fulltune.cli import predict_files as files

    new = files.added(predictor.notes, what.columns)
    types = what.types() if output.suffix.lower() == ".parquet" else {}
    tally = Tally(what.where, what.table is not None)

    def in_window(done: int, _: int) -> None:
        watch(tally.rows + done, what.total)

    try:
        with files.into(output, what.columns, new, types, escape) as put:
            watch(0, what.total)
            for place, row, answered in _answered(predictor, what, max_new_tokens, in_window):
                put(row, new.cells(answered.answer, tally.add(place, answered)))
            tally.say(predictor.cut_in_words(), f"their columns are empty, '{new.reason}' says why")
    except KeyboardInterrupt:
        raise InterruptedRun(f"interrupted: {output} was not written; the same command starts anew") from None
    counts = {"rows": tally.rows, "without_answer": tally.without, "cut": tally.cut}
    return {"output": str(output), **counts, "columns": list(new.names)}


def side_by_side(
    runs: list[Path], method: str | None, what: Asked, by: str | None, max_new_tokens: int, as_json: bool
) -> None:
    """Print answers of several models over one base for each row, or of the one that its column `by` names."""
    from fulltune import predict
    from fulltune.tasks.columns import windows

    names = [run.resolve().name for run in runs]
    twice = min((name for name in names if names.count(name) > 1), default=None)
    if twice is not None:
        same = listed([str(run) for run, name in zip(runs, names, strict=True) if name == twice])
        raise SetupError(
            f"--with: two folders are called '{twice}' ({same}), and answers are told apart by that name; rename one"
        )
    if by is not None:
        _check_names(what, by, names)
    found = predict.load_side_by_side(dict(zip(names, runs, strict=True)), method)
    if what.table is not None:
        for predictor in found.values():
            predict.check_columns(what.columns, predictor.notes, what.where)
    tally = Tally(what.where, what.table is not None)
    for window in windows(what.placed()):
        answers: dict[int, list[tuple[str, Answered]]] = {number: [] for number in range(len(window))}
        for name, predictor in found.items():
            mine = [number for number, (_, row) in enumerate(window) if by is None or row[by] == name]
            rows = what.rows(predictor.notes, (window[number][1] for number in mine))
            for number, answered in zip(mine, predictor.answer_each(rows, max_new_tokens), strict=True):
                answers[number].append((name, answered))
        for number, (place, _) in enumerate(window):
            for name, answered in answers[number]:
                typer.echo(_line(place, answered, tally.add(place, answered), as_json, model=name))
    cut_in_words = " / ".join(dict.fromkeys(predictor.cut_in_words() for predictor in found.values()))
    tally.say(cut_in_words, _IN_PLACE[as_json])


def _check_names(what: Asked, by: str, names: list[str]) -> None:
    """Refuse rows that name none of the models."""
    if what.table is None:
        raise SetupError("--by names a column: give rows with --file")
    if by not in what.columns:
        raise DataError(f"{what.where}: has no column '{by}'; it has {', '.join(what.columns)}")
    unknown = [(place, row.get(by)) for place, row in what.placed() if row.get(by) not in names]
    if unknown:
        place, name = unknown[0]
        raise DataError(f"{place}: {by} is {name!r}, expected one of {', '.join(names)} ({len(unknown)} such rows)")


def no_merge(run: Path, found: Path) -> str:
    """Why a model cannot be merged, and which ones of its run can."""
    from fulltune import predict
    from fulltune.methods import folder

    why = "is a whole model already"
    if folder.is_partial(found):
        kind = folder.notes_of(found)["method"]["kind"]
        why = f"a method of kind {kind} adds to what the model computes and cannot be merged"
    models = predict.models_of(run)
    can = [name for name, path in models.items() if folder.can_be_merged(path)]
    if can:
        return f"{found}: {why}; what can be merged here, with --method: {', '.join(can)}"
    return f"{found}: {why}" + (f"; {run} has no other model that can be" if models else "")


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
