from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fulltune import files
from fulltune.models import sharding
from fulltune.records.events import Evaluated, Event, Listener, Message, PhaseBegan, StepLogged, UpdatesMeasured
from fulltune.records.plan import Plan
from fulltune.stats.curves import MIN_CHANGED_SHARE, should_stop_early
from fulltune.train import checkpoints
from fulltune.train.journal import TRAINING, Journal
from fulltune.train.loop.guarded_step import Guarded
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.request import Request
from fulltune.train.usage import ResourceUsage

MEASUREMENTS = 20
SAMPLED_VALUES = 256
LOW_IN_A_ROW = 3


@dataclass(eq=False)
class Recorder:
    """Appends each event as a JSON line to `metrics.jsonl`."""

    path: Path | None
    """None on ranks other than 0."""
    listener: Listener | None = None
    started: float = field(default_factory=time.monotonic)

    def write(self, event: Event) -> None:
        """Append an event with its time, and call the listener."""
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
    """Records steps and evaluations, writes heartbeats and sets the sampler's epoch."""

    trainer: Guarded
    sampler: GlobalBatchSampler
    recorder: Recorder
    journal: Journal
    usage: ResourceUsage
    before_first_step: Callable[[], None]
    first: tuple[float, int, float] | None = None
    """Time, step and tokens at the start of training."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.before_first_step()
        self.recorder.phase(TRAINING)
        self.first = (time.monotonic(), state.global_step, float(self.trainer.tokens_seen))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Record a logged step with its loss, the speed and the remaining time."""
        logs = event["logs"]
        if not state.is_world_process_zero or "loss" not in logs or self.first is None:
            return
        began, first_step, first_tokens = self.first
        elapsed = max(1e-9, time.monotonic() - began)
        steps = max(1, state.global_step - first_step)
        speed = self.usage.tokens_per_second = round((float(self.trainer.tokens_seen) - first_tokens) / elapsed, 1)
        self.recorder.write(
            StepLogged(
                step=state.global_step,
                total_steps=args.max_steps,
                epoch=round(state.epoch or 0.0, 4),
                loss=logs["loss"],
                router_loss=logs.get("router_loss"),
                grad_norm=logs.get("grad_norm"),
                learning_rate=logs.get("learning_rate"),
                tokens_per_second=speed,
                seconds_left=round(elapsed / steps * (args.max_steps - state.global_step), 1),
            )
        )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Set the sampler's epoch, which transformers 5.24 does not do when several processes resume mid-epoch."""
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.journal.write_heartbeat(state.global_step)

    on_substep_end = on_step_end = on_save = on_step_begin

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        self.journal.write_heartbeat(state.global_step)
        if not state.is_world_process_zero:
            return
        values = {name.removeprefix("eval_"): value for name, value in event["metrics"].items()}
        self.recorder.write(Evaluated(step=state.global_step, epoch=round(state.epoch or 0.0, 4), metrics=values))


def logged(state: TrainerState, name: str) -> list[float]:
    """Return all values logged as `name` after step 0, oldest first."""
    return [entry[name] for entry in state.log_history if name in entry and entry["step"]]


@dataclass(eq=False)
class Checkpoints(TrainerCallback):
    """Saves a checkpoint at each evaluation, keeps only the newest and best ones, and stops training early."""

    request: Request
    journal: Journal
    usage: ResourceUsage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if control.should_evaluate:
            control.should_save = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop training early if the eval metric no longer improves."""
        if self.should_stop_early(state):
            metric, patience = self.request.plan.metric, self.request.recipe.train.early_stopping_patience
            self.journal.write("early stop", f"{metric} did not improve in {patience} evaluations")
            control.should_training_stop = True

    def should_stop_early(self, state: TrainerState) -> bool:
        """Return whether early stopping ends the run, judged from the logged metrics because a counter would restart on
        resume."""
        plan, train = self.request.plan, self.request.recipe.train
        return train.early_stopping_patience is not None and should_stop_early(
            logged(state, f"eval_{plan.metric}"),
            plan.greater_is_better,
            train.early_stopping_patience,
            train.early_stopping_threshold,
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the new checkpoint's checksums, then delete old checkpoints."""
        with self.journal.phase_within("saving"):
            if args.world_size > 1:
                torch.distributed.barrier()  # each rank writes its own random state
            if not state.is_world_process_zero:
                return
            folder = self.request.checkpoints
            files.write_checksums(folder / f"checkpoint-{state.global_step}")
            self.usage.update_peak_disk(folder, *self.request.all_initial_weights)  # now it is at its fullest
            # A streamed state can continue only from the last checkpoint.
            limit = 1 if self.request.plan.stream else self.request.recipe.train.save_total_limit
            checkpoints.delete_old_checkpoints(folder, limit, state.best_global_step)


