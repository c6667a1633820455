"""Is the model better than before step 1? Each evaluation is compared row by row with one before the first update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from fulltune.errors import Diverged
from fulltune.recipe.tasks import TaskName
from fulltune.stats.bootstrap import gain
from fulltune.stats.curves import made_worse
from fulltune.stats.row_scores import Measure, measure_of
from fulltune.tasks import Predictions, Target
from fulltune.train.loop.callbacks import logged
from fulltune.train.run_time import SCORING

if TYPE_CHECKING:
    from fulltune.train.worker.context import AttemptContext

ERRORS = 2.0
"""Standard errors that an evaluation must be worse by."""
MOST_NUMBERS = 8
"""Of a row that are kept in each checkpoint."""
LEAST_ROWS = 30
"""Eval rows below which a standard error says little."""


def score_first(attempt: AttemptContext) -> None:
    """Score the eval rows before step 1, where the plan says so; not in a run that is resumed."""
    if attempt.trainer.state.global_step:
        return
    if not attempt.plan.eval_on_start:
        attempt.drifting.read()
        return
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
        is_start, kept, attempt.kept = state.global_step == 0, attempt.kept, None
        if not self.judged or kept is None or attempt.summary.splits["eval"].rows < LEAST_ROWS:
            return
        measure = judged_by(attempt.recipe.task, attempt.target, attempt.plan.metric, kept)
        if measure.counts is None:
            return
        now = measure.counts(kept)
        if is_start:
            trainer.start = now
        elif trainer.start is not None:
            self._judge(measure, trainer.start, now, state)

    def _judge(self, measure: Measure, start: np.ndarray, now: np.ndarray, state: Any) -> None:
        """Count evaluations in a row that are worse than before step 1, after the warm-up, and stop by `made_worse`;
        all processes have the same rows and decide alike."""
        attempt, trainer = self.attempt, self.attempt.trainer
        better, error = gain(measure, start, now)
        is_worse = not math.isfinite(better) or better < -ERRORS * error
        is_early = state.global_step <= attempt.plan.warmup_steps
        behind = trainer.seen.behind + 1 if is_worse and not is_early else 0
        way = "lower" if measure.greater_is_better else "higher"
        what = f"{measure.name} is {abs(better):.3g} {way} (standard error {error:.2g})"
        # A loss in the place of the run's metric does not say at the end that what is kept is worse.
        level = trainer.seen.level or not is_worse or measure.name != attempt.plan.metric
        trainer.seen = replace(trainer.seen, behind=behind, behind_by=what, level=level)
        decision = made_worse(behind, what, logged(state, "loss"), attempt.highest_rate, attempt.untrained_loss)
        if decision.action == "stop":
            raise Diverged(decision.reason)


def judged_by(task: TaskName, target: Target, metric: str, kept: Predictions) -> Measure:
    """The run's metric; the loss in the place of one that is no function of sums over rows, or of many of them."""
    found = measure_of(task, target, metric)
    if found.counts is None or found.counts(kept).shape[1] > MOST_NUMBERS:
        return measure_of(task, target, "loss")
    return found
