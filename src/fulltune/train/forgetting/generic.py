"""Measure drift on generic text and replay some of it to limit forgetting."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from fulltune.errors import SetupError
from fulltune.forgetting.budget import LANGUAGE, STATES, next_weight
from fulltune.forgetting.generic_text import enough, generic_texts, measured, parts, says_little
from fulltune.inference.run import BATCH, MOST_TOKENS, STATES_BATCH, GenericText, autocast, batches
from fulltune.methods import virtual_tokens_of
from fulltune.models import evaluating
from fulltune.models.shapes import position_limit
from fulltune.plan.time import GENERIC_TOKENS
from fulltune.recipe.model import BUNDLED
from fulltune.records.events import Steered
from fulltune.records.forgetting import Drift, limit_of
from fulltune.system.memory import is_out_of_memory
from fulltune.tasks import causal_lm
from fulltune.tasks.padding import IGNORED, padded
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer, TrainingPart

LIKELIEST = 64
"""Next tokens whose probabilities are kept of the untouched model; all others count as one."""
_LEAST_REST = 1e-6
_MOST_LOGITS = 2**24
"""Of generic text at once: 64 MiB."""


class DriftMonitor(TrainingPart):
    """Measures at each evaluation, from step 0 on, how far the model has moved away on the plan's generic texts."""

    def __init__(self, inputs: AttemptInputs, trainer: FullTrainer) -> None:
        self.inputs, self.trainer = inputs, trainer
        self.text: GenericText | None = None
        """None: the plan has none, or this model cannot be read as expected."""
        self.identity = ""
        """Of all generic texts of the run."""
        self.start: np.ndarray | None = None
        """What the untouched model made of the texts: see `GenericText.read`."""
        plan, preserve = inputs.plan, inputs.recipe.preserve
        watched, held = plan.generic.texts_per_evaluation, plan.generic.budget is not None
        if watched:
            found = parts(preserve) if held else None
            texts = found.choosing if found else generic_texts(preserve.probe, watched)[0]
            # To steer by the drift it must be measured more precisely: of short texts more are read, at the same cost.
            count = max(watched, enough(texts, watched * GENERIC_TOKENS)) if found else len(texts)
            self.text = self.text_of(texts[:count])
            everything = [*found.choosing, *found.sealed, *found.replayed] if found else texts
            self.identity = hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]

    @cached_property
    def most_tokens(self) -> int:
        """Where a text is cut."""
        model = self.trainer.model
        return min(MOST_TOKENS, (position_limit(model.config) or MOST_TOKENS) - virtual_tokens_of(model))

    def text_of(self, texts: Sequence[str]) -> GenericText:
        """Texts as the trainer's model reads them."""
        plan, writes = self.inputs.plan, self.inputs.summary.form.reads_any_text
        # Where an evaluation ran out of memory, its batches are smaller from then on, and these with them.
        batch = min(BATCH if writes else STATES_BATCH, plan.eval_batch_size)
        return GenericText.of(texts, self.trainer.processing_class, writes, plan.precision, self.most_tokens, batch)

    def says_little(self, text: GenericText, first: np.ndarray) -> str:
        """Why texts say little, by what the untouched model makes of them; empty: they say enough."""
        tokenizer: Any = self.trainer.processing_class
        vocabulary = getattr(self.trainer.model.config.get_text_config(), "vocab_size", None)
        return says_little(text, first, vocabulary, tokenizer.unk_token_id)

    def scores(self) -> dict[str, float]:
        """`drift`, the mean over the texts, and `drift_error`, its standard error; nothing where it is not known."""
        found = self.read()
        return {} if found is None else {"drift": found.mean, "drift_error": found.error}

    def read(self) -> Drift | None:
        """How far the texts have moved; None where it is not known."""
        trainer, plan = self.trainer, self.inputs.plan
        is_start = trainer.state.global_step == 0
        # Where it could not be read at the start, there is nothing to compare with.
        if self.text is None or (self.start is None and not is_start):
            return None
        try:
            with self.inputs.journal.during("evaluation"):
                now = self.text.read(trainer.forward_model, trainer.head, trainer.alive)
        except Exception as error:
            if is_out_of_memory(error) or not is_start or plan.generic.budget is not None:
                raise
            # What only watches must not end a run; it is said, and the report has no curve.
            self.text = None
            self.inputs.warn(f"drift on generic text is not measured: {type(error).__name__}: {error}"[:300])
            return None
        if is_start or self.start is None:
            self.start = now
            if why := self.says_little(self.text, now):
                self.inputs.warn(f"generic texts: {why}")
        return measured(self.start, now)

    def state(self) -> dict[str, Any]:
        return {"generic_texts": self.identity, "generic": self.start}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._refuse_others(state["generic_texts"])
        self.start = state.get("generic")

    def _refuse_others(self, identity: str | None) -> None:
        """Refuse generic texts other than the checkpoint's where a budget rests on them, else measure no more."""
        if self.text is None or identity in (None, self.identity):
            return
        probe = self.inputs.recipe.preserve.probe or BUNDLED
        said = f"preserve.probe: {probe}: the texts changed since this run began, so what it measured belongs to others"
        if self.inputs.plan.generic.budget is not None:
            raise SetupError(f"{said}; put the old file back, or start a new run (--fresh)")
        self.text = None
        self.inputs.warn(f"{said}; drift is not measured from here on")


