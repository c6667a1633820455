"""The eval rows scored while training, and a run whose curves go wrong ended: its loss diverges, or its evaluations are
worse, row by row, than the one before step 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from fulltune.errors import Diverged, Spiked
from fulltune.inference.run import Batching, Share, by_length, run_rows
from fulltune.recipe.tasks import TaskName
from fulltune.stats.bootstrap import Measure, gain, measure_of
from fulltune.stats.curves import BEYOND_CHANCE, diverged, ended_high, ended_worse, made_worse
from fulltune.tasks import Predictions, Target
from fulltune.tasks.labels import class_weights
from fulltune.train.loop.callbacks import logged
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer, TrainingPart
from fulltune.train.worker import distributed

MOST_NUMBERS = 8
"""Of a row that are kept in each checkpoint."""
LEAST_ROWS = 30
"""Eval rows below which a standard error says little."""


class Evaluator(TrainingPart):
    """Scores the eval rows, and judges them and the train losses; a loss of the user's own may rise for good reasons
    and is not judged."""

    def __init__(self, inputs: AttemptInputs, trainer: FullTrainer, target: Target, head_is_new: bool) -> None:
        self.inputs, self.trainer, self.target, self.head_is_new = inputs, trainer, target, head_is_new
        self.start: np.ndarray | None = None
        """What each eval row contributed to the metric before step 1, float64 [rows, k]."""
        self.behind, self.behind_by = 0, ""
        """Evaluations in a row in which the model was worse than before step 1, and by how much in the last one."""
        self.level = False
        """Whether some evaluation was not worse than the one before step 1, so that good weights can be kept."""
        self._predictions: Predictions = {}

    def scores(self) -> Mapping[str, float]:
        """The metrics of the eval rows, which several processes share: the same in each."""
        arguments, rows = self.trainer.args, cast("Any", self.trainer.eval_dataset)
        if arguments.world_size == 1:
            self._predictions = self.reduced(rows)
        else:
            size, rank = self.inputs.plan.eval_batch_size, arguments.process_index
            positions, count = distributed.share(by_length(rows), size, rank, arguments.world_size)
            self._predictions = distributed.gathered(self.reduced(Share(rows, positions)), positions[:count])
        return self.inputs.task.metrics(self._predictions, self.target)

    def metric_of(self, rows: Any) -> float:
        """What the run chooses by, of these rows in this process."""
        return float(self.inputs.task.metrics(self.reduced(rows), self.target)[self.inputs.plan.metric])

    def reduced(self, rows: Any) -> Predictions:
        """These rows through the current weights, in this process: name to values[rows, ...], a few numbers of each."""
        trainer: Any = self.trainer
        plan = self.inputs.plan
        with self.inputs.journal.during("evaluation"):
            return run_rows(
                trainer.forward_model,
                rows,
                self.inputs.task,
                self.target,
                trainer.processing_class.pad_token_id,
                Batching(plan.eval_batch_size, plan.precision, trainer.head, trainer.alive),
            )

    def state(self) -> Mapping[str, Any]:
        return {"start": self.start, "behind": self.behind, "behind_by": self.behind_by, "level": self.level}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.start = state.get("start")
        self.behind, self.behind_by, self.level = state["behind"], state["behind_by"], state["level"]

    @property
    def untrained_loss(self) -> float | None:
        """The dry run's loss, at least chance's of a new head: one that starts from a probe begins low."""
        inputs = self.inputs
        measured = inputs.observed.dry_run_loss
        if not self.head_is_new:
            return measured
        weights = class_weights(inputs.recipe, inputs.summary)
        return max(measured or 0.0, inputs.task.chance_loss(inputs.summary, weights))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Stop a run whose loss has diverged, by the Trainer's history."""
        if self.inputs.has_own_loss or "loss" not in (logs or {}):
            return
        decision = diverged(logged(state, "loss"), self.inputs.highest_rate, self.untrained_loss)
        if decision.action == "stop":
            steps = [entry["step"] for entry in state.log_history if "loss" in entry]
            raise Spiked(decision.reason, steps[decision.readings - 1] + 1 if decision.readings else 1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare with the evaluation before step 1; all processes have the same rows and decide alike."""
        inputs, predictions = self.inputs, self._predictions
        self._predictions = {}
        if inputs.has_own_loss or inputs.summary.splits["eval"].rows < LEAST_ROWS:
            return
        measure = judged_by(inputs.recipe.task, self.target, inputs.plan.metric, predictions)
        if measure.counts is None:
            return
        now = measure.counts(predictions)
        if state.global_step == 0:
            self.start = now
        elif self.start is not None:
            self._compare(measure, self.start, now, state)

    def _compare(self, measure: Measure, start: np.ndarray, now: np.ndarray, state: Any) -> None:
        """Count evaluations in a row that are worse than before step 1, after the warm-up, and stop by `made_worse`."""
        better, error = gain(measure, start, now)
        is_worse = not math.isfinite(better) or better < -BEYOND_CHANCE * error
        is_early = state.global_step <= self.inputs.plan.warmup_steps
        self.behind = self.behind + 1 if is_worse and not is_early else 0
        way = "lower" if measure.greater_is_better else "higher"
        self.behind_by = f"{measure.name} is {abs(better):.3g} {way} (standard error {error:.2g})"
        # Where the loss is compared in place of the run's metric, it does not condemn the kept weights at the end.
        self.level = self.level or not is_worse or measure.name != self.inputs.plan.metric
        losses, rate = logged(state, "loss"), self.inputs.highest_rate
        decision = made_worse(self.behind, self.behind_by, losses, rate, self.untrained_loss)
        if decision.action == "stop":
            raise Diverged(decision.reason)

    def judge_end(self, state: Any) -> None:
        """Stop or warn when the loss ended high, or what is kept is worse than before step 1."""
        inputs, rate = self.inputs, self.inputs.highest_rate
        if inputs.has_own_loss:
            return
        losses, eval_losses = logged(state, "loss"), logged(state, "eval_loss")
        decision = ended_high(losses, eval_losses, rate, self.untrained_loss)
        # After a rollback a loss that ends above its beginning is a failure, not a warning.
        if decision.action == "stop" or (decision.action == "warn" and inputs.plan.rollbacks):
            raise Diverged(decision.reason)
        keeps_good = self.level and inputs.recipe.train.load_best_model_at_end
        # A budget on generic text keeps the untouched model instead.
        if self.behind and not keeps_good and inputs.plan.generic.budget is None:
            decision = ended_worse(self.behind_by, losses, rate, self.untrained_loss)
            if decision.action == "stop":
                raise Diverged(decision.reason)
        if decision.action == "warn":
            inputs.warn(decision.reason)


def judged_by(task: TaskName, target: Target, metric: str, kept: Predictions) -> Measure:
    """The run's metric; the loss in the place of one that is no function of sums over rows, or of many of them."""
    found = measure_of(task, target, metric)
    if found.counts is None or found.counts(kept).shape[1] > MOST_NUMBERS:
        return measure_of(task, target, "loss")
    return found
