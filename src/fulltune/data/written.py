"""A split's rows as they are written, counted and shown; and the list of those that are dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.audit.texts import masked_cells, masked_text
from fulltune.data.encode import Dropped, Encoded
from fulltune.data.limits import pack
from fulltune.data.split import SPLITS, Split
from fulltune.errors import DataError
from fulltune.inference.store import WORDS, Rows, RowWriter, batches, readable, save_clusters, save_in_train, texts
from fulltune.records.data import Preview, SplitName, SplitSummary
from fulltune.tasks import PLACE, Target, Task

if TYPE_CHECKING:
    import pyarrow as pa

DROPPED = "dropped.jsonl"
_LOOKED_AT = 200
"""Rows among which some are chosen to be shown."""


def as_line(item: Dropped) -> str:
    """A dropped row as it is listed."""
    plain = json.loads(json.dumps(asdict(item), default=readable))
    return json.dumps(masked_cells(plain), ensure_ascii=False) + "\n"


def list_dropped(folder: Path, items: Iterable[Dropped]) -> None:
    """Write rows down that were dropped, behind those that are listed already."""
    with (folder / DROPPED).open("a", encoding="utf-8") as file:
        file.writelines(map(as_line, items))


def kept_rows(whole: Encoded, wanted: np.ndarray) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, place and cells of the wanted rows of a source, bool [rows], in their order."""
    if not wanted.any():  # of no row at all, nothing was written
        return
    first = np.diff(whole.row_of, prepend=-1) > 0  # a row's first example has the row's words
    start = 0
    for batch in batches(whole.folder):
        row_of, is_first = whole.row_of[start : start + len(batch)], first[start : start + len(batch)]
        start += len(batch)
        for place in np.flatnonzero(wanted[row_of] & is_first):
            row = json.loads(batch.column(WORDS)[int(place)].as_py())
            yield int(row_of[place]), row.pop(PLACE), row


def examples(split: Split, task: Task, scored: bool = False) -> Iterator[pa.RecordBatch]:
    """A split's examples; without what only answers need, unless they are scored in the end."""
    import pyarrow as pa

    without = () if scored else getattr(task, "ONLY_FOR_TEST_ROWS", ())
    start = 0
    for batch in batches(split.source.folder):
        mask = split.examples[start : start + len(batch)]
        start += len(batch)
        if mask.any():
            batch = batch.select([feature for feature in batch.schema.names if feature not in without])
            yield batch if mask.all() else batch.filter(pa.array(mask))


def write(folder: Path, parts: Iterable[pa.RecordBatch]) -> None:
    """Rows into a folder's file."""
    with RowWriter(folder) as writer:
        for part in parts:
            writer.write(part)


def summarise(split: Split, lengths: np.ndarray, dropped_rows: int) -> SplitSummary:
    """The counts of a split."""
    whole, chosen = split.source, split.examples
    ordered = np.sort(lengths)
    labels = split.label_counts(np.bincount(whole.row_of[chosen], minlength=whole.num_rows))
    return SplitSummary(
        rows=len(ordered),
        tokens=int(ordered.sum()),
        trained_tokens=int(whole.trained_tokens[chosen].sum()),
        truncated_rows=int(whole.truncated[chosen].sum()),
        dropped_rows=dropped_rows,
        length_percentiles={
            "p50": int(ordered[len(ordered) // 2]),
            "p95": int(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]),
            "max": int(ordered[-1]),
        },
        label_counts=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
    )


def write_splits(
    folder: Path, task: Task, splits: Mapping[SplitName, Split], packed_to: int | None, late: int
) -> dict[SplitName, SplitSummary]:
    """Each split into a folder of its own; train rows that share a row of `packed_to` tokens, where that is given.
    `late` rows of the train file are in no split."""
    summaries: dict[SplitName, SplitSummary] = {}
    for name in SPLITS:
        split, whole = splits[name], splits[name].source
        if not split.examples.any():
            raise DataError(f"{whole.where}: no row of {name} is left: all are longer than data.max_length")
        parts = examples(split, task, scored=name == "test")
        write(folder / name, pack(parts, packed_to) if packed_to and name == "train" else parts)
        if name != "train":
            save_clusters(folder / name, whole.sides[whole.row_of][split.examples])
        if name == "test":
            save_in_train(folder / name, np.isin(whole.groups[whole.row_of][split.examples], splits["train"].groups))
        dropped = whole.num_dropped + late * (name == "train") if split.is_file else 0
        summaries[name] = summarise(split, Rows(folder / name)["length"], dropped)
    return summaries


def previews(folder: Path, task: Task, target: Target, tokenizer: Any, span: range, most: int) -> tuple[Preview, ...]:
    """Some rows as the model sees them: the first ones without secrets or personal data, which are shown nowhere."""
    rows, found = Rows(folder), list[Preview]()
    for position, words in enumerate(islice(texts(folder), span.start, min(span.stop, span.start + _LOOKED_AT))):
        if len(found) == most:
            break
        row = rows[span.start + position]
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        preview = task.preview(plain, target, tokenizer)
        told = "".join(segment.text for segment in preview.segments)
        if all(masked_text(text) == text for text in (json.dumps(words, ensure_ascii=False, default=readable), told)):
            found.append(preview)
    return tuple(found)
