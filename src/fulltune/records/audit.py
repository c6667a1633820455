"""What an audit of the rows found: each suspicious row with its reason, and what a check found in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.data import SplitName

ISSUES, AUDIT = "issues.jsonl", "audit.json"
PROOFS, TRAINED_PROOFS = "proofs.json", "trained_proofs.json"
"""In a run's folder `data`."""
LOSSES = "losses.jsonl"
"""There, too: of each train and eval row a line with its place, its hash as in a patch, and its mean loss."""
HIGH_LOSS = "high loss"
"""The check whose rows are those of the highest loss; it claims nothing."""


class Remedy(Record):
    """What would be done with a row, or was decided."""

    action: Literal["keep", "drop", "replace", "undecided"]
    column: str | None = None
    """Where `value` is put, if something is replaced: a text, or a label."""
    value: Any = None


class RowDecision(Record):
    """What was decided about a row: a line of a patch file."""

    row: str
    """`row_id` of the whole row: the same wherever it stands; of the second equal one with `-2` behind it."""
    remedy: Remedy
    source: str = "train"
    """Whose file it stands in: a split's, or the train file that the split was taken off."""
    check: str = ""
    """What found the row."""
    place: str = ""
    """File and line, as in messages: for readers, like what follows."""
    text: str = ""
    """How it begins, secrets and personal data masked."""
    reason: str = ""
    proposed: Remedy | None = None

    @property
    def is_open(self) -> bool:
        """It was written down to be decided about: until then the row is as it was."""
        return self.remedy.action == "undecided"

    @property
    def key(self) -> tuple[str, str]:
        """What it is about."""
        return self.source, self.row


class RowIssue(RowDecision):
    """A row that a check found, as `data/issues.jsonl` lists it, with what could be done: never that it is kept.

    Nothing is done with it unless the user says so.
    """

    split: SplitName
    label: str | None = None
    score: float = 0.0
    """The higher, the surer: in this order the rows of a check are reviewed."""

    def decided(self, remedy: Remedy) -> RowDecision:
        """The line of a patch file."""
        return RowDecision(row=self.row, remedy=remedy, source=self.source, check=self.check, place=self.place)


class LabelErrors(Record):
    """How labels were judged, by linear classifiers on the untouched model, each row by one that did not see it.

    How good that is was measured on the same rows: some were given a wrong label on purpose.
    """

    judged_rows: int
    agree: float
    """Share of the labels that are the likeliest ones."""
    suspects: int
    doubtful: int
    """Further rows with another label that is clearly likelier; how often it is right, nothing tells."""
    planted: int
    """Rows that were given a wrong label on purpose, in all repetitions."""
    recall: float
    """Share of these that would be suspects."""
    precision: float
    """Share of the suspects whose label is wrong, as far as the planted ones tell."""
    wrong: float
    """Estimated number of judged rows with a wrong label."""


class Proof(Record):
    """What cleaning by one check does to the metric on the same eval rows."""

    check: str
    action: Literal["drop", "replace"]
    rows: int
    """Train rows that are dropped, or whose label or text is replaced."""
    before: float
    """The metric without the cleaning, on average."""
    difference: float
    """With it, less that."""
    low: float
    high: float
    """Interval over the eval rows; of trainings over seeds, too. Those of all steps hold together in 95 % of cases."""
    patch: str = ""
    """Of trainings: the file in the run folder that cleaned the rows."""


class Proofs(Record):
    """What cleaning would do, check by check: by linear classifiers on the untouched model, or by trainings."""

    fingerprint: str
    eval_rows: int
    times: int
    """Seeds of the trainings. Of classifiers how often other train rows were left out, the same with and without the
    cleaning."""
    proofs: tuple[Proof, ...]
    left_out: tuple[str, ...] = ()
    """Steps that were not tried: too few rows, or too many, or all of a label."""
    by: Literal["classifiers", "trainings"] = "classifiers"
    metric: str = "accuracy"
    greater_is_better: bool = True

    def verdict(self, one: Proof) -> Literal["helps", "hurts", "no difference found"]:
        """What its interval says."""
        if one.low <= 0 <= one.high:
            return "no difference found"
        return "helps" if (one.low > 0) == self.greater_is_better else "hurts"


class Audit(Record):
    """What was found in all rows."""

    fingerprint: str
    """Of the prepared rows."""
    version: str = ""
    """Of the checks, with the extras that were not installed."""
    rows: dict[SplitName, int]
    """Split to rows that were looked at."""
    checks: dict[str, int]
    """Those that found something, the one that found most first, with the number of rows."""
    examples: tuple[RowIssue, ...] = ()
    """Of each the surest ones."""
    clean: tuple[str, ...] = ()
    """Those that found nothing."""
    labels: LabelErrors | None = None
    languages: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Column to the code of a language to the rows in it, the most frequent first; short texts and code are in none."""
    not_run: dict[str, str] = Field(default_factory=dict)
    """Check to why it was not run, for example the extra that is missing."""
    seconds: float = 0.0

    def examples_of(self, check: str) -> list[RowIssue]:
        """The surest rows that a check found."""
        return [one for one in self.examples if one.check == check]


def proofs_of(folder: Path, audit: Audit) -> list[Proofs]:
    """What cleaning the rows of a run would do, by classifiers and by trainings: what was asked of these rows."""
    paths = (folder / "data" / name for name in (PROOFS, TRAINED_PROOFS))
    return [found for path in paths if path.exists() and (found := Proofs.load(path)).fingerprint == audit.fingerprint]
