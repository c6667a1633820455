from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fulltune.inference.run import (
    ProgressCallback,
    RowSubset,
    autocast,
    batches_with_progress,
    mean_pool,
    positions_longest_first,
    row_lengths,
)
from fulltune.models import evaluation_mode
from fulltune.models.encoders import join_vectors, pool
from fulltune.models.sharding import needs_all_ranks
from fulltune.probe.layers import HeadLayers, HiddenStates, run_and_read_hidden
from fulltune.probe.linear import Items, NoProbe
from fulltune.recipe.tasks import ProblemType, TaskName
from fulltune.records.probe import MOST_ROWS, OTHER_TOKENS, items_per_row, max_probe_rows
from fulltune.system.memory import run_with_smaller_batches
from fulltune.tasks import Target, Task, question_answering, task_named
from fulltune.tasks.padding import IGNORED
from fulltune.tasks.token_classification import WORD_IDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
EncodedRows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Features:
    """Features of items in row order, as float32 [items, hidden]."""

    last: np.ndarray | None
    """Inputs of the head's last layer, or None if not extracted."""
    dense: np.ndarray | None
    """Inputs of the head's dense layer, or None if it has none."""
    mean: np.ndarray | None
    """Mean hidden state, scaled to length 1. None if items are single tokens, or if the body pools tokens."""
    labels: np.ndarray
    """Labels by kind: class or number [items]; 0 or 1 per label [items, labels]; 1 for the right choice [items]; or 1
    for the answer's first and last token [items, 2]."""
    rows: np.ndarray
    pair: np.ndarray | None = None
    """Features of pairs whose texts are read separately, [items, 4 hidden]: what a head of `TextPairs` reads."""


@dataclass(frozen=True)
class FeatureExtractor:
    """Runs the prepared rows through the pretrained model and extracts features."""

    model: PreTrainedModel
    task_name: TaskName
    target: Target
    pad_token_id: int
    batch_size: int
    precision: str
    class_weights: Sequence[float] | None = None
    pair_separators: frozenset[int] = frozenset()
    watch: ProgressCallback = lambda done, total, share: None
    keeps_dense: bool = False

    @property
    def task(self) -> Task:
        return task_named(self.task_name)

    @property
    def kind(self) -> ProblemType:
        return self.target.form.probed_as

    @property
    def num_outputs(self) -> int:
        return self.target.form.num_outputs or len(self.target.labels)

    def features(self, rows: EncodedRows, layers: HeadLayers | None) -> Features:
        return self.retry_with_smaller_batches(lambda size: concatenate_features(self.batches(rows, layers, size)))

    def retry_with_smaller_batches(self, run: Callable[[int], T]) -> T:
        """Return `run(batch_size)`. If memory runs out, retry with smaller sizes, unless the weights are sharded."""
        if needs_all_ranks(self.model):
            return run(self.batch_size)
        return run_with_smaller_batches("linear probe", self.batch_size, run)

    def items(self, features: np.ndarray, source: Features, is_pair: bool = False) -> Items:
        return Items(self.kind, features, source.labels, source.rows, self.num_outputs, self.class_weights, is_pair)

    def batches(
        self, rows: EncodedRows, layers: HeadLayers | None, batch_size: int, with_pairs: bool = True
    ) -> Iterator[Features]:
        """Yield the features of each batch, longest rows first. If `layers` is None, only mean embeddings are
        extracted. `with_pairs` also reads each text of a pair alone.

        Raises:
            NoProbe: If the head's inputs cannot be identified, or if a feature is not finite.
        """
        import torch

        model, lengths = self.model, row_lengths(rows)
        with evaluation_mode(model):
            for positions in batches_with_progress(positions_longest_first(lengths), batch_size, lengths, self.watch):
                batch_rows = [rows[i] for i in positions]
                batch, labels = self._collate(batch_rows)
                with torch.no_grad(), autocast(model, self.precision):
                    states = run_and_read_hidden(model, layers, batch)
                    features = _item_features(states, batch, labels, batch_rows, self.kind, np.asarray(positions))
                    if self.task.FACTS.reads_texts_apart:
                        vectors = pool(states[0], batch["attention_mask"].flatten(0, 1), model.config.pooling)
                        features = replace(features, pair=_pair_features(vectors.unflatten(0, (len(batch_rows), -1))))
                    elif with_pairs and self.pair_separators and features.mean is not None:
                        features = replace(features, pair=self._read_pairs(batch_rows))
                yield features

    def _read_pairs(self, rows: EncodedRows) -> np.ndarray:
        """Read the pairs' texts alone, and join their means: [rows, 4 hidden]."""
        import torch

        texts = split_pairs(rows, self.pair_separators)
        means: list[torch.Tensor] = []
        for part in (texts[: len(rows)], texts[len(rows) :]):
            batch, _ = self._collate(part)
            mean = _mean_embedding(run_and_read_hidden(self.model, None, batch)[0], batch)
            assert mean is not None, "the pair has one"
            means.append(mean)
        return _pair_features(torch.stack(means, dim=1))

    def _collate(self, rows: EncodedRows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a batch of the model's inputs, and its labels on the CPU."""
        batch = self.task.collate(rows, self.pad_token_id)
        labels = batch["labels"].cpu()
        return {name: tensor.to(self.model.device) for name, tensor in batch.items() if name != "labels"}, labels


def sample_rows(
    rows: EncodedRows, kind: ProblemType, num_choices: int, width: int, max_rows: int = MOST_ROWS
) -> EncodedRows:
    """Draw at most `max_rows` rows at random, or fewer if their features of size `width` would need too much memory."""
    words = float(row_lengths(rows).mean()) if kind == "tags" else 0.0
    max_rows = max_probe_rows(kind, items_per_row(kind, words, num_choices), width, max_rows)
    if len(rows) <= max_rows:
        return rows
    return RowSubset(rows, np.sort(np.random.default_rng(0).choice(len(rows), max_rows, replace=False)).tolist())


def concatenate_features(parts: Iterable[Features]) -> Features:
    """Concatenate the features of several batches, in row order."""
    batches = list(parts)
    order = np.argsort(np.concatenate([batch.rows for batch in batches]), kind="stable")
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(Features)):
        arrays = [getattr(batch, name) for batch in batches]
        columns[name] = None if any(array is None for array in arrays) else np.concatenate(arrays)[order]
    return Features(**columns)


