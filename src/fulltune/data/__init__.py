"""The data stage: files in, checked, split and tokenised rows out."""

from fulltune.data.limits import Limits
from fulltune.data.prepare import DROPPED, SUMMARY, prepare

__all__ = ["DROPPED", "SUMMARY", "Limits", "prepare"]
