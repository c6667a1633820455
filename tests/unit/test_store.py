"""Prepared rows on disk: what is written is read, without copies, from any number of batches."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.inference import store
from fulltune.inference.store import (
    Rows,
    make_record_batch,
    read_original_rows,
    read_record_batches,
    row_as_json,
    write_rows,
)


def features(number: int) -> dict[str, Any]:
    return {
        "input_ids": list(range(number, number + number % 5)),
        "vector": [number / 2, 0.0, 1.0],
        "pixels": np.arange(4, dtype=np.uint8) + number,
        "labels": number,
        "value": number + 0.25,
        "text": f"é {number}",
        "raw": bytes([number, 0]),
    }


WRITTEN = [features(number) for number in range(50)]


def write(folder: Path, rows: Sequence[Mapping[str, Any]], at_once: int) -> Rows:
    kept = [row_as_json(f"train.csv:{place}", {"text": "é"}) for place in range(len(rows))]
    starts = range(0, len(rows), at_once)
    write_rows(folder, (make_record_batch(rows[at : at + at_once], kept[at : at + at_once]) for at in starts))
    return Rows(folder)


@pytest.fixture(params=[8192, 7], ids=["one batch", "many batches"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rows]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_ROWS_PER_BATCH", request.param)
        yield write(tmp_path, WRITTEN, at_once=3)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def test_rows_of_several_folders_stand_one_after_the_other(rows: Rows, tmp_path: Path) -> None:
    more = write(tmp_path / "more", WRITTEN[:5], at_once=2)
    sent = pickle.dumps(Rows(*rows.folders, *more.folders))
    assert len(sent) < 1000, "a data loader's worker maps the files anew"
    both = pickle.loads(sent)
    assert [plain(row) for row in both] == [plain(row) for row in [*WRITTEN, *WRITTEN[:5]]]
    assert both["labels"].tolist() == [*range(50), *range(5)]


def test_rows_written_are_read_back(rows: Rows) -> None:
    assert len(rows) == 50
    assert tuple(rows[0]) == tuple(WRITTEN[0])
    assert [plain(row) for row in rows] == [plain(row) for row in WRITTEN]
    kinds = {name: value.dtype for name, value in rows[4].items() if isinstance(value, np.ndarray)}
    assert kinds == {"input_ids": np.int32, "vector": np.float32, "pixels": np.uint8}
    assert {type(rows[4][name]) for name in ("labels", "value", "text", "raw")} == {int, float, str, bytes}


def test_rows_large_are_flushed_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BYTES_PER_BATCH", 1000)
    write(tmp_path, [{"input_ids": list(range(200))}] * 10, at_once=1)
    assert [len(batch) for batch in read_record_batches(tmp_path)] == [2] * 5


def test_lists_are_views_of_the_file(rows: Rows) -> None:
    first, again = rows[4]["input_ids"], rows[4]["input_ids"]
    assert np.shares_memory(first, again)
    assert not first.flags.owndata
    assert not first.flags.writeable


def test_index_negative_numpy_and_slices(rows: Rows) -> None:
    assert plain(rows[-1]) == plain(WRITTEN[-1])
    assert plain(rows[np.int64(9)]) == plain(WRITTEN[9])
    assert [row["labels"] for row in rows[5:20:6]] == [5, 11, 17]
    assert [row["labels"] for row in rows[-2:]] == [48, 49]
    assert rows[60:] == []
    for outside in (50, -51):
        with pytest.raises(IndexError):
            rows[outside]


def test_column_is_one_array_or_a_list_of_arrays(rows: Rows) -> None:
    assert rows["labels"].tolist() == list(range(50))
    assert rows["value"].dtype == np.float64
    assert [ids.tolist() for ids in rows["input_ids"]] == [row["input_ids"] for row in WRITTEN]
    assert rows["text"] == [row["text"] for row in WRITTEN]
    assert rows["raw"] == [row["raw"] for row in WRITTEN]


def test_lists_of_all_rows_come_part_by_part(rows: Rows) -> None:
    found = [flat[start:end].tolist() for flat, offsets in rows.lists("input_ids") for start, end in pairwise(offsets)]
    assert found == [row["input_ids"] for row in WRITTEN]


def test_texts_are_the_rows_in_the_users_columns(tmp_path: Path) -> None:
    rows = [{"text": "é", "raw": b"12345", "nested": {"a": [1, None]}}, {"text": "b", "raw": b"", "nested": {}}]
    kept = [row_as_json(f"a.csv:{i}", rows[i]) for i in (0, 1)]
    write_rows(tmp_path, [make_record_batch([{"labels": 0}, {"labels": 1}], kept)])
    assert list(read_original_rows(tmp_path)) == [
        {"text": "é", "raw": "<5 bytes>", "nested": {"a": [1, None]}, "fulltune:place": "a.csv:0"},
        {"text": "b", "raw": "<0 bytes>", "nested": {}, "fulltune:place": "a.csv:1"},
    ]
    assert "é" in row_as_json("a", rows[0])
    assert json.loads(row_as_json("a", {"n": np.int64(3)})) == {"n": 3, "fulltune:place": "a"}


def test_texts_of_a_rows_other_examples_are_those_of_its_first(tmp_path: Path) -> None:
    """Windows of a long row have only its place; a file of an earlier version has the row beside each of them."""
    long, short = {"text": "long"}, {"text": "short"}
    kept = [
        row_as_json("a:1", long),
        row_as_json("a:1", {}),
        row_as_json("a:2", short),
        row_as_json("a:3", long),
        row_as_json("a:3", long),
    ]
    write_rows(tmp_path, [make_record_batch([{"labels": number}], [text]) for number, text in enumerate(kept)])
    found = list(read_original_rows(tmp_path))
    assert [(row["fulltune:place"], row["text"]) for row in found] == [
        ("a:1", "long"),
        ("a:1", "long"),
        ("a:2", "short"),
        ("a:3", "long"),
        ("a:3", "long"),
    ]
    assert found[0] is found[1]
