from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import Trainer

from fulltune.errors import SetupError
from fulltune.models.save import save_in_parts
from fulltune.records.events import RowsRead
from fulltune.stream.layout import WEIGHTS
from fulltune.stream.randomness import random_state, set_random_state
from fulltune.stream.training import Streamed, streamed_of
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.optim.groups import planned_optimizer
from fulltune.train.optim.streamed import StreamedAdamW
from fulltune.train.request import number_in

Batch = dict[str, Any]
_SECONDS_BETWEEN_LINES = 5.0


class StepwiseTrainer(Trainer):
    """A Trainer that runs all micro batches of an optimizer step at once, block by block."""

    model: nn.Module
    optimizer: Any
    _samples: Sequence[Batch] = ()
    _losses_left: Sequence[torch.Tensor] = ()
    _norm: torch.Tensor

    @property
    def streamed(self) -> Streamed:
        streamed = streamed_of(self.model)
        assert streamed is not None
        return streamed

    @property
    def streamed_optimizer(self) -> StreamedAdamW:
        optimizer: StreamedAdamW = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Keep the step's micro batches for its first `training_step`."""
        self._samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._losses_left = ()
        return list(self._samples), num_items

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Return a micro batch's loss; the first call of a step computes all of them, and the gradients."""
        if not self._losses_left:
            self._losses_left = self._run_step(model, num_items_in_batch)
        loss, *self._losses_left = self._losses_left
        return loss

    def _run_step(self, model: nn.Module, num_items: torch.Tensor | int | None) -> list[torch.Tensor]:
        optimizer, executor = self.streamed_optimizer, self.streamed.executor
        finished = optimizer.finished
        if finished["step"] == self.state.global_step + 1:  # killed between the update and the checkpoint
            optimizer.is_replaying = True
            self._mark_gradients(finished["tensors"])
            self._norm = torch.tensor(finished["norm"])
            states = [torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8) for state in finished["random"]]
            set_random_state(states, executor.device)
            noted = torch.tensor(finished["losses"], device=executor.device)
            if len(noted) != len(self._samples):  # the micro batch has changed since; only their sum is used
                noted = (noted.sum() / len(self._samples)).repeat(len(self._samples))
            return [*noted]
        model.train()
        batches = [self._prepare_inputs(sample) for sample in self._samples]
        losses = executor.losses([partial(self._micro_batch_loss, model, batch, num_items) for batch in batches])
        executor.backward(losses)
        self._mark_gradients(list(executor.norms))
        order = [name for name, _ in self.model.named_parameters() if name in executor.norms]
        self._norm = torch.linalg.vector_norm(torch.stack([executor.norms[name] for name in order]))
        optimizer.notes = {
            "losses": [loss.item() for loss in losses],
            "norm": float(self._norm),
            "tensors": order,
            "random": [state.numpy().tobytes().hex() for state in random_state(executor.device)],
        }
        return [loss.detach() for loss in losses]

    def _micro_batch_loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor | int | None) -> torch.Tensor:
        if "use_cache" in inspect.signature(type(self.model).forward).parameters:
            batch = {**batch, "use_cache": False}  # a block that is computed again would extend its cache again
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch, num_items_in_batch=num_items)
        return cast("torch.Tensor", loss)

    def _mark_gradients(self, names: Sequence[str]) -> None:
        """Give the parameters that received a gradient one that takes no memory: the real ones are on the disk."""
        parameters = dict(self.model.named_parameters())
        for name in names:
            parameter = parameters[name]
            parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> float | None:
        return float(self._norm)


class StreamedTrainer(FullTrainer, StepwiseTrainer):
    """The Trainer of a run whose weights and optimizer state lie on a disk."""

    _shown = 0.0

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Let the optimizer clip the gradients that are on the disk; return their norm."""
        norm = self._norm
        if norm + 1e-6 > self.args.max_grad_norm:
            self.streamed_optimizer.clip_factor = torch.clamp(self.args.max_grad_norm / (norm + 1e-6), max=1.0)
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the planned optimizer over the state on the disk."""
        if self.optimizer is None:
            planned = planned_optimizer(self.model, self._plan, self.args, self._head_modules)
            self.optimizer = StreamedAdamW(self.model, self.streamed.state, *planned)
            self.streamed.state.on_slice = self.write_heartbeat  # a step may take longer than `hang_timeout`
            self.streamed.executor.on_unit = self._show_progress
        return self.optimizer

    def _show_progress(self, unit: int, backward: bool) -> None:
        """Write a heartbeat and, every few seconds, which unit of the pass is in memory."""
        self.write_heartbeat()
        now, units = time.monotonic(), self.streamed.units
        if not unit and not backward:  # short steps need no lines
            self._shown = now
        if not self.model.training or now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        sizes = self.streamed.sizes
        done = sum(sizes[unit:] if backward else sizes[: unit + 1])
        name = f"step {self.state.global_step + 1:,}, {'backward' if backward else 'forward'}"
        part = f"unit {len(units) - unit if backward else unit + 1} of {len(units)}"
        self._recorder.write(RowsRead(name=name, done=done, total=sum(sizes), unit="bytes", part=part))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights only if they are the best so far: the state on the disk is what a run resumes from."""
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self._keeps_best and self.state.best_global_step == self.state.global_step:
            save_in_parts(self.model, folder, self.streamed.weights, original_format=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        step, state = number_in(Path(resume_from_checkpoint)), self.streamed.state
        reached = cast("int", (state.journal.pending or state.journal.finished or {"step": 0})["step"])
        if reached not in (step, step + 1):
            raise SetupError(
                f"{state.folder}: the training state is at step {reached:,}, but the checkpoint is of step {step:,}; "
                "start a new run (--fresh)"
            )

    def load_weights(self, checkpoint: Path) -> None:
        """Replace the weights in the state by a checkpoint's."""
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                names = set(tensors.keys())
                for number, unit in enumerate(self.streamed.units):
                    if own := {name: {WEIGHTS: tensors.get_tensor(name)} for name in unit.names if name in names}:
                        self.streamed.state.write(number, own)
