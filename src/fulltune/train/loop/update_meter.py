"""How large updates are and whether they survive rounding, by a few values of each trained tensor before and after a
step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from fulltune.models import sharding
from fulltune.records.events import UpdatesMeasured

MEASUREMENTS = 20
"""Of a run."""
VALUES = 256
"""Of each tensor, evenly spaced."""
EATEN = 0.5
"""Share of the values that changed, below which updates are lost."""
SURE = 3
"""Measurements below it, one after the other, before that is said."""


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
