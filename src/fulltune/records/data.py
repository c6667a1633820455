"""Records of the data stage: three splits, their counts, and a few rows as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from fulltune.recipe.tasks import FORMS, Form, ProblemType
from fulltune.records.base import Record


class Segment(Record):
    """A piece of a decoded row, trained on or only read."""

    text: str
    trained: bool


class Preview(Record):
    """A row as the model sees it, decoded from its tokens."""

    segments: tuple[Segment, ...]
    label: str | None = None
    """Target in words, for tasks whose target is not text."""

    @classmethod
    def labelled(cls, text: str, label: str) -> Preview:
        """Preview a labelled text."""
        return cls(segments=(Segment(text=text, trained=False),), label=label)


SplitName = Literal["train", "eval", "test"]


class SplitSummary(Record):
    """Counts of one split after checking."""

    rows: int
    tokens: int
    trained_tokens: int
    """Tokens that carry a loss; for classifiers, rows."""
    truncated_rows: int
    dropped_rows: int
    length_percentiles: dict[str, int]
    """Tokens per row: keys `p50`, `p95`, `max`."""
    label_counts: dict[str, int] = Field(default_factory=dict)


class MixedSummary(Record):
    """A source whose rows are mixed into the train rows of each epoch and never scored."""

    where: str
    """Name of the file, or of the first of several."""
    weight: float
    """Share of an epoch's rows that the recipe asks for."""
    rows_per_epoch: int
    kind: str
    """Kind of its rows in words; causal-lm may mix in another kind than the task's."""
    counts: SplitSummary
    previews: tuple[Preview, ...] = ()

    @property
    def tokens_per_epoch(self) -> float:
        """Mean tokens per epoch; each epoch draws other rows."""
        return self.rows_per_epoch * self.counts.tokens / max(1, self.counts.rows)

    def times_read(self, epochs: float) -> float:
        """Mean number of times that each row is read in `epochs` epochs."""
        return epochs * self.rows_per_epoch / max(1, self.counts.rows)


class DataSummary(Record):
    """Summary of the prepared rows: three disjoint splits, and sources mixed into the train rows."""

    task: str
    problem_type: ProblemType
    columns: dict[str, str]
    """Column in the user's files for each role (`text`, `label`, `prompt` ...)."""
    labels: tuple[str, ...] = ()
    """Class names by class id; empty for regression and text generation."""
    joint: str = ""
    """Text between prompt and completion (causal-lm), or before each source (seq2seq)."""
    num_choices: int = 0
    packed: bool = False
    """True if short texts share a row, separated by their position ids."""
    max_length: int
    max_length_reason: str
    limit: int = 0
    """Longest row that would not be cut, in tokens; `max_length` is less if all rows are shorter."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the train rows' numbers, for regression."""
    length_explained: float = 0.0
    """Share of the variance of the train rows' length that the target explains, 0 to 1."""
    splits: dict[SplitName, SplitSummary]
    sources: dict[SplitName, str]
    """Origin of each split's rows, in words."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Number of dropped rows by reason; the rows are in `data/dropped.jsonl`."""
    notes: tuple[str, ...] = ()
    test_share_in_eval: float = 0.0
    """Share of test rows whose text or prompt also occurs in eval."""
    previews: tuple[Preview, ...] = ()
    mixed: tuple[MixedSummary, ...] = ()
    """Mixed-in sources in the recipe's order; `splits` counts the task's rows alone."""
    fingerprint: str
    """Hash of the files' content and of every setting that shapes the rows."""

    @classmethod
    def of_run(cls, folder: Path) -> Self:
        """Load the summary in a run folder; `SetupError` if it cannot be read."""
        return cls.load(folder / "data" / "summary.json")

    @property
    def form(self) -> Form:
        return FORMS[self.problem_type]

    @property
    def rows_per_epoch(self) -> int:
        """Train rows of an epoch, mixed-in rows included."""
        return self.splits["train"].rows + sum(source.rows_per_epoch for source in self.mixed)

    @property
    def tokens_per_epoch(self) -> float:
        """Mean train tokens of an epoch, mixed-in rows included."""
        return self.splits["train"].tokens + sum(source.tokens_per_epoch for source in self.mixed)
