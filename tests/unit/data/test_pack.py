"""Packing: whole texts side by side, each token once, no block too long, little room left."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.data import limits as packing
from fulltune.data.limits import pack_texts
from fulltune.inference.store import Rows, make_record_batch, read_original_rows, row_as_json, write_rows

LIMIT = 100


def parts(lengths: list[int], at_once: int = 50) -> Iterator[Any]:
    """Batches of texts whose tokens are all different."""
    start = 0
    rows = []
    for length in lengths:
        ids = list(range(start, start + length))
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "length": length})
        start += length
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once]
        yield make_record_batch(part, [row_as_json(f"a.txt:{first + place}", {}) for place in range(len(part))])


def packed(lengths: list[int], folder: Path) -> Rows:
    write_rows(folder, pack_texts(parts(lengths), LIMIT))
    return Rows(folder)


def drawn(count: int, longest: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(2, longest) for _ in range(count)]


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    return drawn(3000, LIMIT)


@pytest.fixture(scope="module")
def blocks(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return packed(lengths, tmp_path_factory.mktemp("packed"))


def test_pack_no_token_is_lost_or_doubled(lengths: list[int], blocks: Rows) -> None:
    counts = Counter(np.concatenate(blocks["input_ids"]).tolist())
    assert counts == Counter(range(sum(lengths)))


def test_pack_no_text_is_cut_and_positions_begin_again(lengths: list[int], blocks: Rows) -> None:
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    whole = {start: list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)}
    number = 0
    for block in blocks:
        begins = np.flatnonzero(block["position_ids"] == 0).tolist()
        for start, end in zip(begins, [*begins[1:], block["length"]], strict=True):
            ids = block["input_ids"][start:end].tolist()
            assert ids == whole[ids[0]]
            assert block["position_ids"][start:end].tolist() == list(range(end - start))
            assert block["labels"][start:end].tolist() == [-100, *ids[1:]]
            number += 1
    assert number == len(lengths)


@pytest.mark.parametrize("longest", [10, 50, LIMIT])
def test_pack_blocks_are_nearly_full(longest: int, tmp_path: Path) -> None:
    lengths = drawn(3000, longest, seed=1)
    assert sum(lengths) / (len(packed(lengths, tmp_path)) * LIMIT) >= 0.95


def test_pack_words_are_the_first_texts(tmp_path: Path) -> None:
    packed([60, 100, 40, 30], tmp_path)
    # The longest texts first; the 30 stay alone.
    assert [row["fulltune:place"] for row in read_original_rows(tmp_path)] == ["a.txt:1", "a.txt:0", "a.txt:3"]


def test_pack_holds_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded however many texts there are."""
    monkeypatch.setattr(packing, "TEXTS_PACKED_TOGETHER", 64)
    taken = 0

    def counted() -> Iterator[Any]:
        nonlocal taken
        for part in parts([60] * 500, at_once=1):
            taken += 1
            yield part

    first = next(pack_texts(counted(), LIMIT))
    assert taken == 64
    assert first.column("length").to_pylist() == [60] * 64
