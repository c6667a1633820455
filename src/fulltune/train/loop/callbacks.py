"""Small hooks on the Trainer's public events: write progress, seal checkpoints, stop, measure updates."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fulltune import files
from fulltune.errors import Spiked
from fulltune.models import sharding
from fulltune.records.events import Evaluated, Event, Listener, PhaseBegan, StepLogged, UpdatesMeasured, Warned
from fulltune.stats.curves import EATEN, diverged, stopped_improving
from fulltune.train import checkpoints
from fulltune.train.journal import Journal
from fulltune.train.run_time import TRAINING

MEASUREMENTS = 20
"""Of a run."""
VALUES = 256
"""Of each tensor, evenly spaced."""
SURE = 3
"""Measurements below it, one after the other, before that is said."""


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


@dataclass(eq=False)
class UpdateMeter(TrainerCallback):
    """Measures steps that have a rate, and says once when rounding eats the updates."""

    every: int
    """Steps from one measurement to the next."""
    first: int
    """No step before it is measured: the rate is still rising from 0."""
    say: Callable[[UpdatesMeasured], None]
    warn: Callable[[str], None]
    was_skipped: Callable[[int], bool]
    """Whether that step's update was left out."""
    rounds_on_average: bool = False
    """Updates are rounded at random, or what was lost is kept: most values stay in each step, and nothing is eaten."""
    _before: dict[str, torch.Tensor] = field(default_factory=dict)
    _eaten: int = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step + 1
        if step >= self.first and step % self.every == 0 and not self._before:
            self._before = _sampled(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        before, self._before = self._before, {}
        if not before or self.was_skipped(state.global_step) or not state.is_world_process_zero:
            return
        measured = compared(state.global_step, before, _sampled(model))
        self.say(measured)
        self._eaten = self._eaten + 1 if measured.changed < EATEN else 0
        if self._eaten == SURE and not self.rounds_on_average:
            kinds = sorted({str(one.dtype).removeprefix("torch.") for one in before.values()})
            self.warn(
                f"only {measured.changed:.0%} of the sampled values changed in step {state.global_step:,}: the updates "
                f"are too small for {', '.join(kinds)} weights. What helps: model.weights_dtype: fp32, "
                "train.bf16_rounding: stochastic, or a higher rate"
            )


def compared(step: int, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> UpdatesMeasured:
    """What a step did to sampled values."""
    numbers = [
        torch.stack([(now != then).sum(), then.float().norm(), (now.float() - then.float()).norm()])
        for now, then in ((after[name], values) for name, values in before.items())
    ]
    found = torch.stack(numbers).tolist()  # the host waits for the device once
    changed = sum(count for count, *_ in found)
    sizes = {name: update / weight for name, (_, weight, update) in zip(before, found, strict=True) if weight}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    return UpdatesMeasured(
        step=step,
        changed=changed / max(1, sum(values.numel() for values in before.values())),
        update_to_weight=statistics.median(sizes.values()) if sizes else 0.0,
        largest_update_to_weight=sizes.get(largest, 0.0),
        largest=largest,
    )


def _sampled(model: Any) -> dict[str, torch.Tensor]:
    """Values of each trained tensor but the token embeddings, of which a step reaches only the rows it has read."""
    sharding.free(model)
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    left_out = {id(one) for one in embeddings.parameters()} if embeddings is not None else set()
    found = {}
    for name, one in model.named_parameters():
        # Of weights that are shared out this process's part.
        flat = sharding.local(one.detach()).flatten()
        if one.requires_grad and id(one) not in left_out and flat.numel():
            found[name] = flat[:: max(1, flat.numel() // VALUES)][:VALUES].clone()
    return found
