from __future__ import annotations

from fulltune.records.base import Record
from fulltune.records.scores import Estimate
from fulltune.records.training import Check

VERIFICATION = "verify.json"


class ExportCheck(Check):
    """A comparison of an exported model with its source."""

    expected: str
    passed: bool = True


class MetricPair(Record):
    """A metric of the source model and the exported model on the same test rows."""

    source: float
    export: float
    difference: Estimate | None
    """Export minus source with its interval, or None if there are too few rows."""


class Verification(Record):
    """How an exported model was compared with its source; stored beside the export."""

    format: str
    stored_as: str | None
    """Quantization or dtype that the user chose, or None for the dtype of the source."""
    rows: int
    """Number of test rows that both models answered."""
    checks: tuple[ExportCheck, ...]
    metrics: dict[str, MetricPair]
    packages: dict[str, str]
    """Versions of the packages that wrote and ran the export."""

    @property
    def failed(self) -> tuple[ExportCheck, ...]:
        return tuple(check for check in self.checks if not check.passed)