class Replay(TrainingPart):
    """Adds the gradient of some generic texts to each step's, a distillation of the model from its untouched self.
    Every so many steps the drift is measured, and their weight set so that the budget for forgetting is kept."""

    def __init__(
        self, inputs: AttemptInputs, monitor: DriftMonitor, text: GenericText, rows_per_pass: int, budget: float
    ) -> None:
        self.inputs, self.monitor, self.trainer = inputs, monitor, monitor.trainer
        self.text, self.rows_per_pass = text, rows_per_pass
        self.bounds, self.limit = LANGUAGE if text.writes else STATES, limit_of(budget, text.writes)
        self.weight = self.bounds[0] / self.limit
        self.before: Sequence[Any] = ()
        """What the untouched model made of each text: of a language model log probabilities and ids, float16 and int32
        [tokens, `LIKELIEST`], of others the mean hidden state, float64 [hidden]."""

    def rows_of(self, step: int) -> list[int]:
        """The texts of an optimizer step, from 1: each once, in a drawn order, before any comes again."""
        plan, count = self.inputs.plan, len(self.text.ids)
        places = range((step - 1) * plan.generic.replay_rows, step * plan.generic.replay_rows)
        orders = {cycle: _order(count, plan.seed, cycle) for cycle in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def remember(self) -> None:
        """Keep what the model, still untouched, makes of all texts."""
        model, between = self.trainer.model, self.trainer.alive
        if not self.text.writes:
            self.before = list(self.text.read(model, between=between))
            return
        found: list[Any] = []
        with evaluating(model), torch.no_grad():
            for positions in batches(range(len(self.text.ids)), self.rows_per_pass):
                between()
                with autocast(model, self.text.precision):
                    logs = F.log_softmax(self._logits(positions).float(), dim=-1)
                top, ids = logs.topk(min(LIKELIEST, logs.shape[-1]), dim=-1)
                sizes = [len(self.text.ids[position]) - 1 for position in positions]
                kept = (top.half().cpu(), ids.int().cpu())
                found += zip(*([part.numpy() for part in one.split(sizes)] for one in kept), strict=True)
        self.before = found

    def add_gradient(self) -> None:
        """Add the texts' gradient to the step that begins, without dropout, so that no random number is drawn; each
        process has its part, and with FSDP2 as many passes as the others."""
        trainer = self.trainer
        model, arguments = trainer.model, trainer.args
        chosen = self.rows_of(trainer.state.global_step + 1)
        mine = chosen[arguments.process_index :: arguments.world_size]
        tokens = sum(len(self.text.ids[position]) - 1 for position in chosen)
        share = arguments.world_size / (tokens if self.text.writes else len(chosen))
        scaler = getattr(trainer.accelerator, "scaler", None)
        passes = [(list(positions), 1.0) for positions in batches(mine, self.rows_per_pass)]
        if trainer.is_shared:
            most = -(-len(chosen[:: arguments.world_size]) // self.rows_per_pass)
            passes += [(chosen[:1], 0.0)] * (most - len(passes))
        with evaluating(model):
            for positions, counts in passes:
                with autocast(model, self.text.precision):
                    summed = self._distance(positions)
                loss = counts * self.weight * share * summed
                (loss if scaler is None else scaler.scale(loss)).backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        plan, step = self.inputs.plan, state.global_step
        if step % plan.generic.steer_steps or step >= plan.total_steps or (drift := self.monitor.read()) is None:
            return
        rate = cast("Any", self.trainer.lr_scheduler).get_last_lr()[0] / plan.learning_rate
        self.weight = next_weight(self.weight, drift, self.limit, rate, self.bounds)
        self.inputs.recorder.write(Steered(step=step, drift=drift.mean, error=drift.error, weight=self.weight))

    def state(self) -> dict[str, Any]:
        return {"replay_weight": self.weight}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.weight = state["replay_weight"]

    def _distance(self, positions: Sequence[int]) -> torch.Tensor:
        """From the untouched model, summed over these texts, and for a language model over their tokens."""
        model, device = self.trainer.model, self.trainer.args.device
        if not self.text.writes:
            wanted = torch.tensor(np.stack([self.before[one] for one in positions]), dtype=torch.float32, device=device)
            return (1 - F.cosine_similarity(self.text.states(model, positions), wanted, dim=-1)).sum()
        logs = F.log_softmax(self._logits(positions).float(), dim=-1)
        kept = (np.concatenate([self.before[one][part] for one in positions]) for part in (0, 1))
        wanted, ids = (torch.as_tensor(part, device=device) for part in kept)
        return divergence(wanted.float(), logs.gather(-1, ids.long()))

    def _logits(self, positions: Sequence[int]) -> torch.Tensor:
        """Of each text's next tokens, one text after another: [tokens, vocabulary]."""
        chosen, device = [self.text.ids[position] for position in positions], self.trainer.args.device
        ids = padded(chosen, self.text.pad_token_id).to(device)
        labels = padded([[IGNORED, *row[1:]] for row in chosen], IGNORED).to(device)
        shown = padded([[1] * len(row) for row in chosen], 0).to(device)
        with self.trainer.selecting(labels, whole=True):
            logits = self.trainer.model(input_ids=ids, attention_mask=shown).logits
        return logits[causal_lm.wanted(labels) != IGNORED] if logits.dim() == 3 else logits


def replay_parts(inputs: AttemptInputs, monitor: DriftMonitor) -> list[TrainingPart]:
    """What trains generic text along, where the plan does; the model is still the untouched one."""
    plan, rows, budget = inputs.plan, inputs.plan.generic.replay_rows, inputs.plan.generic.budget
    if budget is None or not rows or inputs.request.probe:
        return []
    with inputs.journal.during("evaluation"):  # memory as for an evaluation, and the same way out
        text = monitor.text_of(parts(inputs.recipe.preserve).replayed[: plan.total_steps * rows])
    # No more tokens at once than a micro batch has, and of a language model no more logits than are small; one text
    # where activations are recomputed, which happens in training mode alone.
    at_once = plan.micro_batch_size * inputs.summary.max_length // monitor.most_tokens
    if text.writes:
        at_once = min(at_once, _MOST_LOGITS // (monitor.most_tokens * monitor.trainer.model.config.vocab_size))
    at_once = 1 if plan.activation_checkpointing else max(1, min(rows, at_once))
    replay = Replay(inputs, monitor, text, at_once, budget)
    inputs.recorder.phase("reading generic text with the untouched model")
    with inputs.journal.during("evaluation"):
        replay.remember()
    return [replay]


def divergence(wanted: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of a model from an earlier one over some tokens' log probabilities [places, tokens],
    the rest as one more token; in nats, summed."""
    rest, left = ((1 - one.exp().sum(dim=-1)).clamp(min=_LEAST_REST) for one in (wanted, logs))
    return (wanted.exp() * (wanted - logs)).sum() + (rest * (rest.log() - left.log())).sum()


def _order(count: int, seed: int, cycle: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:replay:{cycle}").shuffle(order)
    return order
