"""Answers in a file beside the rows' own columns: csv, tsv, jsonl or parquet, row after row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import count, islice
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fulltune.errors import SetupError
from fulltune.files import replacing
from fulltune.inference.store import readable
from fulltune.system.run_folder import writing
from fulltune.tasks import Target
from fulltune.tasks.columns import BadCell
from fulltune.tasks.labels import parsed_number

WRITERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
SEPARATED = {".csv": ",", ".tsv": "\t"}
_FORMULA = tuple("=+-@\t\r\n")
"""What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection)."""
_ROWS_AT_ONCE = 1000
# A lone surrogate, which UTF-8 does not have, becomes `\\ud800`: so JSON writes it, too.
_ENCODING: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
Write = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Takes a row's own columns and the added ones."""


def check_output(output: Path | None, replace: bool, escape: bool = False) -> None:
    """Refuse, before anything is read, a file that cannot or must not be written."""
    if output is None or (escape and output.suffix.lower() not in SEPARATED):
        raise SetupError("--escape-formulas: is about cells of csv and tsv; expected --output with such a file")
    if output.suffix.lower() not in WRITERS:
        raise SetupError(f"{output}: cannot be written as '{output.suffix}'; expected {', '.join(WRITERS)}")
    if not output.parent.is_dir():
        raise SetupError(f"{output}: there is no folder {output.parent}; make it, or name another one")
    if output.is_dir():
        raise SetupError(f"{output}: is a folder; name a file")
    if output.exists() and not replace:
        raise SetupError(f"{output}: exists already; name another file, or replace it with --force")


@dataclass(frozen=True)
class Added:
    """The columns that are added: each with its path in an answer, and its type as parquet writes it."""

    prefix: str
    columns: tuple[tuple[str, tuple[Any, ...], str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns are called."""
        return tuple(f"{self.prefix}_{name}" for name, _, _ in self.columns)

    @property
    def reason(self) -> str:
        """The column that says why a row has no answer."""
        return self.names[-1]

    def cells(self, answer: Mapping[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """All of them for one row; without an answer empty but for the reason."""
        if answer is None:
            return {**dict.fromkeys(self.names), self.reason: reason}
        taken = [reduce(getitem, path, answer) for _, path, _ in self.columns[:-1]]
        return dict(zip(self.names, [*taken, None], strict=True))


def added(notes: Mapping[str, Any], own: Collection[str]) -> Added:
    """The columns that answers of a model become, called `predicted_...`, or `predicted2_...` where rows have these."""
    target = Target.from_notes(notes)
    parts = [(name, (name,), as_written) for name, as_written in target.form.answer]
    each = range(target.num_choices) if target.num_choices else target.labels if target.form.labels_rows else ()
    chances = [(f"probability_{key}", ("probabilities", key), "double") for key in each]
    columns = (*parts, *chances, ("error", (), "string"))
    prefixes = ("predicted" if number == 1 else f"predicted{number}" for number in count(1))
    return next(new for prefix in prefixes if not set((new := Added(prefix, columns)).names) & set(own))


@contextmanager
def into(output: Path, own: Sequence[str], new: Added, types: Any, escape: bool = False) -> Iterator[Write]:
    """Write rows into a file, which has its name when all are there; `types`: what `arrow_types` gives, for parquet."""
    form = output.suffix.lower()
    with writing(output), replacing(output) as part:
        if form == ".parquet":
            with _parquet(part, own, new, types) as write:
                yield write
            return
        with part.open("w", newline="", **_ENCODING) as stream:  # both end their lines themselves
            delimiter = SEPARATED.get(form)
            yield _separated(stream, delimiter, own, new, escape) if delimiter else _json_lines(stream)


def _separated(stream: Any, delimiter: str, own: Sequence[str], new: Added, escape: bool) -> Write:
    # A lone \r is put in quotes only where lines end with it: then a line's end is made \n.
    writer = csv.writer(SimpleNamespace(write=lambda line: stream.write(f"{line[:-2]}\n")), delimiter=delimiter)
    put = (lambda cells: writer.writerow(map(_escaped, cells))) if escape else writer.writerow
    put([*own, *new.names])

    def write(row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        cells = [_cell(row.get(name)) for name in own]
        for name in new.names:  # seven digits are more than a model's numbers hold
            value = answer[name]
            cells.append(f"{value:.7g}" if isinstance(value, float) else _cell(value))
        put(cells)

    return write


def _escaped(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and cell.startswith(_FORMULA) and parsed_number(cell) is None
    return f"'{cell}" if is_formula else cell


def _cell(value: Any) -> Any:
    """A value as a cell of text: lists and objects as JSON, as the readers take them."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=readable)
    return readable(value)


def _json_lines(stream: Any) -> Write:
    def write(row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        stream.write(json.dumps({**row, **answer}, ensure_ascii=False, default=readable) + "\n")

    return write


@contextmanager
def _parquet(part: Path, own: Sequence[str], new: Added, types: Any) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"list": pa.list_(pa.string()), "json": pa.string(), "string": pa.string()}
    kinds |= {"double": pa.float64(), "int64": pa.int64()}
    fields = [*zip(new.names, (kinds[kind] for _, _, kind in new.columns), strict=True)]
    schema = pa.schema([*((name, types[name] or pa.string()) for name in own), *fields])
    as_json = {name for name, (_, _, kind) in zip(new.names, new.columns, strict=True) if kind == "json"}
    as_text = {name for name in own if types[name] is None}
    waiting: list[dict[str, Any]] = []
    with parquet.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def write(row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
            cells = {}
            for name in own:
                value = row.get(name)
                if name in as_text:
                    cells[name] = None if value is None else str(_cell(value))
                else:  # in a column with a type, what could not be read is empty
                    cells[name] = None if isinstance(value, BadCell) else value
            cells |= {name: _cell(value) if name in as_json else value for name, value in answer.items()}
            waiting.append(cells)
            if len(waiting) == _ROWS_AT_ONCE:
                flush()

        yield write
        if waiting:
            flush()


def arrow_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The type of each column that holds all of its values, read in chunks; None where they have no type in common."""
    import pyarrow as pa

    found: dict[str, Any] = {}
    waiting = iter(rows)
    while chunk := list(islice(waiting, _ROWS_AT_ONCE)):
        for name in dict.fromkeys(name for row in chunk for name in row):
            if name in found and found[name] is None:
                continue
            try:
                kinds = [pa.array([row.get(name) for row in chunk]).type, *([found[name]] if name in found else [])]
                schemas = [pa.schema([("", kind)]) for kind in kinds]
                found[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            except (pa.ArrowException, OverflowError):
                found[name] = None
    return {name: pa.string() if kind is not None and pa.types.is_null(kind) else kind for name, kind in found.items()}
