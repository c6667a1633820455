"""One module per task, with the functions of `Task`; what is known without torch stands in `fulltune.recipe.tasks`.

What several tasks share: `classes` (labels, numbers and choices), `written` (models that write),
`padding` (rows as tensors), `columns` (which column plays which role), `labels` (what a label column holds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import FORMS, Form, ProblemType, TaskFacts, TaskName
from fulltune.records.data import DataSummary, Preview

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    Tensor = torch.Tensor
    Tokenizer = PreTrainedTokenizerBase
else:  # neither framework is imported for the sake of its types
    Tensor = Tokenizer = Any

LENGTH = "length"
"""Feature with a row's number of tokens, for grouping; `collate` leaves it out."""
PLACE = "fulltune:place"
"""Key of a row's file and line among the user's own columns; the same for no two rows of a split."""
Row = Mapping[str, Any]
"""A row as read from the user's file: column name to value."""
Predictions = Mapping[str, np.ndarray]
"""What `reduce` gave for each row, joined over all batches: name to array whose first axis is the row."""
Count = Callable[[Predictions], np.ndarray]
"""From what `reduce` kept to what each row contributes to a metric: float64 [rows, k]."""
Value = Callable[[np.ndarray], np.ndarray]
"""From the sums of these, [..., k], to the metric [...]."""


_IN_SUMMARY = ("problem_type", "columns", "labels", "joint", "num_choices")


@dataclass(frozen=True)
class Target:
    """What the label column holds, found out from the train rows."""

    problem_type: ProblemType
    columns: Mapping[str, str]
    """Role to column name, for example `{"text": "sentence", "label": "intent"}`."""
    labels: tuple[str, ...] = ()
    joint: str = ""
    """Text put between prompt and completion when neither brings white space; for seq2seq before each source."""
    num_choices: int = 0
    """Choices of each row (multiple-choice)."""
    stride: int | None = None
    """Tokens by which the windows of a long context overlap; None: a third of a window. Only tokenising asks."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the train rows' numbers: losses are in units of the latter. None: not known."""
    logit_scale: tuple[float, float] = (0.0, 1.0)
    """Shift and factor that make the number of a logit, `factor * logit + shift`: others than these while a model is
    trained whose head is not yet in the user's units (`train/worker/loading.py`)."""

    @property
    def form(self) -> Form:
        """What holds for rows of this problem type."""
        return FORMS[self.problem_type]

    @classmethod
    def of(cls, summary: DataSummary) -> Target:
        """The target of prepared data."""
        return cls(**{name: getattr(summary, name) for name in _IN_SUMMARY}, scale=summary.scale)

    def in_summary(self) -> dict[str, Any]:
        """The fields of a summary of prepared data that it decides."""
        return {name: getattr(self, name) for name in _IN_SUMMARY}

    def as_notes(self) -> dict[str, Any]:
        """What a finished model's folder says of it, ready for JSON."""
        return {**self.in_summary(), "labels": list(self.labels), "stride": self.stride}

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Target:
        """What `as_notes` gave; folders of earlier versions lack some of it."""
        more = {name: notes[name] for name in ("num_choices", "stride") if name in notes}
        return cls(notes["problem_type"], notes["columns"], tuple(notes["labels"]), notes["joint"], **more)


@dataclass(frozen=True)
class Refused:
    """A row that is dropped: which check, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    `features` holds numbers, texts, or flat lists of numbers, of the same kind in every row: `input_ids` [tokens],
    `labels` (class id, vector or [tokens] with -100 where nothing is trained) ... No attention mask: `collate` knows
    the lengths. A row whose cost is not the length of `input_ids` says so by a feature `length`.
    """

    features: Mapping[str, Any]
    trained_tokens: int
    truncated: bool = False
    refused: Refused | None = None
    """Set when tokenising showed that the row cannot be used."""
    longest: int | None = None
    """Longest sequence that the model reads, in tokens, where that is not the length of `input_ids`."""


Encoded = list[list[Example]]
"""The examples of each row."""


