"""Rows of different length as one tensor, padded on the right; rows are numpy arrays or lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def padded(values: Sequence[Any], fill: int) -> torch.Tensor:
    """int64 [rows, longest row]."""
    import torch

    made = np.full((len(values), max(len(value) for value in values)), fill, np.int64)
    for row, value in zip(made, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(made)


def mask(values: Sequence[Any]) -> torch.Tensor:
    """1 where a row has a token, 0 where it is padded: int64 [rows, longest row]."""
    import torch

    lengths = np.array([len(value) for value in values])
    return torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
