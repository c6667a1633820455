"""The recipe's blocks `evaluate` and `compare`: how the result is measured, and methods compared."""

from __future__ import annotations

from pydantic import Field, model_validator

from fulltune.recipe.block import Block
from fulltune.text import parse_seconds


class EvaluateBlock(Block):
    """How the result is measured, on rows that were never used for choosing."""

    metric: str | None = None
    """The metric that chooses the weights to keep and heads the report. Left out: accuracy, f1_micro (multi_label),
    spearman (regression), f1 (entities, answers in a context) or loss (causal-lm, seq2seq)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass. Left out: twice the micro batch. Halved when memory runs out; the scores stay the same."""
    baselines: bool = True
    """Also score what costs no training: the majority class and frozen embeddings, or the untouched language model."""
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Resamples of the test rows behind each interval; rows with the same text, prompt or passage, or nearly so,
    are drawn together."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    generate_rows: int = Field(default=100, ge=0)
    """Test rows for which answers are generated and compared (causal-lm, seq2seq), drawn at random with
    `data.split_seed` among those with different prompts; 0: none."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer, in tokens."""


class CompareBlock(Block):
    """How `fulltune compare` compares methods: on the same rows, each at its best rate, over several seeds."""

    margin: float = Field(default=0.01, gt=0, lt=1)
    """Differences of the metric below this one do not matter to you."""
    seeds: int | None = Field(default=None, ge=1)
    """Seeds of each method at most; fewer where the answer is clear. Left out: 3, below 10,000 train rows 5."""
    sequential: bool = True
    """After each seed, ask the eval rows which methods need another one. False: all seeds for every method."""
    search_share: float = Field(default=0.06, gt=0, le=1)
    """Share of a run's steps that each rate gets in the rate search, at least 10 steps; methods that go on to a second
    seed get whole runs with the best two, and with more while that helps."""
    budget: str | None = None
    """Most time that all commands on the comparison may take together, such as `30m` or `2h`. It says beforehand what
    fits; with more time later (`--budget`) an undecided comparison goes on."""
    near_duplicates: float = Field(default=0.8, gt=0, le=1)
    """Rows whose texts share so much of their 5-grams (Jaccard) stay on one side of the split. 1: only equal
    ones."""

    @model_validator(mode="after")
    def _budget_must_be_a_time(self) -> CompareBlock:
        if self.budget is not None:
            try:
                parse_seconds(self.budget)
            except ValueError as error:
                raise ValueError(f"budget: {error}") from None
        return self
