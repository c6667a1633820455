"""The data stage: files in, checked, split and tokenised rows out. Stage: imports layers 0 and 1 only."""

from fulltune.data.limits import Limits
from fulltune.data.prepare import DROPPED, SUMMARY, prepare

__all__ = ["DROPPED", "SUMMARY", "Limits", "prepare"]
