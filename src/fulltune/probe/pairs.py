"""The two texts of a pair, each read alone: what models of sentence embeddings compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.tasks import Target

if TYPE_CHECKING:
    import torch


def separators(tokenizer: Any, target: Target) -> frozenset[int]:
    """Numbers of the tokens that stand around the texts of a pair; empty where rows are no pairs."""
    if "text_pair" not in target.columns:
        return frozenset()
    names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    return frozenset(number for name in names if (number := getattr(tokenizer, name, None)) is not None)


def each_alone(rows: Sequence[Mapping[str, Any]], separators: frozenset[int]) -> list[dict[str, Any]] | None:
    """The first texts of all rows, then the second ones, each between the tokens that stood around the pair.

    Args:
        rows: Prepared pairs, with labels.
        separators: As `separators` gives them.

    Returns:
        None where a row shows no border: its model puts nothing between two texts, or one of them is empty.
    """
    firsts: list[dict[str, Any]] = []
    seconds: list[dict[str, Any]] = []
    for row in rows:
        ids = np.asarray(row["input_ids"])
        is_word = ~np.isin(ids, tuple(separators))
        words = np.flatnonzero(is_word)
        if not len(words) or is_word[words[0] : words[-1]].all():
            return None
        before, after = ids[: words[0]], ids[words[-1] + 1 :]
        border = words[0] + int(np.argmin(is_word[words[0] :]))
        second = border + int(np.argmax(is_word[border:]))
        for found, text in ((firsts, ids[words[0] : border]), (seconds, ids[second : words[-1] + 1])):
            found.append({"input_ids": np.concatenate([before, text, after]), "labels": row["labels"]})
    return [*firsts, *seconds]


def compared(means: torch.Tensor) -> torch.Tensor:
    """Distance and product in each direction and the cosine of two texts: [rows, 2 hidden + 1].

    Args:
        means: Of length 1, of all first texts, then of all second ones: [2 rows, hidden].
    """
    import torch

    first, second = means.chunk(2)
    product = first * second
    return torch.cat([(first - second).abs(), product, product.sum(dim=1, keepdim=True)], dim=1)
