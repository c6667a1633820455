"""Check and tokenise a source once, on all cores, into an arrow file; memory does not grow with the rows' texts."""

from __future__ import annotations

import os
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.data.check import Dropped, LeftOut
from fulltune.data.near import NUM_HASHES, joined, signatures
from fulltune.data.readers.read import PlacedRow
from fulltune.data.sampling import draw
from fulltune.errors import SetupError
from fulltune.inference.store import RowWriter, record_batch, words
from fulltune.recipe.tasks import TaskName
from fulltune.system.hardware import num_cores
from fulltune.tasks import LENGTH, Example, Refused, Target, task_named
from fulltune.tasks.columns import as_text, normalised, unreadable, windows

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ROWS_PER_CHUNK = 1000
CHUNK_BYTES = 2 * 2**20
"""Tokenising takes up to 170 times the memory of the text."""
ROWS_WORTH_PROCESSES = 20_000
"""With fewer rows the processes would cost more time than they save."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    task: TaskName
    target: Target
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    split: str
    split_seed: int
    drop_truncated: bool
    known_labels: frozenset[str] | None = None
    """The train rows' labels; a row with another one is counted and not tokenised, for it will be refused."""
    signs: bool = False
    """Near-duplicates are looked for."""


@dataclass(frozen=True)
class Chunk:
    """What a worker made of some rows; examples and rows are numbered from 0."""

    num_read: int
    batch: pa.RecordBatch | None
    """One row per example: features, `length`, words."""
    row_of: np.ndarray
    """The row that each example comes from."""
    lengths: np.ndarray
    trained_tokens: np.ndarray
    truncated: np.ndarray
    longest: int
    groups: np.ndarray
    """`draw` of each row's group key: uint64."""
    wholes: np.ndarray
    """The same of all that a row gives to learn, its answer or label included: uint64."""
    signatures: np.ndarray
    """Of each row's group key, uint16 [rows, hashes]; without rows where near-duplicates are not looked for."""
    labels: list[list[str]]
    unusable: list[Dropped]
    """Rows that hold nothing to learn from."""
    unfit: list[Dropped]
    """Rows that tokenising showed to be too long, or without anything to train."""
    lost_parts: list[Dropped]
    """The same for some examples of a row that keeps others."""
    num_too_long: int


def encode_chunk(job: Job, chunk: list[PlacedRow]) -> Chunk:
    """Check and tokenise some rows."""
    task = task_named(job.task)
    unusable: list[Dropped] = []
    usable: list[PlacedRow] = []
    for place, row in chunk:
        unread = unreadable(row, job.target.columns)
        refused = Refused("unreadable", unread) if unread else task.refuse(row, job.target)
        if refused is None:
            usable.append((place, row))
        else:
            unusable.append(Dropped(job.split, place, refused.check, refused.reason, dict(row)))
    encoded = _examples(job, [row for _, row in usable])
    kept: list[tuple[int, Example]] = []
    unfit: list[Dropped] = []
    lost_parts: list[Dropped] = []
    rows: list[PlacedRow] = []
    too_long = 0
    for (place, row), examples in zip(usable, encoded, strict=True):
        too_long += any(example.truncated for example in examples)
        reasons = [_unfit(example, job.drop_truncated) for example in examples]
        good = [example for example, reason in zip(examples, reasons, strict=True) if reason is None]
        problems = [reason for reason in reasons if reason is not None]
        # The row is written down once, however many of its examples are lost.
        lost = [Dropped(job.split, place, *problem, {} if i else dict(row)) for i, problem in enumerate(problems)]
        if good or examples is _UNKNOWN_LABEL:
            kept += [(len(rows), example) for example in good]
            rows.append((place, row))
            lost_parts += lost
        else:  # a row without any example has no token
            unfit.append(lost[0] if lost else Dropped(job.split, place, "nothing to train", "no token", dict(row)))
    features = [_features(example) for _, example in kept]
    numbers = [number for number, _ in kept]
    keys = [task.group_key(row, job.target) for _, row in rows]
    return Chunk(
        num_read=len(chunk),
        batch=record_batch(features, _words(rows, numbers)) if kept else None,
        row_of=np.array(numbers, np.int64),
        lengths=np.array([row[LENGTH] for row in features], np.int32),
        trained_tokens=np.array([example.trained_tokens for _, example in kept], np.int32),
        truncated=np.array([example.truncated for _, example in kept], bool),
        longest=max((_longest(example) for _, example in kept), default=0),
        groups=np.array([draw(job.split_seed, key) for key in keys], np.uint64),
        wholes=np.array(
            [draw(job.split_seed, _whole(job, key, row)) for key, (_, row) in zip(keys, rows, strict=True)], np.uint64
        ),
        signatures=signatures(keys if job.signs else []),
        labels=[task.row_labels(row, job.target) for _, row in rows],
        unusable=unusable,
        unfit=unfit,
        lost_parts=lost_parts,
        num_too_long=too_long,
    )


def _words(rows: Sequence[PlacedRow], numbers: Sequence[int]) -> list[str]:
    """What is kept beside each example: the row beside its first one, beside the others only its place."""
    made = []
    for before, number in zip((-1, *numbers), numbers, strict=False):
        place, row = rows[number]
        made.append(words(place, {} if number == before else row))
    return made


def _whole(job: Job, key: str, row: Mapping[str, Any]) -> str:
    """What tells a row apart from others with the same group key; of an image the key says everything."""
    cells = [row.get(column) for role, column in job.target.columns.items() if role != "image"]
    return "\0".join([key, *(normalised(as_text(cell)) for cell in cells)])


_UNKNOWN_LABEL: list[Example] = []


