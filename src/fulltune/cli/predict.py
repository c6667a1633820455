"""What `fulltune predict` reads, and how it prints its answers or writes them into a file, row after row."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count, tee
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import typer
from pyarrow import parquet
from rich.markup import escape

from fulltune import predict
from fulltune.cli.stages import err
from fulltune.data.readers.columnar import class_names
from fulltune.data.readers.read import DataFiles, beside, locate
from fulltune.data.readers.text_files import SEPARATED, csv_reader, delimiter_of
from fulltune.errors import DataError, InterruptedRun, SetupError
from fulltune.files import replacing
from fulltune.inference.store import readable
from fulltune.methods import folder as folders
from fulltune.system.run_folder import writing
from fulltune.tasks import Target
from fulltune.tasks.columns import BadCell, shown
from fulltune.text import counted

STDIN = "-"
_IN_PLACE = {True: "an 'error' stands in its place", False: "an empty line stands in its place"}
_LISTED = 5
"""Rows without an answer that are named one by one."""
_WRITTEN = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}
"""Endings of files that answers are written into, with what separates their cells."""
_ROWS_AT_ONCE = 1000
# A lone surrogate, which UTF-8 does not have, becomes `\\ud800`: so JSON writes it, too.
_ENCODING: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
Row = Mapping[str, Any]
Columns = Mapping[str, tuple[tuple[Any, ...], str]]
"""Columns that are added to rows, each with its path in an answer and its type as parquet writes it."""


# ---- what is asked ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What is to be answered."""

    where: str
    """The file's name, or where texts came from: for messages."""
    placed: Callable[[], Iterator[tuple[str, dict[str, Any]]]]
    """Place of each row, and the row in the user's own columns; those of stdin can be read only once."""
    columns: tuple[str, ...] = ("text",)
    total: int | None = None
    """How many rows there are; None: nobody knows yet."""
    table: Path | None = None
    """The file, or folder, where the rows have columns of their own; None: they are lines of text."""
    images_in: Path | None = None
    """Where a table's paths of images start, as in training; None: at the current folder."""

    def rows(self, notes: Row, own: Iterable[dict[str, Any]]) -> Iterator[Row]:
        """The user's rows as the model takes them."""
        image = notes["columns"].get("image")
        for row in own:
            if self.table is None:
                yield predict.row_from_text(row["text"], notes)
            else:
                yield beside(row, self.images_in, image) if image and self.images_in else row

    def types(self) -> dict[str, Any]:
        """Types of the columns of a parquet file, for one that is written; columns of other files are text."""
        if self.table is None or self.table.suffix.lower() != ".parquet":
            return {}
        schema = parquet.read_schema(self.table)
        named = class_names(schema.metadata)  # read as texts
        return {one.name: one.type for one in schema if one.name not in named}


def asked(texts: Sequence[str], file: Path | None, notes: Row) -> Asked:
    """What the command line names: texts, a table (read through once for what is broken), lines of a file, or stdin."""
    if list(texts) == [STDIN] or str(file) == STDIN or (file is None and not texts):
        if file is None and not texts and sys.stdin.isatty():
            raise SetupError("predict: give a text, --file, or '-' for texts on stdin, one a line")
        return Asked("stdin", lambda: _placed(_lines(None), "stdin:"))
    if file is None:
        return Asked("predict", lambda: _placed(texts, "text "), total=len(texts))
    if file.suffix.lower() == ".txt":
        total = sum(1 for _ in _lines(file))
        return Asked(str(file), lambda: _placed(_lines(file), f"{file.name}:"), total=total)
    return _table(file, notes)


def _table(file: Path, notes: Row) -> Asked:
    source = locate([str(file)])
    if named := _names_without_header(source, notes):
        source = replace(source, columns=named)
        said = f"{file}: no header line; columns as in training: {', '.join(named)}"
        err.print(f"[dim]{escape(said)}[/dim]", soft_wrap=True)
    problems: list[str] = []
    columns: dict[str, None] = {}
    total = 0
    for _, row in source.rows(problems):
        total += 1
        columns |= dict.fromkeys(row)
    if problems:
        raise DataError(problems)
    if missing := [column for column in predict.columns_read(notes) if column not in columns]:
        raise DataError(f"{file}: no column '{missing[0]}', which the model reads (columns here: {shown(columns)})")
    images_in = source.files[0].parent if source.image_folder is None else None
    return Asked(str(file), source.rows, tuple(columns), total, file, images_in)


