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
from fulltune.cli.stages import err, note
from fulltune.data.readers.columnar import read_class_names
from fulltune.data.readers.derived import DerivedColumns
from fulltune.data.readers.read import DataFiles, locate_data_files, resolve_image_paths
from fulltune.data.readers.text_files import SEPARATED, detect_delimiter, open_csv_reader
from fulltune.errors import DataError, InterruptedRun, SetupError
from fulltune.files import replace_atomically
from fulltune.inference.store import to_json_value
from fulltune.records.events import Listener, RowsRead
from fulltune.system.run_folder import explain_os_errors
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import BadCell, shown
from fulltune.text import counted

STDIN = "-"
_IN_PLACE = {True: "an 'error' is printed instead", False: "an empty line is printed instead"}
_LISTED = 5
_WRITTEN = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}
_ROWS_AT_ONCE = 1000
# A lone surrogate, which UTF-8 does not have, becomes `\\ud800`: so JSON writes it, too.
_ENCODING: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
Columns = Mapping[str, tuple[tuple[Any, ...], str]]
"""Added columns, each with its path in an answer and its parquet type."""
RowWriter = Callable[[Row, Row], None]


# ---- input -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictInput:
    where: str
    located_rows: Callable[[], Iterator[tuple[str, dict[str, Any]]]]
    """Yields each row's location and columns. Rows of stdin can be read only once."""
    columns: tuple[str, ...] = ("text",)
    total: int | None = None
    table: Path | None = None
    """Path to a table file or to a folder of them, or None if the input is lines of text."""
    image_root: Path | None = None
    """Base folder of relative image paths, or None for the current folder."""

    def model_rows(self, model_notes: Row, user_rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
        """Yield the user's rows in the form that the model reads."""
        image = model_notes["columns"].get("image")
        for row in user_rows:
            if self.table is None:
                yield predict.row_from_text(row["text"], model_notes)
            else:
                yield (resolve_image_paths(row, self.image_root, image) if image and self.image_root else row)

    def parquet_types(self) -> dict[str, Any]:
        """Return the types of a parquet table's columns, or {} for other input."""
        if self.table is None or self.table.suffix.lower() != ".parquet":
            return {}
        schema = parquet.read_schema(self.table)
        named = read_class_names(schema.metadata)  # read as texts
        return {one.name: one.type for one in schema if one.name not in named}


def read_input(texts: Sequence[str], file: Path | None, model_notes: Row) -> PredictInput:
    """Return the input: texts, a table, a file's lines or stdin. `model_notes` holds the model's `fulltune.json`."""
    if list(texts) == [STDIN] or str(file) == STDIN or (file is None and not texts):
        if file is None and not texts and sys.stdin.isatty():
            raise SetupError("predict: give a text, --file, or '-' for texts on stdin, one per line")
        return PredictInput("stdin", lambda: _number_texts(_read_lines(None), "stdin:"))
    if file is None:
        return PredictInput("predict", lambda: _number_texts(texts, "text "), total=len(texts))
    if file.suffix.lower() == ".txt":
        total = sum(1 for _ in _read_lines(file))
        return PredictInput(str(file), lambda: _number_texts(_read_lines(file), f"{file.name}:"), total=total)
    return _read_table(file, model_notes)


def _read_table(file: Path, model_notes: Row) -> PredictInput:
    """Read a table once, and raise a `DataError` for broken rows or missing columns."""
    read = predict.columns_read(model_notes).values()
    source = replace(locate_data_files([str(file)]), derived=DerivedColumns(inner=tuple(read)))
    if named := _missing_header(source, model_notes):
        source = replace(source, columns=named)
        note(f"{file}: has no header line, so the columns of the train file are used: {', '.join(named)}")
    problems: list[str] = []
    columns: dict[str, None] = {}
    total = 0
    for _, row in source.rows(problems):
        total += 1
        columns |= dict.fromkeys(row)
    if problems:
        raise DataError(problems)
    if missing := [column for column in read if column not in columns]:
        raise DataError(
            f"{file}: no column '{missing[0]}', which the model reads (columns in the file: {shown(columns)})"
        )
    image_root = source.files[0].parent if source.image_folder is None else None
    return PredictInput(str(file), source.rows, tuple(columns), total, file, image_root)


def _missing_header(source: DataFiles, model_notes: Row) -> tuple[str, ...] | None:
    """Return the column names of a table without a header line, or None if it has one.

    The header is assumed missing if the train file had none and the first line lacks columns that the model reads.
    """
    names = tuple(model_notes.get("table_columns") or ())
    if not names or any(file.suffix.lower() not in SEPARATED for file in source.files):
        return None
    try:
        with open_csv_reader(source.files[0], detect_delimiter(source.files[0])) as reader:
            first: list[str] = next(reader, [])
    except (OSError, ValueError, csv.Error):
        return None  # the reader will report what is wrong with the file
    if set(predict.columns_read(model_notes).values()) <= set(first):
        return None
    learned = [column for role, column in model_notes["columns"].items() if role in predict.NOT_READ]
    read = tuple(name for name in names if name not in learned)
    return read if len(first) == len(read) else names


def _number_texts(texts: Iterable[str], location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{location}{number}", {"text": text}) for number, text in enumerate(texts, start=1))


def _read_lines(file: Path | None) -> Iterator[str]:
    """Yield the lines of a file, or of stdin if `file` is None."""
    try:
        with contextlib.nullcontext(sys.stdin) if file is None else file.open(encoding="utf-8-sig") as stream:
            for line in stream:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8; save it as UTF-8"
        raise DataError(f"{file or 'stdin'}: cannot be read: {reason}") from None


# ---- answers ---------------------------------------------------------------------------------------------------


def print_answers(predictor: predict.Predictor, inputs: PredictInput, max_new_tokens: int, as_json: bool) -> None:
    """Print each row's answer as text, or as JSON with the row's location."""

    def print_answer(location: str, row: Row, answer: Row | None, reason: str | None) -> None:
        if as_json:
            typer.echo(json.dumps({"place": location, **(answer or {"error": reason})}, ensure_ascii=False))
        else:
            typer.echo("" if answer is None else _format_answer(answer))

    _answer_rows(predictor, inputs, print_answer, _IN_PLACE[as_json], max_new_tokens)


def write_answers(
    predictor: predict.Predictor, inputs: PredictInput, output: Path, max_new_tokens: int, listener: Listener
) -> dict[str, Any]:
    """Write rows with their answers to a file; return `output`, counts by outcome and the new `columns`."""
    new = choose_added_columns(predictor.notes, inputs.columns)
    *_, reason_column = new
    types = inputs.parquet_types() if output.suffix.lower() == ".parquet" else {}
    try:
        with open_output(output, inputs.columns, new, types) as put:
            counts = _answer_rows(
                predictor,
                inputs,
                lambda location, row, answer, reason: put(row, make_added_cells(new, answer, reason)),
                f"their new columns are empty except '{reason_column}', which gives the reason",
                max_new_tokens,
                listener,
            )
    except KeyboardInterrupt:
        raise InterruptedRun(f"interrupted: {output} was not written; run the same command to start again") from None
    return {"output": str(output), **counts, "columns": list(new)}


def _answer_rows(
    predictor: predict.Predictor,
    inputs: PredictInput,
    use_answer: Callable[[str, Row, Row | None, str | None], None],
    replacement_note: str,
    max_new_tokens: int,
    listener: Listener = lambda event: None,
) -> dict[str, int]:
    """Pass each row with its answer, or why there is none, to `use_answer`; return the counts by outcome."""
    placed, again = tee(inputs.located_rows())
    rows = without = cut = 0

    def report_progress(done: int, _: int) -> None:
        listener(RowsRead(name="answering", done=rows + done, total=inputs.total))

    first: list[str] = []
    model_rows = inputs.model_rows(predictor.notes, (row for _, row in again))
    answers = predictor.answer_each(model_rows, max_new_tokens, report_progress)
    for (location, row), answered in zip(placed, answers, strict=True):
        rows += 1
        cut += answered.is_cut
        reason = None
        if refused := answered.refused:
            reason = (
                refused.check if inputs.table is None else refused.reason
            )  # a line of text has no column that the reason could name
            without += 1
            if without <= _LISTED:
                first.append(f"{location}: {reason}")
        use_answer(location, row, answered.answer, reason)
    if without > _LISTED:
        first.append(f"... and {without - _LISTED:,} more")
    for line in first:
        _warn(line)
    if rows and without == rows:
        raise DataError(f"{inputs.where}: no row could be answered ({counted(rows, 'row')})")
    if without:
        _warn(f"{without:,} of {counted(rows, 'row')} got no answer; {replacement_note}")
    if cut:
        _warn(f"truncated: {cut:,} of {counted(rows, 'row')}; each {predictor.describe_truncation()}")
    return {"rows": rows, "without_answer": without, "cut": cut}


def _warn(line: str) -> None:
    err.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)


def _format_answer(answer: Row) -> str:
    if "answer" in answer or "embedding" in answer:
        return str(answer.get("answer", answer.get("embedding")))
    if "entities" in answer:
        entities = [f"{entity['text']} ({entity['type']} {entity['probability']:.1%})" for entity in answer["entities"]]
        return ", ".join(entities) or "(none)"
    if "value" in answer or "score" in answer:
        return f"{answer.get('value', answer.get('score')):.4g}"
    if "labels" in answer:
        return ", ".join(f"{name} ({answer['probabilities'][name]:.1%})" for name in answer["labels"]) or "(none)"
    return f"{answer['text'] if 'index' in answer else answer['label']} ({answer['probability']:.1%})"


# ---- files -----------------------------------------------------------------------------------------------------


def check_output(output: Path, replace: bool) -> None:
    """Raise a `SetupError` if the output file cannot be written or may not be replaced."""
    if output.suffix.lower() not in _WRITTEN:
        raise SetupError(f"{output}: cannot be written as '{output.suffix}'; expected one of {', '.join(_WRITTEN)}")
    if not output.parent.is_dir():
        raise SetupError(f"{output}: the folder {output.parent} does not exist; create it, or choose another")
    if output.is_dir():
        raise SetupError(f"{output}: is a folder; name a file")
    if output.exists() and not replace:
        raise SetupError(f"{output}: already exists; name another file, or replace it with --force")


def choose_added_columns(model_notes: Row, own_columns: Collection[str]) -> Columns:
    """Return the added columns: `predicted_...` (`predicted2_...` if taken), then the reason for a missing answer."""
    target = Target.from_notes(model_notes)
    columns: dict[str, tuple[tuple[Any, ...], str]] = {name: ((name,), kind) for name, kind in target.form.answer}
    choices = range(target.num_choices if target.form.is_calibrated else 0)
    each = target.labels if target.form.labels_rows else choices
    columns |= {f"probability_{key}": (("probabilities", key), "double") for key in each}
    columns["error"] = (("error",), "string")
    prefixes = ("predicted" if number == 1 else f"predicted{number}" for number in count(1))
    named = ({f"{prefix}_{name}": where for name, where in columns.items()} for prefix in prefixes)
    return next(new for new in named if not set(new) & set(own_columns))


def make_added_cells(added: Columns, answer: Row | None, reason: str | None) -> dict[str, Any]:
    """Return the added columns of one row. Without an answer, only the reason is set."""
    if answer is None:
        return {**dict.fromkeys(added), [*added][-1]: reason}
    return {name: reduce(getitem, path, {**answer, "error": None}) for name, (path, _) in added.items()}


@contextlib.contextmanager
def open_output(output: Path, own_columns: Sequence[str], added: Columns, parquet_types: Row) -> Iterator[RowWriter]:
    """Yield a function that writes a row with its answer. The file appears only once it is complete."""
    form = output.suffix.lower()
    with explain_os_errors(output), replace_atomically(output) as part:
        if form == ".parquet":
            with _open_parquet_writer(part, own_columns, added, parquet_types) as write:
                yield write
            return
        with part.open("w", newline="", **_ENCODING) as stream:  # both writers end their own lines
            if _WRITTEN[form]:
                yield _open_delimited_writer(stream, _WRITTEN[form], [*own_columns, *added])
            else:
                yield lambda row, answer: stream.write(
                    json.dumps({**row, **answer}, ensure_ascii=False, default=to_json_value) + "\n"
                )


def _open_delimited_writer(stream: Any, delimiter: str, names: Sequence[str]) -> RowWriter:
    # The writer quotes a lone \r only if lines end with one, so lines are written with \r\n and then end with \n.
    writer = csv.writer(SimpleNamespace(write=lambda line: stream.write(f"{line[:-2]}\n")), delimiter=delimiter)
    writer.writerow(names)

    def write(row: Row, answer: Row) -> None:
        # Seven digits exceed the precision of a model's numbers.
        rounded = {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in answer.items()}
        writer.writerow([_plain_value({**row, **rounded}.get(name)) for name in names])

    return write


def _plain_value(value: Any) -> Any:
    """Return a cell's value, with lists and dictionaries as JSON."""
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=to_json_value)
    return value if value is None or isinstance(value, (str, int, float)) else to_json_value(value)


@contextlib.contextmanager
def _open_parquet_writer(
    part: Path, own_columns: Sequence[str], added: Columns, parquet_types: Row
) -> Iterator[RowWriter]:
    kinds = {"list": pa.list_(pa.string()), "json": pa.string(), "string": pa.string()}
    kinds |= {"double": pa.float64(), "int64": pa.int64(), "vector": pa.list_(pa.float32())}
    fields = {name: parquet_types.get(name, pa.string()) for name in own_columns}
    schema = pa.schema(fields | {name: kinds[kind] for name, (_, kind) in added.items()})
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def write(row: Row, answer: Row) -> None:
            cells = {
                name: _plain_value(answer[name]) if kind == "json" else answer[name]
                for name, (_, kind) in added.items()
            }
            for name, value in ((name, row.get(name)) for name in own_columns):
                unread = value is None or (name in parquet_types and isinstance(value, BadCell))
                cells[name] = None if unread else value if name in parquet_types else str(_plain_value(value))
            waiting.append(cells)
            if len(waiting) == _ROWS_AT_ONCE:
                flush()

        yield write
        if waiting:
            flush()
