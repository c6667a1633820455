from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fulltune.audit.texts import CHEAP_CHECKS, MAX_CHECKED, found_by, iterate_texts, masked_cells, select_checks
from fulltune.data.contamination import ForbiddenTexts, mark_rows_with_forbidden_text
from fulltune.data.groups import (
    RowCounts,
    hash_to_number,
    join_by_value,
    join_near_duplicates,
    minhash,
    parse_groups_and_times,
)
from fulltune.data.readers.read import LocatedRow
from fulltune.errors import SetupError
from fulltune.inference.store import make_record_batch, row_as_json, write_rows
from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import TaskName
from fulltune.system.hardware import num_cores
from fulltune.tasks import LENGTH, Example, Refused, Row, Target, Task, task_named
from fulltune.tasks.columns import in_batches, normalised, why_unreadable

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CHUNK = 1000
CHUNK_BYTES = 2 * 2**20
"""Bytes of text per chunk. Tokenising takes up to 170 times the text's memory."""
ROWS_WORTH_PROCESSES = 20_000

NEW_LABEL = "label not in train"

DropKind = Literal["unusable", "unfit", "part"]
"""`unusable`: refused before tokenising. `unfit`: too long, or without a trained token. `part`: only some of a row's
examples were dropped."""


@dataclass(frozen=True)
class Job:
    """Settings that every worker needs to encode a source."""

    task: TaskName
    block: DataBlock
    target: Target
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    source: str = "train"
    where: str = ""
    is_mixed: bool = False
    known_labels: frozenset[str] | None = None
    forbidden: ForbiddenTexts | None = None


@dataclass(frozen=True)
class DroppedRow:
    """A dropped row, or a dropped example of a row."""

    split: str
    place: str
    check: str
    reason: str
    row: dict[str, Any]
    """Cells of the row; empty for all but the first of its dropped examples."""


@dataclass(frozen=True)
class EncodedSource:
    """In-memory data about the rows and examples of a source or chunk. Arrays that the recipe does not need are
    empty."""

    where: str
    target: Target
    num_read: int
    row_of: np.ndarray
    """Index of each example's row: int64 [examples]."""
    lengths: np.ndarray
    trained_tokens: np.ndarray
    truncated: np.ndarray
    groups: np.ndarray
    """Hash of each row's group key, equal for near duplicates: uint64 [rows]."""
    pairs: np.ndarray
    """Hash of each row's query and positive, in any order: uint64 [rows]."""
    split_groups: np.ndarray
    """Number of each row's group, which must stay in one split: uint64 [rows]."""
    signatures: np.ndarray
    """MinHash of each row's group key: uint16 [rows, 128]."""
    group_values: np.ndarray
    """Hash of each row's `data.group` cell: uint64 [rows]."""
    times: np.ndarray
    holds_forbidden: np.ndarray
    labels: np.ndarray
    """Index of each row's labels in `label_sets`: int64 [rows]."""
    label_sets: tuple[tuple[str, ...], ...]
    tally: RowCounts
    longest: int
    folder: Path = Path()

    @property
    def num_rows(self) -> int:
        """Number of rows with at least one example."""
        return len(self.groups)

    @property
    def num_dropped(self) -> int:
        """Number of rows without an example."""
        return self.tally.of("unusable").total() + self.tally.of("unfit").total()

    @property
    def names(self) -> list[str]:
        return sorted(set().union(*self.label_sets))


_ARRAY_FIELDS = (
    *("lengths", "trained_tokens", "truncated"),
    *("groups", "pairs", "signatures", "group_values", "times", "holds_forbidden"),
)
Chunk = tuple[EncodedSource, "pa.RecordBatch | None", list[DroppedRow]]


def _concatenate_chunks(parts: Sequence[EncodedSource], folder: Path) -> EncodedSource:
    """Join the chunks of a source whose examples are stored in `folder`."""
    sets: dict[tuple[str, ...], int] = {}
    labels, row_of, tally, num_rows = [], [], RowCounts(), 0
    for part in parts:
        places = [sets.setdefault(names, len(sets)) for names in part.label_sets]
        labels.append(np.array(places, np.int64)[part.labels])
        row_of.append(part.row_of + num_rows)
        num_rows += part.num_rows
        tally.merge(part.tally)
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAY_FIELDS}
    return replace(
        parts[0],
        **columns,
        row_of=np.concatenate(row_of),
        labels=np.concatenate(labels),
        label_sets=tuple(sets),
        tally=tally,
        num_read=sum(part.num_read for part in parts),
        longest=max(part.longest for part in parts),
        folder=folder,
        split_groups=columns["groups"],
    )


