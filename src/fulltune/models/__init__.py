"""Pretrained models: finding, checking and loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the context, and back into its own after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
