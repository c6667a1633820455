"""Records of the prepared rows: splits, counts and previews."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from fulltune.recipe.tasks import FORMS, Form, ProblemType
from fulltune.records.base import Record


class Segment(Record):
    """A piece of a decoded row."""

    text: str
    trained: bool


class Preview(Record):
    """A row as the model sees it, decoded from its tokens."""

    segments: tuple[Segment, ...]
    label: str | None = None
    """Target in words, if it is not text."""

    @classmethod
    def labelled(cls, text: str, label: str) -> Preview:
        return cls(segments=(Segment(text=text, trained=False),), label=label)


SplitName = Literal["train", "eval", "test"]


class SplitSummary(Record):
    """Counts of a split."""

    rows: int
    tokens: int
    trained_tokens: int
    """Tokens with a loss; rows for classifiers."""
    truncated_rows: int
    dropped_rows: int
    length_percentiles: dict[str, int]
    """Tokens per row: keys `p50`, `p95`, `max`."""
    label_counts: dict[str, int] = Field(default_factory=dict)


class MixedSummary(Record):
    """A source mixed into the train rows and never scored."""

    where: str
    """Name of the (first) file."""
    weight: float
    rows_per_epoch: int
    kind: str
    """Kind of its rows, which may differ from the task's."""
    counts: SplitSummary
    previews: tuple[Preview, ...] = ()

    @property
    def tokens_per_epoch(self) -> float:
        """Mean tokens drawn per epoch."""
        return self.rows_per_epoch * self.counts.tokens / max(1, self.counts.rows)

    def times_read(self, epochs: float) -> float:
        """Mean number of times that each row is read."""
        return epochs * self.rows_per_epoch / max(1, self.counts.rows)


class DataSummary(Record):
    """Summary of the prepared rows."""

    task: str
    problem_type: ProblemType
    columns: dict[str, str]
    """Column of each role (`text`, `label`, `prompt` ...)."""
    labels: tuple[str, ...] = ()
    """Class names by class id."""
    joint: str = ""
    """Text between prompt and completion (causal-lm), or before each source (seq2seq)."""
    num_choices: int = 0
    packed: bool = False
    """True if short texts share a row."""
    max_length: int
    max_length_reason: str
    limit: int = 0
    """Longest row that is not cut, in tokens."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the targets (regression)."""
    length_explained: float = 0.0
    """Share of the length's variance that the target explains."""
    splits: dict[SplitName, SplitSummary]
    sources: dict[SplitName, str]
    """Origin of each split in words."""
    dropped: dict[str, int] = Field(default_factory=dict)
    """Dropped rows by reason, listed in `data/dropped.jsonl`."""
    notes: tuple[str, ...] = ()
    test_share_in_eval: float = 0.0
    """Share of test rows that also occur in eval."""
    previews: tuple[Preview, ...] = ()
    mixed: tuple[MixedSummary, ...] = ()
    """Mixed-in sources, which `splits` does not count."""
    fingerprint: str
    """Hash of the files and of all settings that shape the rows."""

    @classmethod
    def of_run(cls, folder: Path) -> Self:
        """Load a run's summary; `SetupError` if that fails."""
        return cls.load(folder / "data" / "summary.json")

    @property
    def form(self) -> Form:
        return FORMS[self.problem_type]

    @property
    def rows_per_epoch(self) -> int:
        """Train rows of an epoch with mixed-in rows."""
        return self.splits["train"].rows + sum(source.rows_per_epoch for source in self.mixed)

    @property
    def tokens_per_epoch(self) -> float:
        """Mean train tokens of an epoch with mixed-in rows."""
        return self.splits["train"].tokens + sum(source.tokens_per_epoch for source in self.mixed)
