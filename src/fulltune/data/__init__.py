"""The data stage: files in, checked, split and tokenised rows out. Stage: imports layers 0 and 1 only."""

from fulltune.data.limits import Limits
from fulltune.data.prepare import DROPPED, SUMMARY, prepare
from fulltune.data.readers.given import Given, describe
from fulltune.data.readers.read import Source, Table, locate, read

__all__ = ["DROPPED", "SUMMARY", "Given", "Limits", "Source", "Table", "describe", "locate", "prepare", "read"]