def encode_chunk(job: Job, chunk: list[LocatedRow]) -> Chunk:
    """Check and tokenise some rows. Return their `EncodedSource`, a batch of their examples (None if no example is
    left), and the dropped rows."""
    task, block, tally, dropped = task_named(job.task), job.block, RowCounts(), list[DroppedRow]()

    def drop(kind: DropKind, location: str, row: Row, refused: Refused) -> None:
        tally.add(kind, refused.check, location, refused.reason)
        dropped.append(DroppedRow(job.source, location, refused.check, refused.reason, dict(row)))

    usable: list[LocatedRow] = []
    for place, row in chunk:
        if refused := _why_row_unusable(job, task, row):
            drop("unusable", place, row, refused)
        else:
            usable.append((place, row))
    examples, row_of, texts, rows = list[Example](), list[int](), list[str](), list[LocatedRow]()
    for (place, row), row_examples in zip(
        usable, _tokenise_known_labels(job, task, [row for _, row in usable]), strict=True
    ):
        if row_examples is None:
            if job.is_mixed:
                drop("unfit", place, row, Refused(NEW_LABEL, "its label does not occur in the task's train rows"))
            else:
                rows.append((place, row))
            continue
        if any(example.truncated for example in row_examples):
            tally.add("too long", "", place)
        refusals = [_why_example_dropped(example, block.truncation_strategy == "drop") for example in row_examples]
        good = [example for example, refusal in zip(row_examples, refusals, strict=True) if refusal is None]
        lost = list(filter(None, refusals)) if row_examples else [Refused("nothing to train", "no token")]
        if not good:
            drop("unfit", place, row, lost[0])
            continue
        for number, refused in enumerate(lost):  # the row is listed once, however many examples are dropped
            drop("part", place, {} if number else row, refused)
        if good[0].thinking:
            tally.counts["thinking", good[0].thinking] += 1
        examples += good
        row_of += [len(rows)] * len(good)
        # A row's cells are stored with its first example only, its location with each.
        texts += [row_as_json(place, row), *[row_as_json(place, {})] * (len(good) - 1)]
        rows.append((place, row))
    features = [
        {**example.features, LENGTH: example.features.get(LENGTH, len(example.features.get("input_ids", ())))}
        for example in examples
    ]
    keys = [task.group_key(row, job.target) for _, row in rows]
    values, times = parse_groups_and_times(
        rows, block.group, block.time if job.source == "train" else None, block.split_seed, tally
    )
    sets: dict[tuple[str, ...], int] = {}
    labels = [sets.setdefault(tuple(task.row_labels(row, job.target)), len(sets)) for _, row in rows]
    _add_text_flaws_to_tally(job, (row for _, row in rows), tally)
    groups = np.array([hash_to_number(block.split_seed, key) for key in keys], np.uint64)
    both = [task.row_texts(row, job.target)[:2] for _, row in rows] if task.FACTS.completes_rows else []
    numbers = EncodedSource(
        where=job.where,
        target=job.target,
        num_read=len(chunk),
        row_of=np.array(row_of, np.int64),
        lengths=np.array([row[LENGTH] for row in features], np.int32),
        trained_tokens=np.array([example.trained_tokens for example in examples], np.int32),
        truncated=np.array([example.truncated for example in examples], bool),
        groups=groups,
        pairs=np.array([hash_to_number(block.split_seed, str(sorted(map(normalised, of)))) for of in both], np.uint64),
        split_groups=groups,
        signatures=minhash(keys if block.near_duplicates < 1 else []),
        group_values=values,
        times=times,
        holds_forbidden=mark_rows_with_forbidden_text(job.forbidden, keys, rows, job.target),
        labels=np.array(labels, np.int64),
        label_sets=tuple(sets),
        tally=tally,
        longest=max((one.longest or row[LENGTH] for one, row in zip(examples, features, strict=True)), default=0),
    )
    return numbers, make_record_batch(features, texts) if examples else None, dropped


def _why_row_unusable(job: Job, task: Task, row: Row) -> Refused | None:
    if problem := why_unreadable(row, job.target.columns):
        return Refused("unreadable", problem)
    if (refused := task.why_unusable(row, job.target)) is None:
        return None
    # The second call returns a reason that quotes no private data.
    return task.why_unusable(masked_cells(row), job.target) or refused


