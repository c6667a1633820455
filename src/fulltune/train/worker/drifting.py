"""How far the model has moved away on generic text, from step 0 on, at each evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.forgetting.drift import BATCH, MOST_TOKENS, STATES_BATCH, GenericText, measured, says_little
from fulltune.forgetting.generic_text import enough, generic_texts, parts
from fulltune.methods import virtual_tokens_of
from fulltune.models.shapes import position_limit
from fulltune.plan.time import GENERIC_TOKENS
from fulltune.recipe.preserve import BUNDLED, PreserveBlock
from fulltune.records.forgetting import Drift, Preserved
from fulltune.records.plan import Plan
from fulltune.system.memory import is_out_of_memory
from fulltune.train.journal import Journal
from fulltune.train.loop.trainer import FullTrainer


@dataclass(eq=False)
class DriftMonitor:
    """Reads the plan's generic texts, for how far a trainer's model has moved away on them."""

    plan: Plan
    preserve: PreserveBlock
    is_language_model: bool
    trainer: FullTrainer
    tokenizer: Any
    journal: Journal
    show: Callable[[str], None]
    """Shows a warning to whoever listens."""
    alive: Callable[..., None]
    """Called between batches."""
    text: GenericText | None = None
    """None: the plan has none, or this model cannot be read as expected."""
    identity: str = ""
    """Of all generic texts of the run."""

    @cached_property
    def most_tokens(self) -> int:
        """Where a text is cut."""
        model = self.trainer.model
        return min(MOST_TOKENS, (position_limit(model.config) or MOST_TOKENS) - virtual_tokens_of(model))

    def open_texts(self, run_folder: Path) -> None:
        """Take the plan's texts, and refuse others than those that a budget of this run folder rests on."""
        plan = self.plan
        if plan.drift_texts:
            found = parts(self.preserve) if plan.preserving is not None else None
            texts = found.choosing if found else generic_texts(self.preserve.probe, plan.drift_texts)[0]
            # What steers must tell more than what only watches: of short texts there are more, at the same cost.
            count = max(plan.drift_texts, enough(texts, plan.drift_texts * GENERIC_TOKENS)) if found else len(texts)
            self.text = self.text_of(texts[:count])
            everything = [*found.choosing, *found.sealed, *found.replayed] if found else texts
            self.identity = hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]
        if plan.preserving is not None:  # of a comparison, other trials may have been certified
            for file in sorted((run_folder / "preserve").glob("*.json")):
                self.refuse_others(Preserved.load(file).identity or None)

    def refuse_others(self, identity: str | None) -> None:
        """Refuse generic texts other than the checkpoint's where a budget rests on them, else measure no more."""
        if self.text is None or identity in (None, self.identity):
            return
        probe = self.preserve.probe or BUNDLED
        said = f"preserve.probe: {probe}: the texts changed since this run began, so what it measured belongs to others"
        if self.plan.preserving is not None:
            raise SetupError(f"{said}; put the old file back, or start a new run (--fresh)")
        self.text = None
        self._warn(f"{said}; drift is not measured from here on")

    def _warn(self, text: str) -> None:
        self.journal.write("warning", text)
        self.show(text)

    def text_of(self, texts: Sequence[str]) -> GenericText:
        """Texts as the trainer's model reads them."""
        # Where an evaluation ran out of memory, its batches are smaller from then on, and these with them.
        batch = min(BATCH if self.is_language_model else STATES_BATCH, self.plan.eval_batch_size)
        precision = self.plan.precision
        return GenericText.of(texts, self.tokenizer, self.is_language_model, precision, self.most_tokens, batch)

    def says_little(self, text: GenericText, first: np.ndarray) -> str:
        """Why texts say little, by what the untouched model makes of them; empty: they say enough."""
        vocabulary = getattr(self.trainer.model.config.get_text_config(), "vocab_size", None)
        return says_little(text, first, vocabulary, self.tokenizer.unk_token_id)

    def numbers(self) -> dict[str, float]:
        """`drift`, the mean over the texts, and `drift_error`, its standard error; nothing where it is not known."""
        found = self.read()
        return {} if found is None else {"drift": found.drift, "drift_error": found.error}

    def read(self) -> Drift | None:
        """How far the texts have moved; None where it is not known."""
        trainer = self.trainer
        is_start = trainer.state.global_step == 0
        # A checkpoint of an earlier version does not say where the model began.
        if self.text is None or (trainer.generic_start is None and not is_start):
            return None
        try:
            with self.journal.during("evaluation"):
                now = self.text.read(trainer.passing, trainer.head, self.alive)
        except Exception as error:
            if is_out_of_memory(error) or not is_start or self.plan.preserving is not None:
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
