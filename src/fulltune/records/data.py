from __future__ import annotations

from pathlib import Path
from typing import Literal, Self
from urllib.parse import unquote

from pydantic import Field

from fulltune.recipe.address import HUB, hub_place, is_address, scheme_of
from fulltune.recipe.tasks import FORMS, Form, ProblemType
from fulltune.records.base import Record


class Segment(Record):
    """Part of a decoded row, which contributes to the loss if `trained`."""

    text: str
    trained: bool


class Preview(Record):
    """A row as the model reads it, decoded from its tokens."""

    segments: tuple[Segment, ...]
    label: str | None = None

    @classmethod
    def labelled(cls, text: str, label: str) -> Preview:
        return cls(segments=(Segment(text=text, trained=False),), label=label)


SplitName = Literal["train", "eval", "test"]


class SplitSummary(Record):
    rows: int
    tokens: int
    trained_tokens: int
    """Number of tokens (for classifiers: rows) that contribute to the loss."""
    truncated_rows: int
    dropped_rows: int
    length_percentiles: dict[str, int]
    trained_p95: int = 0
    """95th percentile of a row's tokens that contribute to the loss, or 0 if unknown."""
    label_counts: dict[str, int] = Field(default_factory=dict)


class MixedSummary(Record):
    """A source of rows that are mixed into train and never scored."""

    where: str
    weight: float
    rows_per_epoch: int
    kind: str
    counts: SplitSummary
    previews: tuple[Preview, ...] = ()

    @property
    def tokens_per_epoch(self) -> float:
        return self.rows_per_epoch * self.counts.tokens / max(1, self.counts.rows)

    def times_read(self, epochs: float) -> float:
        return epochs * self.rows_per_epoch / max(1, self.counts.rows)


class RemoteSource(Record):
    """An address of data and the local copies of its files."""

    address: str
    revision: str = ""
    """Commit on the Hub, else a hash of the files' versions or contents."""
    files: tuple[str, ...] = ()
    """Paths of the local copies, or () before they are complete."""
    size: int = 0
    """Bytes of all files."""
    notes: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """Address and revision in words."""
        address = unquote(self.address) if is_address(self.address) else Path(self.address).name
        return f"{address}, revision {self.revision}"

    @property
    def hub_name(self) -> str | None:
        return hub_place(self.address)[0] if scheme_of(self.address) == HUB else None

    @property
    def is_complete(self) -> bool:
        files = [Path(file) for file in self.files if Path(file).exists()]
        return 0 < len(files) == len(self.files) and sum(file.stat().st_size for file in files) == self.size


SOURCES = "sources.json"


class RemoteSources(Record):
    """The remote sources of a run, whose revisions stay the same when the run resumes."""

    sources: tuple[RemoteSource, ...] = ()


class DataSummary(Record):
    task: str
    problem_type: ProblemType
    columns: dict[str, str]
    labels: tuple[str, ...] = ()
    joint: str = ""
    """Text between prompt and completion (causal-lm), or text before each source (seq2seq)."""
    num_choices: int = 0
    train_on: Literal["all", "last"] = "all"
    positive_label: str | None = None
    packed: bool = False
    max_length: int
    max_length_reason: str
    limit: int = 0
    """Maximum length of a row that is not truncated, in tokens."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of the targets (regression)."""
    length_explained: float = 0.0
    """Share of the length variance that the target explains."""
    splits: dict[SplitName, SplitSummary]
    sources: dict[SplitName, str]
    dropped: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    test_share_in_eval: float = 0.0
    previews: tuple[Preview, ...] = ()
    mixed: tuple[MixedSummary, ...] = ()
    fingerprint: str
    """Hash of the files and of all settings that affect the rows."""

    @classmethod
    def of_run(cls, folder: Path) -> Self:
        """Load the data summary of a run folder. Raise `SetupError` if that fails."""
        return cls.load(folder / "data" / "summary.json")

    @property
    def form(self) -> Form:
        return FORMS[self.problem_type]

    @property
    def rows_per_epoch(self) -> int:
        return self.splits["train"].rows + sum(source.rows_per_epoch for source in self.mixed)

    @property
    def tokens_per_epoch(self) -> float:
        return self.splits["train"].tokens + sum(source.tokens_per_epoch for source in self.mixed)
