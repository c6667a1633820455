"""How far the model has moved away on generic text, from step 0 on, at each evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulltune.forgetting.drift import GenericText, drift
from fulltune.forgetting.generic_text import generic_texts
from fulltune.methods import virtual_tokens_of
from fulltune.models.shapes import position_limit
from fulltune.plan.watching import MOST_TOKENS
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

    @classmethod
    def of(cls, attempt: AttemptContext, model: Any, tokenizer: Any) -> Drifting:
        """The texts of an attempt whose model is loaded."""
        plan, kind = attempt.plan, attempt.summary.problem_type
        if not plan.drift_texts:
            return cls(attempt, None)
        room = (position_limit(model.config) or MOST_TOKENS) - virtual_tokens_of(model)
        texts, _ = generic_texts(attempt.recipe.preserve.probe, plan.drift_texts)
        return cls(attempt, GenericText.of(texts, tokenizer, kind, plan.precision, min(MOST_TOKENS, room)))

    def measured(self) -> dict[str, float]:
        """`drift`, the mean over the texts, and `drift_error`, its standard error; nothing where it is not known."""
        attempt, trainer = self.attempt, self.attempt.trainer
        is_start = trainer.state.global_step == 0
        # A checkpoint of an earlier version does not say where the model began.
        if self.text is None or (trainer.generic_start is None and not is_start):
            return {}
        alone = trainer.args.world_size == 1  # several processes stop together, at the end of a step
        try:
            with attempt.journal.during("evaluation"):
                now = self.text.read(trainer.model, trainer.head, attempt.between_batches if alone else attempt.alive)
        except StoppedScoring:
            raise
        except Exception as error:
            if is_out_of_memory(error) or not is_start:
                raise
            # What only watches must not end a run; it is said, and the report has no curve.
            self.text = None
            said = f"drift on generic text is not measured: {type(error).__name__}: {error}"[:300]
            attempt.journal.write("warning", said)
            attempt.recorder.warn(said)
            return {}
        if is_start or trainer.generic_start is None:
            trainer.generic_start = now
        moved = drift(trainer.generic_start, now)
        error_of_mean = float(moved.std(ddof=1)) / math.sqrt(len(moved)) if len(moved) > 1 else 0.0
        return {"drift": float(moved.mean()), "drift_error": error_of_mean}
