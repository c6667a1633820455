"""A recipe for a PyTorch Lightning `Trainer` of one's own: module and rows (docs/guides/training.md)."""

from fulltune.lightning.module import FineTuningData, FineTuningModule
from fulltune.lightning.prepare import FineTuning, prepare

__all__ = ["FineTuning", "FineTuningData", "FineTuningModule", "prepare"]