def _names_without_header(source: DataFiles, notes: Row) -> tuple[str, ...] | None:
    """What the columns are called of a table that lacks its header line, as the train file did (`data.columns`).

    A table whose first line names each column that the model reads has one. One with fewer cells lacks those that the
    model does not read, such as the label.
    """
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
    learned = [column for role, column in notes["columns"].items() if role in predict.NOT_READ]
    asked = tuple(name for name in names if name not in learned)
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


# ---- answers ---------------------------------------------------------------------------------------------------


def show(predictor: predict.Predictor, what: Asked, max_new_tokens: int, as_json: bool) -> None:
    """Print an answer for each row: a line for people, or an object of JSON with the row's place."""

    def put(place: str, row: Row, answer: Row | None, reason: str | None) -> None:
        if as_json:
            typer.echo(json.dumps({"place": place, **(answer or {"error": reason})}, ensure_ascii=False))
        else:
            typer.echo("" if answer is None else _in_words(answer))

    _answer(predictor, what, put, _IN_PLACE[as_json], max_new_tokens)


def write(
    predictor: predict.Predictor,
    what: Asked,
    output: Path,
    max_new_tokens: int,
    watch: Callable[[int, int | None], None],
) -> dict[str, Any]:
    """Write each row with its answer into a file, which has its name when all are there; returns the counts."""
    new = added(predictor.notes, what.columns)
    *_, reason_column = new
    types = what.types() if output.suffix.lower() == ".parquet" else {}
    try:
        with into(output, what.columns, new, types) as put:
            watch(0, what.total)
            counts = _answer(
                predictor,
                what,
                lambda place, row, answer, reason: put(row, cells(new, answer, reason)),
                f"their columns are empty, '{reason_column}' says why",
                max_new_tokens,
                watch,
            )
    except KeyboardInterrupt:
        raise InterruptedRun(f"interrupted: {output} was not written; the same command starts anew") from None
    return {"output": str(output), **counts, "columns": list(new)}


def _answer(
    predictor: predict.Predictor,
    what: Asked,
    put: Callable[[str, Row, Row | None, str | None], None],
    instead: str,
    max_new_tokens: int,
    watch: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, int]:
    """Hand each row's place, its own columns, and its answer or why it has none to `put`; say what is `instead`."""
    placed, again = tee(what.placed())
    asked = what.rows(predictor.notes, (row for _, row in again))
    rows = without = cut = 0
    first: list[str] = []
    answers = predictor.answer_each(asked, max_new_tokens, lambda done, _: watch(rows + done, what.total))
    for (place, row), answered in zip(placed, answers, strict=True):
        rows += 1
        cut += answered.is_cut
        reason = None
        if refused := answered.refused:
            reason = refused.check if what.table is None else refused.reason  # a line has no column
            without += 1
            if without <= _LISTED:
                first.append(f"{place}: {reason}")
        put(place, row, answered.answer, reason)
    if without > _LISTED:
        first.append(f"... and {without - _LISTED:,} more")
    for line in first:
        _warn(line)
    if rows and without == rows:
        raise DataError(f"{what.where}: no row can be answered ({counted(rows, 'row')})")
    if without:
        _warn(f"without an answer: {without:,} of {counted(rows, 'row')}; {instead}")
    if cut:
        _warn(f"read in part: {cut:,} of {counted(rows, 'row')}; each {predictor.cut_in_words()}")
    return {"rows": rows, "without_answer": without, "cut": cut}


def _warn(line: str) -> None:
    err.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)


def _in_words(answer: Row) -> str:
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


# ---- files -----------------------------------------------------------------------------------------------------


def check_output(output: Path, replace: bool) -> None:
    """Refuse, before anything is read, a file that cannot or must not be written."""
    if output.suffix.lower() not in _WRITTEN:
        raise SetupError(f"{output}: cannot be written as '{output.suffix}'; expected {', '.join(_WRITTEN)}")
    if not output.parent.is_dir():
        raise SetupError(f"{output}: there is no folder {output.parent}; make it, or name another one")
    if output.is_dir():
        raise SetupError(f"{output}: is a folder; name a file")
    if output.exists() and not replace:
        raise SetupError(f"{output}: exists already; name another file, or replace it with --force")


