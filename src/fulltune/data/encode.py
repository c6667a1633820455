"""Check and tokenise a source once, on all cores, into an arrow file; memory does not grow with the rows' texts."""

from __future__ import annotations

import os
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fulltune.audit.texts import found_by, masked_cells
from fulltune.data.contamination import KnownTexts, holds_one
from fulltune.data.groups import draw, joined_by_value
from fulltune.data.marks import Found, marks_of
from fulltune.data.near import joined, signatures
from fulltune.data.readers.read import PlacedRow
from fulltune.data.running_text import CHEAP, LOOKED_AT, cells, checks_of
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
_PLACES_SHOWN = 10

NEW_LABEL = "label not in train"

Loss = Literal["unusable", "unfit", "part"]
"""Why something is dropped: a row holds nothing to learn from; tokenising showed that it is too long, or that nothing
in it is trained; the same of some examples of a row that keeps others."""


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
    is_mixed: bool = False
    """The rows are mixed in: one with another label is dropped instead, and one may say not whose it is."""
    signs: bool = False
    """Near-duplicates are looked for."""
    group: str | None = None
    """Column that says whose a row is."""
    time: str | None = None
    """Column that says when a row came."""
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


@dataclass
class DropTally:
    """How many rows were dropped by which check, and the first few of each; all of them are in `dropped.jsonl`."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[Dropped]] = field(default_factory=dict)

    def add(self, item: Dropped) -> None:
        """Count a row."""
        self.counts[item.check] += 1
        if self.counts[item.check] <= _PLACES_SHOWN:
            self.first.setdefault(item.check, []).append(item)


@dataclass(frozen=True)
class RowNumbers:
    """A few numbers about each example, and about each row that gave one."""

    row_of: np.ndarray
    """The row that each example comes from: int64 [examples]."""
    lengths: np.ndarray
    """Tokens: int32 [examples]."""
    trained_tokens: np.ndarray
    """int32 [examples]."""
    truncated: np.ndarray
    """bool [examples]."""
    groups: np.ndarray
    """`draw` of each row's group key: uint64 [rows]."""
    wholes: np.ndarray
    """The same of all that a row gives to learn, its answer or label included: uint64 [rows]."""
    signatures: np.ndarray
    """Of each row's group key: uint16 [rows, hashes]; without rows where near-duplicates are not looked for."""
    values: np.ndarray
    """`draw` of whose each row is: uint64 [rows]; without rows where no column says so."""
    times: np.ndarray
    """When each row came, as numbers in the order of time: float64 [rows]; without rows where no column says so."""
    holds_known: np.ndarray
    """Whether each row holds a text that must not be trained on: bool [rows]; without rows where none is named."""


@dataclass(frozen=True)
class Chunk(RowNumbers):
    """What a worker made of some rows; examples and rows are numbered from 0."""

    num_read: int
    batch: pa.RecordBatch | None
    """One row per example: features, `length`, words."""
    labels: list[list[str]]
    dropped: dict[Loss, list[Dropped]]
    found: Found
    """In the columns that say whose the rows are and when they came."""
    num_too_long: int
    longest: int
    flaws: Counter[str]
    """Rows in whose texts each cheap check found something."""


@dataclass(frozen=True)
class Encoded(RowNumbers):
    """A whole source, tokenised: the examples lie in `folder`."""

    sides: np.ndarray
    """The group of each row that a split never separates: uint64 [rows]; as `groups`, or larger."""
    folder: Path
    num_read: int
    label_numbers: np.ndarray
    """Numbers of all rows' labels in `names`, one row after another: int32 [labels]."""
    label_ends: np.ndarray
    """Where each row's labels end, after a 0: int64 [rows + 1]."""
    names: dict[str, int]
    dropped: dict[Loss, DropTally]
    found: Found
    num_too_long: int
    longest: int
    flaws: Counter[str]
    """As of a chunk."""

    @property
    def num_rows(self) -> int:
        """Rows that gave at least one example."""
        return len(self.groups)

    @property
    def num_dropped(self) -> int:
        """Rows that gave none."""
        return self.dropped["unusable"].counts.total() + self.dropped["unfit"].counts.total()


