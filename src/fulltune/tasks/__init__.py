from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import FORMS, Form, ProblemType, TaskFacts, TaskName
from fulltune.records.data import DataSummary, Preview

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    Tensor = torch.Tensor
    Tokenizer = PreTrainedTokenizerBase
else:  # torch and transformers are not imported only for types
    Tensor = Tokenizer = Any

LENGTH = "length"
"""A row's cost in tokens, by default the number of `input_ids`. The model ignores this feature."""
PLACE = "fulltune:place"
"""Key of a row's location (file and line), unique within a split."""
Row = Mapping[str, Any]
"""A row of the user's file: column name to value."""
RowFeatures = Mapping[str, Any]
"""A tokenised example: a dictionary from feature names to numbers, texts, or flat lists or arrays."""
RowAnswer = dict[str, Any]
Predictions = Mapping[str, np.ndarray]
"""Output of `Task.reduce_logits` for all rows: name to array [rows, ...]."""
RowTerms = Callable[[Predictions], np.ndarray]
"""Computes the terms that each row adds to a metric's sums: float64 [rows, k]."""
FromSums = Callable[[np.ndarray], np.ndarray]
"""Computes a metric from the sums of its terms over all rows: [..., k] to [...]."""


_IN_SUMMARY = ("problem_type", "columns", "labels", "joint", "num_choices", "train_on", "positive_label")


@dataclass(frozen=True)
class Target:
    """What the model learns to predict, derived from the train rows by `Task.find_target`."""

    problem_type: ProblemType
    columns: Mapping[str, str]
    """Role to column name, for example `{"text": "sentence", "label": "intent"}`."""
    labels: tuple[str, ...] = ()
    joint: str = ""
    """Text between prompt and completion, or a prefix of each seq2seq source."""
    num_choices: int = 0
    """Texts of a row of which one is right, or the number of grades of rows that are ranked."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's messages are trained."""
    positive_label: str | None = None
    """Class that metrics such as `f1` compare with the rest, or None."""
    decision: tuple[float, float] | None = None
    """Temperature and calibrated probability from which on `positive_label` is predicted; None: no such threshold."""
    stride: int | None = None
    """Overlap of a long context's windows in tokens; None means a third of a window."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the train rows' numeric labels, or None if unknown. The loss divides labels by the
    standard deviation."""
    logit_scale: tuple[float, float] = (0.0, 1.0)
    """`(shift, factor)`: `factor * logit + shift` is in the label's units. The default is kept unless the head was
    trained on standardised labels."""
    loss_rows: int = 0
    """Rows whose texts are each other's negatives in an evaluation's loss; 0 means the task's default."""

    @property
    def form(self) -> Form:
        return FORMS[self.problem_type]

    @property
    def positive(self) -> int:
        return self.labels.index(str(self.positive_label))

    @classmethod
    def of(cls, summary: DataSummary) -> Target:
        return cls(**{name: getattr(summary, name) for name in _IN_SUMMARY}, scale=summary.scale)

    def in_summary(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _IN_SUMMARY}

    def as_notes(self) -> dict[str, Any]:
        """Return the fields that a finished model's folder stores."""
        return {**self.in_summary(), "labels": list(self.labels), "stride": self.stride}

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Target:
        """Restore a target from the output of `as_notes`."""
        more = {name: notes[name] for name in (*_IN_SUMMARY[4:], "stride") if name in notes}
        if "threshold" in notes:
            more["decision"] = (notes.get("temperature", 1.0), notes["threshold"]["value"])
        return cls(notes["problem_type"], notes["columns"], tuple(notes["labels"]), notes["joint"], **more)


@dataclass(frozen=True)
class Refused:
    """The reason for dropping a row: the name of the failed check and a message."""

    check: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A tokenised row or window of a row."""

    features: RowFeatures
    """`input_ids` [tokens], `labels` (a class id, a vector, or [tokens] with -100 for untrained tokens) and the task's
    other features."""
    trained_tokens: int
    truncated: bool = False
    refused: Refused | None = None
    longest: int | None = None
    """Length of the longest sequence that the model reads, if it differs from the number of `input_ids`."""
    thinking: str | None = None
    """What becomes of the answers' thinking parts, or None if the row has none."""


RowExamples = list[list[Example]]


@dataclass(frozen=True)
class LossSettings:
    """Settings of the training loss. Evaluations use `PLAIN_LOSS`."""

    smoothing: float = 0.0
    class_weights: Sequence[float] | None = None


PLAIN_LOSS = LossSettings()


@dataclass(frozen=True)
class IncompleteRows:
    """The rows of a split, to be completed with texts of other rows of this split and of train."""

    features: Sequence[RowFeatures]
    own: Callable[[], Iterable[Row]]
    """Reads the rows in the user's columns."""
    train: Callable[[], Iterable[Row]]
    target: Target
    tokenizer: Tokenizer
    max_length: int
    where: str


