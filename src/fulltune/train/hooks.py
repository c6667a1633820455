"""What a user can give from Python and no recipe can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hooks:
    """Functions of the user's own. With `compute_loss` or `class_weights` training runs in this process."""

    metrics: Callable[[Any, Any], Mapping[str, float]] | None = None
    """`metrics(predictions, references)`: further metrics of the test rows. Classifiers: arrays of class ids, 0/1 rows or
    numbers; language models: generated and expected answers (lists of str)."""
    preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """`preprocess(row)`: changes each row after reading."""
    compute_loss: Callable[..., Any] | None = None
    """`compute_loss(outputs, labels, num_items_in_batch)`: the loss to train with, as in `transformers.Trainer`. It must
    be divided by `num_items_in_batch`, the number of rows (or trained tokens) of the whole global batch."""
    class_weights: Mapping[str, float] | Sequence[float] | str | None = None
    """Weight of each class in the training loss: by name, in the order of the labels, or `"balanced"`."""

    @property
    def needs_this_process(self) -> bool:
        return self.compute_loss is not None or self.class_weights is not None
