"""What linear classifiers on the untouched model found: where a new head starts, and a rival that trains nothing."""

from __future__ import annotations

from typing import Literal

from fulltune.records.base import Record

Pooling = Literal["head", "mean", "apart"]
MOST_ROWS = 20_000
"""Train rows that are looked at; more change a linear classifier little."""
MOST_FEATURE_BYTES = 2**28
"""Of what is kept of all items that are looked at."""
MOST_SOLVER_BYTES = 2**30
"""Of what the solver keeps of weights and their changes, and of all items' logits."""
OTHER_TOKENS = 8
"""Of each window of a passage, drawn at random, beside those at which the answer begins and ends."""
PAIRS = 5 / 3
"""Times as much is kept of a pair, whose texts are read apart as well: five vectors, not three."""
LEAST_HELD_OUT, MOST_HELD_OUT = 200, 2_000
"""Eval rows that choose strength and features; with fewer, parts of train are held out in turn."""


def items_per_row(kind: str, words: float, num_choices: int) -> float:
    """What is looked at of a row: itself, its words (`words` on average), its choices, tokens of a window."""
    return {"tags": words, "choice": num_choices, "span": OTHER_TOKENS + 2}.get(kind, 1)


def rows_within(kind: str, per_row: float, width: int, most: int = MOST_ROWS) -> int:
    """Rows that may be looked at, `per_row` items of `width` values each."""
    kinds = 2 if kind == "tags" else 3  # a tagger's head has no dense layer
    return max(1, min(most, int(MOST_FEATURE_BYTES / (kinds * 4 * max(1, width) * per_row))))


def solver_bytes(kind: str, num_items: int, num_outputs: int, width: int) -> int:
    """L-BFGS keeps ten changes of all weights and of their gradients, in 64 bits; and logits with their gradients."""
    logits = 2 * num_items if kind in ("single_label", "tags") else 0
    return 8 * num_outputs * (25 * width + logits)


class HeadStart(Record):
    """What a new head starts from."""

    dense: Literal["kept", "scaled", "mean"] | None
    """What became of the dense layer before the last one. `kept`: as it was loaded, or drawn; `scaled`: the identity,
    each feature scaled; `mean`: it gives, as far as it can, the mean over all tokens. None: there is none."""
    strength: float
    """Of those in `fulltune.probe.linear.STRENGTHS`; the larger, the less regularised."""
    loss: float
    """On held-out rows: cross entropy in nats, of numbers the share of the variance that is left."""


class FrozenRival(Record):
    """The best simple classifier on pooled embeddings of the untouched model."""

    pooling: Pooling
    """`mean`: over all tokens (of a word, of a choice); `head`: what the model's class reads, such as its first
    token; `apart`: what `fulltune.probe.features.compared` makes of a pair's texts, each read alone."""
    kind: Literal["logistic regression", "ridge regression", "nearest centroid"]
    loss: float
    """On held-out rows: the share that it gets wrong; of numbers the share of the variance that is left."""


class Probe(Record):
    """What was fitted on the untouched model."""

    head: HeadStart | None
    frozen: FrozenRival | None
    why_not: str = ""
    train_rows: int = 0
    """Rows behind it; `of_rows` are there."""
    of_rows: int = 0
    held_out: Literal["eval rows", "cross-validation"] = "eval rows"
    """What chose strength and features."""
    seconds: float = 0.0

    @property
    def in_words(self) -> str:
        """What becomes of the head, for a check line."""
        if self.head is None:
            return f"drawn at random: {self.why_not}"
        dense = {"kept": "", "scaled": ", pooler scaled", "mean": ", pooler set to the mean of all tokens", None: ""}
        few = f"{self.train_rows:,} of " if self.train_rows < self.of_rows else ""
        rows = f"{few}{self.of_rows:,} train rows"
        return f"starts from a linear probe of the untouched model ({rows}{dense[self.head.dense]})"
