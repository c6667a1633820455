"""R-Drop (Liang et al. 2021, arXiv 2106.14448): a row that is answered twice under dropout is to be answered alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def disagreement(logits: torch.Tensor) -> torch.Tensor:
    """How far two answers to the same rows differ, summed over the rows of both: a scalar, 0 where they are equal.

    Of a row it is half of the paper's bidirectional divergence, (KL(p, q) + KL(q, p)) / 2, for each of its two answers
    once, because a loss of both rows is divided by the number of both.

    Args:
        logits: `logits[2 * rows, classes]`, the first half and the second of the same rows in the same order.

    Example:
        >>> float(disagreement(torch.tensor([[1.0, 2.0], [1.0, 2.0]])))
        0.0
    """
    one, other = F.log_softmax(logits.float(), dim=-1).chunk(2)
    return ((one.exp() - other.exp()) * (one - other)).sum() / 2


def has_dropout(model: Any) -> bool:
    """Whether anything is left out at random while the model trains."""
    rates = (getattr(module, "p", None) for module in model.modules())
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
