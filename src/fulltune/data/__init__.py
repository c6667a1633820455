from fulltune.data.limits import Limits
from fulltune.data.prepare import SUMMARY, Stage, prepare
from fulltune.data.sources import file_problems
from fulltune.data.written import DROPPED

__all__ = ["DROPPED", "SUMMARY", "Limits", "Stage", "file_problems", "prepare"]
