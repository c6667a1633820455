"""Texts that have nothing to do with the task, as a model reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import Batching, autocast, batches, longest_first, run_rows
from fulltune.models import sharding
from fulltune.tasks import LENGTH, Target, task_named
from fulltune.tasks.padding import IGNORED, mask, padded

if TYPE_CHECKING:
    import torch

    from fulltune.inference.selective_head import SelectiveHead

MOST_TOKENS = 64
"""Where a text is cut."""
BATCH, STATES_BATCH = 8, 32
"""Texts that are read at once, at most: by a language model, whose logits take room, and by others."""


@dataclass(frozen=True)
class GenericText:
    """Texts as tokens, read as a language model's loss in nats a token, else as mean last hidden states of length 1."""

    ids: tuple[list[int], ...]
    """The tokens of each text."""
    pad_token_id: int
    writes: bool
    """Whether the model is a language model."""
    precision: str
    """Type of the computations: `fp32`, `bf16` or `fp16`."""
    batch: int = BATCH

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        is_language_model: bool,
        precision: str,
        most_tokens: int,
        batch: int = BATCH,
    ) -> GenericText:
        """Tokenise texts, cut at `most_tokens`, which is the same for all models that are compared."""
        ids = [tokenizer(text, truncation=True, max_length=most_tokens, verbose=False)["input_ids"] for text in texts]
        # A single token is predicted from nothing.
        ids = [row for row in ids if len(row) > 1 or not is_language_model]
        return cls(tuple(ids), tokenizer.pad_token_id or 0, is_language_model, precision, batch)

    def read(
        self, model: Any, head: SelectiveHead | None = None, between: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """What is compared of each text: float64 [texts] for language models, else [texts, hidden]."""
        if not self.writes:
            return self._read_states(model, between)
        rows = [{"input_ids": ids, "labels": [IGNORED, *ids[1:]], LENGTH: len(ids)} for ids in self.ids]
        batch_size = self.batch if head is not None and head.in_pieces else 1
        kept = run_rows(
            model,
            rows,
            task_named("causal-lm"),
            Target("text", {}),
            self.pad_token_id,
            Batching(batch_size, self.precision, head, lambda *_: between()),
        )
        return kept["nll"] / kept["tokens"]

    def _read_states(self, model: Any, between: Callable[[], None]) -> np.ndarray:
        import torch
        import torch.nn.functional as F

        order = longest_first(np.array([len(ids) for ids in self.ids]))
        found: dict[int, np.ndarray] = {}
        was_training = model.training
        model.eval()
        try:
            for positions in batches(order, self.batch):
                between()
                with torch.no_grad(), autocast(model, self.precision):
                    states = self.states(model, positions)
                directions = F.normalize(states.double(), dim=-1).cpu().numpy()
                found.update(zip(positions, directions, strict=True))
        finally:
            model.train(was_training)
        return np.stack([found[position] for position in range(len(self.ids))])

    def states(self, model: Any, positions: Sequence[int]) -> torch.Tensor:
        """Mean hidden state of each of these texts: float32 [texts, hidden]."""
        chosen = [self.ids[position] for position in positions]
        ids, shown = padded(chosen, self.pad_token_id).to(model.device), mask(chosen).to(model.device)
        inner = getattr(model, "module", model)  # an engine has the model inside
        body = (
            inner.get_encoder() if inner.config.is_encoder_decoder else getattr(inner, inner.base_model_prefix, inner)
        )
        given = {"input_ids": ids, "attention_mask": shown}
        outputs = _through_model(model, inner, body, given) if sharding.runs_together(model) else body(**given)
        hidden = outputs.last_hidden_state.float()
        # Virtual tokens of a prompt stand before the text.
        hidden = hidden[:, hidden.shape[1] - shown.shape[1] :]
        return (hidden * shown.unsqueeze(-1)).sum(dim=1) / shown.sum(dim=1, keepdim=True).clamp(min=1)


def _through_model(model: Any, inner: Any, body: Any, given: dict[str, Any]) -> Any:
    """The body's output in a pass through the whole model, which alone gathers what lies outside of its blocks."""
    if inner.config.is_encoder_decoder:
        given = {**given, "decoder_input_ids": given["input_ids"][:, :1]}
    if type(inner).__name__.endswith("MultipleChoice"):
        given = {name: one.unsqueeze(1) for name, one in given.items()}
    seen: list[Any] = []
    hook = body.register_forward_hook(lambda _, __, outputs: seen.append(outputs))
    try:
        model(**given)
    finally:
        hook.remove()
    return seen[0]
