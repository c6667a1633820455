"""What the data stage made: three splits, their counts, a few rows as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from fulltune.recipe.tasks import FORMS, Form, ProblemType
from fulltune.records.base import Record


class Segment(Record):
    """A piece of a decoded row: tokens that are trained, or tokens that are only read."""

    text: str
    trained: bool


class Preview(Record):
    """A row as the model sees it, decoded from its tokens."""

    segments: tuple[Segment, ...]
    label: str | None = None
    """The target in words, for tasks whose target is not text."""

    @classmethod
    def labelled(cls, text: str, label: str) -> Preview:
        """A text of which nothing is trained itself, and its label."""
        return cls(segments=(Segment(text=text, trained=False),), label=label)


SplitName = Literal["train", "eval", "test"]


class SplitSummary(Record):
    """Counts of one split (train, eval or test) after checking."""

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
    """A source whose rows are mixed into the train rows of each epoch, and never scored on."""

    where: str
    """The file's name, or the first of several."""
    weight: float
    """Share of an epoch's rows that the recipe asks for."""
    rows_per_epoch: int
    kind: str
    """Its rows in words: those of causal-lm may have another form than the task's."""
    counts: SplitSummary
    previews: tuple[Preview, ...] = ()

    @property
    def tokens_per_epoch(self) -> float:
        """On average: other rows are drawn in each epoch."""
        return self.rows_per_epoch * self.counts.tokens / max(1, self.counts.rows)

    def times_read(self, epochs: float) -> float:
        """How often each row is read, on average."""
        return epochs * self.rows_per_epoch / max(1, self.counts.rows)


class DataSummary(Record):
    """What the data stage made: three splits that never mix, and what is mixed into the train rows."""

    task: str
    problem_type: ProblemType
    columns: dict[str, str]
    """Role (`text`, `label`, `prompt` ...) to column name in the user's files."""
    labels: tuple[str, ...] = ()
    """Class names; position = class id. Empty for regression and text generation."""
    joint: str = ""
    """Text put between prompt and completion (causal-lm), or before each source (seq2seq)."""
    num_choices: int = 0
    packed: bool = False
    """Several short texts share a row, kept apart by their position ids."""
    max_length: int
    max_length_reason: str
    limit: int = 0
    """Longest row that could have been kept, in tokens: `max_length` is less when all rows are shorter."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the train rows' numbers; None: the target is no number."""
    length_explained: float = 0.0
    """Share of the variance of the train rows' length that the target explains, 0 to 1."""
    splits: dict[SplitName, SplitSummary]
    sources: dict[SplitName, str]
    """Split to where its rows came from, in words."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Reason to number of rows left out; the rows are in `data/dropped.jsonl`."""
    notes: tuple[str, ...] = ()
    test_in_eval: float = 0.0
    """Share of the test rows whose text, or prompt, also stands in eval."""
    previews: tuple[Preview, ...] = ()
    mixed: tuple[MixedSummary, ...] = ()
    """What is mixed into the train rows, in the order of the recipe; `splits` has the task's rows alone."""
    fingerprint: str
    """Hash of the files' content and of every setting that shapes the rows."""

    @classmethod
    def of_run(cls, folder: Path) -> Self:
        """What the data stage left in a run folder. Raises `SetupError` when it cannot be read."""
        return cls.load(folder / "data" / "summary.json")

    @property
    def form(self) -> Form:
        """What holds for rows of this problem type."""
        return FORMS[self.problem_type]

    @property
    def rows_per_epoch(self) -> int:
        """The task's train rows, and what is mixed into them."""
        return self.splits["train"].rows + sum(source.rows_per_epoch for source in self.mixed)

    @property
    def tokens_per_epoch(self) -> float:
        """Of all these rows."""
        return self.splits["train"].tokens + sum(source.tokens_per_epoch for source in self.mixed)
