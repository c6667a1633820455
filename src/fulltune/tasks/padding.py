"""From texts to tokens, where texts may be far longer than what a model reads, and from rows to tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fulltune.tasks import LENGTH, Tensor, Tokenizer

IGNORED = -100
"""Label of a token of which nothing is trained; PyTorch's losses have the same number for it."""
TRAINED = "trained_places"
"""Of a batch that is trained on, the places in the flattened batch whose logits are needed: int64 [trained]. Found on
the host: to find them on a device the host would wait for it."""


def collated(
    features: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    left_out: Collection[str] = (),
    *,
    label_per_token: bool = False,
) -> dict[str, Tensor]:
    """A batch: `input_ids[batch, tokens]`, `attention_mask[batch, tokens]`, `labels`, and the other lists of
    numbers."""
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    skipped = {LENGTH, "attention_mask", *left_out, *(() if label_per_token else ("labels",))}
    batch = {
        name: padded([row[name] for row in features], fills.get(name, 0)) for name in features[0] if name not in skipped
    }
    batch["attention_mask"] = mask([row["input_ids"] for row in features])
    return batch if label_per_token else batch | {"labels": stacked_labels(features)}


def stacked_labels(features: Sequence[Mapping[str, Any]]) -> Tensor:
    """Each row's class or numbers: int64 or float32 `labels[batch]`, or `labels[batch, n]`."""
    import torch

    values = np.array([row["labels"] for row in features])
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))


def padded(values: Sequence[Any], fill: int) -> Tensor:
    """Rows, filled up to the longest one: int64 [rows, tokens]."""
    import torch

    block = np.full((len(values), max(len(value) for value in values)), fill, np.int64)
    for row, value in zip(block, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(block)


def ragged(values: Sequence[Any]) -> np.ndarray:
    """One object a row, whatever it is: numpy would take lists of one length for a second axis."""
    array = np.empty(len(values), dtype=object)
    for position, value in enumerate(values):
        array[position] = value
    return array


def trained_places(wanted: Tensor) -> Tensor:
    """`TRAINED` of `wanted[batch, tokens]`, -100 where nothing is trained."""
    return (wanted.flatten() != IGNORED).nonzero()[:, 0]


def mask(values: Sequence[Any]) -> Tensor:
    """1 where a row has a token, 0 where it is padded: int64 [rows, tokens]."""
    import torch

    lengths = np.array([len(value) for value in values])
    return torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))


_CHARACTERS = 50_000
_CHARACTERS_PER_TOKEN = 20
PART_CHARACTERS = 1_000_000


def beginning(text: str, tokenizer: Tokenizer, max_length: int) -> str:
    """What of a text can be read in `max_length` tokens and more; the text itself, if it is not much longer.

    Words are tokenised apart from each other, so that those before a space stay what they are. A text whose beginning
    gives few tokens, or that is cut at its left side, is left as it is.
    """
    most = max(_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    if len(text) <= most or getattr(tokenizer, "truncation_side", "right") != "right":
        return text
    begins = text[: text.rfind(" ", 0, most)] if " " in text[1:most] else text[:most]
    num_tokens = len(tokenizer(begins, return_attention_mask=False, verbose=False)["input_ids"])
    return begins if num_tokens > 2 * max_length else text


def tokenised(
    tokenizer: Tokenizer, texts: Sequence[Sequence[Any]], max_length: int, **options: Any
) -> tuple[Any, list[str], list[bool]]:
    """Texts (or pairs of one from each list) as tokens, cut at `max_length` from the longer of a pair first; the names
    of what the model reads of them, but for the attention mask; and which were cut."""
    options |= {"return_attention_mask": False, "verbose": False}
    tokens = tokenizer(*texts, truncation=False, **options)  # only so can truncation be counted
    is_cut = [len(ids) > max_length for ids in tokens["input_ids"]]
    if any(is_cut):
        tokens = tokenizer(*texts, truncation=True, max_length=max_length, **options)
    return tokens, [name for name in tokenizer.model_input_names if name in tokens], is_cut


def token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a whole text, with special ones; of one with millions of characters part by part.

    Only where this tokenizer gives the same tokens to two words apart as it does together; else at once. In a word of a
    million letters, which no text has, a token may be another where it is cut.
    """
    seam = _seam(tokenizer) if len(text) > PART_CHARACTERS else None
    if seam is not None and (parts := _parts(text, seam)) is not None:
        ids, closing = _specials(tokenizer)
        for part in parts:
            ids += _plain(part, tokenizer)
        return ids + closing
    return list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])


def _parts(text: str, seam: str) -> list[str] | None:
    """A text cut before single spaces, `seam` left out at each cut; None: there is none for long."""
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
    wanted = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return list(tokenizer(text, **wanted)["input_ids"])


def _seam(tokenizer: Tokenizer) -> str | None:
    """What is left out where a text is cut before a space: nothing, or the space; None: neither gives the same."""
    together = _plain("of the rain", tokenizer)
    for seam in ("", " "):
        if together == _plain("of", tokenizer) + _plain(" the rain"[len(seam) :], tokenizer):
            return seam
    return None


def _specials(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before a text, and behind it."""
    whole, plain = list(tokenizer("of", verbose=False)["input_ids"]), _plain("of", tokenizer)
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]
