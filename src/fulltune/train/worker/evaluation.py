from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments

from fulltune.errors import Diverged, Spiked
from fulltune.inference.own_metrics import score_labels
from fulltune.inference.run import Batching, run_rows
from fulltune.recipe.functions import is_own
from fulltune.recipe.tasks import TaskName, compares_answers
from fulltune.stats.bootstrap import ResamplableMetric, find_metric, paired_improvement
from fulltune.stats.curves import (
    CHANCE_STANDARD_ERRORS,
    check_divergence,
    check_got_worse,
    judge_final_loss,
    judge_got_worse,
)
from fulltune.tasks import Predictions, Row, Target
from fulltune.tasks.labels import class_weights
from fulltune.train.loop.callbacks import logged
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.parts import TrainingPart
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker import distributed

MAX_SAVED_TERMS_PER_ROW = 8
MIN_ROWS_FOR_STANDARD_ERROR = 30


class Evaluator(TrainingPart):
    """Scores the eval rows and stops a run that diverges or gets worse, unless the user supplies the loss."""

    def __init__(self, inputs: AttemptInputs, trainer: FullTrainer, target: Target, head_is_new: bool) -> None:
        """With `head_is_new`, assume that the head starts at chance level."""
        self.inputs, self.trainer, self.target, self.head_is_new = inputs, trainer, target, head_is_new
        self.start_counts: np.ndarray | None = None
        """Contributions of the eval rows to the metric before step 1: float64 [rows, k]."""
        self.num_worse, self.worse_by = 0, ""
        """Number of consecutive evaluations worse than before step 1, and a description of the last difference."""
        self.matched_start = False
        """True once an evaluation was not worse than before step 1."""
        self._predictions: Predictions = {}

    def scores(self) -> Mapping[str, float]:
        """Score the eval rows on all ranks and return their metrics."""
        arguments, rows = self.trainer.args, self.trainer.eval_rows
        size = self.inputs.plan.eval_batch_size
        self._predictions = distributed.predict_shared(rows, size, arguments, self.predict_rows)
        if self.inputs.task.FACTS.completes_rows:
            self._predictions = self.inputs.task.row_scores(self._predictions, self.target)
        own = score_labels(self.inputs.recipe, self._predictions, self.target, self.inputs.data / "eval")
        means = {name: float(values.mean()) for name, values in own.items()}
        return {**self.inputs.task.metrics(self._predictions, self.target), **means}

    def metric_of(self, rows: Sequence[Row]) -> float:
        """Compute the run's metric on these rows in this process."""
        return float(self.inputs.task.metrics(self.predict_rows(rows), self.target)[self.inputs.plan.metric])

    def predict_rows(self, rows: Sequence[Row]) -> Predictions:
        """Run rows through the model in this process; return arrays by name: [rows, ...]."""
        trainer: Any = self.trainer
        plan = self.inputs.plan
        with self.inputs.journal.phase_within("evaluation"):
            return run_rows(
                trainer.forward_model,
                rows,
                self.inputs.task,
                self.target,
                trainer.processing_class.pad_token_id,
                Batching(plan.eval_batch_size, plan.precision, trainer.head, trainer.write_heartbeat),
            )

    def state(self) -> Mapping[str, Any]:
        worse = {"num_worse": self.num_worse, "worse_by": self.worse_by, "matched_start": self.matched_start}
        return {"start_counts": self.start_counts, **worse}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.start_counts, self.matched_start = state.get("start_counts"), state["matched_start"]
        self.num_worse, self.worse_by = state["num_worse"], state["worse_by"]

    @property
    def untrained_loss(self) -> float | None:
        """Loss of the dry run, or None if unknown. For a new head it is at least the chance loss, because a head from a
        linear probe starts lower."""
        inputs = self.inputs
        # A micro batch alone has fewer negatives than a global batch.
        measured = None if inputs.task.FACTS.contrasts else inputs.usage.dry_run_loss
        if not self.head_is_new:
            return measured
        weights = class_weights(inputs.recipe, inputs.summary)
        return max(measured or 0.0, inputs.task.chance_loss(inputs.summary, weights))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Raise `Spiked` if the loss has diverged."""
        if self.inputs.has_own_loss or "loss" not in event["logs"]:
            return
        decision = check_divergence(logged(state, "loss"), self.inputs.highest_learning_rate, self.untrained_loss)
        if decision.action == "stop":
            steps = [int(entry["step"]) for entry in state.log_history if "loss" in entry]
            raise Spiked(decision.reason, steps[decision.readings - 1] + 1 if decision.readings else 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Count consecutive evaluations that are worse than before step 1; raise `Diverged` if there are too many."""
        inputs, predictions = self.inputs, self._predictions
        self._predictions = {}
        if inputs.has_own_loss or inputs.summary.splits["eval"].rows < MIN_ROWS_FOR_STANDARD_ERROR:
            return
        measure = _metric_for_comparison(inputs.recipe.task, self.target, inputs.plan.metric, predictions)
        if measure.row_terms is None:
            return
        now = measure.row_terms(predictions)
        if state.global_step == 0:
            self.start_counts = now
            return
        if self.start_counts is None:
            return
        better, error = paired_improvement(measure, self.start_counts, now)
        is_worse = not math.isfinite(better) or better < -CHANCE_STANDARD_ERRORS * error
        is_early = state.global_step <= self.inputs.plan.warmup_steps
        self.num_worse = self.num_worse + 1 if is_worse and not is_early else 0
        direction = "lower" if measure.greater_is_better else "higher"
        self.worse_by = f"{measure.name} is {abs(better):.3g} {direction} (standard error {error:.2g})"
        # A loss compared instead of the run's metric must not condemn the final weights.
        self.matched_start = self.matched_start or not is_worse or measure.name != self.inputs.plan.metric
        losses, rate = logged(state, "loss"), self.inputs.highest_learning_rate
        decision = check_got_worse(self.num_worse, self.worse_by, losses, rate, self.untrained_loss)
        if decision.action == "stop":
            raise Diverged(decision.reason)

    def judge_end(self, state: TrainerState) -> None:
        """Warn or raise `Diverged`, by severity, if the loss ended high or the final weights are worse than before step
        1."""
        inputs, rate = self.inputs, self.inputs.highest_learning_rate
        if inputs.has_own_loss:
            return
        losses, eval_losses = logged(state, "loss"), logged(state, "eval_loss")
        decision = judge_final_loss(losses, eval_losses, rate, self.untrained_loss)
        # After a rollback a loss that ends above its start is a failure.
        if decision.action == "stop" or (decision.action == "warn" and inputs.plan.rollbacks):
            raise Diverged(decision.reason)
        has_good_weights = self.matched_start and inputs.recipe.train.load_best_model_at_end
        # With a budget, the pretrained weights are kept instead.
        if self.num_worse and not has_good_weights and inputs.plan.generic.budget is None:
            decision = judge_got_worse(self.worse_by, losses, rate, self.untrained_loss)
            if decision.action == "stop":
                raise Diverged(decision.reason)
        if decision.action == "warn":
            inputs.warn(decision.reason)


def _metric_for_comparison(task: TaskName, target: Target, metric: str, predictions: Predictions) -> ResamplableMetric:
    """Return the run's metric if it can be computed from sums over rows, else the loss."""
    # An own metric may be one number for all rows, which says nothing about chance.
    is_elsewhere = is_own(metric) or (target.form.writes_answers and compares_answers(metric))
    measure = find_metric(task, target, "loss" if is_elsewhere else metric)
    if measure.row_terms is None or measure.row_terms(predictions).shape[1] > MAX_SAVED_TERMS_PER_ROW:
        return find_metric(task, target, "loss")
    return measure
