"""Several short texts in one row of full length, so that no computation is spent on padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.store import WORDS, record_batch
from fulltune.tasks import LENGTH

if TYPE_CHECKING:
    import pyarrow as pa

OPEN_BLOCKS = 64
"""Blocks that are filled at the same time: a text goes where it leaves the smallest gap (best fit)."""
_BLOCKS_PER_BATCH = 256


@dataclass
class _Block:
    """Texts that share a row."""

    words: str
    """Of the first text."""
    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    size: int = 0

    def features(self) -> dict[str, Any]:
        # Position ids that begin again are what tells transformers' models where a text ends.
        positions = np.concatenate([np.arange(len(ids), dtype=np.int32) for ids in self.ids])
        return {
            "input_ids": np.concatenate(self.ids),
            "labels": np.concatenate(self.labels),
            "position_ids": positions,
            LENGTH: self.size,
        }


def pack(parts: Iterable[pa.RecordBatch], max_length: int) -> Iterator[pa.RecordBatch]:
    """Put texts together into blocks of at most `max_length` tokens; no text is cut."""
    blocks = _fill(parts, max_length)
    while full := list(islice(blocks, _BLOCKS_PER_BATCH)):
        yield record_batch([block.features() for block in full], [block.words for block in full])


def _fill(parts: Iterable[pa.RecordBatch], max_length: int) -> Iterator[_Block]:
    """Best fit among the open blocks; when none fits and there are many, the fullest one is closed."""
    opened: list[_Block] = []
    for ids, labels, words in _texts(parts):
        fitting = [block for block in opened if block.size + len(ids) <= max_length]
        block = max(fitting, key=lambda block: block.size, default=None)
        if block is None:
            if len(opened) == OPEN_BLOCKS:
                fullest = max(opened, key=lambda block: block.size)
                opened.remove(fullest)
                yield fullest
            block = _Block(words)
            opened.append(block)
        block.ids.append(ids)
        block.labels.append(labels)
        block.size += len(ids)
        if block.size == max_length:
            opened.remove(block)
            yield block
    yield from opened


def _texts(parts: Iterable[pa.RecordBatch]) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    for part in parts:
        ids, labels = (part.column(name) for name in ("input_ids", "labels"))
        ends = ids.offsets.to_numpy()
        flat_ids, flat_labels = ids.values.to_numpy(), labels.values.to_numpy()
        for position, words in enumerate(part.column(WORDS).to_pylist()):
            place = slice(ends[position], ends[position + 1])
            yield flat_ids[place], flat_labels[place], words
