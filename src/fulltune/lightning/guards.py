"""The guards of a run as Lightning's callbacks: thin hooks around the pure functions in `train/loop`.

Lightning runs a step's backward passes, calls `on_before_optimizer_step`, clips, and updates. There loss and gradient
norm are reduced over all processes once a step, so that all decide alike. A step is skipped by freeing its gradients:
an optimizer leaves out what has none, and its moments stay. Where the strategy shares gradients out so that they cannot
be seen here (DeepSpeed, FSDP), the loss alone is judged, before the update, and what would be skipped stops the
training.

`StepGuard` and `DivergenceGuard` also work with a `LightningModule` of one's own, under automatic optimization.
"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from fulltune import methods
from fulltune.errors import Diverged, GuardStop, Spiked
from fulltune.lightning.available import Callback
from fulltune.lightning.settings import holds_whole, strategy_of
from fulltune.train.loop import step_guard
from fulltune.train.loop.guarded_step import rows_in
from fulltune.train.loop.guards import diverged, ended_high, nothing_learned
from fulltune.train.loop.step_guard import Judged, StepMemory
from fulltune.train.worker.weights import InitialWeights

_log = logging.getLogger(__name__)


def _holds_whole(strategy: Any) -> bool:
    return holds_whole(strategy_of([kind.__name__ for kind in type(strategy).__mro__]))


class StepGuard(Callback):
    """Skips a step whose loss or gradient is not finite, or that is suspect; raises where trouble stays.

    Args:
        finite_only: Judge nothing but what is not finite: for a loss that may rise for good reasons.

    Raises:
        Spiked: By Lightning's `fit`; the weights are those before the update.
    """

    def __init__(self, finite_only: bool = False) -> None:
        self.finite_only = finite_only
        self.seen = StepMemory()
        self.loss: float | None = None
        """Of the last step, if it was not skipped."""
        self.largest_grad_norm: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._rows = self._passes = 0

    def state_dict(self) -> dict[str, Any]:
        return self.seen.as_json()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = StepMemory.from_json(state_dict)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._restart()
        self._rows += rows_in(batch) if isinstance(batch, dict) else 0
        self._passes += 1

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        self._sum = self._sum + loss.detach().float()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._passes < trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # DeepSpeed's strategy asks after each micro batch
        step = trainer.global_step + 1
        judged, loss, norm = self._judge(trainer, pl_module, optimizer, step)
        self.seen, self.loss = judged.seen, None
        if judged.action == "skip" and not _holds_whole(trainer.strategy):
            judged = replace(judged, action="stop", since=step)
        if judged.action == "stop":
            raise Spiked(f"step {step}, before the update: {judged.reason}", judged.since or step)
        if judged.action == "skip":
            rank_zero_warn(f"step {step} is skipped: {judged.reason}")
            optimizer.zero_grad(set_to_none=True)
            return
        self.loss = loss
        if norm is not None and math.isfinite(norm):
            self.largest_grad_norm = max(self.largest_grad_norm or 0.0, norm)

    def _judge(self, trainer: Any, pl_module: Any, optimizer: Any, step: int) -> tuple[Judged, float, float | None]:
        """What becomes of a step, its loss and its norm, over all processes; the host waits for the device once."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        norm = _norm(optimizer) if _holds_whole(trainer.strategy) else None
        factor = getattr(pl_module, "extra_factor", 1.0)
        values = [self._sum, self._rows, *([] if norm is None else [norm])]
        found = torch.stack([torch.as_tensor(one, device=pl_module.device).float() for one in values])
        loss, rows, known = [*trainer.strategy.reduce(found, reduce_op="mean").tolist(), None][:3]
        loss = loss / scale / factor
        scaled = scaler is not None and scale >= 1
        judged = step_guard.judge(self.seen, step, loss, known, rows=rows, scaled=scaled, own=self.finite_only)
        return judged, loss, known


def _norm(optimizer: Any) -> torch.Tensor:
    """Of all gradients, before clipping."""
    every = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    return torch.nn.utils.get_total_norm(every)


class DivergenceGuard(Callback):
    """Raises when the loss diverged; at the end, when it ended where it should not be.

    Args:
        steps: Has the loss of each step; stands before this one among the Trainer's callbacks.
        logging_steps: Steps that make one reading.
        learning_rate: At its highest, for the message.
        untrained: The loss of guessing, for a head that is new; None: not known.
        eval_loss: The name under which it is logged.
    """

    def __init__(
        self,
        steps: StepGuard,
        logging_steps: int,
        learning_rate: float,
        untrained: float | None = None,
        eval_loss: str = "eval_loss",
    ) -> None:
        self.steps, self.logging_steps, self.learning_rate = steps, logging_steps, learning_rate
        self.untrained, self.eval_loss = untrained, eval_loss
        self.readings: list[float] = []
        self._at: list[int] = []
        """The step of each reading."""
        self._eval_losses: list[float] = []
        self._pending: list[float] = []
        self._done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"readings": self.readings, "at": self._at, "eval_losses": self._eval_losses, "pending": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.readings, self._at = list(state_dict["readings"]), list(state_dict["at"])
        self._eval_losses, self._pending = list(state_dict["eval_losses"]), list(state_dict["pending"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._done:
            return
        self._done = step
        if self.steps.loss is not None:
            self._pending.append(self.steps.loss)
        if not self._pending or (step > 1 and step % self.logging_steps):
            return
        self.readings.append(statistics.fmean(self._pending))
        self._at.append(step)
        self._pending = []
        decision = diverged(self.readings, self.learning_rate, self.untrained)
        if decision.action == "stop":
            raise Spiked(decision.reason, self._at[decision.readings - 1] + 1 if decision.readings else 1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        found = trainer.callback_metrics.get(self.eval_loss)
        if found is not None and not trainer.sanity_checking:
            self._eval_losses.append(float(found))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        decision = ended_high(self.readings, self._eval_losses, self.learning_rate, self.untrained)
        if decision.action == "stop":
            raise Diverged(decision.reason)
        if decision.action == "warn":
            rank_zero_warn(decision.reason)


class MovedGuard(Callback):
    """Raises at the end when no parameter moved; by the first process, which keeps the weights before step 1 on disk.

    Args:
        steps: Has the largest norm.
        file: Of the weights, as long as the training goes on.
    """

    def __init__(self, steps: StepGuard, file: Path) -> None:
        self.steps, self._file = steps, file
        self._initial: InitialWeights | None = None
        self._reached: frozenset[str] = frozenset()
        self._first_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        if not _holds_whole(trainer.strategy):
            _log.info("what moved is not counted: %s shares the weights out", type(trainer.strategy).__name__)
        elif trainer.is_global_zero:
            self._initial = InitialWeights(pl_module.model, self._file)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._initial is not None and not self._reached:
            trained = methods.trained(pl_module.model)
            self._reached = frozenset(name for name, one in trained.items() if one.grad is not None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        reason = ""
        if self._initial is not None and trainer.global_step > self._first_step:
            moved = self._initial.moved(pl_module.model, trainer.optimizers[0], self._reached)
            reason = nothing_learned(moved, bool(self._reached), self.steps.largest_grad_norm).reason
        self._delete()
        if reason := trainer.strategy.broadcast(reason):  # all raise, or the others would wait for the first
            raise GuardStop(reason)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._delete()

    def _delete(self) -> None:
        if self._initial is not None:
            self._initial.delete()
            self._initial = None
