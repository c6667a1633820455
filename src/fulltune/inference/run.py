from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.selective_head import SelectiveHead
from fulltune.methods import virtual_tokens_of
from fulltune.methods.head import find_output_layer
from fulltune.models import evaluation_mode, sharding
from fulltune.tasks import LENGTH, Predictions, RowFeatures, Target, Task, Tensor, Tokenizer, seq2seq, task_named
from fulltune.tasks.padding import IGNORED, make_attention_mask, pad_right

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

MOST_TOKENS = 64
BATCH, STATES_BATCH = 8, 32
"""Generic texts per batch for language models, and for other models."""
ProgressCallback = Callable[[int, int, float], None]
"""Called with rows done, total rows and the share of work done."""


@dataclass(frozen=True)
class Batching:
    """Batch size, precision and hooks for running a model over rows."""

    batch_size: int
    precision: str = "fp32"
    head: SelectiveHead | None = None
    on_progress: ProgressCallback = lambda done, total, share: None
    streamer: Any = None


def run_rows(
    model: PreTrainedModel,
    rows: Sequence[RowFeatures],
    task: Task,
    target: Target,
    pad_token_id: int,
    batching: Batching,
) -> Predictions:
    """Run the model without gradients over tokenised rows with `labels`, and return what `task.reduce_logits` computes,
    in the rows' order."""
    import torch

    head = batching.head

    def reduce_batch(positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Run a batch of rows, and return the arrays from `task.reduce_logits`."""
        # Not pinned: results are read back before the next batch is made, so nothing overlaps.
        batch = model_batch(model, task, [rows[i] for i in positions], pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        selecting = contextlib.nullcontext() if head is None else head.computing_only(labels, chunked=head.can_chunk)
        with autocast(model, batching.precision), selecting, regression_head_in_float32(model, target):
            logits = extract_logits(model(**batch))
        values = task.reduce_logits(logits, labels, target)
        return {name: part if isinstance(part, np.ndarray) else part.cpu().numpy() for name, part in values.items()}

    lengths = row_lengths(rows)
    order = positions_longest_first(lengths)
    with evaluation_mode(model), torch.no_grad():
        parts = [
            reduce_batch(positions)
            for positions in batches_with_progress(order, batching.batch_size, lengths, batching.on_progress)
        ]
    place = np.argsort(order)
    return {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}


def model_batch(
    model: PreTrainedModel, task: Task, rows: Sequence[RowFeatures], pad_token_id: int
) -> dict[str, Tensor]:
    """Collate rows into a batch of tensors; for seq2seq, add `decoder_input_ids`."""
    batch = task.collate(rows, pad_token_id)
    if task.FACTS is seq2seq.FACTS:
        batch["decoder_input_ids"] = seq2seq.decoder_input_ids(model, batch["labels"])
    return batch


def extract_logits(outputs: Any) -> Tensor:
    """Return a model's `logits`; for spans, start and end logits stacked to [rows, length, 2]."""
    import torch

    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    return outputs.logits


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return hidden states averaged over `mask`'s tokens, or over an image's patches or pixels: [batch, hidden]."""
    if mask is not None:
        return (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return hidden.flatten(2).mean(dim=2) if hidden.dim() == 4 else hidden.mean(dim=1)


@dataclass(frozen=True)
class GeneratedAnswer:
    """The tokens that a model generated for a prompt, without padding."""

    tokens: list[int]
    has_ended: bool
    """False if the answer reached the limit of tokens before an end token."""


def generate_answers(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batching: Batching,
) -> list[str]:
    """Generate greedy answers to tokenised prompts, decoded without special tokens."""
    generated = generate_tokens(model, tokenizer, prompts, max_new_tokens, batching)
    return [decode_answer(tokenizer, answer.tokens) for answer in generated]


def decode_answer(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def generate_tokens(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batching: Batching,
    together: bool = False,
) -> list[GeneratedAnswer]:
    """Generate greedy answers to tokenised prompts. With `together`, all ranks take the same number of steps, because
    the weights are sharded.

    An encoder-decoder's own settings for beams and lengths are ignored, because they often suit other texts.
    """
    import torch

    two_parts, room = model.config.is_encoder_decoder, 0
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    options: dict[str, Any] = {}
    if two_parts:
        options = {"num_beams": 1, "early_stopping": False, "min_length": 0, "no_repeat_ngram_size": 0}
        max_new_tokens = min(max_new_tokens, limit - 1) if limit else max_new_tokens
    elif limit:
        # Prompt and answer share the model's positions; the prompt gets at least half of them.
        limit -= virtual_tokens_of(model)
        room = max(limit - max_new_tokens, limit // 2)
        max_new_tokens = min(max_new_tokens, limit - room)
    ends = set(np.atleast_1d(model.generation_config.eos_token_id or []).tolist())
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [GeneratedAnswer([], True)] * len(prompts)
    for positions in batches_with_progress(order, batching.batch_size, np.ones(len(prompts)), batching.on_progress):
        batch = [list(prompts[i])[-room:] if room else list(prompts[i]) for i in positions]
        ids = pad_right(batch if two_parts else [row[::-1] for row in batch], tokenizer.pad_token_id)
        attention = make_attention_mask(batch)
        if not two_parts:
            ids, attention = ids.flip(1), attention.flip(1)
        with evaluation_mode(model), torch.no_grad(), autocast(model, batching.precision):
            outputs: Tensor = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=attention.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                streamer=batching.streamer,
                synced_gpus=together,
                **options,
            )
        written = outputs if two_parts else outputs[:, ids.shape[1] :]
        for position, row in zip(positions, written.tolist(), strict=True):
            end = next((place for place, token in enumerate(row[two_parts:], two_parts) if token in ends), None)
            answers[position] = GeneratedAnswer(row if end is None else row[: end + 1], end is not None)
    return answers


def autocast(model: PreTrainedModel, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the model computes in `precision`. Cast weights are cached unless they are sharded."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(model.device.type, dtype=dtype, cache_enabled=not sharding.needs_all_ranks(model))


@contextlib.contextmanager
def regression_head_in_float32(model: PreTrainedModel, target: Target) -> Iterator[None]:
    """Compute the last layer of a regression head in float32 inside the context.

    bf16 cannot distinguish 526,580 from 528,000, and the largest fp16 number is 65,504.
    """
    layer = None
    if target.form.is_number:
        layer = find_output_layer(getattr(model, "module", model), 1)  # an engine wraps the model
    if layer is None:
        yield
        return
    # Before the hook with which an engine frees the weights.
    with layer.register_forward_hook(_recompute_in_float32, prepend=True):
        yield


def _recompute_in_float32(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Forward hook: return a linear layer's output in float32, or unchanged for 16-bit weights."""
    import torch

    if layer.weight.dtype != torch.float32 or output.dtype == torch.float32:
        return output
    with torch.autocast(output.device.type, enabled=False):
        call = getattr(layer, "call_with_weights", lambda compute, hidden: compute(hidden))
        return call(lambda hidden: torch.nn.functional.linear(hidden.float(), layer.weight, layer.bias), inputs[0])


class RowSubset(Sequence[RowFeatures]):
    """Rows of another sequence, chosen by position and not copied."""

    def __init__(self, rows: Sequence[RowFeatures], positions: Sequence[int]) -> None:
        self.rows = rows
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        """Return a row by position in the subset, or a column by name."""
        if isinstance(i, str):
            return self.rows[i][self.positions]  # type: ignore[call-overload]  # columns have names
        return self.rows[self.positions[i]]


def positions_by_length(rows: Sequence[RowFeatures]) -> list[int]:
    return positions_longest_first(row_lengths(rows))


def positions_longest_first(lengths: np.ndarray) -> list[int]:
    return [int(position) for position in np.argsort(-lengths, kind="stable")]


def row_lengths(rows: Sequence[RowFeatures]) -> np.ndarray:
    """Return each row's `length`, or its number of `input_ids`: int64 [rows]."""
    # Prepared rows have a column of lengths; reading row by row would decode all images.
    if not isinstance(rows, (list, tuple)):
        return np.asarray(rows[LENGTH])  # type: ignore[call-overload]  # columns have names
    return np.asarray([row[LENGTH] if LENGTH in row else len(row["input_ids"]) for row in rows])


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def batches_with_progress(
    order: Sequence[int], batch_size: int, work: np.ndarray, on_progress: ProgressCallback
) -> Iterator[Sequence[int]]:
    """Yield batches of the positions in `order`, and report progress after each. `work[rows]` is each row's cost in any
    unit."""
    shares = np.cumsum(np.asarray(work, np.float64)[list(order)]) if len(order) else np.zeros(1)
    on_progress(0, len(order), 0.0)
    done = 0
    for positions in batches(order, batch_size):
        yield positions
        done += len(positions)
        on_progress(done, len(order), float(shares[done - 1] / shares[-1]))


# ---- generic texts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenericText:
    """Tokenised generic texts, on which a model's loss or hidden states are measured."""

    ids: tuple[list[int], ...]
    pad_token_id: int
    is_language_model: bool
    precision: str
    batch: int = BATCH

    @classmethod
    def tokenise(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        is_language_model: bool,
        precision: str,
        max_tokens: int,
        batch_size: int = BATCH,
    ) -> GenericText:
        """Tokenise texts, truncated to `max_tokens`, which must be the same for all compared models."""
        ids = [tokenizer(text, truncation=True, max_length=max_tokens, verbose=False)["input_ids"] for text in texts]
        # A single token has nothing to be predicted from.
        ids = [row for row in ids if len(row) > 1 or not is_language_model]
        return cls(tuple(ids), tokenizer.pad_token_id or 0, is_language_model, precision, batch_size)

    def measure(
        self, model: Any, head: SelectiveHead | None = None, between_batches: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Return each text's loss in nats per token [texts] for a language model, else its normalised mean hidden state
        [texts, hidden]."""
        if not self.is_language_model:
            return self._measure_states(model, between_batches)
        rows = [{"input_ids": ids, "labels": [IGNORED, *ids[1:]], LENGTH: len(ids)} for ids in self.ids]
        batch_size = self.batch if head is not None and head.can_chunk else 1
        outputs = run_rows(
            model,
            rows,
            task_named("causal-lm"),
            Target("text", {}),
            self.pad_token_id,
            Batching(batch_size, self.precision, head, lambda *_: between_batches()),
        )
        return outputs["nll"] / outputs["tokens"]

    def _measure_states(self, model: PreTrainedModel, between_batches: Callable[[], None]) -> np.ndarray:
        """Return each text's mean hidden state, normalised to length 1: float64 [texts, hidden]."""
        import torch
        import torch.nn.functional as F

        order = positions_longest_first(np.array([len(ids) for ids in self.ids]))
        by_position: dict[int, np.ndarray] = {}
        with evaluation_mode(model), torch.no_grad():
            for positions in batches(order, self.batch):
                between_batches()
                with autocast(model, self.precision):
                    states = self.mean_states(model, positions)
                directions = F.normalize(states.double(), dim=-1).cpu().numpy()
                by_position.update(zip(positions, directions, strict=True))
        return np.stack([by_position[position] for position in range(len(self.ids))])

    def mean_states(self, model: PreTrainedModel, positions: Sequence[int]) -> Tensor:
        """Return the body's last hidden states, averaged over each text's tokens: float32 [positions, hidden]."""
        texts = [self.ids[position] for position in positions]
        ids, mask = pad_right(texts, self.pad_token_id).to(model.device), make_attention_mask(texts).to(model.device)
        inner = getattr(model, "module", model)  # an engine wraps the model
        body = (
            inner.get_encoder() if inner.config.is_encoder_decoder else getattr(inner, inner.base_model_prefix, inner)
        )
        inputs = {"input_ids": ids, "attention_mask": mask}
        outputs = (
            _run_and_capture_body(model, inner, body, inputs) if sharding.needs_all_ranks(model) else body(**inputs)
        )
        hidden = outputs.last_hidden_state.float()
        hidden = hidden[:, hidden.shape[1] - ids.shape[1] :]  # without virtual tokens in front
        return (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _run_and_capture_body(model: nn.Module, unwrapped_model: Any, body: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Run the whole model, which gathers sharded weights outside of its blocks, and return the body's output."""
    if unwrapped_model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"][:, :1]}
    if type(unwrapped_model).__name__.endswith("MultipleChoice") or hasattr(unwrapped_model, "reads_several_texts"):
        inputs = {name: tensor.unsqueeze(1) for name, tensor in inputs.items()}
    outputs: list[Any] = []
    with body.register_forward_hook(lambda _, __, output: outputs.append(output)):
        model(**inputs)
    return outputs[0]
