"""What is no file of rows, or unpacks to much more than it is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulltune.data.readers import columnar, read
from fulltune.data.readers.files import list_images
from fulltune.errors import DataError
from fulltune.recipe.selection import Selection
from fulltune.tasks import Target, causal_lm
from fulltune.tasks.padding import cut_long_text
from tests import tiny

ROWS = b"text,label\nrain,weather\nsoup,food\n"


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("rows.csv", ROWS)
    return buffer.getvalue()


PACKED = {"gzip": gzip.compress(ROWS), "bzip2": bz2.compress(ROWS), "xz": lzma.compress(ROWS), "zip": _zip()}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt", "conll"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_under_another_name_are_refused_by_their_kind(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(PACKED[kind])
    with pytest.raises(DataError, match=rf"rows\.{suffix}: is compressed \({kind}.*; unpack it"):
        list(read.locate_data_files([str(path)]).rows())


def test_text_that_begins_as_a_packed_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("BZh is how bzip2 files begin\nPK is a vehicle\n")
    assert len(list(read.locate_data_files([str(tmp_path / "rows.txt")]).rows())) == 2


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: os.mkfifo(path), "is a folder, pipe, socket or device"),
        (lambda path: path.symlink_to("/dev/zero"), "is a folder, pipe, socket or device"),
        (lambda path: path.mkdir(), "is a folder, pipe, socket or device"),
        (lambda path: path.symlink_to("nowhere.csv"), "is a broken link"),
        (lambda path: path.symlink_to(path.name), r"cannot be read \(Too many levels"),
    ],
)
@pytest.mark.parametrize("is_named", [True, False])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], Any], problem: str, is_named: bool) -> None:
    odd = tmp_path / "odd.csv"
    make(odd)
    (tmp_path / "rows.csv").write_bytes(ROWS)
    if is_named and make is not None and odd.is_dir():
        problem = "no data file in this folder"
    with pytest.raises(DataError, match=rf"odd\.csv: {problem}"):
        read.locate_data_files([str(odd if is_named else tmp_path)])


def test_class_folder_without_an_image_is_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog", "__MACOSX", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(DataError) as refusal:
        list_images(tmp_path)
    assert len(refusal.value.problems) == 1
    assert "dog: contains no image" in refusal.value.problems[0]
    (tmp_path / "dog" / "1.png").write_bytes(b"")
    assert len(list_images(tmp_path)) == 2


@pytest.mark.parametrize(
    ("num_rows", "num_bytes", "expected"),
    [(48, 1000, 1000), (0, 0, 1), (1000, 2**30, 62), (10, 2**40, 1), (10**6, 2**30, 1000), (10**6, -5, 1000)],
)
def test_large_rows_are_read_few_at_a_time(num_rows: int, num_bytes: int, expected: int) -> None:
    assert columnar._rows_at_once(num_rows, num_bytes) == expected


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_compressed_arrow_is_read_batch_by_batch(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    table = pa.table({"text": [f"rain {number}" for number in range(2500)]})
    path = tmp_path / "rows.arrow"
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=700)
    assert [row["text"] for _, row in columnar.read_columnar_rows(path, Selection())] == table["text"].to_pylist()


# ---- rows and texts --------------------------------------------------------------------------------------------


def test_beginning_of_a_long_text_gives_the_same_tokens(encoder_tokenizer: Any) -> None:
    text = "the rain in the town " * 5_000
    short = cut_long_text(text, encoder_tokenizer, 128)
    assert len(short) < len(text)
    settings = {"truncation": True, "max_length": 128}
    assert encoder_tokenizer(short, **settings)["input_ids"] == encoder_tokenizer(text, **settings)["input_ids"]


def test_long_text_that_is_short_in_tokens_or_cut_at_the_left_is_left(encoder_tokenizer: Any) -> None:
    class Unknown:
        """Of a word of any length, one token."""

        truncation_side = "right"

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text.split())}

    word = "a" * 200_000
    assert cut_long_text(word, Unknown(), 128) == word  # type: ignore[arg-type]  # of this type
    assert cut_long_text(word, encoder_tokenizer, 128) != word
    encoder_tokenizer.truncation_side = "left"
    try:
        assert cut_long_text(word, encoder_tokenizer, 128) == word
    finally:
        encoder_tokenizer.truncation_side = "right"


def test_packed_rows_beside_others_are_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(ROWS)
    (tmp_path / "all.zip").write_bytes(PACKED["zip"])  # says nothing of rows
    assert len(read.locate_data_files([str(tmp_path)]).files) == 1
    (tmp_path / "more.csv.gz").write_bytes(PACKED["gzip"])
    with pytest.raises(DataError, match=r"more\.csv\.gz: is an archive"):
        read.locate_data_files([str(tmp_path)])


@pytest.mark.parametrize("text", ["raininthetown", " ", "a \n b", "雨", "the rain  in the town \n", "é "])
def test_text_in_parts_says_the_same(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tokenizer, target = tiny.decoder_tokenizer(), Target("text", {"text": "text"})
    [whole] = causal_lm.encode([{"text": text * 50}], target, tokenizer, 10_000)
    monkeypatch.setattr(causal_lm, "PART_CHARACTERS", 64)
    [parts] = causal_lm.encode([{"text": text * 50}], target, tokenizer, 10_000)
    assert tokenizer.decode(parts[0].features["input_ids"]) == tokenizer.decode(whole[0].features["input_ids"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_line_that_is_far_too_long_is_refused_before_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_MAX_LINE", 1_000)
    path = tmp_path / name
    path.write_text(f"text\nshort\n{'word ' * 200}\n{'word ' * 201}\nlast\n")
    with pytest.raises(DataError) as refused:
        list(read.locate_data_files([str(path)]).rows())
    said = "1,001 bytes, expected 1,000 or less; split it"
    assert refused.value.problems == (f"{path}:3: {said}",)


def test_list_of_objects_may_be_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_MAX_LINE", 1_000)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "word"}] * 200))
    assert len(list(read.locate_data_files([str(path)]).rows())) == 200
