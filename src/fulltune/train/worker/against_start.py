"""Is the model better than it was before step 1? The eval rows are scored once more, before the first update, and each
later evaluation is compared with that one row by row; `loop/guards.py` decides (`made_worse`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from fulltune.errors import Diverged
from fulltune.recipe.tasks import TaskName
from fulltune.stats.bootstrap import gain
from fulltune.stats.row_scores import Measure, measure_of
from fulltune.tasks import Target
from fulltune.train.loop.callbacks import logged
from fulltune.train.loop.guards import made_worse
from fulltune.train.run_time import SCORING

if TYPE_CHECKING:
    from fulltune.train.worker.context import AttemptContext

ERRORS = 2.0
"""Standard errors that an evaluation must be worse by."""
LEAST_ROWS = 30
"""Eval rows below which a standard error says little."""


def score_first(attempt: AttemptContext) -> None:
    """Before step 1 score the eval rows; where the run goes on, do the evaluation that was left when it was stopped."""
    if attempt.trainer.state.global_step:
        attempt.trainer.score_last_step()
    elif attempt.plan.eval_on_start:
        attempt.recorder.phase(SCORING)
        attempt.trainer.evaluate()


@dataclass(eq=False)
class AgainstStart(TrainerCallback):
    """Ends an attempt that makes the model worse than it was."""

    attempt: AttemptContext
    judged: bool
    """End it; False: a loss of the user's own may rise for good reasons."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        attempt, trainer = self.attempt, self.attempt.trainer
        measure = judged_by(attempt.recipe.task, attempt.target, attempt.plan.metric)
        if measure.counts is None or attempt.kept is None:
            return
        now = measure.counts(attempt.kept)
        if state.global_step == 0:
            trainer.start = now
        elif self._may_judge(state) and trainer.start is not None:
            self._judge(measure, trainer.start, now, state)

    def _may_judge(self, state: Any) -> bool:
        plan, rows = self.attempt.plan, self.attempt.summary.splits["eval"].rows
        return self.judged and rows >= LEAST_ROWS and state.global_step > plan.warmup_steps

    def _judge(self, measure: Measure, start: np.ndarray, now: np.ndarray, state: Any) -> None:
        """Of an evaluation after the warm-up. All processes have the same rows, and decide alike."""
        attempt, trainer = self.attempt, self.attempt.trainer
        better, error = gain(measure, start, now)
        behind = trainer.seen.behind + 1 if better < -ERRORS * error else 0
        trainer.seen = replace(trainer.seen, behind=behind)
        what = f"{measure.name} {abs(better):.3g} worse (standard error {error:.2g})"
        decision = made_worse(behind, what, logged(state, "loss"), attempt.highest_rate, attempt.untrained_loss)
        if decision.action == "stop":
            raise Diverged(decision.reason)


def judged_by(task: TaskName, target: Target, metric: str) -> Measure:
    """The run's metric; the loss in the place of one that is no function of sums over rows."""
    found = measure_of(task, target, metric)
    return found if found.counts is not None else measure_of(task, target, "loss")
