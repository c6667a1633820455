"""Find, check, load and look at a pretrained model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, a model is in evaluation mode; then in the one it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
