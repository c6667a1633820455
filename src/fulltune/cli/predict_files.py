"""Answers in a file beside the rows' own columns: csv, tsv, jsonl or parquet, row after row. Layer 4."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from fulltune.errors import SetupError
from fulltune.inference.store import readable
from fulltune.system.run_folder import writing
from fulltune.tasks.columns import BadCell

WRITERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_ROWS_AT_ONCE = 1000
# A lone surrogate, which UTF-8 does not have, becomes `\\ud800`: so JSON writes it, too.
_ENCODING: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
Write = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Takes a row's own columns and the added ones."""


def check_output(output: Path, replace: bool) -> None:
    """Refuse, before anything is read, a file that cannot or must not be written.

    Raises:
        SetupError: Saying which it is.
    """
    if output.suffix.lower() not in WRITERS:
        raise SetupError(f"{output}: cannot be written as '{output.suffix}'; expected {', '.join(WRITERS)}")
    if not output.parent.is_dir():
        raise SetupError(f"{output}: there is no folder {output.parent}; make it, or name another one")
    if output.is_dir():
        raise SetupError(f"{output}: is a folder; name a file")
    if output.exists() and not replace:
        raise SetupError(f"{output}: exists already; name another file, or replace it with --force")


# ---- columns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added:
    """The columns that are added: each with what it holds of an answer, and its type as parquet writes it."""

    prefix: str
    columns: tuple[tuple[str, Callable[[Mapping[str, Any]], Any], str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}_{name}" for name, _, _ in self.columns)

    @property
    def reason(self) -> str:
        """The column that says why a row has no answer."""
        return f"{self.prefix}_{_REASON}"

    def cells(self, answer: Mapping[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """All of them for one row; without an answer empty but for the reason."""
        names = self.names
        if answer is None:
            return {**dict.fromkeys(names), self.reason: reason}
        return {name: take(answer) for name, (_, take, _) in zip(names, self.columns, strict=True)}


_REASON = "error"


def added(notes: Mapping[str, Any], own: Collection[str]) -> Added:
    """The columns that answers of a model become, called `predicted_...`, or `predicted2_...` where rows have these.

    Args:
        notes: What fulltune wrote about the model.
        own: The rows' own columns.
    """
    columns = (*_columns(notes), (_REASON, lambda answer: None, "string"))
    for number in count(1):
        found = Added(f"predicted{number if number > 1 else ''}", columns)
        if not set(found.names) & set(own):
            return found
    raise AssertionError("count() has no end")


def _columns(notes: Mapping[str, Any]) -> list[tuple[str, Callable[[Mapping[str, Any]], Any], str]]:
    def part(name: str, kind: str) -> tuple[str, Callable[[Mapping[str, Any]], Any], str]:
        return name, lambda answer: answer[name], kind

    def chance(key: Any) -> tuple[str, Callable[[Mapping[str, Any]], Any], str]:
        return f"probability_{key}", lambda answer: answer["probabilities"][key], "double"

    match notes["problem_type"]:
        case "single_label":
            return [part("label", "string"), part("probability", "double"), *map(chance, notes["labels"])]
        case "multi_label":
            return [part("labels", "list"), *map(chance, notes["labels"])]
        case "regression":
            return [part("value", "double")]
        case "choice":
            asked = [part("index", "int64"), part("text", "string"), part("probability", "double")]
            return [*asked, *map(chance, range(notes["num_choices"]))]
        case "tags":
            return [part("tokens", "list"), part("tags", "list"), part("entities", "json")]
        case "span":
            return [part("answer", "string"), part("start", "int64"), part("probability", "double")]
        case _:
            return [part("answer", "string")]


# ---- files -----------------------------------------------------------------------------------------------------


@contextmanager
def into(output: Path, own: Sequence[str], new: Added, types: Any) -> Iterator[Write]:
    """Write rows into a file, which has its name only when all are there.

    Args:
        output: Its ending says the form.
        own: The rows' own columns.
        new: The added ones.
        types: For parquet the types of the own columns, as `arrow_types` gives them.
    """
    part = output.with_name(f"{output.name}.part")
    with writing(output):
        try:
            match output.suffix.lower():
                case ".csv" | ".tsv":
                    with part.open("w", newline="", **_ENCODING) as stream:
                        yield _separated(stream, "," if output.suffix.lower() == ".csv" else "\t", own, new)
                case ".parquet":
                    with _parquet(part, own, new, types) as write:
                        yield write
                case _:
                    with part.open("w", **_ENCODING) as stream:
                        yield _json_lines(stream)
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)


def _separated(stream: Any, delimiter: str, own: Sequence[str], new: Added) -> Write:
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    writer.writerow([*own, *new.names])

    def write(row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        writer.writerow([*(_cell(row.get(name)) for name in own), *(_rounded(answer[name]) for name in new.names)])

    return write


def _rounded(value: Any) -> Any:
    """Seven digits are more than a model's numbers hold."""
    return f"{value:.7g}" if isinstance(value, float) else _cell(value)


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


def _value(value: Any) -> Any:
    """A value for a column with a type; one that could not be read has none."""
    return None if isinstance(value, BadCell) else value


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
            cells = {name: _text(row.get(name)) if name in as_text else _value(row.get(name)) for name in own}
            cells |= {name: _cell(value) if name in as_json else value for name, value in answer.items()}
            waiting.append(cells)
            if len(waiting) == _ROWS_AT_ONCE:
                flush()

        yield write
        if waiting:
            flush()


def _text(value: Any) -> str | None:
    return None if value is None else str(_cell(value))


def arrow_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The type of each column that holds all of its values; None where they have no type in common.

    Only some rows are in memory at once.
    """
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
