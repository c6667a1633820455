from fulltune.lightning.module import FineTuningData, FineTuningModule
from fulltune.lightning.prepare import FineTuning, prepare

__all__ = ["FineTuning", "FineTuningData", "FineTuningModule", "prepare"]
