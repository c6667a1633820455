"""The recipe's blocks `evaluate`, `compare` and `search`: how results are measured, which settings are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from fulltune.recipe.model import Block
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


_OWN = ("budget", "trials", "settings")


class SearchBlock(Block):
    """Whole runs with other settings, the best by the eval rows: `search: {train.num_train_epochs: [2, 4, 8]}`."""

    budget: str | None = None
    """Most time that a search may take in all, such as `20m`; the run at the best settings is part of it."""
    trials: int = Field(default=12, ge=2)
    """Whole runs at most, besides one with the recipe's own settings. Where the values make no more combinations than
    that each is tried, else some that are drawn at random."""
    settings: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Settings of the blocks `method` and `train`, each with two or more values, written beside the other keys:
    `{train.num_train_epochs: [2, 4], method.layerwise_lr_decay: [0.9, 1.0]}`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, values: Any) -> Any:
        """Names with a dot, and blocks inside the block as `--set` makes them, become `settings`."""
        if not isinstance(values, dict):
            return values
        own = {name: value for name, value in values.items() if name in _OWN}
        more = {name: value for name, value in values.items() if name not in _OWN}
        found = {name: value for name, value in _flat(more) if "." in name}
        problems = [
            f"{name}: expected a list of values, found {value!r}; write [{value}, ...]"
            for name, value in found.items()
            if not isinstance(value, (list, tuple))
        ]
        if problems:
            raise ValueError("\n".join(problems))
        unknown = {name: value for name, value in more.items() if "." not in str(name) and not isinstance(value, dict)}
        if found and isinstance(own.get("settings", {}), dict):
            own["settings"] = {**own.get("settings", {}), **found}
        return {**own, **unknown}

    @model_validator(mode="after")
    def _must_be_usable(self) -> SearchBlock:
        problems = []
        if self.budget is not None:
            try:
                parse_seconds(self.budget)
            except ValueError as error:
                problems.append(f"budget: {error}")
        for name, values in self.settings.items():
            if not name.startswith(("method.", "train.")):
                problems.append(f"{name}: only settings of 'method' and 'train' can be searched")
            twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
            if twice is not None:
                problems.append(f"{name}: names {twice} twice")
            elif len(values) < 2:
                problems.append(f"{name}: expected two or more values, found {list(values)}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _flat(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
