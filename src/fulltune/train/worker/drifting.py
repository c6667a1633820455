"""How far the model has moved away on generic text, from step 0 on, at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulltune.forgetting.drift import GenericText, measured, says_little
from fulltune.forgetting.generic_text import generic_texts, parts
from fulltune.methods import virtual_tokens_of
from fulltune.models.shapes import position_limit
from fulltune.plan.watching import MOST_TOKENS
from fulltune.records.forgetting import Drift
from fulltune.system.out_of_memory import is_out_of_memory
from fulltune.train.loop.trainer import StoppedScoring

if TYPE_CHECKING:
    from fulltune.train.worker.context import AttemptContext


@dataclass(eq=False)
class Drifting:
    """Reads the plan's generic texts."""

    attempt: AttemptContext
    text: GenericText | None
    """None: the plan has none, or this model cannot be read as expected."""

    most_tokens: int = MOST_TOKENS
    """Where a text is cut."""
    tokenizer: Any = None

    @classmethod
    def of(cls, attempt: AttemptContext, model: Any, tokenizer: Any) -> Drifting:
        """The texts of an attempt whose model is loaded."""
        plan, block = attempt.plan, attempt.recipe.preserve
        room = (position_limit(model.config) or MOST_TOKENS) - virtual_tokens_of(model)
        drifting = cls(attempt, None, min(MOST_TOKENS, room), tokenizer)
        if plan.drift_texts:
            of_budget = plan.preserving is not None
            texts = parts(block).choosing if of_budget else generic_texts(block.probe, plan.drift_texts)[0]
            drifting.text = drifting.text_of(texts[: plan.drift_texts])
        return drifting

    def text_of(self, texts: Sequence[str]) -> GenericText:
        """Texts as the attempt's model reads them."""
        kind, precision = self.attempt.summary.problem_type, self.attempt.plan.precision
        return GenericText.of(texts, self.tokenizer, kind, precision, self.most_tokens)

    def numbers(self) -> dict[str, float]:
        """`drift`, the mean over the texts, and `drift_error`, its standard error; nothing where it is not known."""
        found = self.read()
        return {} if found is None else {"drift": found.drift, "drift_error": found.error}

    def read(self) -> Drift | None:
        """How far the texts have moved; None where it is not known."""
        attempt, trainer = self.attempt, self.attempt.trainer
        is_start = trainer.state.global_step == 0
        # A checkpoint of an earlier version does not say where the model began.
        if self.text is None or (trainer.generic_start is None and not is_start):
            return None
        # Several processes stop together, at the end of a step.
        between = attempt.between_batches if trainer.args.world_size == 1 else attempt.alive
        try:
            with attempt.journal.during("evaluation"):
                now = self.text.read(trainer.model, trainer.head, between)
        except StoppedScoring:
            raise
        except Exception as error:
            if is_out_of_memory(error) or not is_start or attempt.plan.preserving is not None:
                raise
            # What only watches must not end a run; it is said, and the report has no curve.
            self.text = None
            said = f"drift on generic text is not measured: {type(error).__name__}: {error}"[:300]
            attempt.journal.write("warning", said)
            attempt.recorder.warn(said)
            return None
        if is_start or trainer.generic_start is None:
            trainer.generic_start = now
            vocabulary = trainer.model.config.get_text_config().vocab_size
            if why := says_little(self.text, now, vocabulary, self.tokenizer.unk_token_id):
                attempt.journal.write("warning", why)
                attempt.recorder.warn(why)
        return measured(trainer.generic_start, now)
