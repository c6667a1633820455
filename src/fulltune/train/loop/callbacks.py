"""Small hooks on the Trainer's public events: write progress, seal checkpoints, stop, measure updates."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fulltune import files
from fulltune.models import sharding
from fulltune.records.events import Evaluated, Event, Listener, Message, PhaseBegan, StepLogged, UpdatesMeasured
from fulltune.records.plan import Plan
from fulltune.stats.curves import EATEN, stopped_improving
from fulltune.train import checkpoints
from fulltune.train.journal import TRAINING, Journal
from fulltune.train.observed import Observed
from fulltune.train.request import Request

MEASUREMENTS = 20
"""Of a run."""
VALUES = 256
"""Of each tensor, evenly spaced."""
SURE = 3
"""Measurements below it, one after the other, before that is said."""


@dataclass(eq=False)
class Recorder:
    """Appends one JSON line per event to `metrics.jsonl`."""

    path: Path | None
    """The file; None writes nothing, as all processes but the first must."""
    listener: Listener | None = None
    """Called with each event as well, for a display in this process."""
    started: float = field(default_factory=time.monotonic)

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
        self.write(Message(text=text, level="warning"))


@dataclass(eq=False)
class Progress(TrainerCallback):
    """Records steps and evaluations, gives a sign of life at each micro batch, evaluation and checkpoint, and tells the
    sampler which epoch begins."""

    trainer: Any
    """The `FullTrainer`, which counts tokens and has the sampler."""
    recorder: Recorder
    journal: Journal
    observed: Observed
    begin: Callable[[], None]
    """Called once, when everything is ready for step 1."""
    first: tuple[float, int, float] | None = None
    """Time, step and tokens when training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin()
        self.recorder.phase(TRAINING)
        self.first = (time.monotonic(), state.global_step, float(self.trainer.tokens_seen))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs or self.first is None:
            return
        began, first_step, first_tokens = self.first
        elapsed = max(1e-9, time.monotonic() - began)
        steps = max(1, state.global_step - first_step)
        speed = self.observed.tokens_per_second = round((float(self.trainer.tokens_seen) - first_tokens) / elapsed, 1)
        self.recorder.write(
            StepLogged(
                step=state.global_step,
                total_steps=args.max_steps,
                epoch=round(state.epoch or 0.0, 4),
                loss=logs["loss"],
                grad_norm=logs.get("grad_norm"),
                learning_rate=logs.get("learning_rate"),
                tokens_per_second=speed,
                seconds_left=round(elapsed / steps * (args.max_steps - state.global_step), 1),
            )
        )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # transformers 5.24 does not reach it in an epoch that several processes resume.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.journal.alive(state.global_step)

    on_substep_end = on_step_end = on_save = on_step_begin

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.journal.alive(state.global_step)
        if not state.is_world_process_zero:
            return
        values = {name.removeprefix("eval_"): value for name, value in given["metrics"].items()}
        self.recorder.write(Evaluated(step=state.global_step, epoch=round(state.epoch or 0.0, 4), metrics=values))


def logged(state: Any, name: str) -> list[float]:
    """All values of one name in a Trainer's history, oldest first, without the evaluation before step 1."""
    return [entry[name] for entry in state.log_history if name in entry and entry["step"]]


@dataclass(eq=False)
class Checkpoints(TrainerCallback):
    """Saving and early stopping: saves at each evaluation, so that the best weights exist, seals each checkpoint before
    old ones are deleted, and stops training when the metric no longer improves."""

    request: Request
    journal: Journal
    observed: Observed

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate:
            control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_over(state):
            metric, patience = self.request.plan.metric, self.request.recipe.train.early_stopping_patience
            self.journal.write("early stop", f"no better {metric} in {patience} evaluations")
            control.should_training_stop = True

    def is_over(self, state: Any) -> bool:
        """From the history, not from a counter, which resuming would begin anew."""
        plan, train = self.request.plan, self.request.recipe.train
        return train.early_stopping_patience is not None and stopped_improving(
            logged(state, f"eval_{plan.metric}"),
            plan.greater_is_better,
            train.early_stopping_patience,
            train.early_stopping_threshold,
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self.journal.during("saving"):
            if args.world_size > 1:
                torch.distributed.barrier()  # each process writes its own random state
            if not state.is_world_process_zero:
                return
            folder = self.request.checkpoints
            files.seal(folder / f"checkpoint-{state.global_step}")
            self.observed.disk(folder, *self.request.all_initial_weights)  # now it is at its fullest
            checkpoints.keep_few(folder, self.request.recipe.train.save_total_limit, state.best_global_step)


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

    trainer: Any
    """The `FullTrainer`, whose guard skips updates."""
    plan: Plan
    recorder: Recorder
    _before: dict[str, torch.Tensor] = field(default_factory=dict)
    _eaten: int = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, total = state.global_step + 1, self.plan.total_steps
        # Not before the rate has risen from 0.
        is_measured = step % max(1, total // MEASUREMENTS) == 0 and step >= min(self.plan.warmup_steps + 2, total // 2)
        if is_measured and not self._before:
            self._before = _sampled(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        before, self._before = self._before, {}
        if not before or state.global_step in self.trainer.guard_history.skipped or not state.is_world_process_zero:
            return
        measured = compared(state.global_step, before, _sampled(model))
        self.recorder.write(measured)
        self._eaten = self._eaten + 1 if measured.changed_share < EATEN else 0
        # Rounded at random, or with what was lost kept, most values stay in each step, and nothing is eaten.
        if self._eaten == SURE and self.plan.bf16_rounding not in ("stochastic", "kahan"):
            kinds = sorted({str(one.dtype).removeprefix("torch.") for one in before.values()})
            self.recorder.warn(
                f"only {measured.changed_share:.0%} of the sampled values changed in step {state.global_step:,}: the "
                f"updates are too small for {', '.join(kinds)} weights. What helps: model.weights_dtype: fp32, "
                "train.bf16_rounding: stochastic, or a higher rate"
            )


def compared(step: int, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> UpdatesMeasured:
    """What a step did to sampled values."""
    numbers = [
        torch.stack([(after[name] != then).sum(), then.float().norm(), (after[name].float() - then.float()).norm()])
        for name, then in before.items()
    ]
    found = torch.stack(numbers).tolist()  # the host waits for the device once
    changed = sum(count for count, *_ in found)
    sizes = [update / weight for _, weight, update in found if weight]
    return UpdatesMeasured(
        step=step,
        changed_share=changed / max(1, sum(values.numel() for values in before.values())),
        update_ratio=statistics.median(sizes) if sizes else 0.0,
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
