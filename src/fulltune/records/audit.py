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
"""File in `data` with the place, the hash and the mean loss of each train and eval row."""
HIGH_LOSS = "high loss"
"""Check that lists the rows of highest loss; it does not claim that they are wrong."""


class Remedy(Record):
    """An action on a row, proposed or decided."""

    action: Literal["keep", "drop", "replace", "undecided"]
    column: str | None = None
    """Column that is replaced by `value`."""
    value: Any = None


class RowDecision(Record):
    """A decision about a row: one line of a patch file."""

    row: str
    """Hash of the row's content (`row_id`); the second of two equal rows ends in `-2`."""
    remedy: Remedy
    source: str = "train"
    """Split or file that holds the row."""
    check: str = ""
    """Name of the check that flagged the row."""
    place: str = ""
    """File and line, for readers."""
    text: str = ""
    """Beginning of the row, secrets and personal data masked."""
    reason: str = ""
    proposed: Remedy | None = None

    @property
    def is_open(self) -> bool:
        """True while nobody has decided about the row; it is then used as it is."""
        return self.remedy.action == "undecided"

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.row


class RowIssue(RowDecision):
    """A row that a check flagged: one line of `data/issues.jsonl`. It is used unchanged unless the user decides
    otherwise."""

    split: SplitName
    label: str | None = None
    score: float = 0.0
    """Confidence of the check, higher is surer; rows are reviewed in this order."""

    def decided(self, remedy: Remedy) -> RowDecision:
        """Return the patch file's line for this row."""
        return RowDecision(row=self.row, remedy=remedy, source=self.source, check=self.check, place=self.place)


class LabelErrors(Record):
    """Label quality, judged by cross-validated linear classifiers on frozen features.

    Recall and precision are measured on labels of the same rows that were flipped on purpose.
    """

    judged_rows: int
    agreement: float
    """Share of labels that are also the predicted ones."""
    suspects: int
    doubtful: int
    """Rows for which another label is clearly likelier, but with unknown precision."""
    planted: int
    """Labels flipped on purpose, over all repetitions."""
    recall: float
    """Share of flipped labels that are suspects."""
    precision: float
    """Estimated share of suspects whose label is wrong."""
    estimated_errors: float
    """Estimated number of wrong labels among the judged rows."""


class Proof(Record):
    """Effect of one cleaning step on the metric, on the same eval rows."""

    check: str
    action: Literal["drop", "replace"]
    rows: int
    """Train rows that the step drops or changes."""
    before: float
    """Mean metric without the step."""
    difference: float
    """Mean metric with the step minus without it."""
    low: float
    high: float
    """Simultaneous 95 % interval of the difference, over eval rows (and seeds, for trainings)."""
    patch: str = ""
    """Patch file of this step in the run folder (trainings only)."""


class Proofs(Record):
    """Effects of all cleaning steps, measured by linear classifiers on frozen features or by trainings."""

    fingerprint: str
    eval_rows: int
    repetitions: int
    """Seeds of the trainings, or resamples of the train rows for classifiers."""
    proofs: tuple[Proof, ...]
    untried: tuple[str, ...] = ()
    """Steps that were not tried because they affect too few or too many rows."""
    source: Literal["classifiers", "trainings"] = "classifiers"
    metric: str = "accuracy"
    greater_is_better: bool = True

    def verdict(self, proof: Proof) -> Literal["helps", "hurts", "no difference found"]:
        """Read the verdict from the proof's interval."""
        if proof.low <= 0 <= proof.high:
            return "no difference found"
        return "helps" if (proof.low > 0) == self.greater_is_better else "hurts"


class Audit(Record):
    """Summary of an audit."""

    fingerprint: str
    """Fingerprint of the prepared rows."""
    version: str = ""
    """Version of the checks, with the extras that were missing."""
    rows: dict[SplitName, int]
    """Audited rows of each split."""
    checks: dict[str, int]
    """Rows that each check flagged, most first."""
    examples: tuple[RowIssue, ...] = ()
    """Most confident rows of each check."""
    clean: tuple[str, ...] = ()
    """Checks that flagged nothing."""
    labels: LabelErrors | None = None
    languages: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Rows by column and language code, most frequent first; short texts and code are not counted."""
    not_run: dict[str, str] = Field(default_factory=dict)
    """Reason for each check that did not run, such as a missing extra."""
    seconds: float = 0.0

    def examples_of(self, check: str) -> list[RowIssue]:
        return [one for one in self.examples if one.check == check]


def proofs_of(folder: Path, audit: Audit) -> list[Proofs]:
    """Load the proofs in a run folder that belong to this audit's rows."""
    paths = (folder / "data" / name for name in (PROOFS, TRAINED_PROOFS))
    loaded = [Proofs.load(path) for path in paths if path.exists()]
    return [proofs for proofs in loaded if proofs.fingerprint == audit.fingerprint]
