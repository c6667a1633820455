"""Run rows through a model and keep a few numbers each: used during training, for evaluation and for `predict`.

Layer 1. Rows are batched by length and put back in their order; logits are reduced batch by batch, so memory does not
grow with the number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fulltune.tasks import LENGTH, Predictions, Target, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_rows(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    target: Target,
    pad_token_id: int,
    *,
    batch_size: int,
    precision: str,
) -> Predictions:
    """Reduce every row's logits.

    Args:
        model: In evaluation or training mode; the mode is put back.
        rows: Tokenised rows with `labels`.
        task: Gives `collate` and `reduce`.
        target: Problem type and labels.
        pad_token_id: Fills shorter rows on the right.
        batch_size: Rows per forward pass.
        precision: `fp32`, `bf16` or `fp16`: type of the computations.

    Returns:
        Name to array; the first axis is the row, in the given order.
    """
    import torch

    order = by_length(rows)
    device = next(model.parameters()).device
    parts: list[dict[str, np.ndarray]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for positions in batches(order, batch_size):
            batch = {
                name: tensor.to(device)
                for name, tensor in task.collate([rows[i] for i in positions], pad_token_id).items()
            }
            labels = batch.pop("labels")
            with autocast(device.type, precision):
                logits = logits_of(model(**batch))
            kept = task.reduce(logits, labels, target)
            parts.append({name: _as_array(values) for name, values in kept.items()})
    model.train(was_training)
    place = np.argsort(order)
    return {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}


def logits_of(outputs: Any) -> torch.Tensor:
    """A model's `logits`; for a span its start and end logits side by side, [batch, length, 2]."""
    import torch

    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    return outputs.logits


def _as_array(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def embeddings(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    pad_token_id: int,
    *,
    batch_size: int,
    precision: str,
) -> np.ndarray:
    """Mean of the last hidden states over real tokens, scaled to length 1: float32 [rows, hidden]."""
    import torch
    import torch.nn.functional as F

    body = getattr(model, model.base_model_prefix, model)
    device = next(model.parameters()).device
    order = by_length(rows)
    parts = []
    model.eval()
    with torch.no_grad():
        for positions in batches(order, batch_size):
            batch = {
                name: tensor.to(device)
                for name, tensor in task.collate([rows[i] for i in positions], pad_token_id).items()
                if name != "labels"
            }
            with autocast(device.type, precision):
                hidden = body(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)
            parts.append(F.normalize(mean, dim=-1).cpu().numpy())
    return np.concatenate(parts)[np.argsort(order)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    precision: str,
) -> list[str]:
    """Greedy answers to tokenised prompts, decoded without special tokens. Prompts are padded on the left."""
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    answers = [""] * len(prompts)
    model.eval()
    for positions in batches(order, batch_size):
        # Prompt and answer share the model's positions; a prompt keeps at least half of them.
        room = max(limit - max_new_tokens, limit // 2) if limit else None
        chosen = [list(prompts[i])[-room:] if room else list(prompts[i]) for i in positions]
        width = max(len(ids) for ids in chosen)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in chosen], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chosen], device=device)
        with torch.no_grad(), autocast(device.type, precision):
            made: torch.Tensor = model.generate(  # type: ignore[operator]  # a method of a mixin
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(max_new_tokens, limit - room) if limit and room else max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        for position, row in zip(positions, made[:, width:], strict=True):
            answers[position] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return answers


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Computations in a smaller type; weights keep theirs."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def by_length(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions of the rows, longest first: a batch that does not fit fails at once."""
    lengths: Sequence[int] = (
        cast("Any", rows)[LENGTH]
        if LENGTH in getattr(rows, "column_names", ())
        else [len(row["input_ids"]) for row in rows]
    )
    return sorted(range(len(rows)), key=lambda i: -lengths[i])


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))
