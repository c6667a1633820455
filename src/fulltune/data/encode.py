"""Check and tokenise a source once, on all cores, into an arrow file; memory does not grow with the rows' texts."""

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

from fulltune.audit.texts import CHEAP, LOOKED_AT, cells, checks_of, found_by, masked_cells
from fulltune.data.contamination import KnownTexts, holding
from fulltune.data.groups import RowCounts, draw, joined, joined_by_value, marks_of, signatures
from fulltune.data.readers.read import PlacedRow
from fulltune.errors import SetupError
from fulltune.inference.store import record_batch, words, write_rows
from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import TaskName
from fulltune.system.hardware import num_cores
from fulltune.tasks import LENGTH, Example, Refused, Target, Task, task_named
from fulltune.tasks.columns import unreadable, windows

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CHUNK = 1000
CHUNK_BYTES = 2 * 2**20
"""Tokenising takes up to 170 times the memory of the text."""
ROWS_WORTH_PROCESSES = 20_000
"""With fewer rows the processes would cost more time than they save."""

NEW_LABEL = "label not in train"

Loss = Literal["unusable", "unfit", "part"]
"""Why something is dropped: a row holds nothing to learn from; tokenising showed that it is too long, or that nothing
in it is trained; the same of some examples of a row that keeps others."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know about a source."""

    task: TaskName
    block: DataBlock
    target: Target
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    source: str = "train"
    where: str = ""
    """The source's file, for messages."""
    is_mixed: bool = False
    """The rows are mixed into the train rows: one with another label is dropped, and one may say not whose it is."""
    known_labels: frozenset[str] | None = None
    """The train rows' labels: a row with another one is counted and not tokenised, for it will be refused."""
    known: KnownTexts | None = None
    """Texts that must not be trained on."""


@dataclass(frozen=True)
class Dropped:
    """A row that is dropped, or a part of one."""

    split: str
    place: str
    check: str
    reason: str
    row: dict[str, Any]
    """Empty for a further lost part of a row that stands before it."""


@dataclass(frozen=True)
class Encoded:
    """A few numbers about each example of a source, or of some of its rows, and about each row that gave one."""

    where: str
    target: Target
    num_read: int
    row_of: np.ndarray
    """The row that each example comes from, from 0: int64 [examples]."""
    lengths: np.ndarray
    """Tokens: int32 [examples]."""
    trained_tokens: np.ndarray
    """int32 [examples]."""
    truncated: np.ndarray
    """bool [examples]."""
    groups: np.ndarray
    """`draw` of each row's group key: uint64 [rows]."""
    sides: np.ndarray
    """The group of each row that a split never separates: uint64 [rows]; as `groups`, or larger."""
    signatures: np.ndarray
    """Of each row's group key: uint16 [rows, hashes]; without rows where near-duplicates are not looked for."""
    values: np.ndarray
    """`draw` of whose each row is: uint64 [rows]; without rows where no column says so."""
    times: np.ndarray
    """When each row came, as numbers in the order of time: float64 [rows]; without rows where no column says so."""
    holds_known: np.ndarray
    """Whether each row holds a text that must not be trained on: bool [rows]; without rows where none is named."""
    labels: np.ndarray
    """The place of each row's labels in `label_sets`: int64 [rows]."""
    label_sets: tuple[tuple[str, ...], ...]
    tally: RowCounts
    """What was dropped, too long, or wrong with texts; and what the columns of `data.group` and `data.time` hold."""
    longest: int
    folder: Path = Path()
    """Where the examples of a whole source lie."""

    @property
    def num_rows(self) -> int:
        """Rows that gave at least one example."""
        return len(self.groups)

    @property
    def num_dropped(self) -> int:
        """Rows that gave none."""
        return self.tally.of("unusable").total() + self.tally.of("unfit").total()

    @property
    def names(self) -> list[str]:
        """All labels, sorted."""
        return sorted(set().union(*self.label_sets))


_COLUMNS = (
    *("lengths", "trained_tokens", "truncated"),
    *("groups", "signatures", "values", "times", "holds_known"),
)
Chunk = tuple[Encoded, "pa.RecordBatch | None", list[Dropped]]
"""What a worker makes of some rows: numbers; features, `length` and words of each example; and what is dropped."""


