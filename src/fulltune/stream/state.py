from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import accumulate, chain, cycle
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fulltune.errors import SetupError
from fulltune.records.base import Record
from fulltune.stream.layout import GRADIENT, WEIGHTS, Span, TensorLayout, UnitLayout
from fulltune.stream.store import LOST, DiskFile, Transfer, check_disk, complete, explain_disk_errors, page_buffer
from fulltune.stream.threads import MOST, single_core_threads
from fulltune.stream.units import MOST_TOGETHER

JOURNAL, FILE = "journal.json", "state.bin"
_AT_ONCE = 2
"""Slices that are read at a time."""
_BEFORE_WRITING = _AT_ONCE + MOST
_NUM_BUFFERS = _BEFORE_WRITING + _AT_ONCE
ApplySlice = Callable[[str, int, dict[str, Tensor]], object]


class StateJournal(Record):
    """Which parts of a training state's file are valid, and which update is under way."""

    if_damaged = LOST
    version: Literal[1] = 1
    identity: dict[str, str]
    offsets: list[int]
    """Where each unit's record begins."""
    free: dict[int, int]
    """Where the next record of this many bytes will begin."""
    sums: list[int | None]
    """Sum of each unit's record, or None before it is written for the first time."""
    finished: dict[str, object] | None = None
    pending: dict[str, object] | None = None
    done: list[int] = Field(default=[])
    """Units that the pending update has changed."""
    without_gradient: list[str] = Field(default=[])


def exists(folder: Path) -> bool:
    """Return whether a folder contains a complete training state; False if its creation was interrupted."""
    path = folder / JOURNAL
    return path.exists() and None not in StateJournal.load(path).sums


