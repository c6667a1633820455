"""Generic text that is replayed, so that the model keeps what it could do before: a distillation of the model from its
untouched self, weighted to keep the budget for forgetting."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from fulltune.forgetting.budget import Weighing, next_weight
from fulltune.forgetting.drift import GenericText
from fulltune.inference.run import autocast, batches
from fulltune.records.events import Steered
from fulltune.tasks import causal_lm
from fulltune.tasks.padding import IGNORED, padded

if TYPE_CHECKING:
    from fulltune.train.loop.trainer import FullTrainer
    from fulltune.train.worker.context import AttemptContext

LIKELIEST = 64
"""Next tokens whose probabilities are kept of the untouched model; all others count as one."""
_LEAST_REST = 1e-6


@dataclass(eq=False)
class Replay:
    """Adds the gradient of some generic texts to each step's."""

    text: GenericText
    rows: int
    """Texts a step, over all processes."""
    rows_per_pass: int
    seed: int
    weight: float
    before: Sequence[Any] = ()
    """What the untouched model made of each text: of a language model log probabilities and ids, float16 and int32
    [tokens, `LIKELIEST`], of others the mean hidden state, float64 [hidden]."""

    def rows_of(self, step: int) -> list[int]:
        """The texts of an optimizer step, from 1: each once, in a drawn order, before any comes again."""
        count = len(self.text.ids)
        places = range((step - 1) * self.rows, step * self.rows)
        orders = {cycle: _order(count, self.seed, cycle) for cycle in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def remember(self, trainer: FullTrainer, between: Callable[[], None]) -> None:
        """Keep what the model, still untouched, makes of all texts."""
        if not self.text.writes:
            self.before = list(self.text.read(trainer.model, between=between))
            return
        found: list[Any] = []
        was_training = trainer.model.training
        trainer.model.eval()
        for positions in batches(range(len(self.text.ids)), self.rows_per_pass):
            between()
            with torch.no_grad(), autocast(trainer.model, self.text.precision):
                logs = F.log_softmax(self._logits(trainer, positions).float(), dim=-1)
            top, ids = logs.topk(min(LIKELIEST, logs.shape[-1]), dim=-1)
            sizes = [len(self.text.ids[position]) - 1 for position in positions]
            kept = (top.half().cpu(), ids.int().cpu())
            found += zip(*([part.numpy() for part in one.split(sizes)] for one in kept), strict=True)
        trainer.model.train(was_training)
        self.before = found

    def add_gradient(self, trainer: FullTrainer) -> None:
        """Add the texts' gradient to the step that begins, without dropout, so that no random number is drawn; each
        process has its part, and with FSDP2 as many passes as the others."""
        model, arguments = trainer.model, trainer.args
        chosen = self.rows_of(trainer.state.global_step + 1)
        mine = chosen[arguments.process_index :: arguments.world_size]
        tokens = sum(len(self.text.ids[position]) - 1 for position in chosen)
        share = arguments.world_size / (tokens if self.text.writes else len(chosen))
        scaler = getattr(trainer.accelerator, "scaler", None)
        was_training = model.training
        model.eval()
        passes = [(list(positions), 1.0) for positions in batches(mine, self.rows_per_pass)]
        if trainer.is_shared:
            most = -(-len(chosen[:: arguments.world_size]) // self.rows_per_pass)
            passes += [(chosen[:1], 0.0)] * (most - len(passes))
        try:
            for positions, counts in passes:
                with autocast(model, self.text.precision):
                    summed = self._distance(trainer, positions)
                loss = counts * self.weight * share * summed
                (loss if scaler is None else scaler.scale(loss)).backward()
        finally:
            model.train(was_training)

    def _distance(self, trainer: FullTrainer, positions: Sequence[int]) -> torch.Tensor:
        """From the untouched model, summed over these texts, and for a language model over their tokens."""
        device = trainer.args.device
        if not self.text.writes:
            wanted = torch.tensor(np.stack([self.before[one] for one in positions]), dtype=torch.float32, device=device)
            return (1 - F.cosine_similarity(self.text.states(trainer.model, positions), wanted, dim=-1)).sum()
        logs = F.log_softmax(self._logits(trainer, positions).float(), dim=-1)
        kept = (np.concatenate([self.before[one][part] for one in positions]) for part in (0, 1))
        wanted, ids = (torch.as_tensor(part, device=device) for part in kept)
        return divergence(wanted.float(), logs.gather(-1, ids.long()))

    def _logits(self, trainer: FullTrainer, positions: Sequence[int]) -> torch.Tensor:
        """Of each text's next tokens, one text after another: [tokens, vocabulary]."""
        chosen, device = [self.text.ids[position] for position in positions], trainer.args.device
        ids = padded(chosen, self.text.pad_token_id).to(device)
        labels = padded([[IGNORED, *row[1:]] for row in chosen], IGNORED).to(device)
        shown = padded([[1] * len(row) for row in chosen], 0).to(device)
        with trainer.selecting(labels, whole=True):
            logits = trainer.model(input_ids=ids, attention_mask=shown).logits
        return logits[causal_lm.wanted(labels) != IGNORED] if logits.dim() == 3 else logits


@dataclass(eq=False)
class Steering(TrainerCallback):
    """Measures the drift every so many steps, and raises or lowers the weight by what it finds."""

    attempt: AttemptContext
    replay: Replay
    limit: float
    weighing: Weighing
    every: int

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every or state.global_step >= self.attempt.plan.total_steps:
            return
        measured = self.attempt.drifting.read()
        if measured is None:
            return
        schedule: Any = self.attempt.trainer.lr_scheduler
        rate = schedule.get_last_lr()[0] / self.attempt.plan.learning_rate
        self.replay.weight = next_weight(self.replay.weight, measured, self.limit, rate, self.weighing)
        self.attempt.recorder.write(
            Steered(step=state.global_step, drift=measured.drift, error=measured.error, weight=self.replay.weight)
        )


def divergence(wanted: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of a model from an earlier one over some tokens' log probabilities [places, tokens],
    the rest as one more token; in nats, summed."""
    rest, left = ((1 - one.exp().sum(dim=-1)).clamp(min=_LEAST_REST) for one in (wanted, logs))
    return (wanted.exp() * (wanted - logs)).sum() + (rest * (rest.log() - left.log())).sum()


def _order(count: int, seed: int, cycle: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:replay:{cycle}").shuffle(order)
    return order
