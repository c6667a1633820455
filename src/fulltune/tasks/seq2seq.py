from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview, Segment
from fulltune.tasks import (
    LENGTH,
    Example,
    Refused,
    Row,
    RowExamples,
    RowFeatures,
    Target,
    Tensor,
    Tokenizer,
    classes,
    written,
)
from fulltune.tasks.columns import as_text, normalised, why_cell_blank
from fulltune.tasks.columns import find_columns as columns_of_roles
from fulltune.tasks.labels import row_labels as labels_of_row
from fulltune.tasks.padding import IGNORED, pad_features

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTS = recipe_tasks.FACTS["seq2seq"]
find_columns = partial(columns_of_roles, ("source", "target"))
collate = partial(pad_features, label_per_token=True)
row_labels, config_changes, metrics = labels_of_row, classes.config_changes, written.metrics
metrics_from_sums, full_row, score_answers = written.metrics_from_sums, written.full_row, written.score_answers


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return a target with the recipe's source prefix."""
    for _ in rows:
        pass
    return Target("source_target", columns, joint=data.source_prefix or "")


def why_unusable(row: Row, target: Target) -> Refused | None:
    return why_cell_blank(row, target, "source", "target")


def with_placeholder_answer(row: Row, target: Target) -> Row:
    return {**row, target.columns["target"]: "?"}


why_unanswerable = why_unusable


def group_key(row: Row, target: Target) -> str:
    return normalised(as_text(row.get(target.columns["source"])))


def prompt_text(row: Row, target: Target) -> str:
    return as_text(row.get(target.columns["source"]))


def answer_text(row: Row, target: Target) -> str:
    return as_text(row.get(target.columns["target"])).strip()


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise sources and targets, each truncated to `max_length`."""
    # Truncation is off, to count what is cut.
    sources = tokenizer([target.joint + prompt_text(row, target) for row in rows], truncation=False, verbose=False)
    written = tokenizer(text_target=[as_text(row.get(target.columns["target"])) for row in rows], verbose=False)
    # BERT-like tokenizers end texts with their separator.
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    encoded = []
    for source, ids in zip(sources["input_ids"], written["input_ids"], strict=True):
        labels = list(ids)
        if end is not None and labels[-1:] != [end]:
            labels.append(end)
        truncated = len(source) > max_length or len(labels) > max_length
        # A cut target loses its end token, so that the model does not learn to stop too early.
        source, labels = _truncate_before_end_token(source, max_length, tokenizer), labels[:max_length]
        features = {"input_ids": source, "labels": labels, LENGTH: len(source) + len(labels)}
        # A target of special tokens alone, such as unknown spaces, teaches nothing.
        count = len(labels) if any(token not in tokenizer.all_special_ids for token in labels) else 0
        encoded.append([Example(features, count, truncated, longest=max(len(source), len(labels)))])
    return encoded


def _truncate_before_end_token(ids: Sequence[int], max_length: int | None, tokenizer: Tokenizer) -> list[int]:
    """Truncate to `max_length` tokens, but keep a special token at the end."""
    if max_length is None or len(ids) <= max_length:
        return list(ids)
    keeps_end = ids[-1] in tokenizer.all_special_ids
    return [*ids[: max_length - 1], ids[-1]] if keeps_end else list(ids[:max_length])


def generation_ids(row: Row, target: Target, tokenizer: Tokenizer, max_length: int | None = None) -> list[int]:
    ids = tokenizer(target.joint + prompt_text(row, target), truncation=False, verbose=False)["input_ids"]
    return _truncate_before_end_token(ids, max_length, tokenizer)


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    source, written = (str(tokenizer.decode(features[name])) for name in ("input_ids", "labels"))
    return Preview(segments=(Segment(text=f"{source}\n", trained=False), Segment(text=written, trained=True)))


def decoder_input_ids(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the decoder's inputs [batch, tokens]: the start token, then all labels except the last."""
    # Models make these inputs only if they compute the loss themselves.
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return shift(labels=labels)
    start = getattr(model.config, "decoder_start_token_id", None)
    start = model.generation_config.decoder_start_token_id if start is None else start
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id or 0)


def target_ids(labels: Tensor) -> Tensor:
    return labels


loss, reduce_logits = partial(written.loss, target_ids), partial(written.reduce_logits, target_ids)
count_items = partial(written.count_items, target_ids)
