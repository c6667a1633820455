from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fulltune.files import create_private_file
from fulltune.tasks import PLACE, Row, RowFeatures

FILE = "rows.arrow"
CLUSTERS = "clusters.npy"
"""File next to eval or test rows: each row's cluster (duplicates, or rows of one passage or customer), int64 [rows]."""
IN_TRAIN = "in_train.npy"
"""File of bool [rows] next to the test rows: True where a train row has the same text, prompt or passage."""
MIXED = "mixed"
ROW_JSON = "words"
"""Column with a row and its location as JSON, or only the location for further examples of the row."""
_ROWS_PER_BATCH = 8192
_BYTES_PER_BATCH = 16 * 2**20


def make_record_batch(rows: Sequence[RowFeatures], row_texts: Sequence[str]) -> pa.RecordBatch:
    """Return an Arrow batch with a column per feature, and `row_texts` (from `row_as_json`) as column `ROW_JSON`."""
    names = [*rows[0], ROW_JSON]
    return pa.record_batch(
        [*(_feature_array([row[name] for row in rows]) for name in rows[0]), pa.array(row_texts)], names=names
    )


def _feature_array(values: Sequence[Any]) -> pa.Array:
    """Convert one feature of all rows to an Arrow array: lists of float32 or int32, or plain values."""
    if not isinstance(values[0], (list, tuple, np.ndarray)):
        return pa.array(values)
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    if isinstance(values[0], np.ndarray):
        flat = np.concatenate(list(values))
    else:
        first = next((value[0] for value in values if len(value)), 0)
        kind = np.float32 if isinstance(first, (float, np.floating)) else np.int32
        flat = np.fromiter(chain.from_iterable(values), kind, count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def write_rows(folder: Path, record_batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches to the folder's Arrow file, merged to at least 8,192 rows or 16 MiB each."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[pa.RecordBatch] = []
    record_batches = iter(record_batches)
    if (first := next(record_batches, None)) is None:
        return
    create_private_file(folder / FILE)
    with pa.OSFile(str(folder / FILE), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for part in chain([first], record_batches):
            waiting.append(part)
            num_rows, num_bytes = sum(map(len, waiting)), sum(batch.nbytes for batch in waiting)
            if num_rows >= _ROWS_PER_BATCH or num_bytes >= _BYTES_PER_BATCH:
                writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks())


def read_record_batches(folder: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(folder / FILE)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


class Rows(Sequence[dict[str, Any]]):
    """Memory-mapped features of a split's rows; several folders are concatenated."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        # Not closed explicitly: arrays are views of the map, which closes with the last of them.
        mapped = (pa.ipc.open_stream(pa.memory_map(str(folder / FILE))) for folder in folders)
        self._batches = [
            batch.select([name for name in batch.schema.names if name != ROW_JSON])
            for batch in chain.from_iterable(mapped)
        ]
        lists = [[field.name for field in batch.schema if pa.types.is_list(field.type)] for batch in self._batches]
        # For each column of lists: all values, and where each list starts, as views of the file.
        self._lists = [
            {name: (batch[name].values.to_numpy(), batch[name].offsets.to_numpy()) for name in names}
            for batch, names in zip(self._batches, lists, strict=True)
        ]
        self._starts = [0, *np.cumsum([len(batch) for batch in self._batches]).tolist()]

    def __reduce__(self) -> tuple[type[Rows], tuple[Path, ...]]:  # a data loader's worker maps the file itself
        return Rows, self.folders

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: Any) -> Any:
        """Return a row as a dictionary, a list of rows for a slice, or a feature of all rows (array or list) for a
        name."""
        if isinstance(key, str):
            if key in self._lists[0]:
                return [flat[start:end] for flat, offsets in self.lists(key) for start, end in pairwise(offsets)]
            arrays = [batch[key] for batch in self._batches]
            if pa.types.is_primitive(arrays[0].type):
                return np.concatenate([array.to_numpy() for array in arrays])
            return [value for array in arrays for value in array.to_pylist()]
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        position = range(len(self))[key]  # also negative
        part = bisect_right(self._starts, position) - 1
        inner = position - self._starts[part]
        batch, lists = self._batches[part], self._lists[part]
        row: dict[str, Any] = {}
        for name in batch.schema.names:
            if name in lists:
                flat, offsets = lists[name]
                row[name] = flat[offsets[inner] : offsets[inner + 1]]
            else:
                row[name] = batch[name][inner].as_py()
        return row

    def lists(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each batch's values of a list column, and the offsets at which lists start and end."""
        return (lists[name] for lists in self._lists)


def read_original_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each example's original row with its location. Examples of one row share a dictionary.

    A packed block gives the row of its first text, or only the location if that text started in another block.
    """
    row: dict[str, Any] = {}
    for batch in read_record_batches(folder):
        for text in batch.column(ROW_JSON).to_pylist():
            stored = json.loads(text)
            # A place alone belongs to the previous row, or to a text that started in another block.
            if stored.keys() != {PLACE} or stored[PLACE] != row.get(PLACE):
                row = stored
            yield row


def row_id(row: Row) -> str:
    """Return a hash of a row's columns, the same before and after storing."""
    columns = {name: value for name, value in row.items() if name != PLACE}
    return hashlib.sha256(json.dumps(columns, sort_keys=True, default=to_json_value).encode()).hexdigest()[:16]


def hash_rows(folder: Path) -> str:
    """Hash a folder's rows, ignoring their order and repetitions."""
    # The windows of a long row share one dictionary.
    ids = {row_id(next(same)) for _, same in groupby(read_original_rows(folder), key=id)}
    return hashlib.sha256("".join(sorted(ids)).encode()).hexdigest()[:16]


def row_as_json(location: str, row: Row) -> str:
    return json.dumps({**row, PLACE: location}, ensure_ascii=False, default=to_json_value)


def to_json_value(value: Any) -> Any:
    """Convert a value that JSON cannot represent: arrays to lists, bytes to "<n bytes>", others to text."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value.tolist() if hasattr(value, "tolist") else str(value)