def encode_chunk(job: Job, chunk: list[PlacedRow]) -> Chunk:
    """Check and tokenise some rows."""
    task = task_named(job.task)
    dropped: dict[Loss, list[Dropped]] = {"unusable": [], "unfit": [], "part": []}
    usable: list[PlacedRow] = []
    for place, row in chunk:
        problem = unreadable(row, job.target.columns)
        refused = Refused("unreadable", problem) if problem else task.refuse(row, job.target)
        if refused is None:
            usable.append((place, row))
        else:
            if not problem:  # asked again, for a reason that quotes nothing private
                refused = task.refuse(masked_cells(row), job.target) or refused
            dropped["unusable"].append(Dropped(job.split, place, refused.check, refused.reason, dict(row)))
    examples: list[Example] = []
    row_of: list[int] = []
    texts: list[str] = []
    rows: list[PlacedRow] = []
    num_too_long = 0
    for (place, row), of_row in zip(usable, _examples(job, [row for _, row in usable]), strict=True):
        if of_row is None:
            if job.is_mixed:
                reason = f"'{_new_label(job, row)}' is no label of the task's rows"
                dropped["unfit"].append(Dropped(job.split, place, NEW_LABEL, reason, dict(row)))
            else:
                rows.append((place, row))
            continue
        num_too_long += any(example.truncated for example in of_row)
        refusals = [_refusal(example, job.drop_truncated) for example in of_row]
        good = [example for example, refusal in zip(of_row, refusals, strict=True) if refusal is None]
        problems = [refusal for refusal in refusals if refusal] if of_row else [Refused("nothing to train", "no token")]
        # The row is written down once, however many of its examples are lost.
        lost = [
            Dropped(job.split, place, problem.check, problem.reason, {} if i else dict(row))
            for i, problem in enumerate(problems)
        ]
        if not good:
            dropped["unfit"].append(lost[0])
            continue
        dropped["part"] += lost
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
    wholes = [_whole(job, key, row) for key, (_, row) in zip(keys, rows, strict=True)]
    marks = marks_of(rows, job.group, job.time, job.split_seed, is_optional=job.is_mixed)
    return Chunk(
        num_read=len(chunk),
        batch=record_batch(features, texts) if examples else None,
        row_of=np.array(row_of, np.int64),
        lengths=np.array([row[LENGTH] for row in features], np.int32),
        trained_tokens=np.array([example.trained_tokens for example in examples], np.int32),
        truncated=np.array([example.truncated for example in examples], bool),
        groups=np.array([draw(job.split_seed, key) for key in keys], np.uint64),
        wholes=np.array([draw(job.split_seed, whole) for whole in wholes], np.uint64),
        signatures=signatures(keys if job.signs else []),
        values=marks.values,
        times=marks.times,
        holds_known=_holding_known(job, keys, rows),
        labels=[task.row_labels(row, job.target) for _, row in rows],
        dropped=dropped,
        found=marks.found,
        num_too_long=num_too_long,
        flaws=_flaws(job, [row for _, row in rows]),
        longest=max((one.longest or row[LENGTH] for one, row in zip(examples, features, strict=True)), default=0),
    )


