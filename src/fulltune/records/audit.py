"""Records of an audit: suspicious rows with their reasons, label errors, and what cleaning would change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.data import SplitName

ISSUES, AUDIT = "issues.jsonl", "audit.json"
PROOFS, TRAINED_PROOFS = "proofs.json", "trained_proofs.json"
"""Files in the run folder's `data`."""
LOSSES = "losses.jsonl"
"""File in `data` with place, hash and mean loss of each train and eval row."""
HIGH_LOSS = "high loss"
"""Check that lists the rows of highest loss, right or wrong."""


class Remedy(Record):
    """An action on a row, proposed or decided."""

    action: Literal["keep", "drop", "replace", "undecided"]
    column: str | None = None
    value: Any = None


class RowDecision(Record):
    """A decision about a row: a line of a patch file."""

    row: str
    """Hash of the row (`row_id`), with `-2` for a second equal row."""
    remedy: Remedy
    source: str = "train"
    """Split or file that holds the row."""
    check: str = ""
    place: str = ""
    """File and line, for readers."""
    text: str = ""
    """Beginning of the row, with secrets masked."""
    reason: str = ""
    proposed: Remedy | None = None

    @property
    def is_open(self) -> bool:
        """True while nobody has decided; the row is then used unchanged."""
        return self.remedy.action == "undecided"

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.row


class RowIssue(RowDecision):
    """A row that a check flagged, used unchanged until the user decides: a line of `data/issues.jsonl`."""

    split: SplitName
    label: str | None = None
    score: float = 0.0
    """Confidence of the check; higher is surer."""

    def decision(self, remedy: Remedy) -> RowDecision:
        """Return the line of a patch file."""
        return RowDecision(row=self.row, remedy=remedy, source=self.source, check=self.check, place=self.place)


class LabelErrors(Record):
    """Label quality by cross-validated linear classifiers.

    Recall and precision are measured on labels flipped on purpose.
    """

    judged_rows: int
    agreement: float
    """Share of labels that are predicted."""
    suspects: int
    doubtful: int
    """Rows with a clearly likelier label, of unknown precision."""
    planted: int
    """Labels flipped on purpose, over all rounds."""
    recall: float
    """Share of flipped labels that are suspects."""
    precision: float
    """Estimated share of suspects whose label is wrong."""
    estimated_errors: float
    """Estimated number of wrong labels."""


class Proof(Record):
    """Effect of a cleaning step on the same eval rows."""

    check: str
    action: Literal["drop", "replace"]
    rows: int
    """Train rows dropped or changed."""
    before: float
    """Mean metric without the step."""
    difference: float
    """Mean metric with the step minus without."""
    low: float
    high: float
    """Simultaneous 95 % interval over eval rows, and over seeds for trainings."""
    patch: str = ""
    """Patch file of a training's step."""


class Proofs(Record):
    """Effects of cleaning steps, measured by linear classifiers or trainings."""

    fingerprint: str
    eval_rows: int
    repetitions: int
    """Seeds, or resamples for classifiers."""
    proofs: tuple[Proof, ...]
    untried: tuple[str, ...] = ()
    """Steps with too few or too many rows."""
    source: Literal["classifiers", "trainings"] = "classifiers"
    metric: str = "accuracy"
    greater_is_better: bool = True

    def verdict(self, proof: Proof) -> Literal["helps", "hurts", "no difference found"]:
        if proof.low <= 0 <= proof.high:
            return "no difference found"
        return "helps" if (proof.low > 0) == self.greater_is_better else "hurts"


class Audit(Record):
    """Summary of an audit."""

    fingerprint: str
    version: str = ""
    """Version of the checks and their missing extras."""
    rows: dict[SplitName, int]
    checks: dict[str, int]
    """Flagged rows of each check, most first."""
    examples: tuple[RowIssue, ...] = ()
    """Surest rows of each check."""
    clean: tuple[str, ...] = ()
    """Checks that flagged nothing."""
    labels: LabelErrors | None = None
    languages: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Rows by column and language code; short texts and code are not counted."""
    not_run: dict[str, str] = Field(default_factory=dict)
    """Reason for each check that did not run."""
    seconds: float = 0.0

    def examples_of(self, check: str) -> list[RowIssue]:
        return [one for one in self.examples if one.check == check]


def proofs_of(folder: Path, audit: Audit) -> list[Proofs]:
    """Load a run's proofs for this audit."""
    paths = (folder / "data" / name for name in (PROOFS, TRAINED_PROOFS))
    loaded = [Proofs.load(path) for path in paths if path.exists()]
    return [proofs for proofs in loaded if proofs.fingerprint == audit.fingerprint]