class StopOnRequest(TrainerCallback):
    """Saves a checkpoint and stops training on all ranks after any rank receives a stop signal."""

    is_requested = False

    def is_requested_on_any_rank(self, args: TrainingArguments) -> bool:
        """Return whether any rank received a stop signal. All ranks must call this."""
        if args.world_size == 1:
            return self.is_requested
        count = torch.tensor(float(self.is_requested), device=args.device)
        torch.distributed.all_reduce(count)
        is_any = bool(count)
        self.is_requested = self.is_requested or is_any  # a signal may have come meanwhile
        return is_any

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # The evaluation before step 1 has no step to save.
        if state.global_step and self.is_requested_on_any_rank(args):
            control.should_save = True
            control.should_training_stop = True

    on_evaluate = on_step_end


@dataclass(eq=False)
class UpdateMeter(TrainerCallback):
    """Measures how much selected steps change the weights, and warns once if rounding cancels most updates."""

    trainer: Guarded
    plan: Plan
    recorder: Recorder
    _before: dict[str, torch.Tensor] = field(default_factory=dict)
    _eaten: int = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        step, total = state.global_step + 1, self.plan.total_steps
        # Only after the learning rate has risen from 0.
        is_measured = step % max(1, total // MEASUREMENTS) == 0 and step >= min(self.plan.warmup_steps + 2, total // 2)
        if is_measured and not self._before:
            self._before = _sample_weights(self.trainer.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        before, self._before = self._before, {}
        if not before or state.global_step in self.trainer.guard_history.skipped or not state.is_world_process_zero:
            return
        measured = compare_samples(state.global_step, before, _sample_weights(self.trainer.model))
        self.recorder.write(measured)
        self._eaten = self._eaten + 1 if measured.changed_share < MIN_CHANGED_SHARE else 0
        # With stochastic or Kahan rounding most values stay the same in a step, and nothing is lost.
        if self._eaten == LOW_IN_A_ROW and self.plan.bf16_rounding not in ("stochastic", "kahan"):
            dtypes = sorted({str(values.dtype).removeprefix("torch.") for values in before.values()})
            self.recorder.warn(
                f"only {measured.changed_share:.0%} of the sampled values changed in step {state.global_step:,}: the "
                f"updates are too small for {', '.join(dtypes)} weights; set model.weights_dtype: fp32, "
                "train.bf16_rounding: stochastic, or a higher learning rate"
            )


def compare_samples(step: int, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> UpdatesMeasured:
    """Compute the share of sampled values that changed in a step."""
    counts = torch.stack([(after[name] != old).sum() for name, old in before.items()])
    changed = int(counts.sum())  # the host waits for the device once
    return UpdatesMeasured(step=step, changed_share=changed / sum(values.numel() for values in before.values()))


def _sample_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy up to `SAMPLED_VALUES` evenly spaced values of each trained tensor except token embeddings, by tensor
    name."""
    # Without token embeddings, of which a step updates only the rows of tokens that it read.
    sharding.free_gathered_weights(model)
    excluded, get_embeddings = set[int](), getattr(model, "get_input_embeddings", lambda: None)
    with contextlib.suppress(NotImplementedError):  # ResNet has none
        if (embeddings := get_embeddings()) is not None:
            excluded = {id(parameter) for parameter in embeddings.parameters()}
    samples = {}
    for name, parameter in model.named_parameters():
        flat = sharding.local_tensor(parameter.detach()).flatten()
        if parameter.requires_grad and id(parameter) not in excluded and flat.numel():
            samples[name] = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES].clone()
    return samples