def _joined(parts: Sequence[Encoded], folder: Path) -> Encoded:
    """A whole source, whose examples lie in a folder."""
    sets: dict[tuple[str, ...], int] = {}
    labels, row_of, tally, num_rows = [], [], RowCounts(), 0
    for part in parts:
        places = [sets.setdefault(names, len(sets)) for names in part.label_sets]
        labels.append(np.array(places, np.int64)[part.labels])
        row_of.append(part.row_of + num_rows)
        num_rows += part.num_rows
        tally.take(part.tally)
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
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
        sides=columns["groups"],
    )


def encode_chunk(job: Job, chunk: list[PlacedRow]) -> Chunk:
    """Check and tokenise some rows."""
    task, block, tally, dropped = task_named(job.task), job.block, RowCounts(), list[Dropped]()

    def drop(loss: Loss, place: str, row: Mapping[str, Any], refused: Refused) -> None:
        tally.add(loss, refused.check, place, refused.reason)
        dropped.append(Dropped(job.source, place, refused.check, refused.reason, dict(row)))

    usable: list[PlacedRow] = []
    for place, row in chunk:
        if refused := _unusable(job, task, row):
            drop("unusable", place, row, refused)
        else:
            usable.append((place, row))
    examples, row_of, texts, rows = list[Example](), list[int](), list[str](), list[PlacedRow]()
    for (place, row), of_row in zip(usable, _examples(job, task, [row for _, row in usable]), strict=True):
        if of_row is None:
            if job.is_mixed:
                drop("unfit", place, row, Refused(NEW_LABEL, "no row of the task has its label"))
            else:
                rows.append((place, row))
            continue
        if any(example.truncated for example in of_row):
            tally.add("too long", "", place)
        refusals = [_refusal(example, block.truncation_strategy == "drop") for example in of_row]
        good = [example for example, refusal in zip(of_row, refusals, strict=True) if refusal is None]
        lost = [refusal for refusal in refusals if refusal] if of_row else [Refused("nothing to train", "no token")]
        if not good:
            drop("unfit", place, row, lost[0])
            continue
        for number, refused in enumerate(lost):  # the row is written down once, however many examples are lost
            drop("part", place, {} if number else row, refused)
        examples += good
        row_of += [len(rows)] * len(good)
        # The row is kept beside its first example, beside the others only its place.
        texts += [words(place, row), *[words(place, {})] * (len(good) - 1)]
        rows.append((place, row))
    features = [
        {**example.features, LENGTH: example.features.get(LENGTH, len(example.features.get("input_ids", ())))}
        for example in examples
    ]
    keys = [task.group_key(row, job.target) for _, row in rows]
    values, times = marks_of(rows, block.group, block.time if job.source == "train" else None, block.split_seed, tally)
    sets: dict[tuple[str, ...], int] = {}
    labels = [sets.setdefault(tuple(task.row_labels(row, job.target)), len(sets)) for _, row in rows]
    _count_flaws(job, (row for _, row in rows), tally)
    groups = np.array([draw(block.split_seed, key) for key in keys], np.uint64)
    numbers = Encoded(
        where=job.where,
        target=job.target,
        num_read=len(chunk),
        row_of=np.array(row_of, np.int64),
        lengths=np.array([row[LENGTH] for row in features], np.int32),
        trained_tokens=np.array([example.trained_tokens for example in examples], np.int32),
        truncated=np.array([example.truncated for example in examples], bool),
        groups=groups,
        sides=groups,
        signatures=signatures(keys if block.near_duplicates < 1 else []),
        values=values,
        times=times,
        holds_known=holding(job.known, keys, rows, job.target),
        labels=np.array(labels, np.int64),
        label_sets=tuple(sets),
        tally=tally,
        longest=max((one.longest or row[LENGTH] for one, row in zip(examples, features, strict=True)), default=0),
    )
    return numbers, record_batch(features, texts) if examples else None, dropped


def _unusable(job: Job, task: Task, row: dict[str, Any]) -> Refused | None:
    """Why a row holds nothing to learn from."""
    if problem := unreadable(row, job.target.columns):
        return Refused("unreadable", problem)
    if (refused := task.refuse(row, job.target)) is None:
        return None
    # Asked again, for a reason that quotes nothing private.
    return task.refuse(masked_cells(row), job.target) or refused


