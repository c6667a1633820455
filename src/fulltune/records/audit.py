from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.data import SplitName

ISSUES, AUDIT = "issues.jsonl", "audit.json"
PROOFS, TRAINED_PROOFS = "proofs.json", "trained_proofs.json"
LOSSES = "losses.jsonl"
"""File in `data` with the location, hash and mean loss of each train and eval row."""
HIGH_LOSS = "high loss"


class Remedy(Record):
    """A proposed or decided action on a row."""

    action: Literal["keep", "drop", "replace", "undecided"]
    column: str | None = None
    value: Any = None


class RowDecision(Record):
    """A decision about a row, stored as one line of a patch file."""

    row: str
    """Hash of the row (`row_id`), with the suffix `-2` for a second equal row."""
    remedy: Remedy
    source: str = "train"
    check: str = ""
    place: str = ""
    text: str = ""
    reason: str = ""
    proposed: Remedy | None = None

    @property
    def is_open(self) -> bool:
        """True until the user decides. Until then, the row is used unchanged."""
        return self.remedy.action == "undecided"

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.row


class RowIssue(RowDecision):
    """A row flagged by a check, stored as one line of `data/issues.jsonl`."""

    split: SplitName
    label: str | None = None
    score: float = 0.0

    def decision(self, remedy: Remedy) -> RowDecision:
        return RowDecision(row=self.row, remedy=remedy, source=self.source, check=self.check, place=self.place)


class LabelErrors(Record):
    """Label quality, estimated by cross-validated linear classifiers.

    Recall and precision are measured on labels flipped on purpose.
    """

    judged_rows: int
    agreement: float
    suspects: int
    planted: int
    recall: float
    """Share of flipped labels that the check found."""
    precision: float
    """Estimated share of suspected labels that are really wrong."""
    estimated_errors: float


class Proof(Record):
    """The measured effect of one cleaning step on the same eval rows."""

    check: str
    action: Literal["drop", "replace"]
    rows: int
    before: float
    difference: float
    low: float
    high: float
    """Upper end of a simultaneous 95 % interval over eval rows and, if models were trained, seeds."""
    patch: str = ""


class Proofs(Record):
    """The measured effects of several cleaning steps, from linear classifiers or from whole trainings."""

    fingerprint: str
    eval_rows: int
    repetitions: int
    proofs: tuple[Proof, ...]
    untried: tuple[str, ...] = ()
    source: Literal["classifiers", "trainings"] = "classifiers"
    metric: str = "accuracy"
    greater_is_better: bool = True

    def verdict(self, proof: Proof) -> Literal["helps", "hurts", "no difference found"]:
        """Return whether a cleaning step helps or hurts, or `no difference found` if its interval includes 0."""
        if proof.low <= 0 <= proof.high:
            return "no difference found"
        return "helps" if (proof.low > 0) == self.greater_is_better else "hurts"


class Audit(Record):
    fingerprint: str
    version: str = ""
    """Version of the checks, with the optional packages that were missing."""
    rows: dict[SplitName, int]
    checks: dict[str, int]
    examples: tuple[RowIssue, ...] = ()
    clean: tuple[str, ...] = ()
    labels: LabelErrors | None = None
    languages: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Number of rows by column and language code. Short texts and code are not counted."""
    not_run: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0

    def examples_of(self, check: str) -> list[RowIssue]:
        return [one for one in self.examples if one.check == check]


def load_proofs(folder: Path, audit: Audit) -> list[Proofs]:
    """Load the cleaning effects that were measured for this audit, or return an empty list."""
    paths = (folder / "data" / name for name in (PROOFS, TRAINED_PROOFS))
    loaded = [Proofs.load(path) for path in paths if path.exists()]
    return [proofs for proofs in loaded if proofs.fingerprint == audit.fingerprint]
