"""The data stage: files in, checked, split and tokenised rows out. Stage: imports layers 0 and 1 only."""

from fulltune.data.prepare import DROPPED, SUMMARY, describe, prepare
from fulltune.data.read import Table, read

__all__ = ["DROPPED", "SUMMARY", "Table", "describe", "prepare", "read"]
