"""Read parquet, arrow and feather files, batch by batch, so that a large file never lies in memory as a whole."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fulltune.errors import DataError
from fulltune.tasks.columns import BadCell
from fulltune.text import format_bytes

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 64 * 2**20
"""Of rows that hold images or books, fewer are read at once."""
_MOST_UNPACKED_BYTES = 256 * 2**20
_MOST_GROWTH = 200
"""Texts and numbers are packed to a tenth, seldom to a fiftieth: what unpacks to more than both is no data."""
_FIRST_FEATHER = b"FEA1"
"""Files of the second version are Arrow files."""
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Pairs of row number, from 1, and row. Raises `DataError` for a file that is damaged, cut, or has two columns of
    one name.

    A value that Python cannot hold (a time beyond the year 9999, a text that is not UTF-8) becomes a `BadCell`, and so
    do those of a column that unpacks to so much that it is no data: it is not read. Whole numbers that stand for class
    names, as `datasets` writes them, become these names.
    """
    import pyarrow as pa

    number, packed = 1, file.stat().st_size
    most = max(_MOST_UNPACKED_BYTES, _MOST_GROWTH * packed)
    bomb = BadCell(
        f"cells that unpack to over {format_bytes(most)}, in a file of {format_bytes(packed)}, expected at most "
        f"{_MOST_GROWTH} times its size (if they are right, write the file again without compression, or as jsonl)"
    )
    unread: dict[str, None] = {}
    try:
        for batch in _batches(file, most, unread):
            titles, classes = batch.schema.names, class_names(batch.schema.metadata)
            if runs := [one.name for one in batch.schema if "run_end_encoded<" in str(one.type)]:
                raise DataError(
                    f"{file}: column '{runs[0]}' is run-end encoded and may unpack to any size, expected plain values; "
                    "write it again without (pyarrow.compute.run_end_decode)"
                )
            if repeated := [title for title, count in Counter(titles).items() if count > 1]:
                raise DataError(
                    f"{file}: column '{repeated[0]}' stands twice, expected each name once; rename or remove one"
                )
            read = batch.select([title for title in titles if title not in unread])
            at_once = _rows_at_once(len(batch), sum(map(_unpacked_bytes, read.columns)))
            for start in range(0, len(batch), at_once):
                part = read.slice(start, at_once)
                columns = {title: _values(part.column(title), classes.get(title)) for title in part.schema.names}
                columns |= {title: [bomb] * len(part) for title in unread}
                for cells in zip(*columns.values(), strict=True):
                    yield number, dict(zip(columns, cells, strict=True))
                    number += 1
    except (PermissionError, FileNotFoundError):
        raise
    except UnicodeDecodeError:
        raise DataError(f"{file}: a column's name is not UTF-8, expected one that is; rename the column") from None
    except (pa.ArrowException, OSError, EOFError) as error:
        after = f", after row {number - 1}" if number > 1 else ""
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{file}: not a valid {file.suffix[1:]} file: {text[:200]}{after}; expected a whole one: copy or write it "
            "again"
        ) from None


