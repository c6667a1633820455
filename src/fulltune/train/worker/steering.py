"""Sets the weight of generic text while training goes on, so that the budget for forgetting is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from fulltune.forgetting.budget import Weighing, next_weight
from fulltune.records.events import Steered
from fulltune.train.worker.context import AttemptContext
from fulltune.train.worker.replay import Replay


@dataclass(eq=False)
class Steering(TrainerCallback):
    """Measures the drift every so many steps, and raises or lowers the weight by what it finds."""

    attempt: AttemptContext
    replay: Replay
    limit: float
    weighing: Weighing
    every: int

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every or state.global_step >= self.attempt.plan.total_steps:
            return
        measured = self.attempt.drifting.read()
        if measured is None:
            return
        schedule: Any = self.attempt.trainer.lr_scheduler
        rate = schedule.get_last_lr()[0] / self.attempt.plan.learning_rate
        self.replay.weight = next_weight(self.replay.weight, measured, self.limit, rate, self.weighing)
        self.attempt.recorder.write(
            Steered(step=state.global_step, drift=measured.drift, error=measured.error, weight=self.replay.weight)
        )