def added(notes: Row, own: Collection[str]) -> Columns:
    """The columns that answers of a model become, called `predicted_...`, or `predicted2_...` where rows have these;
    the last one says why there is no answer."""
    target = Target.from_notes(notes)
    columns: dict[str, tuple[tuple[Any, ...], str]] = {name: ((name,), kind) for name, kind in target.form.answer}
    each = range(target.num_choices) if target.num_choices else target.labels if target.form.labels_rows else ()
    columns |= {f"probability_{key}": (("probabilities", key), "double") for key in each}
    columns["error"] = (("error",), "string")
    prefixes = ("predicted" if number == 1 else f"predicted{number}" for number in count(1))
    named = ({f"{prefix}_{name}": where for name, where in columns.items()} for prefix in prefixes)
    return next(new for new in named if not set(new) & set(own))


def cells(new: Columns, answer: Row | None, reason: str | None) -> dict[str, Any]:
    """The added columns of one row; without an answer empty but for the reason."""
    if answer is None:
        return {**dict.fromkeys(new), [*new][-1]: reason}
    return {name: reduce(getitem, path, {**answer, "error": None}) for name, (path, _) in new.items()}


@contextlib.contextmanager
def into(output: Path, own: Sequence[str], new: Columns, types: Row) -> Iterator[Callable[[Row, Row], None]]:
    """Write rows into a file, which has its name when all are there, from their own columns and the added ones; `types`
    are those of the own columns, for parquet."""
    form = output.suffix.lower()
    with writing(output), replacing(output) as part:
        if form == ".parquet":
            with _parquet(part, own, new, types) as write:
                yield write
            return
        with part.open("w", newline="", **_ENCODING) as stream:  # both end their lines themselves
            if _WRITTEN[form]:
                yield _separated(stream, _WRITTEN[form], [*own, *new])
            else:
                yield lambda row, answer: stream.write(
                    json.dumps({**row, **answer}, ensure_ascii=False, default=readable) + "\n"
                )


def _separated(stream: Any, delimiter: str, names: Sequence[str]) -> Callable[[Row, Row], None]:
    # A lone \r is put in quotes only where lines end with it: then a line's end is made \n.
    writer = csv.writer(SimpleNamespace(write=lambda line: stream.write(f"{line[:-2]}\n")), delimiter=delimiter)
    writer.writerow(names)

    def write(row: Row, answer: Row) -> None:
        # Seven digits are more than a model's numbers hold.
        rounded = {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in answer.items()}
        writer.writerow([_cell({**row, **rounded}.get(name)) for name in names])

    return write


def _cell(value: Any) -> Any:
    """A value as a cell of text: lists and objects as JSON, as the readers take them."""
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=readable)
    return value if value is None or isinstance(value, (str, int, float)) else readable(value)


@contextlib.contextmanager
def _parquet(part: Path, own: Sequence[str], new: Columns, types: Row) -> Iterator[Callable[[Row, Row], None]]:
    kinds = {"list": pa.list_(pa.string()), "json": pa.string(), "string": pa.string()}
    kinds |= {"double": pa.float64(), "int64": pa.int64()}
    fields = {name: types.get(name, pa.string()) for name in own}
    schema = pa.schema(fields | {name: kinds[kind] for name, (_, kind) in new.items()})
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def write(row: Row, answer: Row) -> None:
            cells = {name: _cell(answer[name]) if kind == "json" else answer[name] for name, (_, kind) in new.items()}
            for name, value in ((name, row.get(name)) for name in own):
                unread = value is None or (name in types and isinstance(value, BadCell))
                cells[name] = None if unread else value if name in types else str(_cell(value))
            waiting.append(cells)
            if len(waiting) == _ROWS_AT_ONCE:
                flush()

        yield write
        if waiting:
            flush()


def no_merge(run: Path, found: Path) -> str:
    """Why a model cannot be merged, and which ones of its run can."""
    why, models = "is a whole model already", predict.models_of(run)
    if folders.is_partial(found):
        kind = folders.notes_of(found)["method"]["kind"]
        why = f"a method of kind {kind} adds to what the model computes and cannot be merged"
    can = [name for name, path in models.items() if folders.can_be_merged(path)]
    if can:
        return f"{found}: {why}; what can be merged here, with --method: {', '.join(can)}"
    return f"{found}: {why}" + (f"; {run} has no other model that can be merged" if models else "")
