"""Small hooks on the Trainer's public events: write progress, seal checkpoints, stop early, stop when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fulltune import files
from fulltune.errors import Spiked
from fulltune.records.events import Evaluated, Event, Listener, PhaseBegan, StepLogged, Warned
from fulltune.train import checkpoints
from fulltune.train.journal import Journal
from fulltune.train.loop.guards import diverged, stopped_improving
from fulltune.train.run_time import TRAINING


@dataclass(eq=False)
class Recorder(TrainerCallback):
    """Appends one JSON line per log, evaluation or phase to `metrics.jsonl`."""

    path: Path | None
    """The file; None writes nothing, as all processes but the first must."""
    total_steps: int
    """Optimizer steps of the whole run."""
    listener: Listener | None = None
    """Called with each line as well, for a display in this process."""
    tokens: Callable[[], float] = lambda: 0.0
    """Tokens that the trainer has seen."""
    tokens_per_second: float = 0.0
    started: float = field(default_factory=time.monotonic)
    first: tuple[float, int, float] | None = None
    """Time, step and tokens when training began."""

    def write(self, event: Event) -> None:
        if self.path is None:
            return
        event = event.model_copy(update={"seconds": round(time.monotonic() - self.started, 3)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.line()) + "\n")
        if self.listener is not None:
            self.listener(event)

    def phase(self, name: str) -> None:
        self.write(PhaseBegan(name=name))

    def warn(self, text: str) -> None:
        self.write(Warned(text=text))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phase(TRAINING)
        self.first = (time.monotonic(), state.global_step, self.tokens())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs or self.first is None:
            return
        began, first_step, first_tokens = self.first
        elapsed = max(1e-9, time.monotonic() - began)
        steps = max(1, state.global_step - first_step)
        self.tokens_per_second = (self.tokens() - first_tokens) / elapsed
        self.write(
            StepLogged(
                step=state.global_step,
                total_steps=self.total_steps,
                epoch=round(state.epoch or 0.0, 4),
                loss=logs["loss"],
                grad_norm=logs.get("grad_norm"),
                learning_rate=logs.get("learning_rate"),
                tokens_per_second=round(self.tokens_per_second, 1),
                seconds_left=round(elapsed / steps * (self.total_steps - state.global_step), 1),
            )
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        values = {name.removeprefix("eval_"): value for name, value in given["metrics"].items()}
        epoch = round(state.epoch or 0.0, 4)
        self.write(Evaluated(step=state.global_step, epoch=epoch, metrics=values))


def logged(state: Any, name: str) -> list[float]:
    """All values of one name in a Trainer's history, oldest first, without the evaluation before step 1."""
    return [entry[name] for entry in state.log_history if name in entry and entry["step"]]


@dataclass(eq=False)
class SaveAndStopEarly(TrainerCallback):
    """Saves whenever it evaluates, so that the best weights exist; stops when the metric no longer improves."""

    metric: str
    greater_is_better: bool
    patience: int | None
    threshold: float
    on_stop: Callable[[str], None] = lambda reason: None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_over(state):
            self.on_stop(f"no better {self.metric} in {self.patience} evaluations")
            control.should_training_stop = True

    def is_over(self, state: Any) -> bool:
        """From the history, not from a counter, which resuming would begin anew."""
        values = logged(state, f"eval_{self.metric}")
        return self.patience is not None and stopped_improving(
            values, self.greater_is_better, self.patience, self.threshold
        )


@dataclass(eq=False)
class StopWhenDiverged(TrainerCallback):
    """Stops a run whose loss has diverged, by the Trainer's history."""

    untrained: Callable[[], float | None]
    """Gives the dry run's loss, when there is one."""
    highest_rate: float
    """Of body and head."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return
        decision = diverged(logged(state, "loss"), self.highest_rate, self.untrained())
        if decision.action == "stop":
            steps = [entry["step"] for entry in state.log_history if "loss" in entry]
            raise Spiked(decision.reason, steps[decision.readings - 1] + 1 if decision.readings else 1)


@dataclass(eq=False)
class Seals(TrainerCallback):
    """Makes each checkpoint trustworthy, then deletes old ones: never the only whole one."""

    folder: Path
    limit: int
    on_seal: Callable[[], None]
    journal: Journal

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self.journal.during("saving"):
            if args.world_size > 1:
                torch.distributed.barrier()  # each process writes its own random state
            if not state.is_world_process_zero:
                return
            files.seal(self.folder / f"checkpoint-{state.global_step}")
            self.on_seal()  # now the disk is at its fullest
            checkpoints.keep_few(self.folder, self.limit, state.best_global_step)


@dataclass(eq=False)
class Heartbeat(TrainerCallback):
    """A sign of life at each micro batch, evaluation and checkpoint."""

    journal: Journal

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.journal.alive(state.global_step)

    on_substep_end = on_step_end = on_evaluate = on_save = on_step_begin


@dataclass(eq=False)
class AtBegin(TrainerCallback):
    """Does things once, when everything is ready for step 1."""

    actions: Sequence[Callable[[], None]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for action in self.actions:
            action()


class StopWhenAsked(TrainerCallback):
    """After a signal: finish the step or the evaluation, save, stop; all processes after the same step."""

    asked = False

    def agreed(self, args: Any) -> bool:
        """Whether any process was asked; all of them must call it. A signal that comes meanwhile is not lost."""
        if args.world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked)
        agreed = bool(asked)
        self.asked = self.asked or agreed
        return agreed

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The evaluation before step 1 has no step to save.
        if state.global_step and self.agreed(args):
            control.should_save = True
            control.should_training_stop = True

    on_evaluate = on_step_end
