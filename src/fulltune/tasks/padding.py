from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.tasks import LENGTH, Example, RowExamples, RowFeatures, Target, Task, Tensor, Tokenizer

if TYPE_CHECKING:
    from transformers import BatchEncoding

IGNORED = -100
"""Label of tokens that are not trained, the `ignore_index` of PyTorch's losses."""
TRAINED = "trained_positions"
"""Key of a batch's `trained_positions`, computed before the batch moves to a device."""
TEXT_LENGTHS = "text_lengths"
"""Feature of a row of several texts: each text's number of tokens; `input_ids` holds the texts one after another."""
LENGTHS = "row_lengths"
"""Key of the lengths of a packed batch's rows, from which rows and tokens are counted."""


def pad_features(
    features: Sequence[RowFeatures],
    pad_token_id: int,
    omit: Collection[str] = (),
    *,
    label_per_token: bool = False,
) -> dict[str, Tensor]:
    """Pad features (except those in `omit`) to `input_ids[batch, tokens]`, `attention_mask`, `labels` and others.
    Labels are stacked, or padded if `label_per_token` is set."""
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    skipped = {LENGTH, "attention_mask", *omit, *(() if label_per_token else ("labels",))}
    batch = {
        name: pad_right([row[name] for row in features], fills.get(name, 0))
        for name in features[0]
        if name not in skipped
    }
    batch["attention_mask"] = make_attention_mask([row["input_ids"] for row in features])
    return batch if label_per_token else batch | {"labels": stack_labels(features)}


def join_texts(tokens: Mapping[str, Sequence[Sequence[int] | np.ndarray]]) -> dict[str, Any]:
    """Join the tokens of a row's texts, by name, to one row's features."""
    lengths = [len(ids) for ids in tokens["input_ids"]]
    joined = {name: [token for ids in texts for token in ids] for name, texts in tokens.items()}
    return {**joined, TEXT_LENGTHS: lengths, LENGTH: max(lengths) * len(lengths)}  # padded to the longest


def join_rows(
    tokens: Mapping[str, Sequence[Sequence[int]]],
    is_cut: Sequence[bool],
    counts: Iterable[int],
    labels: Iterable[object],
) -> RowExamples:
    """Join the tokenised texts of each row, of which there are `counts`, to an example with the row's label."""
    rows, end = RowExamples(), 0
    for count, label in zip(counts, labels, strict=True):
        span, end = slice(end, end + count), end + count
        features = join_texts({name: texts[span] for name, texts in tokens.items()})
        cut, longest = any(is_cut[span]), max(features[TEXT_LENGTHS])
        rows.append([Example({**features, "labels": label}, trained_tokens=1, truncated=cut, longest=longest)])
    return rows


def encode_apart(
    texts: Sequence[Sequence[str]], labels: Iterable[object], tokenizer: Tokenizer, max_length: int
) -> RowExamples:
    """Tokenise each text of each row by itself, truncated to `max_length`."""
    flat = [cut_long_text(text, tokenizer, max_length) for row in texts for text in row]
    tokens, names, is_cut = tokenise_and_cut(tokenizer, [flat], max_length)
    names = [name for name in names if name == "input_ids" or any(map(any, tokens[name]))]  # token types are all 0
    empty = {name: [0] for name in names} | {"input_ids": [tokenizer.pad_token_id]}
    # Some tokenizers make no tokens of an empty text.
    filled = {name: [part or empty[name] for part in tokens[name]] for name in names}
    return join_rows(filled, is_cut, map(len, texts), labels)


def texts_per_row(task: Task, target: Target) -> int:
    """Return how many texts of a train row the model reads apart."""
    return len(task.full_row(target, 1).get(TEXT_LENGTHS, (1,)))


def split_texts(features: RowFeatures, name: str = "input_ids") -> list[np.ndarray]:
    """Return the token ids, or another feature of tokens, of each of a row's texts."""
    return np.split(np.asarray(features[name]), np.cumsum(features[TEXT_LENGTHS])[:-1])


def pad_texts(features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
    """Pad the texts of all rows, equally many in each, to one length: [batch, texts, tokens]; stack the labels."""
    import torch

    lengths = np.array([row[TEXT_LENGTHS] for row in features])
    shown = np.arange(lengths.max()) < lengths[:, :, None]
    batch = {"attention_mask": torch.from_numpy(shown.astype(np.int64))}
    for name in features[0]:
        if name not in (TEXT_LENGTHS, LENGTH, "labels"):
            block = np.full(shown.shape, pad_token_id if name == "input_ids" else 0, np.int64)
            block[shown] = np.concatenate([row[name] for row in features])
            batch[name] = torch.from_numpy(block)
    return batch | {"labels": stack_labels(features)}


def stack_labels(features: Sequence[RowFeatures]) -> Tensor:
    """Stack the rows' labels: class ids (int64), numbers or vectors (float32), [batch] or [batch, n]."""
    import torch

    values = np.array([row["labels"] for row in features])
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))


def pad_right(values: Sequence[Sequence[int] | np.ndarray], fill: int) -> Tensor:
    """Pad lists on the right with `fill` to equal length: int64 [rows, tokens]."""
    import torch

    block = np.full((len(values), max(len(value) for value in values)), fill, np.int64)
    for row, value in zip(block, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(block)


def object_array(values: Sequence[object]) -> np.ndarray:
    """Make an object array [rows], even from equally long lists, which numpy would make two-dimensional."""
    return np.fromiter(values, dtype=object, count=len(values))


def trained_positions(target_ids: Tensor) -> Tensor:
    """Return the flat positions where `target_ids[batch, tokens]` are not -100: int64 [trained]."""
    return (target_ids.flatten() != IGNORED).nonzero()[:, 0]


def make_attention_mask(values: Sequence[Sized]) -> Tensor:
    """Make an int64 attention mask [rows, tokens] for lists padded on the right."""
    import torch

    lengths = np.array([len(value) for value in values])
    return torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))


_CHARACTERS = 50_000
_CHARACTERS_PER_TOKEN = 20


def cut_long_text(text: str, tokenizer: Tokenizer, max_length: int) -> str:
    """Cut a very long text well beyond `max_length` tokens to save time. The first tokens stay the same."""
    most = max(_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    if len(text) <= most or getattr(tokenizer, "truncation_side", "right") != "right":
        return text
    begins = text[: text.rfind(" ", 0, most)] if " " in text[1:most] else text[:most]
    num_tokens = len(tokenizer(begins, return_attention_mask=False, verbose=False)["input_ids"])
    return begins if num_tokens > 2 * max_length else text


def tokenise_and_cut(
    tokenizer: Tokenizer, texts: Sequence[Sequence[str] | Sequence[list[str]]], max_length: int, **options: bool
) -> tuple[BatchEncoding, list[str], list[bool]]:
    """Return the tokenised texts (or pairs from two lists), the model's input names, and whether each text was cut."""
    options |= {"return_attention_mask": False, "verbose": False}
    tokens = tokenizer(*texts, truncation=False, **options)  # to count which are too long
    is_cut = [len(ids) > max_length for ids in tokens["input_ids"]]
    if any(is_cut):
        tokens = tokenizer(*texts, truncation=True, max_length=max_length, **options)
    return tokens, [name for name in tokenizer.model_input_names if name in tokens], is_cut
