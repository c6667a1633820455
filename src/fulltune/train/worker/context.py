"""What the parts of an attempt share, and the evaluation of the current weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from fulltune import methods
from fulltune.inference.run import Share, by_length, run_rows
from fulltune.models.checkpoint_head import Head
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.records.probe import Probe
from fulltune.records.training import Check
from fulltune.system import sharing
from fulltune.tasks import Predictions, ReadingTask, Target, Task, task_named
from fulltune.tasks.settings import class_weights
from fulltune.train.hooks import Hooks
from fulltune.train.journal import Journal
from fulltune.train.loop.callbacks import Recorder, SaveAndStopEarly, StopWhenAsked
from fulltune.train.loop.guards import rate_factor
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.request import Request
from fulltune.train.worker import distributed
from fulltune.train.worker.drifting import DriftMonitor
from fulltune.train.worker.observed import Observed
from fulltune.train.worker.scaling import Scaled


@dataclass
class AttemptContext:
    """Made at the beginning; trainer and method come when the model is loaded, checks before step 1."""

    request: Request
    hooks: Hooks
    journal: Journal
    recorder: Recorder
    stop: StopWhenAsked
    observed: Observed
    summary: DataSummary
    trainer: FullTrainer = field(init=False)
    applied: methods.Applied = field(init=False)
    drifting: DriftMonitor = field(init=False)
    base_weights: str | None = None
    """Tells the pretrained weights from others; None: a process has only a part of them, or they are not known yet."""
    head: Head | None = None
    """What became of the head, for tasks that may need a new one."""
    scaled: Scaled | None = None
    """The last layer of a head that learns numbers in other units than the user's."""
    about_scale: str = ""
    """Those units in words, or why they are the user's; empty: no numbers are learned."""
    head_start: Probe | None = None
    """What was fitted for a new head to start from."""
    kept: Predictions | None = None
    """Of the eval rows, from an evaluation until it is judged."""
    at_begin: list[Callable[[], None]] = field(default_factory=list)
    """Called when everything is ready for step 1."""
    checks: list[Check] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.request.plan

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes."""
        return self.journal.path is not None

    @property
    def initial_weights(self) -> Path:
        """Where this process keeps what it trains as it was before step 1."""
        return self.request.initial_weights(self.trainer.args.process_index)

    @property
    def trained_weights(self) -> Path:
        """The same of those after training."""
        return self.request.trained_weights(self.trainer.args.process_index)

    def agreed(self, value: Any) -> Any:
        """What the first process has, where all take part in what follows."""
        return value if self.sharing is None else distributed.from_first(value)

    @property
    def data(self) -> Path:
        """The folder of the prepared rows."""
        return Path(self.request.run_folder) / "data"

    @cached_property
    def recipe(self) -> Recipe:
        return self.request.recipe_as_planned

    @cached_property
    def task(self) -> Task:
        return task_named(self.recipe.task)

    @property
    def target(self) -> Target:
        """What is learned, with the units of the logits as they are now."""
        target, scaled = Target.of(self.summary), self.scaled
        return target if scaled is None else replace(target, logit_scale=(scaled.shift, scaled.factor))

    @property
    def untrained_loss(self) -> float | None:
        """The dry run's loss, at least chance's of a new head: one that starts from a probe begins low."""
        measured = self.observed.dry_run_loss
        if self.head is None or self.head.order is not None:
            return measured
        return max(
            measured or 0.0,
            cast(ReadingTask, self.task).chance_loss(self.summary, class_weights(self.recipe, self.summary)),
        )

    @property
    def highest_rate(self) -> float:
        """Peak of body or head, whichever learns faster; lower where the run went back."""
        highest = max(self.plan.learning_rate, self.plan.head_learning_rate or 0.0)
        return highest * rate_factor(self.plan.rollbacks)

    @cached_property
    def sharing(self) -> sharing.Sharing | None:
        """What the processes share out; None: each holds everything."""
        return sharing.of(self.recipe)

    @property
    def in_deepspeed(self) -> bool:
        """Only DeepSpeed's engine can run the model, and it exists when training begins."""
        return self.sharing is not None and self.sharing.engine == "deepspeed"

    @cached_property
    def early_stopping(self) -> SaveAndStopEarly:
        """By the plan's metric and the recipe's patience."""
        return SaveAndStopEarly(
            self.plan.metric,
            self.plan.greater_is_better,
            self.recipe.train.early_stopping_patience,
            self.recipe.train.early_stopping_threshold,
            lambda reason: self.journal.write("early stop", reason),
        )

    def scores(self, rows: Any) -> Mapping[str, float]:
        """The metrics of the current weights on these rows, and how far they have moved away on generic text."""
        return {**self.score(rows), **self.drifting.numbers()}

    def score(self, rows: Any) -> Mapping[str, float]:
        """The eval metrics of the current weights; several processes share the rows."""
        arguments = self.trainer.args
        if arguments.world_size == 1:
            self.kept = self.reduced(rows)
        else:
            size, rank = self.plan.eval_batch_size, arguments.process_index
            positions, count = distributed.share(by_length(rows), size, rank, arguments.world_size)
            self.kept = distributed.put_together(self.reduced(Share(rows, positions)), positions[:count])
        return self.task.metrics(self.kept, self.target)

    def alive(self, *_: Any) -> None:
        """A sign of life; the dry run scores rows, too, and is not watched."""
        if self.trainer.is_in_train:
            self.journal.alive(self.trainer.state.global_step)

    def reduced(self, rows: Any) -> Any:
        """These rows through the current weights: name to values[rows, ...], a few numbers of each row."""
        trainer: Any = self.trainer
        with self.journal.during("evaluation"):
            return run_rows(
                trainer.passing,
                rows,
                self.task,
                self.target,
                trainer.processing_class.pad_token_id,
                batch_size=self.plan.eval_batch_size,
                precision=self.plan.precision,
                head=trainer.head,
                watch=self.alive,
            )
