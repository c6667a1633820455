"""Single passes through the model as training takes them, each with the seconds that it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from fulltune.records.plan import Plan
from fulltune.train.loop.trainer import ITEMS
from fulltune.train.worker import distributed
from fulltune.train.worker.no_trace import gradients_are_finite

Positions = Sequence[int]


@dataclass(frozen=True)
class Passes:
    """Runs passes; all processes are given the first one's seconds, so that all decide on the same further passes."""

    trainer: Any
    """The `FullTrainer`."""
    rows: Any
    plan: Plan
    model: Any
    """As the Trainer's loop has it: with autocast, compiled, with several processes in `DistributedDataParallel`."""
    optimizer: Any
    evaluate: Callable[[Positions], object]
    lengths: np.ndarray
    """lengths[rows] of the train rows, in tokens."""
    eval_lengths: np.ndarray
    """eval_lengths[rows]."""

    def train(self, positions: Positions, *, keep: bool = False) -> tuple[float, float]:
        """Forward and backward of these rows, added to present gradients with `keep`: the loss and the seconds."""
        trainer = self.trainer
        if not keep:
            self.optimizer.zero_grad()
        began = self._now()
        self.model.train()
        batch = send_to_device(trainer.collated([self.rows[i] for i in positions]), trainer.args.device)
        # All processes try the same rows, and the Trainer multiplies by their number.
        num_items = torch.tensor(batch.pop(ITEMS) * trainer.args.world_size, device=trainer.args.device)
        loss = trainer.compute_loss(self.model, batch, num_items_in_batch=num_items)
        value = float(loss.detach())
        if self._all(math.isfinite(value)):
            loss.backward()
        return value, self._since(began)

    def step(self) -> float:
        """Clip and update with a rate of 0: the seconds; gradients that are not finite are left to step 1's guard."""
        model = self.trainer.model
        if not self._all(gradients_are_finite(model.parameters())):
            return 0.0
        began = self._now()
        if self.trainer.args.max_grad_norm:
            self.trainer._clip_grad_norm(model)
        self.optimizer.step()
        return self._since(began)

    def _all(self, finite: bool) -> bool:
        """Whether it is so in all processes that share out the weights: they go on together."""
        return all(distributed.gathered(int(finite))) if self.trainer.is_shared else finite

    def score(self, positions: Positions) -> float:
        """These eval rows as an evaluation takes them: the seconds."""
        began = self._now()
        self.evaluate(positions)
        return self._since(began)

    def _now(self) -> float:
        if self.plan.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _since(self, began: float) -> float:
        seconds = self._now() - began
        return float(distributed.from_first(seconds)) if self.trainer.args.world_size > 1 else seconds


def batch_of(trainer: Any, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """These rows collated, on the trainer's device: `input_ids[rows, tokens]` and what else the task gives."""
    return {name: tensor.to(trainer.args.device) for name, tensor in trainer.data_collator(rows).items()}