def _batches(file: Path, most: int, unread: dict[str, None]) -> Iterator[pa.RecordBatch]:
    """The rows; before the first one, `unread` is given the columns that unpack to more than `most` bytes."""
    import pyarrow as pa
    from pyarrow import feather, parquet

    if file.suffix.lower() == ".parquet":
        with parquet.ParquetFile(file) as parts, file.open("rb") as stream:
            names, num_rows = parts.schema_arrow.names, parts.metadata.num_rows
            _refuse_endless(num_rows, most)
            at_once, total = _ROWS_AT_ONCE, 0
            for name, chunks in _columns(parts.metadata, set(names)).items():
                largest = max(_largest_cell(chunk, stream) for chunk in chunks)
                size = sum(chunk.total_uncompressed_size for chunk in chunks)
                few = min(_rows_at_once(num_rows, size), max(1, _MOST_UNPACKED_BYTES // (largest + 1)))
                sizes = (_unpacked_bytes(part.column(0)) for part in parts.iter_batches(few, columns=[name]))
                is_doubtful = largest * sum(chunk.num_values for chunk in chunks) > most
                # Each value of a list takes its place when it is read, an empty one too.
                is_vast = 8 * sum(chunk.num_values for chunk in chunks) > most
                if (
                    is_vast
                    or max(chunk.total_uncompressed_size for chunk in chunks) > most
                    or (is_doubtful and any(unpacked > most for unpacked in accumulate(sizes)))
                ):
                    unread[name] = None
                else:
                    at_once, total = min(at_once, few), total + size
            at_once = min(at_once, _rows_at_once(num_rows, total))
            yield from parts.iter_batches(at_once, columns=[name for name in names if name not in unread])
        return
    with pa.memory_map(str(file)) as stream:
        if stream.read(len(_FIRST_FEATHER)) == _FIRST_FEATHER:
            yield from feather.read_table(file, memory_map=True).to_batches(_ROWS_AT_ONCE)
            return
        stream.seek(0)
        unpacked = Counter[int]()
        num_rows = 0
        for batch in _arrow_batches(stream):
            _refuse_endless(num_rows := num_rows + len(batch), most)
            names = [str(name) for name in batch.schema.names]
            unpacked.update({place: _unpacked_bytes(column) for place, column in enumerate(batch.columns)})
            if not any("dictionary<" in str(kind) or "null" in str(kind) for kind in batch.schema.types):
                break  # each cell has its own bytes
        unread |= {names[place]: None for place, size in unpacked.items() if size > most}
        stream.seek(0)
        yield from _arrow_batches(stream)


def _refuse_endless(num_rows: int, most: int) -> None:
    """Empty values take no place in a file, and each takes its own when it is read."""
    import pyarrow as pa

    if 8 * num_rows > most:
        raise pa.ArrowInvalid(f"{num_rows:,} rows that hold next to nothing")


def _rows_at_once(num_rows: int, num_bytes: int) -> int:
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * num_rows // max(1, num_bytes)))


def _unpacked_bytes(column: pa.Array) -> int:
    """What its cells are together when each has its own text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        with contextlib.suppress(pa.ArrowNotImplementedError):  # no texts
            return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):  # of empty values, perhaps
        return max(int(column.nbytes), 8 * (pc.sum(pc.list_value_length(column)).as_py() or 0))
    return int(column.nbytes)


def _columns(metadata: Any, names: Collection[str]) -> dict[str, list[Any]]:
    """Each column's parts, those of all groups of rows."""
    columns: dict[str, list[Any]] = {}
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            path = chunk.path_in_schema  # of a list: `messages.list.element`; a name may hold dots, too
            while path and path not in names:
                path = path.rpartition(".")[0]
            columns.setdefault(path, []).append(chunk)
    return columns


def _largest_cell(chunk: Any, stream: BinaryIO) -> int:
    """The most bytes of what a file holds once and many cells have: the size of the dictionary.

    It is the second number in the header of the dictionary's page (in the compact protocol of Thrift).
    """
    if chunk.dictionary_page_offset is None and "DELTA_BYTE_ARRAY" not in chunk.encodings:
        return 0
    stream.seek(chunk.dictionary_page_offset or 0)
    header, size = stream.read(9), 0
    if "DELTA_BYTE_ARRAY" in chunk.encodings or header[::2][:2] != b"\x15\x15":
        return int(chunk.total_uncompressed_size)
    for place, byte in enumerate(header[3:]):
        size |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return size >> 1


def _arrow_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """Batch by batch: a compressed one is unpacked when it is read."""
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
    # One that was cut between two batches reads like a whole one, but for its mark.
    end = stream.tell()
    stream.seek(max(0, end - len(_END_OF_STREAM)))
    if stream.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise pa.ArrowInvalid(f"cut after {num_rows} rows, its end mark is missing")


_NO_VALUE = (ValueError, OverflowError, LookupError)
"""What pyarrow raises where Python has no such value: a far time, an unknown time zone, a text that is not UTF-8."""


def _values(column: pa.Array, classes: Sequence[str] | None) -> list[Any]:
    """A column's cells as Python's values."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # that is wrong with single cells; other damage is the file's
            raise
    try:
        values = column.to_pylist()
    except _NO_VALUE:
        values = [_value(cell) for cell in column]
    return values if classes is None else [_class_name(value, classes) for value in values]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return BadCell("a text that is not UTF-8")
    except _NO_VALUE as error:
        return BadCell(f"a value of type {cell.type} that cannot be read ({error})")


# ---- classes that `datasets` keeps as numbers ------------------------------------------------------------------


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column to class names, for columns of type `ClassLabel`, or lists of it."""
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


def _class_name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(part, names) for part in value]
    if not isinstance(value, int):
        return value
    if value == -1:  # `datasets` marks rows without a class so
        return None
    return names[value] if 0 <= value < len(names) else BadCell(f"class {value} of {len(names)} in the file's metadata")
