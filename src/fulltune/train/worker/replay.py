"""Generic text that is trained along, so that the model keeps what it could do before.

Language models learn its next tokens as they did in pre-training; others are held to the hidden states that the
untouched model had. It counts with a weight that `steering.py` sets, and adds to the gradient of the step's rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from fulltune.forgetting.drift import GenericText
from fulltune.inference.run import autocast, batches
from fulltune.tasks import LossSettings, Target, causal_lm
from fulltune.tasks.padding import IGNORED, padded

if TYPE_CHECKING:
    from fulltune.train.loop.trainer import FullTrainer


@dataclass(eq=False)
class Replay:
    """Adds the gradient of some generic texts to each step's."""

    text: GenericText
    rows: int
    """Texts a step, over all processes."""
    rows_per_pass: int
    seed: int
    weight: float
    before: np.ndarray | None = None
    """Hidden states of the untouched model, [texts, hidden]; None: a language model."""

    def rows_of(self, step: int) -> list[int]:
        """The texts of an optimizer step, from 1: each once, in a drawn order, before any comes again."""
        count = len(self.text.ids)
        places = range((step - 1) * self.rows, step * self.rows)
        orders = {cycle: _order(count, self.seed, cycle) for cycle in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def add_gradient(self, trainer: FullTrainer) -> None:
        """Of the step that begins. Without dropout, so it draws no random number that the step would miss.

        With several processes each has its part of the texts; their gradients lie in the weights' when those of the
        step's last micro batch are averaged over the processes, and are averaged with them.
        """
        model, arguments = trainer.model, trainer.args
        chosen = self.rows_of(trainer.state.global_step + 1)
        mine = chosen[arguments.process_index :: arguments.world_size]
        tokens = sum(len(self.text.ids[position]) - 1 for position in chosen)
        scaler = getattr(trainer.accelerator, "scaler", None)
        was_training = model.training
        model.eval()
        try:
            for positions in batches(mine, self.rows_per_pass):
                with autocast(arguments.device.type, self.text.precision):
                    summed = self._loss(trainer, model, positions)
                share = arguments.world_size / (tokens if self.before is None else len(chosen))
                loss = self.weight * share * summed
                (loss if scaler is None else scaler.scale(loss)).backward()
        finally:
            model.train(was_training)

    def _loss(self, trainer: FullTrainer, model: Any, positions: Any) -> torch.Tensor:
        """Summed over these texts, and for a language model over their tokens."""
        if self.before is not None:
            wanted = torch.as_tensor(self.before[list(positions)], dtype=torch.float32, device=trainer.args.device)
            return (1 - F.cosine_similarity(self.text.states(model, positions), wanted, dim=-1)).sum()
        chosen = [self.text.ids[position] for position in positions]
        ids = padded(chosen, self.text.pad_token_id).to(trainer.args.device)
        labels = padded([[IGNORED, *row[1:]] for row in chosen], IGNORED).to(trainer.args.device)
        shown = padded([[1] * len(row) for row in chosen], 0).to(trainer.args.device)
        with trainer.selecting(labels, always_in_pieces=True):
            logits = model(input_ids=ids, attention_mask=shown).logits
        return causal_lm.loss(logits, labels, Target("text", {}), LossSettings())


def _order(count: int, seed: int, cycle: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:replay:{cycle}").shuffle(order)
    return order
