"""Tokenising texts of any length, and padding rows to tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Sized
from typing import TYPE_CHECKING

import numpy as np

from fulltune.tasks import LENGTH, RowFeatures, Tensor, Tokenizer

if TYPE_CHECKING:
    from transformers import BatchEncoding

IGNORED = -100
"""Label of tokens that are not trained, the `ignore_index` of PyTorch's losses."""
TRAINED = "trained_places"
"""Key of a batch's `trained_places`, computed on the host before the batch moves: on a device the host would wait."""


def collated(
    features: Sequence[RowFeatures],
    pad_token_id: int,
    left_out: Collection[str] = (),
    *,
    label_per_token: bool = False,
) -> dict[str, Tensor]:
    """Pad features to `input_ids[batch, tokens]`, `attention_mask[batch, tokens]`, `labels` and the other lists of
    numbers, except those in `left_out`."""
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    skipped = {LENGTH, "attention_mask", *left_out, *(() if label_per_token else ("labels",))}
    batch = {
        name: padded([row[name] for row in features], fills.get(name, 0)) for name in features[0] if name not in skipped
    }
    batch["attention_mask"] = mask([row["input_ids"] for row in features])
    return batch if label_per_token else batch | {"labels": stacked_labels(features)}


def stacked_labels(features: Sequence[RowFeatures]) -> Tensor:
    """Stack each row's class or numbers to int64 or float32 `labels[batch]` or `labels[batch, n]`."""
    import torch

    values = np.array([row["labels"] for row in features])
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))


def padded(values: Sequence[Sequence[int] | np.ndarray], fill: int) -> Tensor:
    """Pad lists on the right to the longest: int64 [rows, tokens]."""
    import torch

    block = np.full((len(values), max(len(value) for value in values)), fill, np.int64)
    for row, value in zip(block, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(block)


def ragged(values: Sequence[object]) -> np.ndarray:
    """Make an object array [rows], even from lists of one length, which numpy would make a second axis of."""
    array = np.empty(len(values), dtype=object)
    for position, value in enumerate(values):
        array[position] = value
    return array


def trained_places(target_ids: Tensor) -> Tensor:
    """Return where `target_ids[batch, tokens]`, flattened, are not -100: int64 [trained]."""
    return (target_ids.flatten() != IGNORED).nonzero()[:, 0]


def mask(values: Sequence[Sized]) -> Tensor:
    import torch

    lengths = np.array([len(value) for value in values])
    return torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))


_CHARACTERS = 50_000
_CHARACTERS_PER_TOKEN = 20
PART_CHARACTERS = 1_000_000


def beginning(text: str, tokenizer: Tokenizer, max_length: int) -> str:
    """Cut a very long text at a space, well beyond `max_length` tokens, if that keeps its first tokens the same."""
    most = max(_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    if len(text) <= most or getattr(tokenizer, "truncation_side", "right") != "right":
        return text
    begins = text[: text.rfind(" ", 0, most)] if " " in text[1:most] else text[:most]
    num_tokens = len(tokenizer(begins, return_attention_mask=False, verbose=False)["input_ids"])
    return begins if num_tokens > 2 * max_length else text


def tokenised(
    tokenizer: Tokenizer, texts: Sequence[Sequence[str] | Sequence[list[str]]], max_length: int, **options: bool
) -> tuple[BatchEncoding, list[str], list[bool]]:
    """Tokenise and cut texts, or pairs of two lists, the longer of a pair first; return also the names of the model's
    inputs and which texts were cut."""
    options |= {"return_attention_mask": False, "verbose": False}
    tokens = tokenizer(*texts, truncation=False, **options)  # to count which are too long
    is_cut = [len(ids) > max_length for ids in tokens["input_ids"]]
    if any(is_cut):
        tokens = tokenizer(*texts, truncation=True, max_length=max_length, **options)
    return tokens, [name for name in tokenizer.model_input_names if name in tokens], is_cut


def token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenise a whole text, in parts if it has millions of characters and parts give the same tokens."""
    seam = _seam(tokenizer) if len(text) > PART_CHARACTERS else None
    if seam is not None and (parts := _parts(text, seam)) is not None:
        ids, closing = _specials(tokenizer)
        for part in parts:
            ids += _plain(part, tokenizer)
        return ids + closing
    return list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])


def _parts(text: str, seam: str) -> list[str] | None:
    """Cut a text before single spaces, without `seam` at each cut, or return None if spaces are too rare."""
    parts, start = list[str](), 0
    while len(text) - start > PART_CHARACTERS:
        end = start + PART_CHARACTERS
        space = text.rfind(" ", start + 1, end)
        # Several spaces could be one token.
        while space > 0 and (text[space - 1].isspace() or text[space + 1 : space + 2].isspace()):
            space = text.rfind(" ", start + 1, space)
        if space < 0 and seam:
            return None
        end = space if space > 0 else end
        parts.append(text[start:end])
        start = end + len(seam)
    return [*parts, text[start:]]


def _plain(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def _seam(tokenizer: Tokenizer) -> str | None:
    """Return what to leave out at a cut before a space: nothing, or the space; None if both change the tokens."""
    together = _plain("of the rain", tokenizer)
    for seam in ("", " "):
        if together == _plain("of", tokenizer) + _plain(" the rain"[len(seam) :], tokenizer):
            return seam
    return None


def _specials(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    whole, plain = list(tokenizer("of", verbose=False)["input_ids"]), _plain("of", tokenizer)
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]