def _add_text_flaws_to_tally(job: Job, rows: Iterable[Row], tally: RowCounts) -> None:
    columns = job.target.columns
    checks = select_checks(columns, CHEAP_CHECKS)
    for row in rows:
        of_parts = ((text, of) for part, of in checks.items() for _, text in iterate_texts(row, columns, part))
        tally.counts.update({("flaw", check) for text, of in of_parts for check in found_by(text[:MAX_CHECKED], of)})


def _tokenise_known_labels(job: Job, task: Task, rows: Sequence[Row]) -> list[list[Example] | None]:
    """Return each row's examples, or None if its label is not in `job.known_labels`."""
    labels = job.known_labels
    is_known = [labels is None or labels.issuperset(task.row_labels(row, job.target)) for row in rows]
    wanted = [row for row, has_known_label in zip(rows, is_known, strict=True) if has_known_label]
    encoded = iter(task.encode(wanted, job.target, job.tokenizer, job.max_length) if wanted else ())
    return [next(encoded) if has_known_label else None for has_known_label in is_known]


def _why_example_dropped(example: Example, drop_truncated: bool) -> Refused | None:
    if example.refused is not None:
        return example.refused
    if example.trained_tokens == 0:
        cut_off = Refused("answer cut off", "the whole answer is beyond data.max_length")
        return cut_off if example.truncated else Refused("nothing to train", "no token is trained")
    if example.truncated and drop_truncated:
        return Refused("too long", "longer than data.max_length")
    return None


def encode_source(
    job: Job,
    rows: Iterable[LocatedRow],
    num_rows: int,
    folder: Path,
    report_num_read: Callable[[int], None],
    record_dropped: Callable[[DroppedRow], None],
) -> EncodedSource:
    """Tokenise a source into `folder`, reporting the number of rows read so far. Raises `SetupError` if a worker was
    killed."""
    parts = list[EncodedSource]()

    def encoded_batches() -> Iterator[pa.RecordBatch]:
        for part, batch, dropped in _encode_chunks(job, rows, num_rows):
            for item in dropped:
                record_dropped(item)
            if batch is not None:
                yield batch
            parts.append(part)
            report_num_read(sum(done.num_read for done in parts))

    write_rows(folder, encoded_batches())
    return _concatenate_chunks(parts, folder)


def join_groups_of_sources(sources: Mapping[str, EncodedSource], threshold: float) -> dict[str, EncodedSource]:
    """Return the sources with new `groups`, which join near duplicates and mirrored pairs, and `split_groups`,
    which also join rows of equal `data.group`. `threshold` is a Jaccard similarity."""
    if threshold >= 1 and not any(len(one.group_values) + len(one.pairs) for one in sources.values()):
        return dict(sources)
    ends = np.cumsum([source.num_rows for source in sources.values()])[:-1]
    groups, pairs, signed, values = (
        np.concatenate([getattr(source, name) for source in sources.values()])
        for name in ("groups", "pairs", "signatures", "group_values")
    )
    groups = join_near_duplicates(groups, signed, threshold) if threshold < 1 else groups
    groups = join_by_value(pairs, groups) if len(pairs) else groups
    split_groups = join_by_value(groups, values) if len(values) else groups
    parts = zip(np.split(groups, ends), np.split(split_groups, ends), strict=True)
    return {
        name: replace(source, groups=of_groups, split_groups=of_split_groups)
        for (name, source), (of_groups, of_split_groups) in zip(sources.items(), parts, strict=True)
    }


def _encode_chunks(job: Job, rows: Iterable[LocatedRow], expected_rows: int) -> Iterator[Chunk]:
    """Yield encoded chunks in order, using worker processes if `expected_rows` is large."""
    pieces = in_batches(rows, ROWS_PER_CHUNK, CHUNK_BYTES)
    num_workers = num_cores()
    if expected_rows < ROWS_WORTH_PROCESSES or num_workers == 1:
        yield from (encode_chunk(job, piece) for piece in pieces)
        return
    # A forked worker shares the tokenizer, but forking is safe only on Linux.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(num_workers, context, _init_worker, (job,)) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(_encode_in_worker, piece))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (KeyboardInterrupt, GeneratorExit):
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BrokenProcessPool:
            raise SetupError(
                "data: a tokenising process was killed, probably by the kernel because memory ran out; close other "
                "programs, or split the file"
            ) from None


_job: Job | None = None


def _init_worker(job: Job) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # other workers use the other cores
    _job = job


def _encode_in_worker(piece: list[LocatedRow]) -> Chunk:
    assert _job is not None, "_init_worker runs first"
    return encode_chunk(_job, piece)
