"""The two texts of a pair, each read alone: what models of sentence embeddings compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.tasks import Target

if TYPE_CHECKING:
    import torch


def separators(tokenizer: Any, target: Target) -> frozenset[int]:
    """Numbers of the tokens that stand around the texts of a pair.

    Returns:
        Empty where rows are no pairs, and where these tokens do not tell the texts apart: a decoder's tokenizer may put
        nothing between two texts.
    """
    if "text_pair" not in target.columns:
        return frozenset()
    names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    found = frozenset(number for name in names if (number := getattr(tokenizer, name, None)) is not None)
    one, other = (half["input_ids"] for half in each_alone([{**tokenizer("a", "a"), "labels": 0}], found))
    return found if len(one) and np.array_equal(one, other) and not found.issuperset(one.tolist()) else frozenset()


def each_alone(rows: Sequence[Mapping[str, Any]], separators: frozenset[int]) -> list[dict[str, Any]]:
    """The first texts of all rows, then the second ones, each between the tokens that stood around the pair.

    Args:
        rows: Prepared pairs, with labels.
        separators: As `separators` gives them. In a row in which none stands between words the second text is empty.
    """
    firsts: list[dict[str, Any]] = []
    seconds: list[dict[str, Any]] = []
    for row in rows:
        ids = np.asarray(row["input_ids"])
        is_word = ~np.isin(ids, tuple(separators))
        begin, end = (int(is_word.argmax()), len(ids) - int(is_word[::-1].argmax())) if is_word.any() else (0, 0)
        inside = is_word[begin:end]
        border = begin + int(inside.argmin()) if not inside.all() else end
        second = border + int(is_word[border:end].argmax()) if border < end else end
        # Some models want as many of their last tokens in each row; without a border those of both texts stand there.
        after = ids[end:] if border < end else ids[-1:]
        for found, text in ((firsts, ids[begin:border]), (seconds, ids[second:end])):
            found.append({"input_ids": np.concatenate([ids[:begin], text, after]), "labels": row["labels"]})
    return [*firsts, *seconds]


def compared(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Difference and product of each dimension, and the cosine: [rows, 2 hidden + 1].

    Args:
        first: Means of length 1 of first texts, [rows, hidden].
        second: Of second texts.
    """
    import torch

    product = first * second
    return torch.cat([(first - second).abs(), product, product.sum(dim=1, keepdim=True)], dim=1)
