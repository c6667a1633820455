"""Run rows, or texts that have nothing to do with the task, through a model and keep a few numbers of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fulltune.inference.selective_head import SelectiveHead
from fulltune.methods import virtual_tokens_of
from fulltune.methods.head import output_layer_of
from fulltune.models import evaluating, sharding
from fulltune.tasks import LENGTH, Predictions, Target, Task, Tensor, Tokenizer, seq2seq, task_named
from fulltune.tasks.padding import IGNORED, mask, padded

MOST_TOKENS = 64
"""Where a text is cut."""
BATCH, STATES_BATCH = 8, 32
"""Texts that are read at once, at most: by a language model, whose logits take room, and by others."""
Watch = Callable[[int, int, float], None]
"""Told how many rows are done, of how many, and which share of the work that is."""


@dataclass(frozen=True)
class Batching:
    """How rows go through a model."""

    batch_size: int
    """Rows per forward pass."""
    precision: str = "fp32"
    """`fp32`, `bf16` or `fp16`: type of the computations."""
    head: SelectiveHead | None = None
    """Drops logits that the task does not use, and keeps the others in chunks where it can."""
    watch: Watch = lambda done, total, share: None
    """Called before the first batch and after each."""


def run_rows(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    target: Target,
    pad_token_id: int,
    batching: Batching,
) -> Predictions:
    """What the task reduces each row's logits to, batch by batch: name to array, whose first axis is the row.

    Args:
        model: In evaluation or training mode; the mode is put back.
        rows: Tokenised rows with `labels`; lists of `length` ids each.
        task: Gives `collate` and `reduce`.
        target: Problem type and labels.
        pad_token_id: Fills shorter rows on the right.
    """
    import torch

    head = batching.head

    def kept(positions: Sequence[int]) -> dict[str, np.ndarray]:
        # Not pinned: a batch's numbers are read back before the next one is made, so there is nothing to overlap.
        batch = model_batch(model, task, [rows[i] for i in positions], pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        selecting = contextlib.nullcontext() if head is None else head.only(labels, chunked=head.can_chunk)
        with autocast(model, batching.precision), selecting, whole_numbers(model, target):
            logits = logits_of(model(**batch))
        reduced = task.reduce(logits, labels, target)
        return {name: part if isinstance(part, np.ndarray) else part.cpu().numpy() for name, part in reduced.items()}

    lengths = lengths_of(rows)
    order = longest_first(lengths)
    with evaluating(model), torch.no_grad():
        parts = [kept(positions) for positions in watched(order, batching.batch_size, lengths, batching.watch)]
    place = np.argsort(order)
    return {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}


def model_batch(model: Any, task: Task, features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """A collated batch with everything that the model reads, tensors [rows, length]: an encoder-decoder also reads the
    labels before."""
    batch = task.collate(features, pad_token_id)
    if task.FACTS is seq2seq.FACTS:
        batch["decoder_input_ids"] = seq2seq.decoder_input_ids(model, batch["labels"])
    return batch


def logits_of(outputs: Any) -> Tensor:
    """A model's `logits`: [rows, labels], [rows, length, vocabulary or tags] or, picked by a selective head, [tokens,
    vocabulary]; for a span its start and end logits side by side, [rows, length, 2]."""
    import torch

    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    return outputs.logits


def mean_hidden(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens, or over all places of an image, whose model gives [batch, hidden, height, width] or
    [batch, patches, hidden]: float32 [batch, hidden]."""
    if mask is not None:
        return (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return hidden.flatten(2).mean(dim=2) if hidden.dim() == 4 else hidden.mean(dim=1)


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batching: Batching,
) -> list[str]:
    """Greedy answers to tokenised prompts, decoded without special tokens.

    A decoder's prompts are padded on the left; an encoder-decoder's on the right, as in training. What the latter's
    own generation settings say about beams and lengths is left out: often it is meant for texts of another kind, such
    as summaries of at least 56 tokens.
    """
    import torch

    two_parts = model.config.is_encoder_decoder
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if two_parts:
        room, most = None, limit and limit - 1
        options: dict[str, Any] = {"num_beams": 1, "early_stopping": False, "min_length": 0, "no_repeat_ngram_size": 0}
    else:
        # Prompt and answer share the model's positions; a prompt keeps at least half of them.
        limit = limit and limit - virtual_tokens_of(model)
        room = max(limit - max_new_tokens, limit // 2) if limit else None
        most, options = limit and room and limit - room, {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    model.eval()
    for positions in watched(order, batching.batch_size, np.ones(len(prompts)), batching.watch):
        chosen = [list(prompts[i])[-room:] if room else list(prompts[i]) for i in positions]
        if two_parts:
            ids, attention = padded(chosen, tokenizer.pad_token_id), mask(chosen)
        else:
            ids, attention = padded([row[::-1] for row in chosen], tokenizer.pad_token_id).flip(1), mask(chosen).flip(1)
        with torch.no_grad(), autocast(model, batching.precision):
            made: Tensor = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=attention.to(model.device),
                max_new_tokens=min(max_new_tokens, most) if most else max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        for position, row in zip(positions, made if two_parts else made[:, ids.shape[1] :], strict=True):
            answers[position] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return answers


def autocast(model: Any, precision: str) -> contextlib.AbstractContextManager[Any]:
    """A model's computations in a smaller type; copies of its weights are kept until it is left, unless they are
    sharded."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(model.device.type, dtype=dtype, cache_enabled=not sharding.runs_together(model))


@contextlib.contextmanager
def whole_numbers(model: Any, target: Target) -> Iterator[None]:
    """Inside, the last layer of a head that gives numbers computes in float32, as long as its weights are: in bf16
    526,580 and 528,000 are the same, and fp16 ends at 65,504."""
    layer = None
    if target.form.is_number:
        layer = output_layer_of(getattr(model, "module", model), 1)  # an engine has the model inside
    if layer is None:
        yield
        return
    # Before the hook of an engine that takes the weights away again.
    hook = layer.register_forward_hook(_in_float32, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _in_float32(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """In place of what a linear layer has given for inputs[..., features]."""
    import torch

    if layer.weight.dtype != torch.float32 or output.dtype == torch.float32:
        return output
    with torch.autocast(output.device.type, enabled=False):
        return torch.nn.functional.linear(inputs[0].float(), layer.weight, layer.bias)


class Share(Sequence[Mapping[str, Any]]):
    """Some of the rows, as rows; each is read (an image decoded) when it is asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], positions: Sequence[int]) -> None:
        self.rows = rows
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, str):
            return self.rows[i][self.positions]  # type: ignore[call-overload]  # columns have names
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
    if not isinstance(rows, (list, tuple)):
        return np.asarray(rows[LENGTH])  # type: ignore[call-overload]  # columns have names
    return np.asarray([row[LENGTH] if LENGTH in row else len(row["input_ids"]) for row in rows])


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def watched(order: Sequence[int], size: int, work: np.ndarray, watch: Watch) -> Iterator[Sequence[int]]:
    """The batches of `batches`, of rows that are so much work each, in any unit [rows]; watched after each batch."""
    shares = np.cumsum(np.asarray(work, np.float64)[list(order)]) if len(order) else np.zeros(1)
    watch(0, len(order), 0.0)
    done = 0
    for positions in batches(order, size):
        yield positions
        done += len(positions)
        watch(done, len(order), float(shares[done - 1] / shares[-1]))


# ---- texts that have nothing to do with the task ----------------------------------------------------------------


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
        batch_size = self.batch if head is not None and head.can_chunk else 1
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
        with evaluating(model), torch.no_grad():
            for positions in batches(order, self.batch):
                between()
                with autocast(model, self.precision):
                    states = self.states(model, positions)
                directions = F.normalize(states.double(), dim=-1).cpu().numpy()
                found.update(zip(positions, directions, strict=True))
        return np.stack([found[position] for position in range(len(self.ids))])

    def states(self, model: Any, positions: Sequence[int]) -> Tensor:
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
