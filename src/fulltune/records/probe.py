"""Records of linear classifiers on the pretrained model: the start of a new head, and a baseline without training."""

from __future__ import annotations

from typing import Literal

from fulltune.records.base import Record

Pooling = Literal["head", "mean", "pair"]
MOST_ROWS = 20_000
"""Most train rows used; more hardly change a linear classifier."""
MOST_FEATURE_BYTES = 2**28
"""Most bytes of features in memory."""
MOST_SOLVER_BYTES = 2**30
"""Most bytes of the solver's weights, history and logits."""
OTHER_TOKENS = 8
"""Random tokens of each window used besides those where the answer starts and ends."""
PAIRS = 5 / 3
"""Features of a pair relative to a single text: five vectors instead of three, as each text is also read alone."""
LEAST_HELD_OUT, MOST_HELD_OUT = 200, 2_000
"""Eval rows that select strength and features; with fewer, cross-validation on train rows does."""


def items_per_row(kind: str, words: float, num_choices: int) -> float:
    """Return the items of a row: itself, its words, its choices, or tokens of a window."""
    return {"tags": words, "choice": num_choices, "span": OTHER_TOKENS + 2}.get(kind, 1)


def rows_within(kind: str, per_row: float, width: int, most: int = MOST_ROWS) -> int:
    """Return how many rows fit into `MOST_FEATURE_BYTES`, with `per_row` items of `width` features."""
    kinds = 2 if kind == "tags" else 3  # a tagger's head has no dense layer
    return max(1, min(most, int(MOST_FEATURE_BYTES / (kinds * 4 * max(1, width) * per_row))))


def solver_bytes(kind: str, num_items: int, num_outputs: int, width: int) -> int:
    """Return the memory of L-BFGS: ten changes of all weights and gradients, and logits with their gradients, in 64
    bits."""
    logits = 2 * num_items if kind in ("single_label", "tags") else 0
    return 8 * num_outputs * (25 * width + logits)


class HeadStart(Record):
    """Start of a new head."""

    dense: Literal["loaded", "scaled", "mean"] | None
    """Dense layer before the last one: `loaded` as it is, `scaled` identity, or the `mean` over all tokens as a linear
    map. None if there is none."""
    strength: float
    """One of `fulltune.probe.linear.STRENGTHS`; larger is less regularised."""
    loss: float
    """Held-out loss: cross entropy in nats, or the unexplained share of the variance."""


class FrozenBaseline(Record):
    """The best simple classifier on frozen embeddings."""

    pooling: Pooling
    """`mean` over all tokens; `head`, the vector that the model's head reads; `pair`, features of a pair's texts, each
    read alone."""
    kind: Literal["logistic regression", "ridge regression", "nearest centroid"]
    loss: float
    """Held-out loss: share of errors; of numbers, of the variance; the cross entropy of several labels."""


class Probe(Record):
    """Linear classifiers fitted on the pretrained model."""

    head: HeadStart | None
    baseline: FrozenBaseline | None
    failure: str | None = None
    """Why no head or baseline was fitted, if so."""
    train_rows: int = 0
    """Train rows used, of `available_rows`."""
    available_rows: int = 0
    selected_on: Literal["eval rows", "cross-validation"] = "eval rows"
    """Rows that selected strength and features."""
    seconds: float = 0.0

    @property
    def in_words(self) -> str:
        """Describe the start of the head for a check's line."""
        if self.head is None:
            return f"drawn at random: {self.failure}"
        dense = {"loaded": "", "scaled": ", pooler scaled", "mean": ", pooler set to the mean of all tokens", None: ""}
        few = f"{self.train_rows:,} of " if self.train_rows < self.available_rows else ""
        rows = f"{few}{self.available_rows:,} train rows"
        return f"starts from a linear probe of the untouched model ({rows}{dense[self.head.dense]})"
