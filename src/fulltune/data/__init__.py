"""The data stage: files in, checked, split and tokenised rows out."""

from fulltune.data.limits import Limits
from fulltune.data.prepare import SUMMARY, Stage, prepare
from fulltune.data.probe_rows import refuse_trained_texts
from fulltune.data.sources import wrong_files
from fulltune.data.written import DROPPED

__all__ = [
    "DROPPED",
    "SUMMARY",
    "Limits",
    "Stage",
    "prepare",
    "refuse_trained_texts",
    "wrong_files",
]
