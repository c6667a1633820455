"""Run rows through a model and keep a few numbers each: used during training, for evaluation and for `predict`.

Layer 1. Rows are batched by length and put back in their order; logits are reduced batch by batch, so memory does not
grow with the number of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.selective_head import SelectiveHead
from fulltune.methods import virtual_tokens_of
from fulltune.tasks import LENGTH, Predictions, Target, Task, seq2seq
from fulltune.tasks.padding import mask, padded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Watch = Callable[[int, int, float], None]
"""Told how many rows are done, of how many, and which share of the work that is."""


def unwatched(done: int, total: int, share: float) -> None:
    """Nobody asks."""


def run_rows(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    target: Target,
    pad_token_id: int,
    *,
    batch_size: int,
    precision: str,
    head: SelectiveHead | None = None,
    watch: Watch = unwatched,
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
        head: Leaves out logits that the task does not use, and keeps the others in pieces where it can.
        watch: Told before the first batch and after each.

    Returns:
        Name to array; the first axis is the row, in the given order.
    """
    import torch

    lengths = lengths_of(rows)
    order = longest_first(lengths)
    device = next(model.parameters()).device
    parts: list[dict[str, np.ndarray]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for positions in watched(order, batch_size, lengths, watch):
            batch = {
                name: tensor.to(device)
                for name, tensor in model_batch(model, task, [rows[i] for i in positions], pad_token_id).items()
            }
            labels = batch.pop("labels")
            selecting = contextlib.nullcontext() if head is None else head.only(labels, in_pieces=head.in_pieces)
            with autocast(device.type, precision), selecting:
                logits = logits_of(model(**batch))
            kept = task.reduce(logits, labels, target)
            parts.append({name: _as_array(values) for name, values in kept.items()})
    model.train(was_training)
    place = np.argsort(order)
    return {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}


def model_batch(
    model: PreTrainedModel, task: Task, features: Sequence[Mapping[str, Any]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """A collated batch with everything that the model reads: an encoder-decoder also reads the labels before."""
    batch = task.collate(features, pad_token_id)
    if task.FACTS is seq2seq.FACTS:
        batch["decoder_input_ids"] = seq2seq.decoder_input_ids(model, batch["labels"])
    return batch


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
    watch: Watch = unwatched,
) -> np.ndarray:
    """Mean of the last hidden states over real tokens, scaled to length 1: float32 [rows, hidden]."""
    import torch
    import torch.nn.functional as F

    body = getattr(model, model.base_model_prefix, model)
    device = next(model.parameters()).device
    lengths = lengths_of(rows)
    order = longest_first(lengths)
    parts = []
    model.eval()
    with torch.no_grad():
        for positions in watched(order, batch_size, lengths, watch):
            batch = {
                name: tensor.to(device)
                for name, tensor in task.collate([rows[i] for i in positions], pad_token_id).items()
                if name != "labels"
            }
            with autocast(device.type, precision):
                hidden = body(**batch).last_hidden_state
            mean = _mean(hidden.float(), batch.get("attention_mask"))
            parts.append(F.normalize(mean, dim=-1).cpu().numpy())
    return np.concatenate(parts)[np.argsort(order)]


def _mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over real tokens, or over all places of an image, whose model gives [batch, hidden, height, width] or
    [batch, patches, hidden]: float32 [batch, hidden]."""
    if mask is not None:
        return (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return hidden.flatten(2).mean(dim=2) if hidden.dim() == 4 else hidden.mean(dim=1)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    precision: str,
    watch: Watch = unwatched,
) -> list[str]:
    """Greedy answers to tokenised prompts, decoded without special tokens. Prompts are padded on the left."""
    import torch

    if model.config.is_encoder_decoder:
        return _write(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            precision=precision,
            watch=watch,
        )
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = limit and limit - virtual_tokens_of(model)
    answers = [""] * len(prompts)
    model.eval()
    for positions in watched(order, batch_size, np.ones(len(prompts)), watch):
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


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    precision: str,
    watch: Watch,
) -> list[str]:
    """The same for an encoder-decoder. Sources are padded on the right, as in training.

    What the model's own generation settings say about beams and lengths is left out: often it is meant for texts of
    another kind, such as summaries of at least 56 tokens.
    """
    import torch

    device = next(model.parameters()).device
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    answers = [""] * len(sources)
    model.eval()
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for positions in watched(order, batch_size, np.ones(len(sources)), watch):
        chosen = [sources[i] for i in positions]
        with torch.no_grad(), autocast(device.type, precision):
            made: torch.Tensor = model.generate(  # type: ignore[operator]  # a method of a mixin
                input_ids=padded(chosen, tokenizer.pad_token_id).to(device),
                attention_mask=mask(chosen).to(device),
                max_new_tokens=min(max_new_tokens, limit - 1) if limit else max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                num_beams=1,
                early_stopping=False,
                min_length=0,
                no_repeat_ngram_size=0,
            )
        for position, row in zip(positions, made, strict=True):
            answers[position] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return answers


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Computations in a smaller type; weights keep theirs."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


class Share(Sequence[Mapping[str, Any]]):
    """Some of the rows, as rows; each is read (an image decoded) when it is asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], positions: Sequence[int]) -> None:
        self.rows = rows
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, str):
            columns: Any = self.rows
            return columns[i][self.positions]
        return self.rows[self.positions[i]]


def by_length(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions of the rows, longest first: a batch that does not fit fails at once."""
    return longest_first(lengths_of(rows))


def longest_first(lengths: np.ndarray) -> list[int]:
    """Positions by falling length."""
    return [int(position) for position in np.argsort(-lengths, kind="stable")]


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Tokens of each row [rows]."""
    # Prepared rows have their lengths in one column: reading them one by one would also decode all images.
    columns: Any = rows
    return np.asarray([_length(row) for row in rows] if isinstance(rows, (list, tuple)) else columns[LENGTH])


def _length(row: Mapping[str, Any]) -> int:
    return int(row[LENGTH]) if LENGTH in row else len(row["input_ids"])


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def watched(order: Sequence[int], size: int, work: np.ndarray, watch: Watch) -> Iterator[Sequence[int]]:
    """The batches of `batches`; who watches is told before the first one and after each.

    Args:
        order: Positions of the rows.
        size: Rows of a batch.
        work: How much each row is of the whole, in any unit [rows].
        watch: See `Watch`.
    """
    shares = np.cumsum(np.asarray(work, np.float64)[list(order)]) if len(order) else np.zeros(1)
    watch(0, len(order), 0.0)
    done = 0
    for positions in batches(order, size):
        yield positions
        done += len(positions)
        watch(done, len(order), float(shares[done - 1] / shares[-1]))
