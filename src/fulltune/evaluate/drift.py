"""How far a model has moved away on texts that have nothing to do with the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fulltune.inference.run import autocast, batches
from fulltune.recipe.tasks import ProblemType

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
    pad = tokenizer.pad_token_id or 0
    for positions in batches(order, _BATCH):
        width = max(len(ids[i]) for i in positions)
        rows = torch.tensor([[*ids[i], *[pad] * (width - len(ids[i]))] for i in positions], device=device)
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in positions], device=device)
        with torch.no_grad(), autocast(device.type, precision):
            values = _losses(model, rows, mask) if problem_type in WRITERS else _states(model, rows, mask)
        for position, value in zip(positions, values, strict=True):
            found[position] = value.double().cpu().numpy()
    return np.stack([found[position] for position in range(len(ids))])


def _losses(model: Any, rows: Any, mask: Any) -> Any:
    """Nats per token of each row: [rows]."""
    import torch.nn.functional as F

    logits = model(input_ids=rows, attention_mask=mask).logits.float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    counted = mask[:, 1:]
    return (losses * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _states(model: Any, rows: Any, mask: Any) -> Any:
    """Mean hidden state of each row, scaled to length 1: [rows, hidden]."""
    import torch.nn.functional as F

    body = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix, model)
    hidden = body(input_ids=rows, attention_mask=mask).last_hidden_state.float()
    # Virtual tokens of a prompt stand before the text.
    hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]
    mean = (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1)


def drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of each text: nats by which its loss rose, or 1 - cosine of its two states: float64 [texts]."""
    if before.ndim == 1:
        return after - before
    return np.maximum(0.0, 1.0 - (before * after).sum(axis=1))  # equal states may differ from 1 by rounding
