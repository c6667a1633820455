from __future__ import annotations

from typing import Literal

from fulltune.records.base import Record

Pooling = Literal["head", "mean", "pair"]
MOST_ROWS = 20_000
MOST_FEATURE_BYTES = 2**28
MOST_SOLVER_BYTES = 2**30
OTHER_TOKENS = 8
"""Number of random tokens used from each window, besides the answer's first and last token."""
PAIRS, APART = 7 / 3, 4
"""Size of a pair's features relative to a single text's: seven vectors instead of three, because each text is also read
alone, which makes four vectors."""
LEAST_HELD_OUT, MOST_HELD_OUT = 200, 2_000
"""Minimum and maximum number of eval rows for selecting regularisation and features. With fewer, cross-validation
selects them."""


def items_per_row(form_name: str, words: float, num_choices: int) -> float:
    """Return the number of items per row: its words, its choices, a window's sampled tokens, or else 1."""
    return {"tags": words, "choice": num_choices, "span": OTHER_TOKENS + 2}.get(form_name, 1)


def max_probe_rows(form_name: str, num_items_per_row: float, width: int, max_rows: int = MOST_ROWS) -> int:
    """Return how many rows' features fit into `MOST_FEATURE_BYTES`, at most `max_rows`. `width` is the number of
    features per item."""
    kinds = 2 if form_name == "tags" else 3  # a tagger's head has no dense layer
    return max(1, min(max_rows, int(MOST_FEATURE_BYTES / (kinds * 4 * max(1, width) * num_items_per_row))))


def solver_bytes(form_name: str, num_items: int, num_outputs: int, width: int) -> int:
    """Return the memory in bytes that L-BFGS needs for `num_items` items of `width` features.

    The solver stores ten updates of all weights and gradients, and the logits with their gradients, in 64 bits.
    """
    logits = 2 * num_items if form_name in ("single_label", "tags") else 0
    return 8 * num_outputs * (25 * width + logits)


class HeadStart(Record):
    dense: Literal["loaded", "scaled", "mean"] | None
    """Dense layer before the last one: `loaded` from the checkpoint, a `scaled` identity, or a linear map to the `mean`
    over all tokens. None if there is no dense layer."""
    loss: float
    """Held-out loss: cross entropy in nats, or for numbers the unexplained share of the variance."""


class FrozenBaseline(Record):
    """The best simple classifier on embeddings of the frozen model."""

    pooling: Pooling
    """Embedding: the `mean` over all tokens, the vector that the model's `head` reads, or features of a `pair` whose
    texts are read separately."""
    kind: Literal["logistic regression", "ridge regression"]
    loss: float
    """Held-out loss: share of errors (classes), unexplained share of the variance (numbers), or cross entropy (several
    labels)."""


class Probe(Record):
    """The linear classifiers fitted on a pretrained model's features."""

    head: HeadStart | None
    baseline: FrozenBaseline | None
    failure: str | None = None
    train_rows: int = 0
    available_rows: int = 0
    seconds: float = 0.0

    @property
    def head_origin(self) -> str:
        """How the head was initialised, or why it was initialised at random."""
        if self.head is None:
            return f"randomly initialised: {self.failure}"
        dense = {"loaded": "", "scaled": ", pooler scaled", "mean": ", pooler set to the mean of all tokens", None: ""}
        few = f"{self.train_rows:,} of " if self.train_rows < self.available_rows else ""
        rows = f"{few}{self.available_rows:,} train rows"
        return f"starts from a linear probe of the pretrained model ({rows}{dense[self.head.dense]})"
