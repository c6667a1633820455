"""The prepared rows of a run as a `LightningDataModule`: its own order, cut into the same micro batches.

Lightning asks each process for its loaders. They are no `torch.utils.data.DataLoader`, so that Lightning never puts a
sampler of its own into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from fulltune.inference.run import Share, batches, by_length
from fulltune.records.plan import Plan
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.loop.trainer import ITEMS
from fulltune.train.worker import distributed

Collate = Callable[[list[Any]], dict[str, Any]]
"""Rows to a batch on the host."""
POSITIONS = "positions"
"""Of an eval batch, where its rows stand among all; those of rows that do not count are left out."""


@dataclass(eq=False)
class RankBatches:
    """Of the micro batches of all processes those of one, as accelerate gives them out: in turn."""

    sampler: GlobalBatchSampler
    rank: int
    first: int = 0
    """So many of them are left out, once: they were trained on before."""

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first = self.first, 0
        processes = self.sampler.num_processes
        yield from islice(self.sampler, first * processes + self.rank, None, processes)


@dataclass(eq=False)
class StepLoader:
    """Micro batches; each says how many `ITEMS` the loss of its whole step has in this process.

    The items of a step must be known before its first backward pass. Lightning saves and restores its place by
    `state_dict`, so that a training goes on inside an epoch.
    """

    loader: DataLoader[Any]
    batches: RankBatches
    accumulation: int
    """Micro batches of a step; an epoch's last one may have fewer."""
    epoch: Callable[[], int]
    given: int = 0
    """Micro batches of this epoch so far."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.batches.sampler.set_epoch(self.epoch())
        self.given = self.batches.first
        rows = iter(self.loader)
        while step := list(islice(rows, self.accumulation)):
            items = sum(batch[ITEMS] for batch in step)
            for batch in step:
                self.given += 1
                yield batch | {ITEMS: items}

    def state_dict(self) -> dict[str, int]:
        """The place inside the epoch; at its end that of the next one."""
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin there."""
        self.batches.first = state["given"]


@dataclass(eq=False)
class EvalLoader:
    """Batches of eval rows."""

    loader: DataLoader[Any]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.loader


class FineTuningData:
    """The train and eval rows of a plan; see `based`.

    Args:
        rows: That are trained on.
        eval_rows: That are scored.
        plan: Their batches.
        sampler: Makes the sampler of a number of processes.
        collated: A batch of train rows.
        collated_for_scoring: A batch of eval rows.
    """

    trainer: Any

    def __init__(
        self,
        rows: Any,
        eval_rows: Any,
        plan: Plan,
        sampler: Callable[[int], GlobalBatchSampler],
        collated: Collate,
        collated_for_scoring: Collate,
    ) -> None:
        super().__init__()
        self._rows, self._eval_rows, self._plan = rows, eval_rows, plan
        self._sampler, self._collated, self._collated_for_scoring = sampler, collated, collated_for_scoring

    def train_dataloader(self) -> StepLoader:
        """This process's micro batches."""
        trainer = self.trainer
        own = RankBatches(self._sampler(trainer.world_size), trainer.global_rank)
        loader = DataLoader(self._rows, batch_sampler=own, collate_fn=self._collated, **self._options())
        return StepLoader(loader, own, self._plan.gradient_accumulation_steps, lambda: trainer.current_epoch)

    def val_dataloader(self) -> EvalLoader:
        """This process's eval rows, longest first; each process has as many batches."""
        trainer = self.trainer
        size = self._plan.eval_batch_size
        order = by_length(self._eval_rows)
        positions, count = distributed.share(order, size, trainer.global_rank, trainer.world_size)
        chunks: Any = _EvalBatches(Share(self._eval_rows, positions), positions[:count], size)
        return EvalLoader(DataLoader(chunks, batch_size=None, collate_fn=self._scored, **self._options()))

    def _scored(self, batch: Any) -> dict[str, Any]:
        rows, positions = batch
        return self._collated_for_scoring(rows) | {POSITIONS: positions}

    def _options(self) -> dict[str, Any]:
        workers = self._plan.loader_workers
        return {
            "num_workers": workers,
            "multiprocessing_context": "fork" if workers else None,
            "pin_memory": self._plan.device != "cpu",
            # A loader draws a seed when it begins: not from the generator that dropout draws from.
            "generator": torch.Generator().manual_seed(self._plan.seed),
        }


class _EvalBatches:
    """Batches of rows with the positions of those that count, for a loader that takes them as they are."""

    def __init__(self, rows: Share, counting: Sequence[int], size: int) -> None:
        self._rows, self._counting = rows, counting
        self._chunks = list(batches(range(len(rows)), size))

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> tuple[list[Any], list[int]]:
        chunk = self._chunks[number]
        return [self._rows[i] for i in chunk], [self._counting[i] for i in chunk if i < len(self._counting)]