def _examples(job: Job, rows: list[dict[str, Any]]) -> list[list[Example]]:
    """Each row's examples."""
    task = task_named(job.task)
    known = job.known_labels
    wanted = [
        position
        for position, row in enumerate(rows)
        if known is None or known.issuperset(task.row_labels(row, job.target))
    ]
    made = task.encode([rows[i] for i in wanted], job.target, job.tokenizer, job.max_length) if wanted else []
    encoded = [_UNKNOWN_LABEL] * len(rows)
    for position, examples in zip(wanted, made, strict=True):
        encoded[position] = examples
    return encoded


def _features(example: Example) -> dict[str, Any]:
    features = dict(example.features)
    return features if LENGTH in features else {**features, LENGTH: len(features["input_ids"])}


def _longest(example: Example) -> int:
    if example.longest is not None:
        return example.longest
    ids = example.features.get("input_ids")
    return len(ids) if ids is not None else int(example.features[LENGTH])


def _unfit(example: Example, drop_truncated: bool) -> tuple[str, str] | None:
    """Check and reason why an example is left out; one without a trained token is, whatever the strategy."""
    if example.refused is not None:
        return example.refused.check, example.refused.reason
    if example.trained_tokens == 0:
        cut = "the whole answer lies beyond data.max_length" if example.truncated else "no token is trained"
        return "answer cut off" if example.truncated else "nothing to train", cut
    if example.truncated and drop_truncated:
        return "too long", "longer than data.max_length"
    return None


@dataclass
class Encoded:
    """A whole source, tokenised: the examples lie in `folder`, some numbers about each of them here."""

    folder: Path
    num_read: int = 0
    row_of: Any = field(default_factory=lambda: array("q"))
    lengths: Any = field(default_factory=lambda: array("i"))
    trained_tokens: Any = field(default_factory=lambda: array("i"))
    truncated: Any = field(default_factory=lambda: array("b"))
    groups: Any = field(default_factory=lambda: array("Q"))
    wholes: Any = field(default_factory=lambda: array("Q"))
    signatures: Any = field(default_factory=lambda: array("H"))
    label_numbers: Any = field(default_factory=lambda: array("i"))
    """Numbers of all rows' labels in `names`, one row after another."""
    label_ends: Any = field(default_factory=lambda: array("q", [0]))
    combinations: Any = field(default_factory=lambda: array("i"))
    """Each row's set of labels, as a number."""
    names: dict[str, int] = field(default_factory=dict)
    unusable: LeftOut = field(default_factory=LeftOut)
    unfit: LeftOut = field(default_factory=LeftOut)
    lost_parts: LeftOut = field(default_factory=LeftOut)
    num_too_long: int = 0
    longest: int = 0
    _sets: dict[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows that gave at least one example."""
        return len(self.groups)

    @property
    def num_left_out(self) -> int:
        return self.unusable.counts.total() + self.unfit.counts.total()

    def _left_out(self, chunk: Chunk) -> tuple[tuple[LeftOut, list[Dropped]], ...]:
        return (self.unusable, chunk.unusable), (self.unfit, chunk.unfit), (self.lost_parts, chunk.lost_parts)

    def add(self, chunk: Chunk) -> None:
        first = self.num_rows
        self.num_read += chunk.num_read
        self.row_of.frombytes((chunk.row_of + first).tobytes())
        self.lengths.frombytes(chunk.lengths.tobytes())
        self.trained_tokens.frombytes(chunk.trained_tokens.tobytes())
        self.truncated.frombytes(chunk.truncated.astype(np.int8).tobytes())
        self.groups.frombytes(chunk.groups.tobytes())
        self.wholes.frombytes(chunk.wholes.tobytes())
        self.signatures.frombytes(chunk.signatures.tobytes())
        for labels in chunk.labels:
            self.label_numbers.extend(self.names.setdefault(name, len(self.names)) for name in labels)
            self.label_ends.append(len(self.label_numbers))
            self.combinations.append(self._sets.setdefault(tuple(labels), len(self._sets)))
        for tally, items in self._left_out(chunk):
            for item in items:
                tally.add(item)
        self.num_too_long += chunk.num_too_long
        self.longest = max(self.longest, chunk.longest)


def encode(
    job: Job,
    rows: Iterable[PlacedRow],
    num_rows: int,
    folder: Path,
    progress: Callable[[int], None],
    leave_out: Callable[[Dropped], None],
) -> Encoded:
    """Tokenise a source into `folder`.

    Args:
        job: Task, target, tokenizer, limits.
        rows: The source, read as it is consumed.
        num_rows: How many there are: decides whether processes are worth starting.
        folder: Where the arrow file is written.
        progress: Called with the number of rows done so far.
        leave_out: Called with each row, or part of one, that is left out.

    Raises:
        SetupError: When a worker process was killed, most often because memory ran out.
    """
    encoded = Encoded(folder)
    with RowWriter(folder) as writer:
        for chunk in _chunks(job, rows, num_rows):
            encoded.add(chunk)
            for item in (*chunk.unusable, *chunk.unfit, *chunk.lost_parts):
                leave_out(item)
            if chunk.batch is not None:
                writer.write(chunk.batch)
            progress(encoded.num_read)
    return encoded


def join_near(sources: Sequence[Encoded], threshold: float) -> None:
    """Give rows of all sources whose texts are nearly the same one group, and forget the signatures."""
    if threshold >= 1:
        return
    groups = np.concatenate([np.asarray(source.groups) for source in sources])
    signed = np.concatenate([np.asarray(source.signatures) for source in sources]).reshape(-1, NUM_HASHES)
    numbers = joined(groups, signed, threshold)
    for source, part in zip(sources, np.split(numbers, np.cumsum([one.num_rows for one in sources])[:-1]), strict=True):
        source.groups, source.signatures = array("Q", part.tobytes()), array("H")


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