def _count_flaws(job: Job, rows: Iterable[Mapping[str, Any]], tally: RowCounts) -> None:
    """Count rows by what the cheap checks find in their texts."""
    columns = job.target.columns
    checks = checks_of(columns, CHEAP)
    for row in rows:
        of_parts = ((text, of) for part, of in checks.items() for _, text in cells(row, columns, part))
        tally.counts.update({("flaw", check) for text, of in of_parts for check in found_by(text[:LOOKED_AT], of)})


def _examples(job: Job, task: Task, rows: list[dict[str, Any]]) -> list[list[Example] | None]:
    """Each row's examples; None for a row with a label that train does not have."""
    known = job.known_labels
    is_known = [known is None or known.issuperset(task.row_labels(row, job.target)) for row in rows]
    wanted = [row for row, known_here in zip(rows, is_known, strict=True) if known_here]
    encoded = iter(task.encode(wanted, job.target, job.tokenizer, job.max_length) if wanted else ())
    return [next(encoded) if known_here else None for known_here in is_known]


def _refusal(example: Example, drop_truncated: bool) -> Refused | None:
    """Why an example is dropped; one without a trained token is, whatever the strategy."""
    if example.refused is not None:
        return example.refused
    if example.trained_tokens == 0:
        cut_off = Refused("answer cut off", "the whole answer lies beyond data.max_length")
        return cut_off if example.truncated else Refused("nothing to train", "no token is trained")
    if example.truncated and drop_truncated:
        return Refused("too long", "longer than data.max_length")
    return None


def encode(
    job: Job,
    rows: Iterable[PlacedRow],
    num_rows: int,
    folder: Path,
    progress: Callable[[int], None],
    drop: Callable[[Dropped], None],
) -> Encoded:
    """Tokenise a source into `folder`. Raises `SetupError` when a worker process was killed, most often because memory
    ran out."""
    parts = list[Encoded]()

    def batches() -> Iterator[pa.RecordBatch]:
        for part, batch, dropped in _chunks(job, rows, num_rows):
            for item in dropped:
                drop(item)
            if batch is not None:
                yield batch
            parts.append(part)
            progress(sum(done.num_read for done in parts))

    write_rows(folder, batches())
    return _joined(parts, folder)


def with_sides(sources: Mapping[str, Encoded], near_duplicates: float) -> dict[str, Encoded]:
    """The sources, with one group for rows of all of them whose texts are nearly the same, and one side for those that
    hang together by such groups, or by whose they are where a column says so."""
    if near_duplicates >= 1 and not any(len(source.values) for source in sources.values()):
        return dict(sources)
    ends = np.cumsum([source.num_rows for source in sources.values()])[:-1]
    groups, signed, values = (
        np.concatenate([getattr(source, name) for source in sources.values()])
        for name in ("groups", "signatures", "values")
    )
    groups = joined(groups, signed, near_duplicates) if near_duplicates < 1 else groups
    sides = joined_by_value(groups, values) if len(values) else groups
    parts = zip(np.split(groups, ends), np.split(sides, ends), strict=True)
    return {
        name: replace(source, groups=of_groups, sides=of_sides)
        for (name, source), (of_groups, of_sides) in zip(sources.items(), parts, strict=True)
    }


def _chunks(job: Job, rows: Iterable[PlacedRow], num_rows: int) -> Iterator[Chunk]:
    """The source in order, chunk by chunk; read only a little ahead of the workers."""
    pieces = windows(rows, ROWS_PER_CHUNK, CHUNK_BYTES)
    num_workers = num_cores()
    if num_rows < ROWS_WORTH_PROCESSES or num_workers == 1:
        yield from (encode_chunk(job, piece) for piece in pieces)
        return
    # A forked worker has the tokenizer at once; elsewhere than on Linux forking is not safe.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(num_workers, context, _take_job, (job,)) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(_encode_here, piece))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except (KeyboardInterrupt, GeneratorExit):
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BrokenProcessPool:
            raise SetupError(
                "data: a process that tokenises was killed, most often by the kernel because memory ran out; close "
                "other programs, or split the file"
            ) from None


_job: Job | None = None


def _take_job(job: Job) -> None:
    """Runs once in each worker: the tokenizer is handed over once, not with every chunk."""
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other workers
    _job = job


def _encode_here(piece: list[PlacedRow]) -> Chunk:
    assert _job is not None, "_take_job runs first"
    return encode_chunk(_job, piece)