class Task(Protocol):
    """Functions of a task module. A new task is a module `fulltune/tasks/<name>.py` and an entry in
    `fulltune/recipe/tasks.toml`."""

    @property
    def FACTS(self) -> TaskFacts:
        pass

    # ---- rows -----------------------------------------------------------------------------------------------------

    def find_columns(self, columns: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
        """Map each role, such as `text`, to a column: the one that the recipe sets, or else one with a usual name or
        with typical content in `sample`.

        Raises `DataError`, which names `file`, if a role has no column.
        """

    def find_target(self, rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
        """Derive the problem type and labels from the train rows, or raise `DataError` if nothing can be learned."""

    def why_unusable(self, row: Row, target: Target) -> Refused | None:
        """Return the reason to drop a row, or None."""

    def group_key(self, row: Row, target: Target) -> str:
        """Return a key shared by duplicates and by questions about one passage. Rows with the same key stay in one
        split."""

    def row_labels(self, row: Row, target: Target) -> list[str]:
        """Return the row's sorted class names, or an empty list for tasks without classes."""

    def encode(self, rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
        """Tokenise rows that `why_unusable` accepts, each to one example or several windows."""

    def preview(self, features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
        """Decode an example's tokens to text, as the model reads it."""

    def full_row(self, target: Target, length: int) -> RowFeatures:
        """Make dummy features of `length` tokens for tracing the model in a plan."""

    # ---- model ----------------------------------------------------------------------------------------------------

    def config_changes(self, target: Target, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return values to set on the model's config, such as `id2label`."""

    def collate(self, features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
        """Pad a batch on the right: int64 `input_ids[batch, tokens]`, `attention_mask[batch, tokens]` and `labels`.
        Omit features that the model does not read."""

    def loss(self, logits: Tensor, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS) -> Tensor:
        """Sum the losses of a batch's rows or trained tokens; the caller divides by `count_items`.

        Args:
            logits: [batch, ...], or of trained tokens only [trained, vocabulary].
            labels: The labels of `collate` [batch, ...], or the trained tokens' ids [trained].
        """

    def count_items(self, labels: Tensor) -> int:
        """Count the rows or trained tokens that `loss` sums over."""

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def reduce_logits(self, logits: Tensor, labels: Tensor, target: Target) -> Mapping[str, Tensor | np.ndarray]:
        """Reduce a batch's logits to the values per row that `metrics` needs: arrays [batch, ...] by name."""

    def metrics(self, predictions: Predictions, target: Target) -> dict[str, float]:
        """Compute the task's metrics from all rows' output of `reduce_logits`."""

    def metrics_from_sums(self, target: Target, metric: str) -> Mapping[str, tuple[RowTerms, FromSums]]:
        """Map each metric to two functions for resampling: one computes its row terms, the other its value from the
        summed terms."""

    # ---- prediction -----------------------------------------------------------------------------------------------

    def with_placeholder_answer(self, row: Row, target: Target) -> Row:
        """Fill in a placeholder for the unknown label or answer, so that `encode` accepts the row."""

    def why_unanswerable(self, row: Row, target: Target) -> Refused | None:
        """Return the reason why the model cannot answer a row, or None."""

    # ---- only tasks with a head on the features: answers come from the output of `reduce_logits` ------------------

    def answers(
        self,
        predictions: Predictions,
        rows: Sequence[Row],
        examples: RowExamples,
        target: Target,
        temperature: float,
    ) -> list[RowAnswer]:
        """Return one answer per row in the format that `fulltune predict` writes; `temperature` divides the logits."""

    def display_text(self, row: Row, target: Target) -> str:
        """Return a row's text on one line, for lists of mistakes."""

    def chance_loss(self, summary: DataSummary, class_weights: Sequence[float] | None) -> float:
        """Return the loss of a model that ignores its input."""

    # ---- only tasks whose rows take texts of others (`completes_rows`) ----------------------------------------------

    def row_texts(self, row: Row, target: Target) -> list[str]:
        """Return the query, its positive and negatives, or the only text. Mirrored pairs stay in one split."""

    def complete_rows(self, split: IncompleteRows) -> Iterator[RowFeatures] | None:
        """Yield the rows of a split with positives or negatives from other rows, or return None if none are missing."""

    def row_scores(self, predictions: Predictions, target: Target) -> Predictions:
        """Compute the metrics of each row, which depend on the other rows."""

    # ---- only tasks whose loss compares the rows of a global batch (`contrasts`) ------------------------------------

    def row_losses(self, vectors: Tensor, labels: Tensor, anchors: slice, sizes: Sequence[int]) -> Tensor:
        """Compute the losses [anchors] of some rows from the vectors [rows, texts, hidden] of all."""

    def choose_negatives(self, predictions: Predictions, count: int, device: str) -> tuple[np.ndarray, float]:
        """Choose the rows [rows, count] whose positives are hard negatives, and return the share of suspected ones."""

    def with_negatives(self, row: RowFeatures, others: Sequence[RowFeatures]) -> RowFeatures:
        """Join a row's texts with the positives of `others`."""

    # ---- only tasks whose model writes its answers ----------------------------------------------------------------

    def target_ids(self, labels: Tensor) -> Tensor:
        """Return the token that each logit should predict, or -100: int64 [batch, tokens]."""

    def prompt_text(self, row: Row, target: Target) -> str:
        """Return the prompt or source."""

    def answer_text(self, row: Row, target: Target) -> str:
        pass

    def generation_ids(
        self, row: Row, target: Target, tokenizer: Tokenizer, max_length: int | None = None
    ) -> list[int]:
        """Return the tokens from which generation starts. A seq2seq source is truncated to `max_length`."""

    def score_answers(self, answers: Sequence[str], expected: Sequence[str], chosen: str = "") -> dict[str, np.ndarray]:
        """Score generated answers against the expected ones: arrays [answers] by metric."""


def task_named(name: TaskName) -> Task:
    """Import and return a task's module."""
    module = import_module(f"fulltune.tasks.{name.replace('-', '_')}")
    return cast(Task, module)
