from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import DataError
from fulltune.recipe.selection import Selection
from fulltune.tasks.columns import BadCell

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".arrow", ".feather")
_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 64 * 2**20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_columnar_rows(file: Path, selection: Selection) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(row number, row)`, numbered from 1. Raises `DataError` for a damaged file, repeated or missing columns.

    Values without a Python equivalent become a `BadCell`, and class numbers of `datasets` become names. Columns, and
    row groups of whole parquet files, that the selection does not need are not read.
    """
    import pyarrow as pa

    number = 1
    try:
        for number, batch in _read_record_batches(file, selection):
            titles, classes = batch.schema.names, read_class_names(batch.schema.metadata)
            if repeated := [title for title, count in Counter(titles).items() if count > 1]:
                raise DataError(
                    f"{file}: column '{repeated[0]}' appears twice, expected unique names; rename or remove one"
                )
            at_once = _rows_at_once(len(batch), batch.nbytes)
            for start in range(0, len(batch), at_once):
                part = batch.slice(start, at_once)
                columns = [_column_to_python(part.column(title), classes.get(title)) for title in titles]
                for cells in zip(*columns, strict=True):
                    yield number, dict(zip(titles, cells, strict=True))
                    number += 1
    except (PermissionError, FileNotFoundError):
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:  # a column name may not be UTF-8
        after = f", after row {number - 1}" if number > 1 else ""
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{file}: not a valid {file.suffix[1:]} file: {text[:200]}{after}; copy or export it again"
        ) from None


def _read_record_batches(file: Path, selection: Selection) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Read a parquet, Arrow or Feather file in batches of limited size, each with the number of its first row."""
    import pyarrow as pa
    from pyarrow import parquet

    number, names = 1, [*selection.needed] if selection.columns else None
    if file.suffix.lower() == ".parquet":
        with parquet.ParquetFile(file) as parts:
            groups = [*map(parts.metadata.row_group, range(parts.metadata.num_row_groups))]
            at_once = _rows_at_once(parts.metadata.num_rows, sum(group.total_byte_size for group in groups))
            selection.refuse_missing(file, parts.schema_arrow.names)
            for place, group in enumerate(groups):
                first, number = number, number + group.num_rows
                bounds = _column_bounds(group, parts.schema_arrow, selection.condition.columns)
                if selection.rows is not None or selection.condition.may_hold(bounds):
                    for batch in parts.iter_batches(at_once, [place], names):
                        yield first, batch
                        first += len(batch)
        return
    with pa.memory_map(str(file)) as stream:
        for batch in _read_arrow_batches(stream):
            selection.refuse_missing(file, batch.schema.names)
            places = [place for place, name in enumerate(batch.schema.names) if names is None or name in names]
            yield number, batch.select(places)  # by number, as names may be repeated
            number += len(batch)


def _column_bounds(group: pq.RowGroupMetaData, schema: pa.Schema, names: Sequence[str]) -> dict[str, object]:
    """Return the minimum and maximum of columns whose cells are read as the numbers and texts that a file has."""
    from pyarrow import types

    kinds = (types.is_integer, types.is_floating, types.is_string)
    plain = {column.name for column in schema if any(is_kind(column.type) for is_kind in kinds)}
    plain = plain.intersection(names).difference(read_class_names(schema.metadata))
    columns = ((one.path_in_schema, one.statistics) for one in map(group.column, range(group.num_columns)))
    return {name: (one.min, one.max) for name, one in columns if name in plain and one is not None and one.has_min_max}


def _rows_at_once(num_rows: int, num_bytes: int) -> int:
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * num_rows // max(1, num_bytes)))


def _read_arrow_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """Read Arrow's file or stream format. Raises `ArrowInvalid` for a truncated stream."""
    import pyarrow as pa

    try:
        parts = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
    else:
        yield from (parts.get_batch(number) for number in range(parts.num_record_batches))
        return
    num_rows = 0
    for batch in pa.ipc.open_stream(stream):
        num_rows += len(batch)
        yield batch
    # Only a missing end-of-stream marker shows that a file was truncated between two batches.
    end = stream.tell()
    stream.seek(max(0, end - len(_END_OF_STREAM)))
    if stream.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise pa.ArrowInvalid(f"truncated after {num_rows} rows: the end-of-stream marker is missing")


_CONVERSION_ERRORS = (ValueError, OverflowError, LookupError)


def _column_to_python(column: pa.Array, class_names: Sequence[str] | None) -> list[object]:
    """Return a column's cells; class numbers become names if `class_names` is given."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # invalid text affects single cells, other damage the file
            raise
    values = map(_cell_to_python, column)
    return list(values) if class_names is None else [_class_number_to_name(value, class_names) for value in values]


def _cell_to_python(cell: pa.Scalar) -> object:
    """Return the cell's value, or a `BadCell` if Python cannot hold it."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return BadCell("a text that is not UTF-8")
    except _CONVERSION_ERRORS as error:
        return BadCell(f"a value of type {cell.type} that cannot be read ({error})")


# ---- classes that `datasets` keeps as numbers ------------------------------------------------------------------


def read_class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Map each `ClassLabel` column to its class names, from the metadata of `datasets`."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    classes = {}
    for column, kind in features.items() if isinstance(features, dict) else ():
        kind = kind.get("feature", kind) if isinstance(kind, dict) else {}
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list):
            classes[column] = [str(name) for name in kind["names"]]
    return classes


def _class_number_to_name(value: object, names: Sequence[str]) -> object:
    """Convert a class number, or each in a list, to its class name: None for -1, a `BadCell` for an unknown number."""
    if isinstance(value, list):
        return [_class_number_to_name(part, names) for part in value]
    if not isinstance(value, int):
        return value
    if value == -1:  # in `datasets`, a row without a class
        return None
    return names[value] if 0 <= value < len(names) else BadCell(f"class {value}, but the file has {len(names)} classes")
