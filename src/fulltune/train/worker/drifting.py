"""How far the model has moved away on generic text, from step 0 on, at each evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.forgetting.drift import BATCH, MOST_TOKENS, STATES_BATCH, GenericText, measured, says_little
from fulltune.forgetting.generic_text import enough, generic_texts, parts
from fulltune.methods import virtual_tokens_of
from fulltune.models.shapes import position_limit
from fulltune.plan.time import GENERIC_TOKENS
from fulltune.recipe.preserve import BUNDLED
from fulltune.records.forgetting import Drift, Preserved
from fulltune.system.memory import is_out_of_memory

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
    identity: str = ""
    """Of all generic texts of the run."""

    @classmethod
    def of(cls, attempt: AttemptContext, model: Any, tokenizer: Any) -> Drifting:
        """The texts of an attempt whose model is loaded."""
        plan, block = attempt.plan, attempt.recipe.preserve
        room = (position_limit(model.config) or MOST_TOKENS) - virtual_tokens_of(model)
        drifting = cls(attempt, None, min(MOST_TOKENS, room), tokenizer)
        if plan.drift_texts:
            found = parts(block) if plan.preserving is not None else None
            texts = found.choosing if found else generic_texts(block.probe, plan.drift_texts)[0]
            # What steers must tell more than what only watches: of short texts there are more, at the same cost.
            count = max(plan.drift_texts, enough(texts, plan.drift_texts * GENERIC_TOKENS)) if found else len(texts)
            drifting.text = drifting.text_of(texts[:count])
            everything = [*found.choosing, *found.sealed, *found.replayed] if found else texts
            drifting.identity = hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]
        if plan.preserving is not None:  # of a comparison, other trials may have been certified
            for file in sorted((Path(attempt.request.run_folder) / "preserve").glob("*.json")):
                drifting.refuse_others(Preserved.load(file).identity or None)
        return drifting

    def refuse_others(self, identity: str | None) -> None:
        """Refuse generic texts other than the checkpoint's where a budget rests on them, else measure no more."""
        if self.text is None or identity in (None, self.identity):
            return
        probe = self.attempt.recipe.preserve.probe or BUNDLED
        said = f"preserve.probe: {probe}: the texts changed since this run began, so what it measured belongs to others"
        if self.attempt.plan.preserving is not None:
            raise SetupError(f"{said}; put the old file back, or start a new run (--fresh)")
        self.text = None
        self._warn(f"{said}; drift is not measured from here on")

    def _warn(self, text: str) -> None:
        self.attempt.journal.write("warning", text)
        self.attempt.recorder.warn(text)

    def text_of(self, texts: Sequence[str]) -> GenericText:
        """Texts as the attempt's model reads them."""
        any_text, plan = self.attempt.summary.form.reads_any_text, self.attempt.plan
        # Where an evaluation ran out of memory, its batches are smaller from then on, and these with them.
        batch = min(BATCH if any_text else STATES_BATCH, plan.eval_batch_size)
        return GenericText.of(texts, self.tokenizer, any_text, plan.precision, self.most_tokens, batch)

    def says_little(self, text: GenericText, first: np.ndarray) -> str:
        """Why texts say little, by what the untouched model makes of them; empty: they say enough."""
        vocabulary = getattr(self.attempt.trainer.model.config.get_text_config(), "vocab_size", None)
        return says_little(text, first, vocabulary, self.tokenizer.unk_token_id)

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
        try:
            with attempt.journal.during("evaluation"):
                now = self.text.read(trainer.passing, trainer.head, attempt.alive)
        except Exception as error:
            if is_out_of_memory(error) or not is_start or attempt.plan.preserving is not None:
                raise
            # What only watches must not end a run; it is said, and the report has no curve.
            self.text = None
            self._warn(f"drift on generic text is not measured: {type(error).__name__}: {error}"[:300])
            return None
        if is_start or trainer.generic_start is None:
            trainer.generic_start = now
            if why := self.says_little(self.text, now):
                self._warn(f"generic texts: {why}")
        return measured(trainer.generic_start, now)
