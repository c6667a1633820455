"""The data stage: files in, checked, split and tokenised rows out."""

from fulltune.data.audit import audit, load_issues
from fulltune.data.judge import Reader, judge
from fulltune.data.limits import Limits
from fulltune.data.losses import list_losses
from fulltune.data.outliers import outliers
from fulltune.data.prepare import SUMMARY, prepare
from fulltune.data.probe_rows import refuse_trained_texts
from fulltune.data.prove import prove, refuse_prove
from fulltune.data.sources import wrong_files
from fulltune.data.written import DROPPED

__all__ = [
    "DROPPED",
    "SUMMARY",
    "Limits",
    "Reader",
    "audit",
    "judge",
    "list_losses",
    "load_issues",
    "outliers",
    "prepare",
    "prove",
    "refuse_prove",
    "refuse_trained_texts",
    "wrong_files",
]