class Task(Protocol):
    """What a task module provides. Tokens' labels are padded with -100."""

    @property
    def FACTS(self) -> TaskFacts:
        """What is known of the task without torch."""

    def find_columns(
        self, columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str
    ) -> dict[str, str]:
        """Which column plays which role; raises `DataError` when a role has no column."""

    def find_target(self, rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
        """Problem type and labels; raises `DataError` when nothing can be learned from the rows.

        All train rows pass by once, to their end, and must not be kept: there may be millions.
        """

    def refuse(self, row: Row, target: Target) -> Refused | None:
        """Why this row cannot be used, or None."""

    def group_key(self, row: Row, target: Target) -> str:
        """Rows with the same key are duplicates, or questions about one passage: a split never separates them."""

    def row_labels(self, row: Row, target: Target) -> list[str]:
        """The row's class names, sorted; splits keep their shares. Empty for tasks without classes."""

    def encode(self, rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise rows; a row can give several examples (a conversation whose template rewrites earlier turns)."""

    def preview(self, features: Mapping[str, Any], target: Target, tokenizer: Tokenizer) -> Preview:
        """The row as the model sees it, decoded from its tokens."""

    def config_changes(self, target: Target, tokenizer: Tokenizer) -> dict[str, Any]:
        """Values to set on the model's config."""

    def collate(self, features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
        """Pad a batch on the right: int64 `input_ids[batch, tokens]`, `attention_mask[batch, tokens]` and `labels`.

        Each feature is a number, a text, or a one-dimensional array or list. Features that the model does not read
        (`length` among them) are left out.
        """

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Target,
        smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> Tensor:
        """Loss of each item, with smoothed labels and weighed classes, summed: a scalar. The caller divides by the
        number of items.

        `logits[batch, ...]` is what `fulltune.inference.run.logits_of` gives: the model's `logits`, or for spans start
        and end side by side, `logits[batch, tokens, 2]`. `labels[batch, ...]` is what `collate` made; for models that
        write it may be what `wanted` gives for the trained tokens alone, `labels[trained]`, with as many logits.
        """

    def count_items(self, labels: Tensor) -> int:
        """Number of items in that sum: rows, or trained tokens."""

    def reduce(self, logits: Tensor, labels: Tensor, target: Target) -> Mapping[str, Tensor | np.ndarray]:
        """What evaluation keeps of a batch: a few values per row (tensors or arrays whose first axis is the row), never
        the logits of every token."""

    def metrics(self, kept: Predictions, target: Target) -> dict[str, float]:
        """The task's metrics from what `reduce` kept."""

    def sums(self, target: Target, metric: str) -> Mapping[str, tuple[Count, Value]]:
        """The metrics that are functions of sums over rows, which a bootstrap resamples by the thousand: what a row
        contributes, and what is made of the sums, with the same value as `metrics`."""

    def full_row(self, target: Target, length: int) -> Mapping[str, Any]:
        """The features of a row of so many tokens, without meaning: what a plan traces a model with."""

    def as_question(self, row: Row, target: Target) -> Row:
        """A row to be answered, with something in the place of what is not known: `encode` asks for it."""

    def refuse_question(self, row: Row, target: Target) -> Refused | None:
        """Why there can be no answer to such a row, as far as it shows that itself, or None."""

    # ---- only of tasks whose model puts a head on what it has read: answers come from what `reduce` keeps ----

    def answers(
        self, kept: Predictions, rows: Sequence[Row], encoded: Encoded, target: Target, temperature: float
    ) -> list[dict[str, Any]]:
        """What `predict` gives for each row."""

    def as_shown(self, row: Row, target: Target) -> str:
        """A row as one reads it in a list of mistakes."""

    def chance_loss(self, summary: DataSummary, weights: Sequence[float] | None) -> float:
        """The loss of guessing, in the units of `loss`; `weights` are those of the classes, in their order."""

    # ---- only of tasks whose model writes its answers ----

    def wanted(self, labels: Tensor) -> Tensor:
        """The token that each logit should give, -100 where nothing is trained, for `labels[batch, tokens]`:
        int64 [batch, tokens]."""

    def prompt_text(self, row: Row, target: Target) -> str:
        """What the model is asked."""

    def answer_text(self, row: Row, target: Target) -> str:
        """What it should answer."""

    def generation_ids(
        self, row: Row, target: Target, tokenizer: Tokenizer, max_length: int | None = None
    ) -> list[int]:
        """The tokens after which the model shall answer, or go on; a source is cut at `max_length`."""

    def score_answers(self, answers: Sequence[str], expected: Sequence[str]) -> dict[str, np.ndarray]:
        """Scores of generated answers, for `metrics`: name to array whose first axis is the answer."""


def task_named(name: TaskName) -> Task:
    """The module of a task, which has the task's name."""
    module = import_module(f"fulltune.tasks.{name.replace('-', '_')}")
    return cast(Task, module)