class DiskState:
    """Weights, optimizer state and gradients of all units on a disk. Units' records are replaced one by one: if the
    process is killed, each is the old or the new one."""

    def __init__(
        self,
        folder: Path,
        units: Sequence[Sequence[TensorLayout]],
        *,
        gradients: torch.dtype,
        identity: Mapping[str, str],
        host_bytes: int = 0,
        create: bool = False,
    ) -> None:
        """Open a complete state, or `create` one without weights. The weights of the first units that fit into
        `host_bytes` stay in memory."""
        self.folder = folder
        self._units = [UnitLayout(tensors, gradients) for tensors in units]
        self._unit_of = {name: number for number, unit in enumerate(self._units) for name in unit.tensors}
        layout = repr([unit.tensors for unit in self._units]).encode()
        identity = {**identity, "layout": hashlib.sha256(layout).hexdigest()[:16]}
        sizes = [unit.num_bytes for unit in self._units]
        sizes += {*sizes}  # free regions
        *offsets, begin = accumulate(sizes, initial=0)
        *self._parked_at, end = accumulate((unit.gradient_bytes for unit in self._units), initial=begin)
        if exists(folder) == create:
            problem = "contains a training state" if create else "contains no complete training state"
            raise SetupError(f"{folder}: {problem}; delete the folder to start a new run")
        if create:
            for name in (JOURNAL, FILE):
                (folder / name).unlink(missing_ok=True)
            check_disk(folder, end)
            folder.mkdir(parents=True, exist_ok=True)
        self._file = DiskFile(folder / FILE, end, create)
        if create:
            free = dict(zip(sizes, offsets, strict=True))
            sums = [None if unit.num_bytes else 0 for unit in self._units]
            self._save(StateJournal(identity=identity, offsets=offsets[: len(units)], free=free, sums=sums))
        self.journal = StateJournal.load(folder / JOURNAL)
        for key, old in self.journal.identity.items():
            if old != identity.get(key):
                raise SetupError(
                    f"{folder}: the training state belongs to {key} {old}, expected {identity.get(key)}; continue with "
                    "the recipe and model it belongs to, or delete the folder to start a new run"
                )
        self._spare = [page_buffer(max(unit.weights_bytes for unit in self._units)) for _ in range(MOST_TOGETHER)]
        self._own: dict[int, Tensor] = {}
        for number, unit in enumerate(self._units):
            if unit.weights_bytes <= host_bytes:
                host_bytes -= unit.weights_bytes
                self._own[number] = page_buffer(unit.weights_bytes)
        self._loaded: dict[int, tuple[Tensor, Transfer]] = {}
        self._in_use: set[int] = set()
        self._gradient = page_buffer(max(unit.gradient_bytes for unit in self._units))
        self._parked: dict[int, Collection[str]] = {}
        self._parking: Transfer = []
        slices = [spans.values() for unit in self._units for *_, spans in unit.slices()]
        longest = max(sum(span.num_bytes for span in spans) for spans in slices)
        # An update ends before new gradients are computed, so slices lie where these do, if there is room.
        room = self._gradient if len(self._gradient) >= _NUM_BUFFERS * longest else page_buffer(_NUM_BUFFERS * longest)
        self._buffers = room[: _NUM_BUFFERS * longest].split(longest)
        # One writer: records of a size share a free place, so each is committed before the next one is written.
        self._reader, self._writer, self._updater = (
            ThreadPoolExecutor(_AT_ONCE),
            *(ThreadPoolExecutor(1) for _ in range(2)),
        )
        self._due: list[int] = []
        """Units that the pending update has still to change."""
        self._change: ApplySlice | None = None
        """What the pending update does, or None if it was begun before a crash."""
        self._changers = single_core_threads()
        self.on_slice: Callable[[], object] = lambda: None
        """Called after each slice of an update."""

    def _save(self, journal: StateJournal) -> None:
        with explain_disk_errors(self.folder / JOURNAL, "written"):
            journal.save(self.folder / JOURNAL)
            self.journal = journal
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def prefetch(self, unit: int, needed: bool = False) -> None:
        """Start to read a unit's weights, or to update them, if a buffer is free or, if `needed`, is only
        prefetched."""
        if unit not in self._own and unit not in self._loaded and not self._spare:
            unused = [other for other in self._loaded if other not in self._own and other not in self._in_use]
            for other in [other for other in unused if needed or not self._loaded[other][1]][:1]:
                self._unload(other)
        if unit not in self._loaded and (unit in self._own or self._spare):
            buffer = self._own[unit] if unit in self._own else self._spare.pop()
            pages = buffer[: self._units[unit].weights_bytes]
            if self._change is not None and unit in self._due:
                self._due.remove(unit)
                transfer = [self._updater.submit(self._replace, [unit], self._change, pages)]
            else:
                transfer = self._file.move(pages, self.journal.offsets[unit], write=False)
            self._loaded[unit] = buffer, transfer

    def _unload(self, unit: int) -> None:
        buffer, transfer = self._loaded.pop(unit)
        if unit not in self._own:
            self._spare.append(buffer)
        complete(transfer)

    def weights(self, unit: int) -> Mapping[str, Tensor]:
        """Return a unit's weights by name, valid until its release."""
        self.prefetch(unit, needed=True)
        if unit not in self._loaded:
            raise ValueError(f"release a unit before reading unit {unit}: both buffers are in use")
        buffer, transfer = self._loaded[unit]
        complete(transfer)
        self._in_use.add(unit)
        return self._units[unit].views(WEIGHTS, buffer)

    def release(self, unit: int) -> None:
        """Allow that a unit's weights are overwritten by those of another unit."""
        self._in_use.discard(unit)
        self._loaded[unit] = self._loaded.pop(unit)  # the longest unused one is overwritten first

    def read(self, name: str, *sections: str) -> dict[str, Tensor]:
        """Read sections of a parameter (default: all): the weights in its shape, others flat."""
        self.finish()
        unit, tensors = self._unit_of[name], dict[str, Tensor]()
        layout = self._units[unit]
        for section in sections or [*layout.tensors[name].sections][:-1]:  # the gradient is last
            span = replace(layout.spans[name, section], place=0)
            buffer = page_buffer(span.num_bytes)
            complete(self._file.move(span.pages(buffer), self.journal.offsets[unit] + span.offset, write=False))
            shape = layout.tensors[name].shape if section == WEIGHTS else (-1,)
            tensors[section] = span.tensor(buffer).view(shape)
        return tensors

    def read_values(self, name: str, section: str, begin: int, count: int) -> Tensor:
        """Read `count` elements of a parameter's section from `begin`, a multiple of 4096."""
        self.finish()
        unit = self._unit_of[name]
        span = self._units[unit].spans[name, section]
        part = replace(span, offset=span.offset + begin * span.dtype.itemsize, place=0, length=count)
        buffer = page_buffer(part.num_bytes)
        complete(self._file.move(part.pages(buffer), self.journal.offsets[unit] + part.offset, write=False))
        return part.tensor(buffer)

    def gradients(self, unit: int) -> Mapping[str, Tensor]:
        """Return uninitialised buffers for a unit's gradients by name; wait until the last ones have been parked."""
        self.finish()
        complete(self._parking)
        return self._units[unit].views(GRADIENT, self._gradient)

    def park(self, unit: int, names: Collection[str] | None = None) -> None:
        """Write a unit's gradients in the background. Only `names` (default: all) have one."""
        self._parked[unit] = self._units[unit].tensors if names is None else names
        pages = self._gradient[: self._units[unit].gradient_bytes]
        self._parking += self._file.move(pages, self._parked_at[unit], write=True)

    def discard(self) -> None:
        """Forget parked gradients, because their step is skipped."""
        self._parked = {}

    def begin(self, record: Mapping[str, object]) -> None:
        """Begin an update with the parked gradients, which can go on after a crash."""
        if self.journal.pending is not None:
            raise ValueError("finish the pending update first")
        complete(self._parking)
        self._file.sync()
        without = [name for name, unit in self._unit_of.items() if name not in self._parked.get(unit, ())]
        begun = {"pending": dict(record), "done": [], "without_gradient": without}
        self._save(self.journal.model_copy(update=begun))
        self.discard()

    def update(self, apply: ApplySlice) -> None:
        """Let `apply(name, begin, tensors)`, called by several threads, change each slice of each parameter with a
        gradient in place, except in units that the pending update changed before a crash.

        A unit is changed when its weights are needed next, so that the disk is busy during a forward pass, or by
        `finish`.
        """
        skipped = {*self.journal.without_gradient}
        self._change = lambda name, *arguments: name in skipped or apply(name, *arguments)
        self._due = self._unchanged()
        for unit in [unit for unit in self._loaded if unit in self._due]:
            self._unload(unit)

    def _unchanged(self) -> list[int]:
        """Return the units that the pending update has to change and has not changed yet."""
        skipped, done = {*self.journal.without_gradient}, self.journal.done
        return [unit for unit, one in enumerate(self._units) if one.tensors.keys() - skipped and unit not in done]

    def finish(self) -> None:
        """End the pending update, if there is one."""
        if self.journal.pending is not None:
            if (change := self._change) is None:
                raise ValueError("continue the pending update first")
            self._due = []
            # Behind the units that are being changed.
            self._updater.submit(lambda: self._replace(self._unchanged(), change)).result()
            self._save(self.journal.model_copy(update={"finished": self.journal.pending, "pending": None}))

    def write(self, unit: int, values: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Set sections of a unit's parameters to tensors or numbers. Others stay; in a new unit they are 0."""
        layout, is_new = self._units[unit], self.journal.sums[unit] is None
        if self.journal.pending is not None or (is_new and values.keys() != layout.tensors.keys()):
            raise ValueError(f"expected values of {[*layout.tensors]} and no pending update, found {[*values]}")

        def change(name: str, begin: int, tensors: dict[str, Tensor]) -> None:
            for section, value in values.get(name, {}).items():
                whole = torch.as_tensor(value).reshape(-1)
                length = layout.spans[name, section].length
                if isinstance(value, Tensor) and len(whole) != length:
                    raise ValueError(f"{name}: {section} has {len(whole)} elements, expected {length}")
                first = begin // layout.tensors[name].sections[section].per
                tensors[section].copy_(whole.expand(length)[first : first + len(tensors[section])])

        if unit in self._loaded:
            self._unload(unit)
        self._replace([unit] if layout.tensors else [], change)

    def _replace(self, units: Sequence[int], change: ApplySlice, weights: Tensor | None = None) -> int:
        """Write changed records to free regions, commit each unit, and return 0; the new weights of a single unit are
        copied to `weights`. Reading, `change` and writing overlap."""
        parts = ((unit, *one) for unit in units for one in self._units[unit].slices())
        slices = [(*part, buffer) for part, buffer in zip(parts, cycle(self._buffers), strict=False)]
        reads, changes = list[Future[int]](), list[Future[None]]()
        writes, commits = list[Future[int]](), list[Future[None]]()
        first = 0

        def changed(index: int) -> None:
            """Change a slice as soon as it is read."""
            _, name, begin, spans, buffer = slices[index]
            reads[index].result()
            change(name, begin, {section: span.tensor(buffer) for section, span in spans.items()})
            if weights is not None:
                replace(spans[WEIGHTS], place=spans[WEIGHTS].offset).pages(weights).copy_(spans[WEIGHTS].pages(buffer))

        try:
            for ahead in range(len(slices) + _BEFORE_WRITING):
                if ahead < len(slices):
                    if ahead >= _NUM_BUFFERS:
                        writes[ahead - _NUM_BUFFERS].result()
                    unit, _, _, spans, buffer = slices[ahead]
                    reads.append(self._reader.submit(self._move, unit, spans, buffer, False))
                    changes.append(self._changers.submit(changed, ahead))
                if (index := ahead - _BEFORE_WRITING) < 0:
                    continue
                changes[index].result()
                self.on_slice()
                unit, _, _, spans, buffer = slices[index]
                writes.append(self._writer.submit(self._move, unit, spans, buffer, True))
                if [unit] != [following for following, *_ in slices[index + 1 : index + 2]]:
                    own = slice(first, index + 1)
                    commits.append(self._writer.submit(self._commit, unit, reads[own], writes[own]))
                    first = index + 1
        finally:
            wait(reads + writes)
            wait(changes + commits)
        for commit in commits:
            commit.result()
        return 0

    def _move(self, unit: int, spans: Mapping[str, Span], buffer: Tensor, write: bool) -> int:
        """Read a slice with its gradient, or write it to the free region; return the sum of its part of the record."""
        layout, journal = self._units[unit], self.journal
        if not write and journal.sums[unit] is None:
            buffer.zero_()
            return 0
        begin = journal.free[layout.num_bytes] if write else journal.offsets[unit]
        *record, gradient = spans.values()
        pieces = [self._file.move(one.pages(buffer), begin + one.offset, write, is_summed=True) for one in record]
        if not write:
            pieces.append(self._file.move(gradient.pages(buffer), self._parked_at[unit] + gradient.offset, write))
        return complete([*chain(*pieces)])

    def _commit(self, unit: int, reads: Sequence[Future[int]], writes: Sequence[Future[int]]) -> None:
        """Let the unit's record be the new one, unless the old one was not read as it had been written."""
        journal, size = self.journal.model_copy(deep=True), self._units[unit].num_bytes
        old_sum, new_sum = (sum(move.result() for move in moves) % 2**64 for moves in (reads, writes))
        if journal.sums[unit] not in (None, old_sum):
            raise SetupError(
                f"{self._file.path}: the disk returned other data of {next(iter(self._units[unit].tensors))} and its "
                "neighbours than were written; check the disk, delete the folder and start a new run"
            )
        self._file.sync()
        journal.free[size], journal.offsets[unit] = journal.offsets[unit], journal.free[size]
        journal.sums[unit] = new_sum
        journal.done.append(unit)
        self._save(journal)

    def close(self) -> None:
        """Wait for what is still written, and close the file."""
        try:
            complete(self._parking)
        finally:
            self._updater.shutdown()
            self._file.close()
