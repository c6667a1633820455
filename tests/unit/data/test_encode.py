"""Tokenising on all cores gives what one process gives, in order, and reads only a little ahead."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.data import encode
from fulltune.data.encode import EncodedSource, Job
from fulltune.data.readers.read import LocatedRow
from fulltune.errors import SetupError
from fulltune.inference.store import Rows, read_original_rows
from fulltune.recipe.data import DataBlock
from fulltune.tasks import Target
from tests import tiny

TARGET = Target("single_label", {"text": "text", "label": "label"}, ("food", "weather"))
BLOCK = DataBlock(train="train.csv")
DROPPING = DataBlock(train="train.csv", truncation_strategy="drop")
WORKERS = 2


def placed(rows: list[dict[str, Any]]) -> list[LocatedRow]:
    return [(f"train.csv:{line}", row) for line, row in enumerate(rows, start=2)]


ROWS = [{**row, "text": row["text"] + " and" * (number % 7)} for number, row in enumerate(tiny.topic_rows(60))]
ROWS[11] = {"text": "  ", "label": "food"}
ROWS[12] = {"text": "rain " * 60, "label": "weather"}


@pytest.fixture
def job(encoder_tokenizer: Any) -> Job:
    return Job("text-classification", BLOCK, TARGET, encoder_tokenizer, 48)


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "ROWS_WORTH_PROCESSES", 1)
    monkeypatch.setattr(encode, "ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(encode, "num_cores", lambda: WORKERS)


def run(job: Job, rows: list[LocatedRow], folder: Path) -> EncodedSource:
    return encode.encode_source(job, iter(rows), len(rows), folder, lambda done: None, lambda item: None)


def numbers(source: EncodedSource) -> dict[str, Any]:
    values = {field.name: getattr(source, field.name) for field in dataclasses.fields(source) if field.name != "folder"}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


@pytest.mark.parametrize("drop", [False, True], ids=["truncate", "drop"])
def test_many_processes_give_the_files_and_numbers_of_one(
    job: Job, drop: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = dataclasses.replace(job, block=DROPPING if drop else BLOCK)
    alone = run(job, placed(ROWS), tmp_path / "one")
    request.getfixturevalue("in_processes")
    done: list[int] = []
    many = encode.encode_source(job, iter(placed(ROWS)), len(ROWS), tmp_path / "many", done.append, lambda item: None)

    assert done == [*range(7, 57, 7), 60]
    assert numbers(many) == numbers(alone)
    assert (tmp_path / "many" / "rows.arrow").read_bytes() == (tmp_path / "one" / "rows.arrow").read_bytes()


@pytest.mark.usefixtures("in_processes")
def test_work_is_done_in_other_processes(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("a worker that is not forked does not know what was replaced here")
    plain = encode.row_as_json
    monkeypatch.setattr(encode, "row_as_json", lambda place, row: plain(str(os.getpid()), row))
    run(job, placed(ROWS), tmp_path)
    pids = {row["fulltune:place"] for row in read_original_rows(tmp_path)}
    assert str(os.getpid()) not in pids
    assert 1 <= len(pids) <= WORKERS


@pytest.mark.usefixtures("in_processes")
def test_order_is_the_files(job: Job, tmp_path: Path) -> None:
    source = run(job, placed(ROWS), tmp_path)
    expected = [place for place, row in placed(ROWS) if row["text"].strip()]
    assert [row["fulltune:place"] for row in read_original_rows(tmp_path)] == expected
    assert np.asarray(source.row_of).tolist() == list(range(59))
    assert [source.label_sets[number] for number in source.labels[:4]] == [("weather",), ("food",)] * 2
    labels = [row["label"] for row in ROWS if row["text"].strip()]
    assert [TARGET.labels[label] for label in Rows(tmp_path)["labels"]] == labels


def test_rows_dropped_are_named_with_their_places(job: Job, tmp_path: Path) -> None:
    source = run(dataclasses.replace(job, block=DROPPING), placed(ROWS), tmp_path)
    tally = source.tally
    assert [tally.first["unusable", "no text"][0][0], tally.first["unfit", "too long"][0][0]] == [
        "train.csv:13",
        "train.csv:14",
    ]
    assert [tally.of(loss).total() for loss in ("unusable", "unfit", "part", "too long")] == [1, 1, 0, 1]
    assert (source.num_read, source.num_rows, source.num_dropped) == (60, 58, 2)
    assert len(Rows(tmp_path)) == len(source.lengths) == 58
    assert Rows(tmp_path)["length"].tolist() == source.lengths.tolist()
    assert source.longest == max(source.lengths) <= 48


def test_row_with_a_label_that_train_lacks_is_counted_and_not_tokenised(job: Job, tmp_path: Path) -> None:
    rows = tiny.topic_rows(6)
    rows[3]["label"] = "sport"
    job = dataclasses.replace(job, source="test", known_labels=frozenset(TARGET.labels))
    source = run(job, placed(rows), tmp_path)
    assert source.names == ["food", "sport", "weather"]
    assert source.num_rows == 6
    assert np.asarray(source.row_of).tolist() == [0, 1, 2, 4, 5]
    assert len(Rows(tmp_path)) == 5


@pytest.mark.usefixtures("in_processes")
@pytest.mark.skipif(sys.platform != "linux", reason="a worker that is not forked does not know what was replaced here")
def test_killed_worker_is_a_setup_error(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, here = encode.encode_chunk, os.getpid()

    def killed(job: Job, chunk: list[LocatedRow]) -> encode.Chunk:
        if chunk[0][0] == "train.csv:16" and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(job, chunk)

    monkeypatch.setattr(encode, "encode_chunk", killed)
    with pytest.raises(SetupError, match=r"a tokenising process was killed.* because memory ran out; close other"):
        run(job, placed(ROWS), tmp_path)


@pytest.mark.usefixtures("in_processes")
def test_source_is_read_only_a_little_ahead(job: Job, tmp_path: Path) -> None:
    num_read = 0

    def source() -> Iterator[LocatedRow]:
        nonlocal num_read
        for number in range(700):
            num_read += 1
            yield f"a:{number}", ROWS[number % 11]

    ahead: list[int] = []
    encode.encode_source(job, source(), 700, tmp_path, lambda done: ahead.append(num_read - done), lambda item: None)

    assert num_read == 700
    assert len(ahead) == 100
    assert max(ahead) <= 2 * WORKERS * 7 + 1  # the row that begins the next chunk
