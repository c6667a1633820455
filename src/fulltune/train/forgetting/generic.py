from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from fulltune.errors import SetupError
from fulltune.forgetting.budget import LANGUAGE_WEIGHTS, STATE_WEIGHTS, next_replay_weight
from fulltune.forgetting.generic_text import (
    count_texts_for,
    load_budget_texts,
    load_generic_texts,
    mean_drift,
    why_texts_are_weak,
)
from fulltune.inference.run import BATCH, MOST_TOKENS, STATES_BATCH, GenericText, autocast, batches
from fulltune.methods import virtual_tokens_of
from fulltune.models import evaluation_mode
from fulltune.models.shapes import position_limit
from fulltune.plan.time import GENERIC_TOKENS
from fulltune.recipe.model import BUNDLED
from fulltune.records.events import Steered
from fulltune.records.forgetting import Drift, limit_of
from fulltune.system.memory import is_out_of_memory
from fulltune.tasks import causal_lm
from fulltune.tasks.padding import IGNORED, pad_right
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.parts import TrainingPart
from fulltune.train.loop.trainer import FullTrainer

TOP_TOKENS = 64
"""Number of most likely next tokens whose probability is stored."""
_MIN_REST = 1e-6
_MAX_LOGITS = 2**24


class DriftMonitor(TrainingPart):
    """Measures drift on the plan's generic texts at each evaluation, beginning before step 1."""

    def __init__(self, inputs: AttemptInputs, trainer: FullTrainer) -> None:
        self.inputs, self.trainer = inputs, trainer
        self.text: GenericText | None = None
        """Texts on which drift is measured, or None."""
        self.texts_digest = ""
        self.start: np.ndarray | None = None
        """Output of `GenericText.measure` for the pretrained model."""
        plan, preserve = inputs.plan, inputs.recipe.preserve
        if num_texts := plan.generic.texts_per_evaluation:
            split = None if plan.generic.budget is None else load_budget_texts(preserve)
            texts = split.selection if split else load_generic_texts(preserve.probe, num_texts)[0]
            # Steering needs a precise drift. Short texts cost less, so more of them are read.
            count = max(num_texts, count_texts_for(texts, num_texts * GENERIC_TOKENS)) if split else len(texts)
            self.text = self.tokenize(texts[:count])
            all_texts = [*split.selection, *split.held_out, *split.replayed] if split else texts
            self.texts_digest = hashlib.sha256("\0".join(all_texts).encode()).hexdigest()[:16]

    @cached_property
    def max_tokens(self) -> int:
        model = self.trainer.model
        return min(MOST_TOKENS, (position_limit(model.config) or MOST_TOKENS) - virtual_tokens_of(model))

    def tokenize(self, texts: Sequence[str]) -> GenericText:
        plan, writes = self.inputs.plan, self.inputs.summary.form.reads_any_text
        # Not above the eval batch size, which falls when an evaluation runs out of memory.
        batch = min(BATCH if writes else STATES_BATCH, plan.eval_batch_size)
        return GenericText.tokenise(
            texts, self.trainer.processing_class, writes, plan.precision, self.max_tokens, batch
        )

    def weak_texts_reason(self, text: GenericText, pretrained_output: np.ndarray) -> str | None:
        """Return why these texts cannot show drift well, or None if they can."""
        tokenizer: Any = self.trainer.processing_class
        vocabulary = getattr(self.trainer.model.config.get_text_config(), "vocab_size", None)
        return why_texts_are_weak(text, pretrained_output, vocabulary, tokenizer.unk_token_id)

    def scores(self) -> dict[str, float]:
        """Return `drift` and its standard error `drift_error`, or {} if drift cannot be measured."""
        drift = self.measure_drift()
        return {} if drift is None else {"drift": drift.mean, "drift_error": drift.error}

    def measure_drift(self) -> Drift | None:
        """Measure the drift from the pretrained model, or return None if drift cannot be measured."""
        trainer, plan = self.trainer, self.inputs.plan
        is_start = trainer.state.global_step == 0
        # Without a start there is nothing to compare with.
        if self.text is None or (self.start is None and not is_start):
            return None
        try:
            with self.inputs.journal.phase_within("evaluation"):
                now = self.text.measure(trainer.forward_model, trainer.head, trainer.write_heartbeat)
        except Exception as error:
            if is_out_of_memory(error) or not is_start or plan.generic.budget is not None:
                raise
            # A mere observer must not end a run: it warns, and the report has no drift curve.
            self.text = None
            self.inputs.warn(f"drift on generic text cannot be measured: {type(error).__name__}: {error}"[:300])
            return None
        if is_start or self.start is None:
            self.start = now
            if reason := self.weak_texts_reason(self.text, now):
                self.inputs.warn(f"generic texts: {reason}")
        return mean_drift(self.start, now)

    def state(self) -> dict[str, Any]:
        return {"generic_texts": self.texts_digest, "generic": self.start}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restore the start. If the texts differ from the checkpoint's, raise `SetupError` or, without a budget, warn
        and stop measuring drift."""
        self.start = state.get("generic")
        if self.text is None or state["generic_texts"] in (None, self.texts_digest):
            return
        probe = self.inputs.recipe.preserve.probe or BUNDLED
        problem = f"preserve.probe: {probe}: the texts changed since this run began, so drift cannot be compared"
        if self.inputs.plan.generic.budget is not None:
            raise SetupError(f"{problem}; restore the old file, or start a new run (--fresh)")
        self.text = None
        self.inputs.warn(f"{problem}; drift is no longer measured")


class Replay(TrainingPart):
    """Adds to each step the gradient of a distillation loss that keeps outputs on generic texts close to the pretrained
    model's. The loss's weight follows the measured drift, to stay within the forgetting budget."""

    def __init__(
        self, inputs: AttemptInputs, monitor: DriftMonitor, text: GenericText, rows_per_pass: int, budget: float
    ) -> None:
        """`budget` is the recipe's, from 0 to 1."""
        self.inputs, self.monitor, self.trainer = inputs, monitor, monitor.trainer
        self.text, self.rows_per_pass = text, rows_per_pass
        self.bounds = LANGUAGE_WEIGHTS if text.is_language_model else STATE_WEIGHTS
        self.limit = limit_of(budget, text.is_language_model)
        self.weight = self.bounds[0] / self.limit
        self.before: Sequence[Any] = ()
        """The pretrained model's outputs for each text: for language models, log probabilities and ids, float16 and
        int32 [tokens, `TOP_TOKENS`]; for others, the mean hidden state, float64 [hidden]."""

    def texts_of_step(self, step: int) -> list[int]:
        """Return the positions of the texts replayed at a step (from 1). All texts are replayed once before any
        repeats."""
        plan, count = self.inputs.plan, len(self.text.ids)
        places = range((step - 1) * plan.generic.replay_rows, step * plan.generic.replay_rows)
        cycles = {place // count for place in places}
        orders = {one: random.Random(f"{plan.seed}:replay:{one}").sample(range(count), count) for one in cycles}
        return [orders[place // count][place % count] for place in places]

    def store_pretrained_outputs(self) -> None:
        model, between = self.trainer.model, self.trainer.write_heartbeat
        if not self.text.is_language_model:
            self.before = list(self.text.measure(model, between_batches=between))
            return
        outputs: list[Any] = []
        with evaluation_mode(model), torch.no_grad():
            for positions in batches(range(len(self.text.ids)), self.rows_per_pass):
                between()
                with autocast(model, self.text.precision):
                    logs = F.log_softmax(self._next_token_logits(positions).float(), dim=-1)
                top, ids = logs.topk(min(TOP_TOKENS, logs.shape[-1]), dim=-1)
                sizes = [len(self.text.ids[position]) - 1 for position in positions]
                stored = (top.half().cpu(), ids.int().cpu())
                outputs += zip(*([part.numpy() for part in tensor.split(sizes)] for tensor in stored), strict=True)
        self.before = outputs

    def add_gradient(self) -> None:
        """Add the replay loss's gradient on this rank's texts to the parameters' gradients, without dropout."""
        trainer = self.trainer
        model, arguments = trainer.model, trainer.args
        texts = self.texts_of_step(trainer.state.global_step + 1)
        mine = texts[arguments.process_index :: arguments.world_size]
        tokens = sum(len(self.text.ids[position]) - 1 for position in texts)
        share = arguments.world_size / (tokens if self.text.is_language_model else len(texts))
        scaler = getattr(trainer.accelerator, "scaler", None)
        passes = [(list(positions), 1.0) for positions in batches(mine, self.rows_per_pass)]
        if trainer.is_shared:
            most = -(-len(texts[:: arguments.world_size]) // self.rows_per_pass)
            passes += [(texts[:1], 0.0)] * (most - len(passes))  # as many as on the other ranks
        with evaluation_mode(model):
            for positions, counts in passes:
                with autocast(model, self.text.precision):
                    summed = self._distance_from_pretrained(positions)
                loss = counts * self.weight * share * summed
                (loss if scaler is None else scaler.scale(loss)).backward()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Adjust the replay loss's weight to the measured drift every `steer_steps` steps."""
        plan, step = self.inputs.plan, state.global_step
        if step % plan.generic.steer_steps or step >= plan.total_steps:
            return
        if (drift := self.monitor.measure_drift()) is None:
            return
        rate = self.trainer.lr_scheduler.get_last_lr()[0] / plan.learning_rate
        self.weight = next_replay_weight(self.weight, drift, self.limit, rate, self.bounds)
        self.inputs.recorder.write(Steered(step=step, drift=drift.mean, error=drift.error, weight=self.weight))

    def state(self) -> dict[str, Any]:
        return {"replay_weight": self.weight}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.weight = state["replay_weight"]

    def _distance_from_pretrained(self, positions: Sequence[int]) -> torch.Tensor:
        """Sum the distance from the pretrained model's outputs over these texts: KL(pretrained || current) for language
        models, else 1 - cosine."""
        model, device = self.trainer.model, self.trainer.args.device
        if not self.text.is_language_model:
            stacked = np.stack([self.before[position] for position in positions])
            before = torch.tensor(stacked, dtype=torch.float32, device=device)
            return (1 - F.cosine_similarity(self.text.mean_states(model, positions), before, dim=-1)).sum()
        logs = F.log_softmax(self._next_token_logits(positions).float(), dim=-1)
        stored = (np.concatenate([self.before[position][part] for position in positions]) for part in (0, 1))
        before, ids = (torch.as_tensor(part, device=device) for part in stored)
        return kl_divergence(before.float(), logs.gather(-1, ids.long()))

    def _next_token_logits(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the logits for each next token of these texts: [tokens, vocabulary]."""
        texts, device = [self.text.ids[position] for position in positions], self.trainer.args.device
        ids = pad_right(texts, self.text.pad_token_id).to(device)
        labels = pad_right([[IGNORED, *text[1:]] for text in texts], IGNORED).to(device)
        mask = pad_right([[1] * len(text) for text in texts], 0).to(device)
        with self.trainer.computing_needed_logits(labels, all_logits=True):
            logits = self.trainer.model(input_ids=ids, attention_mask=mask).logits
        return logits[causal_lm.target_ids(labels) != IGNORED] if logits.dim() == 3 else logits


def create_replay(inputs: AttemptInputs, monitor: DriftMonitor) -> list[TrainingPart]:
    """Return a list with the replay of generic text, or an empty list if the plan has none. Call this before training
    changes the weights."""
    plan, rows, budget = inputs.plan, inputs.plan.generic.replay_rows, inputs.plan.generic.budget
    if budget is None or not rows or inputs.request.probe:
        return []
    with inputs.journal.phase_within("evaluation"):  # it needs memory as an evaluation does, with the same fallbacks
        text = monitor.tokenize(load_budget_texts(inputs.recipe.preserve).replayed[: plan.total_steps * rows])
    # Read at most the tokens of a micro batch, and few logits; with activation checkpointing one text, as that does
    # nothing in evaluation mode.
    at_once = plan.micro_batch_size * inputs.summary.max_length // monitor.max_tokens
    if text.is_language_model:
        at_once = min(at_once, _MAX_LOGITS // (monitor.max_tokens * monitor.trainer.model.config.vocab_size))
    at_once = 1 if plan.activation_checkpointing else max(1, min(rows, at_once))
    replay = Replay(inputs, monitor, text, at_once, budget)
    inputs.recorder.phase("reading generic text with the pretrained model")
    with inputs.journal.phase_within("evaluation"):
        replay.store_pretrained_outputs()
    return [replay]


def kl_divergence(pretrained: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Return KL(pretrained || current) in nats, summed over positions. Both are log probabilities [positions, tokens]
    of the pretrained model's most likely tokens; all other tokens count as one."""
    rest_pretrained, rest_current = (
        (1 - logs.exp().sum(dim=-1)).clamp(min=_MIN_REST) for logs in (pretrained, current)
    )
    return (pretrained.exp() * (pretrained - current)).sum() + (
        rest_pretrained * (rest_pretrained.log() - rest_current.log())
    ).sum()