def _flaws(job: Job, rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Rows by what the cheap checks found in their texts."""
    found, columns = Counter[str](), job.target.columns
    checks = checks_of(columns, CHEAP)
    for row in rows:
        of_parts = ((text, of) for part, of in checks.items() for _, text in cells(row, columns, part))
        found.update({check for text, of in of_parts for check in found_by(text[:LOOKED_AT], of)})
    return found


def _whole(job: Job, key: str, row: Mapping[str, Any]) -> str:
    """What tells a row apart from others with the same group key; of an image the key says everything."""
    cells = [row.get(column) for role, column in job.target.columns.items() if role != "image"]
    return "\0".join([key, *(normalised(as_text(cell)) for cell in cells)])


def _holding_known(job: Job, keys: list[str], rows: list[PlacedRow]) -> np.ndarray:
    if job.known is None:
        return np.zeros(0, bool)
    return np.array(
        [holds_one(job.known, key, row, job.target) for key, (_, row) in zip(keys, rows, strict=True)], bool
    )


def _new_label(job: Job, row: Mapping[str, Any]) -> str:
    known = job.known_labels or frozenset()
    return next(label for label in task_named(job.task).row_labels(row, job.target) if label not in known)


def _examples(job: Job, rows: list[dict[str, Any]]) -> list[list[Example] | None]:
    """Each row's examples; None for a row with a label that train does not have."""
    task = task_named(job.task)
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
    numbers: dict[str, list[np.ndarray]] = {column.name: [] for column in fields(RowNumbers)}
    names: dict[str, int] = {}
    label_numbers, label_ends = array("i"), array("q", [0])
    dropped: dict[Loss, DropTally] = {"unusable": DropTally(), "unfit": DropTally(), "part": DropTally()}
    found, flaws, num_read, num_too_long, longest = Found(), Counter[str](), 0, 0, 0
    with RowWriter(folder) as writer:
        for chunk in _chunks(job, rows, num_rows):
            chunk.row_of[:] += len(label_ends) - 1
            for name, parts in numbers.items():
                parts.append(getattr(chunk, name))
            for labels in chunk.labels:
                label_numbers.extend(names.setdefault(name, len(names)) for name in labels)
                label_ends.append(len(label_numbers))
            for loss, items in chunk.dropped.items():
                for item in items:
                    dropped[loss].add(item)
                    drop(item)
            if chunk.batch is not None:
                writer.write(chunk.batch)
            found.take(chunk.found)
            num_read += chunk.num_read
            num_too_long += chunk.num_too_long
            longest = max(longest, chunk.longest)
            flaws.update(chunk.flaws)
            progress(num_read)
    whole = {name: np.concatenate(parts) for name, parts in numbers.items()}
    return Encoded(
        **whole,
        sides=whole["groups"],
        folder=folder,
        num_read=num_read,
        label_numbers=np.asarray(label_numbers),
        label_ends=np.asarray(label_ends),
        names=names,
        dropped=dropped,
        found=found,
        num_too_long=num_too_long,
        longest=longest,
        flaws=flaws,
    )


def join_near(sources: Mapping[Any, Encoded], threshold: float) -> dict[Any, Encoded]:
    """The sources, with one group for rows of all of them whose texts are nearly the same, and without signatures."""
    if threshold >= 1:
        return dict(sources)
    groups = np.concatenate([source.groups for source in sources.values()])
    signed = np.concatenate([source.signatures for source in sources.values()])
    ends = np.cumsum([source.num_rows for source in sources.values()])[:-1]
    parts = np.split(joined(groups, signed, threshold), ends)
    return {
        name: replace(source, groups=part, sides=part, signatures=signed[:0])
        for (name, source), part in zip(sources.items(), parts, strict=True)
    }


def join_values(sources: Mapping[Any, Encoded]) -> dict[Any, Encoded]:
    """The sources, where a column says whose the rows are: with one side for rows of all of them that are the same
    one's, or hang together with these by their texts."""
    if not any(len(source.values) for source in sources.values()):
        return dict(sources)
    groups = np.concatenate([source.groups for source in sources.values()])
    values = np.concatenate([source.values for source in sources.values()])
    ends = np.cumsum([source.num_rows for source in sources.values()])[:-1]
    parts = np.split(joined_by_value(groups, values), ends)
    return {name: replace(source, sides=part) for (name, source), part in zip(sources.items(), parts, strict=True)}


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