def _item_features(
    states: HiddenStates,
    batch: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    rows: EncodedRows,
    kind: ProblemType,
    positions: np.ndarray,
) -> Features:
    """Select a batch's items from its hidden states, with labels and row indices (`positions`)."""
    import torch

    hidden, last, dense = states
    item_mask: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    match kind:
        case "tags":
            item_mask = labels != IGNORED
            mean, targets = _word_embeddings(hidden, rows), labels[item_mask].numpy()
            counts = item_mask.sum(dim=1).numpy()
        case "choice" | "relevance":
            mean = _mean_embedding(hidden, {name: tensor.flatten(0, 1) for name, tensor in batch.items()})
            counts = np.full(len(positions), len(hidden) // len(positions))
            is_right = labels[:, 1:] > 0 if kind == "relevance" else torch.arange(counts[0]) == labels[:, None]
            targets = is_right.numpy().astype(np.int64).reshape(len(hidden), -1)
        case "span":
            token_indices, targets = _choose_answer_tokens(labels.numpy(), positions)
            item_mask = torch.zeros(hidden.shape[:2], dtype=torch.bool)
            item_mask[token_indices] = True
            counts = item_mask.sum(dim=1).numpy()
        case _:
            mean, targets = _mean_embedding(hidden, batch), labels.numpy()
            counts = np.ones(len(positions), np.int64)

    def select_items(values: torch.Tensor | None) -> np.ndarray | None:
        if values is None:
            return None
        flat = values.reshape(-1, values.shape[-1])
        flat = flat if item_mask is None else flat[item_mask.flatten().to(flat.device)]
        return _check_finite(flat.cpu().numpy())

    return Features(
        select_items(last),
        select_items(dense),
        None if mean is None else _check_finite(mean.cpu().numpy()),
        targets,
        np.repeat(positions, counts),
    )


def _pair_features(vectors: torch.Tensor) -> np.ndarray:
    return _check_finite(join_vectors(vectors).cpu().numpy())


def _check_finite(values: np.ndarray) -> np.ndarray:
    """Return `values` unchanged, or raise `NoProbe` if any is not finite."""
    if not np.isfinite(values).all():
        raise NoProbe("the pretrained model's features are not finite")
    return values


def _mean_embedding(hidden: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Average the tokens' hidden states, scaled to length 1; None if the body pools tokens (Funnel)."""
    import torch.nn.functional as F

    mask = batch.get("attention_mask")
    if mask is not None and hidden.shape[:2] != mask.shape:
        return None
    return F.normalize(mean_pool(hidden, mask), dim=-1)


def _word_embeddings(hidden: torch.Tensor, rows: EncodedRows) -> torch.Tensor:
    """Return each word's mean hidden state over its tokens, scaled to length 1: [words of all rows, hidden]."""
    import torch
    import torch.nn.functional as F

    means = []
    for row, states in zip(rows, hidden, strict=True):
        word_ids = torch.from_numpy(np.array(row[WORD_IDS], np.int64)).to(states.device)
        inside = word_ids >= 0
        words, word_of_token = word_ids[inside].unique(return_inverse=True)
        # Scaled to length 1, the sum of a word's tokens equals their mean.
        total = torch.zeros(len(words), states.shape[-1], device=states.device)
        means.append(total.index_add_(0, word_of_token, states[: len(inside)][inside]))
    return F.normalize(torch.cat(means), dim=-1)


def _choose_answer_tokens(
    labels: np.ndarray, positions: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Choose random tokens of each window and the first and last token of its answer.

    Returns:
        Windows and positions of the tokens, and their labels [tokens, 2]: 1 for the answer's first and last token.
    """
    start, end, first, last = (
        labels[:, getattr(question_answering, name)] for name in ("START", "END", "FIRST", "LAST")
    )
    windows, tokens = [], []
    for number, position in enumerate(positions):
        others = np.random.default_rng(int(position)).integers(first[number], last[number] + 1, OTHER_TOKENS)
        chosen_tokens = np.unique(np.concatenate([others, [start[number], end[number], question_answering.NOWHERE]]))
        windows.append(np.full(len(chosen_tokens), number))
        tokens.append(chosen_tokens)
    window, token = np.concatenate(windows), np.concatenate(tokens)
    return (window, token), np.stack([token == start[window], token == end[window]], axis=1).astype(np.int64)


# ---- the two texts of a pair, each read alone: what models of sentence embeddings compare ------------------------


def pair_separators(tokenizer: PreTrainedTokenizerBase, target: Target) -> frozenset[int]:
    """Return the ids of the special tokens around a pair's texts, or an empty set if there are none."""
    if "text_pair" not in target.columns:
        return frozenset()
    names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    special = frozenset(token for name in names if (token := getattr(tokenizer, name, None)) is not None)
    first, second = (half["input_ids"] for half in split_pairs([{**tokenizer("a", "a"), "labels": 0}], special))
    are_equal = len(first) and np.array_equal(first, second) and not special.issuperset(first.tolist())
    return special if are_equal else frozenset()


def split_pairs(rows: EncodedRows, separators: frozenset[int]) -> list[dict[str, Any]]:
    """Split each pair into two rows with the special tokens (`separators`): all first texts, then all second ones."""
    firsts: list[dict[str, Any]] = []
    seconds: list[dict[str, Any]] = []
    for row in rows:
        ids = np.asarray(row["input_ids"])
        is_word = ~np.isin(ids, tuple(separators))
        begin, end = (int(is_word.argmax()), len(ids) - int(is_word[::-1].argmax())) if is_word.any() else (0, 0)
        inside = is_word[begin:end]
        border = begin + int(inside.argmin()) if not inside.all() else end
        second = border + int(is_word[border:end].argmax()) if border < end else end
        # Some models need all closing tokens in each row. Without a border, `ids[end:]` closes both texts.
        after = ids[end:] if border < end else ids[-1:]
        for texts, text in ((firsts, ids[begin:border]), (seconds, ids[second:end])):
            texts.append({"input_ids": np.concatenate([ids[:begin], text, after]), "labels": row["labels"]})
    return [*firsts, *seconds]
