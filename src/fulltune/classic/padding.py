from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.data.data_collator import DataCollator

from fulltune.classic.arguments import issue_notice
from fulltune.classic.dry_run import row_length
from fulltune.tasks.padding import IGNORED, pad_right


class PaddingCollator:
    """transformers' `default_data_collator` with padding. Masked positions get the padding token, because a decoder
    classifies by the last token that is not padding."""

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, features: Sequence[object]) -> dict[str, torch.Tensor]:
        """Pad rows of different lengths, and return a batch of tensors."""
        rows = [dict(row if isinstance(row, Mapping) else vars(row)) for row in features]
        if _have_unequal_lengths(rows, "input_ids"):
            issue_notice(f"no tokenizer or collator pads rows to one length, so token {self._pad} is used to pad them")
            rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        fills = {"input_ids": self._pad, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
        for name in [name for name in fills if _have_unequal_lengths(rows, name)]:
            for row, values in zip(rows, pad_right([row[name] for row in rows], fills[name]), strict=True):
                row[name] = values
        batch = transformers.default_data_collator(rows)
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is not None and mask is not None and ids.shape == mask.shape:
            batch["input_ids"] = ids.masked_fill(mask == 0, self._pad)
        return batch


def _have_unequal_lengths(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({row_length(row, name) for row in rows}) > 1


def with_padding(model: torch.nn.Module, tokenizer: object, collate: DataCollator) -> DataCollator:
    """Set the model's padding token if missing. Return `collate`, or a padding collator if `collate` cannot pad."""
    reader = collate if tokenizer is None else tokenizer
    pad_of_reader = getattr(getattr(reader, "tokenizer", reader), "pad_token_id", None)
    lacks = collate is transformers.default_data_collator or type(collate) is PaddingCollator
    lacks |= type(collate) is transformers.DataCollatorWithPadding and pad_of_reader is None
    config = getattr(model, "config", None)
    if config is None or (pad_of_reader is None and not lacks):
        return collate
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pad = getattr(text, "pad_token_id", None) if pad_of_reader is None else pad_of_reader
    if is_missing := pad is None:
        pad = getattr(text, "eos_token_id", None)
        pad = pad[0] if isinstance(pad, Sequence) and pad else pad
        pad = pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else None
    if pad_of_reader is not None or (is_missing and "SequenceClassification" in type(model).__name__):
        for part in (config, text):
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = pad
        if is_missing and pad is not None:
            token = f"token {pad} is used (the model's end token)"
            issue_notice(f"the model has no padding token, which classification needs; {token}")
    return PaddingCollator(pad) if lacks and pad is not None else collate
