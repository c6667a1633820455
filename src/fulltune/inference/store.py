"""Where prepared rows lie: one Arrow stream per split, memory-mapped, features and words side by side."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fulltune.files import make_private
from fulltune.tasks import PLACE

FILE = "rows.arrow"
CLUSTERS = "clusters.npy"
"""Beside held-out rows: the number of each one's cluster (duplicates, near ones, of one passage, of one customer), from
0, int64 [rows]."""
IN_TRAIN = "in_train.npy"
"""Beside test rows whether each shares its text, prompt or passage with a train row: bool [rows]."""
MIXED = "mixed"
"""Folder beside those of the splits: the rows that are mixed into the train rows, source after source."""
WORDS = "words"
"""Column beside the features: beside a row's first example the row in the user's own columns, and its place, as JSON;
beside its others (windows, pieces) only the place, or the file would grow with the square of a row's length."""
_ROWS_PER_BATCH = 8192
_BYTES_PER_BATCH = 16 * 2**20


def record_batch(rows: Sequence[Mapping[str, Any]], words: Sequence[str]) -> pa.RecordBatch:
    """Rows of features, each a number, a text, bytes or a flat list of numbers, as arrow columns."""
    names = [*rows[0], WORDS]
    return pa.record_batch([*(_column([row[name] for row in rows]) for name in rows[0]), pa.array(words)], names=names)


def _column(values: Sequence[Any]) -> pa.Array:
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


def write_rows(folder: Path, parts: Iterable[pa.RecordBatch]) -> None:
    """Write record batches into a split's file, gathered into larger ones; where there is none, no file is written."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[pa.RecordBatch] = []
    parts = iter(parts)
    if (first := next(parts, None)) is None:
        return
    make_private(folder / FILE)
    with pa.OSFile(str(folder / FILE), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for part in chain([first], parts):
            waiting.append(part)
            num_rows, num_bytes = sum(map(len, waiting)), sum(one.nbytes for one in waiting)
            if num_rows >= _ROWS_PER_BATCH or num_bytes >= _BYTES_PER_BATCH:
                writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks())


def batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """A split's record batches, words included, one after another; not mapped, because mapped pages count as memory."""
    with pa.OSFile(str(folder / FILE)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


class Rows(Sequence[dict[str, Any]]):
    """The features of a split, memory-mapped; of several folders, which have the same features, one after the other.

    `rows[i]` is a dictionary: numpy arrays (views into the file) for lists, plain values for everything else.
    `rows["length"]` is that feature of all rows: one array, or a list of arrays.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        # Not closed by hand: arrays that are views of the map keep it alive, and it closes with the last of them.
        mapped = (pa.ipc.open_stream(pa.memory_map(str(folder / FILE))) for folder in folders)
        self._batches = [
            batch.select([name for name in batch.schema.names if name != WORDS])
            for batch in chain.from_iterable(mapped)
        ]
        lists = [[field.name for field in batch.schema if pa.types.is_list(field.type)] for batch in self._batches]
        # Of each column of lists all values side by side, and where each list begins: views of the file.
        self._lists = [
            {name: (batch[name].values.to_numpy(), batch[name].offsets.to_numpy()) for name in names}
            for batch, names in zip(self._batches, lists, strict=True)
        ]
        self._starts = [0, *np.cumsum([len(batch) for batch in self._batches]).tolist()]

    def __reduce__(self) -> Any:  # a data loader's worker maps the file anew
        return Rows, self.folders

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self._batches[0].schema.names)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key in self._lists[0]:
                return [flat[start:end] for flat, offsets in self.lists(key) for start, end in pairwise(offsets)]
            arrays = [batch[key] for batch in self._batches]
            if pa.types.is_primitive(arrays[0].type):
                return np.concatenate([array.to_numpy() for array in arrays])
            return [value for array in arrays for value in array.to_pylist()]
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        position = range(len(self))[key]  # also from the end
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
        """A column of lists, part by part: all values side by side, and where each list begins (and the last ends)."""
        return (lists[name] for lists in self._lists)


def texts(folder: Path) -> Iterator[dict[str, Any]]:
    """The row of each example in the user's own columns, with its place; examples of one row share one dictionary.

    Of a packed block, the row that its first text comes from: only the place where that begins in another block.
    """
    row: dict[str, Any] = {}
    for batch in batches(folder):
        for text in batch.column(WORDS).to_pylist():
            read = json.loads(text)
            # A place alone is that of the row before, or of a text that began in another block.
            if read.keys() != {PLACE} or read[PLACE] != row.get(PLACE):
                row = read
            yield row


def row_id(row: Mapping[str, Any]) -> str:
    """A row's identity: a hash of all its columns, the same for the row as it is read and as it is kept."""
    columns = {name: value for name, value in row.items() if name != PLACE}
    return hashlib.sha256(json.dumps(columns, sort_keys=True, default=readable).encode()).hexdigest()[:16]


def rows_id(folder: Path) -> str:
    """The identity of a split: a hash of which rows it has, whatever their order, number and tokens."""
    # The windows of a long row share it.
    found = {row_id(next(same)) for _, same in groupby(texts(folder), key=id)}
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]


def words(place: str, row: Mapping[str, Any]) -> str:
    """A row as it is kept beside its first example; without columns, as beside its others."""
    return json.dumps({**row, PLACE: place}, ensure_ascii=False, default=readable)


def readable(value: Any) -> Any:
    """What JSON does not know: arrays as lists, bytes by their number, everything else as text."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value.tolist() if hasattr(value, "tolist") else str(value)
