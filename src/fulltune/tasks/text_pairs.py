"""Rows of text-classification whose two texts the model reads apart (`model.pairs`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fulltune.errors import DataError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview
from fulltune.tasks import Row, RowExamples, RowFeatures, Target, Tokenizer, classes, text_classification
from fulltune.tasks.padding import TEXT_LENGTHS, encode_apart, pad_texts, split_texts

FACTS = recipe_tasks.FACTS["text-pairs"]
find_target, row_labels = text_classification.find_target, text_classification.row_labels
loss, count_items, reduce_logits = classes.loss, classes.count_items, classes.reduce_logits
metrics, answers = classes.metrics, classes.answers
metrics_from_sums, chance_loss = classes.metrics_from_sums, classes.chance_loss
config_changes, collate = classes.config_changes, pad_texts
with_placeholder_answer = classes.with_placeholder_label
why_unusable, why_unanswerable = text_classification.why_unusable, text_classification.why_unanswerable
group_key, display_text = text_classification.group_key, text_classification.display_text


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    by_role = text_classification.find_columns(columns, sample, data, file)
    if "text_pair" not in by_role:
        raise DataError(
            f"{file}: model.pairs: apart needs rows of two texts, found one (column '{by_role['text']}'); name the "
            "second text's column in data.text_pair, or remove model.pairs"
        )
    return by_role


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise both texts of each row, each by itself and truncated to `max_length`."""
    ids = {name: position for position, name in enumerate(target.labels)}
    labels = (text_classification.label_value(row, target, ids) for row in rows)
    return encode_apart([text_classification.text_and_pair(row, target) for row in rows], labels, tokenizer, max_length)


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    text = "\n".join(str(tokenizer.decode(ids.tolist())) for ids in split_texts(features))
    return Preview.labelled(text, classes.label_as_text(features["labels"], target))


def full_row(target: Target, length: int) -> RowFeatures:
    return {**classes.full_row(target, 2 * length), TEXT_LENGTHS: np.full(2, length)}
