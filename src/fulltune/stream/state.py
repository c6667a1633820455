from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fulltune.errors import SetupError
from fulltune.records.base import Record
from fulltune.stream.layout import GRADIENT, SLICE_STEP, WEIGHTS, Span, TensorLayout, UnitLayout
from fulltune.stream.store import DiskFile, Transfer, check_disk, complete, explain_disk_errors, page_buffer

JOURNAL, FILE = "journal.json", "state.bin"
_NUM_BUFFERS, _AHEAD = 4, 2
"""Buffers for slices, and how many slices are read ahead."""
_BUFFER_BYTES = 150 * 10**6 // _NUM_BUFFERS
ApplySlice = Callable[[str, int, dict[str, Tensor]], object]


class StateJournal(Record):
    """Which parts of a training state's file are valid, and which update is under way."""

    version: Literal[1] = 1
    identity: dict[str, str]
    regions: list[int]
    """Each unit's region among those of its record size; one more region is free."""
    sums: list[int | None]
    """Sum of each unit's record, or None before it is written for the first time."""
    finished: dict[str, object] | None = None
    pending: dict[str, object] | None = None
    done: tuple[int, ...] = ()
    """Units that the pending update has replaced."""
    without_gradient: tuple[str, ...] = ()


@dataclass
class _Slot:
    """A buffer for a unit's weights, being read while it has a `transfer`."""

    buffer: Tensor
    unit: int | None = None
    transfer: Transfer = field(default_factory=list)
    in_use: bool = False


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
        host_bytes: int | None = None,
        create: bool = False,
    ) -> None:
        """Open a complete state, or `create` one without weights. The weights of the first units that fit into
        `host_bytes` stay in memory."""
        self.folder = folder
        self._units = [UnitLayout(tensors, gradients) for tensors in units]
        self._unit_of = {name: number for number, unit in enumerate(self._units) for name in unit.tensors}
        digest = hashlib.sha256(repr([unit.tensors for unit in self._units]).encode()).hexdigest()[:16]
        sizes = [unit.num_bytes for unit in self._units]
        classes = {size: size * (count + 1) for size, count in Counter(sizes).items()}
        self._bases = dict(zip(classes, accumulate(classes.values(), initial=0), strict=False))
        begin = sum(classes.values())
        *self._parked_at, end = accumulate((unit.gradient_bytes for unit in self._units), initial=begin)
        if exists(folder) == create:
            problem = "contains a training state" if create else "contains no complete training state"
            raise SetupError(f"{folder}: {problem}; delete the folder to start a new run")
        if create:
            (folder / JOURNAL).unlink(missing_ok=True)
            (folder / FILE).unlink(missing_ok=True)
            check_disk(folder, end)
            folder.mkdir(parents=True, exist_ok=True)
        self._file = DiskFile(folder / FILE, end, create)
        identity = {**identity, "layout": digest}
        if create:
            regions = [sizes[:unit].count(size) for unit, size in enumerate(sizes)]
            self._save(StateJournal(identity=identity, regions=regions, sums=[None if size else 0 for size in sizes]))
        self.journal = StateJournal.load(folder / JOURNAL)
        for key, old in self.journal.identity.items():
            if old != identity.get(key):
                raise SetupError(
                    f"{folder}: the training state belongs to {key} {old}, expected {identity.get(key)}; continue with "
                    "the recipe and model it belongs to, or delete the folder to start a new run"
                )
        self._create_buffers(host_bytes or 0)

    def _create_buffers(self, host_bytes: int) -> None:
        self._shared = [_Slot(page_buffer(max(unit.weights_bytes for unit in self._units))) for _ in range(2)]
        self._own: dict[int, _Slot] = {}
        for number, unit in enumerate(self._units):
            if unit.weights_bytes <= host_bytes:
                host_bytes -= unit.weights_bytes
                self._own[number] = _Slot(page_buffer(unit.weights_bytes))
        self._gradient = page_buffer(max(unit.gradient_bytes for unit in self._units))
        self._parked: dict[int, Collection[str]] = {}
        self._parking: Transfer = []
        sections = [one.sections.values() for unit in self._units for one in unit.tensors.values()]
        value_bytes = max(sum(layout.dtype.itemsize / layout.per for layout in layouts) for layouts in sections)
        self._num_values = SLICE_STEP * min(8, max(1, int(_BUFFER_BYTES / value_bytes / SLICE_STEP)))
        spans = [spans.values() for unit in self._units for *_, spans in unit.slices(self._num_values)]
        longest = max(sum(span.num_bytes for span in one) for one in spans)
        self._buffers = [page_buffer(longest) for _ in range(_NUM_BUFFERS)]
        self._verified: set[int] = set()
        self._queue = ThreadPoolExecutor(1)

    def _save(self, journal: StateJournal) -> None:
        with explain_disk_errors(self.folder / JOURNAL, "written"):
            journal.save(self.folder / JOURNAL)
            self.journal = journal
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _region(self, unit: int, free: bool = False) -> int:
        """Return where a unit's record begins, or where the free region of its size does."""
        size, region = self._units[unit].num_bytes, self.journal.regions[unit]
        if free:
            used = {self.journal.regions[other] for other, one in enumerate(self._units) if one.num_bytes == size}
            (region,) = {*range(len(used) + 1)} - used
        return self._bases[size] + region * size

    def prefetch(self, unit: int) -> None:
        """Start to read a unit's weights, if a buffer is free."""
        self._load(unit, [slot for slot in self._shared if not slot.in_use and not slot.transfer])

    def weights(self, unit: int) -> Mapping[str, Tensor]:
        """Return a unit's weights by name, valid until its release."""
        unused = [slot for slot in self._shared if not slot.in_use]
        slot = self._load(unit, sorted(unused, key=lambda slot: bool(slot.transfer)))
        if slot is None:
            raise ValueError(f"release a unit before reading unit {unit}: both buffers are in use")
        complete(slot.transfer)
        slot.transfer, slot.in_use = [], True
        return self._units[unit].views(WEIGHTS, slot.buffer)

    def release(self, unit: int) -> None:
        """Allow that a unit's weights are overwritten by those of another unit."""
        for slot in self._slots(unit):
            slot.in_use = slot.in_use and slot.unit != unit
        self._shared.sort(key=lambda slot: slot.unit == unit)  # the longest unused one is overwritten first

    def _slots(self, unit: int) -> list[_Slot]:
        """Return the buffers that hold the unit."""
        return [slot for slot in (*self._shared, *self._own.values()) if slot.unit == unit]

    def _load(self, unit: int, free: Sequence[_Slot]) -> _Slot | None:
        """Return the buffer that holds a unit, reading it into its own or the first free one."""
        for slot in self._slots(unit) or ([self._own[unit]] if unit in self._own else free[:1]):
            if slot.unit != unit:
                complete(slot.transfer)
                pages = slot.buffer[: self._units[unit].weights_bytes]
                slot.unit, slot.transfer = unit, self._file.read(pages, self._region(unit))
            return slot
        return None

    def read(self, name: str, *sections: str) -> dict[str, Tensor]:
        """Read sections of a parameter (default: all): the weights in its shape, others flat."""
        unit, tensors = self._unit_of[name], {}
        layout = self._units[unit]
        for section in sections or [key for key in layout.tensors[name].sections if key != GRADIENT]:
            span = layout.spans[name, section]
            buffer = page_buffer(span.num_bytes)
            complete(self._file.read(buffer[: span.num_bytes], self._region(unit) + span.offset))
            tensor = replace(span, place=0).tensor(buffer)
            tensors[section] = tensor.view(layout.tensors[name].shape) if section == WEIGHTS else tensor
        return tensors

    def gradients(self, unit: int) -> Mapping[str, Tensor]:
        """Return zeros for a unit's gradients by name; wait until the last ones have been parked."""
        self._end_parking()
        self._gradient[: self._units[unit].gradient_bytes].zero_()
        return self._units[unit].views(GRADIENT, self._gradient)

    def park(self, unit: int, names: Collection[str] | None = None) -> None:
        """Write a unit's gradients in the background. Only `names` (default: all) have one."""
        self._parked[unit] = self._units[unit].tensors if names is None else names
        self._parking += self._file.write(self._gradient[: self._units[unit].gradient_bytes], self._parked_at[unit])

    def _end_parking(self) -> None:
        parking, self._parking = self._parking, []
        complete(parking)

    def discard(self) -> None:
        """Forget parked gradients, because their step is skipped."""
        self._parked = {}

    def begin(self, record: Mapping[str, object]) -> None:
        """Begin an update with the parked gradients, which can go on after a crash."""
        self._end_parking()
        self._file.sync()
        without = [name for name, unit in self._unit_of.items() if name not in self._parked.get(unit, ())]
        self._save(
            self.journal.model_copy(update={"pending": dict(record), "done": (), "without_gradient": tuple(without)})
        )
        self.discard()

    def pending(self) -> dict[str, object] | None:
        """Return the record of an update that began and has not ended."""
        return self.journal.pending

    def update(self, apply: ApplySlice) -> None:
        """Let `apply(name, begin, tensors)` change each slice of each parameter with a gradient in place. Units that
        the pending update has changed before a crash are left out."""
        skipped, done = {*self.journal.without_gradient}, self.journal.done
        due = [unit for unit, one in enumerate(self._units) if one.tensors.keys() - skipped and unit not in done]
        self._replace(due, lambda name, *arguments: name in skipped or apply(name, *arguments))

    def finish(self) -> None:
        """End the pending update."""
        ended = {"finished": self.journal.pending, "pending": None, "done": (), "without_gradient": ()}
        self._save(self.journal.model_copy(update=ended))

    def write(self, unit: int, values: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Set sections of a unit's parameters to tensors or numbers. Others stay; in a new unit they are 0."""
        layout = self._units[unit]
        if values.keys() != layout.tensors.keys() and self.journal.sums[unit] is None:
            raise ValueError(f"expected values of {', '.join(layout.tensors)}, found {', '.join(values)}")

        def change(name: str, begin: int, tensors: dict[str, Tensor]) -> None:
            for section, value in values.get(name, {}).items():
                if not isinstance(value, Tensor):
                    tensors[section].fill_(value)
                    continue
                if value.numel() != layout.spans[name, section].length:
                    raise ValueError(f"{name}: {section} has {value.numel()} elements")
                first = begin // layout.tensors[name].sections[section].per
                tensors[section].copy_(value.reshape(-1)[first : first + len(tensors[section])])

        self._replace([unit] if layout.num_bytes else [], change)

    def _replace(self, units: Sequence[int], change: ApplySlice) -> None:
        """Write changed records to free regions, and commit each unit. Reading, `change` and writing overlap."""
        for slot in [slot for unit in units for slot in self._slots(unit)]:
            complete(slot.transfer)
            slot.unit, slot.transfer = None, []
        slices = [(unit, *one) for unit in units for one in self._units[unit].slices(self._num_values)]
        reads, writes, commits = list[Transfer](), list[Future[int]](), list[Future[None]]()
        first = total = 0
        try:
            for ahead in range(len(slices) + _AHEAD):
                if ahead < len(slices):
                    if ahead >= _NUM_BUFFERS:
                        writes[ahead - _NUM_BUFFERS].result()
                    unit, _, _, spans = slices[ahead]
                    reads += self._read_slice(unit, spans, self._buffers[ahead % _NUM_BUFFERS])
                if (index := ahead - _AHEAD) < 0:
                    continue
                unit, name, begin, spans = slices[index]
                buffer = self._buffers[index % _NUM_BUFFERS]
                complete(reads[2 * index + 1])
                total += complete(reads[2 * index])
                change(name, begin, {section: span.tensor(buffer) for section, span in spans.items()})
                writes.append(self._queue.submit(self._write_slice, unit, spans, buffer))
                if unit in self._own:
                    weights = replace(spans[WEIGHTS], place=spans[WEIGHTS].offset).pages(self._own[unit].buffer)
                    weights.copy_(spans[WEIGHTS].pages(buffer))
                if [unit] != [following for following, *_ in slices[index + 1 : index + 2]]:
                    commits.append(self._queue.submit(self._commit, unit, total, writes[first:]))
                    first, total = index + 1, 0
        finally:
            wait(writes + [piece for transfer in reads for piece in transfer])
            wait(commits)
        for commit in commits:
            commit.result()

    def _read_slice(self, unit: int, spans: Mapping[str, Span], buffer: Tensor) -> tuple[Transfer, Transfer]:
        """Start to read sections and gradient of a slice; in a new unit they are 0."""
        if self.journal.sums[unit] is None:
            buffer.zero_()
            return [], []
        gradient = self._parked_at[unit] + spans[GRADIENT].offset
        sections = self._move_sections(self._file.read, self._region(unit), spans, buffer)
        return sections, self._file.read(spans[GRADIENT].pages(buffer), gradient)

    def _write_slice(self, unit: int, spans: Mapping[str, Span], buffer: Tensor) -> int:
        return complete(self._move_sections(self._file.write, self._region(unit, free=True), spans, buffer))

    def _move_sections(
        self, move: Callable[[Tensor, int], Transfer], begin: int, spans: Mapping[str, Span], buffer: Tensor
    ) -> Transfer:
        sections = [span for section, span in spans.items() if section != GRADIENT]
        return [piece for span in sections for piece in move(span.pages(buffer), begin + span.offset)]

    def _commit(self, unit: int, old_sum: int, writes: Sequence[Future[int]]) -> None:
        """Make the record in the free region the unit's, if the sum of the old one is right."""
        journal, new_sum = self.journal, sum(write.result() for write in writes) % 2**64
        if unit not in self._verified and journal.sums[unit] not in (None, old_sum % 2**64):
            raise SetupError(
                f"{self.folder / FILE}: the disk returned other data of {next(iter(self._units[unit].tensors))} than "
                "were written; check the disk, delete the folder and start a new run"
            )
        self._file.sync()
        region = (self._region(unit, free=True) - self._bases[self._units[unit].num_bytes]) // self._units[
            unit
        ].num_bytes
        regions, sums = [*journal.regions], [*journal.sums]
        regions[unit], sums[unit] = region, new_sum
        self._save(journal.model_copy(update={"regions": regions, "sums": sums, "done": (*journal.done, unit)}))
        self._verified.add(unit)
        if unit in self._own:
            self._own[unit].unit = unit

    def close(self) -> None:
        """Wait for what is still written, and close the file."""
        try:
            self._end_parking()
        finally:
            self._queue.shutdown()
            self._file.close()
