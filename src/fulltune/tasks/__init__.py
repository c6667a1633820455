"""One file per task; each is a module with the functions of `Task`.

Layer 1: imports layer 0 only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fulltune.recipe import DataBlock, TaskName
from fulltune.records import Answer, Preview, ProblemType

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LENGTH = "length"
"""Feature with a row's number of tokens, for grouping; `collate` leaves it out."""
Row = Mapping[str, Any]
"""A row as read from the user's file: column name to value."""
Predictions = Mapping[str, np.ndarray]
"""What `reduce` gave for each row, joined over all batches: name to array whose first axis is the row."""


@dataclass(frozen=True)
class Target:
    """What the label column holds, found out from the train rows."""

    problem_type: ProblemType
    columns: Mapping[str, str]
    """Role to column name, for example `{"text": "sentence", "label": "intent"}`."""
    labels: tuple[str, ...] = ()
    joint: str = ""
    """Text put between prompt and completion when neither brings white space."""


@dataclass(frozen=True)
class Refused:
    """A row that is left out: which check, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    `features` holds lists of ints: `input_ids` [tokens], `attention_mask` [tokens], `labels` (class id, vector or
    [tokens] with -100 where nothing is trained) ...
    """

    features: Mapping[str, Any]
    trained_tokens: int
    truncated: bool = False
    refused: Refused | None = None
    """Set when tokenising showed that the row cannot be used."""


class Task(Protocol):
    """What a task module provides. Tensors are [batch, ...]; `labels` is padded with -100 where it has tokens."""

    @property
    def AUTO_CLASS(self) -> str:
        """The model class, by its name in transformers."""

    @property
    def HEAD_IS_NEW(self) -> bool:
        """True when the head is missing in the pretrained checkpoint and starts at random."""

    @property
    def LENGTH_CAP(self) -> int:
        """Upper bound of the default `max_length`, in tokens."""

    @property
    def METRICS(self) -> Mapping[str, bool]:
        """Metric name to whether greater is better."""

    def find_columns(
        self, columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str
    ) -> dict[str, str]:
        """Which column plays which role; raises `DataError` when a role has no column."""

    def find_target(self, rows: Sequence[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
        """Problem type and labels, from the train rows; raises `DataError` when nothing can be learned from them."""

    def refuse(self, row: Row, target: Target) -> Refused | None:
        """Why this row cannot be used, or None."""

    def group_key(self, row: Row, target: Target) -> str:
        """Rows with the same key are duplicates: a split never separates them."""

    def row_labels(self, row: Row, target: Target) -> list[str]:
        """The row's class names, sorted; splits keep their shares. Empty for tasks without classes."""

    def encode(
        self, rows: Sequence[Row], target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[list[Example]]:
        """Tokenise rows; a row can give several examples (a conversation whose template rewrites earlier turns)."""

    def preview(self, features: Mapping[str, Any], target: Target, tokenizer: PreTrainedTokenizerBase) -> Preview:
        """The row as the model sees it, decoded from its tokens."""

    def check_model(self, config: PretrainedConfig) -> str | None:
        """Why this kind of model cannot do the task, or None."""

    def config_changes(self, target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Values to set on the model's config."""

    def collate(self, features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
        """Pad a batch on the right: int64 `input_ids`, `attention_mask` [batch, length] and `labels`."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, target: Target, settings: LossSettings) -> torch.Tensor:
        """Loss of each item, summed: a scalar. The caller divides by the number of items."""

    def count_items(self, labels: torch.Tensor) -> int:
        """Number of items in that sum: rows, or trained tokens."""

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
        """What evaluation keeps of a batch: a few numbers per row, never the logits of every token."""

    def metrics(self, kept: Predictions, target: Target) -> dict[str, float]:
        """The task's metrics from what `reduce` kept."""

    def worst(self, kept: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
        """The rows that the model got most wrong."""


@dataclass(frozen=True)
class LossSettings:
    """What shapes the loss besides the model."""

    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None


def task_named(name: TaskName) -> Task:
    """The module of a task."""
    from fulltune.tasks import causal_lm, text_classification

    match name:
        case "text-classification":
            return text_classification
        case "causal-lm":
            return causal_lm


def default_metric(problem_type: str) -> str:
    """The metric that chooses and heads the report when the recipe names none."""
    return {"single_label": "accuracy", "multi_label": "f1_micro", "regression": "spearman"}.get(problem_type, "loss")
