"""How far a model has moved away on texts that have nothing to do with the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import autocast, batches
from fulltune.recipe.tasks import ProblemType
from fulltune.tasks.padding import mask, padded

if TYPE_CHECKING:
    import torch

WRITERS: tuple[ProblemType, ...] = ("text", "prompt_completion", "chat")
MOST_TOKENS = 256
_BATCH = 8


def generic(
    model: Any, tokenizer: Any, texts: Sequence[str], problem_type: ProblemType, precision: str, most_tokens: int
) -> np.ndarray:
    """What is compared of each text before and after training.

    Language models: the loss of the text, nats per token, float64 [texts]. Others: the mean of the last hidden states
    over the text's tokens, scaled to length 1, float64 [texts, hidden].

    Args:
        model: On its device.
        tokenizer: The model's.
        texts: See `fulltune.evaluate.generic_text`.
        problem_type: What the model was trained for.
        precision: Type of the computations.
        most_tokens: Where texts are cut: the same for all that are compared, also where virtual tokens take room.
    """
    import torch

    device = next(model.parameters()).device
    ids = [tokenizer(text, truncation=True, max_length=most_tokens)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda position: len(ids[position]))
    found: dict[int, Any] = {}
    model.eval()
    compared = _losses if problem_type in WRITERS else _states
    for positions in batches(order, _BATCH):
        chosen = [ids[i] for i in positions]
        rows, shown = padded(chosen, tokenizer.pad_token_id or 0).to(device), mask(chosen).to(device)
        with torch.no_grad(), autocast(device.type, precision):
            values = compared(model, rows, shown)
        for position, value in zip(positions, values, strict=True):
            found[position] = value.double().cpu().numpy()
    return np.stack([found[position] for position in range(len(ids))])


def _losses(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Nats per token of each row of `ids[rows, tokens]`, of which `mask[rows, tokens]` says which are none: [rows]."""
    import torch.nn.functional as F

    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    counted = mask[:, 1:]
    return (losses * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean hidden state of each row of `ids[rows, tokens]`, scaled to length 1: [rows, hidden]."""
    import torch.nn.functional as F

    body = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix, model)
    hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    # Virtual tokens of a prompt stand before the text.
    hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]
    mean = (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1)


def drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of each text: nats by which its loss rose, or 1 - cosine of its two states: float64 [texts]."""
    if before.ndim == 1:
        return after - before
    return np.maximum(0.0, 1.0 - (before * after).sum(axis=1))  # equal states may differ from 1 by rounding
